//! The network device (virtio 1.2, 5.1): frames between the guest and a tap of the host. See `docs/network.md`.
//!
//! ```text
//!  transmit queue ─▶ transmit ─▶ header (judged) ─▶ tap
//!  receive queue  ◀─ receive  ◀──────────────────── tap
//! ```
//!
//! [`Net`] is the device at rest: a tap, an address and an MTU. At work it is `worker`, in user space, as above; or
//! [`vhost`], with the host's kernel in the middle. The device makes no interface, sets no
//! address and filters nothing: the tap's owner does. There is one pair of queues; over vhost there may be more, and then a
//! [`control`] queue.

pub mod control;
mod header;
mod receive;
mod tap;
mod transmit;
pub mod vhost;
mod worker;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use self::header::Offloads;
use self::receive::Shape;
use self::tap::Tap;
pub use self::tap::TapError;
use self::vhost::{Vhost, VhostWorker};
use self::worker::NetWorker;
use super::device::{Activation, Device, DeviceError, DeviceKind, Placement, Worker};
use crate::config::interface::{Mac, Mtu, ValidInterface};
use crate::jail::seccomp::Kind;
use crate::sys;

/// Receive and transmit. Linux lends buffers of 1.5 KiB, and a frame to be segmented takes up to 43 of them: 256 hold
/// some of these under way, for 384 KiB of the guest's memory.
const QUEUE_SIZES: [u16; 2] = [256, 256];
const CONTROL_SIZE: u16 = 16;

/// `struct virtio_net_config` up to the MTU.
const CONFIG_SIZE: usize = 12;
const STATUS_AT: usize = 6;
const PAIRS_AT: usize = 8;
const MTU_AT: usize = 10;

/// No UFO: the kernel emulates it, slowly. No ECN: it would spare a rare segment.
const FEATURES: [u32; 10] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
];

/// Offered where there are several pairs.
const MULTI_QUEUE: [u32; 2] = [VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ];

