//! Freezes a container and lets it go on, and tells who asked when the kernel is there.
//!
//! A process in an uninterruptible call freezes only after it, so the answer can be a later event's.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use krx_proto::{AgentError, Answer, ErrorKind};

use crate::error::Doing;
use crate::lifecycle::{Caller, Reply, wrong_state};
use crate::stats::{capped, flat};

/// Callers that may wait for one container.
const MAX_WAITERS: usize = 64;

/// The freezer of one cgroup.
#[derive(Debug)]
pub(crate) struct Freezer {
    cgroup: PathBuf,
    /// `cgroup.events`; the kernel shows a change of it as `POLLPRI`, until it is read again.
    events: Option<File>,
    /// What was asked for last; the waiters wait for it.
    frozen: bool,
    waiters: Vec<Caller>,
}

impl Freezer {
    /// The freezer of the cgroup at `path`.
    pub(crate) fn new(path: &Path) -> Self {
        let events = File::open(path.join("cgroup.events")).ok();
        Self { cgroup: path.into(), events, frozen: false, waiters: Vec::new() }
    }

    /// Whether its processes stand still, or soon will.
    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Freezes or thaws. Whoever still waits for the opposite is told that it will not come.
    pub(crate) fn set(
        &mut self,
        caller: Caller,
        frozen: bool,
        replies: &mut Vec<Reply>,
    ) -> Result<(), AgentError> {
        let failed = |message: &str| Err(AgentError::new(ErrorKind::Failed, message));
        if self.events.is_none() {
            return failed("The guest's kernel does not freeze cgroups");
        }
        if self.waiters.len() >= MAX_WAITERS {
            return failed("Too many callers wait for the container already");
        }
        let value = if frozen { "1" } else { "0" };
        fs::write(self.cgroup.join("cgroup.freeze"), value)
            .doing(|| format!("Cannot set the container's cgroup.freeze to {value}"))?;
        if frozen != self.frozen {
            let error = wrong_state("Another call asked for the opposite");
            replies.extend(self.waiters.drain(..).map(|waiter| (waiter, Err(error.clone()))));
        }
        self.frozen = frozen;
        self.waiters.push(caller);
        self.check(replies);
        Ok(())
    }

    /// Answers all who wait, if the kernel is there.
    pub(crate) fn check(&mut self, replies: &mut Vec<Reply>) {
        let Some(events) = self.events.as_mut().filter(|_| !self.waiters.is_empty()) else { return };
        let _ = events.seek(SeekFrom::Start(0));
        if flat(&capped(events)).contains(&("frozen", u64::from(self.frozen))) {
            replies.extend(self.waiters.drain(..).map(|waiter| (waiter, Ok(Answer::Done))));
        }
    }

    /// To be polled for `POLLPRI`, while anybody waits.
    pub(crate) fn waits_for(&self) -> Option<BorrowedFd<'_>> {
        self.events.as_ref().filter(|_| !self.waiters.is_empty()).map(AsFd::as_fd)
    }

    /// A connection is gone: its waits are over.
    pub(crate) fn forget_connection(&mut self, connection: u32) {
        self.waiters.retain(|waiter| waiter.connection != connection);
    }

    /// The container is deleted.
    pub(crate) fn abandon(self) -> impl Iterator<Item = Reply> {
        let error = AgentError::new(ErrorKind::NotFound, "The container was deleted");
        self.waiters.into_iter().map(move |waiter| (waiter, Err(error.clone())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Caller = Caller { connection: 1, number: 1 };
    const SECOND: Caller = Caller { connection: 2, number: 7 };

    #[test]
    fn who_asks_is_answered_when_the_kernel_is_there() {
        let cgroup = std::env::temp_dir().join(format!("krx-agent-freezer-{}", std::process::id()));
        fs::create_dir_all(&cgroup).unwrap();
        let is = |frozen: &str| {
            fs::write(cgroup.join("cgroup.events"), format!("populated 1\nfrozen {frozen}\n")).unwrap();
        };
        is("0");
        let (mut freezer, mut replies) = (Freezer::new(&cgroup), Vec::new());
        // At once where it is so already.
        freezer.set(FIRST, false, &mut replies).unwrap();
        assert_eq!(replies, [(FIRST, Ok(Answer::Done))]);
        replies.clear();
        freezer.set(FIRST, true, &mut replies).unwrap();
        freezer.check(&mut replies);
        assert!(replies.is_empty() && freezer.is_frozen() && freezer.waits_for().is_some());
        assert_eq!(fs::read_to_string(cgroup.join("cgroup.freeze")).unwrap(), "1");
        is("1");
        freezer.check(&mut replies);
        freezer.check(&mut replies);
        assert_eq!(replies, [(FIRST, Ok(Answer::Done))]);
        assert!(freezer.waits_for().is_none());
        // Thawing takes a while; who freezes again meanwhile has it at once, and the thawing never comes.
        replies.clear();
        freezer.set(FIRST, false, &mut replies).unwrap();
        freezer.set(SECOND, true, &mut replies).unwrap();
        assert_eq!(replies[0].1.as_ref().unwrap_err().kind, ErrorKind::WrongState);
        assert_eq!((replies[0].0, replies[1].clone()), (FIRST, (SECOND, Ok(Answer::Done))));
        for garbage in ["", "2", "-1", "x", "1 1"] {
            replies.clear();
            is(garbage);
            freezer.set(FIRST, true, &mut replies).unwrap();
            assert!(replies.is_empty(), "{garbage}");
        }
        freezer.forget_connection(FIRST.connection);
        assert!(freezer.waits_for().is_none());
        for _ in 0..MAX_WAITERS {
            freezer.set(SECOND, true, &mut replies).unwrap();
        }
        assert!(freezer.set(SECOND, true, &mut replies).is_err());
        assert_eq!(freezer.abandon().count(), MAX_WAITERS);
        fs::remove_dir_all(&cgroup).unwrap();
    }

    #[test]
    fn without_a_freezer_nothing_is_promised() {
        let mut freezer = Freezer::new(Path::new("/nonexistent"));
        assert!(freezer.set(FIRST, true, &mut Vec::new()).is_err());
        assert!(!freezer.is_frozen());
    }
}
