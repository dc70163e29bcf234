//! vCPUs: their initial state and their threads.
//!
//! ```text
//!            kick, wanted = Pause             kick, wanted = Stop
//!  Running ◀────────────────────▶ Paused ───────────────────────────▶ Finished
//!     └───────────── the guest ended, or kick, wanted = Stop ─────────────▲
//! ```

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, Msrs, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::exit::{self, Crash, Next};
use super::vm::{KvmError, Vm, step};
use crate::arch::x86_64::{cpuid, msr, regs};
use crate::bus::Buses;
use crate::event_loop::Stop;
use crate::jail::seccomp::{self, Kind};
use crate::machine::Outcome;
use crate::phase::{self, Phase};

/// How long a kicked vCPU may take to notice before it is kicked again: a kick that comes between the check and
/// the entry into the guest is lost.
const KICK_INTERVAL: Duration = Duration::from_millis(1);
/// How long a vCPU may take to leave what it does. It may be in a device that waits for the event loop, or for a file
/// system of the host, and no kick ends that: a guest that resets its devices without end must not hold the VMM's end,
/// nor a client that asked for a pause.
const STOP_LIMIT: Duration = Duration::from_secs(1);
pub const PAUSE_LIMIT: Duration = Duration::from_secs(5);

/// CPUID leaf of the extended states, and the bits of XCR0 every processor with XSAVE may set.
const LEAF_XSTATE: u32 = 0xd;
const X87: u64 = 1;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;

/// A vCPU that has not run yet.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    id: u8,
}

impl Vcpu {
    /// Makes vCPU `id` of `count`. The first starts at `entry` in 64-bit mode; the others wait for the kernel.
    ///
    /// # Errors
    /// [`KvmError`] with the step that failed.
    pub fn new(vm: &Vm, id: u8, count: u8, entry: u64) -> Result<Self, KvmError> {
        let fd = vm.create_vcpu(id)?;
        let topology = cpuid::Topology { id, count, tsc_khz: fd.get_tsc_khz().ok() };
        let leaves = cpuid::for_vcpu(vm.supported_cpuid(), topology);
        fd.set_cpuid2(&leaves).map_err(step("setting CPUID"))?;
        if let Ok(msrs) = Msrs::from_entries(&msr::boot_msrs()) {
            fd.set_msrs(&msrs).map_err(step("setting model-specific registers"))?;
        }
        if id == 0 {
            let mut sregs = fd.get_sregs().map_err(step("reading segment registers"))?;
            regs::enter_long_mode(&mut sregs);
            fd.set_sregs(&sregs).map_err(step("setting segment registers"))?;
            fd.set_regs(&regs::entry_regs(entry)).map_err(step("setting registers"))?;
        }
        enable_extended_states(&fd, vm.supported_cpuid())?;
        Ok(Self { fd, id })
    }
}

/// Turns the extended states on that the guest will turn on itself. A KVM that is itself virtualised may not see
/// the guest's XSETBV (QEMU's emulated SVM hides it) and would go on to report the size of the smallest XSAVE area.
fn enable_extended_states(fd: &VcpuFd, supported: &CpuId) -> Result<(), KvmError> {
    let leaf = supported.as_slice().iter().find(|e| e.function == LEAF_XSTATE && e.index == 0);
    let Some(leaf) = leaf else { return Ok(()) };
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = u64::from(leaf.eax) & (X87 | SSE | AVX);
    fd.set_xcrs(&xcrs).map_err(step("setting extended control registers"))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Paused,
    Finished,
}

/// What the vCPU threads and their controller share.
#[derive(Debug)]
struct Control {
    wanted: Mutex<Wanted>,
    changed: Condvar,
    /// vCPUs that are not in the guest and will not enter it while `wanted` is not `Run`.
    parked: AtomicUsize,
}

