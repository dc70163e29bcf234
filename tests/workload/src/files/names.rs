//! Names: of files and directories, given, moved and taken away.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::mkfifo;

use super::children::Other;
use super::{Ground, Outcome, check, refused, same};

pub(super) fn rename_over(ground: &Ground) -> Outcome {
    let old = ground.file("old", b"old")?;
    let mut open = File::open(&old)?;
    let number = open.metadata()?.ino();
    for turn in 0..20 {
        let new = ground.file("new", format!("new {turn}").as_bytes())?;
        fs::rename(&new, &old)?;
        same("the new content", fs::read_to_string(&old)?, format!("new {turn}"))?;
        refused("the name that was given up", new.symlink_metadata(), libc::ENOENT)?;
    }
    let mut text = String::new();
    open.read_to_string(&mut text)?;
    same("the file that is still open", (text.as_str(), open.metadata()?.ino()), ("old", number))?;
    same("its names", open.metadata()?.nlink(), 0)?;
    // Two names of one file: nothing happens, and both stay.
    fs::hard_link(&old, ground.path("second"))?;
    fs::rename(&old, ground.path("second"))?;
    same("names of one file", old.metadata()?.nlink(), 2)
}

pub(super) fn rename_flags(ground: &Ground) -> Outcome {
    let (a, b) = (ground.file("a", b"a")?, ground.file("b", b"b")?);
    let rename = |flags| renameat2(AT_FDCWD, &a, AT_FDCWD, &b, flags);
    refused("a rename that replaces nothing", rename(RenameFlags::RENAME_NOREPLACE), libc::EEXIST)?;
    rename(RenameFlags::RENAME_EXCHANGE)?;
    same("exchanged", (fs::read_to_string(&a)?, fs::read_to_string(&b)?), ("b".into(), "a".into()))?;
    fs::remove_file(&b)?;
    refused("an exchange with nothing", rename(RenameFlags::RENAME_EXCHANGE), libc::ENOENT)?;
    rename(RenameFlags::RENAME_NOREPLACE)?;
    same("moved", fs::read_to_string(&b)?.as_str(), "b")
}

pub(super) fn rename_directories(ground: &Ground) -> Outcome {
    let [a, b, full] = ["a", "b", "full"].map(|name| ground.path(name));
    for directory in [&a, &b, &full] {
        fs::create_dir(directory)?;
    }
    fs::write(full.join("file"), "x")?;
    refused("over a directory with files", fs::rename(&a, &full), libc::ENOTEMPTY)?;
    refused("into itself", fs::rename(&a, a.join("below")), libc::EINVAL)?;
    refused("a file over a directory", fs::rename(full.join("file"), &a), libc::EISDIR)?;
    let file = ground.file("plain", b"")?;
    refused("a directory over a file", fs::rename(&a, &file), libc::ENOTDIR)?;
    same("links of the parent", ground.directory.metadata()?.nlink(), 5)?;
    fs::rename(&full, &b)?;
    same("over an empty one", fs::read_to_string(b.join("file"))?.as_str(), "x")?;
    fs::rename(&b, a.join("moved"))?;
    same("links of the parent", ground.directory.metadata()?.nlink(), 3)?;
    let up = fs::metadata(a.join("moved/.."))?.ino();
    same("the moved one's parent", up, a.metadata()?.ino())?;
    refused("one that is not empty", fs::remove_dir(&a), libc::ENOTEMPTY)?;
    // The directory that a process stands in.
    let here = File::open(a.join("moved"))?;
    fs::remove_file(a.join("moved/file"))?;
    fs::remove_dir(a.join("moved"))?;
    let inside = format!("/proc/self/fd/{}/new", std::os::fd::AsRawFd::as_raw_fd(&here));
    refused("a file in a removed directory", File::create(inside), libc::ENOENT)
}

pub(super) fn unlink_while_open(ground: &Ground) -> Outcome {
    let path = ground.file("file", b"before")?;
    let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
    fs::remove_file(&path)?;
    same("its names", file.metadata()?.nlink(), 0)?;
    file.write_all(b"after!")?;
    file.set_len(1 << 20)?;
    file.sync_all()?;
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    // Another file of the same name is another file.
    ground.file("file", b"another")?;
    file.rewind()?;
    let mut read = Vec::new();
    file.read_to_end(&mut read)?;
    same("its size", (read.len(), file.metadata()?.len()), (1 << 20, 1 << 20))?;
    check!(read.starts_with(b"after!\0"), "its content: {:?}", &read[..8]);
    same("the other file", fs::read_to_string(&path)?.as_str(), "another")?;
    // By way of /proc, as programs do that hand on what they have open.
    let by_proc = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    same("its size by /proc", fs::metadata(by_proc)?.len(), 1 << 20)
}

