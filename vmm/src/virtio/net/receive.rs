//! Towards the guest: buffers that the driver lends are collected until the largest frame would fit, so that the tap's
//! next frame is read straight into them. What a small frame leaves is kept for the next one.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::header::{self, ETHERNET, MAX_FRAME};
use super::tap::Tap;
use crate::sys::GuestPieces;
use crate::virtio::device::DeviceError;
use crate::virtio::queue::{Chain, LiveQueue};

/// Frames moved in each direction by one run: a flood one way leaves the other its turn, and a stop is heard soon.
pub(super) const FRAMES_PER_RUN: usize = 64;
/// Descriptors of one chain. Linux uses 19 at most; stops an indirect table, which is walked though not offered, from
/// holding the thread with 65,535 of them.
pub(super) const MAX_CHAIN_PARTS: usize = 64;
/// Pieces of all buffers collected. The queue has so many descriptors; stops a guest that lends frames' worth of
/// buffers of a few bytes through indirect tables.
const MAX_PIECES: usize = 256;

/// What the driver agreed to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Frames may be spread over several chains (`VIRTIO_NET_F_MRG_RXBUF`).
    pub(super) mergeable: bool,
    /// Frames may come with checksums to be completed; else the flags are to be zero (5.1.6.4.1).
    pub(super) checksum: bool,
    /// Frames may come to be segmented, and so be larger than the MTU.
    pub(super) segments: bool,
    pub(super) mtu: u16,
}

impl Shape {
    /// Largest frame that is not to be segmented.
    fn plain_frame(self) -> usize {
        usize::from(self.mtu) + ETHERNET
    }

    /// Bytes that the largest frame and its header take.
    fn room(self) -> usize {
        header::SIZE + if self.segments { MAX_FRAME } else { self.plain_frame() }
    }
}

/// The receive queue and the buffers taken from it.
pub(super) struct Receive {
    queue: LiveQueue,
    memory: GuestMemoryMmap,
    shape: Shape,
    held: Vec<Held>,
    /// The places of all that is held, in the same order.
    pieces: GuestPieces,
    /// The buffers of one frame: head and bytes written.
    used: Vec<(u16, u32)>,
    /// Asked for a kick because the driver has lent too little; the tap is not to be looked at until then.
    starved: bool,
}

/// A chain that waits for a frame.
struct Held {
    head: u16,
    /// Bytes that are used of it.
    room: usize,
    parts: usize,
    /// Where the bytes of a header in front of it lie: a driver may scatter them.
    header: [GuestAddress; header::SIZE],
}

impl Receive {
    pub(super) fn new(mut queue: LiveQueue, shape: Shape) -> Result<Self, DeviceError> {
        queue.suppress_kicks()?;
        let memory = queue.memory().clone();
        let pieces = GuestPieces::new(memory.clone());
        Ok(Self { queue, memory, shape, held: Vec::new(), pieces, used: Vec::new(), starved: false })
    }

    pub(super) fn queue(&self) -> &LiveQueue {
        &self.queue
    }

    pub(super) fn is_starved(&self) -> bool {
        self.starved
    }

    /// Moves frames from the tap to the guest until there are none, or no buffers, or it is another's turn: then the
    /// tap stays readable.
    pub(super) fn run(&mut self, tap: &Tap) -> Result<(), DeviceError> {
        let mut delivered = false;
        for _ in 0..FRAMES_PER_RUN {
            if !self.collect()? {
                break;
            }
            match tap.read(&mut self.pieces).map_err(DeviceError::Host)? {
                Some(len) => delivered |= self.deliver(len)?,
                None => break,
            }
        }
        if delivered { self.queue.notify() } else { Ok(()) }
    }

    /// Takes buffers until there is room for any frame; `false` if the driver has to lend more first.
    fn collect(&mut self) -> Result<bool, DeviceError> {
        while !self.has_room() {
            if let Some(chain) = self.queue.pop()? {
                let held = hold(chain, &mut self.pieces, self.shape.room())?;
                self.held.push(held);
                continue;
            }
            // Asking for kicks may show that buffers came just before: one more look, then they are the kick's.
            if std::mem::replace(&mut self.starved, true) || !self.queue.enable_kicks()? {
                return Ok(false);
            }
        }
        if std::mem::take(&mut self.starved) {
            self.queue.suppress_kicks()?;
        }
        Ok(true)
    }

