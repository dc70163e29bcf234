//! Drivers that break the rules: each costs its own device, never the process, and never the host's time or memory.

use vm_memory::{Bytes, GuestAddress};

use super::super::header::{MAX_FRAME, SIZE};
use super::super::receive::MAX_CHAIN_PARTS;
use super::driver::{
    Descriptor, FREE_MEMORY, Guest, HEADER, MEMORY_MIB, MERGEABLE, PLAIN, Prng, TSO, arrived, wire,
    write_descriptor,
};
use crate::testing::{NEXT, WRITE};
use crate::virtio::device::DeviceError;

/// `VIRTQ_DESC_F_INDIRECT`, which is not offered.
const INDIRECT: u16 = 4;
const OUTSIDE: u64 = 1 << 40;
const END: u64 = (MEMORY_MIB as u64) << 20;
/// Where tables of descriptors are put.
const TABLE: u64 = FREE_MEMORY + (1 << 20);

/// `count` descriptors of `len` bytes each, the last without a next.
fn many(count: u16, len: u32, flags: u16) -> Vec<Descriptor> {
    let last = count - 1;
    let one = |index| (FREE_MEMORY, len, flags | if index < last { NEXT } else { 0 }, index + 1);
    (0..count).map(one).collect()
}

fn max_parts() -> u16 {
    u16::try_from(MAX_CHAIN_PARTS).unwrap()
}

#[test]
fn malformed_transmit_chains_cost_the_device() {
    let header = (FREE_MEMORY, HEADER, NEXT, 1);
    let frame = FREE_MEMORY + 4096;
    let too_large = u32::try_from(MAX_FRAME).unwrap() + 1;
    let cases: [(&str, &[Descriptor]); 18] = [
        ("empty descriptor", &[(FREE_MEMORY, 0, 0, 0)]),
        ("header cut short", &[(FREE_MEMORY, HEADER - 1, 0, 0)]),
        ("header cut short in pieces", &[(FREE_MEMORY, 6, NEXT, 1), (FREE_MEMORY, 5, 0, 0)]),
        ("header for the device to write", &[(FREE_MEMORY, HEADER, WRITE, 0)]),
        ("header outside of memory", &[(OUTSIDE, HEADER + 60, 0, 0)]),
        ("header across the end of memory", &[(END - 6, HEADER, 0, 0)]),
        ("header that wraps", &[(u64::MAX - 5, HEADER, 0, 0)]),
        ("frame for the device to write", &[header, (frame, 60, WRITE, 0)]),
        ("frame outside of memory", &[header, (OUTSIDE, 60, 0, 0)]),
        ("frame across the end of memory", &[(END - 60, HEADER + 60, 0, 0)]),
        ("frame that wraps", &[header, (u64::MAX - 10, 60, 0, 0)]),
        ("4 GiB in one", &[(FREE_MEMORY, u32::MAX, 0, 0)]),
        ("4 GiB behind a header", &[header, (frame, u32::MAX, 0, 0)]),
        ("more than 4 GiB", &[header, (frame, 60_000, NEXT, 2), (frame, u32::MAX, 0, 0)]),
        ("a byte more than any frame has", &[header, (frame, too_large, 0, 0)]),
        ("loop without end", &[header, (frame, 0, NEXT, 1)]),
        ("loop to the head", &[(FREE_MEMORY, HEADER, NEXT, 0)]),
        ("next outside of the table", &[(FREE_MEMORY, HEADER + 60, NEXT, 60_000)]),
    ];
    for (what, chain) in cases {
        let (mut guest, far) = Guest::new(TSO);
        guest.send_chain(chain);
        assert!(guest.settle().is_err(), "{what}");
        assert_eq!(arrived(&far), None, "{what}");
    }
}

#[test]
fn frames_in_many_pieces_have_a_limit() {
    let (mut guest, far) = Guest::new(PLAIN);
    guest.send_chain(&many(max_parts(), 20, 0));
    guest.settle().unwrap();
    assert_eq!(arrived(&far).unwrap().len(), MAX_CHAIN_PARTS * 20);
    let (mut guest, _far) = Guest::new(PLAIN);
    guest.send_chain(&many(max_parts() + 1, 20, 0));
    assert!(matches!(guest.settle(), Err(DeviceError::BadChain(_))));
    // Pieces without a byte count, too.
    let (mut guest, _far) = Guest::new(PLAIN);
    guest.send_chain(&many(max_parts() + 1, 0, 0));
    assert!(matches!(guest.settle(), Err(DeviceError::BadChain(_))));
}

