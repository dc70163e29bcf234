//! The address map: every fixed guest-physical address, I/O port and interrupt of the machine, in one place.
//!
//! ```text
//! 0x0000_0500  GDT                      0x0000_7000  boot parameters ("zero page")
//! 0x0000_9000  page tables (3 pages)    0x0002_0000  kernel command line
//! 0x0009_fc00  MP table (1 KiB)         0x0010_0000  memory for the kernel and everything else
//! 0xd000_0000  virtio-mmio slots, 4 KiB each: those of devices that are there from the start, then those of disks
//! 0xfec0_0000  IOAPIC                   0xfee0_0000  local APICs
//! 0xfffb_c000  KVM's identity map and TSS (3+1 pages; used by Intel real mode only)
//! 0x1_0000_0000  memory above the hole
//! ```
//! The same table for people, with reasons: `docs/memory-map.md`.

/// Global descriptor table: above the real-mode vectors and BIOS data, which the kernel may look at.
pub const GDT: u64 = 0x500;
/// `struct boot_params` (Documentation/arch/x86/zero-page.rst).
pub const ZERO_PAGE: u64 = 0x7000;
/// PML4, then one PDPT, then one page directory: identity map of the first GiB in 2 MiB pages.
pub const PML4: u64 = 0x9000;
pub const PDPT: u64 = 0xa000;
pub const PAGE_DIRECTORY: u64 = 0xb000;
/// Kernel command line, with room for the longest the kernel takes.
pub const CMDLINE: u64 = 0x2_0000;
/// `COMMAND_LINE_SIZE` of x86 Linux, final NUL included.
pub const CMDLINE_SIZE: usize = 2048;
/// Last KiB below 640 KiB, where the kernel looks for an MP floating pointer (MP specification 1.4, chapter 4).
pub const MP_TABLE: u64 = 0x9_fc00;
/// End of the low memory given to the kernel: the MP table is kept from it.
pub const LOW_MEMORY_END: u64 = MP_TABLE;
/// Start of high memory: 640 KiB to 1 MiB is never given to the kernel, as on a PC.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Start of the hole below 4 GiB: devices and interrupt controllers, never memory.
pub const HOLE_START: u64 = 0xd000_0000;
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Where the virtio-mmio slots begin, see [`virtio_slot`].
pub const VIRTIO_MMIO: u64 = HOLE_START;
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Interrupt of slot n is `VIRTIO_IRQ + n`: the ISA interrupts 0 to 4 have PC uses (timer, cascade, COM1).
pub const VIRTIO_IRQ: u32 = 5;
/// So many slots have an interrupt pin of the IOAPIC of their own, up to the last ISA interrupt.
pub const VIRTIO_SLOTS: u32 = 11;
/// So many slots more are for disks that come while the guest runs. They share one interrupt: virtio-mmio drivers do.
pub const DISK_SLOTS: u32 = 16;

/// Address of a virtio-mmio slot.
#[must_use]
pub const fn virtio_slot(slot: u32) -> u64 {
    VIRTIO_MMIO + slot as u64 * VIRTIO_MMIO_SIZE
}

pub const IOAPIC: u32 = 0xfec0_0000;
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// KVM keeps a page table for real mode here; anywhere in the hole will do.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// KVM's task state segment, three pages.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Interrupt mask of the first PIC (8259A data sheet, OCW1).
pub const PIC_MASK: u16 = 0x21;

/// COM1, with `console` only.
pub const COM1: u16 = 0x3f8;
pub const COM1_SIZE: u16 = 8;
pub const COM1_IRQ: u32 = 4;
/// Reset Control Register of PC chipsets: what `reboot=p` makes the kernel write.
pub const RESET_CONTROL: u16 = 0xcf9;
