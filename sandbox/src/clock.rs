//! Keeps a guest's time of day: a guest's clock goes on at the pace of the host's oscillator, and does not know what NTP has made of that
//! on the host, which is seconds a day, nor that the host's clock was set.
//!
//! As NTP does (RFC 5905, section 8) the guest is asked what its clock says, and half of the time that the answer took is allowed for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use krx_proto::{Answer, Request};

use crate::agent::Line;

/// Between two looks at a guest's clock: an oscillator that is wrong by 50 millionths makes 3 ms of it.
pub(crate) const EVERY: Duration = Duration::from_secs(64);
/// What a guest's clock may be wrong by, beyond what is not known for the time that its answer took, in nanoseconds.
const TOLERANCE: i128 = 1_000_000;

/// When a guest's clock is looked at next.
#[derive(Debug)]
pub(crate) struct Clock {
    due: Instant,
    /// A question is on its way. A guest that stands still gets no second one.
    asked: Arc<AtomicBool>,
}

/// A question that is on its way, until it is answered or lost.
struct Asked(Arc<AtomicBool>);

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { due: Instant::now() + EVERY, asked: Arc::default() }
    }

    /// Looks at the guest's clock, where it is time for that.
    pub(crate) fn check(&mut self, line: &Arc<Line>) {
        let now = Instant::now();
        if now < self.due || self.asked.swap(true, Ordering::Relaxed) {
            return;
        }
        self.due = now + EVERY;
        let (asked, again) = (Asked(self.asked.clone()), line.clone());
        let answered = move |reply| {
            drop(asked);
            let said = if let Ok(Answer::Clock { unix_ns }) = reply { unix_ns } else { return };
            // In this order: what passes in between is doubt, and no error of the guest's.
            let here = SystemTime::now();
            if let Some(adjust_ns) = correction(now.elapsed(), here, said) {
                again.send_now(Request::Clock { adjust_ns }, |_| ());
            }
        };
        line.send_now(Request::Clock { adjust_ns: 0 }, answered);
    }
}

/// What a clock is to be moved by that said `said` at some time in the last `took`, in nanoseconds: by what it is surely wrong. An
/// answer may take long, where the guest was paused.
fn correction(took: Duration, now: SystemTime, said: i64) -> Option<i64> {
    let nanoseconds = |time: Duration| i128::try_from(time.as_nanos()).ok();
    let doubt = nanoseconds(took)? / 2;
    let wrong_by = nanoseconds(now.duration_since(UNIX_EPOCH).ok()?)? - doubt - i128::from(said);
    let surely = wrong_by.abs() - doubt;
    i64::try_from(wrong_by.signum() * surely).ok().filter(|_| surely > TOLERANCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    fn corrected(took_ms: u64, wrong_by_ms: i64) -> Option<i64> {
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let middle = 1_800_000_000_000 * MS - i64::try_from(took_ms).expect("small") * MS / 2;
        correction(Duration::from_millis(took_ms), now, middle + wrong_by_ms * MS)
    }

    #[test]
    fn what_is_surely_wrong_is_corrected() {
        assert_eq!(corrected(0, 0), None);
        assert_eq!(corrected(0, 1), None, "as good as right");
        assert_eq!(corrected(0, 2), Some(-2 * MS));
        assert_eq!(corrected(0, -10), Some(10 * MS));
        assert_eq!(corrected(2, -10), Some(9 * MS), "the last of it another time");
        // It may have been read at the beginning of the second that the answer took, or at its end.
        assert_eq!(corrected(1000, 400), None);
        assert_eq!(corrected(1000, 600), Some(-100 * MS));
        // Paused for an hour, and read at the end of it by a clock that runs fast.
        assert_eq!(corrected(3_600_000, 1_800_180), Some(-180 * MS));
    }

    #[test]
    fn a_guest_may_say_what_it_likes() {
        let now = SystemTime::now();
        for said in [i64::MIN, -1, 0, i64::MAX] {
            let _ = correction(Duration::MAX, now, said);
            let _ = correction(Duration::ZERO, now, said);
        }
        assert_eq!(correction(Duration::ZERO, now, i64::MIN), None, "no time that can be");
    }
}
