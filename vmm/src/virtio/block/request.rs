//! One request of a driver (virtio 1.2, 5.2.6), taken apart and carried out.
//!
//! Its parts may be cut into descriptors as the driver likes (2.7.4): what counts is the order of the bytes.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::backing::{Backing, Extent, Failure};
use crate::sys::GuestPieces;
use crate::virtio::device::DeviceError;

/// Most pieces of data in one request, as the configuration says (`seg_max`): with the header and the status they fill a queue.
pub(super) const MAX_SEGMENTS: u32 = 126;
/// Descriptors of one chain. Stops an indirect table, which is walked though not offered, from holding the thread.
const MAX_PARTS: usize = 160;
/// `struct virtio_blk_req` up to its data: type, reserved, sector.
const HEADER: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`, of which a request has one.
const SEGMENT: usize = 16;

/// The room in which requests are taken apart, one after the other.
pub(super) struct Request {
    memory: GuestMemoryMmap,
    /// The header, and the first bytes of the data behind it.
    front: [u8; HEADER + SEGMENT],
    front_len: usize,
    /// Data of the driver, without the header.
    readable: GuestPieces,
    /// Room for data, without the last byte.
    writable: GuestPieces,
    /// The driver does not flush: what it writes has to be on the host's disk when it is told that it is written (5.2.6.2).
    write_through: bool,
}

/// What the driver is told, and where.
#[derive(Debug)]
pub(super) struct Answer {
    at: GuestAddress,
    status: u8,
    /// Bytes written before the status.
    data: u32,
}

impl Request {
    pub(super) fn new(memory: GuestMemoryMmap, write_through: bool) -> Self {
        let (readable, writable) = (GuestPieces::new(memory.clone()), GuestPieces::new(memory.clone()));
        Self { memory, front: [0; HEADER + SEGMENT], front_len: 0, readable, writable, write_through }
    }

    /// Takes `chain` apart; gives the address of its status byte.
    ///
    /// # Errors
    /// [`DeviceError::BadChain`] for what is no request at all, [`DeviceError::Memory`] for addresses out of the guest's memory.
    pub(super) fn take(
        &mut self,
        chain: impl Iterator<Item = Descriptor>,
    ) -> Result<GuestAddress, DeviceError> {
        self.front_len = 0;
        self.readable.remove_first(GuestPieces::MAX);
        self.writable.remove_first(GuestPieces::MAX);
        let (mut last, mut has_end) = (None, false);
        for (part, descriptor) in chain.enumerate() {
            if part == MAX_PARTS {
                return Err(DeviceError::BadChain("request to a disk is in too many pieces"));
            }
            has_end = !descriptor.has_next();
            let piece = (descriptor.addr(), descriptor.len() as usize);
            match (descriptor.is_write_only(), last) {
                (true, before) => {
                    before
                        .map_or(Ok(()), |(at, len)| self.writable.push(at, len))
                        .map_err(DeviceError::Memory)?;
                    last = (piece.1 > 0).then_some(piece);
                }
                (false, None) => self.take_readable(piece)?,
                (false, Some(_)) => {
                    return Err(DeviceError::BadChain(
                        "request to a disk has readable parts behind writable ones",
                    ));
                }
            }
        }
        let (Some((at, len)), true) = (last, has_end && self.front_len >= HEADER) else {
            return Err(DeviceError::BadChain("request to a disk has no header, or no room for its status"));
        };
        if len > 1 {
            self.writable.push(at, len - 1).map_err(DeviceError::Memory)?;
        }
        // Behind what `push` has seen to be memory.
        Ok(GuestAddress(at.0 + (len as u64 - 1)))
    }

    fn take_readable(&mut self, (at, len): (GuestAddress, usize)) -> Result<(), DeviceError> {
        let part = len.min(self.front.len() - self.front_len);
        let front = &mut self.front[self.front_len..self.front_len + part];
        self.memory.read_slice(front, at).map_err(DeviceError::Memory)?;
        let header = HEADER.saturating_sub(self.front_len).min(len);
        self.front_len += part;
        if len > header {
            self.readable
                .push(GuestAddress(at.0 + header as u64), len - header)
                .map_err(DeviceError::Memory)?;
        }
        Ok(())
    }

    /// Does what was asked for. The answer is for the byte at `status`; a failure of the host's is given to `tell`.
    pub(super) fn carry_out(
        &mut self,
        backing: &Backing,
        status: GuestAddress,
        tell: impl FnOnce(&Failure),
    ) -> Answer {
        let room = u32::try_from(self.writable.bytes()).unwrap_or(u32::MAX);
        let (status_byte, data) = match self.execute(backing) {
            Ok(true) => (VIRTIO_BLK_S_OK, room),
            Ok(false) => (VIRTIO_BLK_S_OK, 0),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(failure) => {
                tell(&failure);
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        #[expect(clippy::cast_possible_truncation, reason = "0, 1 or 2")]
        Answer { at: status, status: status_byte as u8, data }
    }

    /// Whether the room for data was filled.
    fn execute(&mut self, backing: &Backing) -> Result<bool, Failure> {
        let kind = u32::from_le_bytes(self.front_bytes(0));
        let sector = u64::from_le_bytes(self.front_bytes(8));
        match kind {
            VIRTIO_BLK_T_IN => backing.read(sector, &mut self.writable).map(|()| true),
            VIRTIO_BLK_T_OUT => {
                backing.write(sector, &mut self.readable)?;
                if self.write_through { backing.flush().map(|()| false) } else { Ok(false) }
            }
            VIRTIO_BLK_T_FLUSH => backing.flush().map(|()| false),
            VIRTIO_BLK_T_DISCARD => {
                let (extent, flags) = self.segment()?;
                if flags != 0 {
                    // 5.2.6.2: a discard has no flags that a device knows.
                    return Err(Failure::Unsupported);
                }
                backing.discard(extent).map(|()| false)
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let (extent, flags) = self.segment()?;
                if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                    return Err(Failure::Unsupported);
                }
                backing.zero(extent, flags != 0).map(|()| false)
            }
            // GET_ID among them: a disk of krx has no name but its place.
            _ => Err(Failure::Unsupported),
        }
    }

    /// The one segment of a discard or of zeroing, and its flags.
    fn segment(&self) -> Result<(Extent, u32), Failure> {
        if self.readable.bytes() != SEGMENT {
            return Err(Failure::Refused);
        }
        let sector = u64::from_le_bytes(self.front_bytes(HEADER));
        let sectors = u32::from_le_bytes(self.front_bytes(HEADER + 8));
        let flags = u32::from_le_bytes(self.front_bytes(HEADER + 12));
        Ok((Extent { sector, sectors }, flags))
    }

    fn front_bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.front[at..at + N]);
        bytes
    }
}

impl Answer {
    /// Writes the status; gives how many bytes of the chain were written.
    ///
    /// # Errors
    /// [`DeviceError::Memory`], which is not the case for an address that [`Request::take`] gave.
    pub(super) fn give(&self, memory: &GuestMemoryMmap) -> Result<u32, DeviceError> {
        memory.write_obj(self.status, self.at).map_err(DeviceError::Memory)?;
        Ok(self.data.saturating_add(1))
    }
}
