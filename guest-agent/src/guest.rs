//! The guest as a whole: its own mounts, its facts, and where its log goes.

use std::ffi::CStr;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use krx_proto::{GuestInfo, SHARE_PATH, SHARE_TAG};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::mount::{MsFlags, mount};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::stat::Mode;
use nix::sys::sysinfo::sysinfo;
use nix::sys::utsname::uname;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, chroot, fchdir, write};

use crate::error::{Doing, StepError};
use crate::sys::mount::{attach, clone_tree};

/// Where the guest's cgroup tree is mounted.
pub(crate) const CGROUPS: &str = "/sys/fs/cgroup";

/// Facts that need no mounts, so that the hello can be sent before there are any.
pub(crate) fn info() -> GuestInfo {
    let online = sched_getaffinity(Pid::from_raw(0)).unwrap_or_else(|_| CpuSet::new());
    let cpus = (0..CpuSet::count()).filter(|cpu| online.is_set(*cpu) == Ok(true)).count();
    GuestInfo {
        kernel: uname().map_or_else(|_| String::new(), |name| name.release().to_string_lossy().into_owned()),
        memory_kib: sysinfo().map_or(0, |info| info.ram_total() / 1024),
        cpus: u32::try_from(cpus).unwrap_or(0),
        uptime_ns: clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
            let part = |number: i64| u64::try_from(number).unwrap_or(0);
            part(time.tv_sec()).saturating_mul(1_000_000_000).saturating_add(part(time.tv_nsec()))
        }),
    }
}

/// Writes a file that takes a value in one write or not at all, as those of `/proc` do.
pub(crate) fn write_file(directory: BorrowedFd<'_>, path: &str, text: &str) -> nix::Result<()> {
    let file = openat(directory, path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    write(file, text.as_bytes()).map(drop)
}

/// A path of the guest. Links are not followed: a container could have put one into a volume.
pub(crate) fn open_path(path: &CStr) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    openat2(AT_FDCWD, path, OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS))
}

/// Mounts what the agent itself stands on. A guest without the share's device is a guest without a share.
pub(crate) fn mount_all() -> Result<(), StepError> {
    let hardened = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    bind_root().doing(|| "Cannot bind the initramfs to its own root")?;
    mount_one("proc", "/proc", hardened)?;
    mount_one("sysfs", "/sys", hardened)?;
    mount_one("cgroup2", CGROUPS, hardened)?;
    mount_one("tmpfs", "/run", MsFlags::MS_NOSUID | MsFlags::MS_NODEV)?;
    crate::cgroup::make_parent()?;
    // As the kubelet has it on a node: who maps more than there is learns of it by the OOM killer, if at all. Programs
    // rely on that; the kernel's own guess would refuse what is larger than this small machine.
    fs::write("/proc/sys/vm/overcommit_memory", "1").doing(|| "Cannot set vm.overcommit_memory")?;
    fs::create_dir_all(SHARE_PATH).doing(|| format!("Cannot make {SHARE_PATH}"))?;
    // Programs of an image may be set-uid; device nodes in it are never the container's to use.
    let none: Option<&str> = None;
    match mount(Some(SHARE_TAG), SHARE_PATH, Some("virtiofs"), MsFlags::MS_NODEV, none) {
        // The kernel's answer where no device has the tag.
        Err(Errno::EINVAL) => Ok(()),
        result => result.doing(|| format!("Cannot mount the share on {SHARE_PATH}")),
    }
}

/// Has the kernel forget what it knows of files that nobody has open. It would keep the last ones, and with each the host's mount that
/// it is in: of those the share can tell 254 from each other, and a pod whose containers start again and again has new ones each time.
pub(crate) fn forget_files() {
    // Without it, there is less of that.
    let _ = fs::write("/proc/sys/vm/drop_caches", "2");
}

/// Makes the root a mount that can be left: pivot_root(2) is not possible from the initramfs itself, and a container in a
/// user namespace has no other way to be rid of the guest's mounts, which are locked there (`mount_namespaces(7)`).
fn bind_root() -> nix::Result<()> {
    let initramfs = open_path(c"/")?;
    let root = clone_tree(initramfs.as_fd(), c"", false)?;
    attach(root.as_fd(), initramfs.as_fd())?;
    fchdir(&root)?;
    chroot(".")
}

fn mount_one(kind: &str, on: &str, flags: MsFlags) -> Result<(), StepError> {
    let none: Option<&str> = None;
    mount(Some(kind), on, Some(kind), flags, none).doing(|| format!("Cannot mount {kind} on {on}"))
}

/// Writes one line to the kernel's log, where the VMM finds it after the guest's death; and so to the console,
/// where there is one.
pub(crate) fn log(line: impl fmt::Display) {
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // 3: an error, which a quiet kernel shows too. One write is one line.
        let _ = log.write_all(format!("<3>krx-agent: {line}\n").as_bytes());
    }
}
