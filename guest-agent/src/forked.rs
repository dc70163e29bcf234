//! A process that the agent has forked: what it holds of it, and how it hears of its way to the exec.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use krx_proto::{AgentError, ErrorKind};
use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::write;

use crate::child::{self, ChildEnds, MAX_REPORT, Report};
use crate::container::ContainerPlan;
use crate::error::{Doing, StepError};
use crate::lifecycle::{Caller, Lifecycle, Next, Reply};
use crate::process::ProcessPlan;
use crate::stdio::Streams;
use crate::{outside, sys};

#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// The control connection that made it, and whether that is gone.
    pub(crate) connection: u32,
    pub(crate) orphaned: bool,
    pub(crate) life: Lifecycle,
    pub(crate) streams: Streams,
    /// Until its exec.
    pub(crate) sync: Option<OwnedFd>,
}

impl Process {
    /// Whether this is the process with that PID now: the number of an ended one may be another's.
    pub(crate) fn is(&self, pid: i32) -> bool {
        self.pid == pid && !self.life.has_exited()
    }

    pub(crate) fn public_pid(&self) -> u32 {
        self.pid.try_into().unwrap_or(0)
    }

    /// Lets it exec.
    pub(crate) fn release(&self) {
        if let Some(sync) = &self.sync {
            // Where it is dead already, its end is the next event.
            let _ = write(sync, &[1]);
        }
    }

    pub(crate) fn take_reports(&mut self, replies: &mut Vec<Reply>) {
        while let Some(sync) = &self.sync {
            let mut buffer = [0; MAX_REPORT];
            let (length, terminal) = match sys::socket::receive(sync.as_fd(), &mut buffer) {
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                // Any other error ends the connection as its close does.
                Err(_) => (0, None),
                Ok(received) => received,
            };
            if length == 0 {
                self.sync = None;
                self.life.disconnected(replies);
                return;
            }
            let frame = krx_proto::read_frame::<Report>(&mut &buffer[..length]);
            match frame.unwrap_or_else(|_| Err(no_report())) {
                Ok(()) => {
                    if let Some(terminal) = terminal {
                        self.streams.set_terminal(terminal);
                    }
                    if self.life.ready(self.public_pid(), replies) == Next::Release {
                        self.release();
                    }
                }
                Err(error) => self.life.failed(error),
            }
        }
    }
}

/// Forks a child that runs `body`, and ends should that return.
pub(crate) fn fork(
    caller: Caller,
    plan: &ProcessPlan,
    namespaces: CloneFlags,
    cgroup: BorrowedFd<'_>,
    body: impl FnOnce(&ChildEnds),
) -> Result<(Process, OwnedFd), StepError> {
    let doing = || "Cannot make a process";
    let (streams, stdio) = Streams::new(plan)?;
    let flags = SockFlag::SOCK_CLOEXEC;
    let (sync, child_sync) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).doing(doing)?;
    let ends = ChildEnds { sync: child_sync, stdio };
    match sys::process::fork_into(namespaces, Some(cgroup)).doing(doing)? {
        None => {
            body(&ends);
            sys::process::exit(1)
        }
        Some(sys::process::Child { pid, pidfd }) => {
            let process = Process {
                pid,
                connection: caller.connection,
                orphaned: false,
                life: Lifecycle::new(caller),
                streams,
                sync: Some(sync),
            };
            Ok((process, pidfd))
        }
    }
}

/// Makes a container's first process: in a user namespace, with somebody outside to help it.
pub(crate) fn make_first(
    caller: Caller,
    plan: &ContainerPlan,
    namespaces: CloneFlags,
    cgroup: BorrowedFd<'_>,
) -> Result<(Process, OwnedFd), StepError> {
    let Some(namespace) = &plan.user_namespace else {
        return fork(caller, &plan.process, namespaces, cgroup, |ends| child::first(plan, ends, None));
    };
    let (outside, helper) = outside::meeting()?;
    let (process, first) = fork(caller, &plan.process, namespaces, cgroup, |ends| {
        child::first(plan, ends, Some(&outside));
    })?;
    helper.begin(plan, namespace, (process.pid, first.as_fd()))?;
    Ok((process, first))
}

fn no_report() -> AgentError {
    AgentError::new(ErrorKind::Failed, "The process sent no valid report")
}
