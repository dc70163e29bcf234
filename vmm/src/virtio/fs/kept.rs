//! Which files have stayed what they were since the guest opened them last: it may keep the pages that it has of them. Else it
//! drops them at each opening, and a program that is executed again is read again.
//!
//! A file has changed when its times or its size have, as for `FUSE_AUTO_INVAL_DATA`. That a change leaves no trace in them is
//! possible where it comes within one tick of the clock they are taken from: what was changed that recently is not trusted.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuse_backend_rs::abi::fuse_abi::stat64;

/// Two ticks of the slowest clock that Linux has for times of files (`CONFIG_HZ=100`).
const TICKS: Duration = Duration::from_millis(20);
/// Most files that are remembered; a guest that opens more loses what it has kept, 1 MiB of them. Stops one that opens without
/// end.
const MAX_FILES: usize = 16 << 10;

/// What tells a file and its state from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    device: u64,
    number: u64,
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl State {
    fn of(stat: &stat64) -> Self {
        Self {
            device: stat.st_dev,
            number: stat.st_ino,
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    /// Whether any later change will show, `now` being the time since 1970.
    fn is_settled(&self, now: Duration) -> bool {
        let (seconds, nanoseconds) = self.changed;
        let (Ok(seconds), Ok(nanoseconds)) = (u64::try_from(seconds), u32::try_from(nanoseconds)) else {
            return false;
        };
        Duration::new(seconds, nanoseconds) + TICKS < now
    }
}

/// The files as they were when they were opened last, by their node.
#[derive(Debug, Default)]
pub(super) struct Kept(Mutex<HashMap<u64, State>>);

impl Kept {
    /// Notes that a file is opened, in the state that `stat` tells; `true` if it is the one of the last time.
    pub(super) fn opened(&self, node: u64, stat: &stat64) -> bool {
        self.opened_at(node, stat, SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
    }

    fn opened_at(&self, node: u64, stat: &stat64, now: Duration) -> bool {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let state = State::of(stat);
        if !state.is_settled(now) {
            files.remove(&node);
            return false;
        }
        if files.len() >= MAX_FILES && !files.contains_key(&node) {
            files.clear();
        }
        files.insert(node, state) == Some(state)
    }
}

#[cfg(test)]
mod tests {
    use fuse_backend_rs::abi::fuse_abi::Attr;

    use super::*;

    const NOW: Duration = Duration::from_secs(1000);
    const LONG_AGO: u64 = 5;

    fn stat(size: u64, ctime: u64, ctimensec: u32) -> stat64 {
        Attr { ino: 7, size, ctime, ctimensec, ..Attr::default() }.into()
    }

    #[test]
    fn only_what_stays_the_same_is_kept() {
        let kept = Kept::default();
        assert!(!kept.opened_at(1, &stat(10, LONG_AGO, 0), NOW), "for the first time");
        assert!(kept.opened_at(1, &stat(10, LONG_AGO, 0), NOW));
        assert!(!kept.opened_at(2, &stat(10, LONG_AGO, 0), NOW), "another node");
        assert!(!kept.opened_at(1, &stat(11, LONG_AGO, 0), NOW), "another size");
        assert!(!kept.opened_at(1, &stat(11, LONG_AGO, 1), NOW), "another time");
        assert!(kept.opened_at(1, &stat(11, LONG_AGO, 1), NOW));
        let other = Attr { ino: 8, size: 11, ctime: LONG_AGO, ctimensec: 1, ..Attr::default() }.into();
        assert!(!kept.opened_at(1, &other, NOW), "another file");
    }

    #[test]
    fn what_changed_just_now_is_not_trusted() {
        let kept = Kept::default();
        let (before, just_now) = (stat(1, LONG_AGO, 0), stat(1, 999, 990_000_000));
        kept.opened_at(1, &before, NOW);
        assert!(!kept.opened_at(1, &just_now, NOW) && !kept.opened_at(1, &just_now, NOW));
        assert!(!kept.opened_at(1, &just_now, NOW + TICKS), "the state before was not one to compare with");
        assert!(kept.opened_at(1, &just_now, NOW + TICKS));
        let (future, negative) = (stat(1, 2000, 0), stat(1, u64::MAX, 0));
        for odd in [future, negative, stat(1, LONG_AGO, u32::MAX)] {
            kept.opened_at(2, &odd, NOW);
        }
        assert!(!kept.opened_at(2, &future, NOW));
    }

    #[test]
    fn memory_is_bounded() {
        let kept = Kept::default();
        for node in 0..40_000 {
            kept.opened_at(node, &stat(1, LONG_AGO, 0), NOW);
        }
        assert!(kept.0.lock().unwrap().len() <= MAX_FILES);
    }
}
