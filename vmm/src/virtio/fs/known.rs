//! What a guest has the library hold descriptors for: each file that it knows, and each that it has open. Linux knows what it has
//! looked up until it wants for memory. A guest that would know or make more than it may is told so before anything is done, while
//! there are still descriptors for all else; with krx's kernel it forgets then, and asks again (`kernel-config/edit-source.sh`).

use std::collections::HashMap;
use std::collections::hash_map::Entry as Place;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::resource::{Resource, getrlimit};

/// The least that is not for files: the VMM has its own descriptors, and one for each connection by vsock.
const MIN_RESERVE: u64 = 256;

/// Files and handles of one guest, as the library counts them.
#[derive(Debug)]
pub(super) struct Known {
    /// How often the guest was told of each node.
    files: Mutex<HashMap<u64, u64>>,
    handles: AtomicU64,
    most: u64,
}

/// How many files and handles a guest may have: what the process's limit of descriptors leaves.
pub(super) fn most() -> u64 {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or_default();
    limit.saturating_sub((limit / 8).max(MIN_RESERVE))
}

impl Known {
    pub(super) fn new(most: u64) -> Self {
        Self { files: Mutex::default(), handles: AtomicU64::default(), most }
    }

    fn files(&self) -> MutexGuard<'_, HashMap<u64, u64>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses what takes a descriptor, where the guest has all that it may have. To be asked before anything is done.
    pub(super) fn room(&self) -> io::Result<()> {
        self.room_beside(self.files().len())
    }

    /// Refuses a node that the guest does not know yet, likewise; it can look up what it knows.
    pub(super) fn room_for(&self, node: u64) -> io::Result<()> {
        let files = self.files();
        if files.contains_key(&node) { Ok(()) } else { self.room_beside(files.len()) }
    }

    fn room_beside(&self, files: usize) -> io::Result<()> {
        let files = u64::try_from(files).unwrap_or(u64::MAX);
        if files.saturating_add(self.handles.load(Ordering::Relaxed)) < self.most {
            return Ok(());
        }
        Err(io::Error::from_raw_os_error(libc::EMFILE))
    }

    /// The guest was told of a node once more.
    pub(super) fn told(&self, node: u64) {
        let mut files = self.files();
        let count = files.entry(node).or_default();
        *count = count.saturating_add(1);
    }

    /// The guest takes back that it was told of a node so often.
    pub(super) fn forgotten(&self, node: u64, times: u64) {
        if let Place::Occupied(mut file) = self.files().entry(node) {
            let left = file.get().saturating_sub(times);
            if left == 0 {
                file.remove();
            } else {
                file.insert(left);
            }
        }
    }

    pub(super) fn opened(&self) {
        self.handles.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn closed(&self) {
        let fewer = |handles: u64| Some(handles.saturating_sub(1));
        let _ = self.handles.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer);
    }

    /// The library has let go of all.
    pub(super) fn clear(&self) {
        self.files().clear();
        self.handles.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_until_there_are_too_many_and_again_when_some_are_forgotten() {
        let known = Known::new(3);
        let room = || known.room().map_err(|error| error.raw_os_error());
        known.told(7);
        known.told(7);
        known.told(8);
        assert_eq!(room(), Ok(()), "two files");
        known.opened();
        assert_eq!(room(), Err(Some(libc::EMFILE)));
        known.forgotten(7, 1);
        assert_eq!(room(), Err(Some(libc::EMFILE)), "it was told twice");
        known.forgotten(7, 1);
        assert_eq!(room(), Ok(()));
        known.told(9);
        assert_eq!(room(), Err(Some(libc::EMFILE)));
        assert!(known.room_for(9).is_ok(), "a file that is known can be looked up");
        assert!(known.room_for(7).is_err());
        known.closed();
        assert_eq!(room(), Ok(()));
    }

    #[test]
    fn nonsense_of_a_guest_counts_nothing() {
        let known = Known::new(1);
        known.closed();
        known.forgotten(5, u64::MAX);
        known.told(5);
        assert!(known.room().is_err());
        known.forgotten(5, u64::MAX);
        assert!(known.room().is_ok());
        known.told(5);
        known.opened();
        known.clear();
        assert!(known.room().is_ok());
    }
}
