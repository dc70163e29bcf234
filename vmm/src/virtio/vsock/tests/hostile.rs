//! Guests and clients that break the rules: each costs its own connection or its own device, never the process, and
//! never more memory than was set aside.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};

use vm_memory::{Bytes, GuestAddress};

use super::super::connections::{MAX_RESETS, NARROW_WINDOW, WIDE_CONNECTIONS, WIDE_WINDOW};
use super::super::packet::{HOST_CID, Header, Op, SHUTDOWN_SEND};
use super::driver::{CID, FREE_MEMORY, Framing, Guest, HEADER, MEMORY_MIB, Prng, read_available};
use crate::testing::{self, NEXT, WRITE};
use crate::virtio::device::DeviceError;

const PORT: u32 = 1024;
const OUTSIDE: u64 = 1 << 40;
const END: u64 = (MEMORY_MIB as u64) << 20;

/// Address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

#[test]
fn malformed_transmit_chains_cost_the_device() {
    let header = (FREE_MEMORY, HEADER, NEXT, 1);
    let payload = FREE_MEMORY + 4096;
    let cases: [(&str, u32, &[Descriptor]); 13] = [
        ("header cut short", 0, &[(FREE_MEMORY, HEADER - 1, 0, 0)]),
        ("header in pieces", 0, &[(FREE_MEMORY, 20, NEXT, 1), (FREE_MEMORY + 20, 24, 0, 0)]),
        ("empty descriptor", 0, &[(FREE_MEMORY, 0, 0, 0)]),
        ("header for the device to write", 0, &[(FREE_MEMORY, HEADER, WRITE, 0)]),
        ("header outside of memory", 0, &[(OUTSIDE, HEADER, 0, 0)]),
        ("header across the end of memory", 0, &[(END - 20, HEADER, 0, 0)]),
        ("payload for the device to write", 100, &[header, (payload, 100, WRITE, 0)]),
        ("payload shorter than announced", 100, &[header, (payload, 99, 0, 0)]),
        ("4 GiB of payload", u32::MAX, &[header, (payload, u32::MAX, 0, 0)]),
        ("payload outside of memory", 100, &[header, (OUTSIDE, 100, 0, 0)]),
        ("payload that wraps", 100, &[header, (u64::MAX - 10, 100, 0, 0)]),
        ("loop without end", 100, &[header, (payload, 0, NEXT, 1)]),
        ("next outside of the table", 100, &[(FREE_MEMORY, HEADER, NEXT, 60_000)]),
    ];
    for (what, len, chain) in cases {
        let mut guest = Guest::new(8);
        let packet = Header { len, ..Guest::header(Op::Data, 1, PORT) };
        guest.memory.write_slice(&packet.to_bytes(), GuestAddress(FREE_MEMORY)).unwrap();
        for (index, descriptor) in (0..).zip(chain) {
            guest.tx.describe(&guest.memory, index, *descriptor);
        }
        guest.offer_tx(0);
        assert!(guest.step().is_err(), "{what}");
    }
}

/// A header and empty parts, or parts of a byte, from a table that the device has not offered to follow.
#[test]
fn packets_in_a_long_indirect_table_cost_the_device() {
    for (part, parts) in [(0, 65_535), (1, 65)] {
        let mut guest = Guest::new(8);
        let packet = Header { len: 100, ..Guest::header(Op::Data, 1, PORT) };
        guest.memory.write_slice(&packet.to_bytes(), GuestAddress(FREE_MEMORY)).unwrap();
        let head = testing::indirect_table(&guest.memory, (FREE_MEMORY, part, 0), parts);
        let table = virtio_queue::desc::split::Descriptor::from(head);
        // The first part holds the header.
        guest.memory.write_obj(HEADER, GuestAddress(table.addr().0 + 8)).unwrap();
        guest.tx.describe(&guest.memory, 0, (table.addr().0, table.len(), table.flags(), 0));
        guest.offer_tx(0);
        let result = guest.step();
        assert!(matches!(result, Err(DeviceError::BadChain("packet has too many parts"))), "{result:?}");
    }
}