#[test]
fn indirect_tables_are_bounded_though_not_offered() {
    let thousands = |flags: u16| many(40_000, 1, flags);
    for (flags, is_receive) in [(0, false), (WRITE, true)] {
        let (mut guest, far) = Guest::new(MERGEABLE);
        for (index, descriptor) in (0..).zip(thousands(flags)) {
            write_descriptor(&guest.memory, TABLE + index * 16, descriptor);
        }
        let chain = [(TABLE, 40_000 * 16, INDIRECT, 0)];
        if is_receive {
            guest.lend_chain(&chain);
            far.send(&wire(&[0; SIZE], &[1; 60])).unwrap();
        } else {
            guest.send_chain(&chain);
        }
        assert!(matches!(guest.settle(), Err(DeviceError::BadChain(_))), "{is_receive}");
    }
    // A table in a table, one that is no multiple of a descriptor, one outside of memory.
    for (address, len) in [(TABLE, 32), (TABLE, 17), (OUTSIDE, 32)] {
        let (mut guest, _far) = Guest::new(PLAIN);
        write_descriptor(&guest.memory, TABLE, (TABLE, 16, INDIRECT, 0));
        guest.send_chain(&[(address, len, INDIRECT, 0)]);
        assert!(guest.settle().is_err(), "{address:#x} {len}");
    }
}

#[test]
fn malformed_receive_buffers_cost_the_device() {
    let half = (FREE_MEMORY, 6, WRITE | NEXT, 1);
    let cases: [(&str, &[Descriptor]); 10] = [
        ("buffer that may not be written", &[(FREE_MEMORY, 4096, 0, 0)]),
        ("part that may not be written", &[half, (FREE_MEMORY, 4096, 0, 0)]),
        ("empty buffer", &[(FREE_MEMORY, 0, WRITE, 0)]),
        ("buffer smaller than a header", &[(FREE_MEMORY, HEADER - 1, WRITE, 0)]),
        ("buffer outside of memory", &[(OUTSIDE, 4096, WRITE, 0)]),
        ("buffer across the end of memory", &[(END - 100, 4096, WRITE, 0)]),
        ("buffer that wraps", &[(u64::MAX - 10, 4096, WRITE, 0)]),
        ("loop", &[(FREE_MEMORY, 20, WRITE | NEXT, 0)]),
        ("empty loop", &[(FREE_MEMORY, 0, WRITE | NEXT, 0)]),
        ("next outside of the table", &[(FREE_MEMORY, 4096, WRITE | NEXT, 60_000)]),
    ];
    for (what, chain) in cases {
        for features in [PLAIN, MERGEABLE, MERGEABLE | TSO] {
            let (mut guest, far) = Guest::new(features);
            guest.lend_chain(chain);
            far.send(&wire(&[0; SIZE], &[1; 60])).unwrap();
            assert!(guest.settle().is_err(), "{what}, {features:#x}");
        }
    }
}

#[test]
fn receive_buffer_of_4_gib_is_used_as_far_as_a_frame_goes() {
    for features in [PLAIN, MERGEABLE, MERGEABLE | TSO] {
        let (mut guest, far) = Guest::new(features);
        guest.lend_chain(&[(FREE_MEMORY, u32::MAX, WRITE, 0)]);
        far.send(&wire(&[0; SIZE], &[1; 60])).unwrap();
        guest.settle().unwrap();
        assert_eq!(guest.rx.take_used(&guest.memory), Some((0, HEADER + 60)));
    }
}

#[test]
fn buffers_of_a_few_bytes_have_a_limit() {
    // The same small chain over and over: more pieces than the queue has descriptors, and never room for a frame.
    let (mut guest, far) = Guest::new(MERGEABLE | TSO);
    for (index, descriptor) in (0..).zip(many(max_parts(), 1, WRITE)) {
        guest.rx.describe(&guest.memory, index, descriptor);
    }
    for _ in 0..250 {
        guest.rx.offer(&guest.memory, 0);
    }
    far.send(&wire(&[0; SIZE], &[1; 60])).unwrap();
    assert!(matches!(guest.settle(), Err(DeviceError::BadChain(_))));
}

