//! Reads files that strangers wrote: a bundle's configuration, an image's `/etc/passwd`.
//!
//! A path inside a root file system is resolved with that as its limit, so that no link leads out of it; only regular
//! files are opened (a FIFO would hang, the mere opening of a device may do worse), and only so much of them is read.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::{Mode, SFlag, fstat};

use crate::plain_file::read_capped;

/// Finds a file without opening it.
const FIND: OFlag = OFlag::O_PATH.union(OFlag::O_CLOEXEC);

/// Reads a regular file of at most `limit` bytes.
pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    regular(&open(path, FIND, Mode::empty())?, limit)
}

/// Reads the file that a process with `root` as its root directory would find at `path`.
pub(crate) fn read_in_root(root: &Path, path: &str, limit: u64) -> io::Result<Vec<u8>> {
    let root = File::open(root)?;
    let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    regular(&openat2(root.as_fd(), path, OpenHow::new().flags(FIND).resolve(resolve))?, limit)
}

fn regular(found: &OwnedFd, limit: u64) -> io::Result<Vec<u8>> {
    if SFlag::from_bits_truncate(fstat(found)?.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "Not a regular file"));
    }
    // The very file that was looked at, whatever its name leads to by now.
    read_capped(File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))?, limit)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::testing::Scratch;

    #[test]
    fn links_stay_in_the_root() {
        let scratch = Scratch::new("image");
        scratch.write("secret", b"outside");
        scratch.write("root/etc/real", b"inside");
        symlink("../../secret", scratch.path().join("root/etc/up")).unwrap();
        symlink("/etc/real", scratch.path().join("root/etc/absolute")).unwrap();
        symlink("loop", scratch.path().join("root/etc/loop")).unwrap();
        let root = scratch.path().join("root");
        assert!(read_in_root(&root, "/etc/up", 100).is_err());
        assert_eq!(read_in_root(&root, "/etc/absolute", 100).unwrap(), b"inside");
        assert!(read_in_root(&root, "/etc/loop", 100).is_err());
    }

    #[test]
    fn only_small_regular_files_are_read() {
        let scratch = Scratch::new("image");
        let file = scratch.write("file", b"12345");
        assert!(read(&file, 4).is_err());
        assert_eq!(read(&file, 5).unwrap(), b"12345");
        assert!(read(scratch.path(), 100).is_err());
        assert!(read(Path::new("/dev/zero"), 100).is_err());
        let fifo = scratch.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read(&fifo, 100).is_err());
    }

    #[test]
    fn devices_are_not_even_opened() {
        let scratch = Scratch::new("image");
        let node = scratch.path().join("passwd");
        // A number that no driver has: to open it would say so (ENXIO). Only root can make one.
        let number = nix::sys::stat::makedev(511, 1);
        if nix::sys::stat::mknod(&node, SFlag::S_IFCHR, Mode::S_IRWXU, number).is_ok() {
            assert_eq!(read(&node, 100).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
