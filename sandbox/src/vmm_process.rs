//! The VMM as a child process: how it is started, what it says at its end, and its control socket.
//!
//! The child gets its configuration as a memory file on descriptor 0, the read end of a lifeline pipe whose closing
//! tells it that its owner is gone, and the pod's lock, so that the name stays taken while it lives. It runs in a
//! process group of its own: Ctrl-C at the terminal belongs to the container, not to the VMM. It inherits the
//! caller's signal mask, and sets its own.
//!
//! Knows nothing of what runs in the guest.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use krx_vmm::config::Config;
use krx_vmm::disks::DiskPlace;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, pipe2};
use serde_json::{Value, json};

use crate::control::{self, CONTROL_TIMEOUT};
use crate::timings::Phase;

/// How much of the VMM's last words is kept. The VMM carries guest log lines there, so a guest could fill memory.
const MAX_REPORT: usize = 64 << 10;

/// Descriptors are made inheritable for the moment of a spawn: one at a time, or they would leak into each other.
static SPAWN: Mutex<()> = Mutex::new(());

/// Why the VMM did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    #[error("Cannot start the VMM {path}")]
    Spawn {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{exit}")]
    Ended {
        exit: VmmExit,
        #[source]
        report: Option<VmmReport>,
    },
    #[error("The VMM does not answer on its control socket")]
    Control(#[source] io::Error),
    #[error("The VMM refused `{request}`: {answer}")]
    Refused { request: &'static str, answer: String },
}

/// What the VMM wrote to standard error before it ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct VmmReport(String);

/// How the VMM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmmExit {
    Code(i32),
    Signal(i32),
}

impl From<ExitStatus> for VmmExit {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, signal) => Self::Signal(signal.unwrap_or_default()),
        }
    }
}

/// One sentence a code, as documented with the VMM's exit codes.
impl fmt::Display for VmmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Code(0) => "The guest powered off",
            Self::Code(2) => "The VMM refused its configuration",
            Self::Code(3) => "This host cannot run the VM: `krx doctor` checks it",
            Self::Code(4) => "The guest did not boot in time",
            Self::Code(5) => "The guest kernel panicked",
            Self::Code(6) => "The guest crashed",
            Self::Code(7) => "The VM was stopped",
            Self::Code(8) => "The guest reset itself",
            Self::Code(code) => return write!(f, "The VMM failed with exit code {code}"),
            Self::Signal(libc::SIGSYS) => {
                "The VMM was killed: it made a system call that its jail forbids (see the kernel's log)"
            }
            Self::Signal(signal) => return write!(f, "The VMM was killed by signal {signal}"),
        })
    }
}

/// What a VMM is started with.
#[derive(Debug)]
pub struct Launch<'a> {
    pub program: &'a Path,
    pub config: Config,
    /// The pod's locked file, inherited by the VMM.
    pub lock: BorrowedFd<'a>,
    /// Those that the configuration names, inherited, too.
    pub taps: &'a [BorrowedFd<'a>],
}

/// A running VMM. Dropping it kills it.
#[derive(Debug)]
pub struct VmmProcess {
    pid: Pid,
    life: Arc<Life>,
    control: Option<PathBuf>,
    /// Write end: its closing, at the latest by our own death, ends the VMM.
    _lifeline: OwnedFd,
}

/// Shared between the owner and the thread that watches the child.
struct Life {
    end: Mutex<Option<End>>,
    /// What is to be done at the end.
    then: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
    ended: Condvar,
    /// Becomes readable when the child has ended, for those who poll.
    event: EventFd,
}

#[derive(Debug, Clone)]
struct End {
    exit: VmmExit,
    report: String,
}

