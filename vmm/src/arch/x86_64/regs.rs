//! Registers for the 64-bit entry of the Linux boot protocol (Documentation/arch/x86/boot.rst, "64-bit Boot
//! Protocol"): long mode on, the first GiB mapped one to one, flat segments, boot parameters in RSI.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::layout;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const LARGE_PAGE: u64 = 1 << 7;
const LARGE_PAGE_SIZE: u64 = 2 << 20;
/// RFLAGS bit 1 is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// `__BOOT_CS` and `__BOOT_DS` of the boot protocol, and a TSS, which VMX demands.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TSS: u16 = 0x20;
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TSS: u8 = 0xb;

/// General registers for an entry at `entry`.
#[must_use]
pub fn entry_regs(entry: u64) -> kvm_regs {
    kvm_regs { rip: entry, rsi: layout::ZERO_PAGE, rflags: RFLAGS_RESERVED, ..Default::default() }
}

/// Puts `sregs` into 64-bit mode on the tables of [`tables`].
pub fn enter_long_mode(sregs: &mut kvm_sregs) {
    let data = segment(BOOT_DS, TYPE_DATA);
    sregs.cs = kvm_segment { l: 1, db: 0, ..segment(BOOT_CS, TYPE_CODE) };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { s: 0, db: 0, g: 0, limit: 0x67, ..segment(BOOT_TSS, TYPE_TSS) };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = GDT_LIMIT;
    sregs.cr3 = layout::PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
}

fn segment(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    }
}

const GDT_ENTRIES: [u64; 6] = [
    0,
    0,
    // 0x10: 64-bit code; 0x18: data; 0x20: TSS of 16 bytes. Base 0; accessed bits set, as in the segments above.
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
    0,
];
#[expect(clippy::cast_possible_truncation, reason = "47 fits")]
const GDT_LIMIT: u16 = size_of_val(&GDT_ENTRIES) as u16 - 1;

/// The GDT and the three pages of the page tables, as `(address, bytes)` to be written to guest memory that is zero.
#[must_use]
pub fn tables() -> [(u64, Vec<u8>); 4] {
    let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let pages: Vec<u64> =
        (0..512).map(|page| (page * LARGE_PAGE_SIZE) | PRESENT | WRITABLE | LARGE_PAGE).collect();
    [
        (layout::GDT, bytes(&GDT_ENTRIES)),
        (layout::PML4, bytes(&[layout::PDPT | PRESENT | WRITABLE])),
        (layout::PDPT, bytes(&[layout::PAGE_DIRECTORY | PRESENT | WRITABLE])),
        (layout::PAGE_DIRECTORY, bytes(&pages)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_directory_maps_the_first_gib_one_to_one() {
        let [.., (address, pages)] = tables();
        assert_eq!((address, pages.len()), (layout::PAGE_DIRECTORY, 4096));
        assert_eq!(pages[..8], 0x83_u64.to_le_bytes());
        assert_eq!(pages[511 * 8..], (0x3fe0_0000_u64 | 0x83).to_le_bytes());
    }

    #[test]
    fn segments_agree_with_the_gdt() {
        let mut sregs = kvm_sregs::default();
        enter_long_mode(&mut sregs);
        assert_eq!(GDT_ENTRIES[usize::from(sregs.cs.selector / 8)] >> 53 & 1, u64::from(sregs.cs.l));
        assert_eq!(GDT_ENTRIES[usize::from(sregs.ds.selector / 8)] >> 40 & 0xf, u64::from(sregs.ds.type_));
        assert_eq!(sregs.efer & EFER_LMA, EFER_LMA);
    }
}
