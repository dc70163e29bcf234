//! Linux capabilities by name, as the bit masks the agent sets. Pure.

use oci_spec::runtime::Capability;

/// What a container's processes can do unless told otherwise: the set docker has used since its beginnings. It lets
/// package managers and servers work and gives no power over the guest's kernel.
pub const DEFAULT: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::SysChroot,
    Capability::Mknod,
    Capability::AuditWrite,
    Capability::Setfcap,
];

/// The mask with one bit a capability.
pub fn mask<'a>(capabilities: impl IntoIterator<Item = &'a Capability>) -> u64 {
    capabilities.into_iter().fold(0, |mask, capability| mask | 1 << number(*capability))
}

/// All there are.
#[must_use]
pub fn all() -> u64 {
    (1 << (number(Capability::CheckpointRestore) + 1)) - 1
}

/// The mask of the capability of that name, in any case, with or without `CAP_`.
#[must_use]
pub fn named(name: &str) -> Option<u64> {
    let name = name.to_ascii_uppercase();
    let name = if name.starts_with("CAP_") { name } else { format!("CAP_{name}") };
    serde_json::from_value::<Capability>(name.into()).ok().map(|capability| 1 << number(capability))
}

/// Its number in `linux/capability.h`.
fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_set_is_docker_s() {
        assert_eq!(mask(&DEFAULT), 0x0000_0000_a804_25fb);
    }

    #[test]
    fn names_are_those_of_the_manual() {
        assert_eq!(named("net_raw"), Some(1 << 13));
        assert_eq!(named("CAP_CHECKPOINT_RESTORE"), Some(1 << 40));
        assert_eq!(named("Cap_Chown"), Some(1));
        assert_eq!((named(""), named("CAP_"), named("root")), (None, None, None));
        assert_eq!(all(), 0x1ff_ffff_ffff);
    }
}