pub(super) fn errors(ground: &Ground) -> Outcome {
    let file = ground.file("file", b"x")?;
    let directory = ground.path("directory");
    fs::create_dir(&directory)?;
    fs::write(ground.path(&"n".repeat(255)), "x")?;
    refused("a name of 256 bytes", File::create(ground.path(&"n".repeat(256))), libc::ENAMETOOLONG)?;
    refused("a name in a file", File::open(file.join("below")), libc::ENOTDIR)?;
    refused("a file as a directory", fs::read_dir(&file).map(drop), libc::ENOTDIR)?;
    refused("writing a directory", OpenOptions::new().write(true).open(&directory), libc::EISDIR)?;
    refused("a second directory", fs::create_dir(&directory), libc::EEXIST)?;
    refused("a directory over a file", fs::create_dir(&file), libc::EEXIST)?;
    refused("removing a directory as a file", fs::remove_file(&directory), libc::EISDIR)?;
    refused("removing a file as a directory", fs::remove_dir(&file), libc::ENOTDIR)?;
    refused("a link to a directory", fs::hard_link(&directory, ground.path("link")), libc::EPERM)?;
    refused("a link over a file", fs::hard_link(&file, &directory), libc::EEXIST)?;
    symlink("round", ground.path("round"))?;
    refused("a link to itself", File::open(ground.path("round")), libc::ELOOP)?;
    let no_follow = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(ground.path("round"));
    refused("a link that is not followed", no_follow, libc::ELOOP)?;
    refused("a link to another file system", fs::hard_link(&file, "/dev/shm/link"), libc::EXDEV)?;
    let read_only = File::open(&file)?;
    refused("writing what is open to be read", read_only.write_at(b"x", 0), libc::EBADF)?;
    refused("a size for what is open to be read", read_only.set_len(0), libc::EINVAL)?;
    refused("removing `.`", fs::remove_dir(directory.join(".")), libc::EINVAL)?;
    let dangling = ground.path("dangling");
    symlink("target", &dangling)?;
    refused("a new file over a dangling link", File::create_new(&dangling), libc::EEXIST)?;
    File::create(&dangling)?;
    same("what a dangling link leads to", ground.path("target").metadata()?.len(), 0)
}

pub(super) fn bytes(ground: &Ground) -> Outcome {
    let mut wanted = BTreeSet::new();
    for byte in (1..=255_u8).filter(|byte| *byte != b'/') {
        let long = vec![byte; if byte % 16 == 0 { 255 } else { 2 }];
        for name in [vec![byte], long] {
            if name != b"."
                && name != b".."
                && File::create_new(ground.directory.join(OsStr::from_bytes(&name))).is_ok()
            {
                wanted.insert(name);
            }
        }
    }
    same("names", wanted.len(), 254 * 2 - 2)?;
    let found: BTreeSet<_> = fs::read_dir(&ground.directory)?
        .flatten()
        .map(|entry| entry.file_name().as_bytes().to_vec())
        .collect();
    check!(found == wanted, "other names are listed than were made");
    for name in &found {
        fs::remove_file(ground.directory.join(OsStr::from_bytes(name)))?;
    }
    Ok(())
}

pub(super) fn links(ground: &Ground) -> Outcome {
    let path = ground.file("file", b"content")?;
    let names: Vec<_> = (0..50).map(|number| ground.path(&format!("link {number}"))).collect();
    for name in &names {
        fs::hard_link(&path, name)?;
    }
    same("names", names[49].metadata()?.nlink(), 51)?;
    same("one file", names[7].metadata()?.ino(), path.metadata()?.ino())?;
    fs::write(&names[3], "changed by another name")?;
    same("its content", fs::read_to_string(&names[40])?.as_str(), "changed by another name")?;
    fs::remove_file(&path)?;
    same("names that are left", names[0].metadata()?.nlink(), 50)?;
    let target = "t/".repeat(2047);
    symlink(&target, ground.path("long"))?;
    same("a long target", fs::read_link(ground.path("long"))?.as_os_str(), OsStr::new(&target))?;
    same("its size", fs::symlink_metadata(ground.path("long"))?.len(), 4094)?;
    symlink("link 1", ground.path("soft"))?;
    fs::hard_link(ground.path("soft"), ground.path("soft too"))?;
    same("a link to a link", fs::read_link(ground.path("soft too"))?.as_os_str(), OsStr::new("link 1"))
}

pub(super) fn exclusive(ground: &Ground) -> Outcome {
    let names = 5 * ground.scale;
    let others: Vec<_> = (0..3)
        .map(|_| Other::start(&["create", &names.to_string()], &ground.directory))
        .collect::<Result<_, _>>()?;
    let mut made = 0;
    for other in others {
        made += other.word()?.parse::<usize>()?;
        other.end()?;
    }
    same("each name was made once", made, names)
}

