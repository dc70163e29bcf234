//! A suite of tests that share one containerd: it costs seconds to start under emulation.

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Trial};

use super::Engine;
use crate::attempt::attempt;

/// A test's name, and the test.
pub type Test = (&'static str, fn(&Engine));

/// Runs tests, each given the same containerd, and ends with a count of what they left.
///
/// # Panics
/// When containerd does not start.
#[must_use]
pub fn run(tests: &[Test]) -> ExitCode {
    run_with(&Arguments::from_args(), tests)
}

/// The same for tests that do to containerd what no other may see: one after the other.
///
/// # Panics
/// When containerd does not start.
#[must_use]
pub fn run_in_turn(tests: &[Test]) -> ExitCode {
    run_with(&Arguments { test_threads: Some(1), ..Arguments::from_args() }, tests)
}

fn run_with(arguments: &Arguments, tests: &[Test]) -> ExitCode {
    if arguments.list || crate::host().is_none() {
        let trials =
            tests.iter().map(|(name, _)| Trial::test(*name, || Ok(())).with_ignored_flag(true)).collect();
        return libtest_mimic::run(arguments, trials).exit_code();
    }
    let engine = Arc::new(Engine::start());
    let trials = tests.iter().map(|(name, test)| {
        let (engine, test) = (Arc::clone(&engine), *test);
        Trial::test(*name, move || attempt(|| test(&engine)))
    });
    let conclusion = libtest_mimic::run(arguments, trials.collect());
    let engine = Arc::into_inner(engine).expect("no test runs");
    if conclusion.has_failed() {
        println!("{}", engine.last_words());
    }
    let left = engine.stop_and_count();
    if !left.is_empty() {
        println!("left behind:\n    {}", left.join("\n    "));
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}
