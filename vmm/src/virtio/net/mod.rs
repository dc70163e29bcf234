//! The network device (virtio 1.2, 5.1): frames between the guest and a tap of the host. See `docs/network.md`.
//!
//! ```text
//!  transmit queue ─▶ transmit ─▶ header (judged) ─▶ tap
//!  receive queue  ◀─ receive  ◀──────────────────── tap
//! ```
//!
//! [`Net`] is the device at rest: a tap, an address and an MTU. At work it is `worker`, in user space, as above; or
//! [`vhost`], with the host's kernel in the middle. The device makes no interface, sets no
//! address and filters nothing: the tap's owner does. There is one pair of queues and no control queue.

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
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
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

/// `struct virtio_net_config` up to the MTU. `max_virtqueue_pairs`, before that, is 0: it means nothing without
/// `VIRTIO_NET_F_MQ`.
const CONFIG_SIZE: usize = 12;
const STATUS_AT: usize = 6;
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
    vhost: Option<Arc<Vhost>>,
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
            let ValidInterface { tap_fd, mac, mtu } = *interface;
            let fd = sys::adopt(tap_fd).map_err(|error| NetError::NotInherited(tap_fd, error))?;
            Self::over_tap(fd, mac, mtu).map_err(|error| NetError::Tap(tap_fd, error))
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
        Self { tap: Arc::new(tap), vhost: None, config, mtu }
    }

    /// Has the host's kernel move the frames, of the guest whose memory `vhost` was opened for. Not over a socket.
    pub fn set_vhost(&mut self, vhost: Vhost) {
        self.vhost = Some(Arc::new(vhost));
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
        FEATURES.into_iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
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
        Placement::OwnThread(if self.vhost.is_some() { Kind::VhostNetwork } else { Kind::Network })
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, DeviceError> {
        let offloads = Offloads::of_guest(activation.features);
        self.tap.set_offloads(offloads).map_err(DeviceError::Host)?;
        Ok(match &self.vhost {
            Some(vhost) => Box::new(VhostWorker::new(Arc::clone(vhost), Arc::clone(&self.tap), activation)?),
            None => Box::new(self.start(offloads, activation)?),
        })
    }
}
