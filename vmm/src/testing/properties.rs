//! What holds for all inputs of a kind, tried on many of them.

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Tries `holds` on `count` inputs: always the same ones, so that who changes nothing breaks nothing. With `PROPTEST_CASES`
/// on so many others. What fails is told in its smallest form, and becomes a test of its own.
pub(crate) fn hold<S: Strategy>(count: u32, inputs: &S, holds: impl Fn(S::Value)) {
    let wanted = std::env::var("PROPTEST_CASES").ok().and_then(|count| count.parse().ok());
    let cases = wanted.unwrap_or(count);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner = match wanted {
        Some(_) => TestRunner::new(config),
        None => TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha)),
    };
    let outcome = runner.run(inputs, |input| {
        holds(input);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}
