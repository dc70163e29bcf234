//! The mounts that a container's file system view is made of and that come from the guest: its root, what is bound into
//! it, and what only the guest may mount or make. Each is handed over detached, in the order in which `rootfs` attaches
//! them: where the container is in a user namespace, by another process, see `outside`.

use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use krx_proto::{AgentError, Device, DeviceKind};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, makedev, mknodat};
use nix::unistd::{Gid, Uid, fchownat};

use crate::container::{MountKind, MountPlan, RootPlan};
use crate::error::{Doing, StepError};
use crate::guest::{self, open_path};
use crate::rootfs::{file_system, is_directory};
use crate::sys::mount::{attach, clone_tree};
use crate::{replica, shm};

/// Hands over all sources of a plan. For nodes of devices, the calling process has a mount namespace to itself.
pub(crate) fn take(
    plan: &RootPlan,
    mut hand_over: impl FnMut(OwnedFd) -> Result<(), StepError>,
) -> Result<(), StepError> {
    hand_over(root(plan)?)?;
    for mount in &plan.mounts {
        source(mount)?.map_or(Ok(()), &mut hand_over)?;
    }
    if plan.binds_devices() { nodes(&plan.bound, hand_over) } else { Ok(()) }
}

fn root(plan: &RootPlan) -> Result<OwnedFd, StepError> {
    let doing = || format!("Cannot use {} as root file system", plan.path.to_string_lossy());
    if let Some(disk) = &plan.disk {
        return disk.try_clone().doing(doing);
    }
    let place = open_path(&plan.path).doing(doing)?;
    if !is_directory(place.as_fd()).doing(doing)? {
        return Err(StepError::new(doing(), Errno::ENOTDIR));
    }
    clone_tree(place.as_fd(), c"", true).doing(doing)
}

/// Of a mount that has one: see [`MountPlan::has_source`].
fn source(plan: &MountPlan) -> Result<Option<OwnedFd>, StepError> {
    let (source, recursive) = match &plan.what {
        MountKind::FileSystem { kind, parameters } if plan.is_the_guest_s => {
            let doing = || format!("Cannot mount {} on {}", plan.what.name(), plan.destination);
            let parameters = parameters.iter().map(|(name, value)| (name.as_c_str(), value.as_deref()));
            return file_system(kind, parameters, doing).map(Some);
        }
        MountKind::FileSystem { .. } => return Ok(None),
        MountKind::Bind { source, recursive } => (source.as_c_str(), *recursive),
        MountKind::Shm { .. } => (shm::PATH, false),
        MountKind::Live { source, copy } => (live_source(source, copy), false),
    };
    let doing = || format!("Cannot bind {} to {}", source.to_string_lossy(), plan.destination);
    let place = open_path(source).doing(doing)?;
    let tree = clone_tree(place.as_fd(), c"", recursive).doing(doing)?;
    plan.id_map.as_ref().map_or(Ok(()), |map| map.apply(tree.as_fd(), &plan.destination))?;
    Ok(Some(tree))
}

/// What a container gets of a live volume: its copy, or the volume itself where none can be made of it. That is as
/// up to date, and only tells no watcher.
fn live_source<'a>(volume: &'a CStr, copy: &'a CStr) -> &'a CStr {
    let path = |text: &'a CStr| Path::new(OsStr::from_bytes(text.to_bytes()));
    match replica::fill(path(volume), path(copy)) {
        Ok(()) => copy,
        Err(error) => {
            guest::log(AgentError::from(error));
            volume
        }
    }
}

/// Device nodes, each for itself, in a file system that nothing but the container has. Only what is mounted somewhere can be
/// bound, so it is mounted over the guest's `/dev`, for the calling process alone.
fn nodes(
    wanted: &[Device],
    mut hand_over: impl FnMut(OwnedFd) -> Result<(), StepError>,
) -> Result<(), StepError> {
    let doing = || "Cannot make device nodes to be bound into the container".to_string();
    let tree = file_system(c"tmpfs", [(c"mode", Some(c"755"))].into_iter(), doing)?;
    let dev = open_path(c"/dev").doing(doing)?;
    attach(tree.as_fd(), dev.as_fd()).doing(doing)?;
    for (index, device) in wanted.iter().enumerate() {
        let doing = || format!("Cannot make the device node {}", device.path);
        let name = index.to_string();
        make_node(tree.as_fd(), &name, device).doing(doing)?;
        let node =
            openat(&tree, name.as_str(), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).doing(doing)?;
        hand_over(clone_tree(node.as_fd(), c"", false).doing(doing)?)?;
    }
    Ok(())
}

/// Makes a device's node, with its mode and owner.
pub(crate) fn make_node(directory: impl AsFd, name: &str, device: &Device) -> nix::Result<()> {
    let kind = match device.kind {
        DeviceKind::Char => SFlag::S_IFCHR,
        DeviceKind::Block => SFlag::S_IFBLK,
    };
    let mode = Mode::from_bits_truncate(device.mode & 0o777);
    let numbers = makedev(device.major.into(), device.minor.into());
    mknodat(&directory, name, kind, mode, numbers)?;
    let (user, group) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    fchownat(&directory, name, Some(user), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW)
}
