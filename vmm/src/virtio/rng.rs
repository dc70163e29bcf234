//! The entropy device (virtio 1.2, section 5.4): fills what the driver offers from the host's random numbers.
//!
//! It keeps no pool and no rate: the host kernel's generator is faster than a guest can ask, and the bounds here
//! keep what one guest asks from delaying anything else.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::RawFd;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestMemoryError, GuestMemoryMmap, ReadVolatile};

use super::device::{Activation, Device, DeviceError, DeviceKind, Worker};
use super::queue::{LiveQueue, MAX_PARTS};

/// Linux keeps one request under way; a few more cost nothing.
const QUEUE_SIZES: [u16; 1] = [8];

/// Most bytes given to one chain. Without it a guest could offer all its memory, or one page a million times over,
/// in one chain and hold the event loop for seconds. The specification allows to give less than was offered.
const MAX_REQUEST: u32 = 64 << 10;

/// Chains served before other devices get their turn: a guest that refills the queue for ever delays them by no more
/// than the time of so many [`MAX_REQUEST`]s.
const CHAINS_PER_RUN: usize = 8;

/// Where the host's random numbers come from; reads never block once the host has booted.
const SOURCE: &str = "/dev/urandom";

/// The entropy device before the driver has started it.
#[derive(Debug)]
pub struct Rng {
    source: File,
}

/// Opens the host's random numbers.
///
/// # Errors
/// The host has no such device.
pub fn open() -> io::Result<File> {
    File::open(SOURCE)
}

impl Rng {
    /// A device that gives what `source` does, see [`open`].
    #[must_use]
    pub fn new(source: File) -> Self {
        Self { source }
    }
}

impl Device for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, DeviceError> {
        let no_queue = DeviceError::BadChain("entropy device has no queue");
        let queue = activation.queues.into_iter().next().ok_or(no_queue)?;
        let source = self.source.try_clone().map_err(DeviceError::Host)?;
        Ok(Box::new(RngWorker { queue, source }))
    }
}

struct RngWorker {
    queue: LiveQueue,
    source: File,
}

impl RngWorker {
    /// Serves one chain; `false` when there is none.
    fn serve(&mut self) -> Result<bool, DeviceError> {
        let Some(chain) = self.queue.pop()? else { return Ok(false) };
        let head = chain.head_index();
        let written = fill(chain.clone().memory(), chain, &mut self.source)?;
        self.queue.add_used(head, written)?;
        Ok(true)
    }
}

impl Worker for RngWorker {
    fn fd(&self) -> RawFd {
        self.queue.kick_fd()
    }

    fn run(&mut self) -> Result<(), DeviceError> {
        let mut served = false;
        let mut drained = false;
        self.queue.clear_kick();
        for _ in 0..CHAINS_PER_RUN {
            if self.serve()? {
                served = true;
                continue;
            }
            // Asking for kicks may show that chains came just before.
            if !self.queue.enable_kicks()? {
                drained = true;
                break;
            }
        }
        if !drained {
            self.queue.kick_again();
        }
        if served { self.queue.notify() } else { Ok(()) }
    }
}

/// Fills the writable part of `chain` from `source`, up to [`MAX_REQUEST`] bytes, and returns how many they are.
///
/// A chain without a writable part breaks the specification (5.4.6.1) but harms nobody: it gets 0 bytes.
///
/// # Errors
/// [`DeviceError::BadChain`] for more than [`MAX_PARTS`] parts, [`DeviceError::Memory`] for an address outside of guest
/// memory, [`DeviceError::Host`] when `source` fails.
pub fn fill(
    memory: &GuestMemoryMmap,
    chain: impl Iterator<Item = Descriptor>,
    source: &mut impl ReadVolatile,
) -> Result<u32, DeviceError> {
    let mut written = 0;
    for (part, descriptor) in chain.enumerate() {
        if part == MAX_PARTS {
            return Err(DeviceError::BadChain("request for entropy has too many parts"));
        }
        if !descriptor.is_write_only() {
            continue;
        }
        let len = descriptor.len().min(MAX_REQUEST - written);
        memory.read_exact_volatile_from(descriptor.addr(), source, len as usize).map_err(
            |error| match error {
                GuestMemoryError::IOError(error) => DeviceError::Host(error),
                error => DeviceError::Memory(error),
            },
        )?;
        written += len;
        if written == MAX_REQUEST {
            break;
        }
    }
    Ok(written)
}

