//! Every system call that needs `unsafe` and is not KVM's, behind safe functions.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, MmapRegion};

/// Size of a page of the host and of the guest.
pub const PAGE_SIZE: u64 = 4096;

/// Size of a huge page of the host, and of what KVM maps by one entry of its nested page tables.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Reserves `len` bytes of memory that starts at a multiple of [`HUGE_PAGE`] and asks the host for huge pages. It is given
/// back when the process ends, not before: a guest's memory lives as long as its VMM.
///
/// # Errors
/// What mmap(2) says, `InvalidInput` for a length that no address space holds.
pub fn map_guest_memory(len: usize) -> io::Result<MmapRegion> {
    let huge = usize::try_from(HUGE_PAGE).map_err(|_| io::ErrorKind::InvalidInput)?;
    let reserved = len.checked_add(huge).ok_or(io::ErrorKind::InvalidInput)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), reserved, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let skipped = start.align_offset(huge).min(huge);
    let aligned = start.wrapping_byte_add(skipped);
    // SAFETY: the range lies within the mapping just made. It is advice: where the host has no huge pages it fails, and
    // memory comes in small ones.
    let _ = unsafe { libc::madvise(aligned, len, libc::MADV_HUGEPAGE) };
    let builder =
        MmapRegionBuilder::new_with_bitmap(len, ()).with_mmap_prot(protection).with_mmap_flags(flags);
    // SAFETY: `len` bytes from `aligned` on belong to the mapping made above, which has `len + HUGE_PAGE` bytes and is
    // never unmapped; nobody else knows its address.
    let builder = unsafe { builder.with_raw_mmap_pointer(aligned.cast()) };
    builder.build().map_err(io::Error::other)
}

