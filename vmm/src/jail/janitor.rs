//! Removes the pod's directory when its owner has died. That takes a descriptor of the directory above, which has those of
//! all pods: nothing of the VMM's may have it. So one thread has it, in a table of descriptors of its own, and may do
//! nothing but remove an empty directory there.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::JailError;
use super::seccomp::{self, Kind};
use crate::sys;

/// A directory and the name of the one to be removed from it.
pub(super) struct Parent {
    directory: OwnedFd,
    name: OsString,
}

/// The thread, which waits.
#[derive(Debug)]
pub struct Janitor {
    call: SyncSender<()>,
    thread: JoinHandle<()>,
}

/// Opens the directory above `state_dir`, as a mount that leads nowhere else.
pub(super) fn parent(state_dir: Option<&Path>) -> Result<Option<Parent>, JailError> {
    let Some((parent, name)) = state_dir.and_then(|path| Some((path.parent()?, path.file_name()?))) else {
        return Ok(None);
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let directory = sys::clone_tree(parent, false)
        .map_err(|source| JailError::Directory { path: parent.join(name), source })?;
    Ok(Some(Parent { directory, name: name.into() }))
}

impl Janitor {
    /// Starts the thread; returns when nobody else has `parent`.
    pub(super) fn start(parent: Parent) -> io::Result<Self> {
        let Parent { directory, name } = parent;
        let directory = Arc::new(directory);
        let theirs = Arc::clone(&directory);
        let (call, called) = mpsc::sync_channel(1);
        let (ready, wait) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("krx-janitor".into()).spawn(move || {
            let own = take(theirs);
            let _ = ready.send(own.as_ref().map(drop).map_err(io::Error::kind));
            if let Ok(own) = own {
                work(&own, &name, &called);
            }
        })?;
        wait.recv().map_err(io::Error::other)?.map_err(io::Error::from)?;
        // The last one: it is closed, in the table of all the other threads.
        drop(directory);
        Ok(Self { call, thread })
    }

    /// Has the directory removed, if it is empty, and waits for that.
    pub fn remove(self) {
        let _ = self.call.send(());
        // Panics abort the process, so a join cannot fail.
        let _ = self.thread.join();
    }
}

/// Leaves the calling thread with a table of its own, in which there is this directory, and standard error.
fn take(directory: Arc<OwnedFd>) -> io::Result<OwnedFd> {
    unshare(CloneFlags::CLONE_FILES)?;
    let own = directory.try_clone()?;
    drop(directory);
    sys::close_others(own.as_fd())?;
    Ok(own)
}

fn work(directory: &OwnedFd, name: &OsString, called: &Receiver<()>) {
    seccomp::confine(Kind::Janitor);
    if called.recv().is_ok() {
        // One that is not empty stays, as everything of the owner's does.
        let _ = unlinkat(directory, name.as_os_str(), UnlinkatFlags::RemoveDir);
    }
}
