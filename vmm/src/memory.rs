//! Guest memory: one region below the hole at 3.25 GiB, and one from 4 GiB for what does not fit.

use std::io;

use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::arch::x86_64::layout::{HOLE_END, HOLE_START};
use crate::config::MemorySize;
use crate::sys;

/// The host cannot give the guest its memory.
#[derive(Debug, thiserror::Error)]
#[error(
    "Cannot reserve {mib} MiB of address space for the guest; a ulimit on virtual memory may be in force"
)]
pub struct MemoryError {
    mib: u64,
    #[source]
    source: io::Error,
}

/// Regions of `size`, as `(start, length)` in ascending order.
#[must_use]
pub fn regions(size: MemorySize) -> Vec<(u64, u64)> {
    let bytes = size.bytes();
    let low = bytes.min(HOLE_START);
    let mut regions = vec![(0, low)];
    if bytes > low {
        regions.push((HOLE_END, bytes - low));
    }
    regions
}

/// Maps the guest's memory. Pages come from the host as the guest touches them, 2 MiB at once where the host has huge
/// pages: each touch that the host has not mapped yet is an exit.
///
/// # Errors
/// [`MemoryError`] when the host refuses the mapping.
pub fn allocate(size: MemorySize) -> Result<GuestMemoryMmap, MemoryError> {
    let map = || {
        let regions = regions(size).into_iter().map(|(start, length)| {
            let length = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
            let region = sys::map_guest_memory(length)?;
            GuestRegionMmap::new(region, GuestAddress(start))
                .ok_or_else(|| io::ErrorKind::InvalidInput.into())
        });
        let regions = regions.collect::<io::Result<Vec<_>>>()?;
        GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)
    };
    map().map_err(|source| MemoryError { mib: size.mib(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemory};

    fn of(mib: u64) -> Vec<(u64, u64)> {
        regions(MemorySize::from_mib(mib).unwrap())
    }

    #[test]
    fn small_memory_is_one_region() {
        assert_eq!(of(128), [(0, 128 << 20)]);
        assert_eq!(of(3328), [(0, HOLE_START)]);
    }

    #[test]
    fn memory_starts_at_a_huge_page() {
        let memory = allocate(MemorySize::from_mib(3330).unwrap()).unwrap();
        assert_eq!(memory.num_regions(), 2);
        for region in memory.iter() {
            assert!((region.as_ptr() as u64).is_multiple_of(sys::HUGE_PAGE));
        }
        memory.write_obj(7_u64, GuestAddress(HOLE_START - 8)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(HOLE_START - 8)).unwrap(), 7);
    }

    #[test]
    fn memory_beyond_the_hole_goes_on_at_4_gib() {
        assert_eq!(of(3329), [(0, HOLE_START), (HOLE_END, 1 << 20)]);
        assert_eq!(of(1 << 20).iter().map(|r| r.1).sum::<u64>(), 1 << 40);
    }
}
