//! Puts a kernel image into guest memory: an ELF `vmlinux` by mapping its segments copy-on-write, so that nothing
//! is read before it is used and guests of one kernel share its clean pages; a bzImage by copying.
//!
//! The image is a user's file and may be anything: every number in it is checked before it is used.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use super::layout;
use crate::sys::{self, HUGE_PAGE, PAGE_SIZE};

/// Larger files are not kernels; stops a sparse file of exabytes from being worked through.
const MAX_IMAGE: u64 = 1 << 30;
/// Linux has 4 or 5 program headers; stops a header from claiming 65,535.
const MAX_SEGMENTS: u16 = 64;
/// Of what could be mapped: krx's kernel has there the code that a start executes, and that it changes as it boots
/// (`kernel-config/boot-order`). A page that is mapped is an exit when it is touched, and one more when it is changed.
const COPIED: u64 = HUGE_PAGE;
/// Flag of a segment: writable.
const PF_W: u32 = 2;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
/// Offset of the 64-bit entry in a bzImage's protected-mode code (boot.rst, "64-bit Boot Protocol").
const BZIMAGE_ENTRY: u64 = 0x200;
/// Offset and value of the setup header's magic number in a bzImage.
const BZIMAGE_MAGIC_AT: usize = 0x202;
const BZIMAGE_MAGIC: &[u8] = b"HdrS";
/// `XLF_KERNEL_64`: the image has the 64-bit entry.
const XLF_KERNEL_64: u16 = 1;

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    /// Physical address of the 64-bit entry.
    pub entry: u64,
    /// First byte behind it that is free.
    pub end: u64,
    /// Setup header of a bzImage, which goes into the zero page.
    pub setup_header: Option<linux_loader::bootparam::setup_header>,
}

/// Why an image cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("Cannot read kernel image {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Kernel image {0} is neither an ELF vmlinux nor a bzImage")]
    Unknown(PathBuf),
    #[error("Kernel image {path} cannot be booted: {reason}")]
    Unusable { path: PathBuf, reason: &'static str },
    #[error(
        "Kernel image {path} needs memory up to {needed} MiB, the guest's ends at {available} MiB: give it more"
    )]
    TooLarge { path: PathBuf, needed: u64, available: u64 },
    #[error("Cannot load kernel image {path}")]
    Load {
        path: PathBuf,
        #[source]
        source: linux_loader::loader::Error,
    },
}

/// Loads the image at `path`.
///
/// # Errors
/// Unreadable files, files that are not x86-64 kernels, kernels that do not fit.
pub fn load(memory: &GuestMemoryMmap, path: &Path) -> Result<Kernel, KernelError> {
    load_from(memory, path, open(path)?)
}

/// Opens the image at `path`.
///
/// # Errors
/// It cannot be read.
pub fn open(path: &Path) -> Result<File, KernelError> {
    File::open(path).map_err(|source| KernelError::Read { path: path.to_path_buf(), source })
}

/// Loads an image that was opened at `path`, which is only told to people.
///
/// # Errors
/// As [`load`].
pub fn load_from(memory: &GuestMemoryMmap, path: &Path, mut file: File) -> Result<Kernel, KernelError> {
    let read_error = |source| KernelError::Read { path: path.to_path_buf(), source };
    let metadata = file.metadata().map_err(read_error)?;
    if !metadata.is_file() {
        return Err(KernelError::Unusable { path: path.to_path_buf(), reason: "it is not a regular file" });
    }
    let mut head = Vec::with_capacity(BZIMAGE_MAGIC_AT + 4);
    (&mut file).take(BZIMAGE_MAGIC_AT as u64 + 4).read_to_end(&mut head).map_err(read_error)?;
    if head.starts_with(b"\x7fELF") {
        load_elf(memory, path, &file, &head, metadata.len())
    } else if head.get(BZIMAGE_MAGIC_AT..) == Some(BZIMAGE_MAGIC) {
        load_bzimage(memory, path, file)
    } else {
        Err(KernelError::Unknown(path.to_path_buf()))
    }
}

/// One `PT_LOAD`: where it lies in the file and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    offset: u64,
    guest: u64,
    file_size: u64,
    memory_size: u64,
    writable: bool,
}

