//! The interrupt of a virtio-mmio device: its status bits and the eventfd that KVM turns into an IRQ.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::device::DeviceError;
use crate::report::Limited;

/// InterruptStatus bit "used buffer notification" (virtio 1.2, 4.2.2).
pub const USED_BUFFER: u32 = 1;
/// InterruptStatus bit "configuration change notification".
pub const CONFIG_CHANGE: u32 = 2;

/// Shared by the transport, which shows and acknowledges the bits, and the device's worker, which raises them.
#[derive(Debug, Clone)]
pub struct Interrupt {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    pending: AtomicU32,
    /// Set once by [`Interrupt::request_reset`]; part of the Status register until the driver resets.
    needs_reset: AtomicU32,
    irq: EventFd,
    /// Outlives resets: a guest may break its device as often as it likes.
    warnings: Limited,
}

impl Interrupt {
    /// `irq` is registered with KVM as an irqfd; in tests it is an eventfd to count.
    #[must_use]
    pub fn new(irq: EventFd) -> Self {
        let (pending, needs_reset) = (AtomicU32::new(0), AtomicU32::new(0));
        let shared = Shared { pending, needs_reset, irq, warnings: Limited::default() };
        Self { shared: Arc::new(shared) }
    }

    /// Tells the driver that buffers were used.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver that the device is broken until reset (virtio 1.2, 2.1.2), and the log why.
    pub fn request_reset(&self, what: &str, why: &DeviceError) {
        self.shared.warnings.warn(what, why);
        let needs_reset = virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
        self.shared.needs_reset.store(needs_reset, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }

    /// Bits raised and not yet acknowledged.
    #[must_use]
    pub fn pending(&self) -> u32 {
        self.shared.pending.load(Ordering::SeqCst)
    }

    pub fn acknowledge(&self, bits: u32) {
        self.shared.pending.fetch_and(!bits, Ordering::SeqCst);
    }

    /// `DEVICE_NEEDS_RESET` if asked for, else 0: to be ORed into the Status register.
    #[must_use]
    pub fn status_bit(&self) -> u32 {
        self.shared.needs_reset.load(Ordering::SeqCst)
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        self.shared.needs_reset.store(0, Ordering::SeqCst);
        self.shared.pending.store(0, Ordering::SeqCst);
    }

    fn raise(&self, bit: u32) {
        self.shared.pending.fetch_or(bit, Ordering::SeqCst);
        // The counter of an eventfd cannot overflow here: KVM drains it at each write. Nothing to do on error.
        let _ = self.shared.irq.write(1);
    }
}