#[test]
fn indices_out_of_order_cost_the_device() {
    let (mut guest, _far) = Guest::new(PLAIN);
    guest.tx.offer(&guest.memory, 9999);
    assert!(guest.settle().is_err(), "a head outside of the table");
    let (mut guest, _far) = Guest::new(PLAIN);
    guest.tx.available = 5000;
    guest.tx.offer(&guest.memory, 0);
    assert!(guest.settle().is_err(), "an index that claims more chains than the queue has");
    for head in [0, 9999] {
        let (mut guest, far) = Guest::new(PLAIN);
        guest.rx.available = if head == 0 { 5000 } else { 0 };
        guest.rx.offer(&guest.memory, head);
        far.send(&wire(&[0; SIZE], &[1; 60])).unwrap();
        assert!(guest.settle().is_err(), "the same of the receive queue");
    }
}

#[test]
fn kicks_without_end_and_without_a_reason_are_only_kicks() {
    let (mut guest, far) = Guest::new(PLAIN);
    guest.settle().unwrap();
    for _ in 0..1000 {
        guest.kick_both();
        guest.settle().unwrap();
    }
    guest.lend(0, 1600);
    guest.send(&[0; SIZE], &[1; 60], &[]);
    far.send(&wire(&[0; SIZE], &[2; 60])).unwrap();
    guest.settle().unwrap();
    assert!(arrived(&far).is_some() && guest.receive().is_some());
}

/// A descriptor that is mostly right, so that it gets far.
fn random_descriptor(random: &mut Prng, flags: u16) -> Descriptor {
    let address = match random.below(30) {
        0 => random.next(),
        1 => END - random.next() % 4096,
        _ => FREE_MEMORY + random.next() % (1 << 20),
    };
    let len = match random.below(30) {
        0 => u32::MAX,
        1 => 0,
        2 => u32::try_from(random.below(70_000)).unwrap(),
        _ => u32::try_from(random.below(3000)).unwrap(),
    };
    let odd = if random.below(60) == 0 { [WRITE, INDIRECT][random.below(2)] } else { 0 };
    let next = if random.below(3) == 0 { NEXT } else { 0 };
    (address, len, (flags ^ odd) | next, u16::try_from(random.below(258)).unwrap())
}

#[test]
fn random_chains_and_frames_never_harm_the_host() {
    for seed in 1..=24_u64 {
        let mut random = Prng(0x9e37_79b9_7f4a_7c15 ^ (seed << 40));
        let features = [PLAIN, MERGEABLE, TSO, MERGEABLE | TSO][random.below(4)];
        let (mut guest, far) = Guest::new(features);
        for _ in 0..1500 {
            let index = u16::try_from(random.below(256)).unwrap();
            match random.below(5) {
                0 => {
                    let descriptor = random_descriptor(&mut random, WRITE);
                    guest.rx.describe(&guest.memory, index, descriptor);
                    guest.rx.offer(&guest.memory, index);
                }
                1 => {
                    let descriptor = random_descriptor(&mut random, 0);
                    guest.tx.describe(&guest.memory, index, descriptor);
                    guest.tx.offer(&guest.memory, index);
                }
                2 => {
                    let at = FREE_MEMORY + random.next() % (1 << 20);
                    let header = random.bytes(SIZE);
                    guest.memory.write_slice(&header, GuestAddress(at)).unwrap();
                }
                3 => {
                    let frame = [random.bytes(SIZE), vec![5; random.below(70_000)]].concat();
                    // A wire that is full takes none, which is its own affair.
                    let _ = far.send(&frame);
                }
                _ => while arrived(&far).is_some() {},
            }
            if guest.settle().is_err() {
                guest = guest.restart(features);
            }
        }
        let mut guest = guest.restart(PLAIN);
        while arrived(&far).is_some() {}
        guest.send(&[0; SIZE], &[1; 60], &[]);
        guest.settle().unwrap();
        assert_eq!(arrived(&far), Some(wire(&[0; SIZE], &[1; 60])));
    }
}
