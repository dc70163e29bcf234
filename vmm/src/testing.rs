//! The driver's side of a virtqueue, for tests: guest memory, rings laid by `virtio_queue::mock`, and eventfds to
//! count kicks and interrupts.

use virtio_queue::QueueT;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::irq::Interrupt;
use crate::virtio::queue::{LiveQueue, QueueConfig};

/// `VIRTQ_DESC_F_NEXT` and `VIRTQ_DESC_F_WRITE` (virtio 1.2, 2.7.5), as wide as a descriptor has them.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;

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
    (Interrupt::new(irq.try_clone().unwrap()), irq)
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
