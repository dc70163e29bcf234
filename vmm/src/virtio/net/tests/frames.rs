//! Frames both ways: as the specification has them, over buffers as drivers lay them.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use vm_memory::{Bytes, GuestAddress};

use super::super::header::SIZE;
use super::super::receive::FRAMES_PER_RUN;
use super::driver::{FREE_MEMORY, Guest, HEADER, MERGEABLE, PLAIN, Prng, Received, TSO, arrived, mac, wire};
use crate::testing::{NEXT, WRITE};
use crate::virtio::device::{Device, DeviceError};

const NO_HEADER: [u8; SIZE] = [0; SIZE];
/// NEEDS_CSUM, TCP over IPv4 in segments of 1,448 bytes, checksum at 34 + 16.
const SEGMENTS: [u8; SIZE] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];

/// `header` as the guest gets it, over `buffers`.
fn in_buffers(header: [u8; SIZE], frame: &[u8], buffers: u8) -> Received {
    let mut header = header;
    header[10] = buffers;
    Received { header, frame: frame.into(), buffers: buffers.into() }
}

#[test]
fn device_tells_its_address_link_and_mtu() {
    let (guest, _far) = Guest::new(PLAIN);
    let mut config = [0xaa; 16];
    guest.device.read_config(0, &mut config);
    let [mac, rest] = [mac().bytes().to_vec(), vec![1, 0, 0, 0, 0xdc, 5, 0, 0, 0, 0]];
    assert_eq!(config.to_vec(), [mac, rest].concat());
    let mut mtu = [0; 2];
    guest.device.read_config(10, &mut mtu);
    assert_eq!(u16::from_le_bytes(mtu), 1500);
    for offset in [12, 13, u64::MAX] {
        guest.device.read_config(offset, &mut config);
        assert_eq!(config, [0; 16]);
    }
    // CSUM, GUEST_CSUM, MTU, MAC, GUEST_TSO4/6, HOST_TSO4/6, MRG_RXBUF, STATUS.
    assert_eq!(guest.device.features(), 0x1_99ab);
}

#[test]
fn frames_leave_as_they_are_however_they_lie_in_memory() {
    let (mut guest, far) = Guest::new(TSO);
    let frame = Prng(7).bytes(1514);
    let layouts: [&[u32]; 6] = [&[], &[HEADER], &[5], &[5, 11], &[0, 12, 12], &[3, 40, 1000]];
    for cuts in layouts {
        guest.send(&NO_HEADER, &frame, cuts);
        guest.settle().unwrap();
        assert_eq!(arrived(&far), Some(wire(&NO_HEADER, &frame)), "{cuts:?}");
        assert_eq!(guest.sent(), 1);
        assert_eq!(guest.irq.read().unwrap(), 1);
    }
    let large = Prng(8).bytes(65_549);
    guest.send(&SEGMENTS, &large, &[HEADER, 4096]);
    guest.settle().unwrap();
    assert_eq!(arrived(&far), Some(wire(&SEGMENTS, &large)));
}

