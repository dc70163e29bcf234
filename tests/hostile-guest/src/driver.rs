//! A driver of virtio-mmio devices (virtio 1.2, 4.2) that does as it is told, right or wrong.

use crate::machine::{self, RINGS, While, read, write};

pub(crate) mod register {
    pub(crate) const DEVICE_ID: u64 = 0x008;
    pub(crate) const DEVICE_FEATURES: u64 = 0x010;
    pub(crate) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(crate) const DRIVER_FEATURES: u64 = 0x020;
    pub(crate) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(crate) const QUEUE_SEL: u64 = 0x030;
    pub(crate) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(crate) const QUEUE_NUM: u64 = 0x038;
    pub(crate) const QUEUE_READY: u64 = 0x044;
    pub(crate) const QUEUE_NOTIFY: u64 = 0x050;
    pub(crate) const INTERRUPT_ACK: u64 = 0x064;
    pub(crate) const STATUS: u64 = 0x070;
    pub(crate) const QUEUE_DESC: u64 = 0x080;
    pub(crate) const QUEUE_DRIVER: u64 = 0x090;
    pub(crate) const QUEUE_DEVICE: u64 = 0x0a0;
}

/// Status bits: ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK in the order in which they are raised.
pub(crate) const STEPS: [u32; 4] = [1, 3, 11, 15];
const NEEDS_RESET: u32 = 64;
/// Without notifications by index each kick counts, and each used buffer interrupts.
pub(crate) const EVENT_IDX: u64 = 1 << 29;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) const NET: u32 = 1;
pub(crate) const BLOCK: u32 = 2;
pub(crate) const RNG: u32 = 4;
pub(crate) const VSOCK: u32 = 19;
pub(crate) const FS: u32 = 26;

/// Most queues that are set up, and room for the rings of one with 1,024 places.
const QUEUES: u64 = 12;
const RING_ROOM: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xa000;
/// How long an answer may take, on an emulated host.
const PATIENCE_MS: u64 = 4000;

/// One slot.
#[derive(Clone, Copy)]
pub(crate) struct Device {
    pub(crate) base: u64,
    pub(crate) kind: u32,
}

impl Device {
    pub(crate) fn at(base: u64) -> Self {
        Self { base, kind: read(base + register::DEVICE_ID) }
    }

    pub(crate) fn get(&self, register: u64) -> u32 {
        read(self.base + register)
    }

    pub(crate) fn set(&self, register: u64, value: u32) {
        write(self.base + register, value);
    }

    pub(crate) fn set_wide(&self, register: u64, value: u64) {
        self.set(register, value as u32);
        self.set(register + 4, (value >> 32) as u32);
    }

    pub(crate) fn reset(&self) {
        self.set(register::STATUS, 0);
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.get(register::STATUS) & NEEDS_RESET != 0
    }

    pub(crate) fn kick(&self, queue: u32) {
        self.set(register::QUEUE_NOTIFY, queue);
    }

    /// From a reset up to FEATURES_OK, with what is offered and not in `without`.
    pub(crate) fn negotiate(&self, without: u64) -> bool {
        self.reset();
        self.set(register::STATUS, STEPS[0]);
        self.set(register::STATUS, STEPS[1]);
        for half in [0, 1] {
            self.set(register::DEVICE_FEATURES_SEL, half);
            self.set(register::DRIVER_FEATURES_SEL, half);
            let offered = self.get(register::DEVICE_FEATURES);
            self.set(register::DRIVER_FEATURES, offered & !(without >> (32 * half)) as u32);
        }
        self.set(register::STATUS, STEPS[2]);
        self.get(register::STATUS) & 8 != 0
    }

    /// Largest size of a queue; 0 for one that the device does not have.
    pub(crate) fn queue_max(&self, queue: u32) -> u16 {
        self.set(register::QUEUE_SEL, queue);
        self.get(register::QUEUE_NUM_MAX) as u16
    }

    /// Configures a queue wherever it is to lie.
    pub(crate) fn place(&self, queue: u32, size: u32, [descriptors, available, used]: [u64; 3]) {
        self.set(register::QUEUE_SEL, queue);
        self.set(register::QUEUE_NUM, size);
        self.set_wide(register::QUEUE_DESC, descriptors);
        self.set_wide(register::QUEUE_DRIVER, available);
        self.set_wide(register::QUEUE_DEVICE, used);
        self.set(register::QUEUE_READY, 1);
    }

    pub(crate) fn start(&self) {
        self.set(register::STATUS, STEPS[3]);
    }

    /// All that a good driver does before its first request, with rings of at most `size`. Says whether the device works.
    pub(crate) fn open(&self, size: u16, without: u64) -> bool {
        machine::clear(RINGS, QUEUES * RING_ROOM);
        if !self.negotiate(without) {
            return false;
        }
        for number in 0..QUEUES as u32 {
            let most = self.queue_max(number);
            if most > 0 {
                let queue = Queue::of(self, number, most.min(size));
                self.place(number, queue.size.into(), queue.rings());
            }
        }
        self.start();
        !self.is_broken()
    }
}

/// A queue whose rings lie where [`Device::open`] has put them.
pub(crate) struct Queue {
    device: Device,
    number: u32,
    pub(crate) size: u16,
    offered: u16,
    seen: u16,
}

impl Queue {
    pub(crate) fn of(device: &Device, number: u32, size: u16) -> Self {
        Self { device: *device, number, size, offered: 0, seen: 0 }
    }

    fn base(&self) -> u64 {
        RINGS + u64::from(self.number) * RING_ROOM
    }

    pub(crate) fn rings(&self) -> [u64; 3] {
        [self.base(), self.base() + AVAILABLE, self.base() + USED]
    }

    pub(crate) fn describe(&self, index: u16, (address, length): (u64, u32), (flags, next): (u16, u16)) {
        describe(self.base(), index, (address, length), (flags, next));
    }

    /// Puts a chain's head into the available ring; the device does not know yet.
    pub(crate) fn offer(&mut self, head: u16) {
        let place = self.base() + AVAILABLE + 4 + 2 * u64::from(self.offered % self.size);
        write(place, head);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Shows what was offered, or claims to.
    pub(crate) fn publish(&mut self, ahead: u16) {
        self.offered = self.offered.wrapping_add(ahead);
        write(self.base() + AVAILABLE + 2, self.offered);
        self.device.kick(self.number);
    }

    /// The next chain that came back: its head, and how much was written.
    pub(crate) fn take(&mut self) -> Option<(u16, u32)> {
        if read::<u16>(self.base() + USED + 2) == self.seen {
            return None;
        }
        let element = self.base() + USED + 4 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        Some((read(element), read(element + 4)))
    }

    /// As [`Self::take`], once there is one; `None` if the device breaks, or never answers.
    pub(crate) fn wait(&mut self) -> Option<(u16, u32)> {
        let patience = While::of(PATIENCE_MS);
        loop {
            if let Some(used) = self.take() {
                return Some(used);
            }
            if self.device.is_broken() || patience.is_over() {
                return None;
            }
        }
    }
}

/// Writes a descriptor into a table.
pub(crate) fn describe(table: u64, index: u16, (address, length): (u64, u32), (flags, next): (u16, u16)) {
    let place = table + 16 * u64::from(index);
    write(place, address);
    write(place + 8, length);
    write(place + 12, flags);
    write(place + 14, next);
}
