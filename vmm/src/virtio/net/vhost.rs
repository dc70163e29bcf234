//! The device at work where the host has vhost-net: a thread of the host's kernel (`vhost-PID`) moves the frames, and neither
//! a kick nor an interrupt wakes this process.
//!
//! ```text
//!  guest's rings ◀─▶ vhost ◀─▶ tap        kick: the queue's ioeventfd, call: the device's irqfd
//! ```
//!
//! The worker here sets it to work and takes it back, on a thread that may do just that; and hears when vhost finds a queue or
//! a chain that it cannot use. The guest's headers are the kernel's to judge: `docs/threat-model.md`.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost::net::VhostNet;
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::net::Net as KernelNet;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Address, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::control;
use super::tap::Tap;
use crate::virtio::device::{Activation, DeviceError, Worker};
use crate::virtio::queue::LiveQueue;

/// What vhost has to know of what the device offers: the form of the rings and of the header. Offloads are the tap's.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// Why frames are moved in user space.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    #[error("/dev/vhost-net cannot be opened (module vhost_net)")]
    Open(#[source] vhost::Error),
    #[error("vhost-net does not tell its features")]
    Features(#[source] vhost::Error),
    #[error("vhost-net of this kernel lacks the features {0:#x}")]
    Lacks(u64),
}

/// An open `/dev/vhost-net`, for one pair of queues.
pub struct Vhost {
    net: KernelNet<Arc<GuestMemoryMmap>>,
    /// It knows whose memory to move frames in, which holds until it is closed.
    owned: AtomicBool,
}

impl Vhost {
    /// One for each of `count` pairs of queues of the guest with this memory.
    ///
    /// # Errors
    /// [`VhostError`]; nothing of the VM depends on it.
    pub fn open(memory: &GuestMemoryMmap, count: usize) -> Result<Vec<Self>, VhostError> {
        let memory = Arc::new(memory.clone());
        let open = |_| {
            let net = KernelNet::new(Arc::clone(&memory)).map_err(VhostError::Open)?;
            let lacks = FEATURES & !net.get_features().map_err(VhostError::Features)?;
            if lacks != 0 {
                return Err(VhostError::Lacks(lacks));
            }
            Ok(Self { net, owned: AtomicBool::new(false) })
        };
        (0..count).map(open).collect()
    }

    /// Says whose memory it is, and where the guest's lies in it: all that vhost will ever reach for the guest. Its thread is
    /// made here, and is in the control group of the caller.
    fn own(&self) -> Result<(), vhost::Error> {
        let region = |region: &GuestRegionMmap| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            ..VhostUserMemoryRegionInfo::default()
        };
        let regions: Vec<_> = self.net.mem().iter().map(region).collect();
        if !self.owned.load(Ordering::Relaxed) {
            self.net.set_owner()?;
            self.owned.store(true, Ordering::Relaxed);
        }
        self.net.set_mem_table(&regions)
    }
}

/// One pair of queues: who moves its frames, and where from and to.
type Pair = (Arc<Vhost>, Arc<Tap>);

/// vhost between activation and reset.
pub(super) struct VhostWorker {
    /// Those that the driver has queues for.
    pairs: Vec<Pair>,
    features: u64,
    /// Two for each pair.
    queues: Vec<LiveQueue>,
    control: Option<Control>,
    /// The device's interrupt.
    call: EventFd,
    /// Readable when vhost is to be started, and then when it tells of an error.
    event: EventFd,
    started: bool,
}

/// The control queue.
struct Control {
    queue: LiveQueue,
    /// Readable when there is a command, or the worker's event.
    epoll: Epoll,
    /// Pairs that are used.
    used: usize,
}

impl Control {
    fn new(queue: LiveQueue, event: &EventFd) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for fd in [queue.kick_fd(), event.as_raw_fd()] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(Self { queue, epoll, used: 1 })
    }

    fn serve(&mut self, pairs: &[Pair]) -> Result<(), DeviceError> {
        let used = &mut self.used;
        control::serve(&mut self.queue, pairs.len(), |count| {
            // One after the other: where one fails, those before it are as they were asked for.
            while *used < count {
                pairs[*used].1.set_used(true)?;
                *used += 1;
            }
            while *used > count {
                pairs[*used - 1].1.set_used(false)?;
                *used -= 1;
            }
            Ok(())
        })
    }
}

