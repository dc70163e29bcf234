//! The vsock device (virtio 1.2, 5.10): stream connections between the guest and unix sockets of the host, wholly in
//! user space. See `docs/vsock.md` for what the host sees of it.
//!
//! ```text
//!  transmit queue ─▶ rings ─▶ packet ─▶ connections ─▶ channel ─▶ unix socket
//!  receive queue  ◀─ rings ◀──────────── connections ◀─ channel ◀─ unix socket
//!                                          connection (states), credit, backlog, handshake: no I/O
//! ```
//!
//! [`Vsock`] is the device at rest: it listens from the start, so that a host client may connect while the guest boots
//! and is served once it can be. `worker` is the device at work. Datagrams, seqpacket sockets and connections between
//! guests do not exist here.

mod backlog;
mod channel;
mod connection;
mod connections;
mod credit;
mod handshake;
mod packet;
mod rings;
mod service;
mod worker;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;

use self::worker::VsockWorker;
use super::device::{Activation, Device, DeviceError, DeviceKind, Worker};
use crate::host_socket::{BindError, Listener};

/// Receive, transmit and event queue. Linux lends a page for each place in the receive queue from boot on, so a longer
/// one is memory that every idle guest pays for; 128 hold what a connection may have in flight (256 KiB) and more.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
/// Carries "transport reset" after a migration (virtio 1.2, 5.10.6.7) and nothing else: buffers put there only lie.
const EVENT_QUEUE: u32 = 2;

/// The vsock device of one guest.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    listener: Arc<Listener>,
}

impl Vsock {
    /// A device for the guest with `guest_cid`, reached over the unix socket `path`.
    ///
    /// # Errors
    /// The path cannot be listened on, or is another's.
    pub fn new(guest_cid: u32, path: PathBuf) -> Result<Self, BindError> {
        let listener = Arc::new(Listener::bind(path)?);
        Ok(Self { guest_cid: u64::from(guest_cid), listener })
    }
}

impl Device for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn hears(&self, queue: u32) -> bool {
        queue != EVENT_QUEUE
    }

    /// `struct virtio_vsock_config`: the guest's CID.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.guest_cid.to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
        let count = data.len().min(config.len() - start);
        data.fill(0);
        data[..count].copy_from_slice(&config[start..start + count]);
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, DeviceError> {
        Ok(Box::new(VsockWorker::new(self.guest_cid, Arc::clone(&self.listener), activation)?))
    }
}
