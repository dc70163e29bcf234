//! Makes the files of a layer (image-spec, layer.md), on top of those of the layers below it.
//!
//! The directory is an overlay's, but for the lowest layer: what is removed there leaves a whiteout, and a link of a lower
//! layer is followed as a program in the container would follow it. The kernel resolves all paths with that directory as
//! their root, so that none leads out of it; nothing else writes there meanwhile.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat,
    chownat, fchmod, fchown, fsetxattr, linkat, makedev, mkdirat, mknodat, openat, openat2, readlinkat,
    statat, symlinkat, utimensat,
};
use rustix::io::Errno;

use crate::error::{LayerError, shown};
use crate::overlay::fd_path;
use crate::remove::remove;
use crate::tar::{Entries, Entry, Kind, Source};

/// Begins the name of a file that says of another that it is no more (layer.md, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// Nothing of lower layers is in the directory any more.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names of that kind are notes of AUFS.
const NOTE: &[u8] = b".wh..wh.";
/// Largest numbers of a device (`MINORBITS` of Linux); larger ones would be cut to others.
const MAX_MAJOR: u32 = 0xfff;
const MAX_MINOR: u32 = 0xf_ffff;
/// Deepest path of an entry: those of images have a few dozen steps.
const MAX_DEPTH: usize = 256;
/// Attributes that mean something in a guest, and nothing to overlayfs.
const XATTRS: [&[u8]; 3] = [b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"];
const USER_XATTR: &[u8] = b"user.";

/// What an image may still hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// Of files.
    pub(crate) bytes: u64,
    pub(crate) entries: u64,
    /// Bytes of archives, decompressed.
    pub(crate) stream: u64,
    /// Bytes of what is remembered to the end of a layer.
    pub(crate) memory: u64,
}

impl Budget {
    /// More than any image that runs in a VM needs, and less than fills a disk of today.
    pub(crate) const IMAGE: Self =
        Self { bytes: 64 << 30, entries: 4_000_000, stream: 72 << 30, memory: 512 << 20 };

    fn take_entry(&mut self) -> Result<(), LayerError> {
        self.entries = self.entries.checked_sub(1).ok_or(LayerError::TooMany(Self::IMAGE.entries))?;
        Ok(())
    }
}

/// The directory in which a layer becomes files.
pub(crate) struct Tree {
    root: OwnedFd,
    /// Where the files of this layer alone are; `None` of the lowest.
    own: Option<OwnedFd>,
    /// Of the entry before, which is most often that of the next.
    parent: Option<(PathBuf, Rc<OwnedFd>)>,
    /// Directories whose times are set when nothing more is made in them.
    times: Vec<(PathBuf, Timestamps)>,
}

/// Why an entry did not become a file.
enum Refusal {
    /// It cannot be.
    No(&'static str),
    System(io::Error),
    Bounds(LayerError),
}

impl From<LayerError> for Refusal {
    fn from(error: LayerError) -> Self {
        Self::Bounds(error)
    }
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self::System(errno.into())
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

impl Tree {
    pub(crate) fn new(root: OwnedFd, own: Option<OwnedFd>) -> Self {
        Self { root, own, parent: None, times: Vec::new() }
    }

    /// Makes all files of a layer.
    pub(crate) fn unpack<S: Source>(
        mut self,
        layer: &mut Entries<S>,
        budget: &mut Budget,
    ) -> Result<(), LayerError> {
        while let Some(entry) = layer.next()? {
            budget.take_entry()?;
            let large = || LayerError::TooLarge(Budget::IMAGE.bytes >> 30);
            budget.bytes = budget.bytes.checked_sub(entry.size).ok_or_else(large)?;
            let name = || shown(&String::from_utf8_lossy(&entry.path));
            self.apply(&entry, layer, budget).map_err(|refusal| match refusal {
                Refusal::No(why) => LayerError::Entry { name: name(), why },
                Refusal::System(source) => LayerError::Make { name: name(), source },
                Refusal::Bounds(error) => error,
            })?;
        }
        // Deepest first: to set the times of one does not change another's, but to reach it may want search.
        for (path, times) in std::mem::take(&mut self.times).into_iter().rev() {
            // It may have been replaced since.
            if let Ok(directory) = self.directory(&path) {
                let _ = utimensat(CWD, fd_path(directory.as_fd()), &times, AtFlags::empty());
            }
        }
        Ok(())
    }