    fn has_room(&self) -> bool {
        if self.shape.mergeable { self.pieces.bytes() >= self.shape.room() } else { !self.held.is_empty() }
    }

    /// Hands the `len` bytes that were read to the guest. A frame that it could not hold, or did not agree to, is lost:
    /// its buffers wait for the next one.
    fn deliver(&mut self, len: usize) -> Result<bool, DeviceError> {
        if len < header::SIZE || len > self.pieces.bytes() || self.exceeds_mtu(len)? {
            return Ok(false);
        }
        self.used.clear();
        let (mut rest, mut parts) = (len, 0);
        for held in &self.held {
            let written = rest.min(held.room);
            self.used.push((held.head, u32::try_from(written).unwrap_or(u32::MAX)));
            parts += held.parts;
            rest -= written;
            if rest == 0 {
                break;
            }
        }
        if !self.shape.checksum {
            self.write_header(header::FLAGS_AT, 0)?;
        }
        let [low, high] = u16::try_from(self.used.len()).unwrap_or(u16::MAX).to_le_bytes();
        self.write_header(header::NUM_BUFFERS_AT, low)?;
        self.write_header(header::NUM_BUFFERS_AT + 1, high)?;
        // A driver that saw the first buffer alone would miss the others (5.1.6.4.1).
        self.queue.add_used_together(&self.used)?;
        self.held.drain(..self.used.len());
        self.pieces.remove_first(parts);
        Ok(true)
    }

    /// Whether a frame is too long for the MTU and not to be segmented (5.1.4.1).
    fn exceeds_mtu(&self, len: usize) -> Result<bool, DeviceError> {
        if len <= header::SIZE + self.shape.plain_frame() {
            return Ok(false);
        }
        let Some(first) = self.held.first() else { return Ok(false) };
        let at = first.header[header::GSO_TYPE_AT];
        let gso_type: u8 = self.memory.read_obj(at).map_err(DeviceError::Memory)?;
        Ok(gso_type == header::GSO_NONE)
    }

    /// Writes a byte of the header of the frame in front.
    fn write_header(&self, at: usize, byte: u8) -> Result<(), DeviceError> {
        let Some(first) = self.held.first() else { return Ok(()) };
        self.memory.write_obj(byte, first.header[at]).map_err(DeviceError::Memory)
    }
}

/// Adds a chain of the receive queue to `pieces`, up to `max` bytes: no frame is larger.
fn hold(chain: Chain<'_>, pieces: &mut GuestPieces, max: usize) -> Result<Held, DeviceError> {
    let (head, before) = (chain.head_index(), pieces.count());
    let mut header = [GuestAddress(0); header::SIZE];
    let (mut room, mut walked, mut has_end) = (0, 0, false);
    for descriptor in chain {
        walked += 1;
        if walked > MAX_CHAIN_PARTS || pieces.count() >= MAX_PIECES {
            return Err(DeviceError::BadChain("receive buffers are in too many pieces"));
        }
        if !descriptor.is_write_only() {
            return Err(DeviceError::BadChain("receive buffer is not writable"));
        }
        has_end = !descriptor.has_next();
        let len = (descriptor.len() as usize).min(max - room);
        if len == 0 {
            continue;
        }
        pieces.push(descriptor.addr(), len).map_err(DeviceError::Memory)?;
        for (place, at) in header.iter_mut().skip(room).zip(descriptor.addr().0..).take(len) {
            *place = GuestAddress(at);
        }
        room += len;
    }
    if !has_end {
        return Err(DeviceError::BadChain("receive buffer has no end"));
    }
    if room < header::SIZE {
        return Err(DeviceError::BadChain("receive buffer cannot hold a header"));
    }
    Ok(Held { head, room, parts: pieces.count() - before, header })
}
