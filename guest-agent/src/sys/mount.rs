//! Mounts by descriptor instead of path, so that no path is resolved twice.

use std::ffi::CStr;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use nix::errno::Errno;

use super::new_descriptor;

/// Makes a detached copy of the mount at `path` below `directory`; `AT_RECURSIVE` with everything mounted in it.
/// An empty path copies `directory` itself.
pub(crate) fn clone_tree(directory: BorrowedFd<'_>, path: &CStr, recursive: bool) -> nix::Result<OwnedFd> {
    let recursive = if recursive { libc::AT_RECURSIVE.cast_unsigned() } else { 0 };
    let flags = libc::OPEN_TREE_CLONE
        | libc::OPEN_TREE_CLOEXEC
        | libc::AT_EMPTY_PATH.cast_unsigned()
        | libc::AT_NO_AUTOMOUNT.cast_unsigned()
        | recursive;
    // SAFETY: `path` is a terminated string that outlives the call; the kernel only reads it.
    let result = unsafe { libc::syscall(libc::SYS_open_tree, directory.as_raw_fd(), path.as_ptr(), flags) };
    // SAFETY: open_tree returns a new descriptor.
    unsafe { new_descriptor(result) }
}

/// Attaches a detached mount on the file or directory that `target` refers to.
pub(crate) fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> nix::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both paths are terminated string constants that the kernel only reads.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            flags,
        )
    };
    Errno::result(result).map(drop)
}

/// What [`set_attributes`] changes of a mount: `MOUNT_ATTR_*` bits and the propagation type (0 keeps it).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct AttributeChange {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    pub(crate) propagation: u64,
    pub(crate) recursive: bool,
}

/// Changes the attributes of the mount whose root `mount` refers to.
pub(crate) fn set_attributes(mount: BorrowedFd<'_>, change: AttributeChange) -> nix::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: change.set,
        attr_clr: change.clear,
        propagation: change.propagation,
        userns_fd: 0,
    };
    set(mount, attributes, change.recursive)
}

/// Gives the files of a detached mount the owners that the maps of a user namespace say.
pub(crate) fn set_id_map(mount: BorrowedFd<'_>, users: BorrowedFd<'_>, recursive: bool) -> nix::Result<()> {
    let userns_fd = u64::from(users.as_raw_fd().cast_unsigned());
    let attributes =
        libc::mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd };
    set(mount, attributes, recursive)
}

fn set(mount: BorrowedFd<'_>, attributes: libc::mount_attr, recursive: bool) -> nix::Result<()> {
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a terminated constant and `attributes` a whole structure of the size given; the kernel
    // only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop)
}

/// Begins to configure a new file system of a type (`fsopen`).
pub(crate) fn open_file_system(kind: &CStr) -> nix::Result<OwnedFd> {
    // SAFETY: `kind` is a terminated string that the kernel only reads.
    let result = unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), libc::FSOPEN_CLOEXEC) };
    // SAFETY: fsopen returns a new descriptor.
    unsafe { new_descriptor(result) }
}

/// Sets a parameter of a file system being configured; without a value a flag.
pub(crate) fn set_parameter(context: BorrowedFd<'_>, key: &CStr, value: Option<&CStr>) -> nix::Result<()> {
    let command = if value.is_some() { libc::FSCONFIG_SET_STRING } else { libc::FSCONFIG_SET_FLAG };
    fsconfig(context, command, Some(key), value)
}

/// Makes the file system that was configured, or finds the existing one it names.
pub(crate) fn create_file_system(context: BorrowedFd<'_>) -> nix::Result<()> {
    fsconfig(context, libc::FSCONFIG_CMD_CREATE, None, None)
}

/// A detached mount of a created file system.
pub(crate) fn mount_file_system(context: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes three integers.
    let result = unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), libc::FSMOUNT_CLOEXEC, 0) };
    // SAFETY: fsmount returns a new descriptor.
    unsafe { new_descriptor(result) }
}

fn fsconfig(
    context: BorrowedFd<'_>,
    command: libc::fsconfig_command,
    key: Option<&CStr>,
    value: Option<&CStr>,
) -> nix::Result<()> {
    let pointer = |text: Option<&CStr>| text.map_or(ptr::null(), CStr::as_ptr);
    // SAFETY: key and value are null or terminated strings that outlive the call; the kernel only reads them.
    let result = unsafe {
        libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, pointer(key), pointer(value), 0)
    };
    Errno::result(result).map(drop)
}
