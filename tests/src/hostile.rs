//! A VMM whose guest is the kernel that attacks it (`tests/hostile-guest`), jailed as a pod's, and all that it must not touch.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{Pid, mkfifo};
use serde_json::{Value, json};

use crate::Host;
use crate::lan::Netns;
use crate::pod::{patience, until};
use crate::scratch::Scratch;

/// What the guest is given.
pub const MEMORY_MIB: u64 = 64;
/// All that the VMM may ever use besides, its program included: of that, vsock may hold 24 MiB, see docs/vsock.md.
pub const OVERHEAD_MIB: u64 = 40;
/// Descriptors: the share's are 65,536 at most, but no attack here opens files without end; vsock's are 1,023.
pub const DESCRIPTORS: usize = 1400;
/// Longest an attack may take.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long a VMM whose guest stands still is watched, and the ticks of 10 ms that it may use meanwhile.
const WATCH: Duration = Duration::from_millis(400);
const IDLE_TICKS: u64 = 6;
/// The port of the host that is listened on, and how many of its connections are kept.
const PORT: u32 = 5000;
const KEPT: usize = 200;
/// The guest looks for it in all that it gets.
const CANARY: &[u8] = b"KRX-CANARY: what the host keeps to itself\n";
/// The tap's number in the VMM.
const TAP: i32 = 900;

/// What to add to a VM.
#[derive(Debug, Clone, Copy, Default)]
pub struct With {
    pub disk: bool,
    /// An interface, moved by vhost-net or not.
    pub net: Option<bool>,
}

/// A share for the guest, and beside it what is not shared.
#[derive(Debug)]
pub struct Ground {
    host: Host,
    scratch: Scratch,
    before: Vec<(PathBuf, BTreeMap<PathBuf, String>)>,
}

/// A hostile guest at work.
#[derive(Debug)]
pub struct Rage {
    vmm: Child,
    said: Arc<Mutex<String>>,
    /// Holds the tap.
    _netns: Option<Netns>,
}

/// What the guest had to say at its end.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report(BTreeMap<String, u64>);

impl Report {
    /// # Panics
    /// When the guest does not count that.
    #[must_use]
    pub fn of(&self, name: &str) -> u64 {
        *self.0.get(name).unwrap_or_else(|| panic!("no {name} in {self:?}"))
    }
}

/// Seeds of a run: a fixed one, so that it is the same each time, or `KRX_SEED`.
#[must_use]
pub fn seeds() -> Vec<u64> {
    let seed = std::env::var("KRX_SEED").ok().and_then(|seed| seed.parse().ok());
    vec![seed.unwrap_or(1)]
}

impl Ground {
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new(host: &Host) -> Self {
        let scratch = Scratch::new();
        for directory in ["canary/inner", "fixed", "files", "share", "sockets"] {
            fs::create_dir_all(scratch.join(directory)).expect("directory");
        }
        scratch.write("canary/secret", CANARY);
        scratch.write("canary/inner/secret", CANARY);
        scratch.write("fixed/constant", "never changes\n");
        // What a guest may fill is small.
        let flags = MsFlags::MS_NOATIME;
        mount(Some("krx"), &scratch.join("files"), Some("tmpfs"), flags, Some("size=16m,nr_inodes=2k"))
            .expect("a tmpfs to be filled");
        let mut ground = Self { host: host.clone(), scratch, before: Vec::new() };
        ground.fill_share();
        for kept in ["canary", "fixed"] {
            let kept = ground.scratch.join(kept);
            ground.before.push((kept.clone(), snapshot(&kept)));
        }
        ground
    }

    fn fill_share(&self) {
        let files = self.scratch.join("files");
        fs::write(files.join("own"), "the guest's own\n").expect("file");
        symlink(self.scratch.join("canary/secret"), files.join("out")).expect("link");
        symlink("../canary", files.join("dir-out")).expect("link");
        mkfifo(&files.join("fifo"), Mode::from_bits_truncate(0o666)).expect("fifo");
        fs::write(files.join("setuid"), "#!/bin/sh\n").expect("file");
        fs::set_permissions(files.join("setuid"), PermissionsExt::from_mode(0o4755)).expect("setuid");
        drop(UnixListener::bind(files.join("socket")).expect("socket"));
        mknod(&files.join("null"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, 3))
            .expect("device node");
    }

