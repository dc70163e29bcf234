//! A process as containerd sees it: what it may be asked in which state, and how it ended.
//!
//! The kernel of the guest may tell of a process's end before the request that started it is answered. Its end is then
//! kept back: containerd is told of a start before the exit.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::watch;

use crate::error::{Result, ShimError};
use crate::io::{Copies, Stdio};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// As a shell reports it.
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

impl Exit {
    pub(crate) fn now(status: u32) -> Self {
        Self { status, at: SystemTime::now() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    Created,
    Running,
    Exited(Exit),
}

/// A process of a task: the first one, or one that was added.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) stdio: Stdio,
    life: watch::Sender<Life>,
    inner: Mutex<Inner>,
    /// Held while its output is waited for: who comes later waits as long.
    finishing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Inner {
    starting: bool,
    /// An end that was told while the start was not yet answered.
    early: Option<Exit>,
    copies: Option<Copies>,
    deleted: bool,
}

impl Process {
    pub(crate) fn new(stdio: Stdio, copies: Option<Copies>) -> Self {
        let inner = Mutex::new(Inner { copies, ..Inner::default() });
        let finishing = tokio::sync::Mutex::default();
        Self { stdio, life: watch::Sender::new(Life::Created), inner, finishing }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn life(&self) -> Life {
        *self.life.borrow()
    }

    pub(crate) fn has_exited(&self) -> bool {
        matches!(self.life(), Life::Exited(_))
    }

    /// To be called before the start is tried.
    pub(crate) fn starting(&self) -> Result<()> {
        let mut inner = self.lock();
        match self.life() {
            Life::Created if !inner.starting => {
                inner.copies.as_mut().map_or(Ok(()), Copies::begin_input)?;
                inner.starting = true;
                Ok(())
            }
            Life::Created => Err(ShimError::wrong_state("The process is being started already")),
            Life::Running => Err(ShimError::wrong_state("The process has been started already")),
            Life::Exited(_) => Err(ShimError::wrong_state("The process has ended")),
        }
    }

    /// The start has succeeded. `tell` is called before anybody learns of the end, which is returned if it has come.
    pub(crate) fn started(&self, tell: impl FnOnce()) -> Option<Exit> {
        let mut inner = self.lock();
        inner.starting = false;
        self.life.send_replace(Life::Running);
        tell();
        let early = inner.early.take()?;
        self.life.send_replace(Life::Exited(early));
        Some(early)
    }

    /// The start has failed, and the process with it.
    pub(crate) fn failed(&self, status: u32) {
        let mut inner = self.lock();
        inner.starting = false;
        let exit = inner.early.take().unwrap_or_else(|| Exit::now(status));
        self.life.send_replace(Life::Exited(exit));
    }

    /// The process has ended. False if that is not to be told: it is known, or comes too early, or the process never ran.
    pub(crate) fn exited(&self, exit: Exit) -> bool {
        let mut inner = self.lock();
        match self.life() {
            Life::Exited(_) => false,
            _ if inner.starting => {
                inner.early.get_or_insert(exit);
                false
            }
            _ => {
                self.life.send_replace(Life::Exited(exit));
                true
            }
        }
    }

    /// Waits for its end.
    pub(crate) async fn wait(&self) -> Exit {
        let mut life = self.life.subscribe();
        let exit = |life: &Life| match life {
            Life::Exited(exit) => Some(*exit),
            _ => None,
        };
        // The sender lives as long as this process.
        let ended = life.wait_for(|life| exit(life).is_some()).await.ok();
        ended.and_then(|life| exit(&life)).unwrap_or_else(|| Exit::now(255))
    }

    /// Whether it has not been deleted before, nor is about to be: of several who want to, one does.
    pub(crate) fn claim(&self) -> bool {
        !std::mem::replace(&mut self.lock().deleted, true)
    }

    pub(crate) fn close_input(&self) {
        if let Some(copies) = &mut self.lock().copies {
            copies.close_input();
        }
    }

    /// Waits until its output has been delivered, and its logging program has ended; at most for a while.
    pub(crate) async fn finish_output(&self) {
        let _turn = self.finishing.lock().await;
        let copies = self.lock().copies.take();
        if let Some(copies) = copies {
            copies.finish().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_told_before_the_end() {
        let process = Process::new(Stdio::default(), None);
        process.starting().unwrap();
        assert!(process.starting().is_err());
        assert!(!process.exited(Exit::now(3)), "not before the start");
        assert_eq!(process.life(), Life::Created);
        let mut told = false;
        let early = process.started(|| told = true).unwrap();
        assert!(told && early.status == 3 && process.has_exited());
        assert!(!process.exited(Exit::now(4)), "one end is enough");
    }

    #[test]
    fn a_start_that_fails_is_an_end() {
        let process = Process::new(Stdio::default(), None);
        process.starting().unwrap();
        process.failed(127);
        assert!(matches!(process.life(), Life::Exited(Exit { status: 127, .. })));
        assert!(!process.exited(Exit::now(1)));
        assert!(process.starting().is_err());
    }

    #[test]
    fn a_process_is_deleted_once() {
        let process = Process::new(Stdio::default(), None);
        assert!(process.claim() && !process.claim());
    }

    #[test]
    fn a_created_process_can_be_killed() {
        let process = Process::new(Stdio::default(), None);
        assert!(process.exited(Exit::now(137)));
        assert!(process.starting().is_err());
    }
}
