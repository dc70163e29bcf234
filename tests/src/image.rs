//! Kernels made of a few bytes, and additions to an initramfs.

/// Physical address the tiny kernels are linked to.
const LOAD: u64 = 0x10_0000;
const ELF_HEADER: u16 = 64;
const PROGRAM_HEADER: u16 = 56;

/// `lidt` of an empty table, then `int3`: no handler, no double fault handler, a triple fault.
pub const TRIPLE_FAULT: &[u8] = &[
    0x0f, 0x01, 0x1d, 0x01, 0x00, 0x00, 0x00, // lidt [rip + 1]
    0xcc, // int3
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // limit 0, base 0
];
/// `cli; hlt`: no interrupt will ever wake it.
pub const HALT: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];
/// `jmp .`: burns CPU for ever.
pub const SPIN: &[u8] = &[0xeb, 0xfe];
/// Writes 0x0e to the Reset Control Register (`mov dx, 0xcf9; mov al, 0x0e; out dx, al`).
pub const RESET: &[u8] = &[0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x0e, 0xee, 0xf4];

/// An ELF file of `class` (1: 32 bit, 2: 64 bit) with one segment of `memory_size` bytes that starts with `code`.
#[must_use]
pub fn elf(class: u8, code: &[u8], memory_size: u64) -> Vec<u8> {
    let mut file = vec![0x7f, b'E', b'L', b'F', class, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let offset = u64::from(ELF_HEADER + PROGRAM_HEADER);
    file.extend(2_u16.to_le_bytes()); // executable
    file.extend(62_u16.to_le_bytes()); // x86-64
    file.extend(1_u32.to_le_bytes());
    file.extend(LOAD.to_le_bytes()); // entry
    file.extend(u64::from(ELF_HEADER).to_le_bytes()); // program headers
    file.extend(0_u64.to_le_bytes()); // section headers
    file.extend(0_u32.to_le_bytes());
    for value in [ELF_HEADER, PROGRAM_HEADER, 1, 0, 0, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes()); // PT_LOAD
    file.extend(7_u32.to_le_bytes()); // rwx
    for value in [offset, LOAD, LOAD, code.len() as u64, memory_size, 0x1000] {
        file.extend(value.to_le_bytes());
    }
    file.extend_from_slice(code);
    file
}

/// A cpio archive (newc) with one file; Linux unpacks archives that follow each other.
#[must_use]
pub fn cpio(name: &str, content: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, mode, content) in [(name, 0o100_644, content), ("TRAILER!!!", 0, &[][..])] {
        let fields =
            [1, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0].map(|v| format!("{v:08x}"));
        archive.extend(format!("070701{}{name}\0", fields.concat()).bytes());
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}