    /// Starts a VMM, as a pod's is but for the console, on which the guest tells what it does.
    ///
    /// # Panics
    /// When the host cannot.
    #[must_use]
    pub fn play(&self, attack: &str, (seed, rounds): (u64, u64), with: With) -> Rage {
        let disk = if with.disk { " krx_disk=1" } else { "" };
        let kernel = self.host.hostile_guest();
        assert!(kernel.exists(), "the hostile guest is not built: run scripts/hostile-guest");
        let mut config = json!({
            "kernel": kernel, "memory_mib": MEMORY_MIB, "vcpus": 1, "console": true, "boot_timeout_ms": 30_000,
            "cmdline": format!("krx_attack={attack} krx_seed={seed} krx_rounds={rounds}{disk}"),
            "share": {"root": self.scratch.join("share"), "entries": [
                {"name": "files", "source": self.scratch.join("files")},
                {"name": "fixed", "source": self.scratch.join("fixed"), "read_only": true},
            ]},
            "vsock": self.scratch.join("sockets/vsock"), "control": self.scratch.join("sockets/control"),
        });
        let mut command = Command::new(self.host.vmm());
        let netns = with.net.map(|vhost| {
            config["vhost_net"] = json!(vhost);
            config["net"] = json!([{"tap_fd": TAP, "mac": "02:00:00:00:00:01"}]);
            let netns = Netns::new();
            give_tap(&mut command, netns.inside(tap));
            netns
        });
        let config = self.scratch.write("config.json", config.to_string());
        let service =
            UnixListener::bind(self.scratch.join(&format!("sockets/vsock_{PORT}"))).expect("service");
        let mut vmm = command.arg("--config").arg(config).stderr(Stdio::piped()).spawn().expect("krx-vmm");
        drop(command);
        let said = Arc::new(Mutex::new(String::new()));
        let (heard, stderr) = (Arc::clone(&said), vmm.stderr.take().expect("piped"));
        thread::spawn(move || listen(BufReader::new(stderr), &heard));
        thread::spawn(move || serve(&service));
        let mut rage = Rage { vmm, said, _netns: netns };
        if with.disk {
            rage.until_said("waits for a disk");
            attach(&self.scratch.join("sockets/control"), &self.scratch.join("disk"));
        }
        rage
    }

    /// Nothing beside the share has changed, and nothing in it may hurt the host; nothing is left of the VM.
    ///
    /// # Panics
    /// When it has.
    pub fn assert_unharmed(&self) {
        for (tree, before) in &self.before {
            assert_eq!(&snapshot(tree), before);
        }
        let files = self.scratch.join("files");
        for (path, state) in snapshot(&files) {
            let metadata = fs::symlink_metadata(&path).expect("metadata");
            let is_device = metadata.file_type().is_char_device() || metadata.file_type().is_block_device();
            // An overlay's whiteout, the device 0/0, is none.
            let harmless = !is_device || metadata.rdev() == 0 || path.ends_with("null");
            assert!(harmless, "{}: {state}", path.display());
        }
        assert!(fs::read_dir(self.scratch.join("share")).expect("share").next().is_none());
        for socket in ["vsock", "control"] {
            assert!(!self.scratch.join("sockets").join(socket).exists(), "{socket} is left");
        }
        let mut names: Vec<_> = snapshot(self.scratch.path()).into_keys().collect();
        names.retain(|path| !path.starts_with(&files));
        let known = ["canary", "fixed", "files", "share", "sockets", "config.json", "disk"];
        for name in names {
            let inside = name.strip_prefix(self.scratch.path()).expect("inside");
            assert!(known.iter().any(|known| inside.starts_with(known)), "made by the guest: {inside:?}");
        }
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let _ = umount2(&self.scratch.join("files"), MntFlags::MNT_DETACH);
    }
}

