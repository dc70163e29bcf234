//! The running device: waits on one epoll for the driver's kicks and the tap, and lets both directions have their turn.

use std::fmt;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::header::Offloads;
use super::receive::{Receive, Shape};
use super::tap::Tap;
use super::transmit::{Rest, Transmit};
use crate::virtio::device::{Activation, DeviceError, Worker};
use crate::virtio::queue::LiveQueue;

const MORE: u64 = 0;
const RECEIVE_KICK: u64 = 1;
const TRANSMIT_KICK: u64 = 2;
const TAP: u64 = 3;

/// The device between activation and reset.
pub(super) struct NetWorker {
    epoll: Epoll,
    /// Signalled by a run that stopped at its budget of frames from the guest. What is left in the other direction
    /// keeps the tap readable.
    more: EventFd,
    tap: Arc<Tap>,
    /// What the tap is watched for. Nothing while the guest has no buffers: a flood from outside must not cost the host
    /// a wake-up for each frame that has nowhere to go.
    watched: EventSet,
    receive: Receive,
    transmit: Transmit,
    blocked: bool,
}

impl NetWorker {
    pub(super) fn new(tap: Arc<Tap>, shape: Shape, activation: Activation) -> Result<Self, DeviceError> {
        let queues: [LiveQueue; 2] = activation
            .queues
            .try_into()
            .map_err(|_| DeviceError::BadChain("network device has two queues"))?;
        let [receive, transmit] = queues;
        let epoll = Epoll::new().map_err(DeviceError::Host)?;
        let more = EventFd::new(EFD_NONBLOCK).map_err(DeviceError::Host)?;
        for (id, fd) in
            [(MORE, more.as_raw_fd()), (RECEIVE_KICK, receive.kick_fd()), (TRANSMIT_KICK, transmit.kick_fd())]
        {
            let event = EpollEvent::new(EventSet::IN, id);
            epoll.ctl(ControlOperation::Add, fd, event).map_err(DeviceError::Host)?;
        }
        Ok(Self {
            epoll,
            more,
            tap,
            watched: EventSet::empty(),
            receive: Receive::new(receive, shape)?,
            transmit: Transmit::new(transmit, Offloads::of_host(activation.features)),
            blocked: false,
        })
    }

    /// Which directions have something to do: to the guest, from the guest.
    fn take_events(&mut self) -> Result<(bool, bool), DeviceError> {
        let mut events = [EpollEvent::default(); 4];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            Err(error) => return Err(DeviceError::Host(error)),
        };
        let (mut receive, mut transmit) = (false, false);
        for event in &events[..count] {
            match event.data() {
                MORE => {
                    // Non-blocking: fails only if nothing was signalled.
                    let _ = self.more.read();
                    transmit = true;
                }
                RECEIVE_KICK => {
                    self.receive.queue().clear_kick();
                    receive |= self.receive.is_starved();
                }
                TRANSMIT_KICK => {
                    self.transmit.queue().clear_kick();
                    // Else the tap has to take the frame before first.
                    transmit |= !self.blocked;
                }
                // An error is for whichever direction waits for the tap: it learns what it is.
                _ => {
                    let (set, error) = (event.event_set(), EventSet::ERROR | EventSet::HANG_UP);
                    receive |= !self.receive.is_starved() && set.intersects(error | EventSet::IN);
                    transmit |= self.blocked && set.intersects(error | EventSet::OUT);
                }
            }
        }
        Ok((receive, transmit))
    }

    fn watch_tap(&mut self) -> Result<(), DeviceError> {
        let mut wanted = EventSet::empty();
        wanted.set(EventSet::IN, !self.receive.is_starved());
        wanted.set(EventSet::OUT, self.blocked);
        if wanted == self.watched {
            return Ok(());
        }
        let operation = match (self.watched.is_empty(), wanted.is_empty()) {
            (true, _) => ControlOperation::Add,
            // An epoll tells of errors whether asked or not: only what is not in it is not watched.
            (false, true) => ControlOperation::Delete,
            (false, false) => ControlOperation::Modify,
        };
        let event = EpollEvent::new(wanted, TAP);
        self.epoll.ctl(operation, self.tap.as_raw_fd(), event).map_err(DeviceError::Host)?;
        self.watched = wanted;
        Ok(())
    }
}

impl Worker for NetWorker {
    fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    fn run(&mut self) -> Result<(), DeviceError> {
        let (receive, transmit) = self.take_events()?;
        if transmit {
            let rest = self.transmit.run(&self.tap)?;
            self.blocked = rest == Rest::Blocked;
            if rest == Rest::More {
                self.more.write(1).map_err(DeviceError::Host)?;
            }
        }
        if receive {
            self.receive.run(&self.tap)?;
        }
        self.watch_tap()
    }
}

impl fmt::Debug for NetWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetWorker").field("tap", &self.tap).finish_non_exhaustive()
    }
}
