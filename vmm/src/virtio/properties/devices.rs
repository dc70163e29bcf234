//! Devices and the queue below them, given chains that no driver lays: nothing panics, nothing is written but what the guest
//! lent for it, and no chain is said to have more than its room, or was followed beyond the device's bound.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::tempdir::TempDir;
use vmm_sys_util::tempfile::TempFile;

use crate::config::interface::{Mac, Mtu};
use crate::testing::chains::{self, FRONT, Offer, Raw, SIZE, offers, rings, walk};
use crate::testing::properties::hold;
use crate::testing::{self, WRITE};
use crate::virtio::block::Block;
use crate::virtio::device::{Activation, Device};
use crate::virtio::fs::Fs;
use crate::virtio::net::Net;
use crate::virtio::queue::total_len;
use crate::virtio::rng::{self, Rng};
use crate::virtio::vsock::Vsock;

/// Inputs of each property: together they take seconds.
const QUEUES: u32 = 1500;
const GUESTS: u32 = 250;

fn writable(chain: &[Raw]) -> u64 {
    chain.iter().filter(|part| part.2 & WRITE != 0).map(|part| u64::from(part.1)).sum()
}

#[test]
fn chains_are_what_the_specification_says() {
    hold(QUEUES, &offers(), |offer: Offer| {
        let memory = chains::memory();
        offer.lay(&memory, 0);
        let rings = rings(0);
        let mut queue = rings.activate(&memory, testing::event(), testing::interrupt().0).unwrap();
        for head in offer.heads() {
            let chain = queue.pop().unwrap().expect("as many as were offered");
            assert_eq!(chain.head_index(), *head);
            let expected = walk(&memory, &rings, *head);
            let parts: Vec<Raw> =
                chain.clone().map(|part| (part.addr().0, part.len(), part.flags(), part.next())).collect();
            assert_eq!(parts, expected);
            assert_eq!(total_len(chain.clone(), true), writable(&expected));
            assert_eq!(queue.add_used(*head, 0).is_ok(), *head < SIZE);
        }
        assert!(queue.pop().unwrap().is_none(), "more than were offered");
    });
}

/// However long a chain is, and however often it goes round.
#[test]
fn entropy_is_given_within_bounds() {
    const BYTES: u32 = 64 << 10;
    const PARTS: usize = 64;
    let source = rng::open().unwrap();
    hold(QUEUES, &offers(), |offer: Offer| {
        let memory = chains::memory();
        offer.lay(&memory, 0);
        let mut queue = rings(0).activate(&memory, testing::event(), testing::interrupt().0).unwrap();
        while let Some(chain) = queue.pop().unwrap() {
            let looked_at = Cell::new(0);
            let counted = chain.clone().inspect(|_| looked_at.set(looked_at.get() + 1));
            let given = rng::fill(&memory, counted, &mut source.try_clone().unwrap());
            assert!(looked_at.get() <= PARTS + 1, "{} parts", looked_at.get());
            if let Ok(given) = given {
                assert!(given <= BYTES && u64::from(given) <= total_len(chain, true), "{given} bytes");
            }
        }
    });
}

/// What a device is held to.
struct Bounds {
    /// Bytes that it writes into one chain, at most.
    bytes: u64,
    /// Descriptors of a chain that it hands back, at most. Where it need not look at all of them, there is none.
    parts: Option<usize>,
}

/// Starts a device on what a guest has laid into its queues, lets it run until it has no more to do or is lost, and looks at
/// what it has done. Gives how many chains it handed back.
fn serve(device: &mut dyn Device, features: u64, front: &[u8], offers: &[Offer], bounds: &Bounds) -> usize {
    let memory = chains::memory();
    memory.write_slice(front, GuestAddress(FRONT)).unwrap();
    offers.iter().enumerate().for_each(|(number, offer)| offer.lay(&memory, number));
    let before = chains::content(&memory);
    let walks: Vec<Vec<Vec<Raw>>> = (offers.iter().enumerate())
        .map(|(number, offer)| {
            offer.heads().iter().map(|head| walk(&memory, &rings(number), *head)).collect()
        })
        .collect();
    let (interrupt, _irq) = testing::interrupt();
    let queues = (0..offers.len()).map(|number| {
        let kick = testing::event();
        kick.write(1).unwrap();
        rings(number).activate(&memory, kick, interrupt.clone()).unwrap()
    });
    let activation = Activation { memory: memory.clone(), features, queues: queues.collect(), interrupt };
    let Ok(mut worker) = device.activate(activation) else { return 0 };
    // Each run serves some chains; there are seven in a queue at most.
    for _ in 0..8 {
        if worker.run().is_err() {
            break;
        }
    }
    drop(worker);
    let mut handed_back = 0;
    for (number, (offer, walks)) in offers.iter().zip(&walks).enumerate() {
        for (head, written) in used(&memory, number) {
            let of_head = offer.heads().iter().zip(walks).find(|(offered, _)| **offered == head);
            let (_, chain) = of_head.unwrap_or_else(|| panic!("{head} was not offered"));
            assert!(u64::from(written) <= writable(chain), "{written} bytes of {chain:?}");
            assert!(u64::from(written) <= bounds.bytes, "{written} bytes");
            assert!(bounds.parts.is_none_or(|most| chain.len() <= most), "{} parts", chain.len());
            handed_back += 1;
        }
        assert!(used(&memory, number).len() <= offer.heads().len(), "more than were offered");
    }
    untouched(&memory, &before, &walks);
    handed_back
}

