//! Carries out the file system part of a plan, in a mount namespace that is the container's already: its root, its
//! mounts, its device nodes, and what is hidden or read-only in it.
//!
//! The image and the volumes are hostile. Every path in the container is resolved by the kernel with the container's
//! root as its limit (`RESOLVE_IN_ROOT`) and mounts are attached to what was found, by descriptor, so that no symbolic
//! link can lead out and no path is looked up twice.
//!
//! The guest's own root is the initramfs, from which pivot_root(2) is not possible. So the guest's mounts are taken
//! out of the namespace, and the container's root is mounted over what is left, as the namespace's root.

use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use krx_proto::{AgentError, Device, DeviceKind};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlinkat};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, SFlag, fstat, makedev, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, chroot, fchdir, fchownat, symlinkat};

use crate::container::{MountKind, MountPlan, RootPlan};
use crate::error::{Doing, StepError};
use crate::sys::mount::{
    AttributeChange, attach, clone_tree, create_file_system, mount_file_system, open_file_system,
    set_attributes, set_parameter,
};
use crate::{guest, replica, shm};

/// The guest's own mounts, which a container must not find beneath its root.
const GUEST_MOUNTS: [&str; 3] = ["/run", "/sys", "/proc"];

/// Dangling links of the image that are followed to make one path, as many as the kernel follows (path_resolution(7)).
/// Stops links that lead to each other.
const MAX_LINKS: u32 = 40;

/// Device nodes that every container has: name, major and minor number.
const DEVICES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
/// Links that every container has in `/dev`.
const LINKS: [(&str, &str); 5] = [
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

const READ_ONLY: AttributeChange =
    AttributeChange { set: libc::MOUNT_ATTR_RDONLY, clear: 0, propagation: 0, recursive: false };

/// A container's root directory, as the limit of path resolution.
#[derive(Debug)]
pub(crate) struct Root(OwnedFd);

impl Root {
    /// The root of the calling process.
    pub(crate) fn own() -> Result<Self, StepError> {
        Ok(Self(open_guest(c"/").doing(|| "Cannot open the container's root")?))
    }

    /// Opens a path in the container; links in it never lead out, and magic links of `/proc` nowhere at all.
    pub(crate) fn open(&self, path: &str, flags: OFlag) -> nix::Result<OwnedFd> {
        let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        openat2(&self.0, path, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve))
    }

    /// Opens a path as a place, made with its parents where it is missing.
    pub(crate) fn make(&self, path: &str, directory: bool) -> nix::Result<OwnedFd> {
        self.make_through(path, directory, MAX_LINKS)
    }

    /// `links` is how many dangling links may be followed.
    fn make_through(&self, path: &str, directory: bool, links: u32) -> nix::Result<OwnedFd> {
        match self.open(path, OFlag::O_PATH) {
            Err(Errno::ENOENT) => {}
            found => return found,
        }
        let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
        for (index, name) in names.iter().enumerate() {
            let parent = self.open(&format!("/{}", names[..index].join("/")), OFlag::O_PATH)?;
            let last = index + 1 == names.len();
            let made = if last && !directory {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                openat(&parent, *name, flags, Mode::from_bits_truncate(0o644)).map(drop)
            } else {
                mkdirat(&parent, *name, Mode::from_bits_truncate(0o755))
            };
            match made {
                Ok(()) => {}
                Err(Errno::EEXIST) => {
                    let above = format!("/{}", names[..index].join("/"));
                    self.make_target(&parent, &above, name, directory || !last, links)?;
                }
                Err(error) => return Err(error),
            }
        }
        self.open(path, OFlag::O_PATH)
    }

    /// Makes what `name` in the directory `above` links to, if it is a link to something that is missing.
    fn make_target(
        &self,
        parent: &OwnedFd,
        above: &str,
        name: &str,
        directory: bool,
        links: u32,
    ) -> nix::Result<()> {
        let Ok(target) = readlinkat(parent, name) else { return Ok(()) };
        if self.open(&format!("{above}/{name}"), OFlag::O_PATH).err() != Some(Errno::ENOENT) {
            return Ok(());
        }
        let target = target.to_str().ok_or(Errno::EILSEQ)?;
        let target = if target.starts_with('/') { target.into() } else { format!("{above}/{target}") };
        let links = links.checked_sub(1).ok_or(Errno::ELOOP)?;
        self.make_through(&target, directory, links).map(drop)
    }
}

