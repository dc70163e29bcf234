//! System calls, by kind of thread. Whatever is not listed ends the process, and the host's kernel logs it.
//!
//! Threads confine themselves as they begin; those that the event loop starts later have its filter besides their own. No
//! thread can execute a program, make a process, a namespace or memory that is executable, open files by handle, look into
//! another process, or use a socket that is not a unix socket.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule,
};

use self::Argument::{Is, Lacks, Masked};
use super::decision;
use crate::exit_code::ExitCode;
use crate::report;

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The main thread.
    EventLoop,
    Vcpu,
    /// Serves the share.
    Files,
    /// Serves a network interface.
    Network,
    /// Has the kernel serve a network interface.
    VhostNetwork,
    /// Serves a disk.
    Block,
    /// Serves a client of the control socket, or shuts the guest down.
    Control,
    /// Removes the pod's directory.
    Janitor,
}

impl Kind {
    const ALL: [Self; 8] = [
        Self::EventLoop,
        Self::Vcpu,
        Self::Files,
        Self::Network,
        Self::VhostNetwork,
        Self::Block,
        Self::Control,
        Self::Janitor,
    ];

    fn calls(self) -> &'static [&'static [Call]] {
        match self {
            Self::EventLoop => &[BASIC, EVENTS, SOCKETS, THREADS, END, ATTACHMENT, DISK],
            Self::Vcpu => &[BASIC, RUN, ACTIVATION],
            Self::Files => &[BASIC, EVENTS, FILES],
            Self::Network => &[BASIC, EVENTS, FRAMES],
            Self::VhostNetwork => &[BASIC, EVENTS, VHOST],
            Self::Block => &[BASIC, EVENTS, DISK],
            Self::Control => &[BASIC, EVENTS, SOCKETS, THREADS, ATTACHMENT, DISK, LOG],
            Self::Janitor => &[BASIC, REMOVAL],
        }
    }
}

/// A system call, and what one of its arguments must be.
struct Call(libc::c_long, Option<(u8, Argument)>);

#[derive(Clone, Copy)]
enum Argument {
    Is(u64),
    /// None of these bits.
    Lacks(u64),
    /// Under the mask, this value.
    Masked(u64, u64),
}

const fn any(call: libc::c_long) -> Call {
    Call(call, None)
}

const fn when(call: libc::c_long, index: u8, argument: Argument) -> Call {
    Call(call, Some((index, argument)))
}

const fn bits(value: libc::c_int) -> u64 {
    value.cast_unsigned() as u64
}

/// Memory, locks, time, descriptors that are open, and the thread's own end. Memory is never executable.
const BASIC: &[Call] = &[
    any(libc::SYS_read),
    any(libc::SYS_write),
    any(libc::SYS_close),
    any(libc::SYS_brk),
    when(libc::SYS_mmap, 2, Lacks(bits(libc::PROT_EXEC))),
    when(libc::SYS_mprotect, 2, Lacks(bits(libc::PROT_EXEC))),
    any(libc::SYS_munmap),
    any(libc::SYS_mremap),
    any(libc::SYS_madvise),
    any(libc::SYS_futex),
    any(libc::SYS_sched_yield),
    any(libc::SYS_clock_gettime),
    any(libc::SYS_nanosleep),
    any(libc::SYS_clock_nanosleep),
    any(libc::SYS_restart_syscall),
    any(libc::SYS_rt_sigreturn),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_sigaltstack),
    any(libc::SYS_gettid),
    any(libc::SYS_getpid),
    // Keys of hash maps.
    any(libc::SYS_getrandom),
    // A panic ends the process by a signal to itself.
    when(libc::SYS_rt_sigaction, 0, Is(bits(libc::SIGABRT))),
    any(libc::SYS_exit),
    any(libc::SYS_exit_group),
];

/// Waiting for descriptors.
const EVENTS: &[Call] =
    &[any(libc::SYS_epoll_wait), any(libc::SYS_epoll_pwait), any(libc::SYS_epoll_ctl), any(libc::SYS_poll)];

/// Unix sockets: the control socket, those of vsock connections, the guest's power button.
const SOCKETS: &[Call] = &[
    when(libc::SYS_socket, 0, Is(bits(libc::AF_UNIX))),
    any(libc::SYS_connect),
    any(libc::SYS_accept4),
    any(libc::SYS_recvfrom),
    any(libc::SYS_sendto),
    any(libc::SYS_readv),
    any(libc::SYS_writev),
    any(libc::SYS_shutdown),
    any(libc::SYS_setsockopt),
    any(libc::SYS_getsockopt),
    when(libc::SYS_ioctl, 1, Is(libc::FIONBIO)),
];