#[test]
fn malformed_receive_buffers_cost_the_device() {
    let cases: [(&str, Descriptor); 6] = [
        ("buffer that may not be written", (FREE_MEMORY, 4096, 0, 0)),
        ("buffer with room for the header only", (FREE_MEMORY, HEADER, WRITE, 0)),
        ("buffer smaller than a header", (FREE_MEMORY, 20, WRITE, 0)),
        ("empty buffer", (FREE_MEMORY, 0, WRITE, 0)),
        ("buffer outside of memory", (OUTSIDE, 4096, WRITE, 0)),
        ("loop", (FREE_MEMORY, 20, WRITE | NEXT, 0)),
    ];
    for (what, buffer) in cases {
        let mut guest = Guest::new(0);
        guest.rx.describe(&guest.memory, 0, buffer);
        guest.offer_rx(0);
        // Makes the device want to send: a reset.
        guest.control(Op::Data, 1, PORT);
        assert!(guest.step().is_err(), "{what}");
    }
}

#[test]
fn indices_out_of_order_cost_the_device() {
    let mut guest = Guest::new(8);
    guest.offer_tx(9999);
    assert!(guest.step().is_err(), "a head outside of the table");
    let mut guest = Guest::new(8);
    guest.tx.available = 5000;
    guest.offer_tx(0);
    assert!(guest.step().is_err(), "an index that claims more chains than the queue has");
    let mut guest = Guest::new(0);
    guest.rx.available = 5000;
    guest.offer_rx(0);
    guest.control(Op::Data, 1, PORT);
    assert!(guest.step().is_err(), "the same of the receive queue");
}

#[test]
fn packets_for_nobody_are_reset_but_resets_are_not() {
    let mut guest = Guest::new(16);
    for op in [Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest] {
        guest.control(op, 5, PORT);
        let reset = guest.expect(Op::Reset);
        assert_eq!((reset.src_port, reset.dst_port), (PORT, 5), "{op:?}");
    }
    guest.send(&Header { op: 999, ..Guest::header(Op::Data, 5, PORT) }, &[], Framing::One);
    guest.expect(Op::Reset);
    guest.control(Op::Reset, 5, PORT);
    guest.expect_nothing();
    guest.assert_clean();
}

#[test]
fn forged_addresses_and_types_reach_nobody() {
    let mut guest = Guest::new(16);
    let service = UnixListener::bind(guest.service_path(PORT)).unwrap();
    service.set_nonblocking(true).unwrap();
    let request = Guest::header(Op::Request, 5, PORT);
    for src_cid in [0, HOST_CID, u64::from(CID) + 1, u64::MAX] {
        guest.send(&Header { src_cid, ..request }, &[], Framing::One);
        guest.expect_nothing();
    }
    for dst_cid in [0, 1, u64::from(CID), u64::MAX] {
        guest.send(&Header { dst_cid, ..request }, &[], Framing::One);
        assert_eq!(guest.expect(Op::Reset).src_cid, dst_cid);
    }
    for socket_type in [0, 2, u16::MAX] {
        guest.send(&Header { socket_type, ..request }, &[], Framing::One);
        assert_eq!(guest.expect(Op::Reset).socket_type, socket_type);
    }
    assert!(service.accept().is_err(), "a forged request reached the service");
    guest.assert_clean();
}

#[test]
fn broken_protocol_costs_the_connection() {
    type Break = fn(&mut Guest, u32);
    let breaks: [(&str, Break); 6] = [
        ("a second request", |guest, host| guest.control(Op::Request, PORT, host)),
        ("a second response", |guest, host| guest.control(Op::Response, PORT, host)),
        ("an unknown operation", |guest, host| {
            guest.send(&Header { op: 77, ..Guest::header(Op::Data, PORT, host) }, &[], Framing::One);
        }),
        ("bytes after the end", |guest, host| {
            guest.shutdown(PORT, host, SHUTDOWN_SEND);
            guest.data(PORT, host, b"more");
        }),
        ("acknowledged bytes that were never sent", |guest, host| {
            let lie = Header { fwd_cnt: 1, ..Guest::header(Op::CreditUpdate, PORT, host) };
            guest.send(&lie, &[], Framing::One);
        }),
        ("more bytes than there was credit for", |guest, host| {
            for _ in 0..16 {
                guest.data(PORT, host, &[0; 64 << 10]);
            }
        }),
    ];
    for (what, break_it) in breaks {
        let mut guest = Guest::new(16);
        let (mut client, host) = guest.connected_client(PORT);
        break_it(&mut guest, host);
        guest.settle();
        let resets = guest.received.iter().filter(|(header, _)| header.op == Op::Reset as u16).count();
        assert!(resets >= 1, "{what}: {:?}", guest.received);
        assert!(read_available(&mut client).1, "{what}: the client still waits");
        guest.assert_clean();
    }
}

