//! Who wants to know when the kernel kills processes of a container for want of memory.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use krx_proto::{AgentError, Answer, ErrorKind};

use crate::lifecycle::{Caller, Reply};
use crate::stats::{capped, memory_events};

/// Callers that may wait for one container; a wait stays here until something is killed.
const MAX_WAITERS: usize = 64;

/// The kernel's count of such kills, and who waits for it to rise.
#[derive(Debug)]
pub(crate) struct OomWatch {
    /// The cgroup's `memory.events`; the kernel shows a change of it as `POLLPRI`, until it is read again.
    events: Option<File>,
    /// Each with the count it knows of.
    waiters: Vec<(Caller, u64)>,
}

impl OomWatch {
    /// Watches the cgroup at `path`. Without a memory controller there is nothing to watch.
    pub(crate) fn new(path: &Path) -> Self {
        Self { events: File::open(path.join("memory.events")).ok(), waiters: Vec::new() }
    }

    /// Somebody wants to know when more than `seen` processes have been killed.
    pub(crate) fn wait(
        &mut self,
        caller: Caller,
        seen: u64,
        replies: &mut Vec<Reply>,
    ) -> Result<(), AgentError> {
        let failed = |message: &str| Err(AgentError::new(ErrorKind::Failed, message));
        if self.events.is_none() {
            return failed("The guest's kernel does not count memory");
        }
        if self.waiters.len() >= MAX_WAITERS {
            return failed("Too many callers wait for the container already");
        }
        self.waiters.push((caller, seen));
        self.check(replies);
        Ok(())
    }

    /// Answers those for whom the count is news.
    pub(crate) fn check(&mut self, replies: &mut Vec<Reply>) {
        if self.waiters.is_empty() {
            return;
        }
        let kills = self.kills();
        let due = self.waiters.extract_if(.., |(_, seen)| kills > *seen);
        replies.extend(due.map(|(caller, _)| (caller, Ok(Answer::OomKills(kills)))));
    }

    /// To be polled for `POLLPRI`, while anybody waits.
    pub(crate) fn waits_for(&self) -> Option<BorrowedFd<'_>> {
        self.events.as_ref().filter(|_| !self.waiters.is_empty()).map(AsFd::as_fd)
    }

    /// A connection is gone: its waits are over.
    pub(crate) fn forget_connection(&mut self, connection: u32) {
        self.waiters.retain(|(waiter, _)| waiter.connection != connection);
    }

    /// The container is deleted.
    pub(crate) fn abandon(self) -> impl Iterator<Item = Reply> {
        let error = AgentError::new(ErrorKind::NotFound, "The container was deleted");
        self.waiters.into_iter().map(move |(waiter, _)| (waiter, Err(error.clone())))
    }

    fn kills(&mut self) -> u64 {
        let Some(events) = &mut self.events else { return 0 };
        let _ = events.seek(SeekFrom::Start(0));
        memory_events(&capped(events)).oom_kill
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const FIRST: Caller = Caller { connection: 1, number: 1 };
    const SECOND: Caller = Caller { connection: 2, number: 7 };

    #[test]
    fn each_kill_is_told_once_to_whom_it_is_news() {
        let cgroup = std::env::temp_dir().join(format!("krx-agent-oom-{}", std::process::id()));
        fs::create_dir_all(&cgroup).unwrap();
        let set = |kills: u64| {
            fs::write(cgroup.join("memory.events"), format!("oom 9\noom_kill {kills}\n")).unwrap()
        };
        set(0);
        let (mut watch, mut replies) = (OomWatch::new(&cgroup), Vec::new());
        assert!(watch.waits_for().is_none());
        watch.wait(FIRST, 0, &mut replies).unwrap();
        assert!(watch.waits_for().is_some() && replies.is_empty());
        set(2);
        watch.check(&mut replies);
        watch.check(&mut replies);
        assert_eq!(replies, [(FIRST, Ok(Answer::OomKills(2)))]);
        // What happened before is told at once, and what is known is not.
        watch.wait(SECOND, 1, &mut replies).unwrap();
        watch.wait(FIRST, 2, &mut replies).unwrap();
        assert_eq!(replies[1..], [(SECOND, Ok(Answer::OomKills(2)))]);
        watch.forget_connection(FIRST.connection);
        assert!(watch.waits_for().is_none());
        for _ in 0..MAX_WAITERS {
            watch.wait(SECOND, 2, &mut replies).unwrap();
        }
        assert!(watch.wait(SECOND, 2, &mut replies).is_err());
        assert_eq!(watch.abandon().count(), MAX_WAITERS);
        fs::remove_dir_all(&cgroup).unwrap();
    }

    #[test]
    fn without_a_memory_controller_nothing_is_promised() {
        let mut watch = OomWatch::new(Path::new("/nonexistent"));
        assert!(watch.wait(FIRST, 0, &mut Vec::new()).is_err());
    }
}
