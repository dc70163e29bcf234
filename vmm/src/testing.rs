//! The driver's side of a virtqueue, for tests: guest memory, rings laid by `virtio_queue::mock`, and eventfds to
//! count kicks and interrupts.

pub(crate) mod chains;
pub(crate) mod properties;

use virtio_queue::QueueT;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::irq::Interrupt;
use crate::virtio::queue::{LiveQueue, QueueConfig};
use crate::virtio::registers::Registers;

/// `VIRTQ_DESC_F_NEXT` and `VIRTQ_DESC_F_WRITE` (virtio 1.2, 2.7.5), as wide as a descriptor has them.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;

/// `VIRTQ_DESC_F_INDIRECT`.
pub(crate) const INDIRECT: u16 = 4;
/// Where [`indirect_table`] puts its table, of 1 MiB at most.
const TABLE: u64 = 2 << 20;

/// The descriptor of an indirect table of `parts` times the same `(address, length, flags)`.
pub(crate) fn indirect_table(
    memory: &GuestMemoryMmap,
    (address, length, flags): (u64, u32, u16),
    parts: u16,
) -> RawDescriptor {
    for part in 0..parts {
        let next = if part + 1 < parts { flags | NEXT } else { flags };
        let descriptor = Descriptor::new(address, length, next, part + 1);
        memory.write_obj(descriptor, GuestAddress(TABLE + u64::from(part) * 16)).unwrap();
    }
    Descriptor::new(TABLE, u32::from(parts) * 16, INDIRECT, 0).into()
}

/// Guest memory of `mib` MiB from address 0.
pub(crate) fn memory(mib: usize) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap()
}

pub(crate) fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

/// An interrupt and the eventfd on which it can be counted.
pub(crate) fn interrupt() -> (Interrupt, EventFd) {
    let irq = event();
    (Interrupt::new(irq.try_clone().unwrap(), Registers::alone().unwrap()), irq)
}

/// Makes the rings that `mock` has laid in `memory` a live queue; the eventfd kicks it.
pub(crate) fn live_queue(
    memory: &GuestMemoryMmap,
    mock: &MockSplitQueue<'_, GuestMemoryMmap>,
    interrupt: &Interrupt,
) -> (LiveQueue, EventFd) {
    let rings: virtio_queue::Queue = mock.create_queue().unwrap();
    let config = QueueConfig {
        max_size: rings.max_size(),
        size: rings.size(),
        ready: true,
        descriptors: rings.desc_table(),
        available: rings.avail_ring(),
        used: rings.used_ring(),
    };
    let kick = event();
    let live = config.activate(memory, kick.try_clone().unwrap(), interrupt.clone()).unwrap();
    (live, kick)
}
