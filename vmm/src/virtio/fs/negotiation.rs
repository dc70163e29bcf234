//! What the device adds to the library's answer to `FUSE_INIT`. The library offers what its file system asks for, and
//! that one asks for no more than directory listings need: the guest would write single pages and read one request at
//! a time. A pure change of the reply (`struct fuse_init_out` of Linux' `fuse.h`).

use super::request::OUT_HEADER;

/// `FUSE_INIT`.
pub(super) const OPCODE: u32 = 26;
/// Bytes of the request's body up to the end of its flags.
pub(super) const REQUEST: usize = 16;
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
const WANTED: u32 = ASYNC_READ | BIG_WRITES | AUTO_INVALIDATE | ASYNC_DIO | MAX_PAGES;

/// Pages in one request: 1 MiB, the library's own bound. Linux lowers it to what the queue's descriptors hold.
const PAGES: u16 = 256;
const PAGE: u32 = 4096;

const FLAGS: usize = OUT_HEADER + 12;
const MAX_WRITE: usize = OUT_HEADER + 20;
const MAX_PAGES_FIELD: usize = OUT_HEADER + 28;

/// Adds to `reply` what the guest, by the body of its request, can do.
pub(super) fn amend(request: &[u8; REQUEST], reply: &mut [u8; REPLY]) {
    let [.., a, b, c, d] = *request;
    let added = u32::from_le_bytes([a, b, c, d]) & WANTED;
    let is_error = reply[4..8] != [0; 4];
    if is_error {
        return;
    }
    let flags = [reply[FLAGS], reply[FLAGS + 1], reply[FLAGS + 2], reply[FLAGS + 3]];
    reply[FLAGS..FLAGS + 4].copy_from_slice(&(u32::from_le_bytes(flags) | added).to_le_bytes());
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
        request[12..].copy_from_slice(&flags.to_le_bytes());
        request
    }

    #[test]
    fn guest_gets_what_it_can_do_and_no_more() {
        let mut reply = [0; REPLY];
        reply[FLAGS] = 2;
        amend(&request(BIG_WRITES | 1 << 30), &mut reply);
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
