//! The virtio-mmio transport (virtio 1.2, section 4.2), modern only: registers in, live queues out.
//!
//! The guest reads [`Registers`] by itself; here are its writes, and what they make it read.
//!
//! The transport owns all configuration. Setting DRIVER_OK moves live queues into the device and yields a worker,
//! which a [`WorkerHost`] runs; writing 0 to Status takes it back. Queue notifications do not come here: KVM turns
//! them into eventfds.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as register;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, Device, DeviceError, Worker};
use super::irq::{Interrupt, USED_BUFFER};
use super::queue::QueueConfig;
use super::registers::Registers;
use crate::bus::{BusDevice, Effect};
use crate::wires::Wires;

/// "virt" in little-endian ASCII.
const MAGIC: u32 = 0x7472_6976;
/// Register layout of virtio 1.0 and later.
const VERSION: u32 = 2;
/// "KRX" in little-endian ASCII; the field only tells implementations apart.
const VENDOR: u32 = 0x0058_524b;
/// No shared memory region: the length reads as all ones (4.2.2, SHMLenLow).
const NO_REGION: u32 = u32::MAX;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
/// The orders in which a driver may raise Status (2.1, 3.1.1); reset and FAILED are possible in every state.
const TRANSITIONS: [(u32, u32); 4] =
    [(0, ACKNOWLEDGE), (ACKNOWLEDGE, DRIVER), (DRIVER, FEATURES_OK), (FEATURES_OK, DRIVER_OK)];

/// Runs workers: on the event loop, or on threads of their own.
pub trait WorkerHost: Send {
    /// Starts `worker`; dropping what is returned stops it and waits until it is gone.
    ///
    /// # Errors
    /// When the host cannot give a thread or watch a descriptor.
    fn start(&self, worker: Box<dyn Worker>, interrupt: Interrupt) -> Result<Box<dyn Running>, DeviceError>;
}

/// A worker at work; see [`WorkerHost::start`].
pub trait Running: Send {}

/// One device behind one slot of registers.
pub struct MmioTransport<H> {
    device: Box<dyn Device>,
    memory: GuestMemoryMmap,
    interrupt: Interrupt,
    host: H,
    kicks: Vec<EventFd>,
    status: u32,
    features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    queues: Vec<QueueConfig>,
    running: Option<Box<dyn Running>>,
}

impl<H: WorkerHost> MmioTransport<H> {
    /// A device in the slot whose `wires` these are.
    pub fn new(device: Box<dyn Device>, memory: GuestMemoryMmap, wires: Wires, host: H) -> Self {
        let Wires { interrupt, kicks } = wires;
        let queues = device.queue_sizes().iter().map(|size| QueueConfig::new(*size)).collect();
        let transport = Self {
            device,
            memory,
            interrupt,
            host,
            kicks,
            status: 0,
            features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues,
            running: None,
        };
        transport.show_device();
        transport.show_state();
        transport
    }

    fn registers(&self) -> &Registers {
        self.interrupt.registers()
    }

    /// What never changes.
    fn show_device(&self) {
        for (register, value) in [
            (register::VIRTIO_MMIO_MAGIC_VALUE, MAGIC),
            (register::VIRTIO_MMIO_VERSION, VERSION),
            (register::VIRTIO_MMIO_DEVICE_ID, self.device.kind() as u32),
            (register::VIRTIO_MMIO_VENDOR_ID, VENDOR),
            (register::VIRTIO_MMIO_SHM_LEN_LOW, NO_REGION),
            (register::VIRTIO_MMIO_SHM_LEN_HIGH, NO_REGION),
            (register::VIRTIO_MMIO_SHM_BASE_LOW, NO_REGION),
            (register::VIRTIO_MMIO_SHM_BASE_HIGH, NO_REGION),
        ] {
            self.registers().set(register, value);
        }
        // ConfigGeneration stays 0: no device changes its configuration.
        self.registers().set_config(|config| self.device.read_config(0, config));
    }

