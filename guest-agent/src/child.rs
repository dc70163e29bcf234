//! What happens between the fork and the exec, in the process that will be the container's.
//!
//! It prepares everything, reports, waits to be started, and execs. The agent has one thread, so the child may do what
//! any process may; it never returns to the agent's code, and keeps none of the agent's descriptors.
//!
//! The agent made itself undumpable, which the child inherits until its exec: nobody in the container it enters can
//! look into its memory or its descriptors.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use krx_proto::{AgentError, ErrorKind, TerminalSize};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::SigSet;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Uid, fchdir, fchown, read, sethostname, setsid};

use crate::container::{ContainerPlan, NEW_TIME};
use crate::error::{Doing, StepError};
use crate::guest::write_file;
use crate::hooks::{HooksPlan, Point};
use crate::outside::{Outside, become_root};
use crate::process::ProcessPlan;
use crate::rootfs::{self, Root};
use crate::terminal::Pair;
use crate::user_namespace::is_own_parameter;
use crate::{sources, sys};

/// Longest report, so that a program name of megabytes does not exceed what the socket takes.
pub(crate) const MAX_REPORT: usize = 4096;
const MAX_MESSAGE: usize = 2048;

/// What the child holds of what it shares with the agent.
#[derive(Debug)]
pub(crate) struct ChildEnds {
    pub(crate) sync: OwnedFd,
    pub(crate) stdio: ChildStdio,
}

#[derive(Debug)]
pub(crate) enum ChildStdio {
    Streams { stdin: OwnedFd, stdout: OwnedFd, stderr: OwnedFd },
    Terminal(TerminalSize),
}

/// What the child says to the agent: once when it is ready, and again when its exec has failed.
pub(crate) type Report = Result<(), AgentError>;

/// The container's first process; it is in the container's namespaces already, but for the cgroup namespace. Where there is
/// a user namespace among them, `outside` is who can do what it cannot.
pub(crate) fn first(plan: &ContainerPlan, ends: &ChildEnds, outside: Option<&Outside>) -> ! {
    let keep: Vec<_> = plan.root.kept().chain(outside.map(AsFd::as_fd)).collect();
    run(ends, &plan.process, &keep, || {
        outside.map_or(Ok(()), Outside::await_ids)?;
        let proc = open_proc()?;
        // Here and not at the fork: its root is the cgroup of the process that makes it.
        let late = plan.namespaces & (CloneFlags::CLONE_NEWCGROUP | NEW_TIME);
        unshare(late).doing(|| "Cannot make the cgroup or time namespace")?;
        if !plan.time_offsets.is_empty() {
            write_file(proc.as_fd(), "self/timens_offsets", &plan.time_offsets)
                .doing(|| "Cannot set the clocks of the time namespace")?;
        }
        if plan.namespaces.contains(CloneFlags::CLONE_NEWNET) {
            sys::socket::loopback_up().doing(|| "Cannot set the loopback interface up")?;
        }
        let root = match outside {
            None => {
                name(plan)?;
                let mut taken = VecDeque::new();
                sources::take(&plan.root, |tree| {
                    taken.push_back(tree);
                    Ok(())
                })?;
                let missing = || StepError::new("Cannot make the container's mounts", Errno::ENOENT).into();
                rootfs::enter(&plan.root, &plan.process.cwd, || taken.pop_front().ok_or_else(missing))?
            }
            Some(outside) => {
                // Not earlier: the process's own files in /proc are the guest's root's.
                become_root()?;
                rootfs::enter(&plan.root, &plan.process.cwd, || outside.next_source())?
            }
        };
        for (path, value) in &plan.sysctls {
            if outside.is_none() || is_own_parameter(path, plan.namespaces) {
                set_sysctl(proc.as_fd(), path, value)?;
            }
        }
        plan.hooks.run(Point::Create)?;
        let limits = outside.map_or(Limits::Own, Limits::Outside);
        Ok(Entered { root, proc, limits, is_first: true, hooks: Some(&plan.hooks) })
    })
}

/// Sets the names of the calling process's UTS namespace.
pub(crate) fn name(plan: &ContainerPlan) -> Result<(), StepError> {
    if let Some(hostname) = &plan.hostname {
        sethostname(hostname).doing(|| format!("Cannot set the hostname {hostname}"))?;
    }
    if let Some(domainname) = &plan.domainname {
        sys::process::set_domainname(domainname)
            .doing(|| format!("Cannot set the domain name {domainname}"))?;
    }
    Ok(())
}

