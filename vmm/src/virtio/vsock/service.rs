//! Services of the host that the guest's connections go to: unix sockets beside the one that host clients connect to.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::host_socket::{self, Listener};

/// Connects to who serves the host's `port`: a unix socket beside that of `listener`, `<path>_<port>`.
pub(super) fn dial(listener: &Listener, port: u32) -> io::Result<UnixStream> {
    let mut path = listener.path().as_os_str().to_owned();
    path.push(format!("_{port}"));
    host_socket::dial(Path::new(&path))
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::fd::AsRawFd;

    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    #[test]
    fn full_backlog_of_a_service_does_not_block_the_dialler() {
        let dir = TempDir::new().unwrap();
        let listener = Listener::bind(dir.as_path().join("v.sock")).unwrap();
        let service = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
        let address = UnixAddr::new(&dir.as_path().join("v.sock_7")).unwrap();
        bind(service.as_raw_fd(), &address).unwrap();
        listen(&service, Backlog::new(1).unwrap()).unwrap();
        let mut waiting = Vec::new();
        let refused = loop {
            match dial(&listener, 7) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
            assert!(waiting.len() < 100);
        };
        assert_eq!(refused.kind(), ErrorKind::WouldBlock);
        assert_eq!(dial(&listener, 8).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
