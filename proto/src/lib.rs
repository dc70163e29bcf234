//! The one contract between krx on the host and its agent in the guest.
//!
//! Four kinds of vsock connection exist, each on its own port of the guest:
//!
//! * [`port::CONTROL`]: the agent sends one [`Message::Hello`], then the host sends [`Call`]s and the agent
//!   answers each with a [`Message::Reply`] that carries the call's number. A [`Request::Wait`] is answered when
//!   the process ends, so replies may come out of order. At boot the agent itself dials the same port of the
//!   host (CID 2): that connection is the owner's, and its hello means "the guest is ready".
//! * [`port::STREAM`]: the host sends one [`StreamHello`], after it the connection is the raw byte stream of one
//!   of a process's standard streams. Half-closing it is end of file.
//! * [`port::FORWARD`]: the host sends one [`ForwardHello`], the agent answers with one byte, and then the connection
//!   is one to a TCP port of the guest.
//! * [`port::POWER`]: a power button. Connecting to it asks for an orderly power-off; no bytes are exchanged, so
//!   a VMM that knows nothing of this protocol can press it.
//!
//! This crate does no I/O beyond `Read`/`Write` and trusts neither side: every frame has a size cap.

#![forbid(unsafe_code)]

mod devices;
mod disks;
mod forward;
mod frame;
mod hooks;
mod message;
mod network;
mod resources;
mod spec;
mod stats;
mod user_namespace;

pub use devices::{Device, DeviceAccess, DeviceKind, DeviceRule};
pub use disks::{Disk, DiskUse, MAX_DISKS};
/// What a frame can be decoded to.
pub use serde::de::DeserializeOwned;

pub use forward::{FORWARDED, ForwardHello};
pub use frame::{FrameError, MAX_FRAME, decode, encode, read_frame, take_frame, write_frame};
pub use hooks::{HOOKS_SECONDS, Hook, Hooks, MAX_HOOKS};
pub use message::{
    AgentError, Answer, Call, ErrorKind, ExitStatus, GuestInfo, MAX_PIDS, Message, ProcessInfo, ProcessState,
    Request, Stream, StreamHello,
};
pub use network::{
    InterfaceAddress, MAX_NETWORK_ENTRIES, MAX_NETWORK_INTERFACES, Neighbour, NetworkInterface, NetworkSpec,
    Route, RouteKind, validate_interface_name,
};
pub use resources::{CpuMax, Limit, Resources, UNIFIED};
pub use spec::{
    Capabilities, ContainerSpec, MAX_SECCOMP, MOUNT_LIVE, MOUNT_SHM, Mount, Namespace, ProcessSpec, Rlimit,
    Scheduling, SchedulingPolicy, SeccompFilter, SeccompInstruction, TerminalSize, TimeOffset, User,
    validate_id, validate_live_target,
};
pub use stats::{
    CpuStats, GuestMemory, GuestStats, InterfaceStats, IoStats, MemoryEvents, MemoryStats, PidsStats, Stats,
    TrafficStats,
};
pub use user_namespace::{
    BadMap, IdMapping, MAX_ID_MAPPINGS, MountIdMap, UserNamespace, guest_id, id_map, validate_container_map,
    validate_id_mappings,
};

/// Version of the protocol; both sides must agree exactly, as they are shipped together.
pub const VERSION: u16 = 6;

/// Vsock ports of the guest. All are below 2^16 and above the privileged range but one.
pub mod port {
    /// Orderly power-off on connect.
    pub const POWER: u32 = 1023;
    /// Calls and replies.
    pub const CONTROL: u32 = 1024;
    /// Standard streams.
    pub const STREAM: u32 = 1025;
    /// Connections to TCP ports of the guest.
    pub const FORWARD: u32 = 1026;
}

/// x86 I/O ports of the VMM's two pseudo devices; the agent writes one byte to them through `/dev/port`.
pub mod io_port {
    /// Boot mark: the byte names the point reached, see [`mark`](super::mark).
    pub const BOOT_MARK: u16 = 0x510;
    /// Power-off: any byte ends the VM at once; the guest has synced its file systems before.
    pub const POWER_OFF: u16 = 0x511;
}

/// Bytes written to [`io_port::BOOT_MARK`].
pub mod mark {
    /// The agent runs as PID 1: the first thing it does.
    pub const PID1: u8 = 1;
}

/// Tag of the pod's virtio-fs share.
pub const SHARE_TAG: &str = "krx";
/// Where the agent mounts the share in the guest.
pub const SHARE_PATH: &str = "/run/krx/share";
/// CID of every guest: vsock ends in its own VMM, so no two guests can meet.
pub const GUEST_CID: u32 = 3;
