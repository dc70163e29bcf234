//! What a container is, as the guest needs to know it: the part of an OCI runtime configuration that a micro-VM
//! honours, already checked by the host. The agent checks again what would hurt it.

use serde::{Deserialize, Serialize};

use crate::devices::{Device, DeviceRule};
use crate::disks::Disk;
use crate::hooks::Hooks;
use crate::resources::Resources;
use crate::user_namespace::{MountIdMap, UserNamespace};

/// One container. Paths are paths in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Names it in all further requests; see [`validate_id`].
    pub id: String,
    /// Root file system: a directory of the guest, normally below [`SHARE_PATH`](crate::SHARE_PATH).
    pub rootfs: String,
    pub root_readonly: bool,
    /// Set in the container's UTS namespace; in the guest's, for the whole pod, where it has none of its own.
    pub hostname: Option<String>,
    /// NIS domain name, set as the host name is (`setdomainname(2)`).
    pub domainname: Option<String>,
    /// New namespaces the container gets; the others are the guest's. A mount namespace is always new.
    pub namespaces: Vec<Namespace>,
    /// A new user namespace; IDs elsewhere in this description are then the container's.
    pub user_namespace: Option<Box<UserNamespace>>,
    /// Of the clocks in its time namespace, which it then has to have.
    pub time_offsets: Vec<TimeOffset>,
    /// In order of mounting.
    pub mounts: Vec<Mount>,
    /// Hidden from the container: files by `/dev/null`, directories by an empty read-only tmpfs.
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
    /// Kernel parameters, e.g. `net.ipv4.ip_forward` = `1`.
    pub sysctls: Vec<(String, String)>,
    pub resources: Resources,
    /// Beside the nodes that every container has; below `/dev`.
    pub devices: Vec<Device>,
    pub device_rules: Vec<DeviceRule>,
    /// To be let go of by [`Request::ReleaseDisk`](crate::Request::ReleaseDisk), whether the container can be made or not.
    pub disks: Vec<Disk>,
    pub hooks: Option<Box<Hooks>>,
    /// The first process.
    pub process: ProcessSpec,
}

/// One mount, in OCI's own terms; two kinds are krx's:
///
/// * [`MOUNT_SHM`]: the tmpfs that all containers of the pod have in common, for `/dev/shm`. An option `size=`, of the
///   first such mount of the pod, is its size.
/// * [`MOUNT_LIVE`]: a volume of files that the host replaces while the container runs, by way of a `..data` link as
///   the kubelet does. The container sees a copy of it, which is brought up to date by
///   [`Request::Refresh`](crate::Request::Refresh).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute path in the container.
    pub destination: String,
    /// File system type; `bind` for bind mounts.
    pub kind: String,
    /// Device, or for bind mounts and live volumes a path of the guest.
    pub source: String,
    /// Options as in `config.json`: flags by name (`ro`, `nosuid`, ...), the rest is the file system's data.
    pub options: Vec<String>,
    /// Of what is bound alone.
    pub id_map: Option<Box<MountIdMap>>,
}

/// Kind of a mount of the pod's shared memory.
pub const MOUNT_SHM: &str = "shm";
/// Kind of a mount of a live volume.
pub const MOUNT_LIVE: &str = "live";

/// Namespaces a container can have of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Namespace {
    Pid,
    Ipc,
    Uts,
    Network,
    Cgroup,
    /// Entered by the exec.
    Time,
}

/// How far a clock of a time namespace is ahead of the guest's (`time_namespaces(7)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeOffset {
    /// `CLOCK_MONOTONIC` or `CLOCK_BOOTTIME`.
    pub clock: u32,
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// One process of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// Program and arguments; a name without a slash is looked up in the container's `PATH`.
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    pub cwd: String,
    pub user: User,
    /// `None` leaves the agent's own (all).
    pub capabilities: Option<Capabilities>,
    pub rlimits: Vec<Rlimit>,
    pub no_new_privileges: bool,
    pub oom_score_adj: Option<i32>,
    /// A terminal of this size instead of three streams.
    pub terminal: Option<TerminalSize>,
    /// Whether a standard input will be attached; without it the process reads `/dev/null`.
    pub stdin: bool,
    /// Decides on each system call from just before the exec on.
    pub seccomp: Option<SeccompFilter>,
    /// What it keeps unless told otherwise is that of the agent: the usual ones.
    #[serde(default)]
    pub scheduling: Scheduling,
}

/// When and as what a process is run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    pub policy: Option<SchedulingPolicy>,
    /// As `ioprio_set(2)` takes it: the class shifted by 13 bits, and the priority.
    pub io_priority: Option<u16>,
    /// CPUs of the guest, bit n for CPU n.
    pub cpus: Option<u64>,
    /// As `personality(2)` takes it.
    pub personality: Option<u32>,
}

/// `struct sched_attr` of `sched_setattr(2)`. Times are nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SchedulingPolicy {
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// Longest program of a filter, the kernel's own limit (`BPF_MAXINSNS`).
pub const MAX_SECCOMP: usize = 4096;

/// A program of classic BPF, and the flags it is installed with (`SECCOMP_FILTER_FLAG_*`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompFilter {
    pub flags: u32,
    pub program: Vec<SeccompInstruction>,
}

/// `struct sock_filter` of `linux/filter.h`. A branch names how many instructions are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompInstruction {
    pub code: u16,
    pub if_true: u8,
    pub if_false: u8,
    pub value: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
    pub umask: Option<u32>,
}

/// Capability sets as bit masks: bit n is the capability of that number in `linux/capability.h`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    pub bounding: u64,
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
    pub ambient: u64,
}

/// `resource` is the number of `RLIMIT_*` in the Linux x86-64 ABI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    pub resource: u32,
    pub soft: u64,
    pub hard: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    pub columns: u16,
    pub rows: u16,
}

/// Whether `id` may name a pod, container or process: 1 to 76 of `[A-Za-z0-9_.-]`, not starting with a dot or
/// dash. It becomes a file name on the host and a cgroup name in the guest, so nothing else is let through.
#[must_use]
pub fn validate_id(id: &str) -> bool {
    const MAX_ID: usize = 76;
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    (1..=MAX_ID).contains(&id.len()) && !id.starts_with(['.', '-']) && id.bytes().all(allowed)
}

/// Whether the link `..data` of a live volume may lead to `name`: one step, hidden from the volume's readers, and not a
/// name of the link itself.
#[must_use]
pub fn validate_live_target(name: &str) -> bool {
    const MAX_NAME: usize = 255;
    let is_one = name.len() <= MAX_NAME && !name.contains(['/', '\0']);
    is_one && name.len() > 2 && name.starts_with("..") && !name.starts_with("..data")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_could_leave_their_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "-rf", "a\0b", "a b", "\u{e4}", &"x".repeat(77)] {
            assert!(!validate_id(bad), "{bad:?}");
        }
        assert!(validate_id("web-1_a.b"));
    }

    #[test]
    fn targets_that_could_leave_their_volume_are_refused() {
        for bad in ["", ".", "..", "x", ".x", "../x", "..x/y", "..data", "..data_tmp", "..\0", "/..x"] {
            assert!(!validate_live_target(bad), "{bad:?}");
        }
        assert!(!validate_live_target(&format!("..{}", "x".repeat(254))));
        assert!(validate_live_target("..2026_11_24_23_15_28.123456789") && validate_live_target("..x"));
    }
}
