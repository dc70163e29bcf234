//! Requests of rtnetlink, written by hand: the agent needs four of them, and a crate that knows all would be a fourth of
//! its size. What the kernel answers is a number; nothing is asked here that has more to say.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// Message types of `linux/netlink.h` and `linux/rtnetlink.h`.
const ERROR: u16 = 2;
pub(crate) const NEW_LINK: u16 = 16;
pub(crate) const NEW_ADDRESS: u16 = 20;
pub(crate) const NEW_ROUTE: u16 = 24;
pub(crate) const NEW_NEIGHBOUR: u16 = 28;

/// Flags of a request (`NLM_F_*`).
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
pub(crate) const REPLACE: u16 = 0x100;
pub(crate) const CREATE: u16 = 0x400;
pub(crate) const APPEND: u16 = 0x800;

/// `struct nlmsghdr`: length, type, flags, sequence, port.
const HEADER: usize = 16;
/// Holds an answer: the header, a number, and the request's own beginning.
const ANSWER: usize = 4096;

/// A request in the making.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message(Vec<u8>);

impl Message {
    /// With the fixed part that belongs to the type.
    pub(crate) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(REQUEST | ACKNOWLEDGE | flags).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self(bytes)
    }

    /// Adds an attribute; all of those used here are short.
    pub(crate) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend(attribute(kind, value));
        self
    }

    pub(crate) fn with_if(self, kind: u16, value: Option<impl AsRef<[u8]>>) -> Self {
        match value {
            Some(value) => self.with(kind, value.as_ref()),
            None => self,
        }
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// `struct nlattr` with its value, up to where the next may begin.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A connection to the kernel's network configuration.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub(crate) fn open() -> nix::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Carries out one request. The kernel does so within the sending, so the answer is there when that returns.
    pub(crate) fn request(&mut self, message: Message) -> nix::Result<()> {
        self.sequence += 1;
        send(self.socket.as_raw_fd(), &message.finish(self.sequence), MsgFlags::empty())?;
        let mut answer = [0; ANSWER];
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
            if let Some(result) = outcome(&answer[..length], self.sequence) {
                return result;
            }
        }
    }
}

/// What an answer says of the request of that number. `None`: it is about something else.
fn outcome(answer: &[u8], sequence: u32) -> Option<nix::Result<()>> {
    let word = |at: usize| answer.get(at..at + 4)?.first_chunk::<4>().copied();
    let kind = u16::from_ne_bytes(*answer.get(4..6)?.first_chunk()?);
    if kind != ERROR || u32::from_ne_bytes(word(8)?) != sequence {
        return None;
    }
    match i32::from_ne_bytes(word(HEADER)?) {
        0 => Some(Ok(())),
        error => Some(Err(Errno::from_raw(error.saturating_neg()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_tell_their_length_without_the_padding() {
        assert_eq!(attribute(3, b"eth0\0"), [9, 0, 3, 0, b'e', b't', b'h', b'0', 0, 0, 0, 0]);
        let bytes = Message::new(NEW_LINK, CREATE, &[0; 16]).with(4, &1500_u32.to_ne_bytes()).finish(7);
        assert_eq!(bytes.len(), 40);
        assert_eq!(bytes[..12], [40, 0, 0, 0, 16, 0, 5, 4, 7, 0, 0, 0]);
    }

    #[test]
    fn answers_are_of_the_request_or_nothing() {
        let answer = |kind: u16, sequence: u32, error: i32| {
            let mut bytes = vec![20, 0, 0, 0];
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0, 0]);
            bytes.extend(sequence.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(error.to_ne_bytes());
            bytes
        };
        assert_eq!(outcome(&answer(ERROR, 7, 0), 7), Some(Ok(())));
        assert_eq!(outcome(&answer(ERROR, 7, -libc::EEXIST), 7), Some(Err(Errno::EEXIST)));
        assert!(outcome(&answer(ERROR, 7, i32::MIN), 7).is_some_and(|result| result.is_err()));
        assert_eq!(outcome(&answer(ERROR, 6, 0), 7), None);
        assert_eq!(outcome(&answer(NEW_LINK, 7, 0), 7), None);
        for length in 0..20 {
            assert_eq!(outcome(&answer(ERROR, 7, 0)[..length], 7), None);
        }
    }

    /// Needs no rights: the kernel refuses before it looks for any.
    #[test]
    fn the_kernel_answers() {
        let mut netlink = Netlink::open().unwrap();
        let nothing = Message::new(NEW_LINK, 0, &[0; 16]);
        for _ in 0..2 {
            assert!(matches!(
                netlink.request(nothing.clone()),
                Err(Errno::EINVAL | Errno::EPERM | Errno::ENODEV)
            ));
        }
    }
}
