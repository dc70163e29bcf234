//! The interrupt of a virtio-mmio device: its status bits and the eventfd that KVM turns into an IRQ.

use std::io;
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
    /// Bits that are raised by who cannot set them: see [`Interrupt::lend`].
    unseen: AtomicU32,
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
        let shared = Shared {
            pending: AtomicU32::new(0),
            unseen: AtomicU32::new(0),
            needs_reset: AtomicU32::new(0),
            irq,
            warnings: Limited::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Tells the driver that buffers were used.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// The eventfd itself, for a kernel that uses buffers in the device's place. It writes the eventfd and nothing else, so
    /// from now on until the reset InterruptStatus reads as if buffers had been used, acknowledged or not (virtio 1.2,
    /// 4.2.2): whenever the driver is interrupted that may be why. Where it is not, a driver that looks finds no used
    /// buffer; one that knew nothing of the bit would never look.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub fn lend(&self) -> io::Result<EventFd> {
        let irq = self.shared.irq.try_clone()?;
        self.shared.unseen.store(USED_BUFFER, Ordering::SeqCst);
        Ok(irq)
    }

    /// Tells the driver that the device is broken until reset (virtio 1.2, 2.1.2), and the log why.
    pub fn request_reset(&self, what: &str, why: &DeviceError) {
        self.shared.warnings.warn(what, why);
        let needs_reset = virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
        self.shared.needs_reset.store(needs_reset, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }

    /// Bits raised and not yet acknowledged, and those of which nobody knows.
    #[must_use]
    pub fn pending(&self) -> u32 {
        self.shared.pending.load(Ordering::SeqCst) | self.shared.unseen.load(Ordering::SeqCst)
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
        self.shared.unseen.store(0, Ordering::SeqCst);
    }

    fn raise(&self, bit: u32) {
        self.shared.pending.fetch_or(bit, Ordering::SeqCst);
        // The counter of an eventfd cannot overflow here: KVM drains it at each write. Nothing to do on error.
        let _ = self.shared.irq.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn bits_stay_until_they_are_acknowledged() {
        let (interrupt, irq) = testing::interrupt();
        interrupt.used_buffer();
        assert_eq!((interrupt.pending(), irq.read().unwrap()), (USED_BUFFER, 1));
        interrupt.acknowledge(CONFIG_CHANGE);
        assert_eq!(interrupt.pending(), USED_BUFFER);
        interrupt.acknowledge(USED_BUFFER);
        assert_eq!(interrupt.pending(), 0);
    }

    #[test]
    fn lent_interrupt_may_be_of_used_buffers_until_the_reset() {
        let (interrupt, irq) = testing::interrupt();
        let lent = interrupt.lend().unwrap();
        assert!(irq.read().is_err(), "lending is no interrupt");
        lent.write(1).unwrap();
        assert_eq!(irq.read().unwrap(), 1);
        interrupt.acknowledge(u32::MAX);
        assert_eq!(interrupt.pending(), USED_BUFFER);
        interrupt.request_reset("test", &DeviceError::BadChain("test"));
        assert_eq!(interrupt.pending(), USED_BUFFER | CONFIG_CHANGE);
        interrupt.acknowledge(u32::MAX);
        assert_eq!(interrupt.pending(), USED_BUFFER);
        interrupt.reset();
        assert_eq!(interrupt.pending(), 0);
    }
}
