//! What the kernel finds in memory when it starts: boot parameters, memory map, command line, initial RAM file
//! system and the tables of [`regs`] and [`mptable`]. Follows Documentation/arch/x86/boot.rst.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::load_cmdline;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::kernel::{self, Kernel};
use super::{layout, mptable, regs};
use crate::sys::PAGE_SIZE;

const E820_RAM: u32 = 1;
const BOOT_FLAG: u16 = 0xaa55;
/// Room for the tables that a kernel makes behind its image (`.brk`), which some images of 2022 do not count as theirs.
pub(super) const BRK: u64 = 256 << 10;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Boot protocol 2.12: the first with `xloadflags`.
const PROTOCOL: u16 = 0x20c;
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;

/// Why the guest's memory cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("Cannot read initramfs {path}")]
    ReadInitramfs {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Initramfs {path} of {mib} MiB does not fit into guest memory behind the kernel: give it more")]
    InitramfsTooLarge { path: PathBuf, mib: u64 },
    #[error("Initramfs {0} is empty or not a regular file")]
    NotAnInitramfs(PathBuf),
    #[error("Kernel command line is too long")]
    Cmdline(#[source] linux_loader::loader::Error),
    #[error("Kernel command line cannot be built")]
    CmdlineText(#[source] linux_loader::cmdline::Error),
    #[error("Guest memory cannot hold the boot tables")]
    Tables(#[source] vm_memory::GuestMemoryError),
}

/// Where the initramfs lies, as the zero page tells it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Initramfs {
    pub address: u64,
    pub size: u64,
}

/// Copies the initramfs behind the kernel. A mapping would cost an exit for each page, for a file that is read once; the guest
/// frees it.
///
/// # Errors
/// Unreadable or empty files, and files that do not fit between the kernel and the end of memory.
pub fn load_initramfs(
    memory: &GuestMemoryMmap,
    path: &Path,
    kernel_end: u64,
) -> Result<Initramfs, BootError> {
    load_initramfs_from(memory, path, &open_initramfs(path)?, kernel_end)
}

/// Opens the initramfs at `path`.
///
/// # Errors
/// It cannot be read.
pub fn open_initramfs(path: &Path) -> Result<File, BootError> {
    File::open(path).map_err(|source| BootError::ReadInitramfs { path: path.to_path_buf(), source })
}

/// As [`load_initramfs`], of a file that was opened at `path`, which is only told to people.
///
/// # Errors
/// As [`load_initramfs`].
pub fn load_initramfs_from(
    memory: &GuestMemoryMmap,
    path: &Path,
    file: &File,
    kernel_end: u64,
) -> Result<Initramfs, BootError> {
    let read_error = |source| BootError::ReadInitramfs { path: path.to_path_buf(), source };
    let metadata = file.metadata().map_err(read_error)?;
    let size = metadata.len();
    if !metadata.is_file() || size == 0 {
        return Err(BootError::NotAnInitramfs(path.to_path_buf()));
    }
    let too_large = || BootError::InitramfsTooLarge { path: path.to_path_buf(), mib: size.div_ceil(1 << 20) };
    let low_end = memory.last_addr().0.saturating_add(1).min(layout::HOLE_START);
    // Beside the kernel, in a huge page that is there: at memory's end, where the kernel has its own tables, it would take another.
    let address = kernel_end.saturating_add(BRK).next_multiple_of(PAGE_SIZE);
    if address.checked_add(size).is_none_or(|end| end > low_end) {
        return Err(too_large());
    }
    kernel::copy(memory, file, 0, address, size).map_err(read_error)?;
    Ok(Initramfs { address, size })
}

/// What the tables tell of the machine.
#[derive(Debug, Clone, Copy)]
pub struct Hardware<'a> {
    pub vcpus: u8,
    /// Interrupts of its devices.
    pub irqs: &'a [u8],
}

/// Writes all tables, the command line and the boot parameters.
///
/// # Errors
/// A command line over the kernel's limit; memory too small for the tables, which validation excludes.
pub fn write_tables(
    memory: &GuestMemoryMmap,
    kernel: &Kernel,
    initramfs: Initramfs,
    cmdline: &linux_loader::cmdline::Cmdline,
    hardware: Hardware<'_>,
) -> Result<(), BootError> {
    load_cmdline(memory, GuestAddress(layout::CMDLINE), cmdline).map_err(BootError::Cmdline)?;
    let mp_table = mptable::build(hardware.vcpus, hardware.irqs);
    memory.write_slice(&mp_table, GuestAddress(layout::MP_TABLE)).map_err(BootError::Tables)?;
    for (address, table) in regs::tables() {
        memory.write_slice(&table, GuestAddress(address)).map_err(BootError::Tables)?;
    }
    let params = zero_page(memory, kernel, initramfs);
    memory.write_obj(params, GuestAddress(layout::ZERO_PAGE)).map_err(BootError::Tables)
}

fn zero_page(memory: &GuestMemoryMmap, kernel: &Kernel, initramfs: Initramfs) -> boot_params {
    let mut params = boot_params::default();
    let header = &mut params.hdr;
    if let Some(setup) = kernel.setup_header {
        *header = setup;
    } else {
        header.boot_flag = BOOT_FLAG;
        header.header = HEADER_MAGIC;
        header.version = PROTOCOL;
        header.kernel_alignment = KERNEL_ALIGNMENT;
    }
    // All below the hole, so that 32 bits hold them: checked where each was placed.
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = low(layout::CMDLINE);
    header.cmdline_size = low(layout::CMDLINE_SIZE as u64);
    header.ramdisk_image = low(initramfs.address);
    header.ramdisk_size = low(initramfs.size);
    let map = memory_map(memory);
    for (slot, entry) in params.e820_table.iter_mut().zip(&map) {
        *slot = *entry;
    }
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    params
}

fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// The memory the kernel may use: all but 639 KiB to 1 MiB.
fn memory_map(memory: &GuestMemoryMmap) -> Vec<boot_e820_entry> {
    let ram = |addr: u64, end: u64| boot_e820_entry { addr, size: end - addr, type_: E820_RAM };
    let mut map = vec![ram(0, layout::LOW_MEMORY_END)];
    for region in memory.iter() {
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        map.push(ram(start.max(layout::HIGH_MEMORY), end));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use std::os::unix::fs::FileExt;

    fn initramfs(name: &str, size: u64) -> PathBuf {
        let path = std::env::temp_dir().join(format!("krx-initramfs-{}-{name}", std::process::id()));
        let file = File::create(&path).unwrap();
        file.set_len(size).unwrap();
        file.write_at(b"x", size.saturating_sub(1)).unwrap();
        path
    }

    #[test]
    fn initramfs_lies_behind_the_kernel_byte_for_byte() {
        let memory = testing::memory(32);
        let path = initramfs("good", 2 * PAGE_SIZE + 5);
        let placed = load_initramfs(&memory, &path, 0x100_0001).unwrap();
        std::fs::remove_file(path).unwrap();
        assert_eq!(placed, Initramfs { address: 0x100_0000 + PAGE_SIZE + BRK, size: 2 * PAGE_SIZE + 5 });
        let last: u8 = memory.read_obj(GuestAddress(placed.address + placed.size - 1)).unwrap();
        assert_eq!(last, b'x');
    }

    #[test]
    fn initramfs_that_reaches_the_kernel_or_exceeds_memory_is_refused() {
        let memory = testing::memory(32);
        for (name, size) in [("kernel", 17 << 20), ("memory", 33 << 20), ("huge", 1 << 42)] {
            let path = initramfs(name, size);
            let result = load_initramfs(&memory, &path, 0x100_0000);
            std::fs::remove_file(path).unwrap();
            assert!(matches!(result, Err(BootError::InitramfsTooLarge { .. })), "{name}");
        }
        assert!(matches!(load_initramfs(&memory, Path::new("/"), 0), Err(BootError::NotAnInitramfs(_))));
    }

    #[test]
    fn memory_map_leaves_out_the_legacy_hole() {
        let map = memory_map(&testing::memory(32));
        let ends: Vec<_> = map.iter().map(|e| ({ e.addr }, e.addr + e.size)).collect();
        assert_eq!(ends, [(0, layout::LOW_MEMORY_END), (layout::HIGH_MEMORY, 32 << 20)]);
    }
}