/// What a new thread takes: the event loop starts one for each client of the control socket, which may start the one that
/// shuts the guest down; each confines itself. `clone3` fails, see [`without_clone3`], and with `clone` the flags can be seen.
const THREADS: &[Call] = &[
    when(libc::SYS_clone, 0, Is(THREAD)),
    any(libc::SYS_clone3),
    any(libc::SYS_rseq),
    any(libc::SYS_set_robust_list),
    any(libc::SYS_sched_getaffinity),
    when(libc::SYS_prctl, 0, Is(bits(libc::PR_SET_NAME))),
    when(libc::SYS_prctl, 0, Is(bits(libc::PR_SET_NO_NEW_PRIVS))),
    when(libc::SYS_seccomp, 0, Is(libc::SECCOMP_SET_MODE_FILTER as u64)),
];

/// The flags with which the C library makes a thread.
const THREAD: u64 = bits(
    libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM
        | libc::CLONE_SETTLS
        | libc::CLONE_PARENT_SETTID
        | libc::CLONE_CHILD_CLEARTID,
);

/// The VM's end: kicks for vCPUs (see [`compile`]), the guest's log by the open kernel image, removal of what the VM had made
/// in the pod's directory. Directories are opened to be listed, nothing else is opened.
const END: &[Call] = &[
    any(libc::SYS_pread64),
    any(libc::SYS_fstat),
    any(libc::SYS_newfstatat),
    any(libc::SYS_statx),
    any(libc::SYS_getdents64),
    any(libc::SYS_unlink),
    any(libc::SYS_rmdir),
    when(
        libc::SYS_openat,
        2,
        Masked(bits(libc::O_ACCMODE | libc::O_CREAT | libc::O_DIRECTORY), bits(libc::O_DIRECTORY)),
    ),
    when(libc::SYS_fcntl, 1, Is(bits(libc::F_DUPFD_CLOEXEC))),
];

/// `KVM_RUN` and `KVM_GET_REGS` (`linux/kvm.h`).
const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;

/// The guest; and its registers, for the message when it has crashed.
const RUN: &[Call] = &[when(libc::SYS_ioctl, 1, Is(KVM_RUN)), when(libc::SYS_ioctl, 1, Is(KVM_GET_REGS))];

/// A driver that starts a device does so on its vCPU: descriptors of queues are copied, watched, and handed to the thread that
/// works; a tap is told of the offloads.
const ACTIVATION: &[Call] = &[
    when(libc::SYS_fcntl, 1, Is(bits(libc::F_DUPFD_CLOEXEC))),
    any(libc::SYS_epoll_create1),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_eventfd2),
    when(libc::SYS_ioctl, 1, Is(libc::TUNSETOFFLOAD)),
];

/// `KVM_IRQFD` and `KVM_IOEVENTFD` (`linux/kvm.h`).
const KVM_IRQFD: u64 = 0x4020_ae76;
const KVM_IOEVENTFD: u64 = 0x4040_ae79;

/// A disk that comes while the guest runs: the open file arrives on the control socket, whose clients are the pod's owner; its size is
/// looked up, and KVM is told of its slot. What the disk's thread does is listed for the one that starts it, too.
const ATTACHMENT: &[Call] = &[
    any(libc::SYS_recvmsg),
    any(libc::SYS_lseek),
    any(libc::SYS_eventfd2),
    when(libc::SYS_fcntl, 1, Is(bits(libc::F_DUPFD_CLOEXEC))),
    when(libc::SYS_ioctl, 1, Is(KVM_IRQFD)),
    when(libc::SYS_ioctl, 1, Is(KVM_IOEVENTFD)),
];

/// The kernel image, in which the guest's log is looked up.
const LOG: &[Call] = &[any(libc::SYS_pread64)];

/// Requests to a disk.
const DISK: &[Call] =
    &[any(libc::SYS_preadv), any(libc::SYS_pwritev), any(libc::SYS_fdatasync), any(libc::SYS_fallocate)];

/// Frames of a tap.
const FRAMES: &[Call] = &[any(libc::SYS_readv), any(libc::SYS_writev)];

/// `VHOST_*` of `linux/vhost.h`, by its number and the size of what it reads.
const fn vhost(number: u64, size: u64) -> u64 {
    let direction = if size == 0 { 0 } else { 1 << 30 };
    direction | size << 16 | 0xaf << 8 | number
}

