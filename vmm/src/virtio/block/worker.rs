//! The disk at work: takes requests from the queue as they come, and answers each when the host's file has done it.

use std::fmt;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::backing::{Backing, Failure};
use super::request::Request;
use crate::report::Limited;
use crate::virtio::device::{DeviceError, Worker};
use crate::virtio::queue::LiveQueue;

/// Requests answered before the driver is told: few enough that the first does not wait long for the last.
const REQUESTS_PER_RUN: usize = 8;

pub(super) struct BlockWorker {
    queue: LiveQueue,
    backing: Arc<Backing>,
    request: Request,
    warnings: Limited,
}

impl BlockWorker {
    pub(super) fn new(queue: LiveQueue, backing: Arc<Backing>, write_through: bool) -> Self {
        let request = Request::new(queue.memory().clone(), write_through);
        Self { queue, backing, request, warnings: Limited::default() }
    }

    /// Serves one request; `false` when there is none.
    fn serve(&mut self) -> Result<bool, DeviceError> {
        let Some(chain) = self.queue.pop()? else { return Ok(false) };
        let head = chain.head_index();
        let status = self.request.take(chain)?;
        let warnings = &self.warnings;
        let tell = |failure: &Failure| {
            // What the guest asks for wrongly is its own affair.
            if let Failure::Host(error) = failure {
                warnings.warn("A request of the guest to its disk has failed", error);
            }
        };
        let answer = self.request.carry_out(&self.backing, status, tell);
        let written = answer.give(self.queue.memory())?;
        self.queue.add_used(head, written)?;
        Ok(true)
    }

    /// Whether there may be more requests.
    fn drain(&mut self, served: &mut bool) -> Result<bool, DeviceError> {
        self.queue.suppress_kicks()?;
        for _ in 0..REQUESTS_PER_RUN {
            if !self.serve()? {
                // Asking for kicks may show that requests came just before.
                return self.queue.enable_kicks();
            }
            *served = true;
        }
        Ok(true)
    }
}

impl Worker for BlockWorker {
    fn fd(&self) -> RawFd {
        self.queue.kick_fd()
    }

    fn run(&mut self) -> Result<(), DeviceError> {
        self.queue.clear_kick();
        let mut served = false;
        if self.drain(&mut served)? {
            self.queue.kick_again();
        }
        if served { self.queue.notify() } else { Ok(()) }
    }
}

impl fmt::Debug for BlockWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockWorker").field("queue", &self.queue).finish_non_exhaustive()
    }
}
