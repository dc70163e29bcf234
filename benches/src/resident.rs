//! What a VMM's process weighs, its guest's memory and the rest (`/proc/PID/smaps`, proc(5)).

use std::fs;
use std::io;

/// A mapping: its addresses and its share of resident memory in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    pss_kib: u64,
}

/// Proportional set sizes of a VMM, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resident {
    /// Of its guest's memory: what the guest has touched, in huge pages where the host gave them.
    pub guest_kib: u64,
    /// Of all else.
    pub beyond_kib: u64,
}

/// What process `pid` with guest memory of `guest_mib` weighs.
///
/// # Errors
/// The process is gone, or has no such guest memory.
pub fn of(pid: u32, guest_mib: u64) -> io::Result<Resident> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mappings = mappings(&smaps);
    let total: u64 = mappings.iter().map(|mapping| mapping.pss_kib).sum();
    let guest_kib = guest_kib(&mappings, guest_mib << 20)
        .ok_or_else(|| io::Error::other(format!("process {pid} has no guest memory of {guest_mib} MiB")))?;
    Ok(Resident { guest_kib, beyond_kib: total - guest_kib })
}

/// KiB of proportional set size of process `pid`, all of it.
///
/// # Errors
/// The process is gone.
pub fn all_kib(pid: u32) -> io::Result<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    Ok(mappings(&smaps).iter().map(|mapping| mapping.pss_kib).sum())
}

/// Guest memory is one range of addresses, in several mappings where a file lies in it. Of ranges of its size, it is the one
/// that weighs most: an allocator may reserve as much beside it.
fn guest_kib(mappings: &[Mapping], bytes: u64) -> Option<u64> {
    let mut chain: Vec<Mapping> = Vec::new();
    let mut heaviest = None;
    for mapping in mappings {
        if chain.last().is_some_and(|last| last.end != mapping.start) {
            chain.clear();
        }
        chain.push(*mapping);
        // Neighbours in front of it belong to others.
        while let [first, rest @ ..] = chain.as_slice()
            && rest.last().is_some_and(|last| last.end - first.end >= bytes)
        {
            chain.remove(0);
        }
        if let (Some(first), Some(last)) = (chain.first(), chain.last())
            && last.end - first.start == bytes
        {
            heaviest = heaviest.max(Some(chain.iter().map(|mapping| mapping.pss_kib).sum()));
        }
    }
    heaviest
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if first == "Pss:" {
            let kib = words.next().and_then(|kib| kib.parse().ok()).unwrap_or_default();
            if let Some(last) = mappings.last_mut() {
                last.pss_kib = kib;
            }
        } else if let Some((start, end)) = first.split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            mappings.push(Mapping { start, end, pss_kib: 0 });
        }
    }
    mappings
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
400000000000-400000300000 ---p 00000000 00:00 0
Pss:                   0 kB
55d000000000-55d000001000 r-xp 00000000 00:1f 7 /krx-vmm
Pss:                   3 kB
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
Pss:                  10 kB
7f0000100000-7f0000200000 rw-p 00000000 00:1f 9 /vmlinux
Pss:                 100 kB
7f0000200000-7f0000300000 rw-p 00000000 00:00 0
Pss:                1000 kB
7f0000300000-7f0000301000 rw-p 00000000 00:00 0
Pss:                   4 kB
";

    #[test]
    fn guest_memory_is_found_whatever_lies_in_it_and_beside_it() {
        let mappings = mappings(SMAPS);
        assert_eq!(mappings.len(), 6);
        assert_eq!(guest_kib(&mappings, 3 << 20), Some(1110));
        assert_eq!(guest_kib(&mappings, 2 << 20), Some(1100));
        assert_eq!(guest_kib(&mappings, 5 << 20), None);
    }
}
