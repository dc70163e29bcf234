//! The clock's pace.

use nix::errno::Errno;

/// Has the kernel make up for a difference of `CLOCK_REALTIME`, in microseconds, little by little, in the place of one that it makes up for.
pub(crate) fn slew(microseconds: i64) -> nix::Result<()> {
    adjust(|change| {
        change.modes = libc::ADJ_OFFSET_SINGLESHOT;
        change.offset = microseconds;
    })
}

/// Moves `CLOCK_REALTIME` by so many nanoseconds at once, whenever that is done.
pub(crate) fn step(nanoseconds: i64) -> nix::Result<()> {
    const SECOND: i64 = 1_000_000_000;
    adjust(|change| {
        change.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
        change.time.tv_sec = nanoseconds.div_euclid(SECOND);
        // With ADJ_NANO nanoseconds, and never less than none.
        change.time.tv_usec = nanoseconds.rem_euclid(SECOND);
    })
}

fn adjust(set: impl FnOnce(&mut libc::timex)) -> nix::Result<()> {
    // SAFETY: all of its fields are integers, for which zero is a value.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    set(&mut change);
    // SAFETY: adjtimex reads and writes the one timex that it is given.
    Errno::result(unsafe { libc::adjtimex(&raw mut change) }).map(drop)
}