#[test]
fn flood_of_packets_for_nobody_waits_for_the_guest_to_take_the_answers() {
    let mut guest = Guest::new(0);
    let mut sent = 0;
    while guest.can_send() && sent < 10_000 {
        guest.control(Op::Data, sent, PORT);
        sent += 1;
        guest.settle();
        assert!(guest.worker.connections().resets_len() <= MAX_RESETS);
    }
    assert!(sent < 10_000, "the device took all");
    for index in 0..128 {
        guest.lend(index, 3776);
    }
    guest.settle();
    assert_eq!(guest.received.len(), sent as usize);
    guest.assert_clean();
}

#[test]
fn silent_clients_give_way_to_the_next() {
    let mut guest = Guest::new(16);
    let mut silent: Vec<UnixStream> = (0..100)
        .map(|_| {
            let client = guest.client(b"");
            guest.settle();
            client
        })
        .collect();
    assert_eq!(guest.worker.waiting_clients(), 64);
    assert!(read_available(&mut silent[0]).1);
    assert!(!read_available(&mut silent[99]).1);
    guest.connected_client(PORT);
}

/// A header that is mostly right, so that it gets far.
fn random_header(random: &mut Prng) -> Header {
    let mut header = Guest::header(Op::Data, 0, 0);
    header.op = u16::try_from(random.below(9)).unwrap();
    header.src_port = u32::try_from(random.below(12)).unwrap();
    header.dst_port = match random.below(3) {
        0 => PORT,
        1 => (1 << 30) + u32::try_from(random.below(20)).unwrap(),
        _ => random.next().to_le_bytes()[0].into(),
    };
    header.flags = u32::try_from(random.below(5)).unwrap();
    match random.below(40) {
        0 => header.src_cid = random.next(),
        1 => header.dst_cid = random.next(),
        2 => header.socket_type = 2,
        3 => header.fwd_cnt = u32::try_from(random.below(1 << 32)).unwrap(),
        4 => header.buf_alloc = u32::try_from(random.below(1 << 32)).unwrap(),
        _ => {}
    }
    header
}

#[test]
fn random_packets_and_clients_stay_within_their_limits() {
    const BOUND: usize = WIDE_CONNECTIONS * WIDE_WINDOW as usize + 1024 * NARROW_WINDOW as usize;
    for seed in 1..=8 {
        let mut random = Prng(0x9e37_79b9_7f4a_7c15 ^ (seed << 40));
        let mut guest = Guest::with(32, seed % 2 == 0);
        let service = UnixListener::bind(guest.service_path(PORT)).unwrap();
        service.set_nonblocking(true).unwrap();
        let mut streams: Vec<UnixStream> = Vec::new();
        for _ in 0..2000 {
            match random.below(8) {
                0 => {
                    let port = random.below(12);
                    streams.push(guest.client(format!("CONNECT {port}\n").as_bytes()));
                }
                1 if !streams.is_empty() => drop(streams.swap_remove(random.below(streams.len() as u64))),
                2 => streams.extend(service.accept().map(|(stream, _)| {
                    stream.set_nonblocking(true).unwrap();
                    stream
                })),
                3 if !streams.is_empty() => {
                    let at = random.below(streams.len() as u64);
                    // A client that was reset cannot be written to, which is its own affair.
                    let _ = streams[at].write(&[7; 3000]);
                }
                _ if guest.can_send() => {
                    let mut header = random_header(&mut random);
                    let len = if header.op == Op::Data as u16 { random.below(9000) } else { 0 };
                    header.len = u32::try_from(len).unwrap();
                    let framing = [Framing::One, Framing::Two, Framing::Scattered][random.below(3)];
                    let payload = vec![1; len];
                    guest.send(&header, &payload, framing);
                }
                _ => {}
            }
            if streams.len() > 60 {
                streams.clear();
            }
            guest.settle();
            guest.received.clear();
            assert!(guest.worker.connections().backlog_bytes() <= BOUND);
            assert!(guest.worker.connections().resets_len() <= MAX_RESETS);
        }
        guest.restart(16);
        guest.assert_clean();
        assert!(guest.irq.read().is_err(), "an interrupt without a packet");
        guest.connected_client(PORT);
    }
}
