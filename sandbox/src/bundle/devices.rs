//! `linux.devices` and `linux.resources.devices` of a configuration. Pure.
//!
//! A guest has devices of its own: those of the host are refused, and so are rules for them, whose numbers would be
//! others' in the guest. A block device can become a disk of the guest, by virtio-blk.

use krx_proto::{Device, DeviceAccess, DeviceKind, DeviceRule, DiskUse, MAX_DISKS};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::{BundleError, invalid, unsupported};
use crate::disks::{HostDisk, Source};
use crate::volume::destination;

/// Character devices that are the same in every Linux, the guest's included, by major and minor number: null, zero, full,
/// random, urandom, tty, console, ptmx, fuse.
const STANDARD: [(i64, i64); 9] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (10, 229)];
/// Terminals, with any minor number.
const TERMINALS: i64 = 136;
/// `net/tun`: containerd allows it to every container, whether there is one or not.
const TUN: (i64, i64) = (10, 200);
/// More than any list has that was written by a person.
const MAX_LIST: usize = 1024;
/// Greatest numbers that Linux has.
const MAX_MAJOR: i64 = (1 << 12) - 1;
const MAX_MINOR: i64 = (1 << 20) - 1;

/// Device nodes of a container.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Nodes {
    pub(super) devices: Vec<Device>,
    /// Those that are block devices of the host.
    pub(super) disks: Vec<HostDisk>,
}

/// The nodes of a container that may do with devices what `rules` say.
pub(super) fn nodes(wanted: &[LinuxDevice], rules: &[LinuxDeviceCgroup]) -> Result<Nodes, BundleError> {
    if wanted.len() > MAX_LIST {
        return Err(invalid("linux.devices", format!("are more than {MAX_LIST}")));
    }
    let mut nodes = Nodes::default();
    for (index, device) in wanted.iter().enumerate() {
        let field = format!("linux.devices[{index}]");
        let path = device.path().to_str().and_then(destination);
        let path = path.ok_or_else(|| invalid(format!("{field}.path"), "is not an absolute path below /"))?;
        if !path.starts_with("/dev/") {
            return Err(unsupported(format!("{field}.path"), format!("device nodes outside /dev ({path})")));
        }
        match device.typ() {
            LinuxDeviceType::B if nodes.disks.len() == MAX_DISKS => {
                return Err(unsupported(field, format!("more than {MAX_DISKS} block devices")));
            }
            LinuxDeviceType::B => nodes.disks.push(disk(&field, path, device, rules)?),
            _ => nodes.devices.push(node(&field, path, device)?),
        }
    }
    Ok(nodes)
}

/// Permission bits of a node.
fn mode(device: &LinuxDevice) -> u32 {
    device.file_mode().unwrap_or(0o666) & 0o777
}

