//! `krx run` as a test drives it: a state directory of its own, a deadline on everything.

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::Host;
use crate::scratch::Scratch;

/// Longest any one run may take, see [`patience`].
pub const DEADLINE: Duration = Duration::from_secs(120);

/// What a limit of time is here. An emulated host takes a second or two for a boot where nothing else runs; beside a second
/// one, on a machine whose processors are lent to others as well, it has been seen to take five times as long. A limit is
/// there to end a standstill, so that too long costs nothing.
#[must_use]
pub fn patience(limit: Duration) -> Duration {
    if benches::host::is_emulated() { limit * 3 } else { limit }
}

/// A place to run pods: their state lies in its scratch directory.
#[derive(Debug)]
pub struct Place {
    pub host: Host,
    pub scratch: Scratch,
    /// A file in the place of the host's `config.toml`.
    pub settings: Option<PathBuf>,
    /// Root file system of the containers.
    pub rootfs: PathBuf,
}

impl Place {
    /// `None` where no VM can run, see [`crate::host`].
    #[must_use]
    pub fn new() -> Option<Self> {
        let host = crate::host()?;
        let rootfs = host.rootfs();
        Some(Self { host, scratch: Scratch::new(), settings: None, rootfs })
    }

    /// As [`Self::new`], with a root file system that has real software in it, `SET` of rootfs/software-rootfs.sh.
    ///
    /// # Panics
    /// When it is not there.
    #[must_use]
    pub fn with_software(set: &str) -> Option<Self> {
        let place = Self::new()?;
        let rootfs = place.host.software(set);
        Some(Self { rootfs, ..place })
    }

    /// As [`Self::new`], with these settings.
    ///
    /// # Panics
    /// When they cannot be written.
    #[must_use]
    pub fn with_settings(settings: &str) -> Option<Self> {
        let mut place = Self::new()?;
        let path = place.scratch.join("config.toml");
        fs::write(&path, settings).expect("settings");
        place.settings = Some(path);
        Some(place)
    }

    /// Directory that holds the pods' state.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.scratch.join("state")
    }

    /// `krx` with these arguments.
    #[must_use]
    pub fn krx(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.host.krx());
        command.args(arguments).env("KRX_STATE_DIR", self.state());
        if let Some(settings) = &self.settings {
            command.env("KRX_CONFIG", settings);
        }
        command
    }

    /// `krx run OPTIONS --rootfs ROOT -- COMMAND`.
    #[must_use]
    pub fn run(&self, options: &[&str], command: &[&str]) -> Command {
        let mut krx = self.krx(&["run"]);
        krx.args(options).arg("--rootfs").arg(&self.rootfs).arg("--").args(command);
        krx
    }

    /// Runs a shell script in a pod.
    ///
    /// # Panics
    /// When it does not end in time.
    #[must_use]
    pub fn sh(&self, options: &[&str], script: &str) -> Ended {
        finish(&mut self.run(options, &["sh", "-c", script]), b"")
    }

    /// Starts a pod that lives until it is killed, and waits until it runs.
    ///
    /// # Panics
    /// When it does not come up in time.
    #[must_use]
    pub fn living(&self, name: &str) -> Living<'_> {
        self.living_with(name, &[])
    }

    /// As [`Self::living`], with further options of `krx run`.
    ///
    /// # Panics
    /// When it does not come up in time.
    #[must_use]
    pub fn living_with(&self, name: &str, options: &[&str]) -> Living<'_> {
        let options = [&["--name", name], options].concat();
        let mut command = self.run(&options, &["sh", "-c", "echo up; exec sleep 3600"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("krx");
        let mut first = [0; 3];
        let read = child.stdout.as_mut().expect("piped").read_exact(&mut first);
        if read.is_err() {
            let output = child.wait_with_output().expect("output");
            panic!("pod did not come up: {}", String::from_utf8_lossy(&output.stderr));
        }
        Living { place: self, name: name.into(), child }
    }

    /// What is left of pods: entries of the state directory, and VMMs that were started from it.
    #[must_use]
    pub fn remains(&self) -> Vec<String> {
        let entries = fs::read_dir(self.state()).into_iter().flatten().flatten();
        // What is known of the host stays.
        let pods = entries.filter(|entry| entry.file_name() != ".host.json");
        let mut remains: Vec<_> = pods.map(|entry| entry.path().display().to_string()).collect();
        let scratch = self.scratch.path().to_string_lossy().into_owned();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        remains.extend(mounts.lines().filter(|line| line.contains(&scratch)).map(str::to_string));
        remains.extend(
            vmms()
                .into_iter()
                .filter(|(_, state)| state.contains(&scratch))
                .map(|(pid, _)| format!("krx-vmm {pid}")),
        );
        remains
    }

    /// Waits until nothing is left.
    ///
    /// # Panics
    /// When something still is after five seconds.
    pub fn assert_clean(&self) {
        let remains = until(Duration::from_secs(10), || Some(self.remains()).filter(Vec::is_empty));
        assert!(remains.is_some(), "left behind: {:?}", self.remains());
    }

    /// PID of the VMM of a pod.
    ///
    /// # Panics
    /// When the pod does not run.
    #[must_use]
    pub fn vmm_pid(&self, name: &str) -> i32 {
        let json = fs::read(self.state().join(name).join("state.json")).expect("state of the pod");
        let state: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
        state["vmm_pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("vmm_pid")
    }
}

/// A pod that runs in the background.
#[derive(Debug)]
pub struct Living<'a> {
    pub place: &'a Place,
    pub name: String,
    pub child: Child,
}

impl Living<'_> {
    /// `krx exec` in it.
    #[must_use]
    pub fn exec(&self, command: &[&str]) -> Ended {
        let mut arguments = vec!["exec", &self.name, "--"];
        arguments.extend(command);
        finish(&mut self.place.krx(&arguments), b"")
    }
}

impl Drop for Living<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command that has ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ended {
    /// # Panics
    /// Unless the command succeeded.
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Runs a command to its end with `input` on its standard input.
///
/// # Panics
/// When it does not end before [`DEADLINE`], see [`patience`].
pub fn finish(command: &mut Command, input: &[u8]) -> Ended {
    finish_within(DEADLINE, command, input)
}

/// As [`finish`], with another limit than [`DEADLINE`].
///
/// # Panics
/// When it does not end before that.
pub fn finish_within(limit: Duration, command: &mut Command, input: &[u8]) -> Ended {
    let limit = patience(limit);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("piped");
    let input = input.to_vec();
    thread::spawn(move || stdin.write_all(&input));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("pid"));
    let (sender, ended) = std::sync::mpsc::channel();
    let watch = thread::spawn(move || {
        let in_time = ended.recv_timeout(limit).is_ok();
        if !in_time {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        in_time
    });
    let output = child.wait_with_output().expect("output");
    let _ = sender.send(());
    let in_time = watch.join().expect("watch");
    let ended = Ended::from(output);
    assert!(in_time, "{command:?} did not end within {limit:?}: {ended:?}");
    ended
}

/// Calls `probe` until it gives something, or `limit` has passed, see [`patience`].
pub fn until<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let limit = patience(limit);
    let begin = Instant::now();
    loop {
        if let Some(value) = probe() {
            return Some(value);
        }
        if begin.elapsed() > limit {
            return None;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Running VMMs, each with its open files and sockets' names as one text.
fn vmms() -> Vec<(u32, String)> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == "krx-vmm")
    })
    .map(|pid| (pid, fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default()))
    .collect()
}