pub(super) fn unnamed(ground: &Ground) -> Outcome {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_TMPFILE);
    if ground.is_share {
        // The library that serves the share does not know of it.
        return refused("a file without a name", options.open(&ground.directory), libc::EOPNOTSUPP);
    }
    let mut file = options.open(&ground.directory)?;
    file.write_all(b"unnamed")?;
    let from = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let (from, to) = (CString::new(from)?, CString::new(ground.path("named").as_os_str().as_bytes())?);
    // SAFETY: both are C strings that live until after the call.
    let linked = unsafe {
        libc::linkat(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), libc::AT_SYMLINK_FOLLOW)
    };
    same("the link", linked, 0)?;
    same("its content", fs::read_to_string(ground.path("named"))?.as_str(), "unnamed")
}

pub(super) fn special(ground: &Ground) -> Outcome {
    let fifo = ground.path("fifo");
    mkfifo(&fifo, Mode::S_IRWXU)?;
    let reading = fifo.clone();
    let reader = thread::spawn(move || fs::read(reading).unwrap_or_default());
    fs::write(&fifo, [7; 100_000])?;
    same("through a FIFO", reader.join().map_err(|_| "the reader")?.len(), 100_000)?;
    let socket = ground.path("socket");
    let listener = UnixListener::bind(&socket)?;
    let server =
        thread::spawn(move || listener.accept().and_then(|(mut stream, _)| stream.write_all(b"hello")));
    let mut text = String::new();
    UnixStream::connect(&socket)?.read_to_string(&mut text)?;
    server.join().map_err(|_| "the server")??;
    same("through a socket", text.as_str(), "hello")?;
    refused("a second socket of that name", UnixListener::bind(&socket), libc::EADDRINUSE)?;
    if ground.is_share {
        let node = mknod(&ground.path("null"), SFlag::S_IFCHR, Mode::S_IRWXU, nix::sys::stat::makedev(1, 3));
        refused("a device node", node, libc::EPERM)?;
    }
    Ok(())
}

/// A directory that is listed with positions to return to, as a file server does.
struct Listing(*mut libc::DIR);

impl Listing {
    fn open(path: &Path) -> Outcome<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: a C string that lives until after the call.
        let listing = unsafe { libc::opendir(path.as_ptr()) };
        check!(!listing.is_null(), "{}", std::io::Error::last_os_error());
        Ok(Self(listing))
    }

    fn next(&mut self) -> Option<Vec<u8>> {
        // SAFETY: the listing is open, and used by this thread alone.
        let entry = unsafe { libc::readdir64(self.0) };
        // SAFETY: null, or an entry that the C library keeps until the next call.
        let entry = unsafe { entry.as_ref() }?;
        // SAFETY: the C library ends each name with a NUL, and keeps the entry until the next call.
        Some(unsafe { CStr::from_ptr(entry.d_name.as_ptr()) }.to_bytes().to_vec())
    }

    fn position(&self) -> i64 {
        // SAFETY: the listing is open.
        unsafe { libc::telldir(self.0) }
    }

    fn seek(&mut self, position: i64) {
        // SAFETY: the listing is open, and the position is one of it.
        unsafe { libc::seekdir(self.0, position) }
    }
}

impl Drop for Listing {
    fn drop(&mut self) {
        // SAFETY: open until now, and not used afterwards.
        unsafe { libc::closedir(self.0) };
    }
}

pub(super) fn large_directory(ground: &Ground) -> Outcome {
    let count = 100 * ground.scale;
    for number in 0..count {
        File::create_new(ground.path(&format!("entry {number:05}")))?;
    }
    let mut listing = Listing::open(&ground.directory)?;
    let mut seen = Vec::new();
    loop {
        let position = listing.position();
        let Some(name) = listing.next() else { break };
        seen.push((position, name));
    }
    let names: BTreeSet<_> = seen.iter().map(|(_, name)| name).filter(|name| name.len() > 2).collect();
    // The share lists neither `.` nor `..`: POSIX leaves that open.
    let dots = if ground.is_share { 0 } else { 2 };
    same("names in a large directory", (names.len(), seen.len()), (count, count + dots))?;
    for step in 0..100 {
        let (position, name) = &seen[step * 7919 % seen.len()];
        listing.seek(*position);
        same("the entry of a position", listing.next().as_ref(), Some(name))?;
    }
    // Removed while it is listed, as `rm -r` does: nothing is left out.
    let mut removed = 0;
    for entry in fs::read_dir(&ground.directory)? {
        fs::remove_file(entry?.path())?;
        removed += 1;
    }
    same("entries that were removed", removed, count)?;
    same("entries that are left", fs::read_dir(&ground.directory)?.count(), 0)
}
