//! From the guest: each chain of the transmit queue is one frame, which goes to the tap in one call from where it lies
//! in guest memory, behind a header that was judged.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::header::{self, Header, MAX_FRAME, Offloads};
use super::receive::{FRAMES_PER_RUN, MAX_CHAIN_PARTS};
use super::tap::{Sent, Tap};
use crate::sys::GuestPieces;
use crate::virtio::device::DeviceError;
use crate::virtio::queue::{Chain, LiveQueue};

/// Why taking frames from the guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rest {
    /// There are none; the driver will kick.
    Idle,
    /// It is another's turn.
    More,
    /// The tap takes none now. The frame stays in the queue, and so do those behind it: a wire that is slow is felt by
    /// the guest's own queues, which know better than the device what to drop.
    Blocked,
}

/// The transmit queue.
pub(super) struct Transmit {
    queue: LiveQueue,
    memory: GuestMemoryMmap,
    offloads: Offloads,
    /// The frame under way.
    pieces: GuestPieces,
}

impl Transmit {
    pub(super) fn new(queue: LiveQueue, offloads: Offloads) -> Self {
        let memory = queue.memory().clone();
        let pieces = GuestPieces::new(memory.clone());
        Self { queue, memory, offloads, pieces }
    }

    pub(super) fn queue(&self) -> &LiveQueue {
        &self.queue
    }

    /// Moves frames from the guest to the tap.
    pub(super) fn run(&mut self, tap: &Tap) -> Result<Rest, DeviceError> {
        let mut used = false;
        let rest = self.drain(tap, &mut used)?;
        if used {
            self.queue.notify()?;
        }
        Ok(rest)
    }

    fn drain(&mut self, tap: &Tap, used: &mut bool) -> Result<Rest, DeviceError> {
        let Self { queue, memory, offloads, pieces } = self;
        queue.suppress_kicks()?;
        for _ in 0..FRAMES_PER_RUN {
            let Some(chain) = queue.pop()? else {
                // Asking for kicks may show that frames came just before.
                return Ok(if queue.enable_kicks()? { Rest::More } else { Rest::Idle });
            };
            let head = chain.head_index();
            pieces.remove_first(pieces.count());
            let header = parse(memory, chain, pieces)?;
            // A program in the guest may have a hand in what its kernel writes there, and must not cost the pod its
            // network: what cannot be sent is lost, as from any interface.
            let sent = match header.judge(pieces.bytes(), *offloads) {
                Some(header) => tap.write(header, pieces).map_err(DeviceError::Host)?,
                None => Sent::Gone,
            };
            if sent == Sent::Full {
                queue.undo_pop();
                return Ok(Rest::Blocked);
            }
            queue.add_used(head, 0)?;
            *used = true;
        }
        Ok(Rest::More)
    }
}

/// Takes a chain of the transmit queue apart: gives the copy of its header, and puts the frame into `pieces`.
fn parse(
    memory: &GuestMemoryMmap,
    chain: Chain<'_>,
    pieces: &mut GuestPieces,
) -> Result<Header, DeviceError> {
    let mut bytes = [0; header::SIZE];
    let (mut filled, mut walked, mut has_end) = (0, 0, false);
    for descriptor in chain {
        walked += 1;
        if walked > MAX_CHAIN_PARTS {
            return Err(DeviceError::BadChain("frame is in too many pieces"));
        }
        if descriptor.is_write_only() {
            return Err(DeviceError::BadChain("frame is not readable"));
        }
        has_end = !descriptor.has_next();
        let len = descriptor.len() as usize;
        // A driver may scatter the header as it likes (2.7.4).
        let part = len.min(header::SIZE - filled);
        memory
            .read_slice(&mut bytes[filled..filled + part], descriptor.addr())
            .map_err(DeviceError::Memory)?;
        filled += part;
        if len > part {
            if pieces.bytes() + (len - part) > MAX_FRAME {
                return Err(DeviceError::BadChain("frame is larger than any can be"));
            }
            let frame = GuestAddress(descriptor.addr().0.wrapping_add(part as u64));
            pieces.push(frame, len - part).map_err(DeviceError::Memory)?;
        }
    }
    if !has_end {
        return Err(DeviceError::BadChain("frame has no end"));
    }
    if filled < header::SIZE {
        return Err(DeviceError::BadChain("frame has no whole header"));
    }
    Ok(Header::from_bytes(&bytes))
}
