//! Processes: making, naming, signalling and reaping them, and the credentials of the calling one.

use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use krx_proto::SchedulingPolicy;
use nix::errno::Errno;
use nix::sched::CloneFlags;

use super::new_descriptor;

/// A process just made, as its parent sees it.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
}

/// Forks, the child being in new `namespaces` and in `cgroup`, if it is to be in another, from its first instruction on.
/// `None` is returned to the child. The agent has one thread, so the child may go on as if nothing had happened.
pub(crate) fn fork_into(
    namespaces: CloneFlags,
    cgroup: Option<BorrowedFd<'_>>,
) -> nix::Result<Option<Child>> {
    /// `linux/sched.h`; libc's constant of the name is too narrow for it.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: RawFd = -1;
    let flags = namespaces.bits() | libc::CLONE_PIDFD;
    let arguments = libc::clone_args {
        flags: u64::from(flags.cast_unsigned()) | cgroup.map_or(0, |_| CLONE_INTO_CGROUP),
        pidfd: (&raw mut pidfd).addr() as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: u64::from(libc::SIGCHLD.cast_unsigned()),
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.map_or(0, |cgroup| u64::from(cgroup.as_raw_fd().cast_unsigned())),
    };
    // SAFETY: the structure is whole and `pidfd` outlives the call. Without CLONE_VM the child has its own copy of
    // the memory and continues on the same stack, as after fork.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    match i32::try_from(Errno::result(pid)?).map_err(|_| Errno::EOVERFLOW)? {
        0 => Ok(None),
        // SAFETY: the kernel stored a new descriptor there before it returned in the parent.
        pid => Ok(Some(Child { pid, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } })),
    }
}

/// A descriptor of the calling process, by which it can find back to its own namespaces.
pub(crate) fn own_pidfd() -> nix::Result<OwnedFd> {
    let pid = nix::unistd::getpid().as_raw();
    // SAFETY: the call takes two integers.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    // SAFETY: pidfd_open returns a new descriptor.
    unsafe { new_descriptor(result) }
}

/// Reaps one ended child, if there is one: its PID and raw wait status.
///
/// Not by way of `nix`, whose signal type has no real-time signals: it would lose a child that one of them ended.
pub(crate) fn reap_one() -> Option<(i32, i32)> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    (pid > 0).then_some((pid, status))
}

/// Sends a signal, real-time ones included (see [`reap_one`]).
pub(crate) fn kill(pid: i32, signal: i32) -> nix::Result<()> {
    // SAFETY: the call takes two integers.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Ends the calling process without running anything on the way out.
pub(crate) fn exit(code: u8) -> ! {
    // SAFETY: takes an integer and does not return.
    unsafe { libc::_exit(i32::from(code)) }
}

/// Closes the descriptors `first` to `last`. Only for a process about to exec: owners of those descriptors must not
/// be used or dropped afterwards, which the caller ensures by never returning to them.
pub(crate) fn close_range(first: u32, last: u32) -> nix::Result<()> {
    // SAFETY: the call takes three integers; it concerns descriptors alone, no memory.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
}

/// Gives SIGPIPE its default action back, which Rust's runtime took from it.
pub(crate) fn restore_sigpipe() -> nix::Result<()> {
    // SAFETY: SIG_DFL installs no handler.
    let previous = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    if previous == libc::SIG_ERR { Err(Errno::last()) } else { Ok(()) }
}

/// Duplicates `from` onto the number `to`, whatever that was before; exec keeps it.
pub(crate) fn duplicate_onto(from: BorrowedFd<'_>, to: RawFd) -> nix::Result<()> {
    if from.as_raw_fd() == to {
        // SAFETY: F_SETFD takes an integer.
        return Errno::result(unsafe { libc::fcntl(to, libc::F_SETFD, 0) }).map(drop);
    }
    // SAFETY: the call takes three integers.
    Errno::result(unsafe { libc::dup3(from.as_raw_fd(), to, 0) }).map(drop)
}

/// Sets a resource limit of a process by the number of the resource; 0 is the calling one.
pub(crate) fn set_rlimit(pid: i32, resource: u32, soft: u64, hard: u64) -> nix::Result<()> {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `limit` is read during the call only, and nothing is written where there is no place for the old one; an
    // unknown resource is an error, EINVAL.
    let result = unsafe { libc::prlimit(pid, resource, &raw const limit, std::ptr::null_mut()) };
    Errno::result(result).map(drop)
}

/// Sets the domain name of the calling process's UTS namespace.
pub(crate) fn set_domainname(name: &str) -> nix::Result<()> {
    // SAFETY: pointer and length are those of a string that outlives the call.
    Errno::result(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }).map(drop)
}