/// A further process: it joins the namespaces of the first one.
pub(crate) fn further(plan: &ProcessPlan, ends: &ChildEnds, first: BorrowedFd<'_>, joined: CloneFlags) -> ! {
    run(ends, plan, &[first], || {
        let proc = open_proc()?;
        let joins_users = joined.contains(CloneFlags::CLONE_NEWUSER);
        if joins_users {
            plan.govern(0, proc.as_fd())?;
        }
        setns(first, joined).doing(|| "Cannot join the container's namespaces")?;
        if joins_users {
            become_root()?;
        }
        let limits = if joins_users { Limits::Set } else { Limits::Own };
        Ok(Entered { root: Root::own()?, proc, limits, is_first: false, hooks: None })
    })
}

/// A process that does work for the agent which may block, says how that went, and ends.
pub(crate) fn helper(
    sync: BorrowedFd<'_>,
    keep: &[BorrowedFd<'_>],
    work: impl FnOnce() -> Result<(), StepError>,
) -> ! {
    let done = leave_agent(&[&[sync], keep].concat()).and_then(|()| work());
    let _ = report(sync, &done.map_err(AgentError::from), None);
    sys::process::exit(0)
}

/// Where a child is once it is in its container.
struct Entered<'a> {
    root: Root,
    /// The guest's `/proc`, which the container's may not resemble.
    proc: OwnedFd,
    limits: Limits<'a>,
    is_first: bool,
    hooks: Option<&'a HooksPlan>,
}

/// Who sets what [`ProcessPlan::govern`] does.
enum Limits<'a> {
    /// The process itself, in the guest's user namespace.
    Own,
    /// It has done so before it joined another.
    Set,
    Outside(&'a Outside),
}

fn run<'a>(
    ends: &ChildEnds,
    plan: &ProcessPlan,
    keep: &[BorrowedFd<'_>],
    enter: impl FnOnce() -> Result<Entered<'a>, AgentError>,
) -> ! {
    let mut kept = vec![ends.sync.as_fd()];
    if let ChildStdio::Streams { stdin, stdout, stderr } = &ends.stdio {
        kept.extend([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]);
    }
    kept.extend(keep);
    let prepared = leave_agent(&kept)
        .map_err(AgentError::from)
        .and_then(|()| enter())
        .and_then(|at| Ok((prepare(&at, plan, ends)?, at.hooks)));
    let sync = ends.sync.as_fd();
    let hooks = match prepared {
        Ok((controller, hooks)) => report(sync, &Ok(()), controller.as_ref()).map(|()| hooks),
        Err(error) => report(sync, &Err(error), None).and(Err(Errno::ECANCELED)),
    };
    let Ok(hooks) = hooks else { sys::process::exit(1) };
    // The end of file: the agent is gone, or has no more use for this process.
    if read(sync, &mut [0]) != Ok(1) {
        sys::process::exit(1);
    }
    let error = start(plan, hooks);
    let code = if error.kind == ErrorKind::CommandNotFound { 127 } else { 126 };
    let _ = report(sync, &Err(error), None);
    sys::process::exit(code)
}

/// Becomes the program. Returns only with why it could not.
fn start(plan: &ProcessPlan, hooks: Option<&HooksPlan>) -> AgentError {
    let started = hooks.map_or(Ok(()), |hooks| hooks.run(Point::Start));
    match started.and_then(|()| Ok(plan.confine()?)) {
        Ok(()) => plan.exec(),
        Err(error) => error,
    }
}

