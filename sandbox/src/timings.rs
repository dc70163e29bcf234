//! The phases of a start, as instants of `CLOCK_MONOTONIC`, which the VMM's own phases share.
//!
//! Taking an instant costs one vDSO call, so it is always done; collecting and printing is left to who asks.

use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// One point of a start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    pub name: String,
    pub monotonic_ns: u64,
}

/// Phases noted so far, by any thread.
#[derive(Debug, Default)]
pub struct Timings(Mutex<Vec<Phase>>);

/// `CLOCK_MONOTONIC` in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let nanoseconds = |now: nix::sys::time::TimeSpec| {
        let seconds = u64::try_from(now.tv_sec()).ok()?;
        Some(seconds * 1_000_000_000 + u64::try_from(now.tv_nsec()).ok()?)
    };
    // The clock always exists and counts from boot, upwards.
    clock_gettime(ClockId::CLOCK_MONOTONIC).ok().and_then(nanoseconds).unwrap_or_default()
}

impl Timings {
    /// Notes that `name` has been reached now.
    pub fn mark(&self, name: &str) {
        self.add(name, monotonic_ns());
    }

    /// As [`Self::mark`], but only if `name` was not reached before.
    pub fn mark_once(&self, name: &str) {
        let mut phases = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if phases.iter().all(|phase| phase.name != name) {
            phases.push(Phase { name: name.into(), monotonic_ns: monotonic_ns() });
        }
    }

    pub fn add(&self, name: &str, monotonic_ns: u64) {
        let mut phases = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        phases.push(Phase { name: name.into(), monotonic_ns });
    }

    /// All phases in order of time.
    #[must_use]
    pub fn phases(&self) -> Vec<Phase> {
        let mut phases = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        phases.sort_by_key(|phase| phase.monotonic_ns);
        phases
    }

    /// An aligned table: milliseconds since the first phase, milliseconds since the one before, name.
    #[must_use]
    pub fn table(&self) -> String {
        let phases = self.phases();
        let Some(first) = phases.first() else { return String::new() };
        let mut table = format!("{:>12}  {:>12}  phase\n", "at (ms)", "after (ms)");
        let mut before = first.monotonic_ns;
        for Phase { name, monotonic_ns } in &phases {
            let at = milliseconds(monotonic_ns - first.monotonic_ns);
            let after = milliseconds(monotonic_ns - before);
            // Writing to a string cannot fail.
            let _ = writeln!(table, "{at:>12.3}  {after:>12.3}  {name}");
            before = *monotonic_ns;
        }
        table
    }

    /// One line of text, for a log: `NAME @NANOSECONDS, ...`.
    #[must_use]
    pub fn line(&self) -> String {
        let phases = self.phases();
        let phases = phases.iter().map(|phase| format!("{} @{}", phase.name, phase.monotonic_ns));
        phases.collect::<Vec<_>>().join(", ")
    }

    /// One line of JSON: `{"phases":[{"name":...,"monotonic_ns":...,"ms":...},...]}`.
    #[must_use]
    pub fn json(&self) -> String {
        let phases = self.phases();
        let first = phases.first().map_or(0, |phase| phase.monotonic_ns);
        let line = |phase: &Phase| {
            let ms = milliseconds(phase.monotonic_ns - first);
            serde_json::json!({ "name": phase.name, "monotonic_ns": phase.monotonic_ns, "ms": ms })
        };
        let phases: Vec<_> = phases.iter().map(line).collect();
        serde_json::json!({ "phases": phases }).to_string()
    }
}

#[expect(clippy::cast_precision_loss, reason = "a start lasts far less than 2^53 nanoseconds (104 days)")]
fn milliseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timings() -> Timings {
        let timings = Timings::default();
        timings.add("first output byte", 7_000_000_500);
        timings.add("process start", 7_000_000_000);
        timings
    }

    #[test]
    fn phases_are_sorted_by_time() {
        let names: Vec<_> = timings().phases().into_iter().map(|phase| phase.name).collect();
        assert_eq!(names, ["process start", "first output byte"]);
    }

    #[test]
    fn table_counts_from_the_first_phase() {
        let table = timings().table();
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["0.000", "0.000", "process", "start"]);
        assert!(lines[2].trim_start().starts_with("0.001 ") || lines[2].trim_start().starts_with("0.000 "));
        assert_eq!(Timings::default().table(), "");
    }

    #[test]
    fn json_is_one_line() {
        let json = timings().json();
        assert!(!json.contains('\n'));
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["phases"][0]["name"], "process start");
        assert_eq!(value["phases"][1]["ms"], 0.0005);
    }

    #[test]
    fn a_line_has_all_phases() {
        assert_eq!(timings().line(), "process start @7000000000, first output byte @7000000500");
    }

    #[test]
    fn clock_goes_forward() {
        let before = monotonic_ns();
        assert!(before > 0 && monotonic_ns() >= before);
    }
}
