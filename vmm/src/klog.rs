//! The guest kernel's log, taken out of guest memory when a boot has failed, and when somebody asks for it.
//!
//! A console costs an exit a character; the log itself is already in guest memory. This module finds Linux's printk
//! ring buffer through the symbol table of the kernel image and reads what is in it. Nothing is prepared for it beforehand.
//! A guest that runs meanwhile may change what is read: a record that was overwritten half way does not agree with itself.
//!
//! Layouts are those of `kernel/printk/printk_ringbuffer.h` of Linux 6.12 on x86-64, for a kernel that runs at the
//! addresses it was linked at (no KASLR). A kernel with another layout gives an error and not nonsense: a record
//! counts only where its identifier, state and sequence number agree. The module never writes to guest memory.
//!
//! All that is read was written by the guest: each count is capped, each pointer goes through the guest memory map,
//! no link is followed (records are visited by index), and the text leaves as printable ASCII.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Most text handed out, in bytes: what is said last is what explains a failure.
pub const MAX_LOG: usize = 64 << 10;

/// Most records visited: a guest may claim 2^32 descriptors and make every one of them empty. The guest kernel's own
/// ring of 64 KiB has 2,048.
const MAX_RECORDS: u64 = 16 << 10;
/// Most text taken from one record, `PRINTK_MESSAGE_MAX`: a guest may claim 64 KiB for each.
const MAX_TEXT: u64 = 2048;
/// Largest exponent of the ring's two sizes, so that a mask can be made of it; `LOG_BUF_SHIFT` ends at 25.
const MAX_SIZE_BITS: u32 = 30;
/// Most section headers looked at, and largest symbol or string table read, of a kernel image: bounds what a false
/// header makes the host allocate.
const MAX_SECTIONS: u16 = 4096;
const MAX_TABLE: u64 = 32 << 20;