const VHOST_SET_FEATURES: u64 = vhost(0x00, 8);
const VHOST_SET_OWNER: u64 = vhost(0x01, 0);
const VHOST_SET_MEM_TABLE: u64 = vhost(0x03, 8);
const VHOST_SET_VRING_NUM: u64 = vhost(0x10, 8);
const VHOST_SET_VRING_ADDR: u64 = vhost(0x11, 40);
const VHOST_SET_VRING_BASE: u64 = vhost(0x12, 8);
const VHOST_SET_VRING_KICK: u64 = vhost(0x20, 8);
const VHOST_SET_VRING_CALL: u64 = vhost(0x21, 8);
const VHOST_SET_VRING_ERR: u64 = vhost(0x22, 8);
const VHOST_NET_SET_BACKEND: u64 = vhost(0x30, 8);

/// Setting vhost-net to work, and stopping it. The thread in the kernel that it starts has this thread's filter, and makes no
/// system calls.
const VHOST: &[Call] = &[
    when(libc::SYS_ioctl, 1, Is(VHOST_SET_FEATURES)),
    when(libc::SYS_ioctl, 1, Is(VHOST_SET_OWNER)),
    when(libc::SYS_ioctl, 1, Is(VHOST_SET_MEM_TABLE)),
    when(libc::SYS_ioctl, 1, Is(VHOST_SET_VRING_NUM)),
    when(libc::SYS_ioctl, 1, Is(VHOST_SET_VRING_ADDR)),
    when(libc::SYS_ioctl, 1, Is(VHOST_SET_VRING_BASE)),
    when(libc::SYS_ioctl, 1, Is(VHOST_SET_VRING_KICK)),
    when(libc::SYS_ioctl, 1, Is(VHOST_SET_VRING_CALL)),
    when(libc::SYS_ioctl, 1, Is(VHOST_SET_VRING_ERR)),
    when(libc::SYS_ioctl, 1, Is(VHOST_NET_SET_BACKEND)),
    when(libc::SYS_ioctl, 1, Is(libc::TUNSETQUEUE)),
];

/// What fuse-backend-rs serves requests with. It changes to the user and group of a request, and drops CAP_FSETID for some.
const FILES: &[Call] = &[
    any(libc::SYS_openat),
    any(libc::SYS_dup),
    when(libc::SYS_fcntl, 1, Is(bits(libc::F_DUPFD_CLOEXEC))),
    when(libc::SYS_fcntl, 1, Is(bits(libc::F_GETFL))),
    when(libc::SYS_fcntl, 1, Is(bits(libc::F_SETFL))),
    any(libc::SYS_fstat),
    any(libc::SYS_newfstatat),
    any(libc::SYS_statx),
    any(libc::SYS_fstatfs),
    any(libc::SYS_getdents64),
    any(libc::SYS_lseek),
    any(libc::SYS_pread64),
    any(libc::SYS_pwrite64),
    any(libc::SYS_readv),
    any(libc::SYS_writev),
    any(libc::SYS_preadv),
    any(libc::SYS_pwritev),
    any(libc::SYS_preadv2),
    any(libc::SYS_pwritev2),
    any(libc::SYS_fsync),
    any(libc::SYS_fdatasync),
    any(libc::SYS_fallocate),
    any(libc::SYS_ftruncate),
    any(libc::SYS_utimensat),
    any(libc::SYS_fchmod),
    any(libc::SYS_fchmodat),
    any(libc::SYS_fchmodat2),
    any(libc::SYS_fchownat),
    any(libc::SYS_mkdirat),
    any(libc::SYS_mknodat),
    any(libc::SYS_symlinkat),
    any(libc::SYS_readlinkat),
    any(libc::SYS_linkat),
    any(libc::SYS_unlinkat),
    any(libc::SYS_renameat2),
    any(libc::SYS_getxattr),
    any(libc::SYS_setxattr),
    any(libc::SYS_listxattr),
    any(libc::SYS_removexattr),
    any(libc::SYS_umask),
    any(libc::SYS_getuid),
    any(libc::SYS_getgid),
    any(libc::SYS_setresuid),
    any(libc::SYS_setresgid),
    any(libc::SYS_capget),
    any(libc::SYS_capset),
];

/// What is in the pod's own directory, and any empty directory: see `janitor`.
const REMOVAL: &[Call] = &[
    when(libc::SYS_unlinkat, 0, Is(bits(super::janitor::OWN))),
    when(libc::SYS_unlinkat, 2, Is(bits(libc::AT_REMOVEDIR))),
    any(libc::SYS_getdents64),
    any(libc::SYS_lseek),
];