impl Rage {
    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.vmm.id()).expect("pid"))
    }

    /// What was said so far, by the VMM and its guest.
    ///
    /// # Panics
    /// Never, unless a listener has.
    #[must_use]
    pub fn said(&self) -> String {
        self.said.lock().expect("lock").clone()
    }

    fn until_said(&mut self, word: &str) {
        let heard = until(DEADLINE, || {
            let is_over = self.vmm.try_wait().expect("wait").is_some();
            (is_over || self.said().contains(word)).then_some(!is_over)
        });
        assert_eq!(heard, Some(true), "never said `{word}`: {}", self.said());
    }

    /// Waits until the guest has played to its end, and stands still.
    ///
    /// # Panics
    /// When the VMM, or the guest, ends before.
    #[must_use]
    pub fn report(&mut self) -> Report {
        let line = until(DEADLINE, || {
            let said = self.said();
            let line =
                said.lines().find(|line| line.starts_with("HOSTILE done") && line.contains("granted="));
            if line.is_none()
                && let Some(status) = self.vmm.try_wait().expect("wait")
            {
                panic!("ended before its time, {status}: {said}");
            }
            line.map(str::to_string)
        });
        let line = line.unwrap_or_else(|| panic!("not played to its end: {}", self.said()));
        println!("{line}");
        let counts = line.split(' ').filter_map(|word| word.split_once('='));
        Report(counts.map(|(name, count)| (name.to_string(), count.parse().expect("number"))).collect())
    }

    /// The VMM has kept to its bounds, and rests as its guest does.
    ///
    /// # Panics
    /// When it has not.
    pub fn assert_bounded(&self) {
        let pid = self.vmm.id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        let peak = peak.and_then(|kib| kib.trim().parse::<u64>().ok()).expect("VmHWM") >> 10;
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").count();
        println!("peak {peak} MiB, {descriptors} descriptors");
        assert!(peak <= MEMORY_MIB + OVERHEAD_MIB, "{peak} MiB at its peak: {}", self.said());
        assert!(descriptors <= DESCRIPTORS, "{descriptors} descriptors");
        let before = ticks(pid);
        thread::sleep(WATCH);
        let used = ticks(pid) - before;
        assert!(used <= IDLE_TICKS, "{used} ticks of CPU time in {WATCH:?} for a guest that stands still");
        assert!(self.said().len() < 1 << 20, "the log is flooded");
    }

    /// Ends the VMM as an impatient owner does.
    ///
    /// # Panics
    /// When it does not end in time, or otherwise than it should.
    pub fn stop(mut self) {
        for _ in 0..2 {
            kill(self.pid(), Signal::SIGTERM).expect("kill");
            // Two that are pending are one.
            thread::sleep(Duration::from_millis(20));
        }
        let status = until(Duration::from_secs(10), || self.vmm.try_wait().expect("wait"));
        let status = status.unwrap_or_else(|| panic!("does not end: {}", self.said()));
        assert_eq!(status.code(), Some(7), "{status}: {}", self.said());
        self.assert_documented(status);
    }

    /// Waits for a guest that may end, or may not; the status, if it does.
    ///
    /// # Panics
    /// When the VMM ends otherwise than it should.
    #[must_use]
    pub fn end_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        let begin = Instant::now();
        let status = until(limit, || {
            let status = self.vmm.try_wait().expect("wait");
            let is_done = self.said().contains("HOSTILE done") && begin.elapsed() > limit / 4;
            (status.is_some() || is_done).then_some(status)
        });
        let status = status.flatten()?;
        self.assert_documented(status);
        Some(status)
    }

    fn assert_documented(&self, status: ExitStatus) {
        // What it said last may not have been heard yet.
        thread::sleep(Duration::from_millis(20));
        let said = self.said();
        let code = status.code().unwrap_or_else(|| panic!("ended by a signal, {status}: {said}"));
        assert!([0, 4, 5, 6, 7, 8].contains(&code), "{status}: {said}");
        assert!(!said.contains("panicked at"), "{said}");
    }
}

