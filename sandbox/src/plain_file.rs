//! Files in a pod's directory. Its VMM can write in a part of it, and may be the guest's: no link is followed, nothing but a
//! regular file is opened, and nobody waits for the other end of a pipe.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::fcntl::OFlag;

/// Opens a regular file.
///
/// # Errors
/// It is something else (`ELOOP` for a symbolic link), or the kernel refuses.
pub(crate) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let file = options.custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits()).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("It is not a regular file")) }
}

/// Reads at most `limit` bytes of a file; `None` where there is none.
///
/// # Errors
/// As [`open`]; a longer file.
pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    match open(path, OpenOptions::new().read(true)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => read_capped(opened?, limit).map(Some),
    }
}

/// Writes a file for its owner alone, and puts it in the place of the one before, all at once.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    // That of someone who was killed here, or a link.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(content).and_then(|()| fs::rename(&new, path))
}

/// Connects to a unix socket.
///
/// # Errors
/// It is something else (`ELOOP` for a symbolic link), or nobody listens.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    let socket = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    match socket.metadata()?.file_type() {
        kind if kind.is_symlink() => Err(io::Error::from_raw_os_error(libc::ELOOP)),
        kind if kind.is_socket() => UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())),
        _ => Err(io::Error::other("It is not a socket")),
    }
}

/// Whether both are of one file.
pub(crate) fn is_same(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// Whether a process has a file open: the kernel's word, whatever is written where.
pub(crate) fn is_open_in(pid: u32, file: &Path) -> bool {
    let Ok(wanted) = fs::symlink_metadata(file) else { return false };
    // Each leads to the file itself, by whichever name.
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"));
    let mut open =
        descriptors.into_iter().flatten().flatten().filter_map(|entry| fs::metadata(entry.path()).ok());
    wanted.is_file() && open.any(|found| is_same(&found, &wanted))
}

/// Reads at most `limit` bytes; a longer file is an error rather than cut.
pub(crate) fn read_capped(file: File, limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("File is over {limit} bytes")));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::process;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;
    use crate::testing::Scratch;

    #[test]
    fn what_is_no_file_is_neither_read_nor_written() {
        let scratch = Scratch::new("plain");
        let precious = scratch.write("precious", b"data");
        let path = scratch.path().join("state.json");
        assert!(read(&path, 9).unwrap().is_none());
        symlink(&precious, &path).unwrap();
        symlink(&precious, scratch.path().join("state.new")).unwrap();
        assert!(read(&path, 9).is_err());
        assert!(open(&path, OpenOptions::new().read(true).write(true).truncate(true)).is_err());
        replace(&path, b"new").unwrap();
        assert_eq!(read(&path, 9).unwrap().unwrap(), b"new");
        assert_eq!(fs::read(&precious).unwrap(), b"data");
        fs::remove_file(&path).unwrap();
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        assert!(read(&path, 9).is_err());
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(read(&path, 9).is_err() && replace(&path, b"new").is_err());
    }

    #[test]
    fn what_is_no_socket_is_not_connected_to() {
        let scratch = Scratch::new("plain");
        let path = scratch.path().join("vsock.sock");
        assert_eq!(connect(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        let _listener = UnixListener::bind(&path).unwrap();
        assert!(connect(&path).is_ok());
        let link = scratch.path().join("link");
        symlink(&path, &link).unwrap();
        assert_eq!(connect(&link).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert!(connect(&scratch.write("file", b"")).is_err() && connect(scratch.path()).is_err());
    }

    #[test]
    fn long_files_are_refused() {
        let scratch = Scratch::new("plain");
        let path = scratch.write("long", &[b'x'; 10]);
        assert!(read(&path, 10).is_ok_and(|content| content.is_some_and(|content| content.len() == 10)));
        assert_eq!(read(&path, 9).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }

    #[test]
    fn who_has_a_file_open_is_known() {
        let scratch = Scratch::new("plain");
        let path = scratch.write("lock", b"");
        assert!(!is_open_in(process::id(), &path));
        let held = File::open(&path).unwrap();
        assert!(is_open_in(process::id(), &path));
        assert!(!is_open_in(1, &path) && !is_open_in(0, &path));
        // Another file by its name, and a link to it.
        fs::rename(&path, scratch.path().join("moved")).unwrap();
        symlink(scratch.path().join("moved"), &path).unwrap();
        assert!(!is_open_in(process::id(), &path));
        drop(held);
    }
}
