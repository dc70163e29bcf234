//! Removes the pod's directory when its owner has died. The VMM has nothing of it but the directory of its sockets: the lock
//! and the state of the pod, by which others judge it, are its owner's. And to remove a directory takes a descriptor of the
//! one above, which has those of all pods. So one thread has both, in a table of descriptors of its own, and may do nothing
//! but remove what is in the one, and an empty directory in the other.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};

use nix::dir::{Dir, Type};
use nix::fcntl::{OFlag, openat};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::JailError;
use super::seccomp::{self, Kind};
use crate::machine::LOCK_FILE;
use crate::sys;

/// The number of the pod's directory in the thread's table: the list of system calls names it.
pub(super) const OWN: RawFd = 3;

/// The pod's directory, the one above, and its name there.
pub(super) struct Place {
    own: OwnedFd,
    parent: OwnedFd,
    name: OsString,
}

/// The thread, which waits.
#[derive(Debug)]
pub struct Janitor {
    call: SyncSender<()>,
    thread: JoinHandle<()>,
}

/// Opens `state_dir` and the directory above, each as a mount that leads nowhere else.
pub(super) fn place(state_dir: Option<&Path>) -> Result<Option<Place>, JailError> {
    let Some((path, parent, name)) =
        state_dir.and_then(|path| Some((path, path.parent()?, path.file_name()?)))
    else {
        return Ok(None);
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let failed = |source| JailError::Directory { path: path.into(), source };
    let own = sys::clone_tree(path, false).map_err(failed)?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let own = openat(&own, ".", flags, Mode::empty()).map_err(|error| failed(error.into()))?;
    let parent = sys::clone_tree(parent, false).map_err(failed)?;
    Ok(Some(Place { own, parent, name: name.into() }))
}

impl Janitor {
    /// Starts the thread; returns when nobody else has `place`.
    pub(super) fn start(place: Place) -> io::Result<Self> {
        let Place { own, parent, name } = place;
        let both = Arc::new([own, parent]);
        let theirs = Arc::clone(&both);
        let (call, called) = mpsc::sync_channel(1);
        let (ready, wait) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("krx-janitor".into()).spawn(move || {
            let taken = take(theirs);
            let _ = ready.send(taken.as_ref().map(drop).map_err(io::Error::kind));
            if let Ok((own, parent)) = taken {
                work(own, &parent, &name, &called);
            }
        })?;
        wait.recv().map_err(io::Error::other)?.map_err(io::Error::from)?;
        // The last ones: they are closed, in the table of all the other threads.
        drop(both);
        Ok(Self { call, thread })
    }

    /// Has the directory removed, with the files and the empty directories in it, and waits for that.
    pub fn remove(self) {
        let _ = self.call.send(());
        // Panics abort the process, so a join cannot fail.
        let _ = self.thread.join();
    }
}

/// Leaves the calling thread with a table of its own, in which there are these two, and the standard streams.
fn take(both: Arc<[OwnedFd; 2]>) -> io::Result<(Dir, OwnedFd)> {
    unshare(CloneFlags::CLONE_FILES)?;
    let [own, parent] = sys::keep_only([both[0].as_fd(), both[1].as_fd()])?;
    drop(both);
    Ok((Dir::from_fd(own)?, parent))
}

fn work(mut own: Dir, parent: &OwnedFd, name: &OsString, called: &Receiver<()>) {
    seccomp::confine(Kind::Janitor);
    if called.recv().is_err() {
        return;
    }
    // Not one by one as they are listed: what is removed meanwhile may be left out.
    let found: Vec<_> = own.iter().flatten().collect();
    for entry in found {
        let is_file = entry.file_type().is_some_and(|kind| kind != Type::Directory);
        let flags = if is_file { UnlinkatFlags::NoRemoveDir } else { UnlinkatFlags::RemoveDir };
        // As long as the lock is there the name is taken, and all of this is still ours. A directory with something in it
        // stays: that of the share may have other people's files.
        if entry.file_name().to_bytes() != LOCK_FILE.as_bytes() {
            let _ = unlinkat(&own, entry.file_name(), flags);
        }
    }
    let _ = unlinkat(&own, LOCK_FILE, UnlinkatFlags::NoRemoveDir);
    let _ = unlinkat(parent, name.as_os_str(), UnlinkatFlags::RemoveDir);
}