/// `__START_KERNEL_map`: the kernel image's mapping of physical address 0.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// `__PAGE_OFFSET_BASE_L4`: the direct mapping of physical address 0, and its length of 64 TiB.
const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;
const DIRECT_MAP_SIZE: u64 = 64 << 40;

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum KlogError {
    #[error("The kernel image cannot be read again")]
    Image(#[source] io::Error),
    #[error("The kernel image has no symbols by which its log could be found")]
    NoSymbols,
    #[error("The log is not where the kernel image says, or damaged")]
    NoRing,
    #[error("The guest's kernel has logged nothing")]
    Empty,
}

/// The last [`MAX_LOG`] bytes of the log of the guest that ran `kernel` in `memory`, in lines of the form
/// `[    0.123456] text`. Bytes that are not printable ASCII appear as `\x1b`.
///
/// # Errors
/// [`KlogError`] when there is no log to be had.
pub fn read(memory: &GuestMemoryMmap, kernel: &Path) -> Result<String, KlogError> {
    read_from(memory, &File::open(kernel).map_err(KlogError::Image)?)
}

/// As [`read`], by an open kernel image.
///
/// # Errors
/// As [`read`].
pub fn read_from(memory: &GuestMemoryMmap, kernel: &File) -> Result<String, KlogError> {
    read_with(memory, &Symbols::of(kernel)?)
}

fn read_with(memory: &GuestMemoryMmap, symbols: &Symbols) -> Result<String, KlogError> {
    let pointed = symbols.pointer.and_then(|pointer| read_pointer(memory, pointer));
    let ring = [pointed, symbols.static_ring].into_iter().flatten().find_map(|address| {
        let ring = Ring::at(memory, address)?;
        ring.is_plausible().then_some(ring)
    });
    let text = ring.ok_or(KlogError::NoRing)?.text()?;
    if text.is_empty() { Err(KlogError::Empty) } else { Ok(text) }
}

/// Virtual addresses of the two variables of `kernel/printk/printk.c` that lead to the ring.
#[derive(Debug, Default, PartialEq, Eq)]
struct Symbols {
    /// `prb`: pointer to the ring in use; its initial value is right from the first instruction on.
    pointer: Option<u64>,
    /// `printk_rb_static`: the ring the pointer starts with.
    static_ring: Option<u64>,
}

/// Parts of the ELF-64 format (System V ABI, chapters 4 and 5) that lead to a symbol: few enough to need no crate.
mod elf {
    pub(super) const HEADER: usize = 64;
    pub(super) const MAGIC_64_LITTLE: &[u8] = b"\x7fELF\x02\x01";
    pub(super) const E_SHOFF: usize = 0x28;
    pub(super) const E_SHENTSIZE: usize = 0x3a;
    pub(super) const E_SHNUM: usize = 0x3c;

    pub(super) const SECTION: usize = 64;
    pub(super) const SH_TYPE: usize = 4;
    pub(super) const SH_OFFSET: usize = 0x18;
    pub(super) const SH_SIZE: usize = 0x20;
    pub(super) const SH_LINK: usize = 0x28;
    pub(super) const SHT_SYMTAB: u32 = 2;

    pub(super) const SYMBOL: usize = 24;
    pub(super) const ST_NAME: usize = 0;
    pub(super) const ST_VALUE: usize = 8;
}

impl Symbols {
    /// Reads the symbol table of an ELF image; any other image (a bzImage, a stripped kernel) has no symbols.
    fn of(image: &File) -> Result<Self, KlogError> {
        let mut header = [0; elf::HEADER];
        image.read_exact_at(&mut header, 0).map_err(|_| KlogError::NoSymbols)?;
        let count = u16_at(&header, elf::E_SHNUM);
        let entry = usize::from(u16_at(&header, elf::E_SHENTSIZE));
        if !header.starts_with(elf::MAGIC_64_LITTLE) || entry != elf::SECTION || count > MAX_SECTIONS {
            return Err(KlogError::NoSymbols);
        }
        let length = u64::from(count) * elf::SECTION as u64;
        let sections = table(image, u64_at(&header, elf::E_SHOFF), length)?;
        let sections: Vec<&[u8]> = sections.chunks_exact(elf::SECTION).collect();
        let body =
            |section: &[u8]| table(image, u64_at(section, elf::SH_OFFSET), u64_at(section, elf::SH_SIZE));

        let symtab = sections.iter().find(|section| u32_at(section, elf::SH_TYPE) == elf::SHT_SYMTAB);
        let symtab = symtab.ok_or(KlogError::NoSymbols)?;
        let strtab = sections.get(u32_at(symtab, elf::SH_LINK) as usize).ok_or(KlogError::NoSymbols)?;
        let found = Self::find(&body(symtab)?, &body(strtab)?);
        if found == Self::default() { Err(KlogError::NoSymbols) } else { Ok(found) }
    }

    fn find(symbols: &[u8], strings: &[u8]) -> Self {
        let mut found = Self::default();
        for symbol in symbols.chunks_exact(elf::SYMBOL) {
            let Some(name) = strings.get(u32_at(symbol, elf::ST_NAME) as usize..) else { continue };
            let value = Some(u64_at(symbol, elf::ST_VALUE));
            if name.starts_with(b"prb\0") {
                found.pointer = value;
            } else if name.starts_with(b"printk_rb_static\0") {
                found.static_ring = value;
            }
        }
        found
    }
}

fn table(image: &File, offset: u64, length: u64) -> Result<Vec<u8>, KlogError> {
    let length = usize::try_from(length.min(MAX_TABLE + 1)).unwrap_or(usize::MAX);
    if length as u64 > MAX_TABLE {
        return Err(KlogError::NoSymbols);
    }
    let mut bytes = vec![0; length];
    image.read_exact_at(&mut bytes, offset).map_err(KlogError::Image)?;
    Ok(bytes)
}

/// `struct printk_ringbuffer`, with its sizes checked and its pointers turned into physical addresses.
struct Ring<'a> {
    memory: &'a GuestMemoryMmap,
    /// Number of descriptors less one; a power of two less one.
    index_mask: u64,
    descriptors: u64,
    infos: u64,
    head_id: u64,
    tail_id: u64,
    /// Size of the text area less one; a power of two less one.
    text_mask: u64,
    text: u64,
}