impl VmmProcess {
    /// Starts the VMM and returns at once.
    ///
    /// # Errors
    /// The program cannot be executed, or this process is out of descriptors or threads.
    pub fn spawn(launch: Launch<'_>) -> Result<Self, VmmError> {
        let failed = |source| VmmError::Spawn { path: launch.program.into(), source };
        let (lifeline_end, lifeline) = pipe2(OFlag::O_CLOEXEC).map_err(|error| failed(error.into()))?;
        let mut config = launch.config;
        config.lifeline_fd = Some(lifeline_end.as_raw_fd());
        let (live, control) = (config.console, config.control.clone());
        let mut command = Command::new(launch.program);
        command
            .args(["--config-fd", "0"])
            .stdin(config_file(&config).map_err(failed)?)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0);
        let inherited = [&[lifeline_end.as_fd(), launch.lock], launch.taps].concat();
        let mut child = spawn_with(&mut command, &inherited).map_err(failed)?;
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
        let stderr = child.stderr.take();
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|error| failed(error.into()))?;
        let life =
            Arc::new(Life { end: Mutex::new(None), then: Mutex::default(), ended: Condvar::new(), event });
        let watched = life.clone();
        thread::Builder::new()
            .name("vmm-watch".into())
            .spawn(move || watched.watch(child, stderr, live))
            .map_err(failed)?;
        Ok(Self { pid, life, control, _lifeline: lifeline })
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Becomes readable, and stays so, once the VMM has ended.
    #[must_use]
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.life.event.as_fd()
    }

    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.life.lock().is_some()
    }

    /// Has `then` called once the VMM has ended; at once if it has already.
    pub fn on_end(&self, then: impl FnOnce() + Send + 'static) {
        let end = self.life.lock();
        if end.is_some() {
            then();
        } else {
            self.life.then.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(then));
        }
    }

    /// Sends `SIGTERM`: the guest is told to power off, and stopped when it has not after a while.
    pub fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Stops the guest as it is; the VMM then tells the last lines of its kernel's log.
    pub fn stop(&self) {
        // The second signal stops what the first only asks. Two of a kind could arrive as one.
        self.signal(Signal::SIGTERM);
        self.signal(Signal::SIGINT);
    }

    /// Ends the VMM at once.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Ends the VMM and waits until it is gone.
    pub fn kill_and_wait(&self) {
        self.kill();
        // A killed process ends, unless it hangs in the kernel.
        let _ = self.wait(CONTROL_TIMEOUT);
    }

    fn signal(&self, signal: Signal) {
        // Under the lock: while the end is not known, the child is not reaped and its PID is its own.
        if self.life.lock().is_none() {
            let _ = kill(self.pid, signal);
        }
    }

    /// Waits for the VMM's end; `None` when it outlives `timeout`.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<VmmExit> {
        self.life.wait(timeout).map(|end| end.exit)
    }

    /// Waits for the end, forcing it after `grace`, and says what it was.
    #[must_use]
    pub fn verdict(&self, grace: Duration) -> VmmError {
        let end = self.life.wait(grace).or_else(|| {
            self.stop();
            self.life.wait(CONTROL_TIMEOUT)
        });
        let end = end.unwrap_or_else(|| {
            self.kill();
            // A killed process ends, unless it hangs in the kernel.
            self.life.wait(CONTROL_TIMEOUT).unwrap_or(End { exit: VmmExit::Signal(9), report: String::new() })
        });
        let report = end.report.trim_end();
        let report = report.strip_prefix("krx-vmm: ").unwrap_or(report);
        VmmError::Ended { exit: end.exit, report: (!report.is_empty()).then(|| VmmReport(report.into())) }
    }

    /// Stops all vCPUs.
    ///
    /// # Errors
    /// As every control request: the VMM does not answer, or refuses.
    pub fn pause(&self) -> Result<(), VmmError> {
        self.request("pause").map(drop)
    }

    /// Lets all vCPUs run again.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn resume(&self) -> Result<(), VmmError> {
        self.request("resume").map(drop)
    }

    /// Presses the guest's power button.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn power_off(&self) -> Result<(), VmmError> {
        self.request("shutdown").map(drop)
    }

    /// Phases of the VMM's own start.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn timings(&self) -> Result<Vec<Phase>, VmmError> {
        let mut answer = self.request("timings")?;
        serde_json::from_value(answer["phases"].take()).map_err(|error| VmmError::Control(error.into()))
    }

    /// Makes an open file a disk of the guest, which is to be told where.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn attach_disk(&self, file: &File, read_only: bool) -> Result<DiskPlace, VmmError> {
        let request = json!({ "attach_disk": { "read_only": read_only } });
        let mut answer = self.ask("attach_disk", &request, Some(file))?;
        serde_json::from_value(answer["disk"].take()).map_err(|error| VmmError::Control(error.into()))
    }

    /// Takes a disk away and closes its file, whatever the guest does with it.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn detach_disk(&self, slot: u32) -> Result<(), VmmError> {
        self.ask("detach_disk", &json!({ "detach_disk": { "slot": slot } }), None).map(drop)
    }

    fn request(&self, request: &'static str) -> Result<Value, VmmError> {
        self.ask(request, &json!(request), None)
    }

    /// `name` is that of the request.
    fn ask(&self, name: &'static str, request: &Value, file: Option<&File>) -> Result<Value, VmmError> {
        let path =
            self.control.as_deref().ok_or_else(|| VmmError::Control(io::ErrorKind::NotConnected.into()))?;
        control::ask(path, name, request, file)
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        self.kill_and_wait();
    }
}

