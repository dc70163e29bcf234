//! Numbers that hurt, chosen by a seed: a run can be repeated.

use crate::machine::{BUFFERS, MEMORY_END, RINGS};

/// xorshift64*, which is good enough for mischief.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        (self.roll() >> 16) % bound.max(1)
    }

    pub(crate) fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    pub(crate) fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A number of any size, mostly near a border.
    pub(crate) fn number(&mut self) -> u64 {
        let near = self.below(5).wrapping_sub(2);
        match self.below(4) {
            0 => self.below(64),
            1 => (1_u64 << self.below(64)).wrapping_add(near),
            2 => near,
            _ => self.roll(),
        }
    }

    /// An address that a descriptor or a ring must not have, or may: never one of the program itself.
    pub(crate) fn address(&mut self) -> u64 {
        let near = self.below(64).wrapping_sub(32);
        let base = self.of(&[
            BUFFERS,
            BUFFERS + 0x1000,
            RINGS,
            RINGS + 0x8000,
            MEMORY_END,
            MEMORY_END - 0x1000,
            0xd000_0000,
            0xd000_1000,
            0xfee0_0000,
            0x1_0000_0000,
            1 << 40,
            1 << 63,
            u64::MAX - 64,
        ]);
        if self.one_in(3) { base.wrapping_add(near) } else { base }
    }

    /// A length of a part of memory.
    pub(crate) fn length(&mut self) -> u32 {
        match self.below(4) {
            0 => self.below(128) as u32,
            1 => self.of(&[0, 1, 15, 16, 40, 44, 4096, 65_536, 1 << 20, 1 << 24, 1 << 31, u32::MAX]),
            2 => self.below(8192) as u32,
            _ => self.number() as u32,
        }
    }
}