#[test]
fn frames_that_ask_for_too_much_are_lost_and_cost_nothing_else() {
    for features in [PLAIN, TSO] {
        let (mut guest, far) = Guest::new(features);
        let ecn = [1, 0x81, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
        let outside = [1, 1, 54, 0, 0xa8, 5, 34, 0xff, 16, 0, 0, 0];
        for header in [ecn, outside, [0xff; SIZE]] {
            guest.send(&header, &[1; 100], &[]);
        }
        if features == PLAIN {
            guest.send(&SEGMENTS, &[1; 3000], &[]);
        }
        guest.send(&[0xfe, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9], &[2; 60], &[]);
        guest.settle().unwrap();
        assert_eq!(arrived(&far), Some(wire(&NO_HEADER, &[2; 60])), "bits that mean nothing are cleared");
        assert_eq!(arrived(&far), None);
        assert!(guest.sent() >= 4);
    }
}

#[test]
fn frame_that_the_tap_does_not_take_waits_and_so_do_those_behind_it() {
    let (near, far) = UnixDatagram::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    // A few frames fill it.
    setsockopt(&near, sockopt::SndBuf, &4096).unwrap();
    let mut guest = Guest::over(near.into(), PLAIN);
    let mut frames = (0_u8..).map(|number| [number; 64]);
    let mut offered = 0;
    while guest.tx.kicks_wanted(&guest.memory) || offered == 0 {
        guest.send(&NO_HEADER, &frames.next().unwrap(), &[]);
        offered += 1;
        guest.settle().unwrap();
        assert!(offered < 32, "the socket takes all");
    }
    // Two more, without a kick, while the wire is full: nothing to do, and no spinning either.
    for _ in 0..2 {
        guest.send(&NO_HEADER, &frames.next().unwrap(), &[]);
    }
    offered += 2;
    assert!(!guest.has_work());
    let mut seen = 0_u8;
    while seen < offered {
        while let Some(bytes) = arrived(&far) {
            assert_eq!(bytes, wire(&NO_HEADER, &[seen; 64]));
            seen += 1;
        }
        guest.settle().unwrap();
    }
    assert_eq!(guest.sent(), usize::from(offered));
    assert!(guest.tx.kicks_wanted(&guest.memory));
}

#[test]
fn floods_from_both_ends_take_turns_and_nothing_is_lost() {
    let (mut guest, far) = Guest::new(MERGEABLE);
    for index in 0..200 {
        guest.lend(index, 1600);
    }
    let (mut sent, mut arrivals, mut received) = (0, 0, 0);
    for round in 0..40_u8 {
        for _ in 0..8 {
            guest.send(&NO_HEADER, &[round; 60], &[]);
            sent += 1;
            assert!(far.send(&wire(&NO_HEADER, &[round; 100])).is_ok());
        }
        guest.worker.run().unwrap();
        while arrived(&far).is_some() {
            arrivals += 1;
        }
        guest.settle().unwrap();
        while arrived(&far).is_some() {
            arrivals += 1;
        }
        while let Some(frame) = guest.receive() {
            assert_eq!(frame, in_buffers(NO_HEADER, &[round; 100], 1));
            guest.lend(u16::try_from(200 + received % 56).unwrap(), 1600);
            received += 1;
        }
    }
    assert_eq!((arrivals, received), (sent, sent));
}

#[test]
fn run_ends_at_its_budget_and_asks_for_another() {
    let (mut guest, _far) = Guest::new(PLAIN);
    let frame = (FREE_MEMORY, HEADER + 20, 0, 0);
    guest.tx.describe(&guest.memory, 0, frame);
    // Refused by its header, so that the wire is never full.
    guest.memory.write_slice(&[0xff; SIZE], GuestAddress(FREE_MEMORY)).unwrap();
    for _ in 0..FRAMES_PER_RUN + 5 {
        guest.tx.offer(&guest.memory, 0);
    }
    guest.worker.run().unwrap();
    assert_eq!(guest.sent(), FRAMES_PER_RUN);
    assert!(guest.has_work());
    guest.settle().unwrap();
    assert_eq!(guest.sent(), 5);
}

#[test]
fn frame_arrives_in_one_buffer_with_its_header() {
    for features in [PLAIN, MERGEABLE] {
        let (mut guest, far) = Guest::new(features);
        for index in 0..4 {
            guest.lend(index, 1530);
        }
        let frames = [60, 1514, 1518].map(|len| Prng(9).bytes(len));
        for frame in &frames {
            far.send(&wire(&NO_HEADER, frame)).unwrap();
        }
        guest.settle().unwrap();
        assert_eq!(guest.irq.read().unwrap(), 1, "one interrupt for all");
        for frame in &frames {
            assert_eq!(guest.receive(), Some(in_buffers(NO_HEADER, frame, 1)));
        }
        assert_eq!(guest.receive(), None);
    }
}

#[test]
fn header_of_a_receive_buffer_may_be_scattered() {
    let (mut guest, far) = Guest::new(PLAIN);
    let [a, b, c, d] = [0, 0x1000, 0x2000, 0x3000].map(|offset| FREE_MEMORY + offset);
    guest.lend_chain(&[
        (a, 5, WRITE | NEXT, 1),
        (0, 0, WRITE | NEXT, 2),
        (b, 6, WRITE | NEXT, 3),
        (c, 1, WRITE | NEXT, 4),
        (d, 1600, WRITE, 0),
    ]);
    guest.memory.write_slice(&[0xee; 16], GuestAddress(b)).unwrap();
    far.send(&wire(&[2; SIZE], b"frame of the host")).unwrap();
    guest.settle().unwrap();
    assert_eq!(guest.rx.take_used(&guest.memory), Some((0, HEADER + 17)));
    let read = |at: u64| guest.memory.read_obj::<[u8; 17]>(GuestAddress(at)).unwrap();
    assert_eq!(read(a)[..5], [0, 2, 2, 2, 2], "no flags without GUEST_CSUM");
    assert_eq!(read(b)[..7], [2, 2, 2, 2, 2, 1, 0xee]);
    assert_eq!(read(c)[0], 0);
    assert_eq!(&read(d), b"frame of the host");
}

#[test]
fn frame_to_be_segmented_arrives_over_many_buffers() {
    let (mut guest, far) = Guest::new(MERGEABLE | TSO);
    for index in 0..100 {
        guest.lend(index, 1536);
    }
    let large = Prng(10).bytes(65_549);
    far.send(&wire(&SEGMENTS, &large)).unwrap();
    far.send(&wire(&NO_HEADER, &[3; 60])).unwrap();
    far.send(&wire(&SEGMENTS, &large[..3000])).unwrap();
    guest.settle().unwrap();
    assert_eq!(guest.receive(), Some(in_buffers(SEGMENTS, &large, 43)));
    assert_eq!(guest.receive(), Some(in_buffers(NO_HEADER, &[3; 60], 1)));
    assert_eq!(guest.receive(), Some(in_buffers(SEGMENTS, &large[..3000], 2)));
    assert_eq!(guest.receive(), None);
}

#[test]
fn largest_frame_fits_one_chain_of_pages() {
    let (mut guest, far) = Guest::new(TSO);
    let page = |index: u16| {
        let flags = if index < 16 { WRITE | NEXT } else { WRITE };
        (FREE_MEMORY + u64::from(index) * 4096, 4096, flags, index + 1)
    };
    guest.lend_chain(&(0..17).map(page).collect::<Vec<_>>());
    let large = Prng(11).bytes(65_549);
    far.send(&wire(&SEGMENTS, &large)).unwrap();
    guest.settle().unwrap();
    assert_eq!(guest.rx.take_used(&guest.memory), Some((0, HEADER + 65_549)));
    let mut got = vec![0; 65_549];
    guest.memory.read_slice(&mut got, GuestAddress(FREE_MEMORY + u64::from(HEADER))).unwrap();
    assert_eq!(got, large);
}

#[test]
fn guest_without_buffers_wakes_nobody_and_goes_on_when_it_has_some() {
    for features in [PLAIN, MERGEABLE] {
        let (mut guest, far) = Guest::new(features);
        for number in 0..4 {
            far.send(&wire(&NO_HEADER, &[number; 60])).unwrap();
        }
        guest.settle().unwrap();
        assert!(guest.rx.kicks_wanted(&guest.memory), "asked for a kick");
        far.send(&wire(&NO_HEADER, &[4; 60])).unwrap();
        assert!(!guest.has_work(), "the tap is not watched");
        for number in 0..5_u8 {
            guest.lend(number.into(), 1600);
            guest.settle().unwrap();
            assert_eq!(guest.receive(), Some(in_buffers(NO_HEADER, &[number; 60], 1)));
        }
        guest.lend(5, 1600);
        guest.settle().unwrap();
        assert!(!guest.rx.kicks_wanted(&guest.memory), "buffers to spare: no kicks");
        far.send(&wire(&NO_HEADER, &[6; 60])).unwrap();
        guest.settle().unwrap();
        assert!(guest.receive().is_some());
    }
}

#[test]
fn mergeable_buffers_are_collected_until_the_largest_frame_would_fit() {
    let (mut guest, far) = Guest::new(MERGEABLE | TSO);
    far.send(&wire(&NO_HEADER, &[1; 60])).unwrap();
    for index in 0..42 {
        guest.lend(index, 1536);
        guest.settle().unwrap();
        assert_eq!(guest.receive(), None);
        assert!(!guest.has_work());
    }
    guest.lend(42, 1536);
    guest.settle().unwrap();
    assert_eq!(guest.receive(), Some(in_buffers(NO_HEADER, &[1; 60], 1)));
}

#[test]
fn frames_that_do_not_fit_or_exceed_the_mtu_are_lost_and_the_next_arrives() {
    let good = wire(&NO_HEADER, &[7; 100]);
    // Too long for the chain, for the MTU though there is room, shorter than a header.
    for (features, len, bad) in [
        (PLAIN, 1000, wire(&NO_HEADER, &[1; 1200])),
        (PLAIN, 4096, wire(&NO_HEADER, &[1; 1519])),
        (MERGEABLE, 4096, wire(&NO_HEADER, &[1; 1519])),
        (TSO, 16_000, wire(&NO_HEADER, &[1; 9000])),
        (PLAIN, 1600, vec![0; SIZE - 1]),
    ] {
        let (mut guest, far) = Guest::new(features);
        guest.lend(0, len);
        far.send(&bad).unwrap();
        far.send(&good).unwrap();
        guest.settle().unwrap();
        assert_eq!(guest.receive(), Some(in_buffers(NO_HEADER, &[7; 100], 1)), "{}", bad.len());
        assert_eq!(guest.receive(), None);
    }
}

#[test]
fn driver_starts_anew_with_other_features_and_frames_wait_for_it() {
    let (mut guest, far) = Guest::new(MERGEABLE | TSO);
    guest.lend(0, 1600);
    guest.settle().unwrap();
    far.send(&wire(&NO_HEADER, &[1; 60])).unwrap();
    let mut guest = guest.restart(PLAIN);
    guest.lend(0, 1600);
    guest.settle().unwrap();
    assert_eq!(guest.receive(), Some(in_buffers(NO_HEADER, &[1; 60], 1)));
}

#[test]
fn wire_that_ends_costs_the_device() {
    let pair = || socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::empty()).unwrap();
    let (near, far): (OwnedFd, OwnedFd) = pair();
    let mut guest = Guest::over(near, PLAIN);
    guest.lend(0, 1600);
    guest.settle().unwrap();
    drop(far);
    assert!(matches!(guest.settle(), Err(DeviceError::Host(_))));
}