impl VhostWorker {
    /// Takes what it needs; the start is [`run`](Worker::run)'s, on the thread that may do it.
    pub(super) fn new(mut pairs: Vec<Pair>, activation: Activation) -> Result<Self, DeviceError> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(DeviceError::Host)?;
        event.write(1).map_err(DeviceError::Host)?;
        let call = activation.interrupt.lend().map_err(DeviceError::Host)?;
        let features = activation.features & FEATURES;
        let mut queues = activation.queues;
        let control = if queues.len() % 2 == 1 { queues.pop() } else { None };
        let control = control.map(|queue| Control::new(queue, &event));
        let control = control.transpose().map_err(DeviceError::Host)?;
        pairs.truncate(queues.len() / 2);
        Ok(Self { pairs, features, queues, control, call, event, started: false })
    }

    fn start(&self) -> Result<(), DeviceError> {
        for ((vhost, _), queues) in self.pairs.iter().zip(self.queues.chunks(2)) {
            vhost.own().map_err(failed)?;
            vhost.net.set_features(self.features).map_err(failed)?;
            for (index, queue) in queues.iter().enumerate() {
                self.set_queue(vhost, index, queue).map_err(failed)?;
            }
        }
        // All queues first: from here on the guest is served.
        for (vhost, tap) in &self.pairs {
            for index in 0..2 {
                vhost.net.set_backend(index, Some(tap.file())).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn set_queue(&self, vhost: &Vhost, index: usize, queue: &LiveQueue) -> Result<(), vhost::Error> {
        let net = &vhost.net;
        let config = queue.config().map_err(|error| vhost::Error::IOError(io::Error::other(error)))?;
        let rings = VringConfigData {
            queue_max_size: config.max_size,
            queue_size: config.size,
            flags: 0,
            desc_table_addr: config.descriptors,
            used_ring_addr: config.used,
            avail_ring_addr: config.available,
            log_addr: None,
        };
        net.set_vring_num(index, config.size)?;
        net.set_vring_base(index, 0)?;
        net.set_vring_addr(index, &rings)?;
        net.set_vring_call(index, &self.call)?;
        net.set_vring_err(index, &self.event)?;
        // Heard if the driver has signalled it already: vhost looks when it begins to wait.
        net.set_vring_kick(index, queue.kick())
    }
}

impl Worker for VhostWorker {
    fn fd(&self) -> RawFd {
        let own = self.event.as_raw_fd();
        self.control.as_ref().map_or(own, |control| control.epoll.as_raw_fd())
    }

    fn run(&mut self) -> Result<(), DeviceError> {
        // Non-blocking: fails only if nothing was signalled.
        if self.event.read().is_ok() {
            if std::mem::replace(&mut self.started, true) {
                return Err(DeviceError::BadChain(
                    "the host's kernel (vhost-net) refuses a queue or a chain of it",
                ));
            }
            self.start()?;
        }
        self.control.as_mut().map_or(Ok(()), |control| control.serve(&self.pairs))
    }
}

impl Drop for VhostWorker {
    /// Waits until vhost has left the guest's memory alone.
    fn drop(&mut self) {
        for (vhost, _) in &self.pairs {
            for index in 0..2 {
                // Fails only where there is none, or no owner yet.
                let _ = vhost.net.set_backend(index, None);
            }
        }
        let used = self.control.as_ref().map_or(1, |control| control.used);
        for (_, tap) in self.pairs.iter().take(used).skip(1) {
            let _ = tap.set_used(false);
        }
    }
}

fn failed(error: vhost::Error) -> DeviceError {
    DeviceError::Host(io::Error::other(error))
}

impl fmt::Debug for Vhost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vhost").field("fd", &self.net.as_raw_fd()).finish_non_exhaustive()
    }
}