/// `struct sched_attr` of its first version (sched_setattr(2)).
#[repr(C)]
struct SchedulerAttributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Sets how a process of one thread is scheduled; 0 is the calling thread.
pub(crate) fn set_scheduler(pid: i32, wanted: &SchedulingPolicy) -> nix::Result<()> {
    const SIZE: u32 = 48;
    const { assert!(size_of::<SchedulerAttributes>() == SIZE as usize) };
    let &SchedulingPolicy { policy, flags, nice, priority, runtime, deadline, period } = wanted;
    let attributes =
        SchedulerAttributes { size: SIZE, policy, flags, nice, priority, runtime, deadline, period };
    // SAFETY: the kernel reads as many bytes as the structure says that it has.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw const attributes, 0) };
    Errno::result(result).map(drop)
}

/// Sets class and priority of the input and output of a process of one thread; 0 is the calling thread.
pub(crate) fn set_io_priority(pid: i32, priority: u16) -> nix::Result<()> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: the call takes three integers.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, i32::from(priority)) };
    Errno::result(result).map(drop)
}

/// Sets the calling process's execution domain.
pub(crate) fn set_personality(domain: u32) -> nix::Result<()> {
    // SAFETY: the call takes an integer.
    Errno::result(unsafe { libc::personality(domain.into()) }).map(drop)
}

/// The three sets `capset` takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CapabilitySets {
    pub(crate) effective: u64,
    pub(crate) permitted: u64,
    pub(crate) inheritable: u64,
}

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`: 32 capabilities each.
#[repr(C)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Sets the calling thread's capability sets.
pub(crate) fn set_capabilities(sets: CapabilitySets) -> nix::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`: 64 capabilities in two structures.
    const VERSION_3: u32 = 0x2008_0522;
    let header = CapabilityHeader { version: VERSION_3, pid: 0 };
    let part = |set: u64, shift: u32| u32::try_from(set >> shift & 0xffff_ffff).unwrap_or(0);
    let data = [0, 32].map(|shift| CapabilityData {
        effective: part(sets.effective, shift),
        permitted: part(sets.permitted, shift),
        inheritable: part(sets.inheritable, shift),
    });
    // SAFETY: version 3 makes the kernel read one header and two data structures, which is what is there.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    Errno::result(result).map(drop)
}

/// Removes one capability from the bounding set. `EINVAL`: the kernel knows no capability of that number.
pub(crate) fn drop_bounding(capability: u32) -> nix::Result<()> {
    prctl(libc::PR_CAPBSET_DROP, capability.into(), 0)
}

/// Empties the ambient set.
pub(crate) fn clear_ambient() -> nix::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL.cast_unsigned().into(), 0)
}

/// Adds one capability to the ambient set.
pub(crate) fn raise_ambient(capability: u32) -> nix::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE.cast_unsigned().into(), capability.into())
}

/// For the options above only, which take integers; that is why this is not public.
fn prctl(option: i32, second: u64, third: u64) -> nix::Result<()> {
    // SAFETY: the options used in this module read integers; the unused arguments are zero as they require.
    Errno::result(unsafe { libc::prctl(option, second, third, 0_u64, 0_u64) }).map(drop)
}
