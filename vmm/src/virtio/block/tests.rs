use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::testing::{self, NEXT, WRITE};

type Mock<'m> = MockSplitQueue<'m, GuestMemoryMmap>;

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x11_0000;
const STATUS: u64 = 0x12_0000;
const SECTORS: u64 = 64;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

/// What no device writes.
const UNTOUCHED: u8 = 0xee;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> RawDescriptor {
    Descriptor::new(addr, len, flags, next).into()
}

/// A disk of [`SECTORS`] sectors, each full of its number, and its guest.
struct Guest {
    memory: GuestMemoryMmap,
    file: File,
    read_only: bool,
    features: u64,
}

impl Guest {
    fn new() -> Self {
        let file = TempFile::new().unwrap().into_file();
        let content: Vec<u8> =
            (0..SECTORS * 512).map(|at| u8::try_from(at / 512).unwrap()).chain(*b"no sector").collect();
        std::os::unix::fs::FileExt::write_all_at(&file, &content, 0).unwrap();
        Self { memory: testing::memory(4), file, read_only: false, features: 1 << VIRTIO_BLK_F_FLUSH }
    }

    fn read_only() -> Self {
        Self { read_only: true, ..Self::new() }
    }

    fn worker(&self, mock: &Mock<'_>) -> (Box<dyn Worker>, EventFd, EventFd) {
        let (interrupt, irq) = testing::interrupt();
        let (queue, kick) = testing::live_queue(&self.memory, mock, &interrupt);
        let features = self.features;
        let activation = Activation { memory: self.memory.clone(), features, queues: vec![queue], interrupt };
        let mut block = Block::new(self.file.try_clone().unwrap(), self.read_only).unwrap();
        (block.activate(activation).unwrap(), kick, irq)
    }

    fn put_header(&self, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
    }

    /// One request with a header, data of `len` bytes that have `flags`, and a status byte; gives the status and the used
    /// length.
    fn ask(&self, kind: u32, sector: u64, (len, flags): (u32, u16)) -> (u8, u32) {
        self.put_header(kind, sector);
        let mock = Mock::new(&self.memory, 16);
        let chain = [
            descriptor(HEADER, 16, NEXT, 1),
            descriptor(DATA, len, flags | NEXT, 2),
            descriptor(STATUS, 1, WRITE, 0),
        ];
        // Without data there are two descriptors.
        let whole = if len == 0 { vec![descriptor(HEADER, 16, NEXT, 1), chain[2]] } else { chain.to_vec() };
        mock.build_desc_chain(&whole).unwrap();
        let (mut worker, _kick, irq) = self.worker(&mock);
        worker.run().unwrap();
        assert_eq!(irq.read().unwrap(), 1);
        assert_eq!(u16::from_le(mock.used().idx().load()), 1);
        (
            self.memory.read_obj(GuestAddress(STATUS)).unwrap(),
            mock.used().ring().ref_at(0).unwrap().load().len(),
        )
    }

    /// A discard or zeroing.
    fn change(&self, kind: u32, (sector, sectors, flags): (u64, u32, u32)) -> u8 {
        self.memory.write_obj(sector, GuestAddress(DATA)).unwrap();
        self.memory.write_obj(sectors, GuestAddress(DATA + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(DATA + 12)).unwrap();
        self.ask(kind, 0, (16, 0)).0
    }

    fn fill(&self, byte: u8, len: usize) {
        self.memory.write_slice(&vec![byte; len], GuestAddress(DATA)).unwrap();
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        data
    }

    fn content(&self) -> Vec<u8> {
        let mut content = Vec::new();
        File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
            .unwrap()
            .read_to_end(&mut content)
            .unwrap();
        content
    }

    /// What becomes of a chain that is no request.
    fn breaks(&self, chain: &[RawDescriptor]) -> DeviceError {
        let mock = Mock::new(&self.memory, 16);
        mock.add_desc_chains(chain, 0).unwrap();
        let (mut worker, ..) = self.worker(&mock);
        worker.run().unwrap_err()
    }
}

#[test]
fn sectors_are_read_and_written_where_they_lie() {
    let guest = Guest::new();
    assert_eq!(guest.ask(IN, 5, (1024, WRITE)), (OK, 1025));
    assert_eq!(guest.data(1024), [vec![5; 512], vec![6; 512]].concat());
    guest.fill(0xab, 512);
    assert_eq!(guest.ask(OUT, 63, (512, 0)), (OK, 1));
    assert_eq!(guest.ask(FLUSH, 0, (0, 0)), (OK, 1));
    let content = guest.content();
    assert_eq!((content[62 * 512], content[63 * 512], content[64 * 512 - 1]), (62, 0xab, 0xab));
    assert!(content.ends_with(b"no sector"));
}

#[test]
fn nothing_beyond_the_disk_is_touched() {
    let guest = Guest::new();
    let before = guest.content();
    let beyond = u64::MAX / 512;
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (beyond, 512),
        (beyond + 1, 512),
        (1 << 55, 512),
        (1 << 63, 512),
        (0, 511),
        (0, 1),
        (0, 513),
    ] {
        for (kind, flags) in [(IN, WRITE), (OUT, 0)] {
            assert_eq!(guest.ask(kind, sector, (len, flags)), (IO_ERROR, 1), "{kind} {sector} {len}");
        }
    }
    assert_eq!(guest.content(), before);
}

