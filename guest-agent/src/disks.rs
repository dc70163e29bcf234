//! Disks that come while the guest runs: the kernel is told of their slots, and told to let go of them.
//!
//! Slots are announced at run time as the command line announces the devices of the start (`virtio_mmio.device`); krx's kernel
//! lets that be. A slot that was announced once is looked at again by binding its driver.
//!
//! A container's process could not open the disk that its root is on: that is no device of the container. So the agent mounts
//! it, attached nowhere, and the process takes it along; with the container's mount namespace it is unmounted. The agent waits for
//! the host's disk meanwhile.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use krx_proto::{
    AgentError, ContainerSpec, Device, DeviceKind, DeviceRule, Disk, DiskUse, ErrorKind, MAX_DISKS,
};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::error::{Doing, StepError, invalid};
use crate::mount_options::MountOptions;
use crate::process::c_string;
use crate::rootfs;
use crate::sys::mount::{AttributeChange, set_attributes};

const ANNOUNCE: &str = "/sys/module/virtio_mmio/parameters/device";
const DEVICES: &str = "/sys/bus/platform/devices";
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// Bytes of a slot's registers, as the kernel reads sizes.
const SLOT_SIZE: &str = "4K";

/// The guest's own node of a disk.
fn node(slot: u32) -> PathBuf {
    format!("/dev/disk-{slot}").into()
}

/// The kernel's name of a slot.
fn device(slot: u32) -> String {
    format!("virtio-mmio.{slot}")
}

/// Has the kernel find the disks of a container to be made; those that are to be device nodes of it are added to its devices
/// and rules.
pub(crate) fn attach(spec: &mut ContainerSpec) -> Result<(), AgentError> {
    if spec.disks.len() > MAX_DISKS {
        return Err(invalid(format_args!("disks: at most {MAX_DISKS} are allowed")));
    }
    let roots = spec.disks.iter().filter(|disk| matches!(disk.is, DiskUse::Root { .. })).count();
    if roots > 1 {
        return Err(invalid("disks: more than one of them is the root"));
    }
    let ContainerSpec { disks, devices, device_rules, .. } = spec;
    for disk in disks {
        let (major, minor) = find(disk)?;
        if let DiskUse::Node { path, mode, uid, gid, access } = &disk.is {
            let kind = DeviceKind::Block;
            devices.push(Device {
                path: path.clone(),
                kind,
                major,
                minor,
                mode: *mode,
                uid: *uid,
                gid: *gid,
            });
            let (kind, major, minor) = (Some(kind), Some(major), Some(minor));
            device_rules.push(DeviceRule { allow: true, kind, major, minor, access: *access });
        }
    }
    Ok(())
}

/// Has the kernel look into the slot, and makes the guest's node of what it finds; gives its numbers.
fn find(disk: &Disk) -> Result<(u32, u32), StepError> {
    let Disk { slot, address, irq, .. } = disk;
    let doing = || format!("Cannot find the disk in slot {slot}");
    let known = Path::new(DEVICES).join(device(*slot));
    if known.exists() {
        fs::write(format!("{DRIVER}/bind"), device(*slot)).doing(doing)?;
    } else {
        fs::write(ANNOUNCE, format!("{SLOT_SIZE}@{address:#x}:{irq}:{slot}")).doing(doing)?;
    }
    let numbers = numbers(&known).ok_or(Errno::ENODEV).doing(doing)?;
    let mode = Mode::from_bits_truncate(0o600);
    mknod(&node(*slot), SFlag::S_IFBLK, mode, makedev(numbers.0.into(), numbers.1.into())).doing(doing)?;
    Ok(numbers)
}

