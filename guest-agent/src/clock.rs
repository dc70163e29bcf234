//! The guest's time of day. kvm-clock gives it at boot and goes on at the pace of the host's oscillator; what the host
//! itself makes of that by NTP, the host tells from time to time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use krx_proto::{AgentError, Answer};

use crate::error::{Doing, invalid};
use crate::sys;

/// Less than this is made up for little by little, by half a millisecond in each second, so that time does not run backwards.
const STEP: Duration = Duration::from_millis(500);

/// Moves the clock by so many nanoseconds, if by any; the answer tells what it says then, in nanoseconds since 1970.
pub(crate) fn adjust(by_ns: i64) -> Result<Answer, AgentError> {
    let by = Duration::from_nanos(by_ns.unsigned_abs());
    if by >= STEP {
        let moved = if by_ns < 0 { now().checked_sub(by) } else { now().checked_add(by) };
        // Linux keeps 64 bits of nanoseconds.
        let to = moved.filter(|to| i64::try_from(to.as_nanos()).is_ok());
        to.ok_or_else(|| invalid(format_args!("The clock cannot be moved by {by_ns} ns")))?;
        sys::clock::step(by_ns).doing(|| "Cannot set the clock")?;
    } else if by_ns != 0 {
        sys::clock::slew(by_ns / 1000).doing(|| "Cannot adjust the clock")?;
    }
    Ok(Answer::Clock { unix_ns: i64::try_from(now().as_nanos()).unwrap_or(i64::MAX) })
}

/// Since 1970; a clock before that is at its beginning.
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_not_moved_tells_the_time() {
        let before = i64::try_from(now().as_nanos()).expect("time");
        let Ok(Answer::Clock { unix_ns }) = adjust(0) else { panic!("no time") };
        assert!((before..before + 10_000_000_000).contains(&unix_ns), "{before} then {unix_ns}");
    }

    #[test]
    fn times_that_cannot_be_are_refused() {
        for by in [i64::MAX, i64::MIN] {
            assert!(adjust(by).unwrap_err().message.contains("cannot be moved"));
        }
    }
}