impl Drop for Rage {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

fn listen(mut from: BufReader<impl Read>, heard: &Mutex<String>) {
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        heard.lock().expect("lock").push_str(&String::from_utf8_lossy(&line));
        line.clear();
    }
}

/// Takes connections of the guest, keeps some, and reads nothing.
fn serve(service: &UnixListener) {
    let mut kept = Vec::new();
    while let Ok((connection, _)) = service.accept() {
        if kept.len() < KEPT {
            kept.push(connection);
        }
    }
}

/// CPU time of a process, in ticks.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let fields = stat.rsplit_once(") ").expect("name").1.split(' ');
    fields.skip(11).take(2).map(|field| field.parse::<u64>().expect("ticks")).sum()
}

/// Everything in a tree, links not followed: what it is, whose, and what is in it.
fn snapshot(tree: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut left = vec![tree.to_path_buf()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            let metadata = fs::symlink_metadata(&path).expect("metadata");
            let mut content = Vec::new();
            if metadata.is_file() {
                // A guest can make files of petabytes that hold nothing.
                let read = File::open(&path).and_then(|file| file.take(80).read_to_end(&mut content));
                read.expect("content");
            }
            let shown = String::from_utf8_lossy(&content);
            let (mode, owner, links) = (metadata.mode(), (metadata.uid(), metadata.gid()), metadata.nlink());
            let times = (metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec());
            let state = format!("{mode:o} {owner:?} {links} {times:?} {} {shown:?}", metadata.len());
            if metadata.is_dir() {
                left.push(path.clone());
            }
            found.insert(path, state);
        }
    }
    found
}

mod tun {
    nix::ioctl_write_ptr_bad!(set_interface, nix::libc::TUNSETIFF, nix::libc::ifreq);
}

/// A tap in the calling thread's network namespace.
fn tap() -> File {
    let tun = File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
    let flags = nix::libc::IFF_TAP | nix::libc::IFF_NO_PI | nix::libc::IFF_VNET_HDR;
    let flags = i16::try_from(flags).expect("flags");
    let mut request = nix::libc::ifreq {
        ifr_name: [0; nix::libc::IFNAMSIZ],
        ifr_ifru: nix::libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    };
    for (place, byte) in request.ifr_name.iter_mut().zip(b"hostile0") {
        *place = byte.cast_signed();
    }
    // SAFETY: the request is a whole `ifreq` whose name ends with a NUL.
    unsafe { tun::set_interface(tun.as_raw_fd(), &raw const request) }.expect("TUNSETIFF");
    let up = Command::new("ip").args(["link", "set", "hostile0", "up"]).status().expect("ip");
    assert!(up.success());
    tun
}

/// The command, and no other that starts meanwhile, has the tap as [`TAP`].
fn give_tap(command: &mut Command, tap: File) {
    let give = move || match nix::errno::Errno::result(
        // SAFETY: `dup2` may be called between fork and exec; no descriptor of the child has that number yet.
        unsafe { nix::libc::dup2(tap.as_raw_fd(), TAP) },
    ) {
        Ok(_) => Ok(()),
        Err(error) => Err(io::Error::from(error)),
    };
    // SAFETY: one system call, no memory is taken.
    unsafe { command.pre_exec(give) };
}

/// Gives the guest a disk.
fn attach(control: &Path, file: &Path) {
    let disk = File::options().read(true).write(true).create(true).truncate(true).open(file).expect("disk");
    disk.set_len(1 << 20).expect("length");
    let mut client = UnixStream::connect(control).expect("control socket");
    client.set_read_timeout(Some(patience(Duration::from_secs(30)))).expect("timeout");
    let line = b"{\"request\":{\"attach_disk\":{\"read_only\":false}}}\n";
    let fds = [disk.as_raw_fd()];
    let passed = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(client.as_raw_fd(), &[IoSlice::new(line)], &passed, MsgFlags::empty(), None).expect("sent");
    client.flush().expect("flush");
    let mut answer = String::new();
    BufReader::new(client).read_line(&mut answer).expect("answer");
    let answer: Value = serde_json::from_str(&answer).expect("JSON");
    assert!(answer["disk"]["slot"].is_u64(), "{answer}");
}
