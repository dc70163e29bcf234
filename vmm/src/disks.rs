//! The disks of a guest that runs: they come and go by requests on the [`control`](crate::control) socket.
//!
//! virtio-mmio has no hot plug; it has placeholders (virtio 1.2, 4.2.2, DeviceID 0) at addresses that the guest can be told. A disk
//! is put into the slot of one, and then somebody tells the guest to look there; a guest that is told to let go of it first
//! finds a placeholder again. Slots cost nothing until they are used.

use std::fs::File;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use crate::arch::x86_64::layout;
use crate::bus::{BusDevice, Effect};
use crate::event_loop::{DeviceHost, Workers};
use crate::kvm::vm::{KvmError, Vm};
use crate::virtio::block::Block;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::registers::RegisterFile;
use crate::wires::Wires;

/// Where the guest finds a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskPlace {
    /// Number of the virtio-mmio slot; names the disk.
    pub slot: u32,
    /// Guest-physical address of its registers, which take 4 KiB.
    pub address: u64,
    pub irq: u32,
}

/// Why a disk cannot be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("all {} disks that a VM can have are in use", layout::DISK_SLOTS)]
    Full,
    #[error("there is no disk in slot {0}")]
    NoSuchSlot(u32),
    #[error("the size of what is to be a disk cannot be found")]
    Size(#[source] io::Error),
    #[error("the disk cannot be connected to the VM")]
    Connect(#[source] KvmError),
    #[error("the disk cannot have a thread or descriptors")]
    Host(#[source] io::Error),
}

/// What is in a slot.
enum State {
    Free,
    Disk(Box<MmioTransport<DeviceHost>>),
    /// The guest had not let go of the disk when it was taken away, and would take another one for it.
    Spoiled,
}

struct Slot {
    state: State,
    /// Connected when the slot is first used.
    wires: Option<Wires>,
}

/// All slots for disks, as a device of the bus.
pub struct Disks {
    vm: Arc<Vm>,
    memory: GuestMemoryMmap,
    workers: Workers,
    registers: RegisterFile,
    irq: u32,
    slots: Vec<Slot>,
}

impl Disks {
    pub(crate) fn new(
        vm: Arc<Vm>,
        memory: GuestMemoryMmap,
        workers: Workers,
        (registers, irq): (RegisterFile, u32),
    ) -> Self {
        let free = || Slot { state: State::Free, wires: None };
        let slots = std::iter::repeat_with(free).take(layout::DISK_SLOTS as usize).collect();
        Self { vm, memory, workers, registers, irq, slots }
    }

    /// Makes `file` a disk; the guest is to be told where.
    ///
    /// # Errors
    /// [`DiskError`]; the file is closed then.
    pub(crate) fn attach(&mut self, file: File, read_only: bool) -> Result<DiskPlace, DiskError> {
        let block = Block::new(file, read_only).map_err(DiskError::Size)?;
        let free = self.slots.iter_mut().position(|slot| matches!(slot.state, State::Free));
        let index = free.ok_or(DiskError::Full)?;
        let place = place(index, self.irq);
        let slot = &mut self.slots[index];
        if slot.wires.is_none() {
            let registers = self.registers.slot(place.slot).map_err(DiskError::Host)?;
            let wires = Wires::connect(&self.vm, (place.address, place.irq), registers, &block);
            // One that was connected in part cannot be connected again.
            slot.wires =
                Some(wires.inspect_err(|_| slot.state = State::Spoiled).map_err(DiskError::Connect)?);
        }
        let wires = slot.wires.as_ref().map(Wires::again).ok_or(DiskError::Full)?.map_err(DiskError::Host)?;
        let host = self.workers.of_device(&block).map_err(DiskError::Host)?;
        let transport = MmioTransport::new(Box::new(block), self.memory.clone(), wires, host);
        slot.state = State::Disk(Box::new(transport));
        Ok(place)
    }

    /// Takes a disk away, whatever the guest does with it, and closes its file.
    ///
    /// # Errors
    /// [`DiskError::NoSuchSlot`].
    pub(crate) fn detach(&mut self, slot: u32) -> Result<(), DiskError> {
        let index = slot.checked_sub(layout::VIRTIO_SLOTS).and_then(|index| usize::try_from(index).ok());
        let found = index.and_then(|index| self.slots.get_mut(index)).ok_or(DiskError::NoSuchSlot(slot))?;
        match std::mem::replace(&mut found.state, State::Free) {
            State::Disk(transport) => {
                if transport.is_in_use() {
                    found.state = State::Spoiled;
                }
                transport.remove();
                Ok(())
            }
            other => {
                found.state = other;
                Err(DiskError::NoSuchSlot(slot))
            }
        }
    }

    fn find(&mut self, offset: u64) -> Option<(u64, &mut MmioTransport<DeviceHost>)> {
        let index = usize::try_from(offset / layout::VIRTIO_MMIO_SIZE).ok()?;
        match &mut self.slots.get_mut(index)?.state {
            State::Disk(transport) => Some((offset % layout::VIRTIO_MMIO_SIZE, &mut **transport)),
            State::Free | State::Spoiled => None,
        }
    }
}

fn place(index: usize, irq: u32) -> DiskPlace {
    let slot = layout::VIRTIO_SLOTS + u32::try_from(index).unwrap_or(u32::MAX);
    DiskPlace { slot, address: layout::virtio_slot(slot), irq }
}

impl BusDevice for Disks {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match self.find(offset) {
            Some((offset, transport)) => transport.read(offset, data),
            None => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        self.find(offset).map_or(Effect::None, |(offset, transport)| transport.write(offset, data))
    }
}

impl std::fmt::Debug for Disks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let used = self.slots.iter().filter(|slot| matches!(slot.state, State::Disk(_))).count();
        f.debug_struct("Disks").field("used", &used).finish_non_exhaustive()
    }
}
