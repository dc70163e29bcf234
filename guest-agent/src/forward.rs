//! A connection of the host on its way to a TCP port of the guest's loopback: it says which, the port is called, and from then
//! on two relays have it. Nothing here waits.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use krx_proto::{FORWARDED, ForwardHello};
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, connect, getsockopt, socket, sockopt,
};
use nix::unistd::write;

use crate::greeting::{Greeting, Said};
use crate::relay::Relay;

/// One connection.
#[derive(Debug)]
pub(crate) struct Forward(Stage);

#[derive(Debug)]
enum Stage {
    Greeting(Greeting),
    Calling { host: OwnedFd, program: OwnedFd, port: u16, family: AddressFamily },
    Over,
}

/// How far it is.
#[derive(Debug)]
pub(crate) enum Progress {
    More,
    /// Closed, nonsense, or nobody listens.
    Over,
    Connected([Relay; 2]),
}

impl Forward {
    pub(crate) fn new(host: OwnedFd) -> Self {
        Self(Stage::Greeting(Greeting::new(host)))
    }

    pub(crate) fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match &self.0 {
            Stage::Greeting(greeting) => Some((greeting.socket(), PollFlags::POLLIN)),
            Stage::Calling { program, .. } => Some((program.as_fd(), PollFlags::POLLOUT)),
            Stage::Over => None,
        }
    }

    pub(crate) fn advance(&mut self) -> Progress {
        match std::mem::replace(&mut self.0, Stage::Over) {
            Stage::Greeting(mut greeting) => match greeting.advance::<ForwardHello>() {
                Said::More => {
                    self.0 = Stage::Greeting(greeting);
                    Progress::More
                }
                Said::Nonsense => Progress::Over,
                Said::Hello(ForwardHello { port }) => {
                    self.call(greeting.into_socket(), port, AddressFamily::Inet)
                }
            },
            Stage::Calling { host, program, port, family } => {
                match (getsockopt(&program, sockopt::SocketError), family) {
                    (Ok(0), _) => connected(host, program),
                    // A server that has only the other kind of address.
                    (_, AddressFamily::Inet) => self.call(host, port, AddressFamily::Inet6),
                    _ => Progress::Over,
                }
            }
            Stage::Over => Progress::Over,
        }
    }

    fn call(&mut self, host: OwnedFd, port: u16, family: AddressFamily) -> Progress {
        match call(port, family) {
            Ok(program) => {
                self.0 = Stage::Calling { host, program, port, family };
                Progress::More
            }
            Err(_) if family == AddressFamily::Inet => self.call(host, port, AddressFamily::Inet6),
            Err(_) => Progress::Over,
        }
    }
}

/// Begins to connect to a port of the loopback.
fn call(port: u16, family: AddressFamily) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let program = socket(family, SockType::Stream, flags, None)?;
    let called = if family == AddressFamily::Inet {
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        connect(program.as_raw_fd(), &SockaddrIn::from(address))
    } else {
        let address = SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0);
        connect(program.as_raw_fd(), &SockaddrIn6::from(address))
    };
    match called {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(program),
        Err(error) => Err(error),
    }
}

fn connected(host: OwnedFd, program: OwnedFd) -> Progress {
    // The first byte on this connection, so there is room for it, unless the host is gone.
    if write(&host, &[FORWARDED]) != Ok(1) {
        return Progress::Over;
    }
    let (host, program) = (Rc::new(host), Rc::new(program));
    Progress::Connected([Relay::half(host.clone(), program.clone()), Relay::half(program, host)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener};
    use std::os::unix::net::UnixStream;

    use nix::poll::{PollFd, PollTimeout, poll};

    fn to(port: u16) -> (UnixStream, Forward) {
        let (mut host, guest) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        host.write_all(&krx_proto::encode(&ForwardHello { port }).unwrap()).unwrap();
        (host, Forward::new(guest.into()))
    }

    /// As the server does.
    fn finish(mut forward: Forward) -> Progress {
        loop {
            match forward.advance() {
                Progress::More => {
                    let (fd, flags) = forward.waits_for().unwrap();
                    poll(&mut [PollFd::new(fd, flags)], PollTimeout::from(5000_u16)).unwrap();
                }
                end => return end,
            }
        }
    }

    #[test]
    fn each_direction_ends_by_itself() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let (mut host, forward) = to(listener.local_addr().unwrap().port());
            let Progress::Connected([mut there, mut back]) = finish(forward) else { panic!("{address}") };
            let (mut program, _) = listener.accept().unwrap();
            let mut buffer = vec![0; crate::relay::CHUNK];
            host.write_all(b"question").unwrap();
            host.shutdown(Shutdown::Write).unwrap();
            while !there.has_ended() {
                there.advance(&mut buffer);
            }
            drop(there);
            let mut text = String::new();
            program.read_to_string(&mut text).unwrap();
            assert_eq!(text, "question");
            program.write_all(b"answer").unwrap();
            drop(program);
            while !back.has_ended() {
                back.advance(&mut buffer);
            }
            drop(back);
            let mut bytes = Vec::new();
            host.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes, b"\x01answer");
        }
    }

    #[test]
    fn nobody_who_listens_and_nonsense_are_the_end() {
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (mut host, forward) = to(closed);
        assert!(matches!(finish(forward), Progress::Over));
        assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
        let (mut host, guest) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        host.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(finish(Forward::new(guest.into())), Progress::Over));
    }
}
