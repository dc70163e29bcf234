//! A pod's directory below `/run/krx`: its lock, its sockets and what others may know of it.
//!
//! Whoever holds the lock of `NAME/lock` owns the name. The VMM inherits the locked descriptor, so the lock is free
//! exactly when owner and VMM are both gone: a directory whose lock can be taken is stale, and the next command
//! removes it. Nothing but `vmm/` is removed recursively: below `share/` lie other people's files.
//!
//! A VMM may be its guest's. It has `vmm/`, with the sockets, and can write nowhere else: by what is in the lock and in
//! `state.json` others judge it. In `vmm/` no link is followed.
//! What is kept of containers beyond their pods is not here: see [`crate::detached`].

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, process, thread};

use krx_proto::{Capabilities, ProcessSpec, port, validate_id};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::detached::Records;
use crate::other_process::Process;
use crate::plain_file::{self, is_open_in, is_same, replace};

/// Where all pods' directories lie, unless `KRX_STATE_DIR` says otherwise.
const DEFAULT_ROOT: &str = "/run/krx";
pub(crate) const LOCK: &str = "lock";
const SOCKETS: &str = "vmm";
const STATE: &str = "state.json";
/// `sun_path` of a unix socket address holds 108 bytes, the last one zero (unix(7)).
pub(crate) const MAX_SOCKET_PATH: usize = 107;
/// How long a name stays taken after its owner was killed: the VMM sees the owner's end and stops the guest.
const VMM_AFTERLIFE: Duration = Duration::from_secs(3);
/// How long a held lock is looked at again: another command may hold it just to clean up.
pub(crate) const CLEANING: Duration = Duration::from_millis(50);
/// Largest `state.json` read: more cannot be one of ours.
pub(crate) const MAX_STATE: u64 = 8 << 20;

/// Why a state directory could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{0:?} cannot name a pod: use 1 to 76 of A-Z a-z 0-9 _ . - and start with none of . -")]
    Name(String),
    #[error(
        "The name {name} is in use: process {holder} runs a pod by that name. Choose another --name, or end it with `krx kill -s KILL {name}`"
    )]
    InUse { name: String, holder: u32 },
    #[error("No pod named {0} is running. `krx ps` lists those that are")]
    NotFound(String),
    #[error(
        "The name {0} is taken by a container that has ended. Choose another --name, or remove what is left of it with `krx rm {0}`"
    )]
    Kept(String),
    #[error(
        "No container named {0} was started by `krx run -d`. `krx ps -a` lists those that run and those that have ended"
    )]
    NoRecord(String),
    #[error("Pod {0} is still starting. Try again when its container runs")]
    Starting(String),
    #[error(
        "Socket paths in {0} would be over {MAX_SOCKET_PATH} bytes: choose a shorter name or KRX_STATE_DIR"
    )]
    TooLong(PathBuf),
    #[error("Cannot use {path}. krx wants to be root, and room there; KRX_STATE_DIR names another directory")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "Process {pid}, which was the VMM of pod {name}, is another one now: nothing was killed. The pod is ending; `krx ps` tells when it has"
    )]
    NotItsVmm { name: String, pid: u32 },
    #[error("{0} is not a state that this version of krx wrote")]
    Unreadable(PathBuf, #[source] serde_json::Error),
}

/// What other commands may know of a running pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodState {
    pub name: String,
    /// The process that owns the pod.
    pub owner_pid: u32,
    pub vmm_pid: u32,
    /// Seconds since 1970.
    pub started: u64,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// `None` in a pod of containerd's, which knows its containers itself.
    pub container: Option<PodContainer>,
}

/// The container of `krx run`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodContainer {
    pub id: String,
    /// Its root file system on the host.
    pub rootfs: PathBuf,
    /// Its first process; `krx exec` starts from its environment, user and capabilities.
    pub process: ProcessSpec,
    pub exec: ExecBase,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Its owner is a process of its own, and what it writes goes to a log.
    #[serde(default)]
    pub detached: bool,
}

/// What a further process of another user than the first one's starts from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecBase {
    /// The container's capabilities, whoever its first process runs as.
    pub capabilities: Option<Capabilities>,
    /// Nobody gave a HOME: it is the user's.
    pub default_home: bool,
}

