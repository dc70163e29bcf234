//! A program that takes the output of a process (`binary://`), from its start to its end.
//!
//! The shim starts itself, and that becomes the program: what a child has to do between fork and exec, to get its
//! descriptors into place and to go with the shim, would be unsafe in a process with threads.

use std::io::{self, pipe};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::{Pid, getppid};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::time::{sleep, timeout};

use crate::error::{Result, ShimError};

/// The action by which the shim becomes a logging program.
pub(crate) const ACTION: &str = "log";
/// Time for it to say that it is ready.
const READY: Duration = Duration::from_secs(10);
/// Time for it to end by itself when its streams have ended, and then after SIGTERM.
const LAST_LINES: Duration = Duration::from_secs(5);
const AFTER_TERM: Duration = Duration::from_secs(4);

/// A running program. It is killed when dropped.
#[derive(Debug)]
pub(crate) struct Logger(Child);

/// What the program reads.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) stdout: Sender,
    pub(crate) stderr: Sender,
}

/// Whose output it takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owner<'a> {
    pub(crate) namespace: &'a str,
    /// Of the container, or of the process that was added to it.
    pub(crate) id: &'a str,
}

impl Logger {
    /// Starts it, and waits until it is ready. To be called on the shim's main thread, with whose end the kernel kills it.
    pub(crate) async fn start(
        path: &Path,
        arguments: &[String],
        owner: Owner<'_>,
    ) -> Result<(Self, Streams)> {
        let failed = |error: io::Error| {
            ShimError::invalid(format!("Logging program {} cannot be started: {error}", path.display()))
        };
        // That its exec fails would be told by its end alone.
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
            return Err(failed(io::ErrorKind::PermissionDenied.into()));
        }
        let ((stdout, to_stdout), (stderr, to_stderr)) = (pipe().map_err(failed)?, pipe().map_err(failed)?);
        let (ready, tell_ready) = pipe().map_err(failed)?;
        // The command goes at the end of the statement, and with it the shim's own ends of the pipes.
        let child = Command::new(std::env::current_exe().map_err(failed)?)
            .arg(ACTION)
            .arg(std::process::id().to_string())
            .arg(path)
            .args(arguments)
            .env_clear()
            .env("CONTAINER_ID", owner.id)
            .env("CONTAINER_NAMESPACE", owner.namespace)
            .stdin(Stdio::from(OwnedFd::from(stdout)))
            .stdout(Stdio::from(OwnedFd::from(stderr)))
            .stderr(Stdio::from(OwnedFd::from(tell_ready)))
            .spawn()
            .map_err(failed)?;
        let logger = Self(child);
        let sender = |fd: io::PipeWriter| Sender::from_owned_fd(OwnedFd::from(fd)).map_err(failed);
        let streams = Streams { stdout: sender(to_stdout)?, stderr: sender(to_stderr)? };
        let mut ready = Receiver::from_owned_fd(OwnedFd::from(ready)).map_err(failed)?;
        // A byte, or the end of the pipe.
        let said = timeout(READY, ready.read(&mut [0])).await;
        said.map_err(|_| {
            failed(io::Error::other(
                "it does not say that it is ready, by a byte or the end of its descriptor 5",
            ))
        })?
        .map_err(failed)?;
        Ok((logger, streams))
    }

    /// Sees to its end, when its streams have ended.
    pub(crate) async fn end(mut self) {
        if self.ends_within(LAST_LINES).await {
            return;
        }
        if let Ok(pid) = i32::try_from(self.0.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        self.ends_within(AFTER_TERM).await;
    }

    async fn ends_within(&mut self, limit: Duration) -> bool {
        let ended = async {
            while matches!(self.0.try_wait(), Ok(None)) {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(limit, ended).await.is_ok()
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// Carries the action out: `PARENT PROGRAM [ARGUMENT...]`. Standard input, output and error become 3, 4 and 5, which is
/// where the program looks for the streams and for where to say that it is ready. Only returns if that fails.
pub(crate) fn become_program(mut arguments: impl Iterator<Item = String>) -> io::Error {
    let parent = arguments.next();
    let Some(program) = arguments.next() else {
        return io::Error::other("the action `log` is the shim's own");
    };
    let ready = || -> io::Result<()> {
        set_pdeathsig(Signal::SIGKILL)?;
        // A shim that went before that is not told of.
        if parent != Some(getppid().to_string()) {
            return Err(io::Error::other("the shim is gone"));
        }
        // The shim's own mask is inherited.
        SigSet::empty().thread_set_mask()?;
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        for (place, fd) in (3..).zip([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]) {
            if fcntl(fd, FcntlArg::F_DUPFD(place))? != place {
                return Err(io::Error::other(format!("descriptor {place} is taken")));
            }
        }
        Ok(())
    };
    if let Err(error) = ready() {
        return error;
    }
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.exec()
}