/// Why a device cannot be made from what was inherited.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("tap_fd {0} is not an open descriptor that was inherited")]
    NotInherited(RawFd, #[source] io::Error),
    #[error("tap_fd {0} cannot be used")]
    Tap(RawFd, #[source] TapError),
}

/// One network interface of the guest.
#[derive(Debug)]
pub struct Net {
    tap: Arc<Tap>,
    /// The tap's further queues, not used but over vhost.
    more: Vec<Arc<Tap>>,
    /// One for each pair of queues.
    vhost: Vec<Arc<Vhost>>,
    queue_sizes: Vec<u16>,
    config: [u8; CONFIG_SIZE],
    mtu: Mtu,
}

impl Net {
    /// The devices for `interfaces`, over the taps that this process was started with. To be called before anything is
    /// opened that could get the number of a descriptor that was not passed.
    ///
    /// # Errors
    /// A number that is not open, or not of a tap as the owner has to open it.
    pub fn inherit(interfaces: &[ValidInterface]) -> Result<Vec<Self>, NetError> {
        let inherit = |interface: &ValidInterface| {
            let ValidInterface { tap_fd, queue_fds, mac, mtu } = interface;
            let adopt = |fd: RawFd| sys::adopt(fd).map_err(|error| NetError::NotInherited(fd, error));
            let mut net =
                Self::over_tap(adopt(*tap_fd)?, *mac, *mtu).map_err(|error| NetError::Tap(*tap_fd, error))?;
            for fd in queue_fds {
                net.add_queue(adopt(*fd)?).map_err(|error| NetError::Tap(*fd, error))?;
            }
            Ok(net)
        };
        interfaces.iter().map(inherit).collect()
    }

    /// A device over a tap that was opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    ///
    /// # Errors
    /// It is no such tap.
    pub fn over_tap(fd: OwnedFd, mac: Mac, mtu: Mtu) -> Result<Self, TapError> {
        Ok(Self::new(Tap::attached(fd)?, mac, mtu))
    }

    /// A device over a socket that keeps frames apart, each with a header of virtio 1 before it. It is not told of
    /// offloads.
    ///
    /// # Errors
    /// It cannot be made non-blocking.
    pub fn over_socket(fd: OwnedFd, mac: Mac, mtu: Mtu) -> Result<Self, TapError> {
        Ok(Self::new(Tap::socket(fd)?, mac, mtu))
    }

    fn new(tap: Tap, mac: Mac, mtu: Mtu) -> Self {
        let mut config = [0; CONFIG_SIZE];
        config[..STATUS_AT].copy_from_slice(&mac.bytes());
        // Up whatever the tap is: the frames of a link that is down are lost, as on a wire that leads nowhere.
        #[expect(clippy::cast_possible_truncation, reason = "1")]
        let status = VIRTIO_NET_S_LINK_UP as u16;
        config[STATUS_AT..STATUS_AT + 2].copy_from_slice(&status.to_le_bytes());
        config[MTU_AT..].copy_from_slice(&mtu.get().to_le_bytes());
        let (tap, queue_sizes) = (Arc::new(tap), QUEUE_SIZES.to_vec());
        Self { tap, more: Vec::new(), vhost: Vec::new(), queue_sizes, config, mtu }
    }

    /// Adds another descriptor of the device's tap, opened with `IFF_MULTI_QUEUE`, for a pair of queues. The tap does without
    /// it until a driver asks for the pair.
    ///
    /// # Errors
    /// It is no such tap.
    pub fn add_queue(&mut self, fd: OwnedFd) -> Result<(), TapError> {
        let tap = Tap::attached(fd)?;
        tap.set_used(false).map_err(TapError::Setup)?;
        self.more.push(Arc::new(tap));
        Ok(())
    }

    /// Pairs of queues that the device could have.
    #[must_use]
    pub fn pairs(&self) -> usize {
        1 + self.more.len()
    }

    /// Has the host's kernel move the frames, of the guest whose memory `vhost` was opened for: each of it those of a pair of
    /// queues. Not over a socket.
    pub fn set_vhost(&mut self, vhost: impl IntoIterator<Item = Vhost>) {
        self.vhost = vhost.into_iter().take(self.pairs()).map(Arc::new).collect();
        let pairs = self.vhost.len();
        self.queue_sizes = QUEUE_SIZES.repeat(pairs.max(1));
        if pairs > 1 {
            self.queue_sizes.push(CONTROL_SIZE);
            let pairs = u16::try_from(pairs).unwrap_or(u16::MAX);
            self.config[PAIRS_AT..PAIRS_AT + 2].copy_from_slice(&pairs.to_le_bytes());
        }
    }

    fn start(&self, offloads: Offloads, activation: Activation) -> Result<NetWorker, DeviceError> {
        let shape = Shape {
            mergeable: activation.features >> VIRTIO_NET_F_MRG_RXBUF & 1 == 1,
            checksum: offloads.checksum,
            segments: offloads.segments(),
            mtu: self.mtu.get(),
        };
        NetWorker::new(Arc::clone(&self.tap), shape, activation)
    }
}

impl Device for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        let more: &[u32] = if self.vhost.len() > 1 { &MULTI_QUEUE } else { &[] };
        FEATURES.iter().chain(more).fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// The control queue is the last one: behind all pairs, or behind the only one (virtio 1.2, 5.1.2).
    fn queues_with(&self, features: u64) -> usize {
        match MULTI_QUEUE.map(|bit| features >> bit & 1 == 1) {
            [true, _] => self.queue_sizes.len(),
            [false, true] => QUEUE_SIZES.len() + 1,
            [false, false] => QUEUE_SIZES.len(),
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(CONFIG_SIZE);
        let count = data.len().min(CONFIG_SIZE - start);
        data[..count].copy_from_slice(&self.config[start..start + count]);
    }

    /// A write runs the host's network stack, as far as the socket at the other end: on the event loop, a pod's traffic
    /// would hold up its own streams and control, and they it. An idle interface costs a thread that sleeps; over vhost
    /// that is the one that may deal with it.
    fn placement(&self) -> Placement {
        Placement::OwnThread(if self.vhost.is_empty() { Kind::Network } else { Kind::VhostNetwork })
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, DeviceError> {
        let offloads = Offloads::of_guest(activation.features);
        self.tap.set_offloads(offloads).map_err(DeviceError::Host)?;
        if self.vhost.is_empty() {
            return Ok(Box::new(self.start(offloads, activation)?));
        }
        let taps = std::iter::once(&self.tap).chain(&self.more).cloned();
        let pairs = self.vhost.iter().cloned().zip(taps).collect();
        Ok(Box::new(VhostWorker::new(pairs, activation)?))
    }
}
