//! VM exits of a start, counted by reason up to a point of it.

use std::collections::BTreeMap;

use crate::tracing::Event;

/// Exits by reason (`npf`, `io`, `msr`, ... as KVM names them) from `from_ns` to `to_ns`.
#[must_use]
pub fn by_reason(events: &[Event], from_ns: u64, to_ns: u64) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    let during = from_ns / 1000..=to_ns / 1000;
    for event in
        events.iter().filter(|event| event.name == "kvm_exit" && during.contains(&event.monotonic_us))
    {
        *counts.entry(reason(&event.fields)).or_default() += 1;
    }
    counts
}

/// `vcpu 0 reason EXIT_NPF rip 0x...` gives `npf`.
fn reason(fields: &str) -> String {
    let mut words = fields.split_whitespace().skip_while(|word| *word != "reason").skip(1);
    let name = words.next().unwrap_or("unknown").to_lowercase();
    name.strip_prefix("exit_").unwrap_or(&name).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_counted_by_reason_within_the_time() {
        let event = |monotonic_us, name: &str, fields: &str| Event {
            monotonic_us,
            name: name.into(),
            fields: fields.into(),
        };
        let events = [
            event(5, "kvm_exit", "vcpu 0 reason EXIT_NPF rip 0x1"),
            event(10, "kvm_exit", "vcpu 0 reason EXIT_NPF rip 0x1"),
            event(11, "kvm_entry", "vcpu 0"),
            event(20, "kvm_exit", "vcpu 0 reason io rip 0x1"),
            event(21, "kvm_exit", "vcpu 0 reason io rip 0x1"),
        ];
        let counts = by_reason(&events, 10_000, 20_999);
        assert_eq!(counts, BTreeMap::from([("npf".into(), 1), ("io".into(), 1)]));
    }
}