impl fmt::Debug for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Life").field("end", &self.end).finish_non_exhaustive()
    }
}

impl Life {
    fn lock(&self) -> MutexGuard<'_, Option<End>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Body of the watching thread: the child's standard error ends when the child does.
    fn watch(&self, mut child: Child, stderr: Option<ChildStderr>, live: bool) {
        let report = stderr.map(|stderr| read_tail(stderr, live)).unwrap_or_default();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
        // Waits without reaping, so that nobody is kept from killing a child that only closed its standard error.
        let _ = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        let mut end = self.lock();
        let exit = child.wait().map_or(VmmExit::Signal(0), VmmExit::from);
        *end = Some(End { exit, report });
        self.ended.notify_all();
        let _ = self.event.write(1);
        drop(end);
        let then = std::mem::take(&mut *self.then.lock().unwrap_or_else(PoisonError::into_inner));
        then.into_iter().for_each(|then| then());
    }

    fn wait(&self, timeout: Duration) -> Option<End> {
        let deadline = Instant::now() + timeout;
        let mut end = self.lock();
        while end.is_none() {
            let left = deadline.checked_duration_since(Instant::now())?;
            end = self.ended.wait_timeout(end, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        end.clone()
    }
}

/// Reads to the end and keeps the last [`MAX_REPORT`] bytes; `live` shows everything as it comes.
fn read_tail(mut from: impl Read, live: bool) -> String {
    let mut tail = VecDeque::with_capacity(1024);
    let mut buffer = [0; 4096];
    loop {
        let read = match from.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => break,
            Ok(read) => &buffer[..read],
        };
        if live {
            let _ = io::stderr().write_all(read);
        }
        tail.extend(read);
        tail.drain(..tail.len().saturating_sub(MAX_REPORT));
    }
    String::from_utf8_lossy(tail.make_contiguous()).into_owned()
}

/// The configuration as a file in memory, at its beginning.
fn config_file(config: &Config) -> io::Result<Stdio> {
    let mut file = File::from(memfd_create("krx-vmm-config", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&serde_json::to_vec(config)?)?;
    file.rewind()?;
    Ok(OwnedFd::from(file).into())
}

/// Spawns with some descriptors inherited under their own numbers.
fn spawn_with(command: &mut Command, inherited: &[BorrowedFd<'_>]) -> io::Result<Child> {
    let _guard = SPAWN.lock().unwrap_or_else(PoisonError::into_inner);
    let set_all = |flags: FdFlag| {
        inherited
            .iter()
            .try_for_each(|fd| fcntl(fd, FcntlArg::F_SETFD(flags)).map(drop).map_err(io::Error::from))
    };
    set_all(FdFlag::empty())?;
    let child = command.spawn();
    set_all(FdFlag::FD_CLOEXEC)?;
    child
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use std::io::{BufRead, BufReader};

    use super::*;
    use crate::testing::Scratch;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// Starts a shell script in the VMM's place.
    fn run(scratch: &Scratch, script: &str) -> VmmProcess {
        let program = scratch.write("krx-vmm", format!("#!/bin/sh\n{script}\n").as_bytes());
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let mut config = Config::from_json(br#"{"kernel":"/k","memory_mib":128,"vcpus":1}"#).unwrap();
        config.control = Some(scratch.path().join("vmm.sock"));
        let lock = File::create(scratch.path().join("lock")).unwrap();
        VmmProcess::spawn(Launch { program: &program, config, lock: lock.as_fd(), taps: &[] }).unwrap()
    }

    fn end(vmm: &VmmProcess) -> (VmmExit, String) {
        let VmmError::Ended { exit, report } = vmm.verdict(PATIENCE) else { panic!("not an end") };
        (exit, report.map(|report| report.to_string()).unwrap_or_default())
    }

    #[test]
    fn exit_code_and_last_words_are_kept() {
        let scratch = Scratch::new("vmm");
        let vmm = run(&scratch, "echo 'krx-vmm: no init found' >&2; exit 5");
        assert_eq!(end(&vmm), (VmmExit::Code(5), "no init found".into()));
        assert!(vmm.verdict(PATIENCE).to_string().contains("panicked"));
    }

    #[test]
    fn configuration_comes_on_descriptor_zero_with_a_live_lifeline() {
        let scratch = Scratch::new("vmm");
        let vmm = run(&scratch, "echo \"$@\" >&2; cat >&2");
        let (_, report) = end(&vmm);
        let (arguments, json) = report.split_once('\n').unwrap();
        assert_eq!(arguments, "--config-fd 0");
        let config = Config::from_json(json.as_bytes()).unwrap();
        assert!(config.lifeline_fd.is_some_and(|fd| fd > 2));
    }

    #[test]
    fn lifeline_ends_with_its_owner() {
        let scratch = Scratch::new("vmm");
        // Reads the lifeline to its end, which comes only when the write end is closed.
        let vmm = run(
            &scratch,
            "fd=$(sed 's/.*lifeline_fd\":\\([0-9]*\\).*/\\1/'); cat /proc/self/fd/$fd; echo gone >&2",
        );
        assert_eq!(vmm.wait(Duration::from_millis(200)), None);
        let life = vmm.life.clone();
        // As at the owner's death: the pipe is closed and nothing else happens.
        let VmmProcess { .. } = &vmm;
        let parts = std::mem::ManuallyDrop::new(vmm);
        nix::unistd::close(parts._lifeline.as_raw_fd()).unwrap();
        assert_eq!(life.wait(PATIENCE).unwrap().report, "gone\n");
    }

    #[test]
    fn flood_on_standard_error_is_bounded() {
        let scratch = Scratch::new("vmm");
        let vmm = run(&scratch, "head -c 3000000 /dev/zero | tr '\\0' x >&2; echo end >&2; exit 3");
        let (exit, report) = end(&vmm);
        assert_eq!(exit, VmmExit::Code(3));
        assert!(report.len() <= MAX_REPORT && report.ends_with("xend"), "{}", report.len());
    }

    #[test]
    fn death_by_signal_is_told_and_polled() {
        let scratch = Scratch::new("vmm");
        let vmm = run(&scratch, "exec sleep 100");
        vmm.kill();
        assert_eq!(vmm.wait(PATIENCE), Some(VmmExit::Signal(9)));
        assert_eq!(vmm.life.event.read().unwrap(), 1);
        assert!(vmm.verdict(PATIENCE).to_string().contains("signal 9"));
    }

    #[test]
    fn vmm_that_ignores_sigterm_is_killed() {
        let scratch = Scratch::new("vmm");
        let vmm = run(&scratch, "trap '' TERM; echo ready >&2; while :; do sleep 0.05; done");
        thread::sleep(Duration::from_millis(200));
        vmm.terminate();
        assert_eq!(vmm.wait(Duration::from_millis(200)), None);
        drop(vmm);
    }

    #[test]
    fn missing_program_is_named() {
        let scratch = Scratch::new("vmm");
        let config = Config::from_json(br#"{"kernel":"/k","memory_mib":128,"vcpus":1}"#).unwrap();
        let lock = File::create(scratch.path().join("lock")).unwrap();
        let launch =
            Launch { program: Path::new("/nonexistent/krx-vmm"), config, lock: lock.as_fd(), taps: &[] };
        let error = VmmProcess::spawn(launch).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/krx-vmm"));
    }

    /// Answers one control request a connection.
    fn answer(scratch: &Scratch, answers: &'static [&'static str]) -> thread::JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(scratch.path().join("vmm.sock")).unwrap();
        thread::spawn(move || {
            let heard = answers.iter().map(|answer| {
                let (socket, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(&socket).read_line(&mut line).unwrap();
                (&socket).write_all(answer.as_bytes()).unwrap();
                line
            });
            heard.collect()
        })
    }

    #[test]
    fn control_requests_are_lines_of_json() {
        let scratch = Scratch::new("vmm");
        let vmm = run(&scratch, "exec sleep 100");
        let heard = answer(
            &scratch,
            &[
                "{\"ok\":true}\n",
                "{\"error\":\"already paused\"}\n",
                "{\"phases\":[{\"name\":\"config\",\"monotonic_ns\":5}]}\n",
                "nonsense\n",
                "",
            ],
        );
        vmm.pause().unwrap();
        assert!(vmm.pause().unwrap_err().to_string().contains("already paused"));
        assert_eq!(vmm.timings().unwrap(), [Phase { name: "config".into(), monotonic_ns: 5 }]);
        assert!(matches!(vmm.resume(), Err(VmmError::Control(_))));
        assert!(matches!(vmm.power_off(), Err(VmmError::Control(_))));
        assert_eq!(heard.join().unwrap()[0], "{\"request\":\"pause\"}\n");
    }
}
