//! One start, watched from outside: `krx-vmm` to its agent's hello, `krx run` to the first byte of output, QEMU to
//! PID 1. The watcher sleeps meanwhile, so that on an emulated host it does not count.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use krx_proto::{Message, io_port, port, read_frame};
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use crate::host::Memory;
use crate::resident::{self, Resident};
use crate::tracing::Event;

/// The phase just before the watched program's exec.
pub const SPAWNED: &str = "spawned";
/// Longest a start may take before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(120);

/// When things happened, in nanoseconds of `CLOCK_MONOTONIC`, the start's first.
#[derive(Debug, Clone)]
pub struct Start {
    pub phases: Vec<(String, u64)>,
    /// Of the VMM; none where it was not looked at.
    pub resident: Option<Resident>,
}

impl Start {
    /// When a phase was reached.
    ///
    /// # Panics
    /// If it was not: then the start is not what it is taken for.
    #[must_use]
    pub fn at(&self, name: &str) -> u64 {
        let found = self.phases.iter().find(|(known, _)| known == name);
        found.unwrap_or_else(|| panic!("no phase `{name}` in {:?}", self.phases)).1
    }

    /// Milliseconds from one phase to another.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a start lasts far less than 2^53 nanoseconds (104 days)")]
    pub fn between_ms(&self, from: &str, to: &str) -> f64 {
        self.at(to).saturating_sub(self.at(from)) as f64 / 1e6
    }
}

/// The built programs, in memory.
#[derive(Debug)]
pub struct Programs {
    pub krx: PathBuf,
    pub vmm: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// A root file system of one static program, `/hello`.
    pub rootfs: PathBuf,
}

impl Programs {
    /// Copies what `make build` has built.
    ///
    /// # Errors
    /// Something is not built, or there is no static program to run in a container.
    pub fn load(memory: &Memory, root: &Path) -> io::Result<Self> {
        let target = root.join("target");
        let copy = |from: &str, name: &str| memory.copy(&target.join(from), name);
        memory.copy(Path::new("/bin/busybox"), "rootfs/bin/echo").map_err(|error| {
            io::Error::new(error.kind(), "/bin/busybox, the program run: apt-get install busybox-static")
        })?;
        for directory in ["proc", "dev", "sys"] {
            fs::create_dir(memory.path("rootfs").join(directory))?;
        }
        Ok(Self {
            krx: copy("release/krx", "krx")?,
            vmm: copy("release/krx-vmm", "krx-vmm")?,
            kernel: copy("guest/vmlinux", "vmlinux")?,
            initramfs: copy("guest/initramfs.cpio", "initramfs.cpio")?,
            rootfs: memory.path("rootfs"),
        })
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |now| now.tv_sec().unsigned_abs() * 1_000_000_000 + now.tv_nsec().unsigned_abs())
}

/// A child that does not outlive the measurement.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub memory_mib: u64,
    pub vcpus: u32,
}

/// `128 MiB`, `2 GiB and 4 vCPUs`.
impl Display for Size {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        match self.memory_mib {
            mib if mib % 1024 == 0 => write!(out, "{} GiB", mib / 1024),
            mib => write!(out, "{mib} MiB"),
        }?;
        if self.vcpus > 1 { write!(out, " and {} vCPUs", self.vcpus) } else { Ok(()) }
    }
}

/// Boots `krx-vmm` until the agent has said hello.
///
/// # Errors
/// It does not come up.
pub fn vmm(programs: &Programs, memory: &Memory, size: Size) -> io::Result<Start> {
    let (vsock, control, config) = (memory.path("vsock"), memory.path("control"), memory.path("config.json"));
    let service = memory.path(&format!("vsock_{}", port::CONTROL));
    for stale in [&vsock, &control, &service] {
        let _ = fs::remove_file(stale);
    }
    let listener = UnixListener::bind(&service)?;
    let json = json!({
        "kernel": programs.kernel, "initramfs": programs.initramfs, "memory_mib": size.memory_mib, "vcpus": size.vcpus,
        "vsock": vsock, "control": control
    });
    fs::write(&config, json.to_string())?;
    let mut command = Command::new(&programs.vmm);
    command.arg("--config").arg(&config).stdin(Stdio::null()).stdout(Stdio::null());
    let spawned = monotonic_ns();
    let child = Killed(command.spawn()?);
    let (mut agent, _) = listener.accept()?;
    agent.set_read_timeout(Some(PATIENCE))?;
    let Message::Hello { .. } = read_frame(&mut agent).map_err(io::Error::other)? else {
        return Err(io::Error::other("the agent's first word was no hello"));
    };
    let ready = monotonic_ns();
    let mut phases = vec![(SPAWNED.to_string(), spawned)];
    phases.extend(timings(&control)?);
    phases.push(("agent ready".into(), ready));
    let resident = Some(resident::of(child.0.id(), size.memory_mib)?);
    Ok(Start { phases, resident })
}

