//! A terminal with `krx` on it, as a person has one.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};

use crate::pod::{Place, patience, until};

/// `krx` is its session's leader.
#[derive(Debug)]
pub struct Terminal {
    pub master: File,
    krx: Child,
}

impl Terminal {
    /// `krx run` with these options.
    #[must_use]
    pub fn new(place: &Place, options: &[&str], command: &[&str]) -> Self {
        Self::of(place, &place.run(options, command))
    }

    /// # Panics
    /// When there is no terminal to be had.
    #[must_use]
    pub fn of(place: &Place, krx: &Command) -> Self {
        let size = Winsize { ws_row: 33, ws_col: 99, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&size), None).expect("pty");
        // setsid(1) makes the terminal the controlling one.
        let mut on_terminal = Command::new("setsid");
        on_terminal.args(["--ctty", "--wait"]).arg(krx.get_program()).args(krx.get_args());
        on_terminal.env("KRX_STATE_DIR", place.state()).env("TERM", "xterm-256color");
        let slave = |fd: &OwnedFd| Stdio::from(fd.try_clone().expect("clone"));
        let krx =
            on_terminal.stdin(slave(&pty.slave)).stdout(slave(&pty.slave)).stderr(slave(&pty.slave)).spawn();
        Self { master: pty.master.into(), krx: krx.expect("setsid") }
    }

    /// # Panics
    /// When the terminal is gone.
    pub fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("terminal");
    }

    /// Reads until `word` was shown; all of it.
    ///
    /// # Panics
    /// When it is not in time.
    pub fn expect(&mut self, word: &str) -> String {
        let mut seen = Vec::new();
        let deadline = Instant::now() + patience(Duration::from_secs(90));
        while !String::from_utf8_lossy(&seen).contains(word) {
            let left = deadline.saturating_duration_since(Instant::now());
            let text = String::from_utf8_lossy(&seen).into_owned();
            let fd = PollFd::new(self.master.as_fd(), PollFlags::POLLIN);
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let ready = poll(&mut [fd], timeout).expect("poll");
            assert!(ready > 0, "`{word}` did not appear in {text:?}");
            let mut buffer = [0; 4096];
            let read = self.master.read(&mut buffer).unwrap_or_else(|error| panic!("{error} after {text:?}"));
            seen.extend_from_slice(&buffer[..read]);
        }
        String::from_utf8_lossy(&seen).into_owned()
    }

    /// Gives it another size.
    ///
    /// # Panics
    /// When that cannot be.
    pub fn resize(&self, rows: u16, columns: u16) {
        // stty(1) sets the size and the kernel tells the foreground group of the terminal, which is krx.
        let fd = self.master.try_clone().expect("clone");
        let status = Command::new("stty")
            .args(["rows", &rows.to_string(), "cols", &columns.to_string()])
            .stdin(Stdio::from(fd))
            .status();
        assert!(status.expect("stty").success());
    }

    /// The exit code of `krx`.
    ///
    /// # Panics
    /// When it does not end.
    #[must_use]
    pub fn end(mut self) -> i32 {
        let status = until(Duration::from_secs(60), || self.krx.try_wait().expect("wait")).expect("krx ends");
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
    }
}
