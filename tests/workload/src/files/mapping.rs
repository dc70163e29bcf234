//! A part of a file in memory.

use std::ffi::c_void;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};

use super::Outcome;

/// Shared and writable, within the file's size as long as nobody makes it shorter.
pub(super) struct Mapping {
    at: NonNull<c_void>,
    length: usize,
}

impl Mapping {
    pub(super) fn shared(file: &File, offset: usize, length: usize) -> Outcome<Self> {
        let size = NonZeroUsize::new(length).ok_or("an empty mapping")?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let offset = i64::try_from(offset)?;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let at = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, file, offset) }?;
        Ok(Self { at, length })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: `length` bytes are mapped at `at` as long as `self` lives. That another process may write them meanwhile is what is
        // tested: they are plain bytes.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr().cast(), self.length) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and this is the only reference of this process.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr().cast(), self.length) }
    }

    pub(super) fn sync(&self) -> Outcome {
        // SAFETY: the range is mapped.
        Ok(unsafe { msync(self.at, self.length, MsFlags::MS_SYNC) }?)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `shared`, and nothing refers to it any more.
        let _ = unsafe { munmap(self.at, self.length) };
    }
}
