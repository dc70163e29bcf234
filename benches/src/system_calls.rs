//! System calls of a start, counted by name up to a point of it.

use std::collections::BTreeMap;

use syscalls::x86_64::Sysno;

use crate::tracing::Event;

/// What to record for [`by_name`]: those of the VMM, whose threads have such names from its exec on.
pub const EVENT: (&str, &str) = ("raw_syscalls/sys_enter", "comm ~ \"krx-*\"");

/// System calls from `from_ns` to `to_ns`.
#[must_use]
pub fn by_name(events: &[Event], from_ns: u64, to_ns: u64) -> BTreeMap<String, u64> {
    let during = from_ns / 1000..=to_ns / 1000;
    let calls =
        events.iter().filter(|event| event.name == "sys_enter" && during.contains(&event.monotonic_us));
    let mut counts = BTreeMap::new();
    for call in calls {
        *counts.entry(name(&call.fields)).or_default() += 1;
    }
    counts
}

/// `NR 16 (1a, ae80, 0, ...)` gives `ioctl`.
fn name(fields: &str) -> String {
    let number = fields.split_whitespace().nth(1).and_then(|number| number.parse().ok());
    number.and_then(Sysno::new).map_or_else(|| fields.into(), |call| call.name().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_name_within_the_time() {
        let event = |monotonic_us, name: &str, fields: &str| Event {
            monotonic_us,
            name: name.into(),
            fields: fields.into(),
        };
        let events = [
            event(9, "sys_enter", "NR 16 (1a, ae80, 0, 0, 0, 0)"),
            event(10, "sys_enter", "NR 16 (1a, ae80, 0, 0, 0, 0)"),
            event(11, "kvm_exit", "vcpu 0 reason EXIT_NPF rip 0x1"),
            event(20, "sys_enter", "NR 0 (1, 7f, 8, 0, 0, 0)"),
            event(21, "sys_enter", "NR 0 (1, 7f, 8, 0, 0, 0)"),
        ];
        let counts = by_name(&events, 10_000, 20_999);
        assert_eq!(counts, BTreeMap::from([("ioctl".into(), 1), ("read".into(), 1)]));
    }
}