/// Stops being a copy of the agent: its descriptors, signal settings and session.
fn leave_agent(keep: &[BorrowedFd<'_>]) -> Result<(), StepError> {
    let kept = keep.iter().map(AsRawFd::as_raw_fd).chain(0..3);
    let mut kept: Vec<u32> = kept.filter_map(|raw| raw.try_into().ok()).collect();
    for (from, to) in gaps(&mut kept) {
        sys::process::close_range(from, to).doing(|| "Cannot close the agent's descriptors")?;
    }
    sys::process::restore_sigpipe().doing(|| "Cannot reset SIGPIPE")?;
    SigSet::empty().thread_set_mask().doing(|| "Cannot unblock signals")?;
    setsid().doing(|| "Cannot make a session")?;
    umask(Mode::empty());
    Ok(())
}

/// The ranges of descriptors between those to keep.
fn gaps(keep: &mut [u32]) -> Vec<(u32, u32)> {
    keep.sort_unstable();
    let mut first = 0;
    let mut gaps = Vec::new();
    for kept in keep.iter().copied() {
        if kept > first {
            gaps.push((first, kept - 1));
        }
        first = first.max(kept + 1);
    }
    gaps.push((first, u32::MAX));
    gaps
}

/// Everything but the exec. Returns the controlling end of the terminal, if there is one.
fn prepare(at: &Entered<'_>, plan: &ProcessPlan, ends: &ChildEnds) -> Result<Option<OwnedFd>, AgentError> {
    match at.limits {
        Limits::Own => plan.govern(0, at.proc.as_fd())?,
        Limits::Set => {}
        Limits::Outside(outside) => outside.await_limits()?,
    }
    plan.take_personality()?;
    let controller = connect_stdio(at, plan, &ends.stdio)?;
    // Not by chdir(2): a path through /proc could lead to a descriptor.
    let cwd = &plan.cwd;
    let directory = at.root.open(cwd, OFlag::O_PATH | OFlag::O_DIRECTORY);
    directory.and_then(fchdir).doing(|| format!("Cannot change to the working directory {cwd}"))?;
    plan.credentials.apply()?;
    umask(Mode::from_bits_truncate(plan.umask));
    Ok(controller)
}

fn connect_stdio(
    at: &Entered<'_>,
    plan: &ProcessPlan,
    stdio: &ChildStdio,
) -> Result<Option<OwnedFd>, StepError> {
    let doing = || "Cannot connect the standard streams";
    match stdio {
        ChildStdio::Streams { stdin, stdout, stderr } => {
            for (stream, number) in [(stdin, 0), (stdout, 1), (stderr, 2)] {
                sys::process::duplicate_onto(stream.as_fd(), number).doing(doing)?;
            }
            Ok(None)
        }
        ChildStdio::Terminal(size) => {
            let pair = Pair::open(&at.root, *size)?;
            if at.is_first {
                pair.show_as_console(&at.root)?;
            }
            fchown(&pair.peer, Some(Uid::from_raw(plan.credentials.user.uid)), None).doing(doing)?;
            sys::terminal::set_controlling(pair.peer.as_fd())
                .doing(|| "Cannot make the terminal the controlling one")?;
            for number in 0..3 {
                sys::process::duplicate_onto(pair.peer.as_fd(), number).doing(doing)?;
            }
            Ok(Some(pair.controller))
        }
    }
}

pub(crate) fn open_proc() -> Result<OwnedFd, StepError> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open("/proc", flags, Mode::empty()).doing(|| "Cannot open the guest's /proc")
}

/// Kernel parameters of the container's namespaces: the kernel shows each process those of its own.
pub(crate) fn set_sysctl(proc: BorrowedFd<'_>, path: &str, value: &str) -> Result<(), StepError> {
    write_file(proc, &format!("sys/{path}"), value)
        .doing(|| format!("Cannot set the kernel parameter {path} to {value}"))
}

pub(crate) fn report(sync: BorrowedFd<'_>, report: &Report, terminal: Option<&OwnedFd>) -> nix::Result<()> {
    let report = report.clone().map_err(|mut error| {
        let end =
            (0..=MAX_MESSAGE.min(error.message.len())).rev().find(|at| error.message.is_char_boundary(*at));
        error.message.truncate(end.unwrap_or(0));
        error
    });
    let bytes = krx_proto::encode(&report).map_err(|_| Errno::EMSGSIZE)?;
    let raw: Vec<_> = terminal.map(AsRawFd::as_raw_fd).into_iter().collect();
    let control = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[] } else { &control[..] };
    sendmsg::<()>(sync.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_what_is_between_the_kept() {
        assert_eq!(gaps(&mut [7, 0, 2, 1, 5]), [(3, 4), (6, 6), (8, u32::MAX)]);
        assert_eq!(gaps(&mut [0, 1, 2, 3]), [(4, u32::MAX)]);
        assert_eq!(gaps(&mut [3, 3]), [(0, 2), (4, u32::MAX)]);
    }
}