impl ExecBase {
    /// Takes from `process` what it has by its user.
    pub fn unbind(&self, process: &mut ProcessSpec) {
        process.capabilities = self.capabilities;
        if self.default_home {
            process.env.retain(|variable| !variable.starts_with("HOME="));
        }
    }
}

/// One line of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    pub owner_pid: u32,
    /// None while the pod is starting.
    pub state: Option<PodState>,
}

/// The directory of all pods.
#[derive(Debug, Clone)]
pub struct StateRoot(PathBuf);

/// A pod's own directory, removed when dropped.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    lock: Flock<File>,
}

/// Paths inside a pod's directory.
#[derive(Debug, Clone)]
pub struct PodPaths(PathBuf);

impl PodPaths {
    /// The directory itself.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.0
    }

    /// What the VMM may write to.
    fn sockets(&self) -> PathBuf {
        self.0.join(SOCKETS)
    }

    /// Unix socket that leads to the guest's vsock ports.
    #[must_use]
    pub fn vsock(&self) -> PathBuf {
        self.sockets().join("vsock")
    }

    /// Unix socket on which the host hears the guest's connections to its control port.
    #[must_use]
    pub fn agent_listener(&self) -> PathBuf {
        self.sockets().join(format!("vsock_{}", port::CONTROL))
    }

    /// Control socket of the VMM.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.sockets().join("control")
    }

    /// Unix socket of the owner that tells where the time of the pod's starts went.
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.sock")
    }

    /// Where the VMM builds the pod's share, in a mount namespace of its own.
    #[must_use]
    pub fn share(&self) -> PathBuf {
        self.0.join("share")
    }
}

/// What became of an attempt to take a directory's lock.
pub(crate) enum Attempt {
    Taken(Flock<File>),
    Held(u32),
    /// The directory or the lock file was removed meanwhile.
    Gone,
}

