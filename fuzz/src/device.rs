//! A hostile driver at one device behind its real transport: the input is what it does, step by step.

use std::sync::{Arc, Mutex, PoisonError};

use krx_vmm::bus::BusDevice;
use krx_vmm::virtio::device::{Device, DeviceError, Worker};
use krx_vmm::virtio::irq::Interrupt;
use krx_vmm::virtio::mmio::{MmioTransport, Running, WorkerHost};
use krx_vmm::virtio::registers::Registers;
use krx_vmm::wires::Wires;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::Input;
use crate::seeds::{MEMORY, ring};

/// Steps of one input; more would only be slower.
const STEPS: usize = 256;
/// Runs of a worker after the input, which has to come to rest or to an error.
const RUNS: usize = 4;

/// Holds the one worker, which runs when the input says so.
#[derive(Clone, Default)]
struct Inline(Arc<Mutex<Option<Box<dyn Worker>>>>);

struct Held(Inline);

impl Running for Held {}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.set(None);
    }
}

impl Inline {
    fn set(&self, worker: Option<Box<dyn Worker>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = worker;
    }

    /// As the event loop does: an error costs the worker.
    fn run(&self) {
        let mut worker = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if worker.as_mut().is_some_and(|worker| worker.run().is_err()) {
            *worker = None;
        }
    }
}

impl WorkerHost for Inline {
    fn start(&self, worker: Box<dyn Worker>, _: Interrupt) -> Result<Box<dyn Running>, DeviceError> {
        self.set(Some(worker));
        Ok(Box::new(Held(self.clone())))
    }
}

/// Plays `data` against `device`; `outside` is told what the rest of the world does.
pub(crate) fn drive(device: Box<dyn Device>, data: &[u8], mut outside: impl FnMut(&[u8])) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("guest memory");
    let event = || EventFd::new(EFD_NONBLOCK).expect("eventfd");
    let kicks: Vec<EventFd> = device.queue_sizes().iter().map(|_| event()).collect();
    let bells: Vec<EventFd> = kicks.iter().map(|kick| kick.try_clone().expect("eventfd")).collect();
    let host = Inline::default();
    let interrupt = Interrupt::new(event(), Registers::alone().expect("memory"));
    let wires = Wires { interrupt, kicks };
    let mut transport = MmioTransport::new(device, memory.clone(), wires, host.clone());
    let mut input = Input::new(data);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        match input.byte() % 8 {
            0 => {
                let register = u64::from(input.word() & 0x3ff);
                transport.write(register, &input.long().to_le_bytes());
            }
            1 => {
                let register = u64::from(input.word());
                transport.read(register, &mut [0; 8][..usize::from(input.byte() % 9)]);
            }
            2 => {
                let (at, length) = (input.address(), usize::from(input.byte()));
                let _ = memory.write_slice(input.bytes(length), GuestAddress(at));
            }
            3 => describe(&memory, &mut input),
            4 => offer(&memory, &mut input, &bells),
            5 => {
                let queue = input.byte();
                let _ = memory.write_obj(input.word(), GuestAddress(ring(queue) + 0x4002));
            }
            6 => host.run(),
            _ => {
                let length = usize::from(input.byte());
                outside(input.bytes(length));
            }
        }
    }
    for _ in 0..RUNS {
        host.run();
    }
}

/// Writes one descriptor of a table where the seeds put it.
fn describe(memory: &GuestMemoryMmap, input: &mut Input<'_>) {
    let at = ring(input.byte()) + u64::from(input.byte()) * 16;
    let _ = memory.write_obj(input.address(), GuestAddress(at));
    let _ = memory.write_obj(input.long(), GuestAddress(at + 8));
    let _ = memory.write_obj(u16::from(input.byte()), GuestAddress(at + 12));
    let _ = memory.write_obj(u16::from(input.byte()), GuestAddress(at + 14));
}

/// Makes a head available and kicks.
fn offer(memory: &GuestMemoryMmap, input: &mut Input<'_>, bells: &[EventFd]) {
    let (queue, head) = (input.byte(), u16::from(input.byte()));
    let available = ring(queue) + 0x4000;
    let index: u16 = memory.read_obj(GuestAddress(available + 2)).unwrap_or_default();
    let slot = available + 4 + u64::from(index % 16) * 2;
    let _ = memory.write_obj(head, GuestAddress(slot));
    let _ = memory.write_obj(index.wrapping_add(1), GuestAddress(available + 2));
    if let Some(bell) = bells.get(usize::from(queue)) {
        let _ = bell.write(1);
    }
}
