//! Where things lie in guest memory, for every size that it may have: nothing over another, nothing in the hole.

use std::cell::Cell;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::Path;

use linux_loader::bootparam::boot_params;
use linux_loader::cmdline::Cmdline;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::tempfile::TempFile;

use super::kernel::{self, Kernel};
use super::{boot, layout, mptable, regs};
use crate::config::{MemorySize, VcpuCount};
use crate::memory::regions;
use crate::sys::PAGE_SIZE;
use crate::testing::properties::hold;

const IMAGES: u32 = 1500;
const INITRAMFS: u32 = 300;
const MIB: u64 = 1 << 20;

/// Memory of `bytes`, as a guest has it. Only what is touched is there.
fn memory(bytes: u64) -> GuestMemoryMmap {
    let low = bytes.min(layout::HOLE_START);
    let high = (bytes > low).then(|| (layout::HOLE_END, bytes - low));
    let ranges = [(0, low)].into_iter().chain(high);
    let ranges: Vec<_> =
        ranges.map(|(at, length)| (GuestAddress(at), usize::try_from(length).unwrap())).collect();
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

fn apart(mut ranges: Vec<(&str, Range<u64>)>) {
    ranges.sort_by_key(|(_, range)| range.start);
    for pair in ranges.windows(2) {
        assert!(pair[0].1.end <= pair[1].1.start, "{pair:x?}");
    }
}

#[test]
fn memory_of_every_size_is_whole_and_leaves_the_hole() {
    for mib in MemorySize::MIN_MIB..=MemorySize::MAX_MIB {
        let found = regions(MemorySize::from_mib(mib).unwrap());
        let (first, rest) = found.split_first().unwrap();
        assert!(first.0 == 0 && first.1 <= layout::HOLE_START, "{mib} MiB: {found:x?}");
        // Nothing above before all below is used.
        assert!(rest.is_empty() || first.1 == layout::HOLE_START, "{mib} MiB: {found:x?}");
        assert!(rest.len() <= 1 && rest.iter().all(|high| high.0 == layout::HOLE_END && high.1 > 0));
        assert_eq!(found.iter().map(|region| region.1).sum::<u64>(), mib * MIB);
    }
}

#[test]
fn what_is_fixed_lies_apart() {
    let of = |at: u64, length: u64| at..at + length;
    let mp_table = (1..=VcpuCount::MAX).map(|vcpus| {
        let irqs: Vec<u8> = (0..16).collect();
        mptable::build(u8::try_from(vcpus).unwrap(), &irqs).len() as u64
    });
    let mp_table = mp_table.max().unwrap();
    let mut low = vec![
        ("zero page", of(layout::ZERO_PAGE, size_of::<boot_params>() as u64)),
        ("command line", of(layout::CMDLINE, layout::CMDLINE_SIZE as u64)),
        ("MP table", of(layout::MP_TABLE, mp_table)),
        // The kernel's own: vectors and BIOS data below, video memory and ROMs above.
        ("real mode", 0..0x500),
        ("legacy", 0xa_0000..layout::HIGH_MEMORY),
    ];
    low.extend(regs::tables().map(|(at, table)| ("table", of(at, table.len() as u64))));
    assert!(low.iter().all(|(_, range)| range.end <= layout::HIGH_MEMORY));
    apart(low);
    let slots = layout::VIRTIO_SLOTS + layout::DISK_SLOTS;
    let mut high: Vec<_> =
        (0..slots).map(|slot| ("slot", of(layout::virtio_slot(slot), layout::VIRTIO_MMIO_SIZE))).collect();
    high.extend([
        ("IOAPIC", of(layout::IOAPIC.into(), 0x1000)),
        ("local APIC", of(layout::LOCAL_APIC.into(), 0x1000)),
        ("identity map", of(layout::KVM_IDENTITY_MAP, PAGE_SIZE)),
        ("TSS", of(layout::KVM_TSS, 3 * PAGE_SIZE)),
    ]);
    assert!(high.iter().all(|(_, range)| layout::HOLE_START <= range.start && range.end <= layout::HOLE_END));
    apart(high);
    const { assert!(layout::VIRTIO_IRQ + layout::VIRTIO_SLOTS <= 16, "interrupts of the ISA") };
}

/// Sizes of memory in pages around each boundary: the smallest, that of the hole, the end of 4 GiB.
fn sizes() -> impl Strategy<Value = u64> {
    let around = |at: u64| (0..9_u64).prop_map(move |pages| at - 4 * PAGE_SIZE + pages * PAGE_SIZE);
    prop_oneof![
        around(MemorySize::MIN_MIB * MIB),
        around(MemorySize::MIN_MIB * MIB + 2 * MIB),
        around(layout::HOLE_START),
        around(layout::HOLE_END),
        around(layout::HOLE_START + MIB),
    ]
}

/// A file of so many bytes, of which the last one is an `x`.
fn sparse(size: u64) -> File {
    let file = TempFile::new().unwrap().into_file();
    file.set_len(size).unwrap();
    if size > 0 {
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", size - 1).unwrap();
    }
    file
}

#[test]
fn an_initramfs_lies_between_the_kernel_and_the_end() {
    let placed = Cell::new(0);
    // By what is left between it and the kernel, in bytes, or else by its size.
    let room = prop_oneof![3 => -3 * 4096..3 * 4096_i64, 1 => Just(i64::MIN)];
    let inputs = (sizes(), prop_oneof![1..20_000_u64, Just(PAGE_SIZE), Just(1 << 40)], room);
    hold(INITRAMFS, &inputs, |(bytes, size, room)| {
        let memory = memory(bytes);
        let low_end = bytes.min(layout::HOLE_START);
        let kernel_end = match room {
            i64::MIN => 32 * MIB,
            room => low_end.saturating_sub(size + boot::BRK).saturating_add_signed(-room),
        };
        let file = sparse(size);
        let found = boot::load_initramfs_from(&memory, Path::new("test"), &file, kernel_end);
        let fits = low_end
            .checked_sub(size)
            .is_some_and(|at| at / 4096 * 4096 >= (kernel_end + boot::BRK).next_multiple_of(4096));
        assert_eq!(found.is_ok(), fits, "{size} bytes behind {kernel_end:#x} in {bytes:#x}");
        let Ok(initramfs) = found else { return };
        placed.set(placed.get() + 1);
        assert_eq!((initramfs.size, initramfs.address % PAGE_SIZE), (size, 0));
        let end = initramfs.address + initramfs.size;
        assert_eq!(initramfs.address, (kernel_end + boot::BRK).next_multiple_of(PAGE_SIZE));
        assert!(end <= low_end);
        let last: u8 = memory.read_obj(GuestAddress(end - 1)).unwrap();
        assert_eq!(last, b'x');
        // The zero page has them in 32 bits, and the map of memory has no byte of the hole or of what is fixed.
        let kernel = Kernel { entry: kernel_end, end: kernel_end, setup_header: None };
        let mut cmdline = Cmdline::new(layout::CMDLINE_SIZE).unwrap();
        cmdline.insert_str("x".repeat(1000)).unwrap();
        let hardware = boot::Hardware { vcpus: 8, irqs: &[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15] };
        boot::write_tables(&memory, &kernel, initramfs, &cmdline, hardware).unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
        assert_eq!(u64::from(params.hdr.ramdisk_image), initramfs.address);
        assert_eq!(u64::from(params.hdr.ramdisk_size), size);
        let map = (0..usize::from(params.e820_entries)).map(|entry| {
            let entry = params.e820_table[entry];
            assert_eq!({ entry.type_ }, 1);
            entry.addr..entry.addr + entry.size
        });
        let map: Vec<_> = map.collect();
        let hidden = layout::HIGH_MEMORY - layout::LOW_MEMORY_END;
        assert_eq!(map.iter().map(|range| range.end - range.start).sum::<u64>(), bytes - hidden);
        let mut ranges: Vec<_> = map.into_iter().map(|range| ("memory", range)).collect();
        ranges.extend([
            ("what is fixed", layout::MP_TABLE..layout::HIGH_MEMORY),
            ("hole", layout::HOLE_START..layout::HOLE_END),
        ]);
        apart(ranges);
    });
    assert!(placed.get() > 50, "{} fitted", placed.get());
}

/// Segments with numbers of all kinds: offset, address, size in the file and in memory, writable.
type Segment = (u64, u64, u64, u64, bool);

fn segment() -> impl Strategy<Value = Segment> {
    let odd =
        || select(vec![0, 1, u64::MAX, u64::MAX - 4095, 1 << 63, 1 << 32, 1 << 40, layout::HOLE_START, MIB]);
    let offset = prop_oneof![6 => (0..4_u64).prop_map(|page| page * 4096), 2 => 0..0x4000_u64, 1 => odd()];
    let near = [MIB, 16 * MIB, 48 * MIB, 48 * MIB - 0x2000, 48 * MIB - 0x1000, layout::HOLE_START - 0x2000];
    let address = prop_oneof![6 => select(near.to_vec()), 2 => MIB - 2..MIB + 0x4000, 1 => odd()];
    let size = || prop_oneof![9 => 0..0x1100_u64, 1 => odd()];
    // As a rule a segment has in memory what it has in the file, and more.
    let both = prop_oneof![
        6 => (size(), 0..0x1000_u64).prop_map(|(size, more)| (size, size.saturating_add(more))),
        1 => (size(), size()),
    ];
    (offset, address, both, any::<bool>())
        .prop_map(|(offset, address, both, writable)| (offset, address, both.0, both.1, writable))
}

fn elf(entry: u64, segments: &[Segment]) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend([2_u16.to_le_bytes(), 62_u16.to_le_bytes()].concat());
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend([entry, 64, 0].map(u64::to_le_bytes).concat());
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend([64, 56, u16::try_from(segments.len()).unwrap(), 0, 0, 0].map(u16::to_le_bytes).concat());
    for (offset, address, in_file, in_memory, writable) in segments {
        bytes.extend([1_u32, if *writable { 6 } else { 5 }].map(u32::to_le_bytes).concat());
        bytes
            .extend([*offset, *address, *address, *in_file, *in_memory, 4096].map(u64::to_le_bytes).concat());
    }
    bytes.resize(0x4000, 0xc3);
    bytes
}

