//! The exit codes of `krx-vmm`: what happened, in one number that callers may rely on.

/// Documented in `docs/vmm.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// The guest powered off.
    PowerOff = 0,
    /// The command line, the configuration or a file it names cannot be used.
    Config = 2,
    /// The host lacks something: KVM, a permission, memory, a socket.
    Host = 3,
    /// The guest did not reach PID 1 in time.
    Boot = 4,
    /// The guest's kernel panicked.
    GuestPanic = 5,
    /// The guest crashed: triple fault, or an instruction or state KVM cannot continue from.
    GuestCrash = 6,
    /// It was stopped from outside (signal, control socket, owner gone) before the guest powered off.
    Stopped = 7,
    /// The guest reset itself without a panic; micro-VMs are not started again.
    GuestReset = 8,
}

impl ExitCode {
    /// The code of a process that ended with `status`, if it is one of these.
    #[must_use]
    pub fn from_status(status: i32) -> Option<Self> {
        const ALL: [ExitCode; 8] = [
            ExitCode::PowerOff,
            ExitCode::Config,
            ExitCode::Host,
            ExitCode::Boot,
            ExitCode::GuestPanic,
            ExitCode::GuestCrash,
            ExitCode::Stopped,
            ExitCode::GuestReset,
        ];
        ALL.into_iter().find(|code| i32::from(*code as u8) == status)
    }

    /// What it means, for people.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            Self::PowerOff => "the guest powered off",
            Self::Config => "its configuration cannot be used",
            Self::Host => "the host lacks something it needs",
            Self::Boot => "the guest did not boot in time",
            Self::GuestPanic => "the guest's kernel panicked",
            Self::GuestCrash => "the guest crashed",
            Self::Stopped => "it was stopped from outside",
            Self::GuestReset => "the guest reset itself",
        }
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}
