//! Credit-based flow control (virtio 1.2, 5.10.6.3), one type a direction. Pure arithmetic: the counters run freely
//! and wrap at 2^32, so only differences mean anything.

/// What the guest may still be sent: its buffer less what is on the way or unread there.
#[derive(Debug, Clone, Copy)]
pub(super) struct GuestCredit {
    buf_alloc: u32,
    fwd_cnt: u32,
    sent: u32,
}

/// The guest acknowledged bytes that were never sent to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CreditLie;

impl GuestCredit {
    /// No credit until the guest has told of its buffer.
    pub(super) fn new() -> Self {
        Self { buf_alloc: 0, fwd_cnt: 0, sent: 0 }
    }

    /// Takes the counters of a packet from the guest. The buffer may shrink, even below what is on the way: then
    /// there is no credit until the guest has read enough.
    pub(super) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) -> Result<(), CreditLie> {
        let progress = fwd_cnt.wrapping_sub(self.fwd_cnt);
        if progress <= self.in_flight() {
            self.fwd_cnt = fwd_cnt;
        } else if progress < 1 << 31 {
            return Err(CreditLie);
        } // else older than what is known: packets of two CPUs may overtake each other, and it gives nothing away.
        self.buf_alloc = buf_alloc;
        Ok(())
    }

    pub(super) fn free(&self) -> u32 {
        self.buf_alloc.saturating_sub(self.in_flight())
    }

    pub(super) fn spend(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.fwd_cnt)
    }
}

/// What the guest was promised: a window, of which it uses what has not reached the unix socket yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct HostCredit {
    window: u32,
    received: u32,
    forwarded: u32,
    /// `forwarded`, as the guest last heard it.
    told: u32,
}

/// The guest sent more than it had credit for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Overrun;

impl HostCredit {
    pub(super) fn new(window: u32) -> Self {
        Self { window, received: 0, forwarded: 0, told: 0 }
    }

    pub(super) fn window(&self) -> u32 {
        self.window
    }

    /// Bytes received and not yet in the unix socket.
    pub(super) fn buffered(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Books `bytes` from the guest; on [`Overrun`] nothing is booked.
    pub(super) fn receive(&mut self, bytes: u32) -> Result<(), Overrun> {
        if bytes > self.window.saturating_sub(self.buffered()) {
            return Err(Overrun);
        }
        self.received = self.received.wrapping_add(bytes);
        Ok(())
    }

    /// `bytes` of what was received have left for the unix socket, or are dropped for good.
    pub(super) fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes.min(self.buffered()));
    }

    /// Whether the guest should hear of room without having asked. Half of the window is late enough to need few
    /// packets, and early enough that a guest which sends all the time does not run dry.
    pub(super) fn update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= self.window / 2
    }

    /// The `fwd_cnt` of a packet that is about to go to the guest.
    pub(super) fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_credit_is_its_buffer_less_what_it_has_not_read() {
        let mut credit = GuestCredit::new();
        assert_eq!(credit.free(), 0);
        credit.update(1000, 0).unwrap();
        credit.spend(600);
        assert_eq!(credit.free(), 400);
        credit.update(1000, 500).unwrap();
        assert_eq!(credit.free(), 900);
    }

    #[test]
    fn guest_that_acknowledges_bytes_never_sent_lies() {
        let mut credit = GuestCredit::new();
        credit.update(1000, 0).unwrap();
        assert_eq!(credit.update(1000, 1), Err(CreditLie));
        credit.spend(10);
        assert_eq!(credit.update(1000, 11), Err(CreditLie));
        credit.update(1000, 10).unwrap();
        assert_eq!(credit.update(1000, 10 + (1 << 30)), Err(CreditLie));
        assert_eq!(credit.free(), 1000);
    }

    #[test]
    fn late_packet_with_older_count_gives_no_credit() {
        let mut credit = GuestCredit::new();
        credit.update(1000, 0).unwrap();
        credit.spend(800);
        credit.update(1000, 800).unwrap();
        credit.spend(300);
        credit.update(1000, 700).unwrap();
        assert_eq!(credit.free(), 700);
    }

    #[test]
    fn shrinking_buffer_stops_without_underflow() {
        let mut credit = GuestCredit::new();
        credit.update(1000, 0).unwrap();
        credit.spend(900);
        credit.update(100, 0).unwrap();
        assert_eq!(credit.free(), 0);
        credit.update(100, 850).unwrap();
        assert_eq!(credit.free(), 50);
        credit.update(0, 900).unwrap();
        assert_eq!(credit.free(), 0);
    }

    #[test]
    fn counters_wrap_at_four_gib() {
        let mut guest = GuestCredit::new();
        let mut host = HostCredit::new(0x1000);
        guest.update(0x10_0000, 0).unwrap();
        let mut total = 0u32;
        for _ in 0..(1u64 << 32) / 0x8_0000 + 10 {
            guest.spend(0x8_0000);
            total = total.wrapping_add(0x8_0000);
            guest.update(0x10_0000, total).unwrap();
            assert_eq!(guest.free(), 0x10_0000);
        }
        host.received = u32::MAX - 5;
        host.forwarded = u32::MAX - 5;
        host.receive(0x1000).unwrap();
        assert_eq!(host.buffered(), 0x1000);
        host.forward(0x800);
        assert_eq!((host.buffered(), host.tell()), (0x800, 0x7fa));
    }

    #[test]
    fn overrun_is_refused_and_not_booked() {
        let mut credit = HostCredit::new(100);
        credit.receive(60).unwrap();
        assert_eq!(credit.receive(41), Err(Overrun));
        assert_eq!(credit.receive(u32::MAX), Err(Overrun));
        credit.receive(40).unwrap();
        assert_eq!(credit.buffered(), 100);
    }

    #[test]
    fn update_is_due_once_half_the_window_was_forwarded_unheard() {
        let mut credit = HostCredit::new(100);
        credit.receive(100).unwrap();
        credit.forward(49);
        assert!(!credit.update_due());
        credit.forward(1);
        assert!(credit.update_due());
        assert_eq!(credit.tell(), 50);
        assert!(!credit.update_due());
        credit.forward(500);
        assert_eq!(credit.buffered(), 0, "never more than was received");
    }
}
