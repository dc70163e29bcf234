//! Takes a fuzzer's bytes apart; what is missing at the end reads as zero.

/// Bytes that are yet to be used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Input<'d>(&'d [u8]);

impl<'d> Input<'d> {
    pub(crate) fn new(data: &'d [u8]) -> Self {
        Self(data)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn bytes(&mut self, count: usize) -> &'d [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub(crate) fn rest(&mut self) -> &'d [u8] {
        std::mem::take(&mut self.0)
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or_default()
    }

    pub(crate) fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub(crate) fn long(&mut self) -> u32 {
        u32::from(self.word()) | u32::from(self.word()) << 16
    }

    /// An address: mostly within a small memory, sometimes anywhere.
    pub(crate) fn address(&mut self) -> u64 {
        let low = u64::from(self.long());
        // The top bits choose: one of sixteen addresses is not of this world.
        if low >> 28 == 0xf { low << 32 | low } else { low & 0xff_ffff }
    }
}