    /// All that depends on what the driver has written, after power-on and reset.
    fn show_state(&self) {
        self.registers().set(register::VIRTIO_MMIO_INTERRUPT_STATUS, 0);
        self.registers().set(register::VIRTIO_MMIO_STATUS, 0);
        self.show_features();
        self.show_queue();
    }

    fn show_features(&self) {
        let features = half(self.offered(), self.device_features_select);
        self.registers().set(register::VIRTIO_MMIO_DEVICE_FEATURES, features);
    }

    fn show_queue(&self) {
        let queue = usize::try_from(self.queue_select).ok().and_then(|index| self.queues.get(index));
        let (size, ready) = queue.map_or((0, false), |queue| (queue.max_size, queue.ready));
        self.registers().set(register::VIRTIO_MMIO_QUEUE_NUM_MAX, size.into());
        self.registers().set(register::VIRTIO_MMIO_QUEUE_READY, ready.into());
    }

    /// Bits of Status are only ever set: one may be the worker's, which says that it is broken.
    fn show_status(&self) {
        self.registers().raise(register::VIRTIO_MMIO_STATUS, self.status);
    }

    fn offered(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    /// The selected queue, while the driver may still configure it.
    fn queue_mut(&mut self) -> Option<&mut QueueConfig> {
        let configurable = self.status & !VIRTIO_CONFIG_S_FAILED == FEATURES_OK;
        let queue = self.queues.get_mut(usize::try_from(self.queue_select).ok()?)?;
        configurable.then_some(queue)
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            register::VIRTIO_MMIO_DEVICE_FEATURES_SEL => {
                self.device_features_select = value;
                self.show_features();
            }
            register::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            register::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            register::VIRTIO_MMIO_QUEUE_SEL => {
                self.queue_select = value;
                self.show_queue();
            }
            register::VIRTIO_MMIO_STATUS => self.set_status(value),
            register::VIRTIO_MMIO_QUEUE_READY => {
                self.write_queue(offset, value);
                self.show_queue();
            }
            _ => self.write_queue(offset, value),
        }
    }

