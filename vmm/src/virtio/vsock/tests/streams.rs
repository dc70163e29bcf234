//! Bytes in both directions: none lost, none twice, and nobody waits for who is slow but his own writer.

use std::io::{ErrorKind, Write};

use super::super::connections::WIDE_WINDOW;
use super::super::packet::{Header, MAX_PAYLOAD, Op, SHUTDOWN_BOTH};
use super::driver::{Framing, Guest, Prng, read_available};

const PORT: u32 = 1024;
const LENGTH: usize = 1 << 20;

/// Sends `bytes` as a guest that keeps to its credit; `room` is what it may still send, by what the host told.
struct Sender {
    sent: u32,
    forwarded: u32,
    window: u32,
}

impl Sender {
    fn room(&self) -> u32 {
        self.window.saturating_sub(self.sent.wrapping_sub(self.forwarded))
    }

    fn hear(&mut self, guest: &mut Guest) {
        for (header, _) in guest.received.drain(..) {
            assert_eq!(Op::from_wire(header.op), Some(Op::CreditUpdate), "{header:?}");
            (self.forwarded, self.window) = (header.fwd_cnt, header.buf_alloc);
        }
    }
}

#[test]
fn guest_to_host_in_every_framing() {
    let mut guest = Guest::new(16);
    let (mut client, host) = guest.connected_client(PORT);
    let (mut random, mut sender) = (Prng(7), Sender { sent: 0, forwarded: 0, window: WIDE_WINDOW });
    let bytes = random.bytes(LENGTH);
    let (mut at, mut arrived) = (0, Vec::new());
    while arrived.len() < bytes.len() {
        let most = (bytes.len() - at).min(sender.room() as usize).min(MAX_PAYLOAD as usize);
        if most > 0 && guest.can_send() {
            let len = 1 + random.below(most as u64);
            let header = Header { len: u32::try_from(len).unwrap(), ..Guest::header(Op::Data, PORT, host) };
            let framing = [Framing::One, Framing::Two, Framing::Scattered][random.below(3)];
            guest.send(&header, &bytes[at..at + len], framing);
            sender.sent += header.len;
            at += len;
        }
        guest.settle();
        sender.hear(&mut guest);
        // The reader takes its time: what it does not take fills the window, and no more than that.
        assert!(guest.worker.connections().backlog_bytes() <= WIDE_WINDOW as usize);
        if random.below(4) == 0 || sender.room() == 0 {
            arrived.extend(read_available(&mut client).0);
        }
    }
    assert!(arrived == bytes);
}

#[test]
fn host_to_guest_at_the_guests_pace() {
    let mut guest = Guest::new(8);
    let (mut client, host) = guest.connected_client(PORT);
    let mut random = Prng(11);
    let bytes = random.bytes(LENGTH);
    let (mut at, mut arrived): (usize, Vec<u8>) = (0, Vec::new());
    let credit = 64 << 10;
    guest.send(
        &Header { buf_alloc: credit, ..Guest::header(Op::CreditUpdate, PORT, host) },
        &[],
        Framing::One,
    );
    let (mut told, mut asked) = (0, 0);
    while arrived.len() < bytes.len() {
        match client.write(&bytes[at..]) {
            Ok(count) => at += count,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        guest.settle();
        for (header, payload) in guest.received.drain(..) {
            asked += usize::from(header.op == Op::CreditRequest as u16);
            arrived.extend(payload);
        }
        let count = u32::try_from(arrived.len()).unwrap();
        assert!(count - told <= credit, "more than the guest has room for");
        told = count;
        let update =
            Header { buf_alloc: credit, fwd_cnt: told, ..Guest::header(Op::CreditUpdate, PORT, host) };
        guest.send(&update, &[], Framing::One);
    }
    assert!(arrived == bytes);
    assert!(asked > 0, "a host with bytes and no credit has to ask for it");
}

#[test]
fn host_without_credit_asks_once_and_waits() {
    let mut guest = Guest::new(16);
    let (mut client, host) = guest.connected_client(PORT);
    guest.send(&Header { buf_alloc: 0, ..Guest::header(Op::CreditUpdate, PORT, host) }, &[], Framing::One);
    client.write_all(b"waiting").unwrap();
    guest.expect(Op::CreditRequest);
    guest.expect_nothing();
    guest.send(&Header { buf_alloc: 3, ..Guest::header(Op::CreditUpdate, PORT, host) }, &[], Framing::One);
    guest.settle();
    assert_eq!(guest.received.pop_front().unwrap().1, b"wai");
}

#[test]
fn reader_that_leaves_ends_the_guests_stream() {
    let mut guest = Guest::new(16);
    let (client, host) = guest.connected_client(PORT);
    for _ in 0..4 {
        guest.data(PORT, host, &[0; 1000]);
    }
    guest.settle();
    drop(client);
    guest.data(PORT, host, &[0; 1000]);
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    // Sent before the guest heard of it: dropped, not a violation.
    guest.data(PORT, host, &[0; 1000]);
    guest.expect_nothing();
    guest.control(Op::Reset, PORT, host);
    guest.settle();
    guest.assert_clean();
}

#[test]
fn floods_of_two_clients_take_turns() {
    let mut guest = Guest::new(128);
    guest.recycle = false;
    let (mut a, first) = guest.connected_client(1);
    let (mut b, _) = guest.connected_client(2);
    for client in [&mut a, &mut b] {
        while client.write(&[0; 4096]).is_ok() {}
    }
    guest.settle();
    let speakers: Vec<bool> = guest.received.iter().map(|(header, _)| header.src_port == first).collect();
    let longest = speakers.chunk_by(|x, y| x == y).map(<[bool]>::len).max().unwrap();
    assert!(longest <= 16, "{longest} packets of one client in a row");
    assert!(speakers.iter().any(|first| *first) && !speakers.iter().all(|first| *first));
}