impl StateRoot {
    /// `KRX_STATE_DIR`, or `/run/krx`.
    #[must_use]
    pub fn from_env() -> Self {
        Self(env::var_os("KRX_STATE_DIR").map_or_else(|| DEFAULT_ROOT.into(), PathBuf::from))
    }

    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self(path.into())
    }

    /// The same directory, wherever this process goes.
    ///
    /// # Errors
    /// There is no current directory.
    pub fn absolute(&self) -> Result<Self, StateError> {
        let failed = |source| StateError::Io { path: self.0.clone(), source };
        std::path::absolute(&self.0).map(Self).map_err(failed)
    }

    /// What is kept of detached containers.
    #[must_use]
    pub fn records(&self) -> Records {
        Records::below(&self.0)
    }

    /// Where what is known of the host is kept. Not the name of a pod.
    #[must_use]
    pub fn cache(&self) -> PathBuf {
        self.0.join(".host.json")
    }

    /// Takes `name`: of several processes that try at once, one gets it.
    ///
    /// # Errors
    /// A bad name, a name in use, a directory that cannot be made.
    pub fn create(&self, name: &str) -> Result<StateDir, StateError> {
        let path = self.pod(name)?;
        if PodPaths(path.clone()).agent_listener().as_os_str().len() > MAX_SOCKET_PATH {
            return Err(StateError::TooLong(path));
        }
        let failed = |source| StateError::Io { path: path.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&self.0).map_err(failed)?;
        let begin = Instant::now();
        let lock = loop {
            let is_new = match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
                made => made.is_ok(),
            };
            // One that cannot be locked would be nobody's.
            let attempt = try_lock(&path, true).inspect_err(|_| drop(fs::remove_dir(&path)));
            match attempt.map_err(failed)? {
                Attempt::Taken(lock) if is_new => break lock,
                // Not taken over as it is: a VMM that is still ending may have it open.
                Attempt::Taken(_stale) => match remove(&path) {
                    Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                        return Err(failed(error));
                    }
                    _ => {}
                },
                Attempt::Gone => {}
                Attempt::Held(holder) => {
                    let patience = if alive(holder) { CLEANING } else { VMM_AFTERLIFE };
                    if begin.elapsed() > patience {
                        return Err(StateError::InUse { name: name.into(), holder });
                    }
                    thread::sleep(Duration::from_millis(5));
                }
            }
        };
        // Removed by its drop, as far as it came.
        let directory = StateDir { path: path.clone(), lock };
        sign(&path).map_err(failed)?;
        for path in [directory.paths().share(), directory.paths().sockets()] {
            let made = DirBuilder::new().mode(0o700).create(&path);
            made.map_err(|source| StateError::Io { path, source })?;
        }
        Ok(directory)
    }

    /// Paths and state of a running pod of someone else.
    ///
    /// # Errors
    /// No such pod, or one that has not got its container yet.
    pub fn open(&self, name: &str) -> Result<(PodPaths, PodState), StateError> {
        let path = self.pod(name)?;
        match examine(&path) {
            Ok(Some(Listed { state: Some(state), .. })) => Ok((PodPaths(path), state)),
            Ok(Some(_)) => Err(StateError::Starting(name.into())),
            Ok(None) => Err(StateError::NotFound(name.into())),
            Err(error) => Err(error),
        }
    }

    /// Kills a pod's VMM.
    ///
    /// # Errors
    /// No such pod, or one that has not got its container yet; a PID that is none of the pod's; the kernel refuses.
    pub fn kill_vmm(&self, name: &str) -> Result<(), StateError> {
        let path = self.pod(name)?;
        let (_, state) = self.open(name)?;
        let failed = |source| StateError::Io { path: path.clone(), source };
        let process = match Process::open(state.vmm_pid) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
            // The number is a thread's.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                return Err(StateError::NotItsVmm { name: name.into(), pid: state.vmm_pid });
            }
            opened => opened.map_err(failed)?,
        };
        // After that: now the number cannot become another's. A VMM that was orphaned still has the lock.
        if process.parent() != Some(state.owner_pid) && !is_open_in(state.vmm_pid, &path.join(LOCK)) {
            return Err(StateError::NotItsVmm { name: name.into(), pid: state.vmm_pid });
        }
        process.kill().map_err(failed)
    }

    /// Running pods in order of their names; stale directories met on the way are removed.
    ///
    /// # Errors
    /// The root exists and cannot be read. A single pod's unreadable state is left out.
    pub fn list(&self) -> Result<Vec<Listed>, StateError> {
        let failed = |source| StateError::Io { path: self.0.clone(), source };
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut pods: Vec<_> = entries
            .flatten()
            .filter(|entry| entry.file_name().to_str().is_some_and(validate_id))
            .filter_map(|entry| examine(&entry.path()).ok().flatten())
            .collect();
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(pods)
    }

    fn pod(&self, name: &str) -> Result<PathBuf, StateError> {
        if validate_id(name) { Ok(self.0.join(name)) } else { Err(StateError::Name(name.into())) }
    }
}

impl StateDir {
    #[must_use]
    pub fn paths(&self) -> PodPaths {
        PodPaths(self.path.clone())
    }

    /// The pod's name.
    #[must_use]
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The locked file; a child that inherits it keeps the name taken.
    #[must_use]
    pub fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// Publishes the pod for other commands, all at once.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn publish(&self, state: &PodState) -> Result<(), StateError> {
        let path = self.path.join(STATE);
        let failed = |source| StateError::Io { path: path.clone(), source };
        let json = serde_json::to_vec(state).map_err(|error| failed(error.into()))?;
        replace(&path, &json).map_err(failed)
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        // Somebody may have removed the lock by hand, and the name is another's then.
        let current = fs::symlink_metadata(self.path.join(LOCK));
        if current.is_ok_and(|now| self.lock.metadata().is_ok_and(|own| is_same(&own, &now))) {
            let _ = remove(&self.path);
        }
    }
}

