//! The guest's time of day.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use krx_proto::{Answer, ErrorKind, ExitStatus, Request};
use tests::agent::{Guest, kind};
use tests::pod::{Place, until};

const MS: i64 = 1_000_000;
const HOUR: i64 = 3_600_000 * MS;

fn here() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("time");
    i64::try_from(now.as_nanos()).expect("time")
}

/// Moves the clock; by how much it is ahead of the host's then, in nanoseconds.
fn ahead(guest: &Guest<'_>, adjust_ns: i64) -> i64 {
    match guest.call(Request::Clock { adjust_ns }).expect("clock") {
        Answer::Clock { unix_ns } => unix_ns - here(),
        other => panic!("{other:?}"),
    }
}

/// Prints what of a difference the kernel has still to make up for, in microseconds (adjtimex, `ADJ_OFFSET_SS_READ`).
const LEFT: &str = "python3 -c 'import ctypes; t = (ctypes.c_long * 26)(0xa001); ctypes.CDLL(None).adjtimex(t); print(t[1])'";

#[test]
fn a_clock_is_moved_and_its_owner_corrects_it() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    assert!(ahead(&guest, 0).abs() < 5000 * MS);
    assert_eq!(kind(guest.call(Request::Clock { adjust_ns: i64::MIN })), ErrorKind::Invalid);

    // Less than half a second comes little by little: the clock jumps neither forward nor back.
    for (id, adjust) in [("forward", 450), ("back", -450)] {
        let (before, asked) = (ahead(&guest, 0) + here(), Instant::now());
        let after = ahead(&guest, adjust * MS) + here();
        let passed = i64::try_from(asked.elapsed().as_nanos()).expect("short");
        assert!((before..before + passed + 400 * MS).contains(&after), "{before} {after} {passed}");
        let (left, _) = guest.run(id, LEFT, |_| ());
        let left: i64 = left.trim().parse().expect("microseconds");
        assert!(left * adjust > 0 && left.abs() <= adjust.abs() * 1000, "{left} of {adjust} ms");
    }

    assert!((ahead(&guest, -HOUR) + HOUR).abs() < 5000 * MS);
    let (text, status) = guest.run("late", "date +%s", |_| ());
    let said: i64 = text.trim().parse().expect("seconds");
    assert_eq!(status, ExitStatus::Code(0));
    assert!((here() / 1000 / MS - said - 3600).abs() < 60, "{said}");
    // `krx run` looks at it once a minute.
    let corrected = until(Duration::from_secs(200), || (ahead(&guest, 0).abs() < 5000 * MS).then_some(()));
    assert!(corrected.is_some(), "{} ms ahead", ahead(&guest, 0) / MS);
}