/// Heads and bytes written that the device has put into a used ring.
fn used(memory: &GuestMemoryMmap, number: usize) -> Vec<(u16, u32)> {
    let at = rings(number).used;
    let count: u16 = memory.read_obj(GuestAddress(at + 2)).unwrap();
    assert!(count <= SIZE, "{count} chains handed back");
    let element = |slot: u16| -> (u16, u32) {
        let at = at + 4 + u64::from(slot) * 8;
        let head: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        (u16::try_from(head).unwrap(), memory.read_obj(GuestAddress(at + 4)).unwrap())
    };
    (0..count).map(element).collect()
}

/// Nothing has changed but used rings and what the chains lend for writing.
fn untouched(memory: &GuestMemoryMmap, before: &[u8], walks: &[Vec<Vec<Raw>>]) {
    let lent =
        walks.iter().flatten().flatten().filter(|part| part.2 & WRITE != 0).map(|part| (part.0, part.1));
    let rings = (0..walks.len()).map(|number| (rings(number).used, 6 + 8 * u32::from(SIZE)));
    let lent: Vec<_> = lent.chain(rings).collect();
    let after = chains::content(memory);
    if before == after.as_slice() {
        return;
    }
    for (at, (old, new)) in before.iter().zip(&after).enumerate() {
        let place = chains::place(at);
        let is_lent = |(begin, length): &(u64, u32)| {
            place.checked_sub(*begin).is_some_and(|at| at < u64::from(*length))
        };
        assert!(old == new || lent.iter().any(is_lent), "{place:#x} was written");
    }
}

/// Runs a device for each random guest; a fair part of what they lay has to be served, or the property says nothing.
fn for_each_guest<S: Strategy>(
    queues: usize,
    fronts: S,
    bounds: &Bounds,
    device: impl Fn(&S::Value) -> (Box<dyn Device>, u64, Vec<u8>),
) {
    let (guests, served) = (Cell::new(0), Cell::new(0));
    hold(GUESTS, &(vec(offers(), queues), fronts), |(offers, front)| {
        let (mut device, features, front) = device(&front);
        guests.set(guests.get() + 1);
        served.set(served.get() + serve(&mut *device, features, &front, &offers, bounds));
    });
    let (guests, served) = (guests.get(), served.get());
    assert!(served * 10 > guests, "{served} chains of {guests} guests were handed back");
}

#[test]
fn the_entropy_device_keeps_to_what_it_is_lent() {
    let bounds = Bounds { bytes: 64 << 10, parts: None };
    for_each_guest(1, Just(()), &bounds, |()| (Box::new(Rng::new(rng::open().unwrap())), 0, Vec::new()));
}

#[test]
fn a_disk_keeps_to_what_it_is_lent() {
    let sector = prop_oneof![6 => 0..64_u64, 1 => select(vec![64, 1 << 55, u64::MAX / 512, u64::MAX])];
    let kind = prop_oneof![6 => select(vec![0_u32, 1, 4, 11, 13]), 1 => any::<u32>()];
    let bounds = Bounds { bytes: u64::from(u32::MAX), parts: Some(160) };
    for_each_guest(1, (kind, sector, any::<bool>()), &bounds, |(kind, sector, read_only)| {
        let file = TempFile::new().unwrap().into_file();
        file.set_len(64 * 512).unwrap();
        let front = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), &[1; 16]].concat();
        (Box::new(Block::new(file, *read_only).unwrap()), 0, front)
    });
}

