//! The clock's pace.

use nix::errno::Errno;

/// Has the kernel make up for a difference of `CLOCK_REALTIME`, in microseconds, little by little, in the place of one that it makes up for.
pub(crate) fn slew(microseconds: i64) -> nix::Result<()> {
    // SAFETY: all of its fields are integers, for which zero is a value.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_OFFSET_SINGLESHOT;
    change.offset = microseconds;
    // SAFETY: adjtimex reads and writes the one timex that it is given.
    Errno::result(unsafe { libc::adjtimex(&raw mut change) }).map(drop)
}
