//! Requests to the kernel's network configuration, one after the other. The messages are those of the `netlink-packet`
//! crates; this is only their way to the kernel and back.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, socket,
};

/// The kernel's answers come in pieces of at most 32 KiB.
const BUFFER: usize = 64 << 10;
/// Longest list that is taken. The kernel's own entries for each address come with it: local, broadcast, multicast.
const MAX_LIST: usize = 16 << 10;
/// A list during whose making something changed is asked for again, but not for ever.
const TRIES: u32 = 5;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// Why the kernel did not do or say what was asked.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    #[error("The kernel refused")]
    Refused(#[source] io::Error),
    #[error("The kernel's answer cannot be read: this krx does not know its form")]
    Malformed(#[source] DecodeError),
    #[error("The kernel's answer ends in the middle")]
    Short,
    #[error("The list is longer than {MAX_LIST} entries")]
    Long,
    #[error("The list changed each time it was read")]
    Unsteady,
}

impl NetlinkError {
    /// Whether the kernel refused for this reason.
    pub(super) fn is(&self, errno: nix::Error) -> bool {
        matches!(self, Self::Refused(error) if error.raw_os_error() == Some(errno as i32))
    }
}

impl From<nix::Error> for NetlinkError {
    fn from(error: nix::Error) -> Self {
        Self::Refused(error.into())
    }
}

/// A connection to the kernel. It belongs to the network namespace that it was opened in, whoever uses it.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// What one piece of an answer says.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// More is to come.
    More,
    Done,
    /// Done, but something changed in between.
    Changed,
}

impl Netlink {
    /// Opens one in the calling thread's network namespace.
    pub(super) fn open() -> Result<Self, NetlinkError> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        // Nobody but the kernel can send to a socket that is connected to it.
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Has something changed.
    pub(super) fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        self.receive(&mut Vec::new()).map(drop)
    }

    /// Asks for a list.
    pub(super) fn list(
        &mut self,
        message: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        for _ in 0..TRIES {
            let mut entries = Vec::new();
            self.send(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            if self.receive(&mut entries)? != Answer::Changed {
                return Ok(entries);
            }
        }
        Err(NetlinkError::Unsteady)
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
        Ok(())
    }

    /// Takes the whole answer. The kernel works within the calls for sending and receiving, so there is never a wait.
    fn receive(&mut self, entries: &mut Vec<RouteNetlinkMessage>) -> Result<Answer, NetlinkError> {
        let mut buffer = vec![0; BUFFER];
        let mut changed = false;
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
            match parse(&buffer[..length], self.sequence, entries, &mut changed)? {
                Answer::More => {}
                Answer::Done if changed => return Ok(Answer::Changed),
                done => return Ok(done),
            }
        }
    }
}

/// Reads what came at once: some messages, of which those with another number are of an earlier request that failed.
fn parse(
    mut bytes: &[u8],
    sequence: u32,
    entries: &mut Vec<RouteNetlinkMessage>,
    changed: &mut bool,
) -> Result<Answer, NetlinkError> {
    while !bytes.is_empty() {
        let length = bytes.first_chunk().map(|length| u32::from_ne_bytes(*length));
        let length = length.and_then(|length| usize::try_from(length).ok());
        let length =
            length.filter(|length| (HEADER..=bytes.len()).contains(length)).ok_or(NetlinkError::Short)?;
        let (one, rest) = bytes.split_at(length);
        bytes = &rest[(length.next_multiple_of(4) - length).min(rest.len())..];
        let message =
            NetlinkMessage::<RouteNetlinkMessage>::deserialize(one).map_err(NetlinkError::Malformed)?;
        if message.header.sequence_number != sequence {
            continue;
        }
        *changed |= message.header.flags & NLM_F_DUMP_INTR != 0;
        match message.payload {
            NetlinkPayload::Done(done) if done.code < 0 => {
                return Err(NetlinkError::Refused(io::Error::from_raw_os_error(done.code.saturating_neg())));
            }
            NetlinkPayload::Done(_) => return Ok(Answer::Done),
            NetlinkPayload::Error(error) if error.code.is_some() => {
                let code = error.raw_code().saturating_neg();
                return Err(NetlinkError::Refused(io::Error::from_raw_os_error(code)));
            }
            NetlinkPayload::Error(_) => return Ok(Answer::Done),
            NetlinkPayload::InnerMessage(_) if entries.len() == MAX_LIST => return Err(NetlinkError::Long),
            NetlinkPayload::InnerMessage(entry) => entries.push(entry),
            _ => {}
        }
    }
    Ok(Answer::More)
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_route::link::LinkMessage;

    fn all(bytes: &[u8]) -> Result<Answer, NetlinkError> {
        parse(bytes, 1, &mut Vec::new(), &mut false)
    }

    /// A message of that type with that payload, of request 1.
    fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER + payload.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(1_u32.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn the_kernel_lists_the_loopback_interface() {
        let mut netlink = Netlink::open().unwrap();
        for _ in 0..2 {
            let links = netlink.list(&RouteNetlinkMessage::GetLink(LinkMessage::default())).unwrap();
            assert!(links.iter().any(|link| matches!(link, RouteNetlinkMessage::NewLink(_))));
        }
        let mut nowhere = LinkMessage::default();
        nowhere.header.index = 0x7fff_fff0;
        let refused = netlink.request(RouteNetlinkMessage::SetLink(nowhere), 0);
        assert!(matches!(refused, Err(NetlinkError::Refused(_))), "{refused:?}");
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        for length in [0_u32, 15, 17, u32::MAX] {
            let mut bytes = message(3, 0, &[]);
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            assert!(matches!(all(&bytes), Err(NetlinkError::Short)), "{length}");
        }
        for length in 1..HEADER {
            assert!(matches!(all(&message(3, 0, &[])[..length]), Err(NetlinkError::Short)));
        }
    }

    #[test]
    fn ends_are_told_apart() {
        assert_eq!(all(&message(3, 0, &[0; 4])).unwrap(), Answer::Done);
        assert_eq!(all(&[]).unwrap(), Answer::More);
        let busy = (-libc::EBUSY).to_ne_bytes();
        assert!(all(&message(3, 0, &busy)).unwrap_err().is(nix::Error::EBUSY));
        let refusal = [&busy[..], &message(16, 0, &[])].concat();
        assert!(all(&message(2, 0, &refusal)).unwrap_err().is(nix::Error::EBUSY));
        let mut changed = false;
        parse(&message(3, NLM_F_DUMP_INTR, &[0; 4]), 1, &mut Vec::new(), &mut changed).unwrap();
        assert!(changed);
        let mut other = message(2, 0, &refusal);
        other[8] = 9;
        assert_eq!(all(&other).unwrap(), Answer::More);
    }

    #[test]
    fn garbage_is_an_error_and_not_a_panic() {
        for kind in [16, 20, 24, 28, 36, 44] {
            for seed in 0..=u8::MAX {
                let payload: Vec<u8> = (0..64_u8).map(|i| i.wrapping_mul(37) ^ seed).collect();
                let _ = all(&message(kind, 0, &payload));
                let _ = all(&message(kind, 0, &payload[..usize::from(seed) % 64]));
            }
        }
    }

    #[test]
    fn lists_have_an_end() {
        let one = message(16, 2, &[0; 16]);
        let mut entries = Vec::new();
        let chunk = one.repeat(1024);
        let mut read = || parse(&chunk, 1, &mut entries, &mut false);
        for _ in 0..16 {
            assert_eq!(read().unwrap(), Answer::More);
        }
        assert!(matches!(read(), Err(NetlinkError::Long)));
    }
}
