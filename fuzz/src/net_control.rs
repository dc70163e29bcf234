//! The network device's control queue alone: over vhost-net, its other queues are the host's kernel's.

use std::io;
use std::os::fd::RawFd;

use krx_vmm::virtio::device::{Activation, Device, DeviceError, DeviceKind, Worker};
use krx_vmm::virtio::net::control;
use krx_vmm::virtio::queue::LiveQueue;

/// Pairs of queues that there are; the last cannot be used.
const PAIRS: usize = 4;

pub(crate) struct Control;

struct ControlWorker(LiveQueue);

impl Device for Control {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Worker>, DeviceError> {
        Ok(Box::new(ControlWorker(activation.queues.remove(0))))
    }
}

impl Worker for ControlWorker {
    fn fd(&self) -> RawFd {
        self.0.kick_fd()
    }

    fn run(&mut self) -> Result<(), DeviceError> {
        control::serve(&mut self.0, PAIRS, |pairs| {
            assert!((1..=PAIRS).contains(&pairs));
            if pairs == PAIRS { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
        })
    }
}
