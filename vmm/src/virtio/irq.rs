//! The interrupt of a virtio-mmio device: the eventfd that KVM turns into an IRQ, and the registers that say why.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_STATUS};
use vmm_sys_util::eventfd::EventFd;

use super::device::DeviceError;
use super::registers::Registers;
use crate::report::Limited;

/// InterruptStatus bit "used buffer notification" (virtio 1.2, 4.2.2).
///
/// It is set as long as the device runs, acknowledged or not: whenever the driver is interrupted that may be why. Where it
/// is not, a driver that looks finds no used buffer. So nothing has to be done for an acknowledgement, nor to tell why
/// before an interrupt, which the host's kernel can raise by itself then (vhost).
pub const USED_BUFFER: u32 = 1;
/// InterruptStatus bit "configuration change notification". It stays until the reset, as what it tells of does: that the
/// device is broken.
pub const CONFIG_CHANGE: u32 = 2;

/// Shared by the transport and the device's worker.
#[derive(Debug, Clone)]
pub struct Interrupt {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    registers: Registers,
    irq: EventFd,
    /// Outlives resets: a guest may break its device as often as it likes.
    warnings: Limited,
}

impl Interrupt {
    /// `irq` is registered with KVM as an irqfd; in tests it is an eventfd to count. `registers` are the device's.
    #[must_use]
    pub fn new(irq: EventFd, registers: Registers) -> Self {
        Self { shared: Arc::new(Shared { registers, irq, warnings: Limited::default() }) }
    }

    /// Tells the driver that buffers were used.
    pub fn used_buffer(&self) {
        self.raise();
    }

    /// The eventfd itself, for a kernel that uses buffers in the device's place.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub fn lend(&self) -> io::Result<EventFd> {
        self.shared.irq.try_clone()
    }

    /// Tells the driver that the device is broken until reset (virtio 1.2, 2.1.2), and the log why.
    pub fn request_reset(&self, what: &str, why: &DeviceError) {
        self.shared.warnings.warn(what, why);
        self.registers().raise(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_NEEDS_RESET);
        self.registers().raise(VIRTIO_MMIO_INTERRUPT_STATUS, CONFIG_CHANGE);
        self.raise();
    }

    pub(super) fn registers(&self) -> &Registers {
        &self.shared.registers
    }

    fn raise(&self) {
        // The counter of an eventfd cannot overflow here: KVM drains it at each write. Nothing to do on error.
        let _ = self.shared.irq.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn broken_device_says_so_in_its_registers() {
        let (interrupt, irq) = testing::interrupt();
        interrupt.used_buffer();
        assert_eq!(irq.read().unwrap(), 1);
        interrupt.request_reset("test", &DeviceError::BadChain("test"));
        assert_eq!(irq.read().unwrap(), 1);
        let registers = interrupt.registers();
        assert_eq!(registers.get(VIRTIO_MMIO_STATUS), VIRTIO_CONFIG_S_NEEDS_RESET);
        assert_eq!(registers.get(VIRTIO_MMIO_INTERRUPT_STATUS), CONFIG_CHANGE);
    }

    #[test]
    fn lent_interrupt_is_the_same() {
        let (interrupt, irq) = testing::interrupt();
        let lent = interrupt.lend().unwrap();
        assert!(irq.read().is_err(), "lending is no interrupt");
        lent.write(1).unwrap();
        assert_eq!(irq.read().unwrap(), 1);
    }
}
