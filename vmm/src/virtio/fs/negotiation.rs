//! What the device adds to the library's answer to `FUSE_INIT`. The library offers what its file system asks for, and
//! that one asks for no more than directory listings need: the guest would write single pages and read one request at
//! a time. A pure change of the reply (`struct fuse_init_out` of Linux' `fuse.h`).

use super::request::OUT_HEADER;

/// `FUSE_INIT`.
pub(super) const OPCODE: u32 = 26;
/// Bytes of the request's body up to the end of its flags, of which there are two words.
pub(super) const REQUEST: usize = 20;
/// Bytes of the reply, its header included.
pub(super) const REPLY: usize = OUT_HEADER + 64;

/// Reads ahead without waiting for each (`FUSE_ASYNC_READ`).
const ASYNC_READ: u32 = 1 << 0;
/// Writes of more than a page (`FUSE_BIG_WRITES`).
const BIG_WRITES: u32 = 1 << 5;
/// Cached data goes when a file's time or size has changed on the host (`FUSE_AUTO_INVAL_DATA`).
const AUTO_INVALIDATE: u32 = 1 << 12;
/// Direct I/O without waiting for each request (`FUSE_ASYNC_DIO`).
const ASYNC_DIO: u32 = 1 << 15;
/// Requests of up to `max_pages` (`FUSE_MAX_PAGES`).
const MAX_PAGES: u32 = 1 << 22;
/// There is a second word of flags (`FUSE_INIT_EXT`).
const INIT_EXT: u32 = 1 << 30;
const WANTED: u32 = ASYNC_READ | BIG_WRITES | AUTO_INVALIDATE | ASYNC_DIO | MAX_PAGES;
/// In the second word: mounts of the share may be ID-mapped (`FUSE_ALLOW_IDMAP`). The guest, which checks permissions itself,
/// then names an owner in the requests that make a file alone.
const ALLOW_IDMAP: u32 = 1 << 8;

/// Pages in one request: 1 MiB, the library's own bound. Linux lowers it to what the queue's descriptors hold.
const PAGES: u16 = 256;
const PAGE: u32 = 4096;

const FLAGS: usize = OUT_HEADER + 12;
const MAX_WRITE: usize = OUT_HEADER + 20;
const MAX_PAGES_FIELD: usize = OUT_HEADER + 28;
const FLAGS_2: usize = OUT_HEADER + 32;

/// Adds to `reply` what the guest, by the body of its request, can do.
pub(super) fn amend(request: &[u8; REQUEST], reply: &mut [u8; REPLY]) {
    let word = |bytes: &[u8], at: usize| {
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    let is_error = word(reply, 4) != 0;
    if is_error {
        return;
    }
    let offered = word(request, 12);
    let mut added = offered & WANTED;
    let second = word(request, 16) & ALLOW_IDMAP;
    if offered & INIT_EXT != 0 && second != 0 {
        added |= INIT_EXT;
        let flags = word(reply, FLAGS_2) | second;
        reply[FLAGS_2..FLAGS_2 + 4].copy_from_slice(&flags.to_le_bytes());
    }
    let flags = word(reply, FLAGS) | added;
    reply[FLAGS..FLAGS + 4].copy_from_slice(&flags.to_le_bytes());
    if added & MAX_PAGES != 0 {
        reply[MAX_WRITE..MAX_WRITE + 4].copy_from_slice(&(u32::from(PAGES) * PAGE).to_le_bytes());
        reply[MAX_PAGES_FIELD..MAX_PAGES_FIELD + 2].copy_from_slice(&PAGES.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(flags: u32) -> [u8; REQUEST] {
        let mut request = [0; REQUEST];
        request[12..16].copy_from_slice(&flags.to_le_bytes());
        request
    }

    #[test]
    fn mounts_may_be_id_mapped_where_the_guest_knows_how() {
        let mut knows = request(INIT_EXT);
        knows[17] = 0xff;
        let mut reply = [0; REPLY];
        amend(&knows, &mut reply);
        assert_eq!(reply[FLAGS..FLAGS + 4], INIT_EXT.to_le_bytes());
        assert_eq!(reply[FLAGS_2..FLAGS_2 + 4], [0, 1, 0, 0], "the 40th bit of all, and no other");
        for other in [request(INIT_EXT), {
            let mut old = request(BIG_WRITES);
            old[17] = 0xff;
            old
        }] {
            let mut reply = [0; REPLY];
            amend(&other, &mut reply);
            assert_eq!(reply[FLAGS_2..FLAGS_2 + 4], [0; 4]);
            assert_eq!(reply[FLAGS + 3], 0);
        }
    }

    #[test]
    fn guest_gets_what_it_can_do_and_no_more() {
        let mut reply = [0; REPLY];
        reply[FLAGS] = 2;
        amend(&request(BIG_WRITES | 1 << 29), &mut reply);
        assert_eq!(reply[FLAGS..FLAGS + 4], (BIG_WRITES | 2).to_le_bytes());
        assert_eq!(reply[MAX_WRITE..], [0; REPLY - MAX_WRITE], "without MAX_PAGES the library's sizes stay");
        amend(&request(u32::MAX), &mut reply);
        assert_eq!(reply[MAX_WRITE..MAX_WRITE + 4], (1_u32 << 20).to_le_bytes());
        assert_eq!(reply[MAX_PAGES_FIELD..MAX_PAGES_FIELD + 2], [0, 1]);
    }

    #[test]
    fn refusal_stays_a_refusal() {
        let mut reply = [0; REPLY];
        reply[4..8].copy_from_slice(&(-libc::EPROTO).to_le_bytes());
        let before = reply;
        amend(&request(u32::MAX), &mut reply);
        assert_eq!(reply, before);
    }
}
