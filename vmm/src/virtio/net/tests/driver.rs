//! A driver that lays chains by hand, so that it can also lay wrong ones, and a host at the other end of the wire.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MRG_RXBUF,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::super::header::SIZE;
use super::super::{Net, QUEUE_SIZES};
use crate::config::interface::{Mac, Mtu};
use crate::testing::{self, NEXT, WRITE};
use crate::virtio::device::{Activation, Device, DeviceError, Worker};
use crate::virtio::queue::QueueConfig;

pub(super) const MEMORY_MIB: usize = 16;
/// Guest memory no ring and no buffer of the driver lies in.
pub(super) const FREE_MEMORY: u64 = 12 << 20;
/// `header::SIZE`, as a descriptor has it.
pub(super) const HEADER: u32 = 12;

pub(super) const PLAIN: u64 = 0;
pub(super) const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
pub(super) const TSO: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6;

const RX_BUFFERS: u64 = 1 << 20;
const RX_STRIDE: u64 = 16 << 10;
const TX_BUFFERS: u64 = 6 << 20;
const TX_STRIDE: u64 = 128 << 10;
/// Transmit chains at a time: each has four descriptors of its own.
const TX_SLOTS: u16 = 32;

/// Address, length, flags, next.
pub(super) type Descriptor = (u64, u32, u16, u16);

/// xorshift64: the same numbers in every run.
pub(super) struct Prng(pub(super) u64);

impl Prng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn below(&mut self, end: u64) -> usize {
        usize::try_from(self.next() % end).unwrap()
    }

    pub(super) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next().to_le_bytes()[4]).collect()
    }
}

/// One queue as the driver sees it.
pub(super) struct Ring {
    base: u64,
    size: u16,
    pub(super) available: u16,
    used: u16,
    kick: EventFd,
}

impl Ring {
    fn new(index: u64, size: u16) -> Self {
        Self { base: 0x1_0000 * (index + 1), size, available: 0, used: 0, kick: testing::event() }
    }

    fn config(&self) -> QueueConfig {
        QueueConfig {
            ready: true,
            descriptors: self.base,
            available: self.base + 0x4000,
            used: self.base + 0x8000,
            ..QueueConfig::new(self.size)
        }
    }

    pub(super) fn describe(&self, memory: &GuestMemoryMmap, index: u16, descriptor: Descriptor) {
        write_descriptor(memory, self.base + u64::from(index) * 16, descriptor);
    }

    /// Makes `head` available and kicks if the device wants it.
    pub(super) fn offer(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let slot = self.base + 0x4004 + u64::from(self.available % self.size) * 2;
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        memory.write_obj(self.available, GuestAddress(self.base + 0x4002)).unwrap();
        if self.kicks_wanted(memory) {
            self.kick.write(1).unwrap();
        }
    }

    /// The next chain the device gave back: head and bytes written.
    pub(super) fn take_used(&mut self, memory: &GuestMemoryMmap) -> Option<(u16, u32)> {
        let index: u16 = memory.read_obj(GuestAddress(self.base + 0x8002)).unwrap();
        if index == self.used {
            return None;
        }
        let at = self.base + 0x8004 + u64::from(self.used % self.size) * 8;
        self.used = self.used.wrapping_add(1);
        let head: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }

    pub(super) fn kicks_wanted(&self, memory: &GuestMemoryMmap) -> bool {
        memory.read_obj::<u16>(GuestAddress(self.base + 0x8000)).unwrap() == 0
    }
}