/// Makes the container's file system view and enters it. `cwd` is made where it is missing, while that can be done.
pub(crate) fn enter(plan: &RootPlan, cwd: &str) -> Result<Root, StepError> {
    let sources = plan.mounts.iter().map(source).collect::<Result<Vec<_>, _>>()?;
    let null = open_guest(c"/dev/null").doing(|| "Cannot open the guest's /dev/null")?;
    let root = enter_root(plan)?;
    for (mount, source) in plan.mounts.iter().zip(sources) {
        mount_one(&root, mount, source)?;
    }
    make_devices(&root, plan)?;
    root.make(cwd, true).doing(|| format!("Cannot make the working directory {cwd}"))?;
    for mount in plan.mounts.iter().filter(|mount| is_late_read_only(mount)) {
        make_read_only(&root, &mount.destination)?;
    }
    plan.masked.iter().try_for_each(|path| mask(&root, path, null.as_fd()))?;
    plan.readonly_paths.iter().try_for_each(|path| protect(&root, path))?;
    if plan.readonly {
        set_attributes(root.0.as_fd(), READ_ONLY).doing(|| "Cannot make the root read-only")?;
    }
    Ok(root)
}

/// A path of the guest. Links are not followed: a container could have put one into a volume.
fn open_guest(path: &CStr) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    openat2(AT_FDCWD, path, OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS))
}

/// A bind mount's source, detached; to be taken before the guest's paths are out of reach.
fn source(plan: &MountPlan) -> Result<Option<OwnedFd>, StepError> {
    let (source, recursive) = match &plan.what {
        MountKind::FileSystem { .. } => return Ok(None),
        MountKind::Bind { source, recursive } => (source.as_c_str(), *recursive),
        MountKind::Shm { .. } => (shm::PATH, false),
        MountKind::Live { source, copy } => (live_source(source, copy), false),
    };
    let doing = || format!("Cannot bind {} to {}", source.to_string_lossy(), plan.destination);
    let place = open_guest(source).doing(doing)?;
    clone_tree(place.as_fd(), c"", recursive).map(Some).doing(doing)
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

fn enter_root(plan: &RootPlan) -> Result<Root, StepError> {
    let doing = || format!("Cannot use {} as root file system", plan.path.to_string_lossy());
    let root = match &plan.disk {
        Some(disk) => disk.try_clone().doing(doing)?,
        None => {
            let place = open_guest(&plan.path).doing(doing)?;
            if !is_directory(place.as_fd()).doing(doing)? {
                return Err(StepError::new(doing(), Errno::ENOTDIR));
            }
            clone_tree(place.as_fd(), c"", true).doing(doing)?
        }
    };
    let initramfs = open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).doing(doing)?;
    for mount in GUEST_MOUNTS {
        umount2(mount, MntFlags::MNT_DETACH).doing(|| format!("Cannot take {mount} of the guest away"))?;
    }
    attach(root.as_fd(), initramfs.as_fd()).doing(doing)?;
    fchdir(&root).doing(doing)?;
    chroot(".").doing(doing)?;
    Ok(Root(root))
}

fn mount_one(root: &Root, plan: &MountPlan, source: Option<OwnedFd>) -> Result<(), StepError> {
    let MountPlan { destination, what, options } = plan;
    let doing = || format!("Cannot mount {} on {destination}", what.name());
    let tree = match (source, what) {
        (Some(source), _) => source,
        (None, MountKind::FileSystem { kind, parameters }) => {
            let parameters = parameters.iter().map(|(name, value)| (name.as_c_str(), value.as_deref()));
            file_system(kind, parameters, doing)?
        }
        (None, _) => return Err(StepError::new(doing(), Errno::EINVAL)),
    };
    let mut attributes = options.attributes;
    if is_late_read_only(plan) {
        attributes.set &= !libc::MOUNT_ATTR_RDONLY;
    }
    change(tree.as_fd(), attributes).doing(doing)?;
    change(tree.as_fd(), AttributeChange { recursive: true, ..options.recursive }).doing(doing)?;
    let directory = is_directory(tree.as_fd()).doing(doing)?;
    let place = root.make(destination, directory).doing(doing)?;
    attach(tree.as_fd(), place.as_fd()).doing(doing)?;
    let propagation = AttributeChange {
        propagation: options.propagation.kind,
        recursive: options.propagation.recursive,
        ..AttributeChange::default()
    };
    change(tree.as_fd(), propagation).doing(doing)
}