/// `sizeof(struct printk_ringbuffer)` without its last member, `fail`.
const RING: usize = 80;
/// `struct prb_desc`: state, begin, next.
const DESCRIPTOR: usize = 24;
/// `struct printk_info`, of which the first 20 bytes are used: sequence number, time, length of text.
const INFO: usize = 88;
/// A text block starts with its descriptor's identifier.
const BLOCK_ID: u64 = 8;
/// The two highest bits of a descriptor's state word; the rest is its identifier.
const STATE_SHIFT: u32 = 62;
const ID_MASK: u64 = (1 << STATE_SHIFT) - 1;
/// States whose text is complete: `desc_committed`, which may grow, and `desc_finalized`.
const READABLE: [u64; 2] = [1, 2];
/// `EMPTY_LINE_LPOS`, as begin and as next: a line without text, which has no block.
const EMPTY_LINE: u64 = 3;

/// One log record, text as it was written by the guest.
struct Record {
    time_ns: u64,
    text: Vec<u8>,
}

impl<'a> Ring<'a> {
    fn at(memory: &'a GuestMemoryMmap, address: u64) -> Option<Self> {
        let ring: [u8; RING] = bytes_at(memory, physical(address)?)?;
        let mask = |bits: u32| (bits <= MAX_SIZE_BITS).then(|| (1_u64 << bits) - 1);
        Some(Self {
            memory,
            index_mask: mask(u32_at(&ring, 0))?,
            descriptors: physical(u64_at(&ring, 8))?,
            infos: physical(u64_at(&ring, 16))?,
            head_id: u64_at(&ring, 24) & ID_MASK,
            tail_id: u64_at(&ring, 32) & ID_MASK,
            text_mask: mask(u32_at(&ring, 48))?,
            text: physical(u64_at(&ring, 56))?,
        })
    }

    /// Whether head and tail are of one ring: at most its length apart. Zeroed memory is not a ring.
    fn is_plausible(&self) -> bool {
        let span = self.head_id.wrapping_sub(self.tail_id) & ID_MASK;
        self.index_mask != 0 && self.text_mask != 0 && span <= self.index_mask
    }

    /// Newest record first, until there is enough: then turned round.
    fn text(&self) -> Result<String, KlogError> {
        let span = (self.head_id.wrapping_sub(self.tail_id) & ID_MASK).min(MAX_RECORDS - 1);
        let mut newest_first = Vec::new();
        let (mut length, mut seen) = (0, false);
        for back in 0..=span {
            let id = self.head_id.wrapping_sub(back) & ID_MASK;
            seen |= self.descriptor(id).is_some();
            let Some(record) = self.record(id) else { continue };
            let lines = record.lines();
            length += lines.len();
            newest_first.push(lines);
            if length >= MAX_LOG {
                break;
            }
        }
        if !seen {
            return Err(KlogError::NoRing);
        }
        newest_first.reverse();
        Ok(last_lines(&newest_first.concat(), MAX_LOG).to_owned())
    }

    /// The descriptor in the slot of `id`, if it is that one's.
    fn descriptor(&self, id: u64) -> Option<[u8; DESCRIPTOR]> {
        let slot = self.descriptors.checked_add((id & self.index_mask) * DESCRIPTOR as u64)?;
        let descriptor: [u8; DESCRIPTOR] = bytes_at(self.memory, slot)?;
        (u64_at(&descriptor, 0) & ID_MASK == id).then_some(descriptor)
    }

    fn record(&self, id: u64) -> Option<Record> {
        let descriptor = self.descriptor(id)?;
        if !READABLE.contains(&(u64_at(&descriptor, 0) >> STATE_SHIFT)) {
            return None;
        }
        let slot = self.infos.checked_add((id & self.index_mask) * INFO as u64)?;
        let info: [u8; 24] = bytes_at(self.memory, slot)?;
        if u64_at(&info, 0) & self.index_mask != id & self.index_mask {
            return None;
        }
        let length = u64::from(u16_at(&info, 16));
        let text = self.block(u64_at(&descriptor, 8), u64_at(&descriptor, 16), length)?;
        Some(Record { time_ns: u64_at(&info, 8), text })
    }

