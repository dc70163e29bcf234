//! Guest memory: one region below the hole at 3.25 GiB, and one from 4 GiB for what does not fit.

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::arch::x86_64::layout::{HOLE_END, HOLE_START};
use crate::config::MemorySize;

/// The host cannot give the guest its memory.
#[derive(Debug, thiserror::Error)]
#[error(
    "Cannot reserve {mib} MiB of address space for the guest; a ulimit on virtual memory may be in force"
)]
pub struct MemoryError {
    mib: u64,
    #[source]
    source: vm_memory::mmap::FromRangesError,
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

/// Maps the guest's memory. Pages come from the host as the guest touches them.
///
/// # Errors
/// [`MemoryError`] when the host refuses the mapping.
pub fn allocate(size: MemorySize) -> Result<GuestMemoryMmap, MemoryError> {
    let ranges: Vec<_> = regions(size)
        .into_iter()
        .map(|(start, length)| (GuestAddress(start), usize::try_from(length).unwrap_or(usize::MAX)))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).map_err(|source| MemoryError { mib: size.mib(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(mib: u64) -> Vec<(u64, u64)> {
        regions(MemorySize::from_mib(mib).unwrap())
    }

    #[test]
    fn small_memory_is_one_region() {
        assert_eq!(of(128), [(0, 128 << 20)]);
        assert_eq!(of(3328), [(0, HOLE_START)]);
    }

    #[test]
    fn memory_beyond_the_hole_goes_on_at_4_gib() {
        assert_eq!(of(3329), [(0, HOLE_START), (HOLE_END, 1 << 20)]);
        assert_eq!(of(1 << 20).iter().map(|r| r.1).sum::<u64>(), 1 << 40);
    }
}