/// The filters, once the process is to be jailed.
static FILTERS: OnceLock<Filters> = OnceLock::new();

struct Filters {
    /// Compiled by the first thread of each kind: most VMs have none of some.
    kinds: [OnceLock<BpfProgram>; Kind::ALL.len()],
    without_clone3: BpfProgram,
}

impl Filters {
    fn of(&self, kind: Kind) -> Result<&BpfProgram, BackendError> {
        let filter = &self.kinds[kind as usize];
        if filter.get().is_none() {
            // Another thread may have been faster, with the same.
            let _ = filter.set(compile(kind)?);
        }
        Ok(filter.get_or_init(BpfProgram::new))
    }
}

/// From now on threads are confined by [`confine`].
///
/// # Errors
/// A list that does not compile, which tests exclude.
pub(super) fn prepare() -> Result<(), BackendError> {
    // A second call would find an equal one.
    let _ = FILTERS.set(Filters {
        kinds: [const { OnceLock::new() }; Kind::ALL.len()],
        without_clone3: without_clone3()?,
    });
    Ok(())
}

/// Leaves the calling thread, and those that it starts, with the system calls of `kind`. Does nothing in a process that is not
/// to be jailed; one in which it fails ends.
pub fn confine(kind: Kind) {
    let Some(filters) = FILTERS.get() else { return };
    let also = (kind == Kind::EventLoop).then_some(&filters.without_clone3);
    let applied = filters.of(kind).map_err(seccompiler::Error::from).and_then(|filter| {
        also.into_iter().chain([filter]).try_for_each(|program| seccompiler::apply_filter(program))
    });
    if let Err(error) = applied {
        report::warn("A thread cannot be confined, so the VM was ended", &error);
        std::process::exit(ExitCode::Host as i32);
    }
}

fn compile(kind: Kind) -> Result<BpfProgram, BackendError> {
    decision::compile(rules(kind)?, SeccompAction::KillProcess, SeccompAction::Allow)
}

fn rules(kind: Kind) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for Call(call, argument) in kind.calls().iter().copied().flatten() {
        // A call without a rule is allowed whatever its arguments are.
        let rules = rules.entry(*call).or_default();
        if let Some((index, argument)) = argument {
            rules.push(rule(*index, *argument)?);
        }
    }
    // Signals to threads of this process: kicks, and the one of a panic.
    rules.insert(libc::SYS_tgkill, vec![rule(0, Is(std::process::id().into()))?]);
    Ok(rules)
}

/// Has `clone3` fail as on a kernel that does not know it: its flags lie in memory, where no filter sees them, so the C library
/// has to use `clone`.
fn without_clone3() -> Result<BpfProgram, BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    decision::compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS.cast_unsigned()))
}

