//! Carries out the file system part of a plan, in a mount namespace that is the container's already: its root, its
//! mounts, its device nodes, and what is hidden or read-only in it.
//!
//! The image and the volumes are hostile. Every path in the container is resolved by the kernel with the container's
//! root as its limit (`RESOLVE_IN_ROOT`) and mounts are attached to what was found, by descriptor, so that no symbolic
//! link can lead out and no path is looked up twice.
//!
//! The container's root is mounted over the guest's, which goes away when all is done (pivot_root(2)), and all of its mounts
//! with it.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use krx_proto::{AgentError, Device};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlinkat};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat, makedev, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, fchdir, fchown, pivot_root, symlinkat};

use crate::container::{MountKind, MountPlan, RootPlan};
use crate::copying::{Budget, copy_directory};
use crate::error::{Doing, StepError};
use crate::guest::open_path;
use crate::sources::make_node;
use crate::sys::mount::{
    AttributeChange, attach, clone_tree, create_file_system, mount_file_system, open_file_system,
    set_attributes, set_parameter,
};

/// Dangling links of the image that are followed to make one path, as many as the kernel follows (path_resolution(7)).
/// Stops links that lead to each other.
const MAX_LINKS: u32 = 40;

/// Directories in each other that are copied into a tmpfs. Some of each are open at a time.
const MAX_COPY_DEPTH: u32 = 64;

/// Device nodes that every container has: name, major and minor number.
pub(crate) const DEVICES: [(&str, u64, u64); 6] =
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
        Ok(Self(open_path(c"/").doing(|| "Cannot open the container's root")?))
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

/// Makes the container's file system view and enters it. `next` gives what the guest has for it, in the order of `sources`.
/// `cwd` is made where it is missing, while that can be done.
pub(crate) fn enter(
    plan: &RootPlan,
    cwd: &str,
    mut next: impl FnMut() -> Result<OwnedFd, AgentError>,
) -> Result<Root, AgentError> {
    let null = open_path(c"/dev/null").doing(|| "Cannot open the guest's /dev/null")?;
    let root = attach_root(next()?)?;
    for mount in &plan.mounts {
        let source = if mount.has_source() { Some(next()?) } else { None };
        mount_one(&root, mount, source)?;
    }
    make_devices(&root, plan, next)?;
    root.make(cwd, true).doing(|| format!("Cannot make the working directory {cwd}"))?;
    for mount in plan.mounts.iter().filter(|mount| is_late_read_only(mount)) {
        make_read_only(&root, &mount.destination)?;
    }
    plan.masked.iter().try_for_each(|path| mask(&root, path, null.as_fd()))?;
    plan.readonly_paths.iter().try_for_each(|path| protect(&root, path))?;
    if plan.readonly {
        set_attributes(root.0.as_fd(), READ_ONLY).doing(|| "Cannot make the root read-only")?;
    }
    leave_guest(&root)?;
    Ok(root)
}

/// Mounts the root over the guest's, whose paths still lead where they did.
fn attach_root(root: OwnedFd) -> Result<Root, StepError> {
    let doing = || "Cannot mount the container's root";
    let guest = open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).doing(doing)?;
    attach(root.as_fd(), guest.as_fd()).doing(doing)?;
    Ok(Root(root))
}

/// Makes the container's root that of the calling process, and takes the guest's mounts out of its namespace. Not earlier:
/// in a user namespace Linux lets mount a `/proc` only where another one is in sight, and bind only what is mounted.
fn leave_guest(root: &Root) -> Result<(), StepError> {
    let doing = || "Cannot leave the guest's mounts";
    let guest = open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).doing(doing)?;
    fchdir(root.0.as_fd()).doing(doing)?;
    // The guest's root is mounted over the new one, from where it is taken away (pivot_root(2), NOTES).
    pivot_root(".", ".").doing(doing)?;
    fchdir(&guest).doing(doing)?;
    umount2(".", MntFlags::MNT_DETACH).doing(doing)?;
    fchdir(root.0.as_fd()).doing(doing)
}

