//! Signals of the caller, on a thread: before there is a process they end the start, then they are the process's, and
//! once it has ended they end the waiting for the rest of its output.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use krx_sandbox::agent::Pending;
use krx_sandbox::process::Process;
use krx_sandbox::vmm_process::VmmProcess;
use nix::sys::signal::{SigSet, Signal};

use crate::terminal;

const FORWARDED: [Signal; 6] =
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];
/// A guest that has not taken a signal for so long is not waited for when the next one comes.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whom a signal concerns.
#[derive(Debug, Default)]
enum Target {
    /// Nobody yet: it is noted, and the start given up at the next step.
    #[default]
    Start,
    /// A VM that boots, or whose last output is waited for: it is ended.
    Booting(Arc<VmmProcess>),
    Process(Forwarding),
    /// A process that somebody else started; what ends the looking on is this program's alone.
    LookedAt(LookingOn),
    /// This program alone: it ends.
    Own,
}

/// A process that gets the signals.
#[derive(Debug)]
struct Forwarding {
    process: Process,
    /// Its VM where that is ours.
    vmm: Option<Arc<VmmProcess>>,
    /// The last signal that was sent, and when.
    last: Option<(Instant, Pending)>,
}

#[derive(Debug)]
struct LookingOn {
    to: Forwarding,
    /// Whether it gets signals at all.
    passes: bool,
    /// The end of this is the end of the looking on.
    connection: UnixStream,
}

/// The signals' way to whom they concern.
#[derive(Debug, Clone, Default)]
pub(crate) struct Signals {
    target: Arc<Mutex<Target>>,
    /// The signal that ended the start, or the looking on; 0 for none.
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
        let mut target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        let number = u8::try_from(signal as i32).unwrap_or(u8::MAX);
        match (&mut *target, signal) {
            (Target::Process(to) | Target::LookedAt(LookingOn { to, .. }), Signal::SIGWINCH) => {
                to.process.resize(terminal::size())
            }
            (_, Signal::SIGWINCH) => {}
            (Target::Process(to), signal) => to.send(signal),
            // Who closes his terminal means to leave, and not to end what others look at, too.
            (Target::LookedAt(at), signal) if at.passes && signal != Signal::SIGHUP => at.to.send(signal),
            (Target::LookedAt(at), _) => {
                if self.interrupted.swap(number, Ordering::SeqCst) != 0 {
                    // It was not enough to be asked once.
                    std::process::exit((128 + number).into());
                }
                let _ = at.connection.shutdown(Shutdown::Both);
            }
            (Target::Start, _) => self.interrupted.store(number, Ordering::SeqCst),
            (Target::Booting(vmm), _) => {
                self.interrupted.store(number, Ordering::SeqCst);
                vmm.kill();
            }
            // What is left to be done is output that nobody may be reading. The VM, if it is ours, ends with us.
            (Target::Own, _) => std::process::exit((128 + number).into()),
        }
    }

    /// The signal that ended the start, or the looking on, if one did.
    pub(crate) fn interrupted(&self) -> Option<u8> {
        Some(self.interrupted.load(Ordering::SeqCst)).filter(|signal| *signal != 0)
    }

    /// From now on they end this VM, and what is waited for with it.
    pub(crate) fn booting(&self, vmm: &Arc<VmmProcess>) {
        self.set(Target::Booting(vmm.clone()));
        if self.interrupted().is_some() {
            vmm.kill();
        }
    }

    /// From now on they are the process's; `vmm` is ended when the guest does not take them.
    pub(crate) fn running(&self, process: &Process, vmm: Option<Arc<VmmProcess>>) {
        self.set(Target::Process(Forwarding { process: process.clone(), vmm, last: None }));
    }

    /// From now on they are a process's that this one does not own, if it is to get them; or else they end the connection.
    pub(crate) fn looking_on(&self, process: &Process, passes: bool, connection: UnixStream) {
        let to = Forwarding { process: process.clone(), vmm: None, last: None };
        self.set(Target::LookedAt(LookingOn { to, passes, connection }));
    }

    /// From now on they end this program.
    pub(crate) fn own(&self) {
        self.set(Target::Own);
    }

    fn set(&self, target: Target) {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = target;
    }
}

impl Forwarding {
    fn send(&mut self, signal: Signal) {
        let ignored = self.last.as_ref().is_some_and(|(at, last)| at.elapsed() > PATIENCE && !last.is_over());
        if ignored && let Some(vmm) = &self.vmm {
            vmm.kill();
        }
        // One that is lost with the connection is lost with the process.
        self.last = self.process.forward(signal as i32).ok().map(|sent| (Instant::now(), sent));
    }
}
