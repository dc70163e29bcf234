//! A virtqueue in its two lives: [`QueueConfig`], which the driver sets up through registers, and [`LiveQueue`],
//! which a device owns from activation to reset.

use std::os::fd::{AsRawFd, RawFd};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::device::DeviceError;
use super::irq::Interrupt;

/// Where the elements of the used ring begin, and their size (`struct virtq_used` of virtio 1.2, 2.7.8).
const USED_RING: u64 = 4;
const USED_ELEMENT: u64 = 8;

/// What a ring has beside its elements: flags, index, and the other side's event index.
const RING_EXTRA: usize = 6;

/// A chain of descriptors over the guest's memory; iterates with a bound on its length, but a loose one, see
/// [`MAX_PARTS`].
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// Most descriptors looked at in one chain of a small device. `VIRTIO_F_INDIRECT_DESC` is not offered, but a guest may
/// use an indirect table all the same: 65,535 parts for one slot of the queue, each of them a walk on the event loop.
/// Linux' longest chain is a vsock packet of 64 KiB in single pages, or in the 45 fragments a socket buffer may have.
pub const MAX_PARTS: usize = 64;

/// Addresses and size of a queue, as the driver has written them so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueConfig {
    pub max_size: u16,
    pub size: u16,
    pub ready: bool,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

impl QueueConfig {
    #[must_use]
    pub fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, ..Self::default() }
    }

    /// Makes the queue live if what the driver wrote describes one that lies in guest memory.
    ///
    /// # Errors
    /// Sizes that are not a power of two or over the maximum, misaligned or out-of-range rings.
    pub fn activate(
        &self,
        memory: &GuestMemoryMmap,
        kick: EventFd,
        interrupt: Interrupt,
    ) -> Result<LiveQueue, DeviceError> {
        let mut queue = Queue::new(self.max_size).map_err(DeviceError::Queue)?;
        if !self.size.is_power_of_two() || self.size > self.max_size {
            return Err(DeviceError::BadChain("queue size is not a power of two within the maximum"));
        }
        queue.set_size(self.size);
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).map_err(DeviceError::Queue)?;
        queue.try_set_avail_ring_address(GuestAddress(self.available)).map_err(DeviceError::Queue)?;
        queue.try_set_used_ring_address(GuestAddress(self.used)).map_err(DeviceError::Queue)?;
        queue.set_ready(true);
        if !self.ready || !queue.is_valid(memory) {
            return Err(DeviceError::BadChain("queue rings do not lie in guest memory"));
        }
        Ok(LiveQueue { queue, memory: memory.clone(), kick, interrupt, uncounted: false })
    }
}

/// A queue in use: knows its memory, its kick and its interrupt, so a device does no address arithmetic.
#[derive(Debug)]
pub struct LiveQueue {
    queue: Queue,
    memory: GuestMemoryMmap,
    kick: EventFd,
    interrupt: Interrupt,
    /// Chains were handed back that the queue's own count of them, which decides on interrupts, does not have.
    uncounted: bool,
}

impl LiveQueue {
    /// Notifications in both directions by index (`VIRTIO_RING_F_EVENT_IDX`), as the driver has accepted or not. Without
    /// it the driver's wish not to be interrupted is not honoured, as the specification allows (2.7.7.2).
    pub fn set_event_idx(&mut self, enabled: bool) {
        self.queue.set_event_idx(enabled);
    }

    /// Readable when the driver has notified the queue.
    #[must_use]
    pub fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Signalled when the driver has notified the queue.
    #[must_use]
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Where the queue lies, for who works on it in the device's place: with addresses of the host, so each part has to lie
    /// in one region of the guest's memory.
    ///
    /// # Errors
    /// [`DeviceError::Memory`] when one does not.
    pub fn config(&self) -> Result<QueueConfig, DeviceError> {
        let size = usize::from(self.queue.size());
        let (descriptors, available, used) =
            (self.queue.desc_table(), self.queue.avail_ring(), self.queue.used_ring());
        for (address, length) in
            [(descriptors, 16 * size), (available, RING_EXTRA + 2 * size), (used, RING_EXTRA + 8 * size)]
        {
            self.memory.get_slice(GuestAddress(address), length).map_err(DeviceError::Memory)?;
        }
        let (max_size, size) = (self.queue.max_size(), self.queue.size());
        Ok(QueueConfig { max_size, size, ready: true, descriptors, available, used })
    }

    /// Clears the kick; the queue is to be looked at afterwards, so that none is lost.
    pub fn clear_kick(&self) {
        // The eventfd is non-blocking: an error means that nothing was signalled.
        let _ = self.kick.read();
    }

