//! Reads files that strangers wrote: a bundle's configuration, an image's `/etc/passwd`.
//!
//! A path inside a root file system is resolved with that as its limit, so that no link leads out of it; only regular
//! files are read (a FIFO would hang, a device do worse), and only so much of them.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::state_dir::read_capped;

/// What is opened: never waits for a writer, never becomes a terminal of ours.
const FLAGS: OFlag = OFlag::O_RDONLY.union(OFlag::O_CLOEXEC).union(OFlag::O_NONBLOCK).union(OFlag::O_NOCTTY);

/// Reads a regular file of at most `limit` bytes.
pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    regular(File::from(nix::fcntl::open(path, FLAGS, nix::sys::stat::Mode::empty())?), limit)
}

/// Reads the file that a process with `root` as its root directory would find at `path`.
pub(crate) fn read_in_root(root: &Path, path: &str, limit: u64) -> io::Result<Vec<u8>> {
    let root = File::open(root)?;
    let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    regular(File::from(openat2(root.as_fd(), path, OpenHow::new().flags(FLAGS).resolve(resolve))?), limit)
}

fn regular(file: File, limit: u64) -> io::Result<Vec<u8>> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "Not a regular file"));
    }
    read_capped(file, limit)
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
}
