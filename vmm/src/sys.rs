//! Every system call that needs `unsafe` and is not KVM's, behind safe functions.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap};

/// Size of a page of the host and of the guest.
pub const PAGE_SIZE: u64 = 4096;

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

/// Restricts the mount at `path`.
///
/// # Errors
/// What mount_setattr(2) says; `ENOSYS` before Linux 5.12.
pub fn restrict_mount(path: &Path, attributes: MountAttributes) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr_set = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
    if attributes.read_only {
        attr_set |= libc::MOUNT_ATTR_RDONLY;
    }
    let attributes_in =
        libc::mount_attr { attr_set, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    let flags = if attributes.recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated string and the structure is of the size given; both outlive the call, which
    // keeps neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const attributes_in,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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
}
