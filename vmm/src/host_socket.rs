//! Unix sockets that have a file on the host: the control socket and that of the vsock device. A file lives as long as
//! its listener, and nothing is removed but what was made here, or what a dead process has left.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::stat::{Mode, fchmod};

/// Why a path cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("Cannot listen on {path}", path = .path.display())]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Another process listens on {path} already: give another path, or end that process", path = .0.display())]
    InUse(PathBuf),
    #[error("{path} exists and is not a socket: give another path, or remove it", path = .0.display())]
    NotASocket(PathBuf),
}

/// A listening socket, and its file for as long as it lives.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    file: SocketFile,
}

/// The file of a bound socket; removed when dropped.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Listener {
    /// Listens on `path`; replaces a socket that a dead process left there.
    ///
    /// # Errors
    /// The path cannot be listened on, or is another's.
    pub fn bind(path: PathBuf) -> Result<Self, BindError> {
        let made = match listen(&path) {
            // What is there is looked at only now: on nearly every start it is nothing.
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale(&path)?;
                listen(&path)
            }
            made => made,
        };
        made.map_err(|source| BindError::Listen { path, source })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.file.0
    }

    /// The next client that waits, non-blocking in all it does.
    ///
    /// # Errors
    /// What accept(2) says; `WouldBlock` when nobody waits.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (client, _) = self.socket.accept()?;
        client.set_nonblocking(true)?;
        Ok(client)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn listen(path: &Path) -> io::Result<Listener> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // Who may connect can stop the guest and talk to the agent: that is for the owner alone. Linux gives the file the mode
    // of the socket, so there is no moment at which it has another.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket::bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let file = SocketFile(path.to_owned());
    socket::listen(&socket, Backlog::MAXCONN)?;
    Ok(Listener { socket: socket.into(), file })
}

fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |source| BindError::Listen { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => Err(BindError::NotASocket(path.to_owned())),
        Ok(_) => match dial(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)
            }
            // Connected, or its backlog is full.
            _ => Err(BindError::InUse(path.to_owned())),
        },
    }
}

/// A unix stream connection that does not wait, neither now for a full backlog nor later.
///
/// # Errors
/// What connect(2) says; `WouldBlock` when the backlog is full.
pub fn dial(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    fn path(dir: &TempDir) -> PathBuf {
        dir.as_path().join("v.sock")
    }

    #[test]
    fn file_lives_as_long_as_the_listener() {
        let dir = TempDir::new().unwrap();
        let listener = Listener::bind(path(&dir)).unwrap();
        assert_eq!(std::fs::metadata(path(&dir)).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(listener);
        assert!(!path(&dir).exists());
    }

    #[test]
    fn stale_socket_is_replaced_a_live_one_is_not() {
        let dir = TempDir::new().unwrap();
        drop(UnixListener::bind(path(&dir)).unwrap());
        let listener = Listener::bind(path(&dir)).unwrap();
        assert!(matches!(Listener::bind(path(&dir)), Err(BindError::InUse(_))));
        assert!(path(&dir).exists(), "who could not bind has nothing to remove");
        drop(listener);
    }

    #[test]
    fn other_files_are_left_alone() {
        let dir = TempDir::new().unwrap();
        std::fs::File::create(path(&dir)).unwrap().write_all(b"precious").unwrap();
        assert!(matches!(Listener::bind(path(&dir)), Err(BindError::NotASocket(_))));
        assert_eq!(std::fs::read(path(&dir)).unwrap(), b"precious");
    }

    #[test]
    fn overlong_and_missing_directories_are_errors() {
        let dir = TempDir::new().unwrap();
        let long = dir.as_path().join("x".repeat(120));
        assert!(matches!(Listener::bind(long), Err(BindError::Listen { .. })));
        let nowhere = dir.as_path().join("no").join("v.sock");
        assert!(matches!(Listener::bind(nowhere), Err(BindError::Listen { .. })));
    }
}
