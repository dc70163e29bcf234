//! Virtio devices over MMIO (virtio 1.2, modern only).
//!
//! [`device`] says what a device is, [`queue`] and [`irq`] are what it works with, `mmio` is the transport over [`registers`]; each
//! device has a file or folder of its own and knows none of the others.

pub mod block;
pub mod device;
pub mod fs;
pub mod irq;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod registers;
pub mod rng;
pub mod vsock;

#[cfg(test)]
mod properties;