/// The VMM's own phases, by its control socket.
fn timings(control: &Path) -> io::Result<Vec<(String, u64)>> {
    let mut socket = UnixStream::connect(control)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.write_all(b"{\"request\":\"timings\"}\n")?;
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line)?;
    phases(&line)
}

fn phases(json: &str) -> io::Result<Vec<(String, u64)>> {
    let answer: Value = serde_json::from_str(json)?;
    let phases =
        answer["phases"].as_array().ok_or_else(|| io::Error::other(format!("no phases in {json}")))?;
    let phase = |phase: &Value| Some((phase["name"].as_str()?.to_string(), phase["monotonic_ns"].as_u64()?));
    Ok(phases.iter().filter_map(phase).collect())
}

/// Runs a static program by `krx run` until its first byte of output is here.
///
/// # Errors
/// It does not say what it should.
pub fn container(programs: &Programs, memory: &Memory, size: Size) -> io::Result<Start> {
    let mut command = Command::new(&programs.krx);
    command.args(["run", "--timings=json", "--memory", &format!("{}M", size.memory_mib)]);
    command.args(["--cpus", &size.vcpus.to_string(), "--rootfs"]).arg(&programs.rootfs).args([
        "--",
        "/bin/echo",
        "42",
    ]);
    command.env("KRX_VMM", &programs.vmm).env("KRX_KERNEL", &programs.kernel);
    command.env("KRX_INITRAMFS", &programs.initramfs).env("KRX_STATE_DIR", memory.path("state"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let spawned = monotonic_ns();
    let mut child = Killed(command.spawn()?);
    let (Some(mut output), Some(mut errors)) = (child.0.stdout.take(), child.0.stderr.take()) else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    let mut first = [0];
    let read = output.read(&mut first)?;
    let shown = monotonic_ns();
    let (mut rest, mut report) = (String::new(), String::new());
    output.read_to_string(&mut rest)?;
    errors.read_to_string(&mut report)?;
    let said = format!("{}{rest}", String::from_utf8_lossy(&first[..read]));
    if said != "42\n" {
        return Err(io::Error::other(format!("`echo 42` said {said:?}: {report}")));
    }
    let mut all = vec![(SPAWNED.to_string(), spawned)];
    all.extend(phases(report.lines().last().unwrap_or_default())?);
    all.push(("first byte".into(), shown));
    Ok(Start { phases: all, resident: None })
}

/// A boot of the same kernel and initramfs by QEMU's `microvm`; it is to be found in the trace when PID 1 ran.
#[derive(Debug)]
pub struct Qemu {
    pub program: PathBuf,
}

impl Qemu {
    /// Reads into memory what QEMU will read: its program, libraries and firmware.
    ///
    /// # Errors
    /// It cannot be executed.
    pub fn warm(&self) -> io::Result<()> {
        Command::new(&self.program).arg("--version").stdout(Stdio::null()).status()?;
        let libraries = Command::new("ldd").arg(&self.program).output()?;
        let libraries = String::from_utf8_lossy(&libraries.stdout).into_owned();
        let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
        let firmware = ["/usr/share/qemu", "/usr/share/seabios"].into_iter().flat_map(std::fs::read_dir);
        let firmware = firmware.flatten().flatten().map(|entry| entry.path());
        for file in libraries.chain(firmware).chain([self.program.clone()]) {
            // Directories, and links that lead to nothing, are none of QEMU's.
            let _ = std::fs::read(file);
        }
        Ok(())
    }

    /// Boots until `recorded` shows that PID 1 ran, and gives when that was.
    ///
    /// # Errors
    /// It does not within a while.
    pub fn boot(&self, programs: &Programs, size: Size, seconds: u64) -> io::Result<u64> {
        let mut command = Command::new(&self.program);
        command.args(["-M", "microvm,acpi=off,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=off"]);
        command.args(["-enable-kvm", "-cpu", "host", "-smp", &size.vcpus.to_string()]);
        command.args(["-m", &format!("{}M", size.memory_mib)]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.arg("-kernel").arg(&programs.kernel).arg("-initrd").arg(&programs.initramfs);
        command.args(["-append", "quiet panic=-1 reboot=t tsc=reliable no_timer_check random.trust_cpu=on"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        let spawned = monotonic_ns();
        let child = Killed(command.spawn()?);
        // There is nobody who could tell: long enough is all that can be waited for.
        std::thread::sleep(Duration::from_secs(seconds));
        drop(child);
        Ok(spawned)
    }
}

/// When PID 1 wrote its mark, by the trace of port accesses.
#[must_use]
pub fn pid1_ns(events: &[Event]) -> Option<u64> {
    // One byte: QEMU has a register of two bytes at the same port.
    let wanted = format!("at {:#x} size 1 ", io_port::BOOT_MARK);
    let is_mark = |event: &&Event| event.name == "kvm_pio" && event.fields.contains(&wanted);
    events.iter().find(is_mark).map(|event| event.monotonic_us * 1000)
}