pub(super) fn write_descriptor(memory: &GuestMemoryMmap, at: u64, (address, len, flags, next): Descriptor) {
    memory.write_obj(address, GuestAddress(at)).unwrap();
    memory.write_obj(len, GuestAddress(at + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
    memory.write_obj(next, GuestAddress(at + 14)).unwrap();
}

/// A frame as the guest received it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Received {
    pub(super) header: [u8; SIZE],
    pub(super) frame: Vec<u8>,
    pub(super) buffers: usize,
}

/// The guest: memory, driver, and the device under test.
pub(super) struct Guest {
    pub(super) memory: GuestMemoryMmap,
    pub(super) rx: Ring,
    pub(super) tx: Ring,
    pub(super) worker: Box<dyn Worker>,
    pub(super) device: Net,
    pub(super) irq: EventFd,
    /// The VMM's, in which the device's own epoll nests.
    event_loop: Epoll,
    tx_next: u16,
}

pub(super) fn mac() -> Mac {
    "02:00:00:00:00:02".parse().unwrap()
}

impl Guest {
    /// A guest that accepted `features`, and the other end of its wire.
    pub(super) fn new(features: u64) -> (Self, UnixDatagram) {
        let (near, far) = UnixDatagram::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        (Self::over(near.into(), features), far)
    }

    pub(super) fn over(socket: OwnedFd, features: u64) -> Self {
        Self::with(Net::over_socket(socket, mac(), Mtu::new(1500).unwrap()).unwrap(), features)
    }

    pub(super) fn with(device: Net, features: u64) -> Self {
        Self::in_memory(testing::memory(MEMORY_MIB), device, features)
    }

    pub(super) fn in_memory(memory: GuestMemoryMmap, mut device: Net, features: u64) -> Self {
        let [rx, tx] = [0_u8, 1].map(|index| Ring::new(index.into(), QUEUE_SIZES[usize::from(index)]));
        let (interrupt, irq) = testing::interrupt();
        let queues = [&rx, &tx].map(|ring| {
            // As the transport does once the worker runs.
            ring.kick.write(1).unwrap();
            let kick = ring.kick.try_clone().unwrap();
            ring.config().activate(&memory, kick, interrupt.clone()).unwrap()
        });
        let activation = Activation { memory: memory.clone(), features, queues: queues.into(), interrupt };
        let worker = device.activate(activation).unwrap();
        let event_loop = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        event_loop.ctl(ControlOperation::Add, worker.fd(), event).unwrap();
        Self { memory, rx, tx, worker, device, irq, event_loop, tx_next: 0 }
    }

    /// The driver resets the device and starts it anew, with new memory.
    pub(super) fn restart(self, features: u64) -> Self {
        let Self { device, worker, .. } = self;
        drop(worker);
        Self::with(device, features)
    }

    /// The driver resets the device, clears the rings, and starts it anew.
    pub(super) fn restart_in_place(self, features: u64) -> Self {
        let Self { device, worker, memory, rx, tx, .. } = self;
        drop(worker);
        for ring in [rx, tx] {
            memory.write_slice(&[0; 0xc000], GuestAddress(ring.base)).unwrap();
        }
        Self::in_memory(memory, device, features)
    }

    /// Lends receive buffer `index`, of one descriptor.
    pub(super) fn lend(&mut self, index: u16, len: u32) {
        let address = RX_BUFFERS + u64::from(index) * RX_STRIDE;
        self.rx.describe(&self.memory, index, (address, len, WRITE, 0));
        self.rx.offer(&self.memory, index);
    }

    /// Lays `chain` from descriptor 0 on, and offers it.
    pub(super) fn lend_chain(&mut self, chain: &[Descriptor]) {
        for (index, descriptor) in (0..).zip(chain) {
            self.rx.describe(&self.memory, index, *descriptor);
        }
        self.rx.offer(&self.memory, 0);
    }

    /// The same for the transmit queue.
    pub(super) fn send_chain(&mut self, chain: &[Descriptor]) {
        for (index, descriptor) in (0..).zip(chain) {
            self.tx.describe(&self.memory, index, *descriptor);
        }
        self.tx.offer(&self.memory, 0);
    }

    /// Sends a frame behind a header, cut before each of `cuts`. At most 32 at a time.
    pub(super) fn send(&mut self, header: &[u8; SIZE], frame: &[u8], cuts: &[u32]) {
        let slot = self.tx_next % TX_SLOTS;
        self.tx_next = self.tx_next.wrapping_add(1);
        let (head, address) = (slot * 4, TX_BUFFERS + u64::from(slot % 32) * TX_STRIDE);
        self.memory.write_slice(header, GuestAddress(address)).unwrap();
        self.memory.write_slice(frame, GuestAddress(address + u64::from(HEADER))).unwrap();
        let end = HEADER + u32::try_from(frame.len()).unwrap();
        let starts = [&[0], cuts].concat();
        let ends = [cuts, &[end]].concat();
        let last = u16::try_from(cuts.len()).unwrap();
        for ((index, start), end) in (0..).zip(starts).zip(ends) {
            let (flags, next) = if index < last { (NEXT, head + index + 1) } else { (0, 0) };
            let descriptor = (address + u64::from(start), end - start, flags, next);
            self.tx.describe(&self.memory, head + index, descriptor);
        }
        self.tx.offer(&self.memory, head);
    }

    /// Kicks both queues, whether the device wants it or not.
    pub(super) fn kick_both(&self) {
        self.rx.kick.write(1).unwrap();
        self.tx.kick.write(1).unwrap();
    }

    /// Whether the VMM would call the device.
    pub(super) fn has_work(&self) -> bool {
        let mut events = [EpollEvent::default()];
        self.event_loop.wait(0, &mut events).unwrap() > 0
    }

    /// Runs the device as long as it asks to be run, which must come to an end.
    pub(super) fn settle(&mut self) -> Result<(), DeviceError> {
        for _ in 0..1000 {
            if !self.has_work() {
                return Ok(());
            }
            self.worker.run()?;
        }
        panic!("device spins");
    }

    /// The next frame that the guest received, if any, in buffers that [`lend`](Self::lend) lent.
    pub(super) fn receive(&mut self) -> Option<Received> {
        let mut bytes = Vec::new();
        let mut buffers = 0;
        loop {
            let Some((head, len)) = self.rx.take_used(&self.memory) else {
                assert_eq!(buffers, 0, "a frame without all of its buffers");
                return None;
            };
            let mut part = vec![0; len as usize];
            let address = RX_BUFFERS + u64::from(head) * RX_STRIDE;
            self.memory.read_slice(&mut part, GuestAddress(address)).unwrap();
            bytes.extend(part);
            buffers += 1;
            if buffers == usize::from(u16::from_le_bytes([bytes[10], bytes[11]])) {
                let frame = bytes.split_off(SIZE);
                return Some(Received { header: bytes.try_into().unwrap(), frame, buffers });
            }
        }
    }

    /// The chains of frames that the device has sent.
    pub(super) fn sent(&mut self) -> usize {
        std::iter::from_fn(|| self.tx.take_used(&self.memory)).count()
    }
}

/// A frame as it goes over the wire: behind its header.
pub(super) fn wire(header: &[u8; SIZE], frame: &[u8]) -> Vec<u8> {
    [header, frame].concat()
}

/// The next frame at the far end, with its header.
pub(super) fn arrived(far: &UnixDatagram) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 128 << 10];
    match far.recv(&mut bytes) {
        Ok(len) => {
            bytes.truncate(len);
            Some(bytes)
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    }
}
