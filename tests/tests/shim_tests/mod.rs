//! The tests of the suite `shim`, by what they are about.

pub(crate) mod disks;
pub(crate) mod ends;
pub(crate) mod events;
pub(crate) mod logs;
pub(crate) mod nonsense;
pub(crate) mod observed;
pub(crate) mod paused;
pub(crate) mod races;
pub(crate) mod refused;
pub(crate) mod sandbox;
pub(crate) mod silent;

/// A program that runs until it is killed.
pub(crate) const SLEEP: [&str; 2] = ["sleep", "3600"];
