//! virtio-mmio slots: gives each device its registers, interrupt and notifications, and tells the kernel of them.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use vm_memory::GuestMemoryMmap;

use crate::arch::x86_64::layout;
use crate::bus::Bus;
use crate::config::ValidConfig;
use crate::disks::Disks;
use crate::event_loop::Workers;
use crate::kvm::vm::{KvmError, Vm};
use crate::machine::MachineError;
use crate::virtio::device::Device;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::net::Net;
use crate::virtio::registers::RegisterFile;
use crate::virtio::{fs, rng, vsock};
use crate::wires::Wires;

/// The slots filled so far.
pub(crate) struct Slots<'a> {
    vm: &'a Arc<Vm>,
    memory: &'a GuestMemoryMmap,
    workers: Workers,
    registers: RegisterFile,
    bus: Bus,
    cmdline: Vec<String>,
}

impl<'a> Slots<'a> {
    /// # Errors
    /// When the host is out of memory.
    pub(crate) fn new(vm: &'a Arc<Vm>, memory: &'a GuestMemoryMmap, workers: Workers) -> io::Result<Self> {
        let registers = RegisterFile::new(layout::VIRTIO_SLOTS + layout::DISK_SLOTS)?;
        Ok(Self { vm, memory, workers, registers, bus: Bus::default(), cmdline: Vec::new() })
    }

    /// Puts `device` into the next free slot; gives the slot's interrupt.
    ///
    /// # Errors
    /// When KVM or the host is out of descriptors.
    pub(crate) fn attach(&mut self, device: Box<dyn Device>) -> Result<u32, KvmError> {
        let slot = u32::try_from(self.cmdline.len()).unwrap_or(u32::MAX);
        debug_assert!(slot < layout::VIRTIO_SLOTS, "every device has a slot of its own");
        let address = layout::virtio_slot(slot);
        let irq = layout::VIRTIO_IRQ + slot;
        let registers = self.registers.slot(slot).map_err(KvmError::Registers)?;
        let wires = Wires::connect(self.vm, (address, irq), registers, &*device)?;
        let host = self.workers.of_device(&*device).map_err(KvmError::Thread)?;
        let transport = MmioTransport::new(device, self.memory.clone(), wires, host);
        self.bus.attach(address, layout::VIRTIO_MMIO_SIZE, Arc::new(Mutex::new(transport)));
        self.cmdline.push(format!("virtio_mmio.device=4K@{address:#x}:{irq}"));
        Ok(irq)
    }

    /// Puts the slots of disks behind those of all other devices. `irq` is an interrupt that they may share.
    pub(crate) fn attach_disks(&mut self, irq: u32) -> Arc<Mutex<Disks>> {
        let registers = self.registers.clone();
        let disks =
            Disks::new(Arc::clone(self.vm), self.memory.clone(), self.workers.clone(), (registers, irq));
        let disks = Arc::new(Mutex::new(disks));
        let length = u64::from(layout::DISK_SLOTS) * layout::VIRTIO_MMIO_SIZE;
        self.bus.attach(layout::virtio_slot(layout::VIRTIO_SLOTS), length, disks.clone());
        disks
    }

    /// Kernel arguments that announce the devices.
    pub(crate) fn cmdline(&self) -> impl Iterator<Item = &str> {
        self.cmdline.iter().map(String::as_str)
    }

    /// Interrupts of the devices.
    pub(crate) fn irqs(&self) -> impl Iterator<Item = u32> {
        (layout::VIRTIO_IRQ..).take(self.cmdline.len())
    }

    /// Lets the guest read the registers; its writes come to the bus that is returned.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn into_bus(self) -> Result<Bus, KvmError> {
        self.vm.show(layout::VIRTIO_MMIO, self.registers.memory())?;
        Ok(self.bus)
    }
}

/// Attaches the devices that `config` asks for, and one for `entropy`. `interfaces` come last, so that the others have the same slots in every
/// VM; then there are slots for disks, which share the interrupt of the entropy device: that has hardly any.
///
/// # Errors
/// When a device's host side cannot be made, or KVM refuses.
pub(crate) fn attach_devices(
    slots: &mut Slots<'_>,
    config: &ValidConfig,
    entropy: File,
    interfaces: Vec<Net>,
) -> Result<Arc<Mutex<Disks>>, MachineError> {
    if let Some(path) = &config.vsock {
        let device = vsock::Vsock::new(krx_proto::GUEST_CID, path.clone()).map_err(MachineError::Vsock)?;
        slots.attach(Box::new(device)).map_err(MachineError::Kvm)?;
    }
    if let Some(share) = &config.share {
        let device = fs::Fs::new(krx_proto::SHARE_TAG, &share.root).map_err(MachineError::Fs)?;
        slots.attach(Box::new(device)).map_err(MachineError::Kvm)?;
    }
    let irq = slots.attach(Box::new(rng::Rng::new(entropy))).map_err(MachineError::Kvm)?;
    for interface in interfaces {
        slots.attach(Box::new(interface)).map_err(MachineError::Kvm)?;
    }
    Ok(slots.attach_disks(irq))
}