    /// Text of the block between two logical positions, as `get_data()` of the kernel finds it: a block that would
    /// run over the end of the area starts at its beginning instead.
    fn block(&self, begin: u64, next: u64, length: u64) -> Option<Vec<u8>> {
        if (begin, next) == (EMPTY_LINE, EMPTY_LINE) {
            return Some(Vec::new());
        }
        if (begin | next) & (BLOCK_ID - 1) != 0 {
            return None;
        }
        let wrap = |position: u64| position & !self.text_mask;
        let (start, size) = if wrap(begin) == wrap(next) {
            (begin & self.text_mask, next.checked_sub(begin)?)
        } else if wrap(begin.wrapping_add(self.text_mask + 1)) == wrap(next) {
            (0, next & self.text_mask)
        } else {
            return None;
        };
        let length = usize::try_from(length.min(size.checked_sub(BLOCK_ID)?).min(MAX_TEXT)).ok()?;
        let mut text = vec![0; length];
        let address = self.text.checked_add(start + BLOCK_ID)?;
        self.memory.read_slice(&mut text, GuestAddress(address)).ok()?;
        Some(text)
    }
}

impl Record {
    /// Each line with the time in front, as `dmesg` prints a record of several lines.
    fn lines(&self) -> String {
        let (seconds, micros) = (self.time_ns / 1_000_000_000, self.time_ns / 1000 % 1_000_000);
        let text = self.text.strip_suffix(b"\n").unwrap_or(&self.text);
        let mut lines = String::new();
        for line in text.split(|byte| *byte == b'\n') {
            lines += &format!("[{seconds:5}.{micros:06}] ");
            for byte in line {
                match byte {
                    // A terminal obeys control characters, and bytes above ASCII may be some of those too. The
                    // backslash goes as well, so that what is escaped here cannot be forged.
                    b' '..=b'[' | b']'..=b'~' | b'\t' => lines.push(char::from(*byte)),
                    _ => lines += &format!("\\x{byte:02x}"),
                }
            }
            lines.push('\n');
        }
        lines
    }
}

/// The whole lines within the last `limit` bytes of `text`, which is ASCII.
fn last_lines(text: &str, limit: usize) -> &str {
    let Some(start) = text.len().checked_sub(limit).filter(|start| *start > 0) else { return text };
    let tail = text.get(start - 1..).unwrap_or_default();
    tail.split_once('\n').map_or("", |(_, whole)| whole)
}

fn read_pointer(memory: &GuestMemoryMmap, pointer: u64) -> Option<u64> {
    bytes_at(memory, physical(pointer)?).map(u64::from_le_bytes)
}

fn physical(address: u64) -> Option<u64> {
    let direct = || address.checked_sub(DIRECT_MAP).filter(|offset| *offset < DIRECT_MAP_SIZE);
    address.checked_sub(KERNEL_MAP).or_else(direct)
}

fn bytes_at<const N: usize>(memory: &GuestMemoryMmap, address: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    memory.read_slice(&mut bytes, GuestAddress(address)).ok()?;
    Some(bytes)
}

