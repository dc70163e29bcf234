//! The agent's ends of a process's standard streams, until a connection of the host takes them.
//!
//! A stream that nobody has taken is a pipe with nobody at its other end: a process that writes fills it and waits.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use krx_proto::{Stream, TerminalSize};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;
use nix::unistd::{fchown, pipe2};

use crate::child::ChildStdio;
use crate::error::{Doing, StepError};
use crate::process::ProcessPlan;
use crate::relay::{LastWords, Relay};
use crate::sys;

/// How long a terminal may take to deliver what was written to it.
const LINGER: Duration = Duration::from_millis(100);

/// What has not been taken yet.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// Stays here while a connection has it, for the window size, and for a connection that follows the first.
    terminal: Option<Rc<OwnedFd>>,
    last_words: LastWords,
}

impl Streams {
    /// Both sides of what the process will read and write. A terminal is made by the process, in its container.
    pub(crate) fn new(plan: &ProcessPlan) -> Result<(Self, ChildStdio), StepError> {
        let doing = || "Cannot make the pipes of the standard streams";
        if let Some(size) = plan.terminal {
            return Ok((Self::default(), ChildStdio::Terminal(size)));
        }
        let (user, group) = plan.owner;
        // A process may open its streams anew by /proc/self/fd; only their owner can. /dev/null is nobody's.
        let pipe = || -> nix::Result<_> {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
            fchown(&reader, Some(user), Some(group))?;
            Ok((reader, writer))
        };
        let mut streams = Self::default();
        let stdin = if plan.stdin {
            let (reader, writer) = pipe().doing(doing)?;
            streams.stdin = Some(without_blocking(writer).doing(doing)?);
            reader
        } else {
            open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).doing(doing)?
        };
        let output = || -> nix::Result<_> {
            let (reader, writer) = pipe()?;
            Ok((without_blocking(reader)?, writer))
        };
        let (stdout_reader, stdout) = output().doing(doing)?;
        let (stderr_reader, stderr) = output().doing(doing)?;
        (streams.stdout, streams.stderr) = (Some(stdout_reader), Some(stderr_reader));
        Ok((streams, ChildStdio::Streams { stdin, stdout, stderr }))
    }

    /// The terminal that the process has made.
    pub(crate) fn set_terminal(&mut self, controller: OwnedFd) {
        self.terminal = without_blocking(controller).ok().map(Rc::new);
    }

    /// Joins a stream to a connection. `None`: the process has no such stream, or another connection has it.
    pub(crate) fn attach(&mut self, stream: Stream, connection: OwnedFd) -> Option<Vec<Relay>> {
        let connection = Rc::new(connection);
        let output = |from: Option<OwnedFd>| Some(vec![Relay::output(Rc::new(from?), connection.clone())]);
        match stream {
            Stream::Stdin => Some(vec![Relay::input(connection, Rc::new(self.stdin.take()?))]),
            Stream::Stdout => output(self.stdout.take()),
            Stream::Stderr => output(self.stderr.take()),
            Stream::Terminal => {
                let terminal = self.terminal.clone()?;
                Some(vec![
                    Relay::terminal_input(connection.clone(), terminal.clone()),
                    Relay::terminal_output(terminal, connection, self.last_words.clone()),
                ])
            }
        }
    }

    /// The process has ended. What it wrote may still be on its way through its terminal, which others may hold on to.
    pub(crate) fn process_ended(&self) {
        self.last_words.set(Some(Instant::now() + LINGER));
    }

    /// Sets the terminal's size. `None`: there is no terminal.
    pub(crate) fn resize(&self, size: TerminalSize) -> Option<Result<(), StepError>> {
        use std::os::fd::AsFd;
        let terminal = self.terminal.as_ref()?;
        Some(sys::terminal::set_size(terminal.as_fd(), size).doing(|| "Cannot set the size of the terminal"))
    }
}

/// The agent's own ends never block; what the process does with its ends is its own affair.
fn without_blocking(end: OwnedFd) -> nix::Result<OwnedFd> {
    let flags = OFlag::from_bits_truncate(fcntl(&end, FcntlArg::F_GETFL)?);
    fcntl(&end, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(end)
}
