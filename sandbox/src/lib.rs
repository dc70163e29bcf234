//! One pod's micro-VM seen from the host.
//!
//! A [`container::Container`] says what shall run, from a bare root file system or an OCI [`bundle`]. A [`pod::Pod`]
//! makes the VM for such, within the node's [`settings`], the files of later ones being put into its [`share`]: it takes a
//! name ([`state_dir`]), finds what to boot ([`artifacts`]), spawns the VMM ([`vmm_process`]) with the interfaces of its
//! [`network`], and talks to the agent in the guest ([`agent`]). Its verbs are create, start, exec, kill, delete and wait; a
//! [`process::Process`] is what they act on, and [`streams`] carry its bytes. Those whose owner nobody sees are [`detached`]. The volumes that the kubelet changes
//! meanwhile are [`live_volumes`].
//!
//! Knows neither command lines nor containerd, and nothing of how a VM works inside.

#![deny(unsafe_code)]

pub mod agent;
pub mod artifacts;
pub mod bundle;
pub mod capability;
pub mod cgroup_child;
mod clock;
pub mod container;
pub mod control;
pub mod default_spec;
pub mod detached;
pub mod disks;
pub mod exec_limits;
mod image_file;
pub mod live_volumes;
mod mount_points;
pub mod network;
mod other_process;
mod plain_file;
pub mod pod;
pub mod pod_containers;
pub mod port_forward;
pub mod preflight;
pub mod process;
pub mod settings;
pub mod share;
pub mod state_dir;
pub mod streams;
mod sys;
#[cfg(test)]
mod testing;
pub mod timings;
pub mod user;
pub mod vmm_process;
pub mod volume;
