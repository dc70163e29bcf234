//! The block device (virtio 1.2, 5.2): a disk of the guest that is a file or a block device of the host. See `docs/block.md`.
//!
//! ```text
//!  queue ─▶ request (taken apart, judged) ─▶ backing ─▶ file
//! ```
//!
//! [`Block`] is the device at rest. At work it is `worker`, on a thread of its own, one request after the other: each waits for
//! the host's disk. The device finds no file and opens none: it is given an open one, and knows nothing of what is on it.

mod backing;
mod request;
mod worker;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use self::backing::{Backing, MAX_DISCARD, MAX_ZEROES};
use self::request::MAX_SEGMENTS;
use self::worker::BlockWorker;
use super::device::{Activation, Device, DeviceError, DeviceKind, Placement, Worker};
use crate::jail::seccomp::Kind;

/// Linux keeps half as many requests under way, as each takes at least two descriptors.
const QUEUE_SIZES: [u16; 1] = [128];

/// `struct virtio_blk_config` of virtio 1.2, 5.2.4, up to `write_zeroes_may_unmap`.
const CONFIG_SIZE: usize = 60;
const SEG_MAX_AT: usize = 12;
const MAX_DISCARD_AT: usize = 36;
const MAX_ZEROES_AT: usize = 48;
const MAY_UNMAP_AT: usize = 56;

/// A disk before its driver has started it.
#[derive(Debug)]
pub struct Block {
    backing: Arc<Backing>,
    config: [u8; CONFIG_SIZE],
}

impl Block {
    /// A disk that is `file`, as large as that is now; what does not fill a sector at its end is left out. A descriptor that
    /// cannot be written makes each write fail, so `read_only` is to say that.
    ///
    /// # Errors
    /// It has no size: a pipe, say.
    pub fn new(file: File, read_only: bool) -> io::Result<Self> {
        let backing = Backing::new(file, read_only)?;
        let mut config = [0; CONFIG_SIZE];
        let mut put = |at: usize, value: &[u8]| config[at..at + value.len()].copy_from_slice(value);
        put(0, &backing.sectors().to_le_bytes());
        put(SEG_MAX_AT, &MAX_SEGMENTS.to_le_bytes());
        if !read_only {
            // The number of sectors, of segments, and (of discards) the alignment in sectors.
            for (at, value) in (MAX_DISCARD_AT..).step_by(4).zip([MAX_DISCARD, 1, 1]) {
                put(at, &value.to_le_bytes());
            }
            for (at, value) in (MAX_ZEROES_AT..).step_by(4).zip([MAX_ZEROES, 1]) {
                put(at, &value.to_le_bytes());
            }
            put(MAY_UNMAP_AT, &[1]);
        }
        Ok(Self { backing: Arc::new(backing), config })
    }
}

impl Device for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        let more: &[u32] = match self.backing.is_read_only() {
            true => &[VIRTIO_BLK_F_RO],
            false => &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES],
        };
        [VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_FLUSH].iter().chain(more).fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(CONFIG_SIZE);
        let count = data.len().min(CONFIG_SIZE - start);
        data[..count].copy_from_slice(&self.config[start..start + count]);
    }

    fn placement(&self) -> Placement {
        Placement::OwnThread(Kind::Block)
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, DeviceError> {
        let no_queue = DeviceError::BadChain("block device has no queue");
        let queue = activation.queues.into_iter().next().ok_or(no_queue)?;
        let write_through = activation.features >> VIRTIO_BLK_F_FLUSH & 1 == 0;
        Ok(Box::new(BlockWorker::new(queue, Arc::clone(&self.backing), write_through)))
    }
}
