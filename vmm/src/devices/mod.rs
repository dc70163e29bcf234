//! Devices that are not virtio: the ports a PC has, or that krx adds, at fixed addresses.

pub mod power;
pub mod serial;
