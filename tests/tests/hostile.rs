//! Guests that attack: a kernel without Linux that plays on every device of the VMM it runs on (`tests/hostile-guest`). The VMM
//! is jailed, as a pod's is.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

#[path = "hostile_tests/limits.rs"]
mod limits;

use std::time::Duration;

use tests::hostile::{Ground, Report, With, seeds};
use tests::pod::Place;
use tests::{Host, host};

/// How long a guest that may have ended itself is waited for.
const MAY_END: Duration = Duration::from_millis(1500);

const PLAIN: With = With { disk: false, net: None };

/// Plays one attack with each seed; judges the VMM, and gives the guest's own reports to be judged.
fn play(host: &Host, attack: &str, rounds: u64, with: With) -> Vec<Report> {
    let mut reports = Vec::new();
    for seed in seeds() {
        let ground = Ground::new(host);
        let mut rage = ground.play(attack, (seed, rounds), with);
        let report = rage.report();
        rage.assert_bounded();
        rage.stop();
        ground.assert_unharmed();
        assert!(report.of("sent") > 0 && report.of("leaked") == 0 && report.of("granted") == 0, "{report:?}");
        reports.push(report);
    }
    reports
}

#[test]
fn registers_and_ports_take_any_access() {
    let Some(host) = host() else { return };
    play(&host, "registers", 4000, PLAIN);
    play(&host, "ports", 3000, PLAIN);
}

#[test]
fn devices_bear_drivers_in_any_state() {
    let Some(host) = host() else { return };
    for report in play(&host, "states", 1500, With { disk: true, net: Some(false) }) {
        assert!(report.of("broken") > 0, "{report:?}");
    }
}

#[test]
fn queues_are_where_they_may_be() {
    let Some(host) = host() else { return };
    for report in play(&host, "queues", 300, With { disk: true, net: Some(true) }) {
        assert!(report.of("broken") > 0 && report.of("broken") < report.of("sent"), "{report:?}");
    }
}

#[test]
fn chains_cost_the_device() {
    let Some(host) = host() else { return };
    for net in [None, Some(false), Some(true)] {
        for report in play(&host, "chains", 60, With { disk: true, net }) {
            assert!(report.of("broken") > 0 && report.of("answered") > 0, "{report:?}");
        }
    }
}

#[test]
fn kicks_and_interrupts_without_end_end_with_the_guest() {
    let Some(host) = host() else { return };
    play(&host, "notify", 1000, With { disk: true, net: Some(true) });
    for report in play(&host, "storm", 1000, PLAIN) {
        assert_eq!(report.of("answered"), report.of("sent"));
    }
}

#[test]
fn share_has_no_way_out() {
    let Some(host) = host() else { return };
    for report in play(&host, "fuse", 1500, PLAIN) {
        assert!(report.of("answered") > 1500, "{report:?}");
        assert_eq!((report.of("answered"), report.of("broken")), (report.of("sent"), 0), "{report:?}");
    }
}

#[test]
fn vsock_bears_every_packet() {
    let Some(host) = host() else { return };
    for report in play(&host, "vsock", 10_000, PLAIN) {
        assert!(report.of("answered") > 9000, "{report:?}");
    }
}

#[test]
fn guests_that_end_themselves_cost_an_exit_code() {
    let Some(host) = host() else { return };
    let attacks = (0..8).map(|seed| ("instruction", seed));
    for (attack, seed) in attacks.chain(seeds().into_iter().map(|seed| ("apic", seed))) {
        let ground = Ground::new(&host);
        let mut rage = ground.play(attack, (seed, 2000), PLAIN);
        match rage.end_within(MAY_END) {
            Some(status) => println!("{attack} {seed}: {status}"),
            None => rage.stop(),
        }
        ground.assert_unharmed();
    }
}

#[test]
fn another_pod_works_beside() {
    let Some(place) = Place::new() else { return };
    let ground = Ground::new(&place.host);
    let mut rage = ground.play("states", (1, 1 << 40), PLAIN);
    for _ in 0..2 {
        let ended = place.sh(&[], "echo works; exit 3");
        assert_eq!((ended.code, ended.out.as_str()), (3, "works\n"), "{ended:?}");
    }
    assert!(rage.end_within(Duration::ZERO).is_none(), "{}", rage.said());
    rage.stop();
    ground.assert_unharmed();
    place.assert_clean();
}
