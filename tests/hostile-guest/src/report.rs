//! What an attack has to tell.

use core::fmt;

/// Counts, so that the host half can tell an attack that got through to the device from one that did not.
#[derive(Default)]
pub(crate) struct Report {
    /// Accesses, chains, requests or packets that were made.
    pub(crate) sent: u64,
    /// Those that the device answered.
    pub(crate) answered: u64,
    /// Times that the device asked for a reset.
    pub(crate) broken: u64,
    /// Times that something arrived in the guest that it was not to see.
    pub(crate) leaked: u64,
    /// Times that a device granted what it must refuse, or did not do what it must, by the attack's own judgement.
    pub(crate) granted: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sent, answered, broken, leaked, granted } = self;
        write!(f, "sent={sent} answered={answered} broken={broken} leaked={leaked} granted={granted}")
    }
}
