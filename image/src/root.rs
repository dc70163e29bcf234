//! The root file system of one container: the layers of its image with a directory on top for what it writes, which goes
//! with it.
//!
//! `krx-runs/NAME-PID` holds that directory, and a lock on it says that its process lives. What one that was killed has left is removed
//! by the next that makes one.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::error::ImageError;
use crate::overlay::Overlay;
use crate::remove::remove_path;
use crate::store::Store;

/// A root file system, mounted for this process and its children; removed when dropped.
pub struct ContainerRoot {
    /// Unmounted before the directory is removed.
    overlay: Option<Overlay>,
    directory: PathBuf,
    /// Held as long as the directory is in use.
    _lock: File,
}

impl ContainerRoot {
    pub(crate) fn make(store: &Store, layers: &[PathBuf], name: &str) -> Result<Self, ImageError> {
        let failed = |error| store.failed(error);
        let directory = store.runs().join(format!("{name}-{}", std::process::id()));
        // One at a time: a directory that is not locked yet would be taken for one that is left.
        let making = File::open(store.runs()).map_err(failed)?;
        flock(&making, FlockOperation::LockExclusive).map_err(|errno| failed(errno.into()))?;
        sweep(&store.runs());
        let (upper, merged) = (directory.join("upper"), directory.join("merged"));
        let (work, empty) = (directory.join("work"), directory.join("empty"));
        fs::create_dir(&directory).map_err(failed)?;
        let lock = File::open(&directory).map_err(failed)?;
        let mut root = Self { overlay: None, directory, _lock: lock };
        flock(&root._lock, FlockOperation::NonBlockingLockExclusive).map_err(|errno| failed(errno.into()))?;
        drop(making);
        [&upper, &merged, &work, &empty].iter().try_for_each(fs::create_dir).map_err(failed)?;
        // An image of nothing.
        let nothing = [empty];
        let layers = if layers.is_empty() { &nothing } else { layers };
        layers.last().map_or(Ok(()), |top| crate::store::like(top, &upper)).map_err(failed)?;
        let refused = |source: io::Error| ImageError::Overlay { path: store.path().into(), source };
        root.overlay = Some(Overlay::mount(layers, &upper, &work, &merged).map_err(refused)?);
        Ok(root)
    }

    /// The directory, in this process's mount namespace.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.join("merged")
    }
}

impl Drop for ContainerRoot {
    fn drop(&mut self) {
        drop(self.overlay.take());
        let _ = remove_path(&self.directory);
    }
}

/// Removes directories whose processes are gone.
fn sweep(runs: &Path) {
    for run in fs::read_dir(runs).into_iter().flatten().flatten() {
        let gone = File::open(run.path())
            .is_ok_and(|directory| flock(directory, FlockOperation::NonBlockingLockExclusive).is_ok());
        if gone {
            let _ = remove_path(&run.path());
        }
    }
}