    /// Makes the kick readable: for who stops before the queue is empty. The driver need not kick for what it has added since
    /// it was told to stop.
    pub fn kick_again(&self) {
        // The counter is at its maximum, where this fails, only if the kick is readable.
        let _ = self.kick.write(1);
    }

    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The next chain the driver made available.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] when the driver's index claims more chains than the queue has.
    pub fn pop(&mut self) -> Result<Option<Chain<'_>>, DeviceError> {
        match self.queue.iter(&self.memory) {
            Ok(mut available) => Ok(available.next()),
            Err(error) => Err(DeviceError::Queue(error)),
        }
    }

    /// Puts back the chain that [`pop`](Self::pop) gave last: it will be given again.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Hands a chain back with `written` bytes in its writable part. Does not interrupt.
    ///
    /// # Errors
    /// A head index that is not in the queue, or rings the driver moved out of memory.
    pub fn add_used(&mut self, head: u16, written: u32) -> Result<(), DeviceError> {
        self.queue.add_used(&self.memory, head, written).map_err(DeviceError::Queue)
    }

    /// Hands several chains back of which the driver sees all or none: [`add_used`](Self::add_used) would show it the
    /// first one before the last is there.
    ///
    /// # Errors
    /// As [`add_used`](Self::add_used).
    pub fn add_used_together(&mut self, chains: &[(u16, u32)]) -> Result<(), DeviceError> {
        let Some(((last, written), others)) = chains.split_last() else { return Ok(()) };
        let mut next = self.queue.next_used();
        for (head, written) in others {
            if *head >= self.queue.size() {
                return Err(DeviceError::Queue(virtio_queue::Error::InvalidDescriptorIndex));
            }
            let slot = u64::from(next % self.queue.size());
            let at = GuestAddress(self.queue.used_ring().saturating_add(USED_RING + slot * USED_ELEMENT));
            let element = u64::from(*head) | u64::from(*written) << 32;
            self.memory.write_obj(element.to_le(), at).map_err(DeviceError::Memory)?;
            next = next.wrapping_add(1);
        }
        self.uncounted |= !others.is_empty();
        // The index that shows them all goes with the last one.
        self.queue.set_next_used(next);
        self.add_used(*last, *written)
    }

    /// Interrupts the driver unless it asked not to be.
    ///
    /// # Errors
    /// As [`add_used`](Self::add_used).
    pub fn notify(&mut self) -> Result<(), DeviceError> {
        let needed = self.queue.needs_notification(&self.memory).map_err(DeviceError::Queue)?;
        if std::mem::take(&mut self.uncounted) || needed {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Asks the driver for a kick with the next chain; with event indices, for that one only.
    ///
    /// # Errors
    /// As [`add_used`](Self::add_used). `true` means that more chains came meanwhile.
    pub fn enable_kicks(&mut self) -> Result<bool, DeviceError> {
        self.queue.enable_notification(&self.memory).map_err(DeviceError::Queue)
    }

    /// Tells the driver that it need not kick while the queue is being worked on; with event indices it does not.
    ///
    /// # Errors
    /// As [`add_used`](Self::add_used).
    pub fn suppress_kicks(&mut self) -> Result<(), DeviceError> {
        self.queue.disable_notification(&self.memory).map_err(DeviceError::Queue)
    }
}

/// Sum of the lengths of `descriptors` that `writable` selects, without overflow.
#[must_use]
pub fn total_len(descriptors: impl Iterator<Item = Descriptor>, writable: bool) -> u64 {
    descriptors.filter(|d| d.is_write_only() == writable).map(|d| u64::from(d.len())).sum()
}

#[cfg(test)]
mod tests {
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::Bytes;

    use super::*;
    use crate::testing;

    #[test]
    fn rings_out_of_memory_or_with_a_bad_size_do_not_activate() {
        let memory = testing::memory(1);
        let good = QueueConfig {
            ready: true,
            descriptors: 0,
            available: 0x4000,
            used: 0x8000,
            ..QueueConfig::new(256)
        };
        let activate =
            |config: QueueConfig| config.activate(&memory, testing::event(), testing::interrupt().0);
        assert!(activate(good).is_ok());
        for bad in [
            QueueConfig { size: 0, ..good },
            QueueConfig { size: 3, ..good },
            QueueConfig { size: 512, ..good },
            QueueConfig { ready: false, ..good },
            QueueConfig { descriptors: 1 << 40, ..good },
            QueueConfig { available: u64::MAX - 1, ..good },
            QueueConfig { used: (1 << 20) - 4, ..good },
            QueueConfig { descriptors: 8, ..good },
        ] {
            assert!(activate(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn queue_tells_where_it_lies_if_that_is_in_one_piece() {
        let good = QueueConfig {
            ready: true,
            descriptors: 0x1000,
            available: 0x4000,
            used: 0x8000,
            ..QueueConfig::new(256)
        };
        // As the two regions of a large guest, but without a hole: what crosses them is still in guest memory.
        let ranges = [(GuestAddress(0), 0x1_0000), (GuestAddress(0x1_0000), 0x1_0000)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let config = |config: QueueConfig| {
            config.activate(&memory, testing::event(), testing::interrupt().0).unwrap().config()
        };
        assert_eq!(config(good).unwrap(), good);
        for crossing in [
            QueueConfig { descriptors: 0xf800, ..good },
            QueueConfig { available: 0x1_0000 - 516, ..good },
            QueueConfig { used: 0x1_0000 - 2052, ..good },
        ] {
            assert!(matches!(config(crossing), Err(DeviceError::Memory(_))), "{crossing:?}");
        }
    }

    #[test]
    fn available_index_beyond_the_queue_is_an_error() {
        let memory = testing::memory(1);
        let mock = MockSplitQueue::new(&memory, 16);
        let (mut queue, _kick) = testing::live_queue(&memory, &mock, &testing::interrupt().0);
        mock.avail().idx().store(u16::to_le(500));
        assert!(matches!(queue.pop(), Err(DeviceError::Queue(_))));
    }

    /// A driver that takes buffers back in batches, as Linux does with what it sends.
    #[test]
    fn interrupts_and_kicks_come_where_the_indices_ask_for_them() {
        const AVAILABLE: u64 = 0x4000;
        const USED: u64 = 0x8000;
        let memory = testing::memory(1);
        let (interrupt, irq) = testing::interrupt();
        // By hand: the rings of the mock overlap where the indices lie.
        let rings = QueueConfig { ready: true, available: AVAILABLE, used: USED, ..QueueConfig::new(16) };
        let mut queue = rings.activate(&memory, testing::event(), interrupt).unwrap();
        queue.set_event_idx(true);
        let used_event = GuestAddress(AVAILABLE + 4 + 2 * 16);
        let avail_event = GuestAddress(USED + 4 + 8 * 16);

        memory.write_obj(2_u16, used_event).unwrap();
        for expected in [false, false, true, false] {
            queue.add_used(0, 0).unwrap();
            queue.notify().unwrap();
            assert_eq!(irq.read().is_ok(), expected);
        }
        // One interrupt for several, if the index lies among them.
        memory.write_obj(5_u16, used_event).unwrap();
        (0..3).for_each(|head| queue.add_used(head, 0).unwrap());
        queue.notify().unwrap();
        assert_eq!(irq.read().unwrap(), 1);
        // The first of two that are shown together is the one that the driver waits for.
        memory.write_obj(7_u16, used_event).unwrap();
        queue.add_used_together(&[(0, 0), (1, 0)]).unwrap();
        queue.notify().unwrap();
        assert_eq!(irq.read().unwrap(), 1);

        memory.write_obj(Descriptor::new(0x1_0000, 8, 0, 0), GuestAddress(0)).unwrap();
        memory.write_obj(1_u16, GuestAddress(AVAILABLE + 2)).unwrap();
        queue.pop().unwrap().unwrap();
        queue.suppress_kicks().unwrap();
        assert!(!queue.enable_kicks().unwrap());
        assert_eq!(memory.read_obj::<u16>(avail_event).unwrap(), 1);
    }

    #[test]
    fn used_head_out_of_the_queue_is_an_error() {
        let memory = testing::memory(1);
        let mock = MockSplitQueue::new(&memory, 16);
        let (mut queue, _kick) = testing::live_queue(&memory, &mock, &testing::interrupt().0);
        assert!(queue.add_used(16, 0).is_err());
    }

    #[test]
    fn chains_used_together_are_shown_at_once_and_in_order() {
        let memory = testing::memory(1);
        let mock = MockSplitQueue::new(&memory, 4);
        let (mut queue, _kick) = testing::live_queue(&memory, &mock, &testing::interrupt().0);
        let used = |index: usize| mock.used().ring().ref_at(index).unwrap().load();
        queue.add_used_together(&[(3, 7), (1, 8), (2, 9)]).unwrap();
        assert_eq!(u16::from_le(mock.used().idx().load()), 3);
        let three: Vec<_> = (0..3).map(|index| (used(index).id(), used(index).len())).collect();
        assert_eq!(three, [(3, 7), (1, 8), (2, 9)]);
        // Around the end of the ring.
        queue.add_used_together(&[(0, 1), (1, 2)]).unwrap();
        queue.add_used_together(&[]).unwrap();
        assert_eq!(u16::from_le(mock.used().idx().load()), 5);
        assert_eq!(((used(3).id(), used(3).len()), (used(0).id(), used(0).len())), ((0, 1), (1, 2)));
        assert!(queue.add_used_together(&[(4, 0), (0, 0)]).is_err());
        assert!(queue.add_used_together(&[(0, 0), (4, 0)]).is_err());
    }
}
