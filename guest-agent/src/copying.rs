//! Copies of directories whose content may change meanwhile, to anything: nothing in it is followed out of the directory,
//! and there is a limit to what is taken. Directories, files and links alone, with their owners and modes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, fchown, fchownat, symlinkat};

/// What may still be copied.
pub(crate) struct Budget {
    pub(crate) bytes: u64,
    /// Files, directories and links.
    pub(crate) entries: u64,
    /// Directories in each other.
    pub(crate) depth: u32,
}

/// A directory or file at most one step below `directory` and not through a link. What is no file is
/// not waited for.
pub(crate) fn open_inside(directory: BorrowedFd<'_>, name: &[u8], flags: OFlag) -> nix::Result<OwnedFd> {
    let flags = flags | OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    openat2(directory, name, OpenHow::new().flags(flags).resolve(resolve))
}

/// Copies what is in a directory, then its owner and mode.
pub(crate) fn copy_directory(from: &OwnedFd, to: &OwnedFd, budget: &mut Budget) -> nix::Result<()> {
    budget.depth = budget.depth.checked_sub(1).ok_or(Errno::ELOOP)?;
    let mut listing = Dir::from_fd(from.try_clone().map_err(errno)?)?;
    for entry in listing.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        budget.entries = budget.entries.checked_sub(1).ok_or(Errno::EFBIG)?;
        let status = fstatat(from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        match kind(&status) {
            SFlag::S_IFDIR => {
                mkdirat(to, name, Mode::S_IRWXU)?;
                let inner = open_inside(to.as_fd(), name.to_bytes(), OFlag::O_DIRECTORY)?;
                let from = open_inside(from.as_fd(), name.to_bytes(), OFlag::O_DIRECTORY)?;
                copy_directory(&from, &inner, budget)?;
            }
            SFlag::S_IFREG => {
                let from = open_inside(from.as_fd(), name.to_bytes(), OFlag::O_NOFOLLOW)?;
                let flags =
                    OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                copy_file(from, openat(to, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?, budget)?;
            }
            SFlag::S_IFLNK => {
                symlinkat(readlinkat(from, name)?.as_os_str(), to, name)?;
                let (user, group) = (Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid));
                known(fchownat(to, name, Some(user), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW))?;
            }
            _ => {}
        }
    }
    budget.depth += 1;
    set_owner(to.as_fd(), &fstat(from)?)
}

fn copy_file(from: OwnedFd, to: OwnedFd, budget: &mut Budget) -> nix::Result<()> {
    let status = fstat(&from)?;
    if kind(&status) != SFlag::S_IFREG {
        return Err(Errno::EINVAL);
    }
    // One byte more than there may be, so that a file that is too large is known from one that fits.
    let mut limited = File::from(from).take(budget.bytes.saturating_add(1));
    let mut to = File::from(to);
    let copied = copy_bytes(&mut limited, &mut to).map_err(errno)?;
    budget.bytes = budget.bytes.checked_sub(copied).ok_or(Errno::EFBIG)?;
    set_owner(to.as_fd(), &status)
}

/// As `std::io::copy`, by read and write alone: the kernel's shorter ways differ between file systems.
fn copy_bytes(from: &mut impl Read, to: &mut impl Write) -> std::io::Result<u64> {
    let mut buffer = vec![0; 64 << 10];
    let mut copied = 0;
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            return Ok(copied);
        }
        to.write_all(&buffer[..read])?;
        copied += read as u64;
    }
}

pub(crate) fn set_owner(to: BorrowedFd<'_>, status: &FileStat) -> nix::Result<()> {
    let is_theirs =
        known(fchown(to, Some(Uid::from_raw(status.st_uid)), Some(Gid::from_raw(status.st_gid))))?;
    // A program of somebody else's is not to become one of the root's.
    let bits = if is_theirs { 0o7777 } else { 0o1777 };
    fchmod(to, Mode::from_bits_truncate(status.st_mode & bits))
}

/// Whether there is such an owner: in a user namespace, a copy of what belongs to nobody in it is its root's.
fn known(changed: nix::Result<()>) -> nix::Result<bool> {
    match changed {
        Err(Errno::EINVAL) => Ok(false),
        changed => changed.map(|()| true),
    }
}

fn kind(status: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT
}

pub(crate) fn errno(error: std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
