//! What a disk's content is: an open file of the host, and the limits within which it may be touched.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::sys::GuestPieces;

/// The unit of all addresses and lengths (virtio 1.2, 5.2.2), in bytes.
pub(super) const SECTOR: u64 = 512;

/// Most sectors of one discard: 1 GiB, so that one request does not take long.
pub(super) const MAX_DISCARD: u32 = 1 << 21;
/// Most sectors to be zeroed at once: 32 MiB, as some file systems write them.
pub(super) const MAX_ZEROES: u32 = 1 << 16;

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The guest's doing.
    #[error("request does not lie within the disk, or is not allowed")]
    Refused,
    #[error("request is of a kind that the device, or the file system below it, does not have")]
    Unsupported,
    #[error("file of the disk cannot be read or written")]
    Host(#[source] io::Error),
}

/// A number of sectors at some place of the disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    pub(super) sector: u64,
    pub(super) sectors: u32,
}

#[derive(Debug)]
pub(super) struct Backing {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl Backing {
    /// # Errors
    /// The file has no size.
    pub(super) fn new(mut file: File, read_only: bool) -> io::Result<Self> {
        // The end of a block device can be sought, too.
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR;
        Ok(Self { file, sectors, read_only })
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Fills `pieces` from the disk.
    pub(super) fn read(&self, sector: u64, pieces: &mut GuestPieces) -> Result<(), Failure> {
        let offset = self.place(sector, pieces.bytes())?;
        pieces.read_all_at(self.file.as_fd(), offset).map_err(Failure::Host)
    }

    /// Puts `pieces` on the disk.
    pub(super) fn write(&self, sector: u64, pieces: &mut GuestPieces) -> Result<(), Failure> {
        self.may_write()?;
        let offset = self.place(sector, pieces.bytes())?;
        pieces.write_all_at(self.file.as_fd(), offset).map_err(Failure::Host)
    }

    /// What was written before is on the host's disk afterwards.
    pub(super) fn flush(&self) -> Result<(), Failure> {
        if self.read_only { Ok(()) } else { self.file.sync_data().map_err(Failure::Host) }
    }

    /// Gives room back; the content is undefined afterwards (here: zeroes).
    pub(super) fn discard(&self, extent: Extent) -> Result<(), Failure> {
        self.change(extent, MAX_DISCARD, FallocateFlags::FALLOC_FL_PUNCH_HOLE)
    }

    /// Makes it zeroes; `unmap` lets it give the room back.
    pub(super) fn zero(&self, extent: Extent, unmap: bool) -> Result<(), Failure> {
        let how =
            if unmap { FallocateFlags::FALLOC_FL_PUNCH_HOLE } else { FallocateFlags::FALLOC_FL_ZERO_RANGE };
        self.change(extent, MAX_ZEROES, how)
    }

    fn change(&self, extent: Extent, most: u32, how: FallocateFlags) -> Result<(), Failure> {
        self.may_write()?;
        if extent.sectors > most {
            return Err(Failure::Refused);
        }
        let length = u64::from(extent.sectors) * SECTOR;
        let offset = self.place(extent.sector, usize::try_from(length).unwrap_or(usize::MAX))?;
        if length == 0 {
            return Ok(());
        }
        let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.file, how, offset, length.cast_signed()) {
            Err(Errno::EOPNOTSUPP) => Err(Failure::Unsupported),
            result => result.map_err(|error| Failure::Host(error.into())),
        }
    }

    fn may_write(&self) -> Result<(), Failure> {
        if self.read_only { Err(Failure::Refused) } else { Ok(()) }
    }

    /// The offset in the file of what lies within the disk and is made of whole sectors.
    fn place(&self, sector: u64, bytes: usize) -> Result<i64, Failure> {
        let bytes = bytes as u64;
        let end = sector.checked_add(bytes / SECTOR).filter(|end| *end <= self.sectors);
        let offset = sector.checked_mul(SECTOR).and_then(|offset| i64::try_from(offset).ok());
        match (end, offset) {
            (Some(_), Some(offset)) if bytes.is_multiple_of(SECTOR) => Ok(offset),
            _ => Err(Failure::Refused),
        }
    }
}