/// A live pod, or `None` for a directory that was stale and is now removed.
fn examine(path: &Path) -> Result<Option<Listed>, StateError> {
    let failed = |source| StateError::Io { path: path.into(), source };
    let owner_pid = match try_lock(path, false).map_err(failed)? {
        Attempt::Taken(_lock) => {
            let _ = remove(path);
            return Ok(None);
        }
        Attempt::Gone => {
            // Its owner ended before it could lock it, or comes to lock it just now, and then makes it anew. With something
            // in it, it is not one of ours.
            let _ = fs::remove_dir(path);
            return Ok(None);
        }
        Attempt::Held(holder) => holder,
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let file = path.join(STATE);
    let json = plain_file::read(&file, MAX_STATE).map_err(failed)?;
    let parsed = json.map(|json| serde_json::from_slice(&json)).transpose();
    let state = parsed.map_err(|error| StateError::Unreadable(file, error))?;
    Ok(Some(Listed { name, owner_pid, state }))
}

pub(crate) fn try_lock(directory: &Path, create: bool) -> io::Result<Attempt> {
    let path = directory.join(LOCK);
    let mut make = OpenOptions::new();
    make.write(true).create(true).truncate(false).mode(0o600);
    let made = if create { plain_file::open(&path, &mut make).map(drop) } else { Ok(()) };
    // To be read only: the VMM inherits it.
    let mut file = match made.and_then(|()| plain_file::open(&path, OpenOptions::new().read(true))) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Attempt::Gone),
        opened => opened?,
    };
    // Before the lock: after a failed attempt the file is given back.
    let mut holder = Vec::new();
    (&mut file).take(10).read_to_end(&mut holder)?;
    let holder = String::from_utf8_lossy(&holder);
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => {
            // Between open and lock the former owner may have removed the file: its lock then guards nothing.
            let current = fs::symlink_metadata(&path)
                .is_ok_and(|now| lock.metadata().is_ok_and(|own| is_same(&own, &now)));
            if !current {
                return Ok(Attempt::Gone);
            }
            io::Seek::rewind(&mut &*lock)?;
            Ok(Attempt::Taken(lock))
        }
        Err((_, Errno::EWOULDBLOCK)) => Ok(Attempt::Held(holder.trim().parse().unwrap_or_default())),
        Err((_, error)) => Err(error.into()),
    }
}

/// Says in a lock that this process has it.
pub(crate) fn sign(directory: &Path) -> io::Result<()> {
    let mut lock = plain_file::open(&directory.join(LOCK), OpenOptions::new().write(true).truncate(true))?;
    write!(lock, "{}", process::id())
}

/// Whether a process with this PID exists. PID 0 stands for a holder that has not written its own yet.
pub(crate) fn alive(pid: u32) -> bool {
    match i32::try_from(pid) {
        Ok(pid) if pid > 0 => kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH),
        _ => true,
    }
}

/// Removes a directory, whose lock the caller holds; the lock file goes last.
///
/// # Errors
/// There is something left, or someone has made a new lock file meanwhile.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    clear(path, &[LOCK]);
    let _ = fs::remove_file(path.join(LOCK));
    fs::remove_dir(path)
}

