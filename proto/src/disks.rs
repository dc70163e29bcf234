//! Disks of a guest: block devices (virtio 1.2, 5.2) that the VMM has put into virtio-mmio slots for a container.

use serde::{Deserialize, Serialize};

use crate::devices::DeviceAccess;

/// Most disks of a container.
pub const MAX_DISKS: usize = 16;

/// One disk, and what it is to the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Number of the slot. It names the disk.
    pub slot: u32,
    /// Guest-physical address of the slot's registers, which take 4 KiB.
    pub address: u64,
    pub irq: u32,
    pub is: DiskUse,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskUse {
    /// Has the file system that is the container's root, in place of [`ContainerSpec::rootfs`](crate::ContainerSpec::rootfs).
    Root {
        /// Type of the file system.
        kind: String,
        /// As those of a [`Mount`](crate::Mount).
        options: Vec<String>,
    },
    /// A device node of the container.
    Node {
        /// Below `/dev`.
        path: String,
        /// Permission bits.
        mode: u32,
        uid: u32,
        gid: u32,
        /// What the container may do with it, beside what its rules say.
        access: DeviceAccess,
    },
}

impl DiskUse {
    /// Path of the device node that it is.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        match self {
            Self::Root { .. } => None,
            Self::Node { path, .. } => Some(path),
        }
    }
}