#[test]
fn what_is_read_only_stays_as_it_is() {
    let guest = Guest::read_only();
    let before = guest.content();
    assert_eq!(guest.ask(OUT, 0, (512, 0)).0, IO_ERROR);
    assert_eq!(guest.change(DISCARD, (0, 1, 0)), IO_ERROR);
    assert_eq!(guest.change(ZEROES, (0, 1, 1)), IO_ERROR);
    assert_eq!(guest.ask(FLUSH, 0, (0, 0)).0, OK);
    assert_eq!(guest.ask(IN, 1, (512, WRITE)).0, OK);
    assert_eq!(guest.content(), before);
}

#[test]
fn room_is_given_back_and_zeroed_within_limits() {
    let guest = Guest::new();
    assert_eq!(guest.change(DISCARD, (8, 8, 0)), OK);
    assert!(guest.content()[8 * 512..16 * 512].iter().all(|byte| *byte == 0));
    assert_eq!(guest.change(ZEROES, (16, 1, 1)), OK);
    assert_eq!(
        guest.content()[16 * 512 - 1..17 * 512 + 1].iter().map(|byte| u64::from(*byte)).sum::<u64>(),
        17
    );
    // File systems differ in whether they can zero without giving room back.
    assert!([OK, UNSUPPORTED].contains(&guest.change(ZEROES, (17, 1, 0))));
    assert_eq!(guest.change(DISCARD, (3, 0, 0)), OK);
    let before = guest.content();
    for (wanted, status) in [
        ((SECTORS, 1, 0), IO_ERROR),
        ((SECTORS - 1, 2, 0), IO_ERROR),
        ((u64::MAX, 1, 0), IO_ERROR),
        ((0, u32::MAX, 0), IO_ERROR),
        ((0, 1, 2), UNSUPPORTED),
    ] {
        assert_eq!(guest.change(DISCARD, wanted), status, "{wanted:?}");
        assert_eq!(guest.change(ZEROES, wanted), status, "{wanted:?}");
    }
    assert_eq!(guest.change(DISCARD, (0, 1, 1)), UNSUPPORTED);
    for len in [15, 17, 32] {
        assert_eq!(guest.ask(DISCARD, 0, (len, 0)).0, IO_ERROR, "{len}");
    }
    assert_eq!(guest.ask(ZEROES, 0, (0, 0)).0, IO_ERROR);
    assert_eq!((guest.content(), guest.file.metadata().unwrap().size()), (before, SECTORS * 512 + 9));
}

#[test]
fn unknown_requests_are_answered_so() {
    let guest = Guest::new();
    for kind in [2, 8, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(guest.ask(kind, 0, (512, WRITE)), (UNSUPPORTED, 1), "{kind}");
    }
}

/// 2.7.4: what a driver cuts up is the same as what it leaves whole.
#[test]
fn requests_may_be_cut_anywhere() {
    let guest = Guest::new();
    guest.put_header(IN, 7);
    let mock = Mock::new(&guest.memory, 16);
    // The last byte of what can be written is the status, here in one piece with data.
    let chain = [
        descriptor(HEADER, 3, NEXT, 1),
        descriptor(HEADER + 3, 13, NEXT, 2),
        descriptor(DATA, 100, WRITE | NEXT, 3),
        descriptor(DATA + 100, 413, WRITE, 0),
    ];
    mock.build_desc_chain(&chain).unwrap();
    let (mut worker, ..) = guest.worker(&mock);
    worker.run().unwrap();
    assert_eq!(guest.data(513), [vec![7; 512], vec![OK]].concat());
    // Header and data in one piece.
    guest.memory.write_slice(&[0xcd; 512], GuestAddress(HEADER + 16)).unwrap();
    guest.put_header(OUT, 9);
    let mock = Mock::new(&guest.memory, 16);
    mock.build_desc_chain(&[descriptor(HEADER, 528, NEXT, 1), descriptor(STATUS, 1, WRITE, 0)]).unwrap();
    let (mut worker, ..) = guest.worker(&mock);
    worker.run().unwrap();
    assert_eq!(guest.content()[9 * 512 - 1..10 * 512 + 1], [vec![8], vec![0xcd; 512], vec![10]].concat());
}

