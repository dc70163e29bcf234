//! The virtual machine monitor of krx: boots one stripped Linux kernel in one micro-VM.
//!
//! The way of a start, by file: `main.rs` reads a [`config`] and enters the [`jail`] with the [`share`]; [`machine`] is the recipe:
//! [`memory`], [`kvm`], the kernel and the boot tables ([`arch`]), devices into [`slots`] ([`virtio`],
//! [`devices`], with [`wires`] to KVM), vCPUs. From then on vCPU threads reach devices through the [`bus`], and the [`event_loop`] runs
//! what waits for descriptors, [`control`] requests included ([`host_socket`] has the sockets; [`disks`] come and go by them). [`phase`] notes when
//! each step was done; [`klog`] reads the guest kernel's log out of its memory when a guest ends badly.
//!
//! The VMM knows nothing of containers. The guest is hostile: each number it gives is checked where it is used.

#![deny(unsafe_code)]

pub mod arch;
pub mod bus;
pub mod config;
pub mod control;
pub mod devices;
pub mod disks;
pub mod event_loop;
pub mod exit_code;
pub mod host_socket;
pub mod jail;
pub mod klog;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod phase;
pub mod report;
pub mod share;
mod slots;
pub mod sys;
#[cfg(test)]
mod testing;
pub mod virtio;
pub mod wires;
