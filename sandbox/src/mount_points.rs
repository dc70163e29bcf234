//! Mount points in a root file system that the guest cannot write: made here, before it is shared.
//!
//! The root is not trusted: every path is resolved with the root as its limit, and nothing is followed that leads
//! to nothing.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{Mode, mkdirat};

/// Makes `path` in `root`, with its parents, where it is missing: a directory, or else an empty file.
pub(crate) fn make(root: &Path, path: &str, directory: bool) -> io::Result<()> {
    let root = File::open(root)?;
    if find(&root, path).is_ok() {
        return Ok(());
    }
    let names: Vec<_> = path.split('/').filter(|name| !name.is_empty()).collect();
    let mut parent = find(&root, "/")?;
    for (index, name) in names.iter().enumerate() {
        let made = if index + 1 < names.len() || directory {
            mkdirat(&parent, *name, Mode::from_bits_truncate(0o755))
        } else {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            openat(&parent, *name, flags, Mode::from_bits_truncate(0o644)).map(drop)
        };
        match made {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        parent = find(&root, &names[..=index].join("/"))?;
    }
    Ok(())
}

fn find(root: &File, path: &str) -> nix::Result<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    openat2(root.as_fd(), path, OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(resolve))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::testing::Scratch;

    #[test]
    fn what_is_missing_is_made() {
        let scratch = Scratch::new("mount-points");
        scratch.write("root/etc/hosts", b"kept");
        let root = scratch.path().join("root");
        make(&root, "/a/b", true).unwrap();
        make(&root, "/a/c/file", false).unwrap();
        make(&root, "/etc/hosts", false).unwrap();
        assert!(root.join("a/b").is_dir() && root.join("a/c/file").is_file());
        assert_eq!(std::fs::read(root.join("etc/hosts")).unwrap(), b"kept");
    }

    #[test]
    fn links_of_the_root_do_not_lead_out() {
        let scratch = Scratch::new("mount-points");
        scratch.write("root/etc/real", b"");
        let root = scratch.path().join("root");
        symlink("../..", root.join("up")).unwrap();
        symlink("/nowhere", root.join("dangling")).unwrap();
        make(&root, "/up/made", true).unwrap();
        assert!(root.join("made").is_dir() && !scratch.path().join("made").exists());
        assert!(make(&root, "/dangling/made", true).is_err());
        assert!(make(&root, "/dangling", true).is_err());
        assert!(make(&root, "/etc/real/below", true).is_err());
    }
}