fn load_elf(
    memory: &GuestMemoryMmap,
    path: &Path,
    file: &File,
    head: &[u8],
    length: u64,
) -> Result<Kernel, KernelError> {
    let unusable = |reason| KernelError::Unusable { path: path.to_path_buf(), reason };
    let read_error = |source| KernelError::Read { path: path.to_path_buf(), source };
    if length > MAX_IMAGE {
        return Err(unusable("it is over 1 GiB"));
    }
    let header = elf_header(head).map_err(unusable)?;
    let mut table = vec![0; usize::from(header.e_phnum) * size_of::<Elf64_Phdr>()];
    file.read_exact_at(&mut table, header.e_phoff).map_err(|_| unusable("it is truncated"))?;
    let segments = segments(&table, length).map_err(unusable)?;
    let end = segments.iter().map(|s| s.guest + s.memory_size).max().unwrap_or(0);
    let available = low_end(memory);
    if end > available {
        let (needed, available) = (end.div_ceil(1 << 20), available >> 20);
        return Err(KernelError::TooLarge { path: path.to_path_buf(), needed, available });
    }
    if !segments.iter().any(|s| (s.guest..s.guest + s.file_size).contains(&header.e_entry)) {
        return Err(unusable("its entry point is not a physical address within its segments"));
    }
    for segment in segments {
        place(memory, file, segment).map_err(read_error)?;
    }
    Ok(Kernel { entry: header.e_entry, end, setup_header: None })
}

fn elf_header(head: &[u8]) -> Result<Elf64_Ehdr, &'static str> {
    let mut header = Elf64_Ehdr::default();
    let bytes = head.get(..size_of::<Elf64_Ehdr>()).ok_or("it is truncated")?;
    header.as_mut_slice().copy_from_slice(bytes);
    if header.e_ident[4] != CLASS_64 {
        return Err("it is a 32-bit ELF file; a 64-bit x86-64 vmlinux is needed");
    }
    if header.e_ident[5] != LITTLE_ENDIAN || header.e_machine != MACHINE_X86_64 {
        return Err("it is built for another processor; an x86-64 vmlinux is needed");
    }
    if header.e_phnum == 0 || header.e_phnum > MAX_SEGMENTS {
        return Err("its number of program headers is not that of a kernel");
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err("its program headers have the wrong size");
    }
    Ok(header)
}

/// The loadable segments of a program header table, checked against the file and against overflow.
fn segments(table: &[u8], file_length: u64) -> Result<Vec<Segment>, &'static str> {
    let mut found = Vec::new();
    for bytes in table.chunks_exact(size_of::<Elf64_Phdr>()) {
        let mut header = Elf64_Phdr::default();
        header.as_mut_slice().copy_from_slice(bytes);
        if header.p_type != PT_LOAD || header.p_memsz == 0 {
            continue;
        }
        let in_file = header.p_offset.checked_add(header.p_filesz).is_some_and(|end| end <= file_length);
        if !in_file {
            return Err("it is truncated");
        }
        let fits = header.p_paddr.checked_add(header.p_memsz).is_some() && header.p_filesz <= header.p_memsz;
        if !fits || header.p_paddr < layout::HIGH_MEMORY {
            return Err("a segment's physical address or size is out of range");
        }
        found.push(Segment {
            offset: header.p_offset,
            guest: header.p_paddr,
            file_size: header.p_filesz,
            memory_size: header.p_memsz,
            writable: header.p_flags & PF_W != 0,
        });
    }
    if found.is_empty() { Err("it has no loadable segment") } else { Ok(found) }
}