fn node(field: &str, path: String, device: &LinuxDevice) -> Result<Device, BundleError> {
    let (major, minor) = (device.major(), device.minor());
    let is_char = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
    if !is_char || !STANDARD.contains(&(major, minor)) {
        let kind = device.typ();
        let kind = kind.as_str();
        return Err(unsupported(
            field,
            format!("{path} ({kind} {major}:{minor}), which a guest does not have"),
        ));
    }
    let number = |number: i64| u32::try_from(number).unwrap_or(0);
    Ok(Device {
        path,
        kind: DeviceKind::Char,
        major: number(major),
        minor: number(minor),
        mode: mode(device),
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

/// A block device of the host. Its number in the guest is another, so what the rules say of it goes with it.
fn disk(
    field: &str,
    path: String,
    device: &LinuxDevice,
    rules: &[LinuxDeviceCgroup],
) -> Result<HostDisk, BundleError> {
    let numbers = (u64::try_from(device.major()), u64::try_from(device.minor()));
    let (Ok(major), Ok(minor)) = numbers else {
        return Err(invalid(field, "has negative numbers"));
    };
    let mut allowed = DeviceAccess::default();
    for rule in rules.iter().filter(|rule| rule.allow() && is_of(rule, device.major(), device.minor())) {
        let more = access(field, rule.access().as_deref().unwrap_or_default())?;
        allowed = DeviceAccess {
            read: allowed.read || more.read,
            write: allowed.write || more.write,
            make: allowed.make || more.make,
        };
    }
    let (uid, gid) = (device.uid().unwrap_or(0), device.gid().unwrap_or(0));
    let is = DiskUse::Node { path, mode: mode(device), uid, gid, access: allowed };
    // Who may do everything is not told so by the device.
    let everything = rules.iter().any(|rule| {
        let any = |number: Option<i64>| number.is_none_or(|number| number == -1);
        rule.allow()
            && any(rule.major())
            && any(rule.minor())
            && rule.access().as_deref().is_none_or(|access| access.contains('w'))
    });
    Ok(HostDisk { source: Source::Numbers(major, minor), read_only: !allowed.write && !everything, is })
}

/// Whether a rule is for the block device of these numbers.
fn is_of(rule: &LinuxDeviceCgroup, major: i64, minor: i64) -> bool {
    rule.typ() == Some(LinuxDeviceType::B) && rule.major() == Some(major) && rule.minor() == Some(minor)
}

/// The rules but those that allow what one of `disks` is.
pub(super) fn rules(
    wanted: &[LinuxDeviceCgroup],
    disks: &[HostDisk],
) -> Result<Vec<DeviceRule>, BundleError> {
    if wanted.len() > MAX_LIST {
        return Err(invalid("linux.resources.devices", format!("are more than {MAX_LIST}")));
    }
    let field = |index: usize| format!("linux.resources.devices[{index}]");
    let is_of_disk = |rule: &LinuxDeviceCgroup| {
        let numbers = |disk: &HostDisk| match disk.source {
            Source::Numbers(major, minor) => Some((i64::try_from(major).ok()?, i64::try_from(minor).ok()?)),
            Source::Path(_) => None,
        };
        rule.allow() && disks.iter().filter_map(numbers).any(|(major, minor)| is_of(rule, major, minor))
    };
    let others = wanted.iter().enumerate().filter(|(_, rule)| !is_of_disk(rule));
    others.map(|(index, wanted)| rule(&field(index), wanted)).collect()
}

fn rule(field: &str, wanted: &LinuxDeviceCgroup) -> Result<DeviceRule, BundleError> {
    let kind = match wanted.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(DeviceKind::Block),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(DeviceKind::Char),
        Some(LinuxDeviceType::P) => return Err(invalid(format!("{field}.type"), "is not that of a device")),
    };
    let rule = DeviceRule {
        allow: wanted.allow(),
        kind,
        major: number(field, "major", wanted.major(), MAX_MAJOR)?,
        minor: number(field, "minor", wanted.minor(), MAX_MINOR)?,
        access: access(field, wanted.access().as_deref().unwrap_or_default())?,
    };
    let is_known = match (rule.major.map(i64::from), rule.minor.map(i64::from)) {
        (None, None) => true,
        (Some(major), Some(minor)) => {
            kind == Some(DeviceKind::Char)
                && (STANDARD.contains(&(major, minor)) || major == TERMINALS || (major, minor) == TUN)
        }
        (Some(major), None) => kind == Some(DeviceKind::Char) && major == TERMINALS,
        (None, Some(_)) => false,
    };
    if rule.allow && !is_known {
        return Err(unsupported(field, format!("access to {wanted}, which a guest does not have")));
    }
    Ok(rule)
}

/// A number; -1, as none at all, stands for every one.
fn number(field: &str, name: &str, number: Option<i64>, most: i64) -> Result<Option<u32>, BundleError> {
    match number.filter(|number| *number != -1) {
        None => Ok(None),
        Some(number) if number > most => {
            Err(invalid(format!("{field}.{name}"), "is greater than any device's"))
        }
        Some(number) => {
            let number = u32::try_from(number);
            number.map(Some).map_err(|_| invalid(format!("{field}.{name}"), "is negative"))
        }
    }
}

/// `r`, `w` and `m` in any order; all of them where there are none.
fn access(field: &str, access: &str) -> Result<DeviceAccess, BundleError> {
    if access.len() > 3 || !access.bytes().all(|byte| b"rwm".contains(&byte)) {
        return Err(invalid(format!("{field}.access"), "is not made of r, w and m"));
    }
    Ok(match access {
        "" => DeviceAccess::ALL,
        _ => DeviceAccess {
            read: access.contains('r'),
            write: access.contains('w'),
            make: access.contains('m'),
        },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read_rules(wanted: Value) -> Result<Vec<DeviceRule>, BundleError> {
        rules(&serde_json::from_value::<Vec<LinuxDeviceCgroup>>(wanted).unwrap(), &[])
    }

    fn read_nodes(wanted: Value) -> Result<Vec<Device>, BundleError> {
        read_disks(wanted, json!([])).map(|(nodes, _)| nodes.devices)
    }

    fn read_disks(wanted: Value, allowed: Value) -> Result<(Nodes, Vec<DeviceRule>), BundleError> {
        let allowed: Vec<LinuxDeviceCgroup> = serde_json::from_value(allowed).unwrap();
        let nodes = nodes(&serde_json::from_value::<Vec<LinuxDevice>>(wanted).unwrap(), &allowed)?;
        let rules = rules(&allowed, &nodes.disks)?;
        Ok((nodes, rules))
    }

    #[test]
    fn block_devices_of_the_host_become_disks_with_what_the_rules_allow() {
        let disks = json!([
            {"path": "/dev/data", "type": "b", "major": 8, "minor": 16, "fileMode": 0o640, "uid": 1, "gid": 2},
            {"path": "/dev/seen", "type": "b", "major": 8, "minor": 32}
        ]);
        let rules = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 8, "minor": 16, "access": "rw"},
            {"allow": true, "type": "b", "major": 8, "minor": 32, "access": "r"},
            {"allow": true, "type": "b", "major": 8, "minor": 16, "access": "m"}
        ]);
        let (nodes, rules) = read_disks(disks.clone(), rules).unwrap();
        assert_eq!(rules.len(), 1);
        let is = DiskUse::Node {
            path: "/dev/data".into(),
            mode: 0o640,
            uid: 1,
            gid: 2,
            access: DeviceAccess::ALL,
        };
        assert_eq!(nodes.disks[0], HostDisk { source: Source::Numbers(8, 16), read_only: false, is });
        assert!(nodes.disks[1].read_only && nodes.devices.is_empty());
        // A privileged container's rule is for everything.
        let (nodes, rules) = read_disks(disks, json!([{"allow": true, "access": "rwm"}])).unwrap();
        assert!(rules.len() == 1 && !nodes.disks[1].read_only);
        let node = json!({"path": "/dev/d", "type": "b", "major": 8, "minor": 0});
        let error = read_disks(json!(vec![node.clone(); MAX_DISKS + 1]), json!([])).unwrap_err().to_string();
        assert!(error.contains("[16]") && error.contains("16 block devices"), "{error}");
        let negative = json!({"path": "/dev/d", "type": "b", "major": -1, "minor": 0});
        assert!(read_disks(json!([negative]), json!([])).is_err());
        // A rule for another one is refused as ever.
        let other = json!([{"allow": true, "type": "b", "major": 8, "minor": 1, "access": "r"}]);
        assert!(read_disks(json!([node]), other).unwrap_err().to_string().contains("b 8:1 r"));
    }

    #[test]
    fn the_rules_of_a_default_and_of_a_privileged_pod_are_accepted() {
        let default = read_rules(json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
            {"allow": true, "type": "c", "major": 136, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 200, "access": "rwm"},
            {"allow": false, "type": "b", "major": 8, "minor": -1, "access": "w"}
        ]));
        let default = default.unwrap();
        assert_eq!(
            default[0],
            DeviceRule { allow: false, kind: None, major: None, minor: None, access: DeviceAccess::ALL }
        );
        assert_eq!((default[1].major, default[1].minor), (Some(1), Some(3)));
        assert_eq!((default[2].major, default[2].minor), (Some(136), None));
        assert_eq!((default[4].kind, default[4].minor), (Some(DeviceKind::Block), None));
        assert!(default[4].access.write && !default[4].access.read);
        let privileged = read_rules(json!([{"allow": true, "type": "a", "major": -1, "minor": -1}])).unwrap();
        assert!(
            privileged[0].allow && privileged[0].kind.is_none() && privileged[0].access == DeviceAccess::ALL
        );
    }

    #[test]
    fn standard_nodes_are_made_as_asked() {
        let nodes = read_nodes(json!([
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o100_600, "uid": 1, "gid": 2},
            {"path": "/dev/my//zero", "type": "u", "major": 1, "minor": 5}
        ]));
        let nodes = nodes.unwrap();
        assert_eq!((nodes[0].mode, nodes[0].uid, nodes[0].gid), (0o600, 1, 2));
        assert_eq!((nodes[1].path.as_str(), nodes[1].mode), ("/dev/my/zero", 0o666));
    }

    #[test]
    fn devices_of_the_host_are_refused_by_name() {
        for (node, name) in [
            (json!({"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}), "/dev/kvm (c 10:232)"),
            (json!({"path": "/opt/disk", "type": "b", "major": 8, "minor": 3}), "linux.devices[0].path"),
            (json!({"path": "/dev/fifo", "type": "p", "major": 0, "minor": 0}), "/dev/fifo (p 0:0)"),
            (json!({"path": "/dev/../x", "type": "c", "major": 1, "minor": 3}), "linux.devices[0].path"),
            (json!({"path": "/opt/null", "type": "c", "major": 1, "minor": 3}), "linux.devices[0].path"),
        ] {
            let error = read_nodes(json!([node])).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
        for (rule, name) in [
            (json!({"allow": true, "type": "b", "major": 8, "minor": 0, "access": "r"}), "b 8:0 r"),
            (json!({"allow": true, "type": "c", "major": 10, "access": "r"}), "c 10:* r"),
            (json!({"allow": true, "major": 1, "minor": 3}), "a 1:3"),
            (json!({"allow": false, "type": "p"}), "[0].type"),
            (json!({"allow": false, "access": "rx"}), "[0].access"),
            (json!({"allow": false, "access": "rrrrrrrr"}), "[0].access"),
            (json!({"allow": false, "major": -2}), "[0].major"),
            (json!({"allow": false, "minor": 1 << 20}), "[0].minor"),
        ] {
            let error = read_rules(json!([rule])).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
        assert!(read_rules(json!(vec![json!({"allow": false}); MAX_LIST + 1])).is_err());
    }
}
