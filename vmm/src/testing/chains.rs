//! Chains of descriptors that no driver would lay, and what they mean by the specification (virtio 1.2, 2.7.5), told without
//! the code that walks them for the devices.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::{INDIRECT, NEXT, WRITE};
use crate::virtio::queue::QueueConfig;

/// Descriptors of a queue's own table.
pub(crate) const SIZE: u16 = 16;
/// Guest memory with a hole in it. Below [`ROOM`] lie rings and indirect tables, which no descriptor of [`offers`] leads to.
const REGIONS: [(u64, usize); 2] = [(0, 0x4_0000), (0x6_0000, 0x2_0000)];
const ROOM: u64 = 0x3_8000;
/// Where requests begin.
pub(crate) const FRONT: u64 = 0x6_0000;
const RINGS: u64 = 0x1_0000;
const TABLES: u64 = 0x3_0000;
const TABLE: u64 = 0x2000;
/// Most descriptors of an indirect table.
const LONGEST: u16 = 512;

/// Address, length, flags, next.
pub(crate) type Raw = (u64, u32, u16, u16);

/// What a driver lays into one queue.
#[derive(Debug, Clone)]
pub(crate) struct Offer {
    table: Vec<Raw>,
    indirect: Vec<Raw>,
    heads: Vec<u16>,
}

fn address() -> impl Strategy<Value = u64> {
    let ends = [ROOM, 0x3_fff8, 0x3_ffff, 0x4_0000, 0x5_ffff, 0x7_fff4, 0x7_ffff, 0x8_0000];
    let odd = [(1 << 32) - 1, 1 << 40, 1 << 63, u64::MAX - 15, u64::MAX - 3, u64::MAX];
    prop_oneof![
        8 => FRONT + 0x100..0x8_0000,
        4 => ROOM..0x4_0000,
        1 => select([&ends[..], &odd].concat()),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        8 => 0..600_u32,
        4 => select(vec![0, 1, 12, 16, 44, 512, 1024, 4096, 0x8000]),
        1 => select(vec![65_536, 65_562, 65_563, 1 << 20, 1 << 31, u32::MAX - 15, u32::MAX]),
    ]
}

/// A chain as drivers lay them: what the device reads, then what it writes.
fn chain() -> impl Strategy<Value = Vec<(u64, u32, bool)>> {
    let front = prop_oneof![
        4 => select(vec![12_u32, 16, 40, 44, 48, 56, 100]).prop_map(|length| Some((FRONT, length, false))),
        1 => Just(None),
    ];
    let part = |write| (address(), length(), Just(write));
    let end = prop_oneof![2 => Just(None), 1 => address().prop_map(|at| Some((at, 1, true)))];
    let kinds = select(vec![(true, true), (true, true), (true, false), (false, true)]);
    (front, vec(part(false), 0..3), vec(part(true), 0..4), end, kinds).prop_map(
        |(front, read, write, end, (reads, writes))| {
            let read = front.into_iter().chain(read).filter(|_| reads);
            read.chain(write.into_iter().chain(end).filter(|_| writes)).collect()
        },
    )
}

/// A field of a descriptor that becomes another.
fn change() -> impl Strategy<Value = (usize, Raw, usize)> {
    let flags =
        prop_oneof![select(vec![0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT]), any::<u16>()];
    let next = prop_oneof![4 => 0..SIZE + 1, 1 => any::<u16>()];
    (0..usize::from(SIZE), (address(), length(), flags, next), 0..4_usize)
}

fn changed(table: &mut [Raw], changes: &[(usize, Raw, usize)]) {
    for (index, other, field) in changes {
        let Some(descriptor) = table.get_mut(*index) else { continue };
        match field {
            0 => descriptor.0 = other.0,
            1 => descriptor.1 = other.1,
            2 => descriptor.2 = other.2,
            _ => descriptor.3 = other.3,
        }
    }
}

/// Chains in turn, and a few fields that are not what a driver would write.
pub(crate) fn offers() -> impl Strategy<Value = Offer> {
    let parts = select(vec![1, 2, 5, 63, 64, 65, 66, 160, 161, LONGEST]);
    let indirect = (vec(chain(), 1..3), parts, vec(change(), 0..2));
    let link =
        proptest::option::weighted(0.3, (0..usize::from(SIZE), prop_oneof![9 => Just(0), 1 => 1..16_u32]));
    let heads = vec(prop_oneof![4 => 0..SIZE, 1 => any::<u16>()], 0..2);
    (vec(chain(), 1..6), vec(change(), 0..4), indirect, link, heads).prop_map(
        |(chains, changes, (long, parts, long_changes), link, more)| {
            let (mut table, mut heads) = (Vec::new(), Vec::new());
            for chain in &chains {
                if chain.is_empty() || table.len() + chain.len() > usize::from(SIZE) {
                    continue;
                }
                heads.push(index(table.len()));
                lay(&mut table, chain.iter().copied(), chain.len());
            }
            let mut indirect = Vec::new();
            let long = long.concat();
            lay(
                &mut indirect,
                long.iter().copied().cycle().take(usize::from(parts)),
                long.len().min(1) * usize::from(parts),
            );
            changed(&mut table, &changes);
            changed(&mut indirect, &long_changes);
            if let Some((at, odd)) = link
                && let Some(descriptor) = table.get_mut(at)
            {
                let length = u32::try_from(indirect.len()).unwrap() * 16 + odd;
                *descriptor = (TABLES, length, INDIRECT, 0);
            }
            heads.extend(more);
            Offer { table, indirect, heads }
        },
    )
}

