//! The MP table (Intel MultiProcessor Specification 1.4): how a kernel without ACPI learns of its processors and
//! of the IOAPIC. About 400 bytes, parsed in microseconds; ACPI tables would cost the guest an interpreter.

use super::layout;

const SPEC_REVISION: u8 = 4;
const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT_PROCESSOR: u8 = 2;
const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
/// Version register of KVM's local APIC and IOAPIC (integrated APIC, 24 pins).
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
/// A kernel that finds a PIC dies without the timer's interrupt, whether it uses it or not.
const TIMER: u8 = 0;
const ISA_BUS: u8 = 0;
const ALL_LOCAL_APICS: u8 = 0xff;

/// The floating pointer followed by the configuration table, for [`layout::MP_TABLE`]. `irqs` are the interrupts in use, of
/// the first 16: each costs the kernel a descriptor and 7 files in sysfs.
#[must_use]
pub fn build(vcpus: u8, irqs: &[u8]) -> Vec<u8> {
    let ioapic_id = vcpus;
    let mut entries = Vec::with_capacity(384);
    let mut count: u16 = 0;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        let boot = if id == 0 { CPU_BOOT_PROCESSOR } else { 0 };
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[ENTRY_PROCESSOR, id, APIC_VERSION, CPU_ENABLED | boot]);
        entry(&processor);
    }
    entry(&[ENTRY_BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut ioapic = [ENTRY_IOAPIC, ioapic_id, IOAPIC_VERSION, 1, 0, 0, 0, 0];
    ioapic[4..].copy_from_slice(&layout::IOAPIC.to_le_bytes());
    entry(&ioapic);
    for irq in std::iter::once(TIMER).chain(irqs.iter().copied()) {
        entry(&[ENTRY_IO_INTERRUPT, INTERRUPT_VECTORED, 0, 0, ISA_BUS, irq, ioapic_id, irq]);
    }
    entry(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTINT, 0, 0, ISA_BUS, 0, 0, 0]);
    entry(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1]);

    let mut table = floating_pointer();
    table.extend(configuration(&entries, count));
    table
}

fn floating_pointer() -> Vec<u8> {
    const SIZE: u32 = 16;
    let table = u32::try_from(layout::MP_TABLE).unwrap_or(u32::MAX) + SIZE;
    let mut pointer = b"_MP_".to_vec();
    pointer.extend(table.to_le_bytes());
    // Length in 16-byte units, revision, checksum, and five feature bytes that are all zero.
    pointer.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer
}

fn configuration(entries: &[u8], count: u16) -> Vec<u8> {
    const HEADER: usize = 44;
    let length = u16::try_from(HEADER + entries.len()).unwrap_or(u16::MAX);
    let mut table = b"PCMP".to_vec();
    table.extend(length.to_le_bytes());
    table.extend([SPEC_REVISION, 0]);
    table.extend(b"KRX     MICROVM     ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(layout::LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend_from_slice(entries);
    table[7] = checksum(&table);
    table
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_zero_and_length_is_true() {
        for vcpus in 1..=8 {
            let table = build(vcpus, &[4, 5]);
            assert_eq!(checksum(&table[..16]), 0);
            assert_eq!(checksum(&table[16..]), 0);
            let length = u16::from_le_bytes([table[20], table[21]]);
            assert_eq!(usize::from(length), table.len() - 16);
        }
    }

    #[test]
    fn fits_below_640_kib() {
        assert!(layout::MP_TABLE + build(8, &[1; 15]).len() as u64 <= 0xa_0000);
    }

    #[test]
    fn entry_count_is_that_of_the_entries() {
        let table = build(4, &[5, 6]);
        assert_eq!(u16::from_le_bytes([table[16 + 34], table[16 + 35]]), 4 + 1 + 1 + 3 + 2);
    }
}
