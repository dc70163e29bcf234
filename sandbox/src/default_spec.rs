//! The container that is made of a bare root file system, where no bundle says otherwise: what docker would make of
//! it, with `no_new_privileges` on top. Pure.
//!
//! The VM is the container's network namespace: nothing else runs in it, so none is made inside.

use krx_proto::{Capabilities, ContainerSpec, Mount, Namespace, ProcessSpec, Rlimit};

use crate::capability;

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// `RLIMIT_NOFILE` of the Linux x86-64 ABI.
const RLIMIT_NOFILE: u32 = 7;

/// Longest host name: `HOST_NAME_MAX` of Linux.
pub const MAX_HOSTNAME: usize = 64;

/// Destination, type, source and options of each default mount.
const MOUNTS: [(&str, &str, &str, &[&str]); 7] = [
    ("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
    ("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
    (
        "/dev/pts",
        "devpts",
        "devpts",
        &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
    ),
    ("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
    ("/sys/fs/cgroup", "cgroup2", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
    ("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
];

/// Files of the kernel that tell or do more than a container needs.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// A container named `name`; its program is still to be said.
#[must_use]
pub fn container(name: &str) -> ContainerSpec {
    ContainerSpec {
        id: name.into(),
        hostname: Some(hostname(name).into()),
        namespaces: vec![Namespace::Pid, Namespace::Ipc, Namespace::Uts, Namespace::Cgroup],
        mounts: MOUNTS.iter().map(mount).collect(),
        masked_paths: MASKED.map(String::from).into(),
        readonly_paths: READ_ONLY.map(String::from).into(),
        process: process(),
        ..ContainerSpec::default()
    }
}

/// The pod's name as a host name: as much of it as that may be.
fn hostname(name: &str) -> &str {
    name.get(..MAX_HOSTNAME).unwrap_or(name)
}

fn mount((destination, kind, source, options): &(&str, &str, &str, &[&str])) -> Mount {
    Mount {
        destination: (*destination).into(),
        kind: (*kind).into(),
        source: (*source).into(),
        options: options.iter().map(ToString::to_string).collect(),
        id_map: None,
    }
}

fn process() -> ProcessSpec {
    let mask = capability::mask(&capability::DEFAULT);
    ProcessSpec {
        env: vec![PATH.into()],
        cwd: "/".into(),
        capabilities: Some(Capabilities {
            bounding: mask,
            effective: mask,
            permitted: mask,
            inheritable: 0,
            ambient: 0,
        }),
        // The soft limit that select(2) can live with, and a hard one that servers raise it to.
        rlimits: vec![Rlimit { resource: RLIMIT_NOFILE, soft: 1024, hard: 524_288 }],
        no_new_privileges: true,
        ..ProcessSpec::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mount hides what was mounted below its destination before.
    #[test]
    fn no_mount_hides_one_before_it() {
        let mounts = container("c").mounts;
        for (index, mount) in mounts.iter().enumerate() {
            let below = format!("{}/", mount.destination);
            assert!(!mounts[..index].iter().any(|before| before.destination.starts_with(&below)));
        }
    }

    #[test]
    fn default_container_is_confined() {
        let spec = container("c");
        let capabilities = spec.process.capabilities.unwrap();
        assert_eq!(capabilities.bounding, capabilities.effective);
        assert_eq!((capabilities.inheritable, capabilities.ambient), (0, 0));
        assert!(spec.process.no_new_privileges);
        assert!(spec.masked_paths.contains(&"/proc/kcore".into()));
    }
}