fn index(index: usize) -> u16 {
    u16::try_from(index).unwrap()
}

fn lay(table: &mut Vec<Raw>, parts: impl Iterator<Item = (u64, u32, bool)>, count: usize) {
    for (number, (at, length, write)) in (1..).zip(parts) {
        let next = if number < count { NEXT } else { 0 };
        let flags = next | if write { WRITE } else { 0 };
        table.push((at, length, flags, index(table.len() + 1)));
    }
}

/// Memory that shows what is written to it.
pub(crate) fn memory() -> GuestMemoryMmap {
    let memory =
        GuestMemoryMmap::from_ranges(&REGIONS.map(|(at, length)| (GuestAddress(at), length))).unwrap();
    memory.write_slice(&[0xa5; 0x8000], GuestAddress(ROOM)).unwrap();
    memory.write_slice(&[0xa5; 0x2_0000], GuestAddress(FRONT)).unwrap();
    memory
}

/// All of it, region after region.
pub(crate) fn content(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut all = Vec::new();
    for region in memory.iter() {
        let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
        memory.read_slice(&mut bytes, region.start_addr()).unwrap();
        all.extend(bytes);
    }
    all
}

/// The address of a byte of [`content`].
pub(crate) fn place(at: usize) -> u64 {
    let at = at as u64;
    if at < REGIONS[0].1 as u64 { at } else { at - REGIONS[0].1 as u64 + REGIONS[1].0 }
}

/// The rings of the queue of a number.
pub(crate) fn rings(number: usize) -> QueueConfig {
    let base = RINGS * number as u64;
    QueueConfig {
        ready: true,
        descriptors: base,
        available: base + 0x4000,
        used: base + 0x8000,
        ..QueueConfig::new(SIZE)
    }
}

impl Offer {
    pub(crate) fn heads(&self) -> &[u16] {
        &self.heads
    }

    /// Lays it into the queue of a number.
    pub(crate) fn lay(&self, memory: &GuestMemoryMmap, number: usize) {
        let (rings, indirect) = (rings(number), TABLES + TABLE * number as u64);
        let own = |table: &[Raw]| -> Vec<Raw> {
            let mut table = table.to_vec();
            // Each queue has a table of its own.
            table.iter_mut().filter(|part| part.0 == TABLES).for_each(|part| part.0 = indirect);
            table
        };
        for (at, table) in [(rings.descriptors, own(&self.table)), (indirect, own(&self.indirect))] {
            for (slot, (address, length, flags, next)) in table.into_iter().enumerate() {
                let at = at + slot as u64 * 16;
                memory.write_obj(address, GuestAddress(at)).unwrap();
                memory.write_obj(length, GuestAddress(at + 8)).unwrap();
                memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
                memory.write_obj(next, GuestAddress(at + 14)).unwrap();
            }
        }
        for (slot, head) in self.heads.iter().enumerate() {
            memory.write_obj(*head, GuestAddress(rings.available + 4 + slot as u64 * 2)).unwrap();
        }
        memory.write_obj(index(self.heads.len()), GuestAddress(rings.available + 2)).unwrap();
    }
}

/// The descriptors of a chain in their order. It ends where it says so, where a table has no more, where it would go round,
/// and where it has 4 GiB.
pub(crate) fn walk(memory: &GuestMemoryMmap, rings: &QueueConfig, head: u16) -> Vec<Raw> {
    let (mut table, mut size, mut index, mut indirect) =
        (rings.descriptors, u64::from(rings.size), u64::from(head), false);
    let (mut left, mut bytes, mut found) = (size, 0_u64, Vec::new());
    while left > 0 && index < size {
        let Some(at) = table.checked_add(index * 16) else { break };
        let mut raw = [0; 16];
        if memory.read_slice(&mut raw, GuestAddress(at)).is_err() {
            break;
        }
        let address = u64::from_le_bytes(raw[..8].try_into().unwrap());
        let length = u32::from_le_bytes(raw[8..12].try_into().unwrap());
        let word = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let (flags, next) = (word(12), word(14));
        if flags & INDIRECT != 0 {
            if indirect || length % 16 != 0 || length / 16 > u32::from(u16::MAX) {
                break;
            }
            (table, size, index, indirect) = (address, u64::from(length / 16), 0, true);
            left = size;
            continue;
        }
        bytes += u64::from(length);
        if bytes > u64::from(u32::MAX) {
            break;
        }
        found.push((address, length, flags, next));
        if flags & NEXT == 0 {
            break;
        }
        index = next.into();
        left -= 1;
    }
    found
}
