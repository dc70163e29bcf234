//! Records of detached containers: who owns them, and how they ended.
//!
//! The owner holds the lock of `.kept/NAME/lock` as long as it lives. A record whose lock can be taken is that of a container
//! which has ended, or whose owner was killed; one that never started is removed by whoever meets it.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use krx_proto::validate_id;
use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

use crate::plain_file::{self, replace};
use crate::state_dir::{
    Attempt, CLEANING, LOCK, MAX_SOCKET_PATH, MAX_STATE, StateError, alive, clear, remove, sign, try_lock,
};

/// Not the name of a pod.
const DIRECTORY: &str = ".kept";
const RECORD: &str = "record.json";
/// Between two looks at a lock.
const STEP: Duration = Duration::from_millis(10);

/// What is known of a detached container. Times are seconds since 1970.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub name: String,
    pub args: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub created: u64,
    /// When its process ran. Until then there is nothing to be kept.
    pub started: Option<u64>,
    pub ended: Option<Ended>,
    /// Nothing is kept after the end, not even that of its owner.
    #[serde(default)]
    pub rm: bool,
}

impl Record {
    fn is_kept(&self) -> bool {
        self.started.is_some() && !self.rm
    }
}

/// The end of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    pub at: u64,
    /// What `krx run` would have exited with.
    pub code: u8,
    /// What krx had to say of it.
    pub error: Option<String>,
}

/// A record of somebody else's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub record: Record,
    /// The process that owns the container, as long as it lives.
    pub owner: Option<u32>,
    directory: PathBuf,
}

/// The directory of all records.
#[derive(Debug, Clone)]
pub struct Records(PathBuf);

/// A record of one's own. It goes when dropped, unless it is to stay.
#[derive(Debug)]
pub struct Keeping {
    directory: PathBuf,
    stays: bool,
    _lock: Flock<File>,
}

impl Kept {
    /// Whether the container is over, with or without a record of its end.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.owner.is_none() || self.record.ended.is_some()
    }

    /// In a word or two.
    #[must_use]
    pub fn status(&self) -> String {
        match (&self.record.ended, self.owner, self.record.started) {
            (Some(ended), ..) => format!("exited ({})", ended.code),
            (None, None, _) => "dead".into(),
            (None, Some(_), None) => "starting".into(),
            (None, Some(_), Some(_)) => "running".into(),
        }
    }

    /// Where its log is, see [`super::log`].
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where its owner listens for who wants to look on.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        socket(&self.directory)
    }
}

fn socket(directory: &Path) -> PathBuf {
    directory.join("attach")
}

impl Records {
    pub(crate) fn below(state: &Path) -> Self {
        Self(state.join(DIRECTORY))
    }

    fn path(&self, name: &str) -> Result<PathBuf, StateError> {
        if validate_id(name) { Ok(self.0.join(name)) } else { Err(StateError::Name(name.into())) }
    }

