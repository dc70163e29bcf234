//! One control connection: frames in, frames out, without ever blocking. What the calls mean is not its business.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use krx_proto::{Call, FrameError, Message, VERSION, encode, take_frame};
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::unistd::{read, write};

use crate::guest;

/// Replies kept for a peer that does not read them; it is served no further calls until it has. Stops a peer that
/// only sends from filling the guest's memory with replies.
const MAX_UNREAD: usize = 256 << 10;

#[derive(Debug)]
pub(crate) struct Control {
    socket: OwnedFd,
    input: Vec<u8>,
    output: Vec<u8>,
}

/// Why a control connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("Peer closed the connection")]
    Closed,
    #[error("Connection to the peer failed")]
    Socket(#[source] Errno),
    #[error("Peer does not speak the protocol")]
    Frame(#[from] FrameError),
}

impl Control {
    /// Greets the peer.
    pub(crate) fn new(socket: OwnedFd) -> Result<Self, ControlError> {
        let mut control = Self { socket, input: Vec::new(), output: Vec::new() };
        control.send(&Message::Hello { version: VERSION, guest: guest::info() })?;
        Ok(control)
    }

    pub(crate) fn waits_for(&self) -> (BorrowedFd<'_>, PollFlags) {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, self.output.len() < MAX_UNREAD);
        flags.set(PollFlags::POLLOUT, !self.output.is_empty());
        (self.socket.as_fd(), flags)
    }

    /// Queues a message and sends what can be sent at once.
    pub(crate) fn send(&mut self, message: &Message) -> Result<(), ControlError> {
        self.output.append(&mut encode(message)?);
        self.flush()
    }

    /// Sends what is queued, then reads what is there.
    pub(crate) fn advance(&mut self, buffer: &mut [u8]) -> Result<(), ControlError> {
        self.flush()?;
        if self.output.len() >= MAX_UNREAD {
            return Ok(());
        }
        match read(&self.socket, buffer) {
            Ok(0) => Err(ControlError::Closed),
            Ok(length) => {
                self.input.extend_from_slice(&buffer[..length]);
                Ok(())
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Err(error) => Err(ControlError::Socket(error)),
        }
    }

    /// The next call that was read whole, unless there are replies enough for the peer to read first.
    pub(crate) fn next_call(&mut self) -> Result<Option<Call>, ControlError> {
        if self.output.len() >= MAX_UNREAD {
            return Ok(None);
        }
        let call = take_frame(&mut self.input)?;
        if self.input.is_empty() {
            self.input = Vec::new();
        }
        Ok(call)
    }

    fn flush(&mut self) -> Result<(), ControlError> {
        while !self.output.is_empty() {
            match write(&self.socket, &self.output) {
                Ok(written) => drop(self.output.drain(..written)),
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
                Err(error) => return Err(ControlError::Socket(error)),
            }
        }
        self.output = Vec::new();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use krx_proto::{Request, read_frame};
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn connected() -> (UnixStream, Control) {
        let (host, guest) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        let control = Control::new(guest.into()).unwrap();
        (host, control)
    }

    #[test]
    fn the_first_word_is_the_hello() {
        let (mut host, _control) = connected();
        let message: Message = read_frame(&mut host).unwrap();
        let Message::Hello { version: VERSION, guest } = message else { panic!() };
        assert!(guest.cpus > 0 && guest.memory_kib > 0 && guest.uptime_ns > 0 && !guest.kernel.is_empty());
    }

    #[test]
    fn calls_before_garbage_are_served_and_the_connection_ends() {
        let (mut host, mut control) = connected();
        let call = Call { number: 3, request: Request::List };
        host.write_all(&encode(&call).unwrap()).unwrap();
        host.write_all(&[0xff; 64]).unwrap();
        control.advance(&mut [0; 4096]).unwrap();
        assert_eq!(control.next_call().unwrap(), Some(call));
        assert!(matches!(control.next_call(), Err(ControlError::Frame(FrameError::TooLarge(_)))));
    }

    #[test]
    fn a_peer_that_does_not_read_is_not_served() {
        let (mut host, mut control) = connected();
        let filler = Message::Hello {
            version: VERSION,
            guest: krx_proto::GuestInfo { kernel: "k".repeat(64 << 10), ..Default::default() },
        };
        while control.output.len() < MAX_UNREAD {
            control.send(&filler).unwrap();
        }
        host.write_all(&encode(&Call { number: 1, request: Request::List }).unwrap()).unwrap();
        control.advance(&mut [0; 4096]).unwrap();
        assert_eq!(control.next_call().unwrap(), None);
        assert!(!control.waits_for().1.contains(PollFlags::POLLIN));
    }

    #[test]
    fn a_closed_connection_is_told_from_an_idle_one() {
        let (host, mut control) = connected();
        assert!(control.advance(&mut [0; 64]).is_ok());
        drop(host);
        assert!(matches!(control.advance(&mut [0; 64]), Err(ControlError::Closed | ControlError::Socket(_))));
    }
}
