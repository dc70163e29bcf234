//! What connects one virtio-mmio slot with KVM: its interrupt, and the notifications of its queues.

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_NOTIFY};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::kvm::vm::{KvmError, Vm};
use crate::virtio::device::Device;
use crate::virtio::irq::Interrupt;
use crate::virtio::registers::Registers;

/// They stay connected as long as the VM lives.
#[derive(Debug)]
pub struct Wires {
    pub interrupt: Interrupt,
    /// One for each queue.
    pub kicks: Vec<EventFd>,
}

impl Wires {
    /// Connects the slot of `device` that is at `address` and has the interrupt `irq`.
    ///
    /// # Errors
    /// When KVM or the host is out of descriptors.
    pub(crate) fn connect(
        vm: &Vm,
        (address, irq): (u64, u32),
        registers: Registers,
        device: &dyn Device,
    ) -> Result<Self, KvmError> {
        let interrupt = Interrupt::new(vm.irqfd(irq)?, registers);
        let notify = address + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY);
        // A kick that nobody hears ends in the transport, which ignores it.
        let kick = |queue| match device.hears(queue) {
            true => vm.ioeventfd(notify, queue),
            false => EventFd::new(EFD_NONBLOCK).map_err(KvmError::EventFd),
        };
        let kicks: Result<Vec<_>, _> =
            (0..).zip(device.queue_sizes()).map(|(queue, _)| kick(queue)).collect();
        // They change nothing, see `USED_BUFFER`: the kernel drops them, which spares an exit to here for each interrupt.
        vm.drop_writes(address + u64::from(VIRTIO_MMIO_INTERRUPT_ACK))?;
        Ok(Self { interrupt, kicks: kicks? })
    }

    /// The same, for a device that follows another in its slot.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub(crate) fn again(&self) -> std::io::Result<Self> {
        let kicks: Result<Vec<_>, _> = self.kicks.iter().map(EventFd::try_clone).collect();
        Ok(Self { interrupt: self.interrupt.clone(), kicks: kicks? })
    }
}
