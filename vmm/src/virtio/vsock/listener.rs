//! The unix sockets of the host: the one that host clients connect to, and those that the guest's connections go to.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::VsockError;

/// The listening socket, and its file for as long as it lives.
#[derive(Debug)]
pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens on `path`; replaces a socket that a dead process left there.
    pub(super) fn bind(path: PathBuf) -> Result<Self, VsockError> {
        remove_stale(&path)?;
        let listen = || -> io::Result<UnixListener> {
            let socket = UnixListener::bind(&path)?;
            // Who may connect can talk to the agent: that is for the owner alone.
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        match listen() {
            Ok(socket) => Ok(Self { socket, path }),
            Err(source) => Err(VsockError::Listen { path, source }),
        }
    }

    /// The next client that waits, non-blocking in all it does.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        let (client, _) = self.socket.accept()?;
        client.set_nonblocking(true)?;
        Ok(client)
    }

    /// Connects to who serves the host's `port`: a unix socket beside this one, `<path>_<port>`.
    pub(super) fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        dial(Path::new(&path))
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

impl Drop for Listener {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn remove_stale(path: &Path) -> Result<(), VsockError> {
    let failed = |source| VsockError::Listen { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => Err(VsockError::NotASocket(path.to_owned())),
        Ok(_) => match dial(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)
            }
            // Connected, or its backlog is full.
            _ => Err(VsockError::InUse(path.to_owned())),
        },
    }
}

/// A unix stream connection that does not wait, neither now for a full backlog nor later.
fn dial(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

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
        assert!(matches!(Listener::bind(path(&dir)), Err(VsockError::InUse(_))));
        assert!(path(&dir).exists());
        drop(listener);
    }

    #[test]
    fn other_files_are_left_alone() {
        let dir = TempDir::new().unwrap();
        std::fs::File::create(path(&dir)).unwrap().write_all(b"precious").unwrap();
        assert!(matches!(Listener::bind(path(&dir)), Err(VsockError::NotASocket(_))));
        assert_eq!(std::fs::read(path(&dir)).unwrap(), b"precious");
    }

    #[test]
    fn overlong_and_missing_directories_are_errors() {
        let dir = TempDir::new().unwrap();
        let long = dir.as_path().join("x".repeat(120));
        assert!(matches!(Listener::bind(long), Err(VsockError::Listen { .. })));
        let nowhere = dir.as_path().join("no").join("v.sock");
        assert!(matches!(Listener::bind(nowhere), Err(VsockError::Listen { .. })));
    }

    #[test]
    fn full_backlog_of_a_service_does_not_block_the_dialler() {
        let dir = TempDir::new().unwrap();
        let listener = Listener::bind(path(&dir)).unwrap();
        let service = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
        let address = UnixAddr::new(&dir.as_path().join("v.sock_7")).unwrap();
        nix::sys::socket::bind(service.as_raw_fd(), &address).unwrap();
        nix::sys::socket::listen(&service, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
        let mut waiting = Vec::new();
        let refused = loop {
            match listener.dial(7) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
            assert!(waiting.len() < 100);
        };
        assert_eq!(refused.kind(), ErrorKind::WouldBlock);
        assert_eq!(listener.dial(8).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
