//! A connection that has not said yet what it is for. Not a byte beyond the hello is read here: what follows
//! is the stream's.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use krx_proto::{DeserializeOwned, decode};
use nix::errno::Errno;
use nix::unistd::read;

/// A hello has two ids of at most 76 bytes; a longer claim would only make the agent keep what is no hello.
const MAX_HELLO: usize = 512;
const PREFIX: usize = 4;

#[derive(Debug)]
pub(crate) struct Greeting {
    socket: OwnedFd,
    received: Vec<u8>,
}

/// How far a greeting is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Said<T> {
    /// Not everything yet.
    More,
    Hello(T),
    /// Closed, or no hello.
    Nonsense,
}

impl Greeting {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket, received: Vec::new() }
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(crate) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Reads what is there of the hello.
    pub(crate) fn advance<T: DeserializeOwned>(&mut self) -> Said<T> {
        loop {
            let Some(whole) = self.length() else { return Said::Nonsense };
            if self.received.len() == whole {
                return decode(&self.received[PREFIX..]).map_or(Said::Nonsense, Said::Hello);
            }
            let mut buffer = [0; MAX_HELLO];
            match read(&self.socket, &mut buffer[..whole - self.received.len()]) {
                Ok(length @ 1..) => self.received.extend_from_slice(&buffer[..length]),
                Err(Errno::EAGAIN | Errno::EINTR) => return Said::More,
                Ok(0) | Err(_) => return Said::Nonsense,
            }
        }
    }

    /// Length to read up to, as far as it is known: of the prefix, then of the frame. `None`: no hello is so long.
    fn length(&self) -> Option<usize> {
        let Some(prefix) = self.received.first_chunk::<PREFIX>() else { return Some(PREFIX) };
        let payload = usize::try_from(u32::from_le_bytes(*prefix)).ok()?;
        (1..=MAX_HELLO - PREFIX).contains(&payload).then_some(PREFIX + payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use krx_proto::{Stream, StreamHello, encode};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn hello() -> StreamHello {
        StreamHello { container: "c".into(), process: String::new(), stream: Stream::Stdin }
    }

    fn connected() -> (UnixStream, Greeting) {
        let (host, guest) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        (host, Greeting::new(guest.into()))
    }

    #[test]
    fn bytes_after_the_hello_stay_in_the_connection() {
        let (mut host, mut greeting) = connected();
        let mut wire = encode(&hello()).unwrap();
        wire.extend_from_slice(b"data");
        for byte in &wire[..5] {
            assert_eq!(greeting.advance::<StreamHello>(), Said::More);
            host.write_all(&[*byte]).unwrap();
        }
        host.write_all(&wire[5..]).unwrap();
        assert_eq!(greeting.advance(), Said::Hello(hello()));
        let mut rest = [0; 4];
        UnixStream::from(greeting.into_socket()).read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"data");
    }

    #[test]
    fn long_empty_garbled_and_cut_hellos_are_nonsense() {
        for wire in [&u32::MAX.to_le_bytes()[..], &[0; 4], &509_u32.to_le_bytes(), &[1, 0, 0, 0, 0xff]] {
            let (mut host, mut greeting) = connected();
            host.write_all(wire).unwrap();
            assert_eq!(greeting.advance::<StreamHello>(), Said::Nonsense);
        }
        let (mut host, mut greeting) = connected();
        host.write_all(&encode(&hello()).unwrap()[..6]).unwrap();
        drop(host);
        assert_eq!(greeting.advance::<StreamHello>(), Said::Nonsense);
    }
}
