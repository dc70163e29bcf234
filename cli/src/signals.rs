//! Signals of the caller, on a thread: before there is a process they end the start, afterwards they are its.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use krx_sandbox::process::Process;
use krx_sandbox::vmm_process::VmmProcess;
use nix::sys::signal::{SigSet, Signal};

use crate::terminal;

const FORWARDED: [Signal; 6] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];

/// Whom a signal concerns.
#[derive(Debug, Default)]
enum Target {
    /// Nobody yet.
    #[default]
    None,
    /// A VM that boots: the start is given up by ending it.
    Booting(Arc<VmmProcess>),
    Process(Process),
}

/// The signals' way to whom they concern.
#[derive(Debug, Clone, Default)]
pub(crate) struct Signals {
    target: Arc<Mutex<Target>>,
    /// The signal that ended the start; 0 for none.
    interrupted: Arc<AtomicU8>,
}

impl Signals {
    /// Takes the signals over. To be called before any other thread exists: all have to block them.
    pub(crate) fn watch() -> io::Result<Self> {
        let mut mask: SigSet = FORWARDED.into_iter().collect();
        mask.add(Signal::SIGWINCH);
        mask.thread_block()?;
        let signals = Self::default();
        let watching = signals.clone();
        thread::Builder::new().name("signals".into()).spawn(move || {
            while let Ok(signal) = mask.wait() {
                watching.deliver(signal);
            }
        })?;
        Ok(signals)
    }

    fn deliver(&self, signal: Signal) {
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        match (&*target, signal) {
            (Target::Process(process), Signal::SIGWINCH) => process.resize(terminal::size()),
            (_, Signal::SIGWINCH) => {}
            (Target::Process(process), signal) => process.forward(signal as i32),
            (waiting, signal) => {
                let number = u8::try_from(signal as i32).unwrap_or(u8::MAX);
                self.interrupted.store(number, Ordering::SeqCst);
                if let Target::Booting(vmm) = waiting {
                    vmm.kill();
                }
            }
        }
    }

    /// The signal that ended the start, if one did.
    pub(crate) fn interrupted(&self) -> Option<u8> {
        Some(self.interrupted.load(Ordering::SeqCst)).filter(|signal| *signal != 0)
    }

    pub(crate) fn booting(&self, vmm: &Arc<VmmProcess>) {
        self.set(Target::Booting(vmm.clone()));
        if self.interrupted().is_some() {
            vmm.kill();
        }
    }

    pub(crate) fn running(&self, process: &Process) {
        self.set(Target::Process(process.clone()));
    }

    /// Nobody again: the process has ended, and what it held is to be let go.
    pub(crate) fn ended(&self) {
        self.set(Target::None);
    }

    fn set(&self, target: Target) {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = target;
    }
}
