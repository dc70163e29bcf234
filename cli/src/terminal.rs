//! The caller's terminal: raw while a process of the guest has it, and as it was afterwards.

use std::io::{self, IsTerminal};

use krx_proto::TerminalSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Whether standard input is a terminal.
pub(crate) fn is_terminal() -> bool {
    io::stdin().is_terminal()
}

/// Size of the terminal, or that of a terminal of old where there is none.
pub(crate) fn size() -> TerminalSize {
    let of = |size: rustix::termios::Winsize| TerminalSize { columns: size.ws_col, rows: size.ws_row };
    tcgetwinsize(io::stdout())
        .or_else(|_| tcgetwinsize(io::stdin()))
        .map_or(TerminalSize { columns: 80, rows: 24 }, of)
}

/// The terminal in raw mode until dropped: every key goes to the guest, Ctrl-C included.
pub(crate) struct Raw(Termios);

impl Raw {
    pub(crate) fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Drain, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}
