//! What a FUSE request must be before the library parses it. A pure judgement of lengths and of the header.
//!
//! The library allocates what a request's header says, within its own bound of 1 MiB; here a request may not say more
//! than it brings. What the library checks itself is left to it: sizes of reads, unknown handles and inodes, names with
//! slashes. It reads the request again, and the guest may have changed it: what must hold of what is served is in
//! `bounded`.

use std::ffi::c_int;

/// `struct fuse_in_header` and `struct fuse_out_header` of Linux' `fuse.h`.
pub const IN_HEADER: usize = 40;
pub const OUT_HEADER: usize = 16;

/// Largest request and largest reply: 1 MiB of data, and room for the headers. A guest that offers more in one chain
/// would have the device hold slices of it without end.
pub const MAX_BYTES: u64 = (1 << 20) + (64 << 10);

const OPCODE_FORGET: u32 = 2;
const OPCODE_BATCH_FORGET: u32 = 42;

/// The fields of a request's header that decide about it, copied once from the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
}

/// What is to be done with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    /// The library serves it.
    Serve,
    /// It is answered with this error number.
    Answer(c_int),
    /// It cannot be answered: too short for a header, or without room for a reply.
    Drop,
}

impl Header {
    /// Reads the header off the front of a request.
    #[must_use]
    pub fn parse(bytes: &[u8; IN_HEADER]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { len: word(0), opcode: word(4), unique: u64::from(word(8)) | u64::from(word(12)) << 32 }
    }

    /// Whether the protocol has no reply to this request.
    #[must_use]
    pub fn is_unanswered(&self) -> bool {
        matches!(self.opcode, OPCODE_FORGET | OPCODE_BATCH_FORGET)
    }
}

/// Judges a request of `readable` bytes with room for a reply of `writable`.
#[must_use]
pub fn judge(header: Header, readable: u64, writable: u64) -> Judgement {
    let answered = !header.is_unanswered();
    if readable < IN_HEADER as u64 || (answered && writable < OUT_HEADER as u64) {
        return Judgement::Drop;
    }
    let refuse = |error| if answered { Judgement::Answer(error) } else { Judgement::Drop };
    let claimed = u64::from(header.len);
    if readable > MAX_BYTES || writable > MAX_BYTES {
        return refuse(libc::EOVERFLOW);
    }
    if claimed < IN_HEADER as u64 || claimed > readable {
        return refuse(libc::EINVAL);
    }
    Judgement::Serve
}

/// `struct fuse_out_header` that answers `unique` with an error.
#[must_use]
pub fn error_reply(unique: u64, error: c_int) -> [u8; OUT_HEADER] {
    let mut reply = [0; OUT_HEADER];
    reply[0] = 16;
    reply[4..8].copy_from_slice(&error.wrapping_neg().to_le_bytes());
    reply[8..].copy_from_slice(&unique.to_le_bytes());
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: u32 = 14;

    fn header(len: u32, opcode: u32) -> Header {
        Header { len, opcode, unique: 7 }
    }

    #[test]
    fn requests_that_claim_more_than_they_bring_are_refused() {
        for (len, readable) in [(41, 40), (u32::MAX, 48), (0, 48), (39, 48)] {
            assert_eq!(judge(header(len, OPEN), readable, 16), Judgement::Answer(libc::EINVAL));
        }
        assert_eq!(judge(header(48, OPEN), 48, 16), Judgement::Serve);
    }

    #[test]
    fn requests_without_header_or_room_are_dropped() {
        assert_eq!(judge(header(40, OPEN), 39, 16), Judgement::Drop);
        assert_eq!(judge(header(40, OPEN), 40, 15), Judgement::Drop);
        assert_eq!(judge(header(48, OPCODE_FORGET), 48, 0), Judgement::Serve);
        assert_eq!(judge(header(99, OPCODE_FORGET), 48, 0), Judgement::Drop);
    }

    #[test]
    fn requests_over_the_bound_are_refused() {
        let huge = 4 << 30;
        assert_eq!(judge(header(40, OPEN), huge, 16), Judgement::Answer(libc::EOVERFLOW));
        assert_eq!(judge(header(40, OPEN), 40, huge), Judgement::Answer(libc::EOVERFLOW));
    }

    /// What the library is given is within the bounds that it relies on; what is answered can be.
    #[test]
    fn requests_that_are_served_are_within_their_bounds() {
        use proptest::prelude::*;
        let size = || {
            prop_oneof![
                0..100_u64,
                MAX_BYTES - 2..MAX_BYTES + 3,
                (1_u64 << 32) - 2..(1 << 32) + 2,
                any::<u64>()
            ]
        };
        let len = prop_oneof![0..100_u32, any::<u32>()];
        let opcode = prop_oneof![Just(OPCODE_FORGET), Just(OPCODE_BATCH_FORGET), 0..60_u32, any::<u32>()];
        crate::testing::properties::hold(
            5000,
            &(len, opcode, size(), size()),
            |(len, opcode, readable, writable)| {
                let header = header(len, opcode);
                let answered = opcode != OPCODE_FORGET && opcode != OPCODE_BATCH_FORGET;
                let room = !answered || writable >= 16;
                let within = readable <= MAX_BYTES
                    && writable <= MAX_BYTES
                    && (40..=readable).contains(&u64::from(len));
                match judge(header, readable, writable) {
                    Judgement::Serve => assert!(within && room),
                    Judgement::Answer(_) => assert!(answered && writable >= 16 && readable >= 40 && !within),
                    Judgement::Drop => assert!(readable < 40 || !room || (!answered && !within)),
                }
            },
        );
    }

    #[test]
    fn error_reply_is_an_out_header() {
        let reply = error_reply(0x0102, libc::EIO);
        assert_eq!(reply[..4], 16_u32.to_le_bytes());
        assert_eq!(reply[4..8], (-libc::EIO).to_le_bytes());
        assert_eq!(reply[8..10], [2, 1]);
    }
}