    fn apply(&mut self, entry: &Entry, data: &mut impl Read, budget: &mut Budget) -> Result<(), Refusal> {
        let path = relative(&entry.path)?;
        if [entry.uid, entry.gid].contains(&u32::MAX) {
            return Err(Refusal::No("its owner is none"));
        }
        if entry.kind == Kind::Directory {
            // Its path and times are remembered.
            let memory = budget.memory.checked_sub(64 + path.as_os_str().len() as u64);
            budget.memory = memory.ok_or(LayerError::TooMany(Budget::IMAGE.entries))?;
        }
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            return if entry.kind == Kind::Directory {
                self.root(entry)
            } else {
                Err(Refusal::No("it is no name"))
            };
        };
        let parent = path.parent().unwrap_or_else(|| Path::new("")).to_owned();
        if name.as_bytes().starts_with(WHITEOUT) {
            return self.whiteout(&parent, &name);
        }
        let place = self.parent(&parent, budget)?;
        self.make(entry, &path, &place, &name, data)
    }

    fn root(&mut self, entry: &Entry) -> Result<(), Refusal> {
        let root = self.directory(Path::new(""))?;
        self.times.push((PathBuf::new(), times(entry)));
        own(root.as_fd(), entry)
    }

    /// Makes the file `name` in the directory `place`, in the stead of one that is there.
    fn make(
        &mut self,
        entry: &Entry,
        path: &Path,
        place: &OwnedFd,
        name: &OsStr,
        data: &mut impl Read,
    ) -> Result<(), Refusal> {
        if entry.kind == Kind::Directory {
            let is_directory = |at| FileType::from_raw_mode(at) == FileType::Directory;
            let there =
                statat(place, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|there| is_directory(there.st_mode));
            if !there {
                self.clear(place, name)?;
                mkdirat(place, name, Mode::RWXU)?;
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let directory = openat(place, name, flags, Mode::empty())?;
            self.times.push((path.into(), times(entry)));
            return own(directory.as_fd(), entry);
        }
        if let Kind::HardLink(to) = &entry.kind {
            return self.link(&relative(to)?, place, name);
        }
        self.clear(place, name)?;
        match &entry.kind {
            Kind::File => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = openat(place, name, flags, Mode::RUSR | Mode::WUSR)?;
                let mut file = fs::File::from(file);
                io::copy(data, &mut file)?;
                own(file.as_fd(), entry)?;
                return Ok(rustix::fs::futimens(&file, &times(entry))?);
            }
            Kind::Symlink(to) if to.is_empty() => return Err(Refusal::No("it is a link to nothing")),
            Kind::Symlink(to) => symlinkat(OsStr::from_bytes(to), place, name)?,
            Kind::Fifo => mknodat(place, name, FileType::Fifo, Mode::empty(), 0)?,
            Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor)
                if *major > MAX_MAJOR || *minor > MAX_MINOR =>
            {
                return Err(Refusal::No("Linux has no such device"));
            }
            Kind::CharDevice(0, 0) => {
                return Err(Refusal::No("the device 0:0 is overlayfs's mark for what is gone"));
            }
            Kind::CharDevice(major, minor) => {
                mknodat(place, name, FileType::CharacterDevice, Mode::empty(), makedev(*major, *minor))?;
            }
            Kind::BlockDevice(major, minor) => {
                mknodat(place, name, FileType::BlockDevice, Mode::empty(), makedev(*major, *minor))?;
            }
            Kind::Directory | Kind::HardLink(_) => {}
        }
        let (uid, gid) = ids(entry);
        chownat(place, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        if !matches!(entry.kind, Kind::Symlink(_)) {
            chmodat(place, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())?;
        }
        Ok(utimensat(place, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    fn link(&mut self, to: &Path, place: &OwnedFd, name: &OsStr) -> Result<(), Refusal> {
        let Some(old) = to.file_name() else { return Err(Refusal::No("it is a link to a directory")) };
        let missing = |errno| match errno {
            Errno::NOENT => Refusal::No("what it is a link to is not there"),
            errno => errno.into(),
        };
        let from = self.find(to.parent().unwrap_or_else(|| Path::new(""))).map_err(missing)?;
        let (there, here) = (
            statat(&from, old, AtFlags::SYMLINK_NOFOLLOW).map_err(missing)?,
            statat(place, name, AtFlags::SYMLINK_NOFOLLOW),
        );
        if FileType::from_raw_mode(there.st_mode) == FileType::Directory {
            return Err(Refusal::No("it is a link to a directory"));
        }
        // To itself: to make room for it would remove it.
        if here.is_ok_and(|here| (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)) {
            return Ok(());
        }
        self.clear(place, name)?;
        Ok(linkat(&from, old, place, name, AtFlags::empty())?)
    }

    /// Removes what is at a place.
    fn clear(&mut self, place: &OwnedFd, name: &OsStr) -> io::Result<()> {
        if statat(place, name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            // The way to what is remembered may have led through it.
            self.parent = None;
        }
        remove(place.as_fd(), name)
    }

    fn whiteout(&mut self, parent: &Path, name: &OsStr) -> Result<(), Refusal> {
        let opaque = name.as_bytes() == OPAQUE;
        let gone = match name.as_bytes().strip_prefix(WHITEOUT) {
            _ if opaque => b"",
            None | Some(b"" | b"." | b"..") => return Err(Refusal::No("it is a whiteout of nothing")),
            Some(_) if name.as_bytes().starts_with(NOTE) => return Ok(()),
            Some(gone) => gone,
        };
        let place = match self.find(parent) {
            Ok(place) => place,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        if opaque {
            self.parent = None;
            let path = self.real(place.as_fd())?;
            return Ok(self.hide(&path)?);
        }
        Ok(self.clear(&place, OsStr::from_bytes(gone))?)
    }

    /// Removes from a directory what comes from lower layers alone.
    fn hide(&mut self, path: &Path) -> io::Result<()> {
        let Some(layer) = &self.own else { return Ok(()) };
        let own = layer.try_clone()?;
        let mut rest = vec![path.to_path_buf()];
        while let Some(path) = rest.pop() {
            let directory = self.find(&path)?;
            for child in fs::read_dir(fd_path(directory.as_fd()))? {
                let (child, path) = child.map(|child| (child.file_name(), path.join(child.file_name())))?;
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
                match openat2(&own, &path, flags, Mode::empty(), resolve) {
                    Err(Errno::NOENT) => self.clear(&directory, &child)?,
                    Err(errno) => return Err(errno.into()),
                    Ok(kept) => {
                        let mode = rustix::fs::fstat(&kept)?.st_mode;
                        if FileType::from_raw_mode(mode) == FileType::Directory {
                            rest.push(path);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// The path from the root of a directory that was found by another, through links.
    fn real(&self, directory: BorrowedFd<'_>) -> io::Result<PathBuf> {
        let path = |of: BorrowedFd<'_>| -> io::Result<PathBuf> {
            let target = readlinkat(CWD, fd_path(of), Vec::new())?;
            Ok(std::ffi::OsString::from_vec(target.into_bytes()).into())
        };
        let (root, path) = (path(self.root.as_fd())?, path(directory)?);
        path.strip_prefix(root).map(Into::into).map_err(io::Error::other)
    }

    /// The directory at a path, as a handle.
    fn find(&self, path: &Path) -> Result<OwnedFd, Errno> {
        self.at(path, OFlags::PATH)
    }

    /// The directory at a path, open.
    fn directory(&self, path: &Path) -> Result<OwnedFd, Errno> {
        self.at(path, OFlags::RDONLY)
    }

    fn at(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = flags | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat2(&self.root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
    }

    fn make_directories(&self, path: &Path, budget: &mut Budget) -> Result<OwnedFd, Refusal> {
        let mut above = self.find(Path::new(""))?;
        let mut so_far = PathBuf::new();
        for part in path {
            so_far.push(part);
            above = match self.find(&so_far) {
                Err(Errno::NOENT) => {
                    budget.take_entry()?;
                    mkdirat(&above, part, Mode::from_raw_mode(0o755))?;
                    self.find(&so_far)?
                }
                found => found?,
            };
        }
        Ok(above)
    }

    /// The directory of an entry. Those of its path that the layer does not tell of are made.
    fn parent(&mut self, path: &Path, budget: &mut Budget) -> Result<Rc<OwnedFd>, Refusal> {
        if let Some((_, directory)) = self.parent.as_ref().filter(|(known, _)| known == path) {
            return Ok(directory.clone());
        }
        let found = match self.find(path) {
            Err(Errno::NOENT) => self.make_directories(path, budget),
            found => found.map_err(Refusal::from),
        };
        let found = Rc::new(found.map_err(|refusal| {
            match refusal {
                // A link to nothing, too.
                Refusal::System(error)
                    if [Errno::NOTDIR, Errno::LOOP, Errno::EXIST]
                        .map(Some)
                        .contains(&Errno::from_io_error(&error)) =>
                {
                    Refusal::No("what it lies in is no directory")
                }
                refusal => refusal,
            }
        })?);
        self.parent = Some((path.into(), found.clone()));
        Ok(found)
    }
}

/// A path of an archive, from the root.
fn relative(path: &[u8]) -> Result<PathBuf, Refusal> {
    if path.starts_with(b"/") {
        return Err(Refusal::No("its path is absolute"));
    }
    if path.contains(&0) {
        return Err(Refusal::No("its path has a NUL in it"));
    }
    let mut relative = PathBuf::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(Refusal::No("its path has `..` in it")),
            part => relative.push(OsStr::from_bytes(part)),
        }
    }
    if relative.components().count() > MAX_DEPTH {
        return Err(Refusal::No("its path is too deep"));
    }
    Ok(relative)
}

/// Gives what is open its owner, mode and attributes, in an order in which none undoes another.
fn own(file: BorrowedFd<'_>, entry: &Entry) -> Result<(), Refusal> {
    let (uid, gid) = ids(entry);
    fchown(file, Some(uid), Some(gid))?;
    fchmod(file, Mode::from_raw_mode(entry.mode))?;
    for (name, value) in &entry.xattrs {
        if !name.starts_with(USER_XATTR) && !XATTRS.contains(&name.as_slice()) {
            continue;
        }
        match fsetxattr(file, OsStr::from_bytes(name), value, XattrFlags::empty()) {
            // A file system without them has none to lose.
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn ids(entry: &Entry) -> (Uid, Gid) {
    (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid))
}

fn times(entry: &Entry) -> Timestamps {
    let modified = Timespec { tv_sec: entry.modified.0, tv_nsec: entry.modified.1.into() };
    Timestamps { last_access: modified, last_modification: modified }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};

    use ::tar::EntryType;

    use super::*;
    use crate::tar::Sequential;
    use crate::testing::{Archive, Scratch};

    fn unpack_into(path: &Path, archive: Archive, budget: Budget) -> Result<(), LayerError> {
        let root = fs::File::open(path).unwrap().into();
        let archive = archive.finish();
        Tree::new(root, None).unpack(&mut Entries::new(Sequential(archive.as_slice())), &mut { budget })
    }

    fn unpack(scratch: &Scratch, archive: Archive) -> Result<(), LayerError> {
        let path = scratch.path().join("root");
        fs::create_dir_all(&path).unwrap();
        unpack_into(&path, archive, Budget::IMAGE)
    }

    fn refusal(archive: Archive) -> &'static str {
        match unpack(&Scratch::new("unpack"), archive) {
            Err(LayerError::Entry { why, .. }) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn files_are_as_the_archive_has_them() {
        let scratch = Scratch::new("unpack");
        let archive =
            Archive::new().directory("./").directory("./d/").file("./d/f", b"data").link("l", "/d/f");
        let archive = archive.add(EntryType::Link, "hard", "d/f", b"").add(EntryType::Fifo, "fifo", "", b"");
        unpack(&scratch, archive.file("made/above/f", b"x")).unwrap();
        let root = scratch.path().join("root");
        assert_eq!(fs::read(root.join("hard")).unwrap(), b"data");
        assert_eq!(fs::metadata(root.join("d/f")).unwrap().nlink(), 2);
        assert_eq!(fs::read_link(root.join("l")).unwrap(), Path::new("/d/f"));
        assert!(fs::symlink_metadata(root.join("fifo")).unwrap().file_type().is_fifo());
        for name in [".", "d", "d/f", "l"] {
            assert_eq!(fs::symlink_metadata(root.join(name)).unwrap().mtime(), 1_000_000_000, "{name}");
        }
        assert_eq!(fs::metadata(root.join("d")).unwrap().mode() & 0o7777, 0o755);
        assert_eq!(fs::read(root.join("made/above/f")).unwrap(), b"x");
    }

    #[test]
    fn what_comes_later_counts() {
        let scratch = Scratch::new("unpack");
        let archive = Archive::new().directory("a").file("a/b", b"1").file("a", b"file").link("l", "none");
        let archive = archive.file("l", b"not through it").directory("d").file("d/kept", b"").directory("d");
        unpack(&scratch, archive.add(EntryType::Link, "a", "a", b"")).unwrap();
        let root = scratch.path().join("root");
        assert_eq!(fs::read(root.join("a")).unwrap(), b"file");
        assert_eq!(fs::read(root.join("l")).unwrap(), b"not through it");
        assert!(root.join("d/kept").exists() && !root.join("none").exists());
    }

    #[test]
    fn nothing_leads_out_of_the_root() {
        let scratch = Scratch::new("unpack");
        let secret = scratch.write("secret", b"secret");
        fs::create_dir(scratch.path().join("root")).unwrap();
        let up = scratch.path().display().to_string();
        let archive = Archive::new().link("up", "..").link("d/absolute", "/d");
        unpack(&scratch, archive.file("up/secret", b"mine").file("up/new", b"").link("x", "/../../etc"))
            .unwrap();
        // As for a program whose root it is: `..` of the root is the root.
        assert_eq!(fs::read(&secret).unwrap(), b"secret");
        assert_eq!(fs::read(scratch.path().join("root/secret")).unwrap(), b"mine");
        assert!(!scratch.path().join("new").exists());
        let absolute = Archive::new().link("absolute", &up).file("absolute/secret", b"mine");
        assert!(matches!(unpack(&scratch, absolute), Err(LayerError::Entry { .. })));
        assert_eq!(fs::read(&secret).unwrap(), b"secret");
        let link = Archive::new().link("up", "..").add(EntryType::Link, "stolen", "up/secret", b"");
        let other = Scratch::new("unpack");
        other.write("secret", b"secret");
        assert!(matches!(unpack(&other, link), Err(LayerError::Entry { .. })));
    }

    #[test]
    fn odd_names_and_links_are_refused() {
        assert!(refusal(Archive::new().file("/etc/passwd", b"")).contains("absolute"));
        assert!(refusal(Archive::new().file("a/../../b", b"")).contains(".."));
        assert!(refusal(Archive::new().add(EntryType::Link, "a", "../b", b"")).contains(".."));
        assert!(refusal(Archive::new().add(EntryType::Link, "a", "/etc/passwd", b"")).contains("absolute"));
        assert!(refusal(Archive::new().add(EntryType::Link, "a", "none", b"")).contains("not there"));
        assert!(
            refusal(Archive::new().directory("d").add(EntryType::Link, "a", "d", b"")).contains("directory")
        );
        assert!(refusal(Archive::new().link("a", "")).contains("nothing"));
        assert!(refusal(Archive::new().file("f", b"").file("f/g", b"")).contains("no directory"));
        assert!(refusal(Archive::new().file(".wh.", b"")).contains("whiteout"));
        assert!(refusal(Archive::new().file(".wh...", b"")).contains("whiteout"));
        assert!(refusal(Archive::new().link("l", "l").file("l/f", b"")).contains("no directory"));
    }

    #[test]
    fn what_is_removed_is_not_a_way_any_more() {
        let scratch = Scratch::new("unpack");
        let archive = Archive::new().directory("d").link("l", "d").file("l/x", b"").file(".wh.l", b"");
        unpack(&scratch, archive.file("l/y", b"")).unwrap();
        let root = scratch.path().join("root");
        assert!(root.join("d/x").exists() && root.join("l/y").exists() && !root.join("d/y").exists());
    }

    #[test]
    fn devices_are_those_that_linux_has() {
        let of = |kind, major, minor| {
            let mut header = crate::testing::header(kind, 0o600);
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
            header.set_path("device").unwrap();
            header.set_cksum();
            let scratch = Scratch::new("unpack");
            let root = fs::File::open(scratch.path()).unwrap().into();
            let archive = Sequential(&header.as_bytes()[..]);
            Tree::new(root, None).unpack(&mut Entries::new(archive), &mut { Budget::IMAGE })
        };
        for (major, minor) in [(0, 0), (0x1000, 0), (1, 0x10_0000)] {
            let refused = of(EntryType::Char, major, minor);
            assert!(matches!(refused, Err(LayerError::Entry { .. })), "{major}:{minor}");
        }
        assert!(matches!(of(EntryType::Block, 0x1000, 0), Err(LayerError::Entry { .. })));
    }

    #[test]
    fn names_are_shown_without_control_characters() {
        let refused = unpack(&Scratch::new("unpack"), Archive::new().file("/\x1b[31m\nx", b"")).unwrap_err();
        assert_eq!(refused.to_string(), "/\\u{1b}[31m\\nx cannot be: its path is absolute");
        let deep = "d/".repeat(45) + "f";
        assert!(unpack(&Scratch::new("unpack"), Archive::new().file(&deep, b"")).is_ok());
    }

    #[test]
    fn whiteouts_remove() {
        let scratch = Scratch::new("unpack");
        let archive = Archive::new().directory("d").file("d/a", b"").directory("d/b").file("d/b/c", b"");
        let archive = archive
            .file("d/.wh.a", b"")
            .file("d/.wh.b", b"")
            .file("none/.wh.x", b"")
            .file(".wh..wh.plnk", b"");
        unpack(&scratch, archive).unwrap();
        let root = scratch.path().join("root");
        assert_eq!(fs::read_dir(root.join("d")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(&root).unwrap().count(), 1);
    }

    #[test]
    fn an_opaque_directory_keeps_what_is_of_its_own_layer() {
        let scratch = Scratch::new("unpack");
        for file in
            ["merged/d/own", "merged/d/below", "merged/d/both/own", "merged/d/both/below", "merged/else"]
        {
            scratch.write(file, b"");
        }
        for file in ["own/d/own", "own/d/both/own"] {
            scratch.write(file, b"");
        }
        let open = |name: &str| -> OwnedFd { fs::File::open(scratch.path().join(name)).unwrap().into() };
        let archive = Archive::new().link("l", "d").file("l/.wh..wh..opq", b"").finish();
        let tree = Tree::new(open("merged"), Some(open("own")));
        tree.unpack(&mut Entries::new(Sequential(archive.as_slice())), &mut { Budget::IMAGE }).unwrap();
        let there = |name: &str| scratch.path().join("merged").join(name).exists();
        assert!(there("d/own") && there("d/both/own") && there("else"));
        assert!(!there("d/below") && !there("d/both/below"));
    }

    #[test]
    fn an_image_has_its_bounds() {
        let scratch = Scratch::new("unpack");
        let of = |bytes, entries| {
            unpack_into(
                scratch.path(),
                Archive::new().file("a", b"12345").file("b", b""),
                Budget { bytes, entries, ..Budget::IMAGE },
            )
        };
        assert!(of(5, 2).is_ok());
        assert!(matches!(of(4, 2), Err(LayerError::TooLarge(64))));
        assert!(matches!(of(5, 1), Err(LayerError::TooMany(_))));
        let few = Budget { entries: 5, ..Budget::IMAGE };
        let implied = unpack_into(scratch.path(), Archive::new().file("1/2/3/4/5/6", b""), few);
        assert!(matches!(implied, Err(LayerError::TooMany(_))));
        let little = Budget { memory: 100, ..Budget::IMAGE };
        let named = unpack_into(scratch.path(), Archive::new().directory("abc").directory("def"), little);
        assert!(matches!(named, Err(LayerError::TooMany(_))));
    }

    #[test]
    fn an_archive_that_ends_in_a_file_is_an_error() {
        let archive = Archive::new().file("a", &[1; 2000]).finish();
        let scratch = Scratch::new("unpack");
        let root = fs::File::open(scratch.path()).unwrap().into();
        let cut = Tree::new(root, None)
            .unpack(&mut Entries::new(Sequential(&archive[..1000])), &mut { Budget::IMAGE });
        assert!(matches!(cut, Err(LayerError::Make { .. })), "{cut:?}");
    }
}
