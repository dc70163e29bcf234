//! Watches the volumes of a pod that the kubelet changes while it runs, and has the guest renew its copies.
//!
//! A thread of its own, which begins with the first such volume: most pods have none but their service account's, and some
//! not even that.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Instant;

use krx_proto::Answer;
use krx_sandbox::agent::AgentClient;
use krx_sandbox::container::Container;
use krx_sandbox::live_volumes::{self, LiveVolumes};
use log::warn;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::chain;

/// The volumes of one pod.
#[derive(Debug)]
pub(crate) struct Volumes {
    agent: Weak<AgentClient>,
    watch: Mutex<Option<Arc<Watch>>>,
}

#[derive(Debug)]
struct Watch {
    live: Mutex<LiveVolumes>,
    changes: OwnedFd,
    /// Wakes the thread: there is another deadline, or nothing to be done any more.
    wake: EventFd,
}

impl Volumes {
    pub(crate) fn of(agent: &Arc<AgentClient>) -> Self {
        Self { agent: Arc::downgrade(agent), watch: Mutex::default() }
    }

    /// Watches those of a container, from before it is made.
    pub(crate) fn add(&self, container: &Container) {
        for (source, path) in live_volumes::of(container) {
            let added = self.watch().and_then(|watch| {
                watch.live().add(&container.spec.id, source, path, Instant::now())?;
                watch.wake();
                Ok(())
            });
            if let Err(error) = added {
                // Its content is right at the start, and stays so.
                warn!("volume {} will not be renewed: {}", source.display(), chain(&error));
            }
        }
    }

    /// Forgets those of a container.
    pub(crate) fn remove(&self, container: &str) {
        let watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        watch.iter().for_each(|watch| watch.live().remove(container));
    }

    fn watch(&self) -> std::io::Result<Arc<Watch>> {
        let mut place = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(watch) = &*place {
            return Ok(watch.clone());
        }
        let live = LiveVolumes::new()?;
        let changes = live.as_fd().try_clone_to_owned()?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let watch = Arc::new(Watch { live: Mutex::new(live), changes, wake });
        let (watched, agent) = (watch.clone(), self.agent.clone());
        thread::Builder::new().name("volumes".into()).spawn(move || watched.run(&agent))?;
        *place = Some(watch.clone());
        Ok(watch)
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        // The agent is gone with its pod, which the thread finds when it is woken.
        let watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        watch.iter().for_each(|watch| watch.wake());
    }
}

impl Watch {
    fn live(&self) -> MutexGuard<'_, LiveVolumes> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Full is awake enough.
        let _ = self.wake.write(1);
    }

    /// Body of the thread. Ends with the pod.
    fn run(&self, agent: &Weak<AgentClient>) {
        while agent.strong_count() > 0 {
            let left = self.live().deadline().map(|at| at.saturating_duration_since(Instant::now()));
            let timeout = left.map_or(PollTimeout::NONE, |left| left.try_into().unwrap_or(PollTimeout::MAX));
            let mut fds =
                [&self.changes.as_fd(), &self.wake.as_fd()].map(|fd| PollFd::new(*fd, PollFlags::POLLIN));
            // An interrupted wait is looked into like any other.
            let _ = poll(&mut fds, timeout);
            let _ = self.wake.read();
            if let Err(error) = self.live().take_events(Instant::now()) {
                warn!("volumes are not renewed any more: {}", chain(&error));
                return;
            }
            let due = self.live().due(Instant::now());
            for (path, request) in due {
                let Some(agent) = agent.upgrade() else { return };
                let answer = agent.send(request).and_then(|pending| pending.answer());
                let done = matches!(answer, Ok(Answer::Done));
                self.live().answered(&path, done, Instant::now());
            }
        }
    }
}