    fn write_queue(&mut self, offset: u32, value: u32) {
        let Some(queue) = self.queue_mut() else { return };
        match offset {
            // A size the queue cannot have is kept as 0, which does not activate.
            register::VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            register::VIRTIO_MMIO_QUEUE_READY => queue.ready = value == 1,
            register::VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            register::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            register::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            register::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            register::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            register::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    fn accept_features(&mut self, value: u32) {
        if self.status != DRIVER {
            return;
        }
        match self.driver_features_select {
            0 => set_low(&mut self.features, value),
            1 => set_high(&mut self.features, value),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        if value & VIRTIO_CONFIG_S_FAILED != 0 {
            self.status |= VIRTIO_CONFIG_S_FAILED;
            self.show_status();
            return;
        }
        // The driver writes back what it has read: the device's own bit is not its to set.
        let wanted = value & DRIVER_OK;
        if !TRANSITIONS.contains(&(self.status, wanted)) {
            return;
        }
        // FEATURES_OK stays clear when the driver wants what was not offered, or not virtio 1 (3.1.1, step 6).
        let acceptable = self.features & !self.offered() == 0 && self.features >> VIRTIO_F_VERSION_1 & 1 == 1;
        if wanted == FEATURES_OK && !acceptable {
            return;
        }
        self.status = wanted;
        self.show_status();
        if wanted == DRIVER_OK {
            self.activate();
        }
    }

    fn activate(&mut self) {
        match self.start() {
            // A driver that has notified already is heard: an eventfd keeps what was signalled before it was watched.
            Ok(running) => self.running = Some(running),
            Err(error) => {
                let what = format!("virtio {} device not started", self.device.kind().name());
                self.interrupt.request_reset(&what, &error);
            }
        }
    }

    fn start(&mut self) -> Result<Box<dyn Running>, DeviceError> {
        let event_idx = self.features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        let count = self.device.queues_with(self.features);
        let mut queues = Vec::with_capacity(count);
        for (config, kick) in self.queues.iter().zip(&self.kicks).take(count) {
            let kick = kick.try_clone().map_err(DeviceError::Host)?;
            let mut queue = config.activate(&self.memory, kick, self.interrupt.clone())?;
            queue.set_event_idx(event_idx);
            queues.push(queue);
        }
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.features,
            queues,
            interrupt: self.interrupt.clone(),
        };
        self.registers().raise(register::VIRTIO_MMIO_INTERRUPT_STATUS, USED_BUFFER);
        let worker = self.device.activate(activation)?;
        self.host.start(worker, self.interrupt.clone())
    }

    /// Whether a driver has the device, or has failed with it. That it was seen (ACKNOWLEDGE) is what a driver leaves behind.
    pub(crate) fn is_in_use(&self) -> bool {
        self.status & !ACKNOWLEDGE != 0
    }

    /// Takes the device out of its slot, which is a placeholder then (4.2.2, DeviceID). Its worker is gone when this returns.
    pub(crate) fn remove(mut self) {
        self.reset();
        self.registers().set(register::VIRTIO_MMIO_DEVICE_ID, 0);
    }

    /// Back to the state after power-on; the worker is gone when this returns.
    fn reset(&mut self) {
        self.running = None;
        self.status = 0;
        self.features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        for (queue, size) in self.queues.iter_mut().zip(self.device.queue_sizes()) {
            *queue = QueueConfig::new(*size);
        }
        self.show_state();
    }
}

impl<H: WorkerHost> BusDevice for MmioTransport<H> {
    /// Only called where KVM does not let the guest read by itself.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.registers().read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        // No device has configuration that a driver may write, so only registers are written.
        if let (Ok(offset), Ok(word)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
        Effect::None
    }
}

/// Half of a 64-bit feature word; there are no further ones.
#[expect(clippy::cast_possible_truncation, reason = "selects 32 of 64 bits")]
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = (*value & !0xffff_ffff) | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = (*value & 0xffff_ffff) | u64::from(high) << 32;
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::testing;
    use crate::virtio::device::DeviceKind;

    /// A device with two queues that counts its workers.
    struct Dummy(Arc<AtomicUsize>);

    struct Counted(Arc<AtomicUsize>);

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    impl Worker for Counted {
        fn fd(&self) -> std::os::fd::RawFd {
            -1
        }

        fn run(&mut self) -> Result<(), DeviceError> {
            Ok(())
        }
    }

    impl Device for Dummy {
        fn kind(&self) -> DeviceKind {
            DeviceKind::Rng
        }

        fn features(&self) -> u64 {
            1 << 3
        }

        fn queue_sizes(&self) -> &[u16] {
            &[16, 8]
        }

        fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, DeviceError> {
            assert_eq!(activation.queues.len(), 2);
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(Box::new(Counted(self.0.clone())))
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

    struct Guest {
        transport: MmioTransport<Holder>,
        workers: Arc<AtomicUsize>,
    }

    impl Guest {
        fn new() -> Self {
            let workers = Arc::new(AtomicUsize::new(0));
            let kicks = vec![testing::event(), testing::event()];
            let wires = Wires { interrupt: testing::interrupt().0, kicks };
            let device = Box::new(Dummy(workers.clone()));
            let transport = MmioTransport::new(device, testing::memory(1), wires, Holder);
            Self { transport, workers }
        }

        fn write(&mut self, register: u32, value: u32) {
            self.transport.write(register.into(), &value.to_le_bytes());
        }

        fn read(&mut self, register: u32) -> u32 {
            let mut word = [0; 4];
            self.transport.read(register.into(), &mut word);
            u32::from_le_bytes(word)
        }

        fn status(&mut self) -> u32 {
            self.read(register::VIRTIO_MMIO_STATUS)
        }

        fn set_status(&mut self, status: u32) -> u32 {
            self.write(register::VIRTIO_MMIO_STATUS, status);
            self.status()
        }

        /// Up to FEATURES_OK, as virtio 1.2, 3.1.1 has it.
        fn negotiate(&mut self) {
            self.set_status(ACKNOWLEDGE);
            self.set_status(DRIVER);
            self.write(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
            self.write(register::VIRTIO_MMIO_DRIVER_FEATURES, 1);
            assert_eq!(self.set_status(FEATURES_OK), FEATURES_OK);
        }

        fn set_queue(&mut self, queue: u32, size: u32, at: u32) {
            self.write(register::VIRTIO_MMIO_QUEUE_SEL, queue);
            self.write(register::VIRTIO_MMIO_QUEUE_NUM, size);
            self.write(register::VIRTIO_MMIO_QUEUE_DESC_LOW, at);
            self.write(register::VIRTIO_MMIO_QUEUE_AVAIL_LOW, at + 0x1000);
            self.write(register::VIRTIO_MMIO_QUEUE_USED_LOW, at + 0x2000);
            self.write(register::VIRTIO_MMIO_QUEUE_READY, 1);
        }

        fn start(&mut self) -> u32 {
            self.negotiate();
            self.set_queue(0, 16, 0x1_0000);
            self.set_queue(1, 8, 0x2_0000);
            self.set_status(DRIVER_OK)
        }

        fn workers(&self) -> usize {
            self.workers.load(Ordering::SeqCst)
        }
    }

    const NEEDS_RESET: u32 = virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;

    #[test]
    fn registers_tell_what_the_device_is() {
        let mut guest = Guest::new();
        assert_eq!(guest.read(register::VIRTIO_MMIO_MAGIC_VALUE), MAGIC);
        assert_eq!(guest.read(register::VIRTIO_MMIO_VERSION), 2);
        assert_eq!(guest.read(register::VIRTIO_MMIO_DEVICE_ID), 4);
        assert_eq!(guest.read(register::VIRTIO_MMIO_QUEUE_NUM_MAX), 16);
        guest.write(register::VIRTIO_MMIO_QUEUE_SEL, 2);
        assert_eq!(guest.read(register::VIRTIO_MMIO_QUEUE_NUM_MAX), 0, "there is no third queue");
        assert_eq!(guest.read(register::VIRTIO_MMIO_DEVICE_FEATURES), 1 << 3 | 1 << VIRTIO_RING_F_EVENT_IDX);
        guest.write(register::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        assert_eq!(guest.read(register::VIRTIO_MMIO_DEVICE_FEATURES), 1);
        guest.write(register::VIRTIO_MMIO_DEVICE_FEATURES_SEL, u32::MAX);
        assert_eq!(guest.read(register::VIRTIO_MMIO_DEVICE_FEATURES), 0);
    }

    #[test]
    fn driver_in_order_starts_the_device_and_reset_takes_it_back() {
        let mut guest = Guest::new();
        for _ in 0..3 {
            assert_eq!(guest.start(), DRIVER_OK);
            assert_eq!(guest.workers(), 1);
            assert_eq!(guest.set_status(0), 0);
            assert_eq!(guest.workers(), 0);
        }
    }

    /// The worker finds a notification that came before it; nothing else wakes it.
    #[test]
    fn only_the_driver_kicks() {
        let mut guest = Guest::new();
        guest.transport.kicks[1].write(1).unwrap();
        assert_eq!(guest.start(), DRIVER_OK);
        assert!(guest.transport.kicks[0].read().is_err());
        assert_eq!(guest.transport.kicks[1].read().unwrap(), 1);
    }

    #[test]
    fn status_out_of_order_changes_nothing() {
        for status in [DRIVER, FEATURES_OK, DRIVER_OK, VIRTIO_CONFIG_S_DRIVER_OK, !VIRTIO_CONFIG_S_FAILED] {
            let mut guest = Guest::new();
            assert_eq!(guest.set_status(status), 0, "{status:#x}");
            assert_eq!(guest.workers(), 0);
        }
        let mut guest = Guest::new();
        guest.start();
        assert_eq!(guest.set_status(DRIVER_OK), DRIVER_OK, "a second DRIVER_OK is none");
        assert_eq!(guest.set_status(ACKNOWLEDGE), DRIVER_OK, "status bits are never cleared but by reset");
        assert_eq!(guest.workers(), 1);
    }

    #[test]
    fn failed_driver_starts_nothing() {
        let mut guest = Guest::new();
        guest.negotiate();
        guest.set_status(FEATURES_OK | VIRTIO_CONFIG_S_FAILED);
        guest.set_status(DRIVER_OK);
        assert_eq!(guest.workers(), 0);
    }

    #[test]
    fn features_not_offered_are_not_accepted() {
        for (low, high) in [(1, 1), (0, 0), (0, 3), (u32::MAX, u32::MAX)] {
            let mut guest = Guest::new();
            guest.set_status(ACKNOWLEDGE);
            guest.set_status(DRIVER);
            for (select, value) in [(0, low), (1, high), (7, u32::MAX)] {
                guest.write(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
                guest.write(register::VIRTIO_MMIO_DRIVER_FEATURES, value);
            }
            assert_eq!(guest.set_status(FEATURES_OK), DRIVER, "{low:#x} {high:#x}");
        }
    }

    #[test]
    fn queues_that_cannot_be_cost_the_device() {
        for (size, at) in
            [(0, 0x1_0000), (3, 0x1_0000), (32, 0x1_0000), (u32::MAX, 0x1_0000), (16, 0xf_ff00), (16, 8)]
        {
            let mut guest = Guest::new();
            guest.negotiate();
            guest.set_queue(1, 8, 0x2_0000);
            guest.set_queue(0, size, at);
            assert_eq!(guest.set_status(DRIVER_OK), DRIVER_OK | NEEDS_RESET, "{size} {at:#x}");
            assert_eq!(guest.workers(), 0);
            guest.set_status(0);
            assert_eq!(guest.start(), DRIVER_OK, "a reset mends it");
        }
    }

    #[test]
    fn queue_left_unready_costs_the_device() {
        let mut guest = Guest::new();
        guest.negotiate();
        guest.set_queue(0, 16, 0x1_0000);
        assert_eq!(guest.set_status(DRIVER_OK), DRIVER_OK | NEEDS_RESET);
    }

    #[test]
    fn live_queue_cannot_be_moved() {
        let mut guest = Guest::new();
        guest.start();
        guest.set_queue(0, 8, 0x3_0000);
        assert_eq!(guest.transport.queues[0].size, 16);
        assert_eq!(guest.transport.queues[0].descriptors, 0x1_0000);
    }

    #[test]
    fn accesses_of_any_width_and_place_are_harmless() {
        let mut guest = Guest::new();
        guest.start();
        for offset in (0..0x1004).chain([u64::from(u32::MAX), u64::MAX]) {
            for width in [0, 1, 2, 3, 8, 16] {
                guest.transport.read(offset, &mut vec![0xaa; width]);
                // A status register that is not written as a word is not written.
                guest.transport.write(offset, &vec![0; width]);
            }
        }
        assert_eq!((guest.status(), guest.workers()), (DRIVER_OK, 1));
    }

    /// A few hundred thousand writes of registers in an order no driver has.
    #[test]
    fn register_storm_never_panics() {
        let mut guest = Guest::new();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..300_000 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let register = u32::try_from(state % 0x110).unwrap() & !3;
            let value = match state >> 60 {
                0..4 => u32::try_from(state >> 32 & 0xff).unwrap(),
                4..8 => 0x1_0000 * u32::try_from(state >> 32 & 0x1f).unwrap(),
                8..12 => {
                    [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK][usize::try_from(state >> 32 & 3).unwrap()]
                }
                _ => u32::try_from(state >> 32).unwrap(),
            };
            guest.write(register, value);
            guest.read(register);
        }
        guest.set_status(0);
        assert_eq!((guest.start(), guest.workers()), (DRIVER_OK, 1));
    }
}