/// Numbers of the block device that a slot's driver has made.
fn numbers(slot: &Path) -> Option<(u32, u32)> {
    let virtio = entry(slot, "virtio")?;
    let disk = entry(&virtio.join("block"), "vd")?;
    let text = fs::read_to_string(disk.join("dev")).ok()?;
    let (major, minor) = text.trim_end().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The entry of a directory whose name begins so.
fn entry(directory: &Path, begin: &str) -> Option<PathBuf> {
    let mut entries = fs::read_dir(directory).ok()?.flatten();
    entries.find(|entry| entry.file_name().to_string_lossy().starts_with(begin)).map(|entry| entry.path())
}

/// Has the kernel let go of a disk.
pub(crate) fn release(slot: u32) -> Result<(), AgentError> {
    let node = node(slot);
    // Who has it mounted has it for himself.
    match open(&node, OFlag::O_RDONLY | OFlag::O_EXCL | OFlag::O_CLOEXEC, Mode::empty()) {
        Err(Errno::ENOENT) => {
            return Err(AgentError::new(
                ErrorKind::NotFound,
                format_args!("There is no disk in slot {slot}"),
            ));
        }
        Err(Errno::EBUSY) => {
            let message = format_args!("The disk in slot {slot} is in use");
            return Err(AgentError::new(ErrorKind::WrongState, message));
        }
        Ok(opened) => drop(opened),
        // A disk that is broken is let go as any other.
        Err(_) => {}
    }
    let unbound = fs::write(format!("{DRIVER}/unbind"), device(slot));
    unbound.doing(|| format!("Cannot let go of the disk in slot {slot}"))?;
    let _ = fs::remove_file(node);
    Ok(())
}

/// The root of a container, if a disk has it: mounted, and attached nowhere.
pub(crate) fn mount_root(disks: &[Disk]) -> Result<Option<OwnedFd>, AgentError> {
    let plan = disks.iter().find_map(|disk| match &disk.is {
        DiskUse::Root { kind, options } => Some(RootPlan::new(disk.slot, kind, options)),
        DiskUse::Node { .. } => None,
    });
    plan.transpose()?.map(|plan| plan.mount().map_err(AgentError::from)).transpose()
}

/// How the file system on a disk is mounted.
struct RootPlan {
    kind: CString,
    /// Its source among them.
    parameters: Vec<(CString, Option<CString>)>,
    attributes: AttributeChange,
}

impl RootPlan {
    fn new(slot: u32, kind: &str, options: &[String]) -> Result<Self, AgentError> {
        let MountOptions { mut attributes, parameters, .. } = MountOptions::parse(options);
        let source = ("source".to_string(), Some(node(slot).to_string_lossy().into_owned()));
        // The file system, too, is to know that it cannot write.
        let read_only = attributes.set & libc::MOUNT_ATTR_RDONLY != 0;
        let read_only = read_only.then(|| ("ro".to_string(), None));
        // Device nodes of an image are never the container's to use.
        attributes.set |= libc::MOUNT_ATTR_NODEV;
        attributes.clear &= !libc::MOUNT_ATTR_NODEV;
        let parameters = [source].into_iter().chain(read_only).chain(parameters).map(|(name, value)| {
            let value = value.map(|value| c_string("disks: options", value)).transpose()?;
            Ok((c_string("disks: options", name)?, value))
        });
        let parameters = parameters.collect::<Result<_, AgentError>>()?;
        Ok(Self { kind: c_string("disks: type", kind.into())?, parameters, attributes })
    }

    fn mount(&self) -> Result<OwnedFd, StepError> {
        let doing =
            || format!("Cannot mount the {} of the root file system's disk", self.kind.to_string_lossy());
        let parameters = self.parameters.iter().map(|(name, value)| (name.as_c_str(), value.as_deref()));
        let tree = rootfs::file_system(&self.kind, parameters, doing)?;
        set_attributes(tree.as_fd(), self.attributes).doing(doing)?;
        Ok(tree)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Disk {
        let is = DiskUse::Root { kind: "ext4".into(), options: Vec::new() };
        Disk { slot: 11, address: 0xd000_b000, irq: 7, is }
    }

    #[test]
    fn a_root_on_a_disk_is_mounted_from_its_node_and_has_no_devices() {
        let plan = |options: &[&str]| {
            RootPlan::new(11, "ext4", &options.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert!(plan(&["a\0b"]).is_err());
        let plan = plan(&["ro", "noatime", "data=ordered", "discard", "dev"]).unwrap();
        let parameters: Vec<_> =
            plan.parameters.iter().map(|(name, value)| (name.as_c_str(), value.as_deref())).collect();
        assert_eq!(
            parameters,
            [
                (c"source", Some(c"/dev/disk-11")),
                (c"ro", None),
                (c"data", Some(c"ordered")),
                (c"discard", None)
            ]
        );
        assert_ne!(plan.attributes.set & libc::MOUNT_ATTR_NODEV, 0);
        assert_eq!(plan.attributes.clear & libc::MOUNT_ATTR_NODEV, 0);
        assert!(mount_root(&[]).unwrap().is_none());
    }

    #[test]
    fn lists_are_bounded_before_the_kernel_is_told() {
        let with = |disks: Vec<Disk>| ContainerSpec { disks, ..ContainerSpec::default() };
        let refused = |disks| attach(&mut with(disks)).unwrap_err().message;
        assert!(refused(vec![disk(); MAX_DISKS + 1]).starts_with("disks:"));
        assert!(refused(vec![disk(); 2]).starts_with("disks:"));
    }

    #[test]
    fn numbers_are_those_of_the_slots_own_disk() {
        let scratch = std::env::temp_dir().join(format!("krx-disks-{}", std::process::id()));
        assert_eq!(numbers(&scratch), None);
        let block = scratch.join("virtio3/block/vdc");
        fs::create_dir_all(&block).unwrap();
        assert_eq!(numbers(&scratch), None);
        for (text, expected) in [("254:32\n", Some((254, 32))), ("254\n", None), ("a:b\n", None)] {
            fs::write(block.join("dev"), text).unwrap();
            assert_eq!(numbers(&scratch), expected);
        }
        fs::remove_dir_all(&scratch).unwrap();
    }
}