#[test]
fn a_kernel_lies_within_memory_or_is_refused() {
    let loaded = Cell::new(0);
    let sizes = prop_oneof![3 => Just(48 * MIB), 1 => sizes()];
    let entry = prop_oneof![6 => 0..2_usize, 1 => Just(usize::MAX)];
    hold(IMAGES, &(sizes, vec(segment(), 1..4), entry, 0..0x800_u64), |(bytes, segments, entry, into)| {
        let memory = memory(bytes);
        let low_end = bytes.min(layout::HOLE_START);
        let entry = segments.get(entry).map_or(into, |segment| segment.1.saturating_add(into));
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(&elf(entry, &segments)).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let found = kernel::load_from(&memory, Path::new("test"), file);
        let real = |segment: &&Segment| segment.3 > 0;
        let fits = |(offset, address, in_file, in_memory, _): &Segment| {
            let (offset, address, in_file) =
                (u128::from(*offset), u128::from(*address), u128::from(*in_file));
            let end = address + u128::from(*in_memory);
            offset + in_file <= 0x4000
                && in_file <= u128::from(*in_memory)
                && address >= u128::from(layout::HIGH_MEMORY)
                && end <= u128::from(low_end)
        };
        let holds_entry = |segment: &Segment| entry.checked_sub(segment.1).is_some_and(|at| at < segment.2);
        let can_be = segments.iter().filter(real).count() > 0
            && segments.iter().filter(real).all(fits)
            && segments.iter().filter(real).any(holds_entry);
        assert_eq!(found.is_ok(), can_be, "{segments:x?} from {entry:#x} in {bytes:#x}: {:?}", found.err());
        let Ok(kernel) = found else { return };
        loaded.set(loaded.get() + 1);
        assert_eq!(kernel.entry, entry);
        assert_eq!(Some(kernel.end), segments.iter().filter(real).map(|segment| segment.1 + segment.3).max());
        let first: u8 = memory.read_obj(GuestAddress(layout::HIGH_MEMORY - 1)).unwrap();
        let behind = memory.read_obj::<u8>(GuestAddress(kernel.end)).unwrap_or(0);
        assert_eq!((first, behind), (0, 0), "nothing is put beside it");
    });
    assert!(loaded.get() > 50, "{} were loaded", loaded.get());
}