    /// Makes a record, as long as nobody else has one of that name.
    ///
    /// # Errors
    /// A bad name, or one that is taken; a directory that cannot be made.
    pub fn take(&self, name: &str) -> Result<Keeping, StateError> {
        let directory = self.path(name)?;
        if socket(&directory).as_os_str().len() > MAX_SOCKET_PATH {
            return Err(StateError::TooLong(directory));
        }
        let failed = |source| StateError::Io { path: directory.clone(), source };
        let begin = Instant::now();
        let lock = loop {
            let made = DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&self.0)
                .and_then(|()| DirBuilder::new().mode(0o700).create(&directory));
            match made.map_err(|error| (error.kind(), error)) {
                Ok(()) | Err((io::ErrorKind::AlreadyExists, _)) => {}
                // Somebody has removed the last record, and the directory of all with it.
                Err((io::ErrorKind::NotFound, _)) if begin.elapsed() < CLEANING => continue,
                Err((_, error)) => return Err(failed(error)),
            }
            match try_lock(&directory, true).map_err(failed)? {
                Attempt::Taken(lock) => break lock,
                Attempt::Gone => {}
                Attempt::Held(holder) if begin.elapsed() > CLEANING => {
                    return Err(StateError::InUse { name: name.into(), holder });
                }
                Attempt::Held(_) => thread::sleep(STEP),
            }
        };
        if read(&directory)?.is_some_and(|record| record.is_kept()) {
            return Err(StateError::Kept(name.into()));
        }
        clear(&directory, &[LOCK]);
        sign(&directory).map_err(failed)?;
        Ok(Keeping { directory, stays: false, _lock: lock })
    }

    /// For those who take a name without making a record.
    ///
    /// # Errors
    /// The name is that of a container that has ended.
    pub fn check_free(&self, name: &str) -> Result<(), StateError> {
        let directory = self.path(name)?;
        // One system call where nothing is kept. One that runs has its pod's name, and that is taken.
        if !directory.exists() {
            return Ok(());
        }
        match self.examine(&directory)? {
            Some(kept) if kept.is_over() => Err(StateError::Kept(name.into())),
            _ => Ok(()),
        }
    }

    /// The record of a container by its name.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn open(&self, name: &str) -> Result<Kept, StateError> {
        let directory = self.path(name)?;
        self.examine(&directory)?.ok_or_else(|| StateError::NoRecord(name.into()))
    }

    /// All of them, in order of their names. One that cannot be read is left out.
    ///
    /// # Errors
    /// The directory exists and cannot be read.
    pub fn list(&self) -> Result<Vec<Kept>, StateError> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|source| StateError::Io { path: self.0.clone(), source })?,
        };
        let directories =
            entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(validate_id));
        let mut all: Vec<_> =
            directories.filter_map(|entry| self.examine(&entry.path()).ok().flatten()).collect();
        all.sort_by(|a, b| a.record.name.cmp(&b.record.name));
        Ok(all)
    }

    /// Waits until the owner of a container is gone; whether it is.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn wait_for_owner(&self, name: &str, limit: Duration) -> Result<bool, StateError> {
        let begin = Instant::now();
        loop {
            match self.open(name) {
                Ok(Kept { owner: Some(_), .. }) if begin.elapsed() < limit => thread::sleep(STEP),
                Ok(kept) => return Ok(kept.owner.is_none()),
                Err(StateError::NoRecord(_)) => return Ok(true),
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes what is left of a container.
    ///
    /// # Errors
    /// There is nothing, or it has an owner.
    pub fn remove(&self, name: &str) -> Result<(), StateError> {
        let directory = self.path(name)?;
        let failed = |source| StateError::Io { path: directory.clone(), source };
        let begin = Instant::now();
        loop {
            match try_lock(&directory, true).map_err(failed)? {
                Attempt::Taken(_lock) => break self.drop_directory(&directory),
                Attempt::Gone if directory.exists() => {}
                Attempt::Gone => return Err(StateError::NoRecord(name.into())),
                Attempt::Held(holder) if begin.elapsed() > CLEANING => {
                    return Err(StateError::InUse { name: name.into(), holder });
                }
                Attempt::Held(_) => thread::sleep(STEP),
            }
        }
        Ok(())
    }

    fn examine(&self, directory: &Path) -> Result<Option<Kept>, StateError> {
        let failed = |source| StateError::Io { path: directory.into(), source };
        let kept = |record, owner| Some(Kept { record, owner, directory: directory.into() });
        match try_lock(directory, false).map_err(failed)? {
            Attempt::Taken(_lock) => match read(directory)? {
                Some(record) if record.is_kept() => Ok(kept(record, None)),
                _ => {
                    self.drop_directory(directory);
                    Ok(None)
                }
            },
            Attempt::Gone => {
                // Made by somebody who was killed before he had its lock. One that has is told so, and makes it anew.
                let _ = fs::remove_dir(directory);
                Ok(None)
            }
            Attempt::Held(holder) => {
                let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let record = read(directory)?.unwrap_or_else(|| Record { name, ..Record::default() });
                // Somebody else who looks at it holds it, too, for a moment.
                Ok(kept(record, Some(holder).filter(|holder| alive(*holder))))
            }
        }
    }

    /// Removes a directory, whose lock the caller holds, and that of all when it was the last one.
    fn drop_directory(&self, directory: &Path) {
        let _ = remove(directory);
        let _ = fs::remove_dir(&self.0);
    }
}

impl Keeping {
    /// The directory, for the log.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where to listen for who wants to look on.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        socket(&self.directory)
    }

    /// Writes the record, all at once.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn publish(&self, record: &Record) -> Result<(), StateError> {
        let path = self.directory.join(RECORD);
        let failed = |source| StateError::Io { path: path.clone(), source };
        let json = serde_json::to_vec(record).map_err(|error| failed(error.into()))?;
        replace(&path, &json).map_err(failed)
    }

    /// Whether it is there when its owner is not any more.
    pub fn stay(&mut self, stays: bool) {
        self.stays = stays;
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        if self.stays {
            let _ = fs::remove_file(self.socket());
        } else {
            let _ = remove(&self.directory);
            let _ = self.directory.parent().map(fs::remove_dir);
        }
    }
}