/// Removes the entries of a directory but `keep`: files by unlink, directories only if empty. A mount that should
/// never be seen here would otherwise have its files deleted.
pub(crate) fn clear(path: &Path, keep: &[&str]) {
    let sockets = path.join(SOCKETS);
    if fs::symlink_metadata(&sockets).is_ok_and(|found| found.is_dir()) {
        // The VMM's alone, and never a place for mounts; follows no links.
        let _ = fs::remove_dir_all(sockets);
    }
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if keep.iter().any(|name| entry.file_name() == **name) {
            continue;
        }
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let _ = if is_directory { fs::remove_dir(entry.path()) } else { fs::remove_file(entry.path()) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::sync::{Arc, Barrier};

    use super::*;
    use crate::testing::Scratch;

    fn state(name: &str) -> PodState {
        PodState {
            name: name.into(),
            owner_pid: process::id(),
            vmm_pid: 2,
            started: 3,
            vcpus: 1,
            memory_mib: 128,
            container: Some(PodContainer {
                id: name.into(),
                rootfs: "/r".into(),
                process: ProcessSpec::default(),
                exec: ExecBase::default(),
                labels: BTreeMap::new(),
                detached: false,
            }),
        }
    }

    #[test]
    fn another_user_starts_from_the_containers_own() {
        let all = Capabilities { bounding: 7, effective: 7, permitted: 7, ..Capabilities::default() };
        let base = ExecBase { capabilities: Some(all), default_home: true };
        let mut process =
            ProcessSpec { env: vec!["HOME=/srv".into(), "A=b".into()], ..ProcessSpec::default() };
        base.unbind(&mut process);
        assert_eq!((process.capabilities, process.env), (Some(all), vec!["A=b".into()]));
    }

    #[test]
    fn name_in_use_names_its_holder() {
        let scratch = Scratch::new("state");
        let root = StateRoot::at(scratch.path());
        let _held = root.create("web").unwrap();
        let error = root.create("web").unwrap_err();
        assert!(matches!(error, StateError::InUse { holder, .. } if holder == process::id()), "{error}");
    }

    #[test]
    fn directory_is_private_and_goes_with_its_owner() {
        let scratch = Scratch::new("state");
        let root = StateRoot::at(&scratch.path().join("made"));
        let held = root.create("web").unwrap();
        held.publish(&state("web")).unwrap();
        let mode = fs::metadata(scratch.path().join("made/web")).unwrap().mode();
        assert_eq!(mode & 0o777, 0o700);
        drop(held);
        assert!(!scratch.path().join("made/web").exists());
    }

    /// What somebody can put there who should not be able to.
    #[test]
    fn links_and_numbers_lead_nowhere() {
        let scratch = Scratch::new("state");
        let root = StateRoot::at(scratch.path());
        let precious = scratch.write("precious", b"data");
        let held = root.create("web").unwrap();
        symlink(&precious, scratch.path().join("web/state.new")).unwrap();
        let mut sleeper = process::Command::new("sleep").arg("60").spawn().unwrap();
        let of = |owner_pid| PodState { vmm_pid: sleeper.id(), owner_pid, ..state("web") };
        let (stranger, own) = (of(1), of(process::id()));
        held.publish(&stranger).unwrap();
        assert!(
            matches!(root.kill_vmm("web"), Err(StateError::NotItsVmm { pid, .. }) if pid == sleeper.id())
        );
        assert!(sleeper.try_wait().unwrap().is_none());
        held.publish(&own).unwrap();
        root.kill_vmm("web").unwrap();
        assert!(!sleeper.wait().unwrap().success());
        // An orphan has the lock open.
        let lock = File::open(scratch.path().join("web/lock")).unwrap();
        let mut vmm = process::Command::new("sleep").arg("60").stdin(lock).spawn().unwrap();
        held.publish(&PodState { vmm_pid: vmm.id(), owner_pid: 1, ..state("web") }).unwrap();
        root.kill_vmm("web").unwrap();
        assert!(!vmm.wait().unwrap().success());
        for (file, reason) in [("web/state.json", "state"), ("web/lock", "lock")] {
            let file = scratch.path().join(file);
            fs::remove_file(&file).unwrap();
            symlink(&precious, &file).unwrap();
            assert!(matches!(root.open("web"), Err(StateError::Io { .. })), "{reason}");
            assert!(root.list().unwrap().is_empty(), "{reason}");
        }
        assert!(matches!(root.create("web"), Err(StateError::Io { .. })));
        // The lock is not ours any more, nor is the name.
        drop(held);
        assert_eq!(fs::read(&precious).unwrap(), b"data");
        assert!(scratch.path().join("web").exists());
    }

    #[test]
    fn what_a_vmm_leaves_behind_goes_with_its_directory() {
        let scratch = Scratch::new("state");
        let root = StateRoot::at(scratch.path());
        let precious = scratch.write("precious", b"data");
        let held = root.create("web").unwrap();
        let sockets = held.paths().sockets();
        fs::create_dir_all(sockets.join("a/b")).unwrap();
        symlink(scratch.path(), sockets.join("a/link")).unwrap();
        drop(held);
        assert!(precious.exists() && !scratch.path().join("web").exists());
        // A lock says what it says.
        let held = root.create("web").unwrap();
        scratch.write("web/lock", b"\xff\xff");
        assert!(matches!(root.create("web"), Err(StateError::InUse { holder: 0, .. })));
        assert_eq!(root.list().unwrap().len(), 1);
        drop(held);
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        let root = StateRoot::at(Path::new("/nonexistent"));
        for name in ["", "..", "a/b", "-x"] {
            assert!(matches!(root.create(name), Err(StateError::Name(_))), "{name:?}");
            assert!(matches!(root.open(name), Err(StateError::Name(_))), "{name:?}");
        }
    }

    #[test]
    fn stale_directory_is_taken_over_and_swept() {
        let scratch = Scratch::new("state");
        let root = StateRoot::at(scratch.path());
        for file in ["web/lock", "web/vmm/vsock", "web/state.json", "old/lock", "old/vmm/control"] {
            scratch.write(file, b"4000000000");
        }
        let held = root.create("web").unwrap();
        assert!(!held.paths().vsock().exists());
        let names: Vec<_> = root.list().unwrap().into_iter().map(|pod| pod.name).collect();
        assert_eq!(names, ["web"]);
        assert!(!scratch.path().join("old").exists());
        drop(held);
    }

    #[test]
    fn directory_without_a_lock_is_stale_if_it_is_empty() {
        let scratch = Scratch::new("state");
        let root = StateRoot::at(scratch.path());
        fs::create_dir(scratch.path().join("killed")).unwrap();
        let precious = scratch.write("others/file", b"data");
        assert!(root.list().unwrap().is_empty());
        assert!(!scratch.path().join("killed").exists() && precious.exists());
        fs::create_dir(scratch.path().join("killed")).unwrap();
        assert!(matches!(root.open("killed"), Err(StateError::NotFound(_))));
        assert!(root.create("killed").is_ok());
    }

    /// A directory stands where the lock is to be made.
    #[test]
    fn directory_that_cannot_be_locked_is_not_left() {
        let scratch = Scratch::new("state");
        let root = StateRoot::at(scratch.path());
        fs::create_dir_all(scratch.path().join("web/lock")).unwrap();
        assert!(matches!(root.create("web"), Err(StateError::Io { .. })));
        fs::remove_dir(scratch.path().join("web/lock")).unwrap();
        assert!(root.create("web").is_ok());
        assert!(!scratch.path().join("web").exists());
    }

    #[test]
    fn files_below_share_survive_everything() {
        let scratch = Scratch::new("state");
        let precious = scratch.write("web/share/rootfs/precious", b"data");
        scratch.write("web/lock", b"");
        let root = StateRoot::at(scratch.path());
        assert!(root.create("web").is_err());
        assert!(root.list().unwrap().is_empty());
        assert!(precious.exists());
    }

    #[test]
    fn pods_are_seen_by_others_once_published() {
        let scratch = Scratch::new("state");
        let root = StateRoot::at(scratch.path());
        assert!(matches!(root.open("web"), Err(StateError::NotFound(_))));
        let held = root.create("web").unwrap();
        assert!(matches!(root.open("web"), Err(StateError::Starting(_))));
        held.publish(&state("web")).unwrap();
        assert_eq!(root.open("web").unwrap().1, state("web"));
        assert_eq!(root.list().unwrap()[0].state, Some(state("web")));
        scratch.write("web/state.json", b"{\"name\":");
        assert!(matches!(root.open("web"), Err(StateError::Unreadable(..))));
    }

    #[test]
    fn long_paths_are_refused_with_the_reason() {
        let scratch = Scratch::new("state");
        let root = StateRoot::at(&scratch.path().join("x".repeat(80)));
        assert!(matches!(root.create("web"), Err(StateError::TooLong(_))));
    }

    /// Many at once, over a directory that is stale at first: exactly one owner at any time.
    #[test]
    fn one_of_many_gets_the_name() {
        let scratch = Scratch::new("state");
        scratch.write("web/lock", b"");
        let start = Arc::new(Barrier::new(8));
        let owners: Vec<_> = (0..8)
            .map(|_| {
                let (start, root) = (start.clone(), StateRoot::at(scratch.path()));
                thread::spawn(move || {
                    start.wait();
                    root.create("web")
                })
            })
            .collect();
        let results: Vec<_> = owners.into_iter().map(|owner| owner.join().unwrap()).collect();
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    }
}