#[test]
fn what_is_no_request_costs_the_device() {
    let guest = Guest::new();
    let before = guest.content();
    guest.put_header(OUT, 0);
    let header = descriptor(HEADER, 16, NEXT, 1);
    for chain in [
        vec![descriptor(HEADER, 16, 0, 0)],
        vec![descriptor(HEADER, 15, NEXT, 1), descriptor(STATUS, 1, WRITE, 0)],
        vec![descriptor(STATUS, 1, WRITE, 0)],
        vec![descriptor(STATUS, 1, WRITE | NEXT, 1), descriptor(HEADER, 16, 0, 0)],
        vec![header, descriptor(STATUS, 0, WRITE, 0)],
        // Chains that lead to themselves.
        vec![header, descriptor(DATA, 512, NEXT, 1)],
        vec![header, descriptor(DATA, 512, WRITE | NEXT, 1)],
    ] {
        assert!(matches!(guest.breaks(&chain), DeviceError::BadChain(_)), "{chain:?}");
    }
    for (at, len) in
        [(u64::MAX, 1), (u64::MAX - 8, 16), (4 << 20, 1), ((4 << 20) - 1, 2), (1 << 63, u32::MAX)]
    {
        for chain in [
            vec![descriptor(at, len, NEXT, 1), descriptor(STATUS, 1, WRITE, 0)],
            vec![header, descriptor(at, len, NEXT, 2), descriptor(STATUS, 1, WRITE, 0)],
            vec![header, descriptor(at, len, WRITE | NEXT, 2), descriptor(STATUS, 1, WRITE, 0)],
            vec![header, descriptor(at, len, WRITE, 0)],
        ] {
            assert!(!matches!(guest.breaks(&chain), DeviceError::Host(_)), "{chain:?}");
        }
    }
    assert_eq!(guest.content(), before);
}

#[test]
fn long_indirect_table_costs_the_device() {
    let guest = Guest::new();
    guest.put_header(OUT, 0);
    for (flags, parts) in [(WRITE, 161), (0, 161), (0, 65_535)] {
        let table = testing::indirect_table(&guest.memory, (HEADER, 16, flags), parts);
        assert!(matches!(guest.breaks(&[table]), DeviceError::BadChain(_)), "{flags} {parts}");
    }
}

/// A file that is cut while the guest has it, or that cannot be written, is an error of the request alone.
#[test]
fn failures_of_the_file_are_told_to_the_guest() {
    let guest = Guest::new();
    guest.file.set_len(10 * 512).unwrap();
    let mock = Mock::new(&guest.memory, 16);
    let block = Block::new(guest.file.try_clone().unwrap(), false).unwrap();
    guest.file.set_len(512).unwrap();
    guest.put_header(IN, 4);
    let chain = [
        descriptor(HEADER, 16, NEXT, 1),
        descriptor(DATA, 512, WRITE | NEXT, 2),
        descriptor(STATUS, 1, WRITE, 0),
    ];
    mock.build_desc_chain(&chain).unwrap();
    let (interrupt, _irq) = testing::interrupt();
    let (queue, _kick) = testing::live_queue(&guest.memory, &mock, &interrupt);
    let activation = Activation { memory: guest.memory.clone(), features: 0, queues: vec![queue], interrupt };
    let mut block = block;
    block.activate(activation).unwrap().run().unwrap();
    assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), IO_ERROR);
    let unwritable = File::open(format!("/proc/self/fd/{}", guest.file.as_raw_fd())).unwrap();
    let guest = Guest { file: unwritable, ..guest };
    assert_eq!(guest.ask(OUT, 0, (512, 0)).0, IO_ERROR);
}

#[test]
fn many_requests_are_served_in_turns_and_none_is_lost() {
    let guest = Guest::new();
    guest.put_header(IN, 1);
    let mock = Mock::new(&guest.memory, 64);
    let chains: Vec<_> = (0..10)
        .flat_map(|chain| {
            let next = chain * 2 + 1;
            [descriptor(HEADER, 16, NEXT, next), descriptor(DATA, 513, WRITE, 0)]
        })
        .collect();
    mock.add_desc_chains(&chains, 0).unwrap();
    let (mut worker, kick, _irq) = guest.worker(&mock);
    kick.write(1).unwrap();
    worker.run().unwrap();
    assert_eq!(u16::from_le(mock.used().idx().load()), 8);
    assert_eq!(kick.read().unwrap(), 1, "the kick asks for another run");
    worker.run().unwrap();
    assert_eq!(u16::from_le(mock.used().idx().load()), 10);
    assert!(kick.read().is_err());
}

