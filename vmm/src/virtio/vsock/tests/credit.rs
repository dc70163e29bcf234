//! Credit whose counters wrap, against one that counts in 64 bits.

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::credit::{CreditLie, GuestCredit, HostCredit, Overrun};
use crate::testing::properties::hold;

/// Connections, each of so many packets at most.
const CONNECTIONS: u32 = 1500;
const PACKETS: usize = 60;

fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap()
}

/// One packet, by what it says of the guest.
#[derive(Debug, Clone)]
enum Event {
    /// So much of what it may have is sent, in 255ths.
    Send(u8),
    /// It has read so much of what is on the way, in 255ths, and has a buffer of this size.
    Read(u8, u32),
    /// An older packet arrives late: it has read so much less, of what it has read so far.
    Late(u32),
    /// It has read so much more than was sent.
    Lie(u32),
}

fn part(of: u64, share: u8) -> u64 {
    of * u64::from(share) / 255
}

#[test]
fn the_guest_is_sent_what_it_has_room_for() {
    let size =
        prop_oneof![0..3_u32, 1000..300_000_u32, Just(u32::MAX / 2), any::<u32>().prop_map(|size| size / 2)];
    let event = prop_oneof![
        4 => any::<u8>().prop_map(Event::Send),
        4 => (any::<u8>(), size).prop_map(|(share, size)| Event::Read(share, size)),
        1 => (0..1_u32 << 30).prop_map(Event::Late),
        1 => prop_oneof![1..4_u32, 1..1_u32 << 30].prop_map(Event::Lie),
    ];
    hold(CONNECTIONS, &(any::<u32>(), vec(event, 1..PACKETS)), |(begin, events)| {
        // Counters that have run for a while: everything of before was sent and read.
        let mut credit = GuestCredit::new();
        for half in [begin / 2, begin] {
            credit.spend(half - begin / 2 * u32::from(half == begin));
            credit.update(0, half).unwrap();
        }
        let (mut sent, mut read, mut size) = (u64::from(begin), u64::from(begin), 0_u64);
        for event in events {
            match event {
                Event::Send(share) => {
                    let bytes = part(credit.free().into(), share);
                    credit.spend(low(bytes));
                    sent += bytes;
                }
                Event::Read(share, buffer) => {
                    read += part(sent - read, share);
                    size = buffer.into();
                    credit.update(buffer, low(read)).unwrap();
                }
                Event::Late(less) => {
                    // What is older than half of all numbers, less what is on the way, cannot be told from newer.
                    let less = u64::from(less).min((1 << 31) - 1).min(read);
                    if sent - read + less < 1 << 31 {
                        credit.update(low(size), low(read - less)).unwrap();
                    }
                }
                Event::Lie(more) => {
                    let told = credit.update(77, low(sent + u64::from(more)));
                    assert_eq!(told.err(), lie(sent - read, more));
                    size = if told.is_ok() { 77 } else { size };
                }
            }
            assert!(read <= sent && sent - read < 1 << 31);
            assert_eq!(
                u64::from(credit.free()),
                size.saturating_sub(sent - read),
                "{sent} sent, {read} read"
            );
        }
    });
}

/// Whether so much more than what is on the way is known to be none of it.
fn lie(on_the_way: u64, more: u32) -> Option<CreditLie> {
    (on_the_way + u64::from(more) < 1 << 31).then_some(CreditLie)
}

#[test]
fn the_guest_may_send_what_there_is_room_for() {
    let event = prop_oneof![
        (0..300_000_u32).prop_map(|bytes| (Some(bytes), None)),
        (0..300_000_u32).prop_map(|bytes| (None, Some(bytes))),
        Just((None, None)),
        any::<u32>().prop_map(|bytes| (Some(bytes), None)),
    ];
    let window =
        prop_oneof![1..10_u32, Just(64 << 10), Just(256 << 10), any::<u32>().prop_map(|size| size.max(1))];
    hold(CONNECTIONS, &(window, any::<u32>(), vec(event, 1..PACKETS)), |(window, begin, events)| {
        let mut credit = HostCredit::new(window);
        let (mut received, mut forwarded, mut told) = (0_u64, 0_u64, 0_u64);
        // As far as the counters can be brought in steps of a window.
        for _ in 0..(begin / window).min(2000) {
            credit.receive(window).unwrap();
            credit.forward(u32::MAX);
            (received, forwarded) = (received + u64::from(window), forwarded + u64::from(window));
        }
        told += forwarded;
        assert_eq!(credit.tell(), low(told));
        for (arrives, leaves) in events {
            match (arrives, leaves) {
                (Some(bytes), _) => {
                    let fits = received - forwarded + u64::from(bytes) <= window.into();
                    assert_eq!(credit.receive(bytes), if fits { Ok(()) } else { Err(Overrun) });
                    received += if fits { bytes.into() } else { 0 };
                }
                (None, Some(bytes)) => {
                    credit.forward(bytes);
                    forwarded += u64::from(bytes).min(received - forwarded);
                }
                (None, None) => {
                    told = forwarded;
                    assert_eq!(credit.tell(), low(told));
                }
            }
            assert_eq!(u64::from(credit.buffered()), received - forwarded);
            assert!(credit.buffered() <= credit.window());
            if forwarded - told < 1 << 32 {
                assert_eq!(credit.update_due(), forwarded - told >= u64::from(window / 2));
            }
        }
    });
}