impl fmt::Debug for RngWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RngWorker").field("queue", &self.queue).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::GuestAddress;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::testing::{self, NEXT, WRITE};

    const BUFFER: u64 = 0x10_0000;

    type Mock<'m> = MockSplitQueue<'m, GuestMemoryMmap>;

    fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> RawDescriptor {
        Descriptor::new(addr, len, flags, next).into()
    }

    fn worker(memory: &GuestMemoryMmap, mock: &Mock<'_>) -> (Box<dyn Worker>, EventFd, EventFd) {
        let (interrupt, irq) = testing::interrupt();
        let (queue, kick) = testing::live_queue(memory, mock, &interrupt);
        let activation = Activation { memory: memory.clone(), features: 0, queues: vec![queue], interrupt };
        (Rng::new(open().unwrap()).activate(activation).unwrap(), kick, irq)
    }

    fn used(mock: &Mock<'_>, index: usize) -> u32 {
        mock.used().ring().ref_at(index).unwrap().load().len()
    }

    #[test]
    fn fills_a_chain_and_interrupts_once() {
        let memory = testing::memory(4);
        let mock = Mock::new(&memory, 8);
        let chain = [descriptor(BUFFER, 64, WRITE | NEXT, 1), descriptor(BUFFER + 4096, 64, WRITE, 0)];
        mock.build_desc_chain(&chain).unwrap();
        let (mut worker, kick, irq) = worker(&memory, &mock);
        kick.write(1).unwrap();
        worker.run().unwrap();
        assert_eq!((u16::from_le(mock.used().idx().load()), used(&mock, 0)), (1, 128));
        let mut filled = [0; 64];
        memory.read_slice(&mut filled, GuestAddress(BUFFER + 4096)).unwrap();
        assert_ne!(filled, [0; 64]);
        assert_eq!(irq.read().unwrap(), 1);
        assert!(kick.read().is_err(), "an empty queue leaves no kick");
    }

    #[test]
    fn readable_chain_gets_nothing() {
        let memory = testing::memory(4);
        let mock = Mock::new(&memory, 8);
        mock.build_desc_chain(&[descriptor(BUFFER, 64, 0, 0)]).unwrap();
        let (mut worker, ..) = worker(&memory, &mock);
        worker.run().unwrap();
        assert_eq!((u16::from_le(mock.used().idx().load()), used(&mock, 0)), (1, 0));
    }

    #[test]
    fn looping_chain_is_cut_at_the_limit() {
        let memory = testing::memory(4);
        let mock = Mock::new(&memory, 8);
        let looping = [
            descriptor(BUFFER, 1 << 20, WRITE | NEXT, 1),
            descriptor(BUFFER, 1 << 20, WRITE | NEXT, 0),
            descriptor(BUFFER, 1, WRITE, 0),
        ];
        mock.add_desc_chains(&looping, 0).unwrap();
        let (mut worker, ..) = worker(&memory, &mock);
        worker.run().unwrap();
        assert_eq!(used(&mock, 0), MAX_REQUEST);
    }

    /// Neither parts that can be written nor parts that cannot are followed without end.
    #[test]
    fn long_indirect_table_costs_the_device() {
        for (flags, parts) in [(WRITE, 65), (0, 65), (0, 65_535)] {
            let memory = testing::memory(4);
            let mock = Mock::new(&memory, 8);
            let table = testing::indirect_table(&memory, (BUFFER, 1, flags), parts);
            mock.add_desc_chains(&[table], 0).unwrap();
            let (mut worker, ..) = worker(&memory, &mock);
            assert!(matches!(worker.run(), Err(DeviceError::BadChain(_))), "{flags} {parts}");
        }
        let memory = testing::memory(4);
        let mock = Mock::new(&memory, 8);
        mock.add_desc_chains(&[testing::indirect_table(&memory, (BUFFER, 1, WRITE), 64)], 0).unwrap();
        let (mut worker, ..) = worker(&memory, &mock);
        worker.run().unwrap();
        assert_eq!(used(&mock, 0), 64);
    }

    #[test]
    fn addresses_out_of_memory_cost_the_device() {
        for (addr, len) in [
            (u64::MAX - 8, 64),
            (1 << 40, 64),
            ((4 << 20) - 32, 64),
            (4 << 20, u32::MAX),
            (1 << 63, u32::MAX),
        ] {
            let memory = testing::memory(4);
            let mock = Mock::new(&memory, 8);
            mock.build_desc_chain(&[descriptor(addr, len, WRITE, 0)]).unwrap();
            let (mut worker, ..) = worker(&memory, &mock);
            assert!(matches!(worker.run(), Err(DeviceError::Memory(_))), "{addr:#x} {len:#x}");
        }
    }

    #[test]
    fn length_of_4_gib_is_capped() {
        let memory = testing::memory(4);
        let mock = Mock::new(&memory, 8);
        mock.build_desc_chain(&[descriptor(BUFFER, u32::MAX, WRITE, 0)]).unwrap();
        let (mut worker, ..) = worker(&memory, &mock);
        worker.run().unwrap();
        assert_eq!(used(&mock, 0), MAX_REQUEST);
    }

    #[test]
    fn endless_chains_are_served_in_turns_and_none_is_lost() {
        let memory = testing::memory(4);
        let mock = Mock::new(&memory, 16);
        let chains: Vec<_> = (0..10).map(|i| descriptor(BUFFER + i * 8, 8, WRITE, 0)).collect();
        mock.add_desc_chains(&chains, 0).unwrap();
        let (mut worker, kick, _irq) = worker(&memory, &mock);
        kick.write(1).unwrap();
        worker.run().unwrap();
        assert_eq!(u16::from_le(mock.used().idx().load()), 8);
        assert_eq!(kick.read().unwrap(), 1, "the kick asks for another run");
        kick.write(1).unwrap();
        worker.run().unwrap();
        assert_eq!(u16::from_le(mock.used().idx().load()), 10);
        assert!(kick.read().is_err());
    }

    #[test]
    fn indices_beyond_the_queue_cost_the_device() {
        let memory = testing::memory(4);
        let mock = Mock::new(&memory, 8);
        mock.avail().idx().store(u16::to_le(500));
        let (mut worker, ..) = worker(&memory, &mock);
        assert!(matches!(worker.run(), Err(DeviceError::Queue(_))));

        let mock = Mock::new(&memory, 8);
        mock.build_desc_chain(&[descriptor(BUFFER, 8, WRITE, 0)]).unwrap();
        mock.avail().ring().ref_at(0).unwrap().store(u16::to_le(77));
        let (mut worker, ..) = self::worker(&memory, &mock);
        assert!(worker.run().is_err(), "head 77 is not in a queue of 8");
    }
}
