//! What a virtio device is to the rest of the VMM.
//!
//! ```text
//!            activate(queues)                    Err from Worker::run
//!  Device ──────────────────────▶ Worker ──────────────────────────────▶ DEVICE_NEEDS_RESET
//!     ▲                             │
//!     └──── transport drops it ◀────┘ (driver writes 0 to Status)
//! ```
//!
//! A [`Device`] is configuration; it has no queues and does no work. When the driver sets DRIVER_OK the transport
//! *moves* live queues into it and gets a [`Worker`]; a reset drops the worker. Nobody asks "activated?".

use std::fmt;
use std::os::fd::RawFd;

use vm_memory::GuestMemoryMmap;

use super::irq::Interrupt;
use super::queue::LiveQueue;
use crate::jail::seccomp::Kind;

/// A device before the driver has started it (virtio 1.2, 2.1 and 3.1).
pub trait Device: Send {
    /// Device ID of virtio 1.2, section 5.
    fn kind(&self) -> DeviceKind;

    /// Feature bits offered. The transport adds its own: `VIRTIO_F_VERSION_1` and `VIRTIO_RING_F_EVENT_IDX`.
    fn features(&self) -> u64 {
        0
    }

    /// Largest size of each queue; their number is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// How many of its queues a driver has that has accepted these features: it need not set up more.
    fn queues_with(&self, _features: u64) -> usize {
        self.queue_sizes().len()
    }

    /// Whether the worker waits for kicks of `queue`. Where it does not, the kernel is not asked to catch them.
    fn hears(&self, _queue: u32) -> bool {
        true
    }

    /// Fills `data` from the configuration space; bytes beyond its end read as zero.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Where the worker runs.
    fn placement(&self) -> Placement {
        Placement::EventLoop
    }

    /// Starts the device on live queues.
    ///
    /// # Errors
    /// The transport sets DEVICE_NEEDS_RESET and logs the error.
    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, DeviceError>;
}

/// The device types krx has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceKind {
    Net = virtio_bindings::virtio_ids::VIRTIO_ID_NET,
    Block = virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK,
    Rng = virtio_bindings::virtio_ids::VIRTIO_ID_RNG,
    Vsock = virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK,
    Fs = virtio_bindings::virtio_ids::VIRTIO_ID_FS,
}

impl DeviceKind {
    /// What people call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Rng => "rng",
            Self::Vsock => "vsock",
            Self::Fs => "fs",
            Self::Net => "net",
            Self::Block => "block",
        }
    }
}

/// Whether a worker shares the event loop's thread or has its own, because the host's file systems or network take time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    EventLoop,
    /// The kind decides what the thread may do.
    OwnThread(Kind),
}

/// All that a started device may touch.
pub struct Activation {
    pub memory: GuestMemoryMmap,
    /// Features the driver accepted: a subset of those offered.
    pub features: u64,
    /// The first of [`Device::queue_sizes`], as many as [`Device::queues_with`] says, all ready.
    pub queues: Vec<LiveQueue>,
    pub interrupt: Interrupt,
}

/// A started device. Dropping it ends all it does; what it holds of the host is closed.
pub trait Worker: Send {
    /// Readable when there is work: a queue's kick, or an epoll over several descriptors.
    fn fd(&self) -> RawFd;

    /// Does the work there is without blocking longer than one request takes.
    ///
    /// # Errors
    /// An error costs the device, never the process: the worker is dropped and the driver told to reset.
    fn run(&mut self) -> Result<(), DeviceError>;
}

/// Why a device stopped working; `DEVICE_NEEDS_RESET` for the guest, one line in the log.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("Guest built a descriptor chain the device cannot use: {0}")]
    BadChain(&'static str),
    #[error("Guest corrupted a virtqueue")]
    Queue(#[source] virtio_queue::Error),
    #[error("Guest memory cannot be accessed where a queue points")]
    Memory(#[source] vm_memory::GuestMemoryError),
    #[error("Host resource of the device failed")]
    Host(#[source] std::io::Error),
}

impl fmt::Debug for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Activation").field("queues", &self.queues.len()).finish_non_exhaustive()
    }
}
