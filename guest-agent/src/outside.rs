//! What is done for a container in a user namespace from outside of it. Its first process is in that namespace from its
//! first instruction on, as its PID namespace has to belong to it, and has no power over anything else. So a second process
//! of the agent, the helper, hands it what comes from the guest ([`crate::sources`]), and sets what only the guest's root may
//! set: names and kernel parameters of the guest's namespaces, and limits.
//!
//! They talk over a socket. The helper says when the IDs are mapped, sets names and parameters, hands over the sources, one a
//! message, and waits for the process to have done with them; then it sets the limits, says so, and ends. A failure is said in the place of any of
//! these.

use std::iter;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use krx_proto::{AgentError, ErrorKind, UserNamespace, id_map};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{Gid, Uid, read, setgroups, setresgid, setresuid, write};

use crate::child::{self, MAX_REPORT, Report, name, open_proc, set_sysctl};
use crate::container::ContainerPlan;
use crate::error::{Doing, StepError};
use crate::guest::write_file;
use crate::user_namespace::is_own_parameter;
use crate::{sources, sys};

/// The helper's end, until it exists.
#[derive(Debug)]
pub(crate) struct Helper(OwnedFd);

/// The first process's end.
#[derive(Debug)]
pub(crate) struct Outside(OwnedFd);

/// Where both will meet.
pub(crate) fn meeting() -> Result<(Outside, Helper), StepError> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (outside, helper) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
        .doing(|| "Cannot make a socket for a container in a user namespace")?;
    Ok((Outside(outside), Helper(helper)))
}

impl Helper {
    /// Maps the IDs of the container's first process, and begins to help it.
    pub(crate) fn begin(
        self,
        plan: &ContainerPlan,
        namespace: &UserNamespace,
        (pid, first): (i32, BorrowedFd<'_>),
    ) -> Result<(), StepError> {
        map_ids(pid, namespace)?;
        // In the agent's cgroup: the container's may have room for one process alone.
        let made = sys::process::fork_into(CloneFlags::CLONE_NEWNS, None);
        if made.doing(|| "Cannot make a process that helps the container's first")?.is_none() {
            let keep: Vec<_> = iter::once(first).chain(plan.root.kept()).collect();
            child::helper(self.0.as_fd(), &keep, || self.help(plan, (pid, first)));
        }
        Ok(())
    }

    fn help(&self, plan: &ContainerPlan, (pid, first): (i32, BorrowedFd<'_>)) -> Result<(), StepError> {
        self.tell(None)?;
        // First: with the last of the sources the first process goes on to its hooks.
        let proc = open_proc()?;
        let own = plan.namespaces & CloneFlags::CLONE_NEWUTS;
        if !own.is_empty() {
            setns(first, own).doing(|| "Cannot join the container's UTS namespace")?;
        }
        name(plan)?;
        for (path, value) in &plan.sysctls {
            if !is_own_parameter(path, plan.namespaces) {
                set_sysctl(proc.as_fd(), path, value)?;
            }
        }
        sources::take(&plan.root, |tree| self.tell(Some(&tree)))?;
        loop {
            match read(&self.0, &mut [0]) {
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error).doing(|| "Cannot hear of the container's first process"),
                // It has failed, and ended.
                Ok(0) => return Ok(()),
                Ok(_) => return plan.process.govern(pid, proc.as_fd()),
            }
        }
    }

    fn tell(&self, tree: Option<&OwnedFd>) -> Result<(), StepError> {
        child::report(self.0.as_fd(), &Ok(()), tree).doing(|| "Cannot help the container's first process")
    }
}

/// Maps the IDs of the user namespace that a process alone is in.
pub(crate) fn map_ids(pid: i32, UserNamespace { uids, gids }: &UserNamespace) -> Result<(), StepError> {
    let proc = open_proc()?;
    for (name, map) in [("uid_map", uids), ("gid_map", gids)] {
        write_file(proc.as_fd(), &format!("{pid}/{name}"), &id_map(map))
            .doing(|| format!("Cannot write the {name} of a user namespace"))?;
    }
    Ok(())
}

impl Outside {
    /// Waits until the calling process has IDs.
    pub(crate) fn await_ids(&self) -> Result<(), AgentError> {
        self.receive().map(drop)
    }

    pub(crate) fn next_source(&self) -> Result<OwnedFd, AgentError> {
        self.receive()?.ok_or_else(silence)
    }

    /// Has the calling process's limits set, which ends the help.
    pub(crate) fn await_limits(&self) -> Result<(), AgentError> {
        // Where the helper has failed, it has said so.
        let _ = write(&self.0, &[1]);
        match self.receive()? {
            None => Ok(()),
            // Of another length than what is attached: limits are not set.
            Some(_) => Err(silence()),
        }
    }

    fn receive(&self) -> Result<Option<OwnedFd>, AgentError> {
        let doing = || "Cannot hear of what is made outside of the user namespace";
        let mut buffer = [0; MAX_REPORT];
        loop {
            let mut waits = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut waits, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(StepError::new(doing(), error).into()),
            }
            match sys::socket::receive(self.0.as_fd(), &mut buffer) {
                // That it has ended without having read all that it was told comes before what it said.
                Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNRESET) => {}
                Err(error) => return Err(StepError::new(doing(), error).into()),
                Ok((length, tree)) => {
                    let said = krx_proto::read_frame::<Report>(&mut &buffer[..length]);
                    return said.unwrap_or_else(|_| Err(silence())).map(|()| tree);
                }
            }
        }
    }
}

impl AsFd for Outside {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn silence() -> AgentError {
    AgentError::new(ErrorKind::Failed, "The process that helps a container in a user namespace has ended")
}

/// Becomes the root of the user namespace that the calling process is in, out of whom it was in the guest.
pub(crate) fn become_root() -> Result<(), StepError> {
    let doing = || "Cannot become root of the user namespace";
    let (user, group) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[]).doing(doing)?;
    setresgid(group, group, group).doing(doing)?;
    setresuid(user, user, user).doing(doing)
}
