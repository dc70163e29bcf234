//! The registers of virtio-mmio against a model of what the specification lets a driver do (virtio 1.2, 2.1, 3.1.1 and 4.2.2).

use std::cell::Cell;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use virtio_bindings::virtio_mmio as register;

use crate::bus::BusDevice;
use crate::testing;
use crate::testing::properties::hold;
use crate::virtio::device::{Activation, Device, DeviceError, DeviceKind, Worker};
use crate::virtio::irq::Interrupt;
use crate::virtio::mmio::{MmioTransport, Running, WorkerHost};
use crate::wires::Wires;

/// Drivers, each of so many writes at most.
const DRIVERS: u32 = 3000;
const WRITES: usize = 40;
const SIZES: [u16; 2] = [16, 8];
const MEMORY: u64 = 1 << 20;
const OFFERED: u64 = 1 << 3 | 1 << 29 | 1 << 32;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 3;
const FEATURES_OK: u32 = 11;
const DRIVER_OK: u32 = 15;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

/// A device that counts its workers.
struct Counting(Arc<AtomicUsize>);

impl Device for Counting {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
        1 << 3
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, DeviceError> {
        assert_eq!(activation.queues.len(), SIZES.len());
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Counted(self.0.clone())))
    }
}

struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Worker for Counted {
    fn fd(&self) -> RawFd {
        -1
    }

    fn run(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}

struct Holder;

struct Held(#[expect(dead_code, reason = "dropped with the transport's hold")] Box<dyn Worker>);

impl Running for Held {}

impl WorkerHost for Holder {
    fn start(&self, worker: Box<dyn Worker>, _: Interrupt) -> Result<Box<dyn Running>, DeviceError> {
        Ok(Box::new(Held(worker)))
    }
}

/// A queue as the driver has described it.
#[derive(Debug, Clone, Copy, Default)]
struct Queue {
    size: u64,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl Queue {
    fn can_be(&self, most: u16) -> bool {
        let ring = |at: u64, size: u64, align: u64| {
            at.is_multiple_of(align) && at.checked_add(size).is_some_and(|end| end < MEMORY)
        };
        self.ready
            && self.size.is_power_of_two()
            && self.size <= most.into()
            && ring(self.descriptors, 16 * self.size, 16)
            && ring(self.available, 6 + 2 * self.size, 2)
            && ring(self.used, 6 + 8 * self.size, 4)
    }
}

/// What a device is to be after some writes.
#[derive(Debug, Default)]
struct Model {
    status: u32,
    features: u64,
    device_half: u32,
    driver_half: u32,
    selected: u32,
    queues: [Queue; 2],
    runs: bool,
}

impl Model {
    fn new() -> Self {
        Self { queues: SIZES.map(|size| Queue { size: size.into(), ..Queue::default() }), ..Self::default() }
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(self.selected as usize)
    }

    fn write(&mut self, register: u32, value: u32) {
        let low = |old: u64| old >> 32 << 32 | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match register {
            register::VIRTIO_MMIO_STATUS => self.set_status(value),
            register::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_half = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_half = value,
            register::VIRTIO_MMIO_QUEUE_SEL => self.selected = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES if self.status == DRIVER => match self.driver_half {
                0 => self.features = low(self.features),
                1 => self.features = high(self.features),
                _ => {}
            },
            _ if self.status & !FAILED != FEATURES_OK => {}
            _ => {
                let Some(queue) = self.queues.get_mut(self.selected as usize) else { return };
                match register {
                    register::VIRTIO_MMIO_QUEUE_NUM => queue.size = value.into(),
                    register::VIRTIO_MMIO_QUEUE_READY => queue.ready = value == 1,
                    register::VIRTIO_MMIO_QUEUE_DESC_LOW => queue.descriptors = low(queue.descriptors),
                    register::VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.descriptors = high(queue.descriptors),
                    register::VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.available = low(queue.available),
                    register::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.available = high(queue.available),
                    register::VIRTIO_MMIO_QUEUE_USED_LOW => queue.used = low(queue.used),
                    register::VIRTIO_MMIO_QUEUE_USED_HIGH => queue.used = high(queue.used),
                    _ => {}
                }
            }
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            *self = Self::new();
        } else if value & FAILED != 0 {
            self.status |= FAILED;
        } else {
            let next = match (self.status, value & DRIVER_OK) {
                (0, ACKNOWLEDGE) => ACKNOWLEDGE,
                (ACKNOWLEDGE, DRIVER) => DRIVER,
                (DRIVER, FEATURES_OK) if self.features & !OFFERED == 0 && self.features >> 32 == 1 => {
                    FEATURES_OK
                }
                (FEATURES_OK, DRIVER_OK) => DRIVER_OK,
                (status, _) => return self.status = status,
            };
            self.status = next;
            if next == DRIVER_OK {
                self.runs = self.queues.iter().zip(SIZES).all(|(queue, most)| queue.can_be(most));
                self.status |= if self.runs { 0 } else { NEEDS_RESET };
            }
        }
    }
}

/// Writes in the order of a driver that means well, of which some are left out, changed or put between.
fn driver() -> impl Strategy<Value = Vec<(u32, u32)>> {
    let queue = |number: u32, size: u32| {
        let at = 0x1_0000 * (number + 1);
        vec![
            (register::VIRTIO_MMIO_QUEUE_SEL, number),
            (register::VIRTIO_MMIO_QUEUE_NUM, size),
            (register::VIRTIO_MMIO_QUEUE_DESC_LOW, at),
            (register::VIRTIO_MMIO_QUEUE_AVAIL_LOW, at + 0x1000),
            (register::VIRTIO_MMIO_QUEUE_USED_LOW, at + 0x2000),
            (register::VIRTIO_MMIO_QUEUE_READY, 1),
        ]
    };
    let status = |value| vec![(register::VIRTIO_MMIO_STATUS, value)];
    let features =
        vec![(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1), (register::VIRTIO_MMIO_DRIVER_FEATURES, 1)];
    let good = [
        status(ACKNOWLEDGE),
        status(DRIVER),
        features,
        status(FEATURES_OK),
        queue(0, 16),
        queue(1, 8),
        status(DRIVER_OK),
    ];
    let good = good.concat();
    let length = good.len();
    let values = vec![
        0,
        1,
        2,
        3,
        4,
        7,
        8,
        9,
        11,
        12,
        15,
        16,
        17,
        64,
        75,
        128,
        143,
        0x1_0000,
        0x2_0008,
        0x2_0001,
        0xf_fe00,
        0xf_ff00,
        0xf_ffff,
        0x10_0000,
        0x1_0010,
        u32::MAX,
        u32::MAX - 7,
    ];
    let value = prop_oneof![6 => select(values), 1 => any::<u32>()];
    let registers = (0..=0x40_u32).prop_map(|word| 0x10 + word * 4);
    let known = select(good.iter().map(|(register, _)| *register).collect::<Vec<_>>());
    let write = (prop_oneof![4 => known, 1 => registers], value);
    let changes = vec((0..length, write.clone(), 0..4_u8), 0..3);
    (changes, vec(write, 0..6)).prop_map(move |(changes, more)| {
        let mut writes = good.clone();
        for (at, write, how) in changes {
            let at = at % writes.len();
            match how {
                0 => writes.insert(at, write),
                1 => writes[at].1 = write.1,
                2 => writes[at] = write,
                _ => drop(writes.remove(at)),
            }
        }
        writes.extend(more);
        writes
    })
}

#[test]
fn registers_do_what_the_specification_says() {
    let started = Cell::new(0);
    hold(DRIVERS, &prop_oneof![driver(), driver().prop_shuffle()], |writes| {
        assert!(writes.len() <= WRITES);
        let workers = Arc::new(AtomicUsize::new(0));
        let wires =
            Wires { interrupt: testing::interrupt().0, kicks: vec![testing::event(), testing::event()] };
        let device = Box::new(Counting(workers.clone()));
        let mut transport = MmioTransport::new(device, testing::memory(1), wires, Holder);
        let mut model = Model::new();
        for (register, value) in writes {
            transport.write(register.into(), &value.to_le_bytes());
            model.write(register, value);
            let mut read = |register: u32| {
                let mut word = [0; 4];
                transport.read(register.into(), &mut word);
                u32::from_le_bytes(word)
            };
            let offered = match model.device_half {
                0 => OFFERED & 0xffff_ffff,
                1 => OFFERED >> 32,
                _ => 0,
            };
            let most = SIZES.get(model.selected as usize).copied().unwrap_or(0);
            let expected = [
                (register::VIRTIO_MMIO_STATUS, model.status),
                (register::VIRTIO_MMIO_DEVICE_FEATURES, u32::try_from(offered).unwrap()),
                (register::VIRTIO_MMIO_QUEUE_NUM_MAX, most.into()),
                (register::VIRTIO_MMIO_QUEUE_READY, model.queue().is_some_and(|queue| queue.ready).into()),
                (register::VIRTIO_MMIO_MAGIC_VALUE, 0x7472_6976),
                (register::VIRTIO_MMIO_DEVICE_ID, 4),
            ];
            for (register, value) in expected {
                assert_eq!(read(register), value, "register {register:#x} of {model:?}");
            }
            assert_eq!(workers.load(Ordering::SeqCst), usize::from(model.runs), "workers of {model:?}");
        }
        started.set(started.get() + usize::from(model.runs));
        drop(transport);
        assert_eq!(workers.load(Ordering::SeqCst), 0, "the worker goes with the device");
    });
    assert!(started.get() > 100, "{} drivers had a device", started.get());
}
