//! Removes directories that strangers have filled: of any depth, with three descriptors and no recursion, and nothing outside of
//! them, whatever is moved meanwhile.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, fstat, openat, unlinkat};
use rustix::io::Errno;

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Removes what is called `name` in a directory, and all that is in it. What is not there is no error.
pub(crate) fn remove(place: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    match unlinkat(place, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    let top = openat(place, name, DIRECTORY, Mode::empty())?;
    empty(top)?;
    Ok(unlinkat(place, name, AtFlags::REMOVEDIR)?)
}

/// Removes all that is in a directory.
pub(crate) fn clear(directory: &Path) -> io::Result<()> {
    empty(File::open(directory)?.into())
}

/// Removes a directory by its path.
pub(crate) fn remove_path(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    remove(File::open(parent)?.as_fd(), name)
}

/// The way back from a directory: its name in the one above, and which that is.
struct Step {
    name: CString,
    above: (u64, u64),
}

fn identity(directory: &OwnedFd) -> io::Result<(u64, u64)> {
    let status = fstat(directory)?;
    Ok((status.st_dev, status.st_ino))
}

fn empty(top: OwnedFd) -> io::Result<()> {
    let mut here = top;
    let mut way: Vec<Step> = Vec::new();
    loop {
        if let Some(name) = unlink_all(&here)? {
            let below = openat(&here, &name, DIRECTORY, Mode::empty())?;
            way.push(Step { name, above: identity(&here)? });
            here = below;
            continue;
        }
        let Some(step) = way.pop() else { return Ok(()) };
        let above = openat(&here, "..", DIRECTORY, Mode::empty())?;
        if identity(&above)? != step.above {
            return Err(io::Error::other("A directory was moved while it was removed"));
        }
        unlinkat(&above, &step.name, AtFlags::REMOVEDIR)?;
        here = above;
    }
}

/// Removes what can be removed at once, up to a directory that is not empty, which is returned.
fn unlink_all(directory: &OwnedFd) -> io::Result<Option<CString>> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        match unlinkat(directory, name, AtFlags::empty()) {
            Err(Errno::ISDIR | Errno::PERM) => match unlinkat(directory, name, AtFlags::REMOVEDIR) {
                Err(Errno::NOTEMPTY | Errno::EXIST) => return Ok(Some(name.into())),
                Err(Errno::NOENT) => {}
                removed => removed?,
            },
            Err(Errno::NOENT) => {}
            removed => removed?,
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::testing::Scratch;

    #[test]
    fn trees_of_any_depth_are_removed() {
        let scratch = Scratch::new("remove");
        scratch.write("outside/kept", b"");
        let top = scratch.path().join("tree");
        fs::create_dir(&top).unwrap();
        symlink("../outside", top.join("link")).unwrap();
        scratch.write("tree/a/b/file", b"");
        // Deeper than a process may have descriptors.
        let mut here: OwnedFd = File::open(&top).unwrap().into();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&here, "deep", Mode::RWXU).unwrap();
            here = openat(&here, "deep", DIRECTORY, Mode::empty()).unwrap();
        }
        drop(here);
        remove_path(&top).unwrap();
        assert!(!top.exists() && scratch.path().join("outside/kept").exists());
        remove_path(&top).unwrap();
        let outside = scratch.path().join("outside");
        clear(&outside).unwrap();
        assert_eq!(fs::read_dir(outside).unwrap().count(), 0);
    }
}