impl Control {
    fn new(wanted: Wanted) -> Self {
        Self { wanted: Mutex::new(wanted), changed: Condvar::new(), parked: AtomicUsize::new(0) }
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running vCPUs.
#[derive(Debug)]
pub struct Vcpus {
    control: Arc<Control>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for each vCPU; they run the guest after [`Self::resume`]. The first end of one is reported to `stop`.
    ///
    /// # Errors
    /// When the host cannot give a thread or a signal.
    pub fn start(vcpus: Vec<Vcpu>, buses: &Arc<Buses>, stop: &Stop<Outcome>) -> io::Result<Self> {
        hear_kicks()?;
        let control = Arc::new(Control::new(Wanted::Pause));
        let mut threads = Vec::with_capacity(vcpus.len());
        for vcpu in vcpus {
            let runner =
                Runner { vcpu, buses: Arc::clone(buses), control: Arc::clone(&control), stop: stop.clone() };
            let name = format!("krx-vcpu{}", runner.vcpu.id);
            threads.push(thread::Builder::new().name(name).spawn(move || runner.run())?);
        }
        Ok(Self { control, threads })
    }

    /// Stops the guest's time. `false` if it runs on, all of it: a vCPU did not stop within [`PAUSE_LIMIT`], or another
    /// has let it go on meanwhile.
    #[must_use]
    pub fn pause(&self) -> bool {
        self.pause_within(PAUSE_LIMIT)
    }

    fn pause_within(&self, limit: Duration) -> bool {
        self.want(Wanted::Pause);
        let paused = self.wait_until_parked(Wanted::Pause, limit);
        if !paused {
            self.want(Wanted::Run);
        }
        paused
    }

    /// Lets the guest go on.
    pub fn resume(&self) {
        self.want(Wanted::Run);
    }

    /// Whether the vCPUs are held.
    #[must_use]
    pub fn paused(&self) -> bool {
        *self.control.wanted() == Wanted::Pause
    }

    /// Ends the vCPUs for good; returns when no vCPU is in the guest, or after [`STOP_LIMIT`]. `true` if none is.
    pub fn stop(&self) -> bool {
        self.want(Wanted::Stop);
        self.wait_until_parked(Wanted::Stop, STOP_LIMIT)
    }

    fn want(&self, wanted: Wanted) {
        let mut now = self.control.wanted();
        // A client that resumes the guest while the machine ends must not undo the end.
        if *now != Wanted::Stop {
            *now = wanted;
        }
        drop(now);
        self.control.changed.notify_all();
    }

    /// Whether all vCPUs were parked within `limit`, with `wanted` still wanted.
    fn wait_until_parked(&self, wanted: Wanted, limit: Duration) -> bool {
        let (all, start) = (self.threads.len(), Instant::now());
        while *self.control.wanted() == wanted {
            if self.control.parked.load(Ordering::SeqCst) >= all {
                return true;
            }
            if start.elapsed() >= limit {
                return false;
            }
            for thread in self.threads.iter().filter(|thread| !thread.is_finished()) {
                // A thread that has ended meanwhile needs no kick.
                let _ = thread.kill(SIGRTMIN());
            }
            thread::sleep(KICK_INTERVAL);
        }
        false
    }
}

/// Lets the kick interrupt `KVM_RUN`, and do nothing else.
fn hear_kicks() -> io::Result<()> {
    extern "C" fn interrupt_run(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), interrupt_run).map_err(io::Error::from)
}

/// One vCPU on its thread.
struct Runner {
    vcpu: Vcpu,
    buses: Arc<Buses>,
    control: Arc<Control>,
    stop: Stop<Outcome>,
}

impl Runner {
    fn run(mut self) {
        seccomp::confine(Kind::Vcpu);
        let mut state = State::Paused;
        loop {
            state = match state {
                State::Running => self.run_guest(),
                State::Paused => self.park(),
                State::Finished => break,
            };
        }
        self.control.parked.fetch_add(1, Ordering::SeqCst);
    }

    /// Stays in the guest until something outside or the guest itself ends it.
    fn run_guest(&mut self) -> State {
        if self.vcpu.id == 0 {
            phase::mark(Phase::FirstInstruction);
        }
        loop {
            let next = match self.vcpu.fd.run() {
                Ok(exit) => exit::handle(exit, &self.buses),
                Err(error) if error.errno() == libc::EINTR => match *self.control.wanted() {
                    Wanted::Run => Next::Continue,
                    Wanted::Pause => return State::Paused,
                    Wanted::Stop => return State::Finished,
                },
                Err(error) if error.errno() == libc::EAGAIN => Next::Continue,
                Err(error) => {
                    self.stop.set(Outcome::RunFailed(error));
                    return State::Finished;
                }
            };
            let outcome = match next {
                Next::Continue => continue,
                Next::PowerOff => Outcome::PowerOff,
                Next::Reset => Outcome::Reset,
                Next::Panic => Outcome::Panic,
                Next::Crash(crash) => self.crashed(crash),
            };
            self.stop.set(outcome);
            return State::Finished;
        }
    }

    fn crashed(&self, crash: Crash) -> Outcome {
        let instruction = self.vcpu.fd.get_regs().map_or(0, |regs| regs.rip);
        Outcome::Crash { crash, vcpu: self.vcpu.id, instruction }
    }

    /// Waits outside the guest until told otherwise.
    fn park(&mut self) -> State {
        self.control.parked.fetch_add(1, Ordering::SeqCst);
        let wanted = self
            .control
            .changed
            .wait_while(self.control.wanted(), |wanted| *wanted == Wanted::Pause)
            .unwrap_or_else(PoisonError::into_inner);
        self.control.parked.fetch_sub(1, Ordering::SeqCst);
        if *wanted == Wanted::Run { State::Running } else { State::Finished }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// One vCPU whose thread is in a device and hears no kick, as long as the sender lives.
    fn stuck() -> (Vcpus, mpsc::Sender<()>) {
        hear_kicks().unwrap();
        let control = Arc::new(Control::new(Wanted::Run));
        let (release, held) = mpsc::channel::<()>();
        let theirs = Arc::clone(&control);
        let thread = thread::spawn(move || {
            let _ = held.recv();
            theirs.parked.fetch_add(1, Ordering::SeqCst);
        });
        (Vcpus { control, threads: vec![thread] }, release)
    }

    #[test]
    fn stop_does_not_wait_for_a_vcpu_that_never_comes() {
        let (vcpus, release) = stuck();
        assert!(!vcpus.stop());
        drop(release);
        assert!(vcpus.stop());
    }

    #[test]
    fn pause_that_fails_lets_the_guest_go_on() {
        let (vcpus, release) = stuck();
        assert!(!vcpus.pause_within(Duration::from_millis(20)));
        assert!(!vcpus.paused());
        drop(release);
        assert!(vcpus.pause());
        assert!(vcpus.paused());
    }

    #[test]
    fn end_is_not_undone_by_a_pause_that_fails() {
        let (vcpus, _release) = stuck();
        assert!(!vcpus.stop());
        assert!(!vcpus.pause_within(Duration::from_millis(20)));
        assert_eq!(*vcpus.control.wanted(), Wanted::Stop);
    }
}