/// A tmpfs becomes read-only when all is mounted: mount points in it have to be made first.
fn is_late_read_only(plan: &MountPlan) -> bool {
    let tmpfs = matches!(&plan.what, MountKind::FileSystem { kind, .. } if kind.as_c_str() == c"tmpfs");
    tmpfs && plan.options.attributes.set & libc::MOUNT_ATTR_RDONLY != 0
}

pub(crate) fn file_system<'a>(
    kind: &CStr,
    parameters: impl Iterator<Item = (&'a CStr, Option<&'a CStr>)>,
    doing: impl Fn() -> String,
) -> Result<OwnedFd, StepError> {
    let context = open_file_system(kind).doing(&doing)?;
    for (name, value) in parameters {
        set_parameter(context.as_fd(), name, value)
            .doing(|| format!("{}: option {}", doing(), name.to_string_lossy()))?;
    }
    create_file_system(context.as_fd()).doing(&doing)?;
    mount_file_system(context.as_fd()).doing(&doing)
}

fn change(mount: BorrowedFd<'_>, change: AttributeChange) -> nix::Result<()> {
    let nothing = AttributeChange { recursive: change.recursive, ..AttributeChange::default() };
    if change == nothing { Ok(()) } else { set_attributes(mount, change) }
}

/// The usual nodes, in a `/dev` that is the container's own. Who binds another directory there brings his own nodes.
fn make_devices(root: &Root, plan: &RootPlan) -> Result<(), StepError> {
    let is_dev = |mount: &&MountPlan| mount.destination.trim_end_matches('/') == "/dev";
    let last = plan.mounts.iter().rev().find(is_dev);
    if !last.is_some_and(|mount| matches!(mount.what, MountKind::FileSystem { .. })) {
        // Nodes would be made in somebody else's directory.
        return match plan.devices.first() {
            None => Ok(()),
            Some(device) => {
                let doing = format!("Cannot make {} in a /dev that is not the container's own", device.path);
                Err(StepError::new(doing, Errno::EPERM))
            }
        };
    }
    plan.devices.iter().try_for_each(|device| make_device(root, device))?;
    let present = |made: nix::Result<()>| if made == Err(Errno::EEXIST) { Ok(()) } else { made };
    let dev = root.open("/dev", OFlag::O_PATH | OFlag::O_DIRECTORY).doing(|| "Cannot open /dev")?;
    for (name, major, minor) in DEVICES {
        let mode = Mode::from_bits_truncate(0o666);
        present(mknodat(&dev, name, SFlag::S_IFCHR, mode, makedev(major, minor)))
            .doing(|| format!("Cannot make the device node /dev/{name}"))?;
    }
    for (name, to) in LINKS {
        present(symlinkat(to, &dev, name)).doing(|| format!("Cannot make the link /dev/{name}"))?;
    }
    Ok(())
}

/// A node that the container asks for. Among the usual ones it stands for the one of its name.
fn make_device(root: &Root, device: &Device) -> Result<(), StepError> {
    let doing = || format!("Cannot make the device node {}", device.path);
    let Some((directory, name)) = device.path.rsplit_once('/') else {
        return Err(StepError::new(doing(), Errno::EINVAL));
    };
    let directory = root.make(directory, true).doing(doing)?;
    let kind = match device.kind {
        DeviceKind::Char => SFlag::S_IFCHR,
        DeviceKind::Block => SFlag::S_IFBLK,
    };
    let mode = Mode::from_bits_truncate(device.mode & 0o777);
    mknodat(&directory, name, kind, mode, makedev(device.major.into(), device.minor.into())).doing(doing)?;
    let (user, group) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    fchownat(&directory, name, Some(user), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW).doing(doing)
}

fn make_read_only(root: &Root, path: &str) -> Result<(), StepError> {
    let doing = || format!("Cannot make {path} read-only");
    let place = root.open(path, OFlag::O_PATH).doing(doing)?;
    set_attributes(place.as_fd(), READ_ONLY).doing(doing)
}