fn rule(index: u8, argument: Argument) -> Result<SeccompRule, BackendError> {
    let (operator, value) = match argument {
        Is(value) => (SeccompCmpOp::Eq, value),
        Lacks(mask) => (SeccompCmpOp::MaskedEq(mask), 0),
        Masked(mask, value) => (SeccompCmpOp::MaskedEq(mask), value),
    };
    // All of these arguments are 32 bits wide for the kernel, or have their meaning in those.
    SeccompRule::new(vec![SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)?])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use seccompiler::{SeccompFilter, TargetArch};

    use super::*;
    use crate::jail::decision::tests::judge;

    #[test]
    fn filter_of_each_kind_compiles() {
        for kind in Kind::ALL {
            let program = compile(kind).unwrap();
            // The kernel's limit is 4,096.
            assert!((10..1000).contains(&program.len()), "{kind:?}: {}", program.len());
        }
        without_clone3().unwrap();
    }

    /// Each number, with arguments that are right for one list or another, or for none.
    #[test]
    fn filters_say_what_those_of_the_library_say_and_sooner() {
        for kind in Kind::ALL {
            let (program, rules) = (compile(kind).unwrap(), rules(kind).unwrap());
            let arguments = kind.calls().iter().copied().flatten().filter_map(|Call(_, argument)| *argument);
            let values = arguments.map(|(_, Is(value) | Lacks(value) | Masked(_, value))| value);
            let mut values: BTreeSet<u64> = values.collect();
            values.extend([0, 1, u64::MAX, 1 << 32, std::process::id().into()]);
            let (kill, allow) = (SeccompAction::KillProcess, SeccompAction::Allow);
            let library = SeccompFilter::new(rules, kill, allow, TargetArch::x86_64).unwrap();
            let library: BpfProgram = library.try_into().unwrap();
            let (mut steps, mut librarys) = (0, 0);
            for (architecture, number) in (0..600).map(|number| (X86_64, number)).chain(OTHERS) {
                for value in &values {
                    let said = judge(&program, architecture, number, [*value; 6]);
                    let expected = judge(&library, architecture, number, [*value; 6]);
                    assert_eq!(said.0, expected.0, "{kind:?}: {architecture:#x} {number} {value:#x}");
                    (steps, librarys) = (steps + said.1, librarys + expected.1);
                }
            }
            assert!(steps * 2 < librarys, "{kind:?}: {steps}, {librarys}");
        }
    }

    const X86_64: u32 = 0xc000_003e;
    /// i386's numbers, and x32's.
    const OTHERS: [(u32, u32); 4] =
        [(0x4000_0003, 0), (0x4000_0003, 16), (X86_64, 0x4000_0010), (X86_64, u32::MAX)];

    /// A call that one group allows with any argument and another with one would be allowed with that one only.
    #[test]
    fn no_call_is_listed_with_and_without_an_argument() {
        for kind in Kind::ALL {
            let calls = || kind.calls().iter().copied().flatten();
            let free: BTreeSet<_> =
                calls().filter(|Call(_, argument)| argument.is_none()).map(|Call(call, _)| call).collect();
            let bound = calls().filter(|Call(_, argument)| argument.is_some());
            assert!(bound.into_iter().all(|Call(call, _)| !free.contains(call)), "{kind:?}");
        }
    }

    #[test]
    fn what_opens_doors_is_nobodys() {
        let never = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_mount,
            libc::SYS_open_tree,
            libc::SYS_move_mount,
            libc::SYS_chroot,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_open_by_handle_at,
            libc::SYS_kill,
            libc::SYS_bpf,
            libc::SYS_keyctl,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
        ];
        for kind in Kind::ALL {
            let calls = || kind.calls().iter().copied().flatten();
            assert!(calls().all(|Call(call, _)| !never.contains(call)), "{kind:?}");
            let takes_descriptors = matches!(kind, Kind::EventLoop | Kind::Control);
            assert_eq!(
                calls().any(|Call(call, _)| *call == libc::SYS_recvmsg),
                takes_descriptors,
                "{kind:?}"
            );
        }
    }

    #[test]
    fn requests_of_vhost_have_the_numbers_of_its_library() {
        use vhost::vhost_kern::vhost_binding as library;

        for (ours, theirs) in [
            (VHOST_SET_FEATURES, library::VHOST_SET_FEATURES()),
            (VHOST_SET_OWNER, library::VHOST_SET_OWNER()),
            (VHOST_SET_MEM_TABLE, library::VHOST_SET_MEM_TABLE()),
            (VHOST_SET_VRING_NUM, library::VHOST_SET_VRING_NUM()),
            (VHOST_SET_VRING_ADDR, library::VHOST_SET_VRING_ADDR()),
            (VHOST_SET_VRING_BASE, library::VHOST_SET_VRING_BASE()),
            (VHOST_SET_VRING_KICK, library::VHOST_SET_VRING_KICK()),
            (VHOST_SET_VRING_CALL, library::VHOST_SET_VRING_CALL()),
            (VHOST_SET_VRING_ERR, library::VHOST_SET_VRING_ERR()),
            (VHOST_NET_SET_BACKEND, library::VHOST_NET_SET_BACKEND()),
        ] {
            assert_eq!(ours, theirs);
        }
    }

    #[test]
    fn threads_of_a_process_that_is_not_jailed_are_free() {
        std::thread::spawn(|| confine(Kind::Janitor)).join().unwrap();
        assert!(std::fs::metadata("/").is_ok());
    }

    /// In a thread of its own: a filter is for good. It is one that ends the thread only.
    #[test]
    fn calls_and_arguments_are_told_apart() {
        let rules = BTreeMap::from([
            (libc::SYS_prctl, vec![rule(0, Is(bits(libc::PR_SET_NAME))).unwrap()]),
            (libc::SYS_mmap, vec![rule(2, Lacks(bits(libc::PROT_EXEC))).unwrap()]),
        ]);
        let denied = SeccompAction::Errno(libc::EPERM.cast_unsigned());
        let program = decision::compile(rules, SeccompAction::Allow, denied).unwrap();
        std::thread::spawn(move || {
            seccompiler::apply_filter(&program).unwrap();
            assert!(nix::sys::prctl::set_name(c"x").is_err());
            assert!(nix::sys::prctl::get_name().is_ok());
        })
        .join()
        .unwrap();
    }
}