#[test]
fn a_disk_is_as_large_afterwards_and_the_same_if_read_only() {
    let sector = prop_oneof![4 => 0..64_u64, 1 => select(vec![63, 64, 1 << 55, u64::MAX / 512, u64::MAX])];
    let inputs = (offers(), select(vec![0_u32, 1, 4, 11, 13]), sector, any::<bool>());
    hold(GUESTS, &inputs, |(offer, kind, sector, read_only): (Offer, u32, u64, bool)| {
        let file = TempFile::new().unwrap().into_file();
        let content = vec![7; 64 * 512];
        std::os::unix::fs::FileExt::write_all_at(&file, &content, 0).unwrap();
        let mut block = Block::new(file.try_clone().unwrap(), read_only).unwrap();
        let front = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), &[1; 16]].concat();
        serve(&mut block, 0, &front, &[offer], &Bounds { bytes: u64::from(u32::MAX), parts: Some(160) });
        assert_eq!(file.metadata().unwrap().len(), 64 * 512);
        if read_only {
            let mut after = vec![0; content.len()];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut after, 0).unwrap();
            assert!(after == content, "a read-only disk was written");
        }
    });
}

/// A FUSE request: its length, what it asks for, of which node.
fn fuse(len: u32, opcode: u32, node: u64) -> Vec<u8> {
    let numbers = [&len.to_le_bytes()[..], &opcode.to_le_bytes(), &[1; 8], &node.to_le_bytes()].concat();
    // User, group and process; then a name, or numbers, as one likes.
    [&numbers[..], &[0; 16], b"file\0\0\0\0", &[0; 40]].concat()
}

#[test]
fn shared_files_keep_to_what_they_are_lent() {
    let len = prop_oneof![3 => select(vec![40_u32, 44, 48, 56, 100]), 1 => any::<u32>()];
    let opcode = prop_oneof![8 => 1..53_u32, 1 => any::<u32>()];
    let node = prop_oneof![4 => Just(1), 1 => any::<u64>()];
    let directory = TempDir::new().unwrap();
    let root: PathBuf = directory.as_path().join("root");
    let bounds = Bounds { bytes: (1 << 20) + (64 << 10), parts: Some(1024) };
    for_each_guest(2, (len, opcode, node), &bounds, |(len, opcode, node)| {
        std::fs::create_dir_all(&root).unwrap();
        std::fs::write(root.join("file"), "content").unwrap();
        (Box::new(Fs::new("share", &root).unwrap()), 0, fuse(*len, *opcode, *node))
    });
}

#[test]
fn connections_keep_to_what_they_are_lent() {
    let op = prop_oneof![6 => 1..8_u16, 1 => any::<u16>()];
    let cid = |usual: u64| prop_oneof![9 => Just(usual), 1 => any::<u64>()];
    let port = prop_oneof![2 => 1023..1026_u32, 1 => any::<u32>()];
    let len = prop_oneof![3 => Just(0_u32), 3 => 0..600_u32, 1 => any::<u32>()];
    let credit = (any::<u32>(), any::<u32>());
    let header = (cid(3), cid(2), port.clone(), port, len, (select(vec![1_u16, 1, 1, 2, 0]), op), credit);
    let directory = TempDir::new().unwrap();
    let bounds = Bounds { bytes: 44 + (64 << 10), parts: None };
    for_each_guest(3, header, &bounds, |(from, to, port, peer, len, (kind, op), (room, read))| {
        let numbers = [&from.to_le_bytes()[..], &to.to_le_bytes(), &port.to_le_bytes(), &peer.to_le_bytes()];
        let more = [&len.to_le_bytes()[..], &kind.to_le_bytes(), &op.to_le_bytes(), &[0; 4]];
        let credit = [&room.to_le_bytes()[..], &read.to_le_bytes()];
        let front = [numbers.concat(), more.concat(), credit.concat()].concat();
        (Box::new(Vsock::new(3, directory.as_path().join("vsock")).unwrap()), 0, front)
    });
}

#[test]
fn frames_keep_to_what_they_are_lent() {
    /// Offloads and mergeable buffers, as `docs/network.md` has them.
    const FEATURES: u64 = 1 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12 | 1 << 15;
    let header = prop_oneof![1 => Just([0; 12]), 1 => any::<[u8; 12]>()];
    let bounds = Bounds { bytes: 12 + 65_562, parts: Some(64) };
    let mac: Mac = "02:00:00:00:00:01".parse().unwrap();
    let wires = Cell::new(None);
    for_each_guest(2, (header, any::<u64>(), 0..3_usize), &bounds, |(header, features, frames)| {
        let (near, far) = UnixDatagram::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        for _ in 0..*frames {
            far.send(&[0; 12 + 200]).unwrap();
        }
        wires.set(Some(far));
        let near: OwnedFd = near.into();
        let device = Net::over_socket(near, mac, Mtu::new(1500).unwrap()).unwrap();
        (Box::new(device), FEATURES & features, header.to_vec())
    });
}