/// Hides a path, if it exists.
fn mask(root: &Root, path: &str, null: BorrowedFd<'_>) -> Result<(), StepError> {
    let doing = || format!("Cannot mask {path}");
    let Some(place) = existing(root, path).doing(doing)? else { return Ok(()) };
    // Read-only also for the device node, which is the guest's: its mode must not be changed through this mount.
    let tree = if is_directory(place.as_fd()).doing(doing)? {
        file_system(c"tmpfs", [(c"nr_inodes", Some(c"2"))].into_iter(), doing)?
    } else {
        clone_tree(null, c"", false).doing(doing)?
    };
    set_attributes(tree.as_fd(), READ_ONLY).doing(doing)?;
    attach(tree.as_fd(), place.as_fd()).doing(doing)
}

/// Makes a path read-only with everything below, if it exists.
fn protect(root: &Root, path: &str) -> Result<(), StepError> {
    let doing = || format!("Cannot make {path} read-only");
    let Some(place) = existing(root, path).doing(doing)? else { return Ok(()) };
    let tree = clone_tree(place.as_fd(), c"", true).doing(doing)?;
    set_attributes(tree.as_fd(), AttributeChange { recursive: true, ..READ_ONLY }).doing(doing)?;
    attach(tree.as_fd(), place.as_fd()).doing(doing)
}

fn existing(root: &Root, path: &str) -> nix::Result<Option<OwnedFd>> {
    match root.open(path, OFlag::O_PATH) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        found => found.map(Some),
    }
}

fn is_directory(place: BorrowedFd<'_>) -> nix::Result<bool> {
    let mode = SFlag::from_bits_truncate(fstat(place)?.st_mode);
    Ok(mode & SFlag::S_IFMT == SFlag::S_IFDIR)
}

impl MountKind {
    fn name(&self) -> String {
        match self {
            Self::Bind { source, .. } => source.to_string_lossy().into_owned(),
            Self::FileSystem { kind, .. } => kind.to_string_lossy().into_owned(),
            Self::Shm { .. } => "the pod's shared memory".into(),
            Self::Live { source, .. } => source.to_string_lossy().into_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    /// A directory that goes away with the test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("krx-agent-{name}-{}", std::process::id()));
            fs::create_dir_all(path.join("root")).unwrap();
            Self(path)
        }

        fn root(&self) -> Root {
            Root(open(&self.0.join("root"), OFlag::O_PATH, Mode::empty()).unwrap())
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn places_are_made_inside_whatever_the_links_of_the_image_say() {
        let scratch = Scratch::new("links");
        let at = |path: &str| scratch.0.join(path);
        symlink("../..", at("root/up")).unwrap();
        symlink("/", at("root/top")).unwrap();
        let root = scratch.root();
        root.make("/up/made", true).unwrap();
        root.make("/top/file", false).unwrap();
        root.make("/../../a/b/../c", true).unwrap();
        assert!(at("root/made").is_dir());
        assert!(at("root/file").is_file());
        assert!(at("root/a/c").is_dir());
        assert!(!at("made").exists());
    }

    #[test]
    fn dangling_links_are_followed_inside_the_root() {
        let scratch = Scratch::new("dangling");
        let at = |path: &str| scratch.0.join(path);
        symlink("/../../outside/of", at("root/absolute")).unwrap();
        symlink("../above", at("root/relative")).unwrap();
        symlink("relative", at("root/second")).unwrap();
        let root = scratch.root();
        root.make("/absolute/file", false).unwrap();
        root.make("/second", true).unwrap();
        assert!(at("root/outside/of/file").is_file());
        assert!(at("root/above").is_dir());
        assert!(!at("outside").exists() && !at("above").exists());
    }

    #[test]
    fn looping_and_magic_links_are_refused() {
        let scratch = Scratch::new("loops");
        let at = |path: &str| scratch.0.join(path);
        symlink("loop", at("root/loop")).unwrap();
        symlink("b/x", at("root/a")).unwrap();
        symlink("a/x", at("root/b")).unwrap();
        for number in 0..MAX_LINKS + 2 {
            symlink(format!("l{}", number + 1), at(&format!("root/l{number}"))).unwrap();
        }
        let root = scratch.root();
        for path in ["/loop", "/a", "/b/c", "/l0"] {
            assert_eq!(root.make(path, true).unwrap_err(), Errno::ELOOP, "{path}");
        }
        let system = Root::own().unwrap();
        assert_eq!(system.open("/proc/self/fd/0", OFlag::O_PATH).unwrap_err(), Errno::ELOOP);
    }
}