#[test]
fn configuration_says_what_the_disk_is() {
    let guest = Guest::new();
    let writable = Block::new(guest.file.try_clone().unwrap(), false).unwrap();
    let read_only = Block::new(guest.file.try_clone().unwrap(), true).unwrap();
    let word = |block: &Block, at: u64| {
        let mut word = [0; 4];
        block.read_config(at, &mut word);
        u32::from_le_bytes(word)
    };
    assert_eq!((word(&writable, 0), word(&writable, 4), word(&writable, 12)), (64, 0, 126));
    assert_eq!((word(&writable, 36), word(&writable, 48), word(&writable, 56)), (1 << 21, 1 << 16, 1));
    assert_eq!((word(&read_only, 0), word(&read_only, 36), word(&read_only, 60)), (64, 0, 0));
    assert_eq!(word(&writable, u64::MAX), 0);
    let has = |block: &Block, bit: u32| block.features() >> bit & 1 == 1;
    assert!(has(&read_only, VIRTIO_BLK_F_RO) && !has(&read_only, VIRTIO_BLK_F_DISCARD));
    assert!(has(&writable, VIRTIO_BLK_F_DISCARD) && !has(&writable, VIRTIO_BLK_F_RO));
    let (pipe, _end) = nix::unistd::pipe().unwrap();
    assert!(Block::new(pipe.into(), true).is_err());
}

/// Extents against arithmetic that cannot overflow: what is done is within the disk, and nothing beside it changes.
#[test]
fn extents_are_done_within_the_disk_or_not_at_all() {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::backing::{Extent, SECTOR};

    const SIZE: u64 = SECTORS * SECTOR;
    let sector = prop_oneof![
        4 => 0..SECTORS + 2,
        1 => select(vec![u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 54, i64::MAX as u64 / 512 + 1]),
        1 => any::<u64>(),
    ];
    let sectors = prop_oneof![4 => 0..10_u32, 1 => select(vec![1 << 16, (1 << 16) + 1, 1 << 21, (1 << 21) + 1]), 1 => any::<u32>()];
    crate::testing::properties::hold(600, &(sector, sectors, 0..4_u8), |(sector, sectors, how)| {
        let guest = Guest::new();
        let backing = Backing::new(guest.file.try_clone().unwrap(), how == 3).unwrap();
        let extent = Extent { sector, sectors };
        let (outcome, most) = match how {
            0 => (backing.discard(extent), MAX_DISCARD),
            1 => (backing.zero(extent, false), MAX_ZEROES),
            _ => (backing.zero(extent, true), MAX_ZEROES),
        };
        let (begin, end) = (u128::from(sector) * 512, (u128::from(sector) + u128::from(sectors)) * 512);
        let can_be = how != 3 && sectors <= most && end <= u128::from(SIZE);
        match outcome {
            Ok(()) => assert!(can_be, "{extent:?}"),
            Err(backing::Failure::Refused) => assert!(!can_be, "{extent:?}"),
            // Not all file systems have it.
            Err(backing::Failure::Unsupported) => assert!(can_be && sectors > 0),
            Err(failure) => panic!("{failure}"),
        }
        let mut after = Vec::new();
        std::io::Seek::rewind(&mut &guest.file).unwrap();
        (&guest.file).read_to_end(&mut after).unwrap();
        assert_eq!(after.len() as u64, SIZE + 9);
        for (at, byte) in (0..).zip(&after[..usize::try_from(SIZE).unwrap()]) {
            let cleared = *byte != u8::try_from(at / 512).unwrap();
            assert!(!cleared || (can_be && (begin..end).contains(&at)), "{at} of {extent:?}");
        }
    });
}

/// As above, on a disk on which the caps are what is in the way.
#[test]
fn extents_are_no_longer_than_their_caps() {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::backing::Extent;

    const SIZE: u64 = 4 << 30;
    let file = TempFile::new().unwrap().into_file();
    file.set_len(SIZE).unwrap();
    let backing = Backing::new(file, false).unwrap();
    let caps = [
        0,
        1,
        MAX_ZEROES - 1,
        MAX_ZEROES,
        MAX_ZEROES + 1,
        MAX_DISCARD - 1,
        MAX_DISCARD,
        MAX_DISCARD + 1,
        u32::MAX,
    ];
    let sector = prop_oneof![
        0..SIZE / 512 + 2,
        select(vec![0, SIZE / 512 - 1, SIZE / 512, SIZE / 512 - u64::from(MAX_DISCARD)])
    ];
    let inputs = (sector, select(caps.to_vec()), any::<bool>());
    crate::testing::properties::hold(600, &inputs, |(sector, sectors, discard)| {
        let extent = Extent { sector, sectors };
        let most = if discard { MAX_DISCARD } else { MAX_ZEROES };
        let outcome = if discard { backing.discard(extent) } else { backing.zero(extent, true) };
        let can_be = sectors <= most && (sector + u64::from(sectors)) * 512 <= SIZE;
        assert_eq!(!matches!(outcome, Err(backing::Failure::Refused)), can_be, "{extent:?}, {outcome:?}");
    });
}
