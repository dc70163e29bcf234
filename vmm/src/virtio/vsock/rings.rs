//! The device's view of its two busy queues: chains in, packets out, and as few kicks and interrupts as correctness
//! allows.

use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::packet::{GuestPacket, Header, ReceiveBuffer};
use crate::virtio::device::DeviceError;
use crate::virtio::queue::LiveQueue;

/// The receive queue: buffers of the guest that wait for packets. The driver need not tell of new ones unless the
/// device ran out.
#[derive(Debug)]
pub(super) struct ReceiveRing {
    queue: LiveQueue,
    memory: GuestMemoryMmap,
    /// Ran out of buffers and asked for a kick.
    starved: bool,
    used: bool,
}

/// What became of an attempt to send one packet to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Put {
    Sent,
    /// There was nothing to send after all; the buffer is kept for the next packet.
    Withdrawn,
    /// The guest has no buffer to spare; its kick will tell.
    Starved,
}

impl ReceiveRing {
    pub(super) fn new(mut queue: LiveQueue) -> Result<Self, DeviceError> {
        queue.suppress_kicks()?;
        let memory = queue.memory().clone();
        Ok(Self { queue, memory, starved: false, used: false })
    }

    pub(super) fn queue(&self) -> &LiveQueue {
        &self.queue
    }

    /// Opens the next buffer and sends it with the header that `fill` gives, behind the payload it has put there.
    pub(super) fn put(
        &mut self,
        fill: impl FnOnce(&VolatileSlice<'_>) -> Option<Header>,
    ) -> Result<Put, DeviceError> {
        let chain = loop {
            if let Some(chain) = self.queue.pop()? {
                break chain;
            }
            // Asking for kicks may show that buffers came just before: one more look, then they are the kick's.
            if std::mem::replace(&mut self.starved, true) || !self.queue.enable_kicks()? {
                return Ok(Put::Starved);
            }
        };
        let head = chain.head_index();
        let mut buffer = ReceiveBuffer::open(&self.memory, chain)?;
        let Some(header) = fill(buffer.data()) else {
            self.queue.undo_pop();
            return Ok(Put::Withdrawn);
        };
        let bytes = buffer.finish(&header)?;
        self.queue.add_used(head, bytes)?;
        self.used = true;
        if self.starved {
            self.starved = false;
            self.queue.suppress_kicks()?;
        }
        Ok(Put::Sent)
    }

    /// Interrupts the driver once for all packets since the last time.
    pub(super) fn notify(&mut self) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.used) { self.queue.notify() } else { Ok(()) }
    }
}

/// The transmit queue: packets of the guest.
#[derive(Debug)]
pub(super) struct TransmitRing {
    queue: LiveQueue,
    memory: GuestMemoryMmap,
    used: bool,
}

impl TransmitRing {
    pub(super) fn new(queue: LiveQueue) -> Self {
        let memory = queue.memory().clone();
        Self { queue, memory, used: false }
    }

    pub(super) fn queue(&self) -> &LiveQueue {
        &self.queue
    }

    /// The driver need not kick while its packets are being fetched anyway.
    pub(super) fn suppress_kicks(&mut self) -> Result<(), DeviceError> {
        self.queue.suppress_kicks()
    }

    /// Hands the next packet to `take`; `false` if there is none, and the driver will kick when there is.
    pub(super) fn next(
        &mut self,
        take: impl FnOnce(&GuestPacket<'_>) -> Result<(), DeviceError>,
    ) -> Result<bool, DeviceError> {
        let Some(chain) = self.queue.pop()? else { return self.queue.enable_kicks() };
        let head = chain.head_index();
        take(&GuestPacket::parse(&self.memory, chain)?)?;
        self.queue.add_used(head, 0)?;
        self.used = true;
        Ok(true)
    }

    /// Interrupts the driver once for all packets since the last time.
    pub(super) fn notify(&mut self) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.used) { self.queue.notify() } else { Ok(()) }
    }
}
