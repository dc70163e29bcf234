//! Random choices that can be repeated.

use std::time::Duration;

/// Xorshift, 64 bits (Marsaglia, 2003): no more is asked of it than that choices differ.
#[derive(Debug)]
pub struct Dice(u64);

impl Default for Dice {
    fn default() -> Self {
        Self::new()
    }
}

impl Dice {
    /// By `KRX_SEED`, else always the same; says which.
    #[must_use]
    pub fn new() -> Self {
        let seed = std::env::var("KRX_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(2_463_534_242);
        println!("    KRX_SEED={seed}");
        Self(seed | 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % limit
    }

    pub fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).unwrap_or(0)
    }

    pub fn moment(&mut self, longest: Duration) -> Duration {
        Duration::from_millis(self.below(u64::try_from(longest.as_millis()).unwrap_or(u64::MAX).max(1)))
    }
}