/// Little-endian fields of a structure already copied; the offsets are constants within it.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    array_at(bytes, at).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    array_at(bytes, at).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    array_at(bytes, at).map_or(0, u64::from_le_bytes)
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vmm_sys_util::tempfile::TempFile;

    use super::*;
    use crate::testing;

    const RING_AT: u64 = 0x1000;
    const POINTER_AT: u64 = 0x2000;
    const DESCRIPTORS_AT: u64 = 0x4000;
    const INFOS_AT: u64 = 0x8000;
    const TEXT_AT: u64 = 0x2_0000;
    /// 8 descriptors and 256 bytes of text.
    const COUNT_BITS: u32 = 3;
    const TEXT_BITS: u32 = 8;
    /// As the kernel starts: identifiers and positions that overflow soon.
    const FIRST_ID: u64 = ID_MASK - (1 << COUNT_BITS);
    const FIRST_POSITION: u64 = 0_u64.wrapping_sub(1 << TEXT_BITS);

    const SYMBOLS: Symbols =
        Symbols { pointer: Some(KERNEL_MAP + POINTER_AT), static_ring: Some(KERNEL_MAP + RING_AT) };

    /// The kernel's side: a ring in guest memory, written the way `prb_reserve()` and `prb_commit()` do.
    struct Kernel {
        memory: GuestMemoryMmap,
        head_id: u64,
        tail_id: u64,
        position: u64,
        sequence: u64,
    }

    impl Kernel {
        fn new() -> Self {
            let kernel = Self {
                memory: testing::memory(1),
                head_id: FIRST_ID,
                tail_id: FIRST_ID,
                position: FIRST_POSITION,
                sequence: 0,
            };
            kernel.put(POINTER_AT, KERNEL_MAP + RING_AT);
            kernel.put(RING_AT, u64::from(COUNT_BITS));
            kernel.put(RING_AT + 8, KERNEL_MAP + DESCRIPTORS_AT);
            kernel.put(RING_AT + 16, DIRECT_MAP + INFOS_AT);
            kernel.put(RING_AT + 48, u64::from(TEXT_BITS));
            kernel.put(RING_AT + 56, KERNEL_MAP + TEXT_AT);
            kernel.descriptor(FIRST_ID, 3, (1, 1));
            kernel.ids();
            kernel
        }

        fn put(&self, at: u64, value: u64) {
            self.memory.write_slice(&value.to_le_bytes(), GuestAddress(at)).unwrap();
        }

        fn ids(&self) {
            self.put(RING_AT + 24, self.head_id);
            self.put(RING_AT + 32, self.tail_id);
        }

        fn descriptor(&self, id: u64, state: u64, (begin, next): (u64, u64)) {
            let at = DESCRIPTORS_AT + (id & 7) * 24;
            self.put(at, state << STATE_SHIFT | id);
            self.put(at + 8, begin);
            self.put(at + 16, next);
        }

        fn print(&mut self, time_ns: u64, text: &[u8]) {
            let size = (text.len() as u64 + BLOCK_ID).next_multiple_of(BLOCK_ID);
            let (begin, mut next) = (self.position, self.position.wrapping_add(size));
            let mut at = begin & 0xff;
            if begin & !0xff != next & !0xff && next & 0xff != 0 {
                at = 0;
                next = (begin & !0xff).wrapping_add(0x100 + size);
            }
            self.head_id = (self.head_id + 1) & ID_MASK;
            if self.head_id.wrapping_sub(self.tail_id) & ID_MASK > 7 {
                self.tail_id = (self.tail_id + 1) & ID_MASK;
            }
            self.descriptor(self.head_id, 2, (begin, next));
            let info = INFOS_AT + (self.head_id & 7) * 88;
            self.put(info, self.sequence);
            self.put(info + 8, time_ns);
            self.put(info + 16, text.len() as u64);
            self.memory.write_slice(text, GuestAddress(TEXT_AT + at + BLOCK_ID)).unwrap();
            (self.position, self.sequence) = (next, self.sequence + 1);
            self.ids();
        }

        fn log(&self) -> Result<String, KlogError> {
            read_with(&self.memory, &SYMBOLS)
        }
    }

    #[test]
    fn records_come_in_order_with_their_times() {
        let mut kernel = Kernel::new();
        kernel.print(0, b"Linux version 6.12");
        kernel.print(1_234_567_891, b"two\nlines\n");
        assert_eq!(
            kernel.log().unwrap(),
            "[    0.000000] Linux version 6.12\n[    1.234567] two\n[    1.234567] lines\n"
        );
    }

    #[test]
    fn ring_that_has_gone_round_gives_its_newest_records() {
        let mut kernel = Kernel::new();
        for number in 0..40_u64 {
            kernel.print(0, format!("message {number:02}").as_bytes());
        }
        let log = kernel.log().unwrap();
        assert_eq!(log.lines().count(), 8);
        assert!(log.starts_with("[    0.000000] message 32\n"), "{log}");
        assert!(log.ends_with("message 39\n"), "{log}");
    }

    #[test]
    fn static_ring_serves_when_the_pointer_does_not() {
        let mut kernel = Kernel::new();
        kernel.print(0, b"early");
        for pointer in [0, 1, KERNEL_MAP - 1, u64::MAX, KERNEL_MAP + 0x8_0000] {
            kernel.put(POINTER_AT, pointer);
            assert_eq!(kernel.log().unwrap(), "[    0.000000] early\n", "{pointer:#x}");
        }
    }

    #[test]
    fn log_not_yet_written_is_empty() {
        assert!(matches!(Kernel::new().log(), Err(KlogError::Empty)));
    }

    #[test]
    fn memory_without_a_ring_is_an_error() {
        let memory = testing::memory(1);
        assert!(matches!(read_with(&memory, &SYMBOLS), Err(KlogError::NoRing)));
        let outside = Symbols { pointer: Some(5), static_ring: Some(u64::MAX) };
        assert!(matches!(read_with(&memory, &outside), Err(KlogError::NoRing)));
    }

    #[test]
    fn record_still_being_written_is_left_out() {
        let mut kernel = Kernel::new();
        kernel.print(0, b"whole");
        kernel.print(0, b"half");
        let position = kernel.position;
        kernel.descriptor(kernel.head_id, 0, (position - 16, position));
        assert_eq!(kernel.log().unwrap(), "[    0.000000] whole\n");
    }

    #[test]
    fn terminal_escapes_do_not_reach_the_terminal() {
        let mut kernel = Kernel::new();
        kernel.print(0, b"\x1b[2J\r\x07\x9b\\x1b\ttab\0");
        assert_eq!(kernel.log().unwrap(), "[    0.000000] \\x1b[2J\\x0d\\x07\\x9b\\x5cx1b\ttab\\x00\n");
    }

    /// Every field of the ring, one at a time, with every value that has broken such readers.
    #[test]
    fn hostile_fields_neither_panic_nor_hang() {
        let hostile =
            [0, 1, 7, 31, 32, 63, 64, 1 << 31, 1 << 32, 1 << 62, 1 << 63, KERNEL_MAP, u64::MAX - 7, u64::MAX];
        let fields = (RING_AT..RING_AT + 80)
            .chain(POINTER_AT..POINTER_AT + 8)
            .chain(DESCRIPTORS_AT..DESCRIPTORS_AT + 48)
            .chain(INFOS_AT..INFOS_AT + 24);
        for at in fields.step_by(8) {
            for value in hostile {
                let mut kernel = Kernel::new();
                kernel.print(0, b"first");
                kernel.print(0, b"second");
                kernel.put(at, value);
                let _ = kernel.log();
            }
        }
    }

    /// Any bytes at any places of the structures that are followed, several at a time.
    #[test]
    fn whatever_a_guest_writes_the_log_is_short_and_printable() {
        use proptest::prelude::*;
        let places = prop_oneof![
            4 => RING_AT..RING_AT + 80,
            1 => POINTER_AT..POINTER_AT + 8,
            4 => DESCRIPTORS_AT..DESCRIPTORS_AT + 24 * 8,
            4 => INFOS_AT..INFOS_AT + 88 * 8,
            1 => TEXT_AT..TEXT_AT + 256,
        ];
        let values = prop_oneof![
            4 => 0..32_u64,
            2 => (0..0x10_1000_u64).prop_map(|at| KERNEL_MAP + at),
            2 => (0..0x10_1000_u64).prop_map(|at| DIRECT_MAP + at),
            2 => (0..64_u32).prop_map(|bit| 1 << bit),
            2 => (0..64_u64).prop_map(|less| u64::MAX - less),
            4 => any::<u64>(),
        ];
        let write = (places, values, prop::bool::ANY);
        let lines = prop::collection::vec((any::<u64>(), prop::collection::vec(any::<u8>(), 0..100)), 0..12);
        let inputs = (lines, prop::collection::vec(write, 0..6));
        testing::properties::hold(2000, &inputs, |(lines, writes)| {
            let mut kernel = Kernel::new();
            for (time, text) in &lines {
                kernel.print(*time, text);
            }
            for (at, value, aligned) in writes {
                kernel.put(if aligned { at & !7 } else { at }, value);
            }
            let Ok(log) = kernel.log() else { return };
            assert!(log.len() <= MAX_LOG, "{} bytes", log.len());
            let odd = log.bytes().find(|byte| !matches!(byte, b' '..=b'~' | b'\t' | b'\n'));
            assert_eq!(odd, None, "{log:?}");
            assert!(log.is_empty() || log.ends_with('\n'), "{log:?}");
        });
    }

    #[test]
    fn ring_that_points_at_itself_ends() {
        let mut kernel = Kernel::new();
        kernel.print(0, b"text");
        for field in [8, 16, 56] {
            kernel.put(RING_AT + field, KERNEL_MAP + RING_AT);
        }
        let _ = kernel.log();
        kernel.put(POINTER_AT, KERNEL_MAP + POINTER_AT);
        let _ = kernel.log();
    }

    /// A text of 64 KiB in each of a billion records: the guest chooses all three numbers.
    #[test]
    fn output_is_bounded_whatever_the_ring_claims() {
        let memory = testing::memory(16);
        let kernel = Kernel { memory, ..Kernel::new() };
        let fill = vec![b'\n'; 8 << 20];
        kernel.memory.write_slice(&fill, GuestAddress(8 << 20)).unwrap();
        kernel.put(RING_AT, 30);
        kernel.put(RING_AT + 8, KERNEL_MAP + DESCRIPTORS_AT);
        kernel.put(RING_AT + 16, KERNEL_MAP + (4 << 20));
        kernel.put(RING_AT + 24, 1 << 14);
        kernel.put(RING_AT + 32, 0);
        kernel.put(RING_AT + 48, 22);
        kernel.put(RING_AT + 56, KERNEL_MAP + (8 << 20));
        for id in 0..=1_u64 << 14 {
            for (word, value) in [2 << STATE_SHIFT | id, 0, 1 << 21].into_iter().enumerate() {
                kernel.put(DESCRIPTORS_AT + id * 24 + word as u64 * 8, value);
            }
            kernel.put((4 << 20) + id * 88, id);
            kernel.put((4 << 20) + id * 88 + 16, 0xffff);
        }
        let log = kernel.log().unwrap();
        assert!(log.len() <= MAX_LOG && log.len() > MAX_LOG - 32, "{}", log.len());
        assert!(log.starts_with("[    0.000000] \n"));
    }

    #[test]
    fn truncation_keeps_whole_lines() {
        assert_eq!(last_lines("one\ntwo\nthree\n", 100), "one\ntwo\nthree\n");
        assert_eq!(last_lines("one\ntwo\nthree\n", 10), "two\nthree\n");
        assert_eq!(last_lines("one\ntwo\nthree\n", 9), "three\n");
        assert_eq!(last_lines("one", 2), "");
    }

    /// An image of three sections: none, symbols, strings.
    fn image(symbol_section: [u64; 2], link: u32) -> TempFile {
        let strings = b"\0prb\0printk_rb_static\0";
        let mut bytes = vec![0_u8; 0x400];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, elf::MAGIC_64_LITTLE);
        put(elf::E_SHOFF, &0x40_u64.to_le_bytes());
        put(elf::E_SHENTSIZE, &64_u16.to_le_bytes());
        put(elf::E_SHNUM, &3_u16.to_le_bytes());
        put(0x80 + elf::SH_TYPE, &elf::SHT_SYMTAB.to_le_bytes());
        put(0x80 + elf::SH_OFFSET, &symbol_section[0].to_le_bytes());
        put(0x80 + elf::SH_SIZE, &symbol_section[1].to_le_bytes());
        put(0x80 + elf::SH_LINK, &link.to_le_bytes());
        put(0xc0 + elf::SH_OFFSET, &0x300_u64.to_le_bytes());
        put(0xc0 + elf::SH_SIZE, &(strings.len() as u64).to_le_bytes());
        put(0x218, &1_u32.to_le_bytes());
        put(0x220, &(KERNEL_MAP + POINTER_AT).to_le_bytes());
        put(0x230, &5_u32.to_le_bytes());
        put(0x238, &(KERNEL_MAP + RING_AT).to_le_bytes());
        put(0x300, strings);
        let file = TempFile::new().unwrap();
        file.as_file().write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn symbols_are_found_and_used() {
        let mut kernel = Kernel::new();
        kernel.print(0, b"found");
        let image = image([0x200, 72], 2);
        assert_eq!(Symbols::of(image.as_file()).unwrap(), SYMBOLS);
        assert_eq!(read(&kernel.memory, image.as_path()).unwrap(), "[    0.000000] found\n");
    }

    #[test]
    fn images_without_a_usable_symbol_table_are_errors() {
        for (symbols, link) in
            [([0x200, 72], 9), ([0x200, u64::MAX], 2), ([u64::MAX, 72], 2), ([0x200, 24], 2)]
        {
            let image = image(symbols, link);
            assert!(Symbols::of(image.as_file()).is_err(), "{symbols:?} {link}");
        }
        let text = TempFile::new().unwrap();
        text.as_file().write_all(b"MZ, not an ELF file").unwrap();
        let error = read(&testing::memory(1), text.as_path()).unwrap_err();
        assert!(matches!(error, KlogError::NoSymbols));
        assert!(matches!(read(&testing::memory(1), Path::new("/nonexistent")), Err(KlogError::Image(_))));
    }
}