/// Replaces `len` bytes of guest memory at `guest` by a private, writable mapping of `file` at `offset`.
///
/// # Errors
/// `InvalidInput` when the range is not page-aligned or not within one memory region; otherwise what mmap(2) says.
pub fn map_file_into_guest(
    memory: &GuestMemoryMmap,
    guest: GuestAddress,
    file: &File,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let aligned = [guest.0, offset, len].iter().all(|value| value % PAGE_SIZE == 0);
    let size = usize::try_from(len).ok().filter(|size| aligned && *size > 0);
    let offset = libc::off_t::try_from(offset).ok();
    let (Some(size), Some(offset)) = (size, offset) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // A slice is only given out for a range that lies within one region, hence within one host mapping.
    let slice = memory.get_slice(guest, size).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let host = slice.ptr_guard_mut().as_ptr().cast::<libc::c_void>();
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_FIXED);
    // SAFETY: [host, host + size) is page-aligned and lies within one mapping owned by `memory`, which unmaps its
    // whole range when dropped, whatever is mapped there; guest memory is only accessed volatilely, so no Rust
    // reference to the replaced bytes exists; `file` is open and mmap keeps its own reference.
    let mapped = unsafe { libc::mmap(host, size, protection, flags, file.as_raw_fd(), offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes over a descriptor that this process was started with and knows by its number only.
///
/// # Errors
/// `InvalidInput` for a standard stream, `EBADF` when it is not open.
pub fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 3 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: F_GETFD takes no pointer and fails cleanly on a number that is not open.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and whoever passed its number gave it to this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Closes all descriptors of the calling thread's table but the standard streams and copies of two, which become 3 and 4. The
/// table has to be its own: what other threads hold by number must not be in it.
///
/// # Errors
/// The limit of descriptors; what close_range(2) says: `ENOSYS` before Linux 5.9.
pub(crate) fn keep_only(keep: [BorrowedFd<'_>; 2]) -> io::Result<[OwnedFd; 2]> {
    const FIRST: RawFd = 3;
    const BEHIND: RawFd = 5;
    let done = |result: libc::c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // Out of the way first, so that neither is closed by the other's coming.
    let mut high = [0; 2];
    for (copy, fd) in high.iter_mut().zip(keep) {
        // SAFETY: takes no pointer.
        *copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, BEHIND) };
        done((*copy).into())?;
    }
    for (number, copy) in (FIRST..).zip(high) {
        // SAFETY: takes no pointer. Nothing of Rust's owns a descriptor in this table, as the callers have unshared it: the
        // owners are in the table that the other threads still have.
        done(unsafe { libc::dup3(copy, number, libc::O_CLOEXEC) }.into())?;
    }
    // SAFETY: as above.
    done(unsafe { libc::syscall(libc::SYS_close_range, BEHIND, u32::MAX, 0) })?;
    // SAFETY: both were made just now, and nobody else knows their numbers.
    Ok([FIRST, FIRST + 1].map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Waits until one of two descriptors has something to read, or was closed at the other end; says which.
///
/// # Errors
/// What poll(2) says; an interrupted wait is a wait that ended without either.
pub fn wait_readable(fds: [RawFd; 2]) -> io::Result<[bool; 2]> {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    // SAFETY: the pointer and the count are those of one live, writable array; a stale number is reported in revents.
    let count = unsafe { libc::poll(polled.as_mut_ptr(), 2, -1) };
    let error = io::Error::last_os_error();
    match count {
        -1 if error.kind() != io::ErrorKind::Interrupted => Err(error),
        -1 => Ok([false; 2]),
        _ => Ok(polled.map(|fd| fd.revents != 0)),
    }
}

/// How a mount is restricted, see mount_setattr(2). Device nodes and setuid bits are off in any case, and so is
/// propagation: what comes later, by it, would come without these restrictions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MountAttributes {
    pub read_only: bool,
    /// All mounts below it, too.
    pub recursive: bool,
}

impl MountAttributes {
    fn raw(self) -> libc::mount_attr {
        let mut attr_set = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
        if self.read_only {
            attr_set |= libc::MOUNT_ATTR_RDONLY;
        }
        libc::mount_attr { attr_set, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 }
    }

    fn flags(self) -> i32 {
        if self.recursive { libc::AT_RECURSIVE } else { 0 }
    }
}

/// Restricts the mount at `path`.
///
/// # Errors
/// What mount_setattr(2) says; `ENOSYS` before Linux 5.12.
pub fn restrict_mount(path: &Path, attributes: MountAttributes) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    set_mount_attributes(libc::AT_FDCWD, &path, attributes.flags(), &attributes.raw())
}

/// Restricts a mount, or a tree of mounts that is not attached anywhere, at its root.
///
/// # Errors
/// As [`restrict_mount`].
pub fn restrict_tree(tree: BorrowedFd<'_>, attributes: MountAttributes) -> io::Result<()> {
    set_mount_attributes(tree.as_raw_fd(), c"", libc::AT_EMPTY_PATH | attributes.flags(), &attributes.raw())
}

/// Lets a detached mount be written to.
///
/// # Errors
/// As [`restrict_mount`].
pub fn make_tree_writable(tree: BorrowedFd<'_>) -> io::Result<()> {
    let writable =
        libc::mount_attr { attr_set: 0, attr_clr: libc::MOUNT_ATTR_RDONLY, propagation: 0, userns_fd: 0 };
    set_mount_attributes(tree.as_raw_fd(), c"", libc::AT_EMPTY_PATH, &writable)
}

fn set_mount_attributes(
    directory: RawFd,
    path: &CStr,
    flags: i32,
    attributes: &libc::mount_attr,
) -> io::Result<()> {
    // SAFETY: the path is a NUL-terminated string and the structure is of the size given; both outlive the call, which
    // keeps neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory,
            path.as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Copies the mount at `path`, with all mounts below it if `recursive`, into a tree that is attached nowhere and goes
/// with the descriptor.
///
/// # Errors
/// What open_tree(2) says.
pub fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let recursive = if recursive { libc::AT_RECURSIVE.cast_unsigned() } else { 0 };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | recursive;
    // SAFETY: the path is a NUL-terminated string that outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = RawFd::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: open_tree has just returned this new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a detached tree at `path`.
///
/// # Errors
/// What move_mount(2) says.
pub fn attach_tree(tree: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: both paths are NUL-terminated strings that outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The `IFF_*` flags with which a tun or tap descriptor was attached to its interface.
///
/// # Errors
/// `ENOTTY` when it is no such descriptor, `EBADFD` when it has no interface.
pub fn tap_flags(tap: BorrowedFd<'_>) -> io::Result<i32> {
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    };
    // SAFETY: TUNGETIFF writes one `ifreq`, which the pointer is to; other kinds of descriptors refuse the number.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: every value of an integer is valid, and the flags are what TUNGETIFF writes into the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(flags.into())
}

/// Sets the size of the header that goes before each frame of a tap.
///
/// # Errors
/// What TUNSETVNETHDRSZ says.
pub fn set_tap_header_size(tap: BorrowedFd<'_>, size: i32) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one `int`, which the pointer is to.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the offloads (`TUN_F_*`) that whoever reads frames from a tap can do.
///
/// # Errors
/// What TUNSETOFFLOAD says.
pub fn set_tap_offloads(tap: BorrowedFd<'_>, offloads: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has an interface of several queues (`IFF_MULTI_QUEUE`) use that of this descriptor, or do without.
///
/// # Errors
/// What TUNSETQUEUE says: the descriptor is no tap's, or is what it is to become.
pub fn set_tap_queue(tap: BorrowedFd<'_>, used: bool) -> io::Result<()> {
    let flags = if used { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    let ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    let request =
        libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags } };
    // SAFETY: TUNSETQUEUE reads one `ifreq`, which the pointer is to.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Attaches an open `/dev/net/tun` to the interface `name`, which is made for it.
#[cfg(test)]
pub(crate) fn attach_tap(tun: &File, name: &str, flags: i32) -> io::Result<()> {
    let flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *place = byte.cast_signed();
    }
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which the pointer is to; its name ends with a NUL.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Pieces of guest memory that one readv(2) fills or one writev(2) sends. Looked up once, when they are added: a device
/// that keeps its buffers between two calls pays nothing for them.
pub struct GuestPieces {
    memory: GuestMemoryMmap,
    /// Each lies within a region of `memory`; there are never more than [`Self::MAX`].
    pieces: Vec<libc::iovec>,
    bytes: usize,
}

// SAFETY: the pointers lead into `memory`, which all threads may access and which lives as long as they do.
unsafe impl Send for GuestPieces {}

/// What preadv(2) and pwritev(2) have in common.
type Positioned =
    unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> libc::ssize_t;

impl GuestPieces {
    /// Two less than the kernel's limit (`UIO_MAXIOV`), as each call has a piece of the host besides.
    pub const MAX: usize = 1022;

    #[must_use]
    pub fn new(memory: GuestMemoryMmap) -> Self {
        Self { memory, pieces: Vec::new(), bytes: 0 }
    }

    /// Adds `len` bytes at `address`.
    ///
    /// # Errors
    /// When they do not lie within one region of guest memory, or there are [`Self::MAX`] pieces already.
    pub fn push(&mut self, address: GuestAddress, len: usize) -> Result<(), GuestMemoryError> {
        if self.pieces.len() >= Self::MAX {
            return Err(GuestMemoryError::IOError(io::ErrorKind::InvalidInput.into()));
        }
        let slice = self.memory.get_slice(address, len)?;
        let host = slice.ptr_guard_mut().as_ptr().cast::<libc::c_void>();
        self.pieces.push(libc::iovec { iov_base: host, iov_len: len });
        self.bytes += len;
        Ok(())
    }

    /// Removes the first `count` pieces.
    pub fn remove_first(&mut self, count: usize) {
        let count = count.min(self.pieces.len());
        self.bytes -= self.pieces.drain(..count).map(|piece| piece.iov_len).sum::<usize>();
    }

    #[must_use]
    pub fn count(&self) -> usize {
        self.pieces.len()
    }

    /// Bytes of all pieces.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Reads into the pieces with one system call. A result beyond [`bytes`](Self::bytes) says that there was more than
    /// they hold.
    ///
    /// # Errors
    /// What readv(2) says.
    pub fn read_from(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let mut beyond = 0_u8;
        self.pieces.push(libc::iovec { iov_base: (&raw mut beyond).cast(), iov_len: 1 });
        let count = libc::c_int::try_from(self.pieces.len()).unwrap_or_default();
        // SAFETY: pointer and count are those of one live array. Its last element is the byte above; the others lie in
        // mappings that `memory` keeps, and guest memory is only accessed volatilely, so no Rust reference to the bytes
        // that are written exists.
        let result = unsafe { libc::readv(fd.as_raw_fd(), self.pieces.as_ptr(), count) };
        self.pieces.pop();
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Writes `front` and then the pieces with one system call.
    ///
    /// # Errors
    /// What writev(2) says.
    pub fn write_to(&mut self, fd: BorrowedFd<'_>, front: &[u8]) -> io::Result<usize> {
        let front = libc::iovec { iov_base: front.as_ptr().cast_mut().cast(), iov_len: front.len() };
        self.pieces.insert(0, front);
        let count = libc::c_int::try_from(self.pieces.len()).unwrap_or_default();
        // SAFETY: pointer and count are those of one live array. Its first element is `front`, which is borrowed until
        // after the call; the others lie in mappings that `memory` keeps. writev(2) only reads from all of them.
        let result = unsafe { libc::writev(fd.as_raw_fd(), self.pieces.as_ptr(), count) };
        let error = io::Error::last_os_error();
        self.pieces.remove(0);
        usize::try_from(result).map_err(|_| error)
    }

    /// Fills all pieces from a file, from `offset` on, and empties the list.
    ///
    /// # Errors
    /// What preadv(2) says; `UnexpectedEof` for a file that ends before.
    pub fn read_all_at(&mut self, file: BorrowedFd<'_>, offset: i64) -> io::Result<()> {
        self.move_all(libc::preadv, file, offset)
    }

    /// Writes all pieces to a file, from `offset` on, and empties the list.
    ///
    /// # Errors
    /// What pwritev(2) says.
    pub fn write_all_at(&mut self, file: BorrowedFd<'_>, offset: i64) -> io::Result<()> {
        self.move_all(libc::pwritev, file, offset)
    }

    fn move_all(&mut self, call: Positioned, file: BorrowedFd<'_>, mut offset: i64) -> io::Result<()> {
        while self.bytes > 0 {
            let count = libc::c_int::try_from(self.pieces.len()).unwrap_or_default();
            // SAFETY: pointer and count are those of one live array, whose elements lie in mappings that `memory` keeps. Guest
            // memory is only accessed volatilely, so no Rust reference to the bytes that may be written exists.
            let result = unsafe { call(file.as_raw_fd(), self.pieces.as_ptr(), count, offset) };
            match usize::try_from(result) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => {
                    self.remove_bytes(moved);
                    offset = offset.saturating_add(i64::try_from(moved).unwrap_or(i64::MAX));
                }
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// Removes the first bytes, as many as there are at most.
    fn remove_bytes(&mut self, mut count: usize) {
        let whole = self.pieces.iter().take_while(|piece| {
            let fits = piece.iov_len <= count;
            count -= if fits { piece.iov_len } else { 0 };
            fits
        });
        let whole = whole.count();
        self.remove_first(whole);
        if let Some(first) = self.pieces.first_mut() {
            let count = count.min(first.iov_len);
            first.iov_base = first.iov_base.wrapping_byte_add(count);
            first.iov_len -= count;
            self.bytes -= count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_and_closed_descriptors_are_not_adopted() {
        for fd in [-1, 0, 2, 100_000] {
            assert!(adopt(fd).is_err(), "{fd}");
        }
    }

    #[test]
    fn guest_pieces_are_read_and_written_in_order_and_say_when_there_was_more() {
        use std::os::fd::AsFd;
        use std::os::unix::net::UnixDatagram;

        use vm_memory::Bytes;

        let memory = crate::testing::memory(1);
        let (here, there) = UnixDatagram::pair().unwrap();
        let mut pieces = GuestPieces::new(memory.clone());
        pieces.push(GuestAddress(0x2000), 3).unwrap();
        pieces.push(GuestAddress(0x1000), 2).unwrap();
        there.send(b"abcde").unwrap();
        assert_eq!(pieces.read_from(here.as_fd()).unwrap(), 5);
        assert_eq!(memory.read_obj::<[u8; 3]>(GuestAddress(0x2000)).unwrap(), *b"abc");
        there.send(b"123456789").unwrap();
        assert_eq!((pieces.read_from(here.as_fd()).unwrap(), pieces.bytes()), (6, 5));
        pieces.write_to(here.as_fd(), b"front ").unwrap();
        let mut sent = [0; 32];
        let count = there.recv(&mut sent).unwrap();
        assert_eq!(&sent[..count], b"front 12345");
        pieces.remove_first(1);
        assert_eq!((pieces.count(), pieces.bytes()), (1, 2));
        pieces.remove_first(9);
        assert_eq!((pieces.count(), pieces.bytes()), (0, 0));
    }

    #[test]
    fn guest_pieces_are_moved_to_and_from_places_of_a_file() {
        use std::os::fd::AsFd;

        use vm_memory::Bytes;
        use vmm_sys_util::tempfile::TempFile;

        let memory = crate::testing::memory(1);
        memory.write_slice(b"abcdefgh", GuestAddress(0x1000)).unwrap();
        let file = TempFile::new().unwrap().into_file();
        let mut pieces = GuestPieces::new(memory.clone());
        let fill = |pieces: &mut GuestPieces| {
            for (address, len) in [(0x1004, 4), (0x1000, 0), (0x1000, 4)] {
                pieces.push(GuestAddress(address), len).unwrap();
            }
        };
        fill(&mut pieces);
        pieces.write_all_at(file.as_fd(), 3).unwrap();
        assert_eq!((pieces.count(), pieces.bytes()), (0, 0));
        fill(&mut pieces);
        memory.write_slice(b"........", GuestAddress(0x1000)).unwrap();
        pieces.read_all_at(file.as_fd(), 3).unwrap();
        assert_eq!(memory.read_obj::<[u8; 8]>(GuestAddress(0x1000)).unwrap(), *b"abcdefgh");
        fill(&mut pieces);
        let short = pieces.read_all_at(file.as_fd(), 5).unwrap_err();
        assert_eq!((short.kind(), pieces.bytes()), (io::ErrorKind::UnexpectedEof, 2));
    }

    #[test]
    fn guest_pieces_lose_bytes_at_their_front() {
        let mut pieces = GuestPieces::new(crate::testing::memory(1));
        [3, 0, 2].into_iter().for_each(|len| pieces.push(GuestAddress(0x1000), len).unwrap());
        for (removed, left) in [(0, (3, 5)), (2, (3, 3)), (1, (1, 2)), (1, (1, 1)), (9, (0, 0))] {
            pieces.remove_bytes(removed);
            assert_eq!((pieces.count(), pieces.bytes()), left, "{removed}");
        }
    }

    #[test]
    fn guest_pieces_lie_in_guest_memory_and_are_bounded() {
        let mut pieces = GuestPieces::new(crate::testing::memory(1));
        for (address, len) in [(1 << 20, 1), ((1 << 20) - 1, 2), (u64::MAX, 1), (0, 2 << 20)] {
            assert!(pieces.push(GuestAddress(address), len).is_err(), "{address:#x} {len}");
        }
        for _ in 0..GuestPieces::MAX {
            pieces.push(GuestAddress(0), 1).unwrap();
        }
        assert!(pieces.push(GuestAddress(0), 1).is_err());
    }

    #[test]
    fn other_descriptors_are_no_taps() {
        use std::os::fd::AsFd;

        let null = File::open("/dev/null").unwrap();
        assert!(tap_flags(null.as_fd()).is_err());
        assert!(set_tap_header_size(null.as_fd(), 12).is_err());
        assert!(set_tap_offloads(null.as_fd(), 0).is_err());
        assert!(set_tap_queue(null.as_fd(), true).is_err());
    }
}
