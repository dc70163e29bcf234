//! What the answers of the probe's guest mean for Linux. Pure.

use std::fmt;

use super::KERNEL_CODE;

/// What the guest answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Time of one iteration of a loop of two instructions at CPL 0, in the fastest round.
    pub loop_ns: Result<u64, Stop>,
    /// Whether CMPXCHG16B at CPL 0, which Linux uses in its allocator, stored its operand.
    pub cmpxchg16b: Result<bool, Stop>,
    /// CS as seen by the first instruction after a SYSCALL at CPL 3.
    pub syscall_cs: Result<u16, Stop>,
}

/// Why the guest came to no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// `KVM_EXIT_INTERNAL_ERROR`: as a rule an instruction that KVM's emulator does not know.
    InternalError,
    /// `KVM_EXIT_SHUTDOWN`: an exception, as the guest has no handler for any.
    TripleFault,
    /// `KVM_EXIT_FAIL_ENTRY`: the processor refused the guest's state.
    EntryRefused,
    /// The guest did not come to its end in time.
    Hung,
    /// `KVM_RUN` itself failed with this `errno`.
    RunFailed(i32),
    /// An exit that the guest's program cannot cause.
    OtherExit,
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InternalError => write!(f, "KVM could not emulate it"),
            Self::TripleFault => write!(f, "it raised an exception"),
            Self::EntryRefused => write!(f, "the guest was not entered"),
            Self::Hung => write!(f, "it did not end"),
            Self::RunFailed(errno) => write!(f, "KVM_RUN failed with errno {errno}"),
            Self::OtherExit => write!(f, "the guest ended in an unexpected way"),
        }
    }
}

/// Something that Linux needs and this KVM does not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Defect {
    Loop(Stop),
    Cmpxchg16b(Stop),
    Cmpxchg16bStoresNothing,
    Syscall(Stop),
    SyscallWithoutPrivilege { cs: u16 },
}

impl Defect {
    /// Whether it may be the host's moment and not its KVM: time that ran out.
    fn may_pass(self) -> bool {
        matches!(self, Self::Loop(Stop::Hung) | Self::Cmpxchg16b(Stop::Hung) | Self::Syscall(Stop::Hung))
    }
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loop(stop) => write!(f, "a loop at CPL 0 fails: {stop}"),
            Self::Cmpxchg16b(stop) => write!(f, "CMPXCHG16B at CPL 0 fails: {stop}"),
            Self::Cmpxchg16bStoresNothing => write!(f, "CMPXCHG16B at CPL 0 stores nothing"),
            Self::Syscall(stop) => write!(f, "SYSCALL at CPL 3 fails: {stop}"),
            Self::SyscallWithoutPrivilege { cs } => {
                write!(f, "SYSCALL arrives at CPL {} instead of CPL 0 (CS {cs:#x})", cs & 3)
            }
        }
    }
}

/// The answer to the module's question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    RunsLinux {
        loop_ns: u64,
    },
    /// Every answer is right and takes as long as if each instruction was emulated.
    Slow {
        loop_ns: u64,
    },
    CannotRunLinux {
        /// Supervisor mode is emulated, by the time it takes: what the defects come from.
        emulated: bool,
        loop_ns: Option<u64>,
        defects: Vec<Defect>,
    },
}

impl Verdict {
    /// Whether a later look would find the same: not if the guest only ran out of time.
    #[must_use]
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::RunsLinux { .. } | Self::Slow { .. } => true,
            Self::CannotRunLinux { defects, .. } => !defects.iter().all(|defect| defect.may_pass()),
        }
    }
}

/// From here on an iteration of the loop is taken for emulated. Hardware needs less than 1 ns, AMD-V that is itself
/// emulated by QEMU some 20 ns, KVM's instruction emulator 700 to 1,600 ns.
const EMULATED_NS: u64 = 250;

/// What the facts mean. Wrong answers decide; time only explains them, as a busy host is slow too.
#[must_use]
pub fn judge(facts: &Facts) -> Verdict {
    let cmpxchg16b = match facts.cmpxchg16b {
        Ok(true) => None,
        Ok(false) => Some(Defect::Cmpxchg16bStoresNothing),
        Err(stop) => Some(Defect::Cmpxchg16b(stop)),
    };
    let syscall = match facts.syscall_cs {
        Ok(KERNEL_CODE) => None,
        Ok(cs) => Some(Defect::SyscallWithoutPrivilege { cs }),
        Err(stop) => Some(Defect::Syscall(stop)),
    };
    let defects: Vec<_> = [syscall, cmpxchg16b].into_iter().flatten().collect();
    let emulated = |loop_ns| loop_ns >= EMULATED_NS;
    match facts.loop_ns {
        Err(stop) => Verdict::CannotRunLinux {
            emulated: false,
            loop_ns: None,
            defects: [vec![Defect::Loop(stop)], defects].concat(),
        },
        Ok(loop_ns) if !defects.is_empty() => {
            Verdict::CannotRunLinux { emulated: emulated(loop_ns), loop_ns: Some(loop_ns), defects }
        }
        Ok(loop_ns) if emulated(loop_ns) => Verdict::Slow { loop_ns },
        Ok(loop_ns) => Verdict::RunsLinux { loop_ns },
    }
}
