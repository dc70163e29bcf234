//! What a user namespace changes in the plan of a container: which of its file systems and kernel parameters are out of
//! its reach, and who its device nodes belong to. Pure; `outside` does what follows from it.

use krx_proto::{AgentError, BadMap, Device, DeviceKind, UserNamespace, guest_id, validate_container_map};
use nix::sched::CloneFlags;

use crate::container::MountKind;
use crate::error::invalid;
use crate::rootfs::DEVICES;

/// Kernel parameters of an IPC namespace (`ipc_namespaces(7)`), by what they begin with.
const OF_IPC: [&str; 5] = ["fs/mqueue/", "kernel/msg", "kernel/sem", "kernel/shm", "kernel/auto_msgmni"];

pub(crate) fn checked(namespace: UserNamespace) -> Result<UserNamespace, AgentError> {
    for (name, map) in [("uids", &namespace.uids), ("gids", &namespace.gids)] {
        validate_container_map(map).map_err(|bad| bad_map(&format!("user_namespace.{name}"), &bad))?;
    }
    Ok(namespace)
}

pub(crate) fn bad_map(field: &str, bad: &BadMap) -> AgentError {
    let index = bad.index.map(|index| format!("[{index}]")).unwrap_or_default();
    invalid(format_args!("{field}{index}: {}", bad.what))
}

/// All nodes of the container's `/dev`, with the guest's IDs: those it asks for, and the usual ones.
pub(crate) fn nodes(wanted: &[Device], namespace: &UserNamespace) -> Result<Vec<Device>, AgentError> {
    let usual = DEVICES.iter().filter_map(|(name, major, minor)| {
        let (major, minor) = (u32::try_from(*major).ok()?, u32::try_from(*minor).ok()?);
        let (path, kind) = (format!("/dev/{name}"), DeviceKind::Char);
        Some(Device { path, kind, major, minor, mode: 0o666, uid: 0, gid: 0 })
    });
    let usual = usual.filter(|usual| wanted.iter().all(|device| device.path != usual.path));
    let ours = |device: Device| {
        let id = |map: &[_], id: u32| {
            let missing =
                || invalid(format_args!("devices: the owner {id} of {} is not mapped", device.path));
            guest_id(map, id).ok_or_else(missing)
        };
        let (uid, gid) = (id(&namespace.uids, device.uid)?, id(&namespace.gids, device.gid)?);
        Ok(Device { uid, gid, ..device })
    };
    wanted.iter().cloned().chain(usual).map(ours).collect()
}

/// Whether a file system shows a namespace that is the guest's, in a container whose user namespace is not.
pub(crate) fn is_the_guest_s(what: &MountKind, own: CloneFlags) -> bool {
    let MountKind::FileSystem { kind, .. } = what else { return false };
    let shown = match kind.to_bytes() {
        b"proc" => CloneFlags::CLONE_NEWPID,
        b"sysfs" => CloneFlags::CLONE_NEWNET,
        b"mqueue" => CloneFlags::CLONE_NEWIPC,
        b"cgroup2" => CloneFlags::CLONE_NEWCGROUP,
        _ => return false,
    };
    own.contains(CloneFlags::CLONE_NEWUSER) && !own.contains(shown)
}

/// Whether a kernel parameter is one that the container's own root may set, and only that.
pub(crate) fn is_own_parameter(path: &str, own: CloneFlags) -> bool {
    let begins = |begins: &[&str]| begins.iter().any(|begin| path.starts_with(begin));
    own.contains(CloneFlags::CLONE_NEWIPC) && begins(&OF_IPC)
        || own.contains(CloneFlags::CLONE_NEWNET) && begins(&["net/"])
}

#[cfg(test)]
mod tests {
    use super::*;
    use krx_proto::IdMapping;

    fn namespace() -> UserNamespace {
        let map = |guest: u32| vec![IdMapping { container: 0, guest, size: 10 }];
        UserNamespace { uids: map(1000), gids: map(2000) }
    }

    #[test]
    fn bad_maps_are_named() {
        let mut bad = namespace();
        bad.gids[0].size = 0;
        assert!(checked(bad.clone()).unwrap_err().message.starts_with("user_namespace.gids[0]: "));
        bad.uids.clear();
        assert!(checked(bad).unwrap_err().message.starts_with("user_namespace.uids: "));
        assert!(checked(namespace()).is_ok());
    }

    #[test]
    fn nodes_belong_to_the_container_s_users() {
        let device = |path: &str, uid: u32| Device {
            path: path.into(),
            kind: DeviceKind::Char,
            major: 1,
            minor: 3,
            mode: 0o640,
            uid,
            gid: 9,
        };
        let all = nodes(&[device("/dev/null", 7)], &namespace()).unwrap();
        assert_eq!(all.len(), DEVICES.len());
        assert_eq!((all[0].uid, all[0].gid, all[0].mode), (1007, 2009, 0o640));
        assert_eq!((all[1].path.as_str(), all[1].uid, all[1].gid), ("/dev/zero", 1000, 2000));
        let error = nodes(&[device("/dev/x", 10)], &namespace()).unwrap_err().message;
        assert!(error.contains("/dev/x") && error.contains("10"), "{error}");
    }

    #[test]
    fn what_shows_the_guest_is_not_the_container_s_to_mount() {
        let shows = |kind: &std::ffi::CStr, own: CloneFlags| {
            let what = MountKind::FileSystem { kind: kind.into(), parameters: Vec::new() };
            is_the_guest_s(&what, own)
        };
        let user = CloneFlags::CLONE_NEWUSER;
        assert!(shows(c"sysfs", user) && shows(c"proc", user) && shows(c"cgroup2", user));
        assert!(!shows(c"sysfs", user | CloneFlags::CLONE_NEWNET) && !shows(c"tmpfs", user));
        assert!(!shows(c"sysfs", CloneFlags::empty()));
        let own = user | CloneFlags::CLONE_NEWIPC;
        assert!(is_own_parameter("kernel/shmmax", own) && is_own_parameter("fs/mqueue/msg_max", own));
        assert!(!is_own_parameter("kernel/shmmax", user) && !is_own_parameter("net/ipv4/ip_forward", own));
        assert!(!is_own_parameter("kernel/domainname", own));
    }
}