/// Maps what a segment has of whole huge pages and is not written, text and constants, but for the first [`COPIED`]. All else
/// is copied, into huge pages: the kernel writes to most pages of its data, and the rest of a huge page, where the
/// kernel's next segment or its free memory begins, would be touched 4 KiB at a time. Memory behind the file's part is
/// zero already.
fn place(memory: &GuestMemoryMmap, file: &File, segment: Segment) -> io::Result<()> {
    let Segment { offset, guest, file_size, .. } = segment;
    let start = guest.next_multiple_of(HUGE_PAGE).saturating_add(COPIED);
    let end = (guest + file_size) / HUGE_PAGE * HUGE_PAGE;
    let congruent = offset.is_multiple_of(PAGE_SIZE) && guest.is_multiple_of(PAGE_SIZE);
    if segment.writable || !congruent || start >= end {
        return copy(memory, file, offset, guest, file_size);
    }
    copy(memory, file, offset, guest, start - guest)?;
    sys::map_file_into_guest(memory, GuestAddress(start), file, offset + (start - guest), end - start)?;
    copy(memory, file, offset + (end - guest), end, guest + file_size - end)
}

/// Reads `length` bytes of `file` into guest memory.
///
/// # Errors
/// What read(2) says, and `UnexpectedEof`.
pub(super) fn copy(
    memory: &GuestMemoryMmap,
    mut file: &File,
    offset: u64,
    guest: u64,
    length: u64,
) -> io::Result<()> {
    let length = usize::try_from(length).map_err(io::Error::other)?;
    file.seek(SeekFrom::Start(offset))?;
    memory.read_exact_volatile_from(GuestAddress(guest), &mut file.as_fd(), length).map_err(io::Error::other)
}

fn load_bzimage(memory: &GuestMemoryMmap, path: &Path, mut file: File) -> Result<Kernel, KernelError> {
    let high = Some(GuestAddress(layout::HIGH_MEMORY));
    let loaded = BzImage::load(memory, None, &mut file, high)
        .map_err(|source| KernelError::Load { path: path.to_path_buf(), source })?;
    let unusable = |reason| KernelError::Unusable { path: path.to_path_buf(), reason };
    let header = loaded.setup_header.ok_or_else(|| unusable("it has no setup header"))?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(unusable("it has no 64-bit entry point"));
    }
    // The image unpacks itself: it claims `init_size` bytes from its preferred address.
    let end = loaded.kernel_end.max(header.pref_address.saturating_add(u64::from(header.init_size)));
    let available = low_end(memory);
    if end > available {
        let (needed, available) = (end.div_ceil(1 << 20), available >> 20);
        return Err(KernelError::TooLarge { path: path.to_path_buf(), needed, available });
    }
    let entry = loaded.kernel_load.0 + BZIMAGE_ENTRY;
    Ok(Kernel { entry, end, setup_header: Some(header) })
}