fn mount_one(root: &Root, plan: &MountPlan, source: Option<OwnedFd>) -> Result<(), StepError> {
    let MountPlan { destination, what, options, .. } = plan;
    let doing = || format!("Cannot mount {} on {destination}", what.name());
    let tree = match (source, what) {
        (Some(source), _) => source,
        (None, MountKind::FileSystem { kind, parameters }) => {
            let parameters = parameters.iter().map(|(name, value)| (name.as_c_str(), value.as_deref()));
            file_system(kind, parameters, doing)?
        }
        (None, _) => return Err(StepError::new(doing(), Errno::EINVAL)),
    };
    if options.copy_up {
        copy_up(root, destination, &tree, what)
            .doing(|| format!("Cannot copy what is in {destination} into its tmpfs"))?;
    }
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

/// Fills a tmpfs with what is in the directory that it will be mounted on. It has a limit of its own, and the owner and mode that
/// its options say.
fn copy_up(root: &Root, destination: &str, tree: &OwnedFd, what: &MountKind) -> nix::Result<()> {
    let from = match root.open(destination, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
        Err(Errno::ENOENT) => return Ok(()),
        found => found?,
    };
    let to = openat(tree, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let own = fstat(&to)?;
    copy_directory(&from, &to, &mut Budget { bytes: u64::MAX, entries: u64::MAX, depth: MAX_COPY_DEPTH })?;
    let MountKind::FileSystem { parameters, .. } = what else { return Ok(()) };
    let says = |option: &CStr| parameters.iter().any(|(name, _)| name.as_c_str() == option);
    let (uid, gid) =
        (says(c"uid").then(|| Uid::from_raw(own.st_uid)), says(c"gid").then(|| Gid::from_raw(own.st_gid)));
    fchown(&to, uid, gid)?;
    if says(c"mode") { fchmod(&to, Mode::from_bits_truncate(own.st_mode & 0o7777)) } else { Ok(()) }
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

/// The usual nodes, in a `/dev` that is the container's own.
fn make_devices(
    root: &Root,
    plan: &RootPlan,
    next: impl FnMut() -> Result<OwnedFd, AgentError>,
) -> Result<(), AgentError> {
    if !plan.has_own_dev() {
        // Nodes would be made in somebody else's directory.
        return match plan.devices.first() {
            None => Ok(()),
            Some(device) => {
                let doing = format!("Cannot make {} in a /dev that is not the container's own", device.path);
                Err(StepError::new(doing, Errno::EPERM).into())
            }
        };
    }
    let dev = root.open("/dev", OFlag::O_PATH | OFlag::O_DIRECTORY).doing(|| "Cannot open /dev")?;
    if plan.binds_devices() {
        bind_devices(root, plan, next)?;
    } else {
        plan.devices.iter().try_for_each(|device| make_device(root, device))?;
        for (name, major, minor) in DEVICES {
            let mode = Mode::from_bits_truncate(0o666);
            unless_there(mknodat(&dev, name, SFlag::S_IFCHR, mode, makedev(major, minor)))
                .doing(|| format!("Cannot make the device node /dev/{name}"))?;
        }
    }
    for (name, to) in LINKS {
        unless_there(symlinkat(to, &dev, name)).doing(|| format!("Cannot make the link /dev/{name}"))?;
    }
    Ok(())
}

fn unless_there(made: nix::Result<()>) -> nix::Result<()> {
    if made == Err(Errno::EEXIST) { Ok(()) } else { made }
}

/// A node that the container asks for. Among the usual ones it stands for the one of its name.
fn make_device(root: &Root, device: &Device) -> Result<(), StepError> {
    let doing = || format!("Cannot make the device node {}", device.path);
    let Some((directory, name)) = device.path.rsplit_once('/') else {
        return Err(StepError::new(doing(), Errno::EINVAL));
    };
    let directory = root.make(directory, true).doing(doing)?;
    make_node(&directory, name, device).doing(doing)
}

/// Nodes that were made in the guest. A usual one is left out where the container's mounts have another.
fn bind_devices(
    root: &Root,
    plan: &RootPlan,
    mut next: impl FnMut() -> Result<OwnedFd, AgentError>,
) -> Result<(), AgentError> {
    for (index, device) in plan.bound.iter().enumerate() {
        let doing = || format!("Cannot bind the device node {}", device.path);
        let node = next()?;
        let is_usual = index >= plan.devices.len();
        if is_usual && existing(root, &device.path).doing(doing)?.is_some() {
            continue;
        }
        let place = root.make(&device.path, false).doing(doing)?;
        attach(node.as_fd(), place.as_fd()).doing(doing)?;
    }
    Ok(())
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

pub(crate) fn is_directory(place: BorrowedFd<'_>) -> nix::Result<bool> {
    let mode = SFlag::from_bits_truncate(fstat(place)?.st_mode);
    Ok(mode & SFlag::S_IFMT == SFlag::S_IFDIR)
}

impl MountKind {
    pub(crate) fn name(&self) -> String {
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
