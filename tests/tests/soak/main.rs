//! krx under containerd when much is asked of it at once, when whatever runs is killed at whatever moment, and when the
//! host runs out of what it needs. One test at a time; after each, nothing may be left.
//!
//! `KRX_SOAK=1` does everything some ten times as long, `KRX_SEED=N` repeats a run's random choices.

mod scarcity;
mod storm;

use std::process::ExitCode;

use tests::containerd::remains::Remains;
use tests::containerd::suite;

fn main() -> ExitCode {
    // Its moments depend on the machine's load, and so does how long containerd takes to recover from them.
    let killed = ("whatever_runs_is_killed_at_some_moment", storm::killed as fn(&_));
    let tests = [
        ("pods_by_the_dozen", storm::by_the_dozen as fn(&_)),
        ("containerd_is_killed_while_a_shim_begins", storm::orphaned),
        ("create_and_delete_race", storm::race),
        ("signals_to_the_guests_first_process", scarcity::first_process),
        ("a_guest_that_panics", scarcity::panic),
        ("what_ignores_sigterm_ends_all_the_same", scarcity::stubborn),
        ("a_volume_is_full", scarcity::full_volume),
        ("containerds_disk_is_full", scarcity::full_disk),
        ("a_network_that_fails_half_way", scarcity::half_a_network),
    ];
    let tests: Vec<_> = tests.into_iter().chain(at_length().then_some(killed)).collect();
    suite::run_in_turn(&tests)
}

/// Whether there is time for all of it.
fn at_length() -> bool {
    std::env::var_os("KRX_SOAK").is_some()
}

#[track_caller]
fn assert_clean(before: &Remains) {
    let left = Remains::left_since(before);
    assert!(left.is_empty(), "left behind:\n    {}", left.join("\n    "));
}