fn read(directory: &Path) -> Result<Option<Record>, StateError> {
    let path = directory.join(RECORD);
    let failed = |source| StateError::Io { path: path.clone(), source };
    let json = plain_file::read(&path, MAX_STATE).map_err(failed)?;
    let record = json.map(|json| serde_json::from_slice(&json)).transpose();
    record.map_err(|error| StateError::Unreadable(path, error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::{Arc, Barrier};

    use super::*;
    use crate::state_dir::StateRoot;
    use crate::testing::Scratch;

    fn records(scratch: &Scratch) -> Records {
        StateRoot::at(scratch.path()).records()
    }

    fn record(name: &str) -> Record {
        Record { name: name.into(), created: 1, started: Some(2), ..Record::default() }
    }

    #[test]
    fn what_never_started_leaves_nothing() {
        let scratch = Scratch::new("kept");
        let records = records(&scratch);
        drop(records.take("web").unwrap());
        assert!(!scratch.path().join(".kept").exists());
        // As its owner's violent end would leave it.
        for file in [".kept/a/lock", ".kept/a/log", ".kept/b/lock", ".kept/b/record.json"] {
            scratch.write(file, br#"{"name":"b","args":[],"labels":{},"created":1}"#);
        }
        fs::create_dir(scratch.path().join(".kept/c")).unwrap();
        assert!(records.check_free("a").is_ok());
        assert_eq!(records.list().unwrap(), []);
        assert!(!scratch.path().join(".kept/c").exists());
        assert!(!scratch.path().join(".kept/b").exists());
        // Of one that was to leave nothing, whose owner was killed.
        let killed = br#"{"name":"d","args":[],"labels":{},"created":1,"started":2,"rm":true}"#;
        scratch.write(".kept/d/record.json", killed);
        scratch.write(".kept/d/lock", b"");
        assert!(records.check_free("d").is_ok());
        scratch.write(".kept/d/record.json", killed);
        scratch.write(".kept/d/lock", b"");
        drop(records.take("d").unwrap());
    }

    #[test]
    fn name_is_taken_until_the_record_is_removed() {
        let scratch = Scratch::new("kept");
        let records = records(&scratch);
        let mut keeping = records.take("web").unwrap();
        assert!(matches!(records.take("web"), Err(StateError::InUse { .. })));
        assert_eq!(records.open("web").unwrap().status(), "starting");
        keeping.publish(&record("web")).unwrap();
        let mode = |file: &str| {
            fs::metadata(scratch.path().join(".kept/web").join(file)).unwrap().permissions().mode() & 0o777
        };
        assert_eq!((mode(""), mode("record.json"), mode("lock")), (0o700, 0o600, 0o600));
        assert_eq!(records.open("web").unwrap().status(), "running");
        assert!(records.check_free("web").is_ok(), "the pod's own name says so");
        assert!(matches!(records.remove("web"), Err(StateError::InUse { .. })));
        assert!(!records.wait_for_owner("web", Duration::ZERO).unwrap());
        keeping.stay(true);
        drop(keeping);
        assert!(records.wait_for_owner("web", Duration::ZERO).unwrap());
        let kept = records.open("web").unwrap();
        assert_eq!((kept.status().as_str(), kept.owner, kept.is_over()), ("dead", None, true));
        assert!(matches!(records.take("web"), Err(StateError::Kept(_))));
        assert!(matches!(records.check_free("web"), Err(StateError::Kept(_))));
        records.remove("web").unwrap();
        assert!(matches!(records.remove("web"), Err(StateError::NoRecord(_))));
        assert!(records.take("web").is_ok());
    }

    #[test]
    fn end_is_told() {
        let scratch = Scratch::new("kept");
        let records = records(&scratch);
        let mut keeping = records.take("web").unwrap();
        keeping.stay(true);
        let ended = Some(Ended { at: 3, code: 3, error: None });
        keeping.publish(&Record { ended, ..record("web") }).unwrap();
        // The owner may have something left to do.
        let kept = records.open("web").unwrap();
        assert_eq!((kept.status().as_str(), kept.is_over()), ("exited (3)", true));
        drop(keeping);
        assert_eq!(records.list().unwrap()[0].status(), "exited (3)");
    }

    #[test]
    fn records_that_are_not_ours_can_be_removed() {
        let scratch = Scratch::new("kept");
        let records = records(&scratch);
        scratch.write(".kept/odd/lock", b"");
        scratch.write(".kept/odd/record.json", b"{");
        assert!(matches!(records.open("odd"), Err(StateError::Unreadable(..))));
        assert_eq!(records.list().unwrap(), []);
        records.remove("odd").unwrap();
        assert!(matches!(records.open("../etc"), Err(StateError::Name(_))));
    }

    #[test]
    fn one_of_many_gets_the_name() {
        let scratch = Scratch::new("kept");
        let start = Arc::new(Barrier::new(8));
        let owners: Vec<_> = (0..8)
            .map(|_| {
                let (start, records) = (start.clone(), records(&scratch));
                thread::spawn(move || {
                    start.wait();
                    records.take("web")
                })
            })
            .collect();
        let results: Vec<_> = owners.into_iter().map(|owner| owner.join().unwrap()).collect();
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    }
}