/// End of the memory below the hole.
fn low_end(memory: &GuestMemoryMmap) -> u64 {
    memory.last_addr().0.saturating_add(1).min(layout::HOLE_START)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use std::io::Write;

    fn header(edit: impl FnOnce(&mut Elf64_Ehdr)) -> Vec<u8> {
        let mut header = Elf64_Ehdr {
            e_machine: MACHINE_X86_64,
            e_entry: 0x100_0000,
            e_phoff: 64,
            e_phentsize: 56,
            e_phnum: 1,
            ..Default::default()
        };
        header.e_ident[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', CLASS_64, LITTLE_ENDIAN]);
        edit(&mut header);
        header.as_slice().to_vec()
    }

    fn segment(edit: impl FnOnce(&mut Elf64_Phdr)) -> Vec<u8> {
        let mut header = Elf64_Phdr {
            p_type: PT_LOAD,
            p_offset: 0x1000,
            p_paddr: 0x100_0000,
            p_filesz: 0x1800,
            p_memsz: 0x3000,
            ..Default::default()
        };
        edit(&mut header);
        header.as_slice().to_vec()
    }

    fn image(name: &str, header: Vec<u8>, segment: Vec<u8>) -> PathBuf {
        let path = std::env::temp_dir().join(format!("krx-kernel-{}-{name}", std::process::id()));
        let mut bytes = [header, segment].concat();
        bytes.resize(0x1000, 0);
        bytes.extend((0..0x1800_u32).map(|i| (i % 251) as u8));
        File::create(&path).unwrap().write_all(&bytes).unwrap();
        path
    }

    fn load_image(name: &str, header: Vec<u8>, segment: Vec<u8>) -> Result<Kernel, KernelError> {
        let path = image(name, header, segment);
        let result = load(&testing::memory(32), &path);
        std::fs::remove_file(path).unwrap();
        result
    }

    #[test]
    fn elf_is_mapped_with_its_tail_and_zeroes() {
        let memory = testing::memory(32);
        let path = image("good", header(|_| ()), segment(|_| ()));
        let kernel = load(&memory, &path).unwrap();
        std::fs::remove_file(path).unwrap();
        assert_eq!((kernel.entry, kernel.end), (0x100_0000, 0x100_3000));
        let at = |address: u64| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!(at(0x100_0001), 1);
        assert_eq!(at(0x100_17ff), (0x17ff % 251) as u8);
        assert_eq!(at(0x100_1800), 0);
    }

    /// Around each border between what is copied and what is mapped, whether or not the segment begins at a huge page.
    #[test]
    fn long_segments_are_whole_whichever_part_is_mapped() {
        let content: Vec<u8> =
            (0..9_u32 << 20).map(|at| (at ^ (at >> 8) ^ (at >> 16)).to_le_bytes()[0]).collect();
        let path = std::env::temp_dir().join(format!("krx-kernel-{}-long", std::process::id()));
        std::fs::write(&path, &content).unwrap();
        let file = File::open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        for (guest, offset, cut) in
            [(0, 0, 0), (0x3000, 0x1000, 1), (0x1f_f000, 0, 0xfff), (0, 0x2000, 5 << 20)]
        {
            let memory = testing::memory(32);
            let guest = layout::HIGH_MEMORY + guest;
            let file_size = (8 << 20) - cut;
            let memory_size = file_size + PAGE_SIZE;
            let segment = Segment { offset, guest, file_size, memory_size, writable: false };
            place(&memory, &file, segment).unwrap();
            let mut found = vec![0xaa; usize::try_from(memory_size).unwrap()];
            memory.read_slice(&mut found, GuestAddress(guest)).unwrap();
            let (wanted, behind) = found.split_at(usize::try_from(file_size).unwrap());
            let start = usize::try_from(offset).unwrap();
            assert!(*wanted == content[start..start + wanted.len()], "{guest:#x} {offset:#x} {cut:#x}");
            assert!(behind.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn images_that_are_not_kernels_are_refused() {
        let refused = |name, h: Vec<u8>, s: Vec<u8>| load_image(name, h, s).unwrap_err();
        let unusable = |e| matches!(e, KernelError::Unusable { .. });
        assert!(unusable(refused("32", header(|h| h.e_ident[4] = 1), segment(|_| ()))));
        assert!(unusable(refused("arm", header(|h| h.e_machine = 183), segment(|_| ()))));
        assert!(unusable(refused("many", header(|h| h.e_phnum = 65_535), segment(|_| ()))));
        assert!(unusable(refused("none", header(|h| h.e_phnum = 0), segment(|_| ()))));
        assert!(unusable(refused("far", header(|h| h.e_phoff = u64::MAX - 8), segment(|_| ()))));
        assert!(unusable(refused("cut", header(|_| ()), segment(|s| s.p_filesz = 0x2800))));
        assert!(unusable(refused("wrap", header(|_| ()), segment(|s| s.p_memsz = u64::MAX))));
        assert!(unusable(refused("low", header(|_| ()), segment(|s| s.p_paddr = 0x1000))));
        assert!(unusable(refused("entry", header(|h| h.e_entry = 0), segment(|_| ()))));
        let unknown = refused("text", b"#!/bin/sh".to_vec(), Vec::new());
        assert!(matches!(unknown, KernelError::Unknown(_)));
    }

    #[test]
    fn kernel_larger_than_memory_is_refused() {
        let error = load_image("large", header(|_| ()), segment(|s| s.p_memsz = 1 << 40)).unwrap_err();
        assert!(matches!(error, KernelError::TooLarge { available: 32, .. }));
    }

    #[test]
    fn missing_files_and_directories_are_refused() {
        let memory = testing::memory(32);
        assert!(matches!(load(&memory, Path::new("/nonexistent/kernel")), Err(KernelError::Read { .. })));
        assert!(matches!(load(&memory, Path::new("/")), Err(KernelError::Unusable { .. })));
    }
}
