//! The jail's namespaces and its root directory.
//!
//! ```text
//! /                     tmpfs, read-only
//! ├── share             the pod's share, see `share.rs`
//! ├── vsock             the directory of the VM's sockets, in the pod's own directory on the host
//! ├── control           that of its control socket, where it is another one
//! └── proc/self/fd      this process's descriptors, by which the file server opens what it has looked up
//! ```
//!
//! The network namespace is empty: interfaces are taps that were inherited, and the unix sockets with abstract names that
//! many programs of a host listen on are not in it. The old root is unmounted.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::CloneFlags;
use nix::unistd::{chdir, pivot_root};

use super::{JailError, SHARE};
use crate::config::ValidConfig;
use crate::share;
use crate::sys::{self, MountAttributes};

/// Where the new root is mounted before it is the root. Nothing is opened there any more, and every host has it.
const BASE: &str = "/dev";
/// The root holds places and nothing else.
const OPTIONS: &str = "size=64k,nr_inodes=32,mode=755";
const DESCRIPTORS: &str = "/proc/self/fd";
/// The file server opens it, and reads it for a feature that is off: an empty one is enough.
const MOUNTINFO: &str = "/proc/self/mountinfo";

/// A tree of mounts that goes into the jail.
struct Tree {
    place: PathBuf,
    mounts: OwnedFd,
}

/// Makes the namespaces and the root, enters it, and changes the paths of `config` to what they are there. Returns the
/// directories of the sockets.
///
/// # Errors
/// What the host does not let it mount, or does not have.
pub(super) fn enter(config: &mut ValidConfig) -> Result<Vec<PathBuf>, JailError> {
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWNET;
    share::take_namespaces(namespaces).map_err(JailError::Namespaces)?;
    let mut trees = directories(config)?;
    let places = trees.iter().map(|tree| tree.place.clone()).collect();
    let failed = |what| move |source| JailError::Root { what, source };
    let descriptors = sys::clone_tree(Path::new(DESCRIPTORS), false).map_err(failed(DESCRIPTORS))?;
    trees.push(Tree { place: DESCRIPTORS.into(), mounts: descriptors });
    if let Some(pod) = &mut config.share {
        share::build(pod).map_err(JailError::Share)?;
        // Not a copy: the mount itself is moved.
        let mut open = OpenOptions::new();
        let root = open.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(&pod.root);
        trees.push(Tree { place: SHARE.into(), mounts: root.map_err(failed("the share"))?.into() });
        pod.root = SHARE.into();
    }
    become_root(&trees)?;
    Ok(places)
}

/// Copies of the directories that hold the VM's sockets; in `config`, they are where they will be. Of the pod's own
/// directory, no more is left than that of its sockets.
fn directories(config: &mut ValidConfig) -> Result<Vec<Tree>, JailError> {
    let mut trees: Vec<(PathBuf, Tree)> = Vec::new();
    let mut place_of = |directory: &Path, place: &str, path: &Path| {
        if let Some((_, tree)) = trees.iter().find(|(known, _)| known == directory) {
            return Ok(tree.place.clone());
        }
        let tree = Tree { place: place.into(), mounts: copy(directory, path)? };
        trees.push((directory.into(), tree));
        Ok(PathBuf::from(place))
    };
    let pod = config.state_dir.take();
    for (socket, place) in [(&mut config.vsock, "/vsock"), (&mut config.control, "/control")] {
        let Some(path) = socket else { continue };
        // A path without a file name cannot be listened on: the socket says so.
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else { continue };
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        let place = place_of(directory, place, path)?;
        // Not the whole of the pod's own: by what else is there the VMM is judged.
        let is_pods = pod.as_deref().is_some_and(|pod| directory.starts_with(pod) && directory != pod);
        *path = place.join(name);
        if is_pods {
            config.state_dir = Some(place);
        }
    }
    Ok(trees.into_iter().map(|(_, tree)| tree).collect())
}

fn copy(directory: &Path, path: &Path) -> Result<OwnedFd, JailError> {
    let failed = |source| JailError::Directory { path: path.into(), source };
    if directory.canonicalize().map_err(failed)? == Path::new("/") {
        return Err(JailError::WholeRoot(path.into()));
    }
    let mounts = sys::clone_tree(directory, false).map_err(failed)?;
    let attributes = MountAttributes { read_only: false, recursive: false };
    sys::restrict_tree(mounts.as_fd(), attributes).map_err(failed)?;
    Ok(mounts)
}

fn become_root(trees: &[Tree]) -> Result<(), JailError> {
    let failed = |what| move |source: io::Error| JailError::Root { what, source };
    let refused = |what| move |source: nix::Error| JailError::Root { what, source: source.into() };
    let base = Path::new(BASE);
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("krx-jail"), base, Some("tmpfs"), flags, Some(OPTIONS)).map_err(refused("tmpfs"))?;
    for Tree { place, mounts } in trees {
        let place = within(base, place);
        DirBuilder::new().recursive(true).mode(0o755).create(&place).map_err(failed("its places"))?;
        sys::attach_tree(mounts.as_fd(), &place).map_err(failed("its mounts"))?;
    }
    File::create(within(base, Path::new(MOUNTINFO))).map_err(failed("its files"))?;
    let attributes = MountAttributes { read_only: true, recursive: false };
    sys::restrict_mount(base, attributes).map_err(failed("read-only"))?;
    // The new root is mounted over the old one, which is then the mount at the working directory (pivot_root(2)).
    chdir(base).map_err(refused("its directory"))?;
    pivot_root(".", ".").map_err(refused("pivot_root; a root of the type `rootfs` cannot be left"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(refused("the host's root does not go"))?;
    chdir("/").map_err(refused("its directory"))
}

fn within(base: &Path, place: &Path) -> PathBuf {
    base.join(place.strip_prefix("/").unwrap_or(place))
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;
    use crate::config::Config;

    fn config(state: &Path, vsock: &Path, control: &Path) -> ValidConfig {
        let mut config = Config::from_json(br#"{"kernel":"/k","memory_mib":128,"vcpus":1}"#).unwrap();
        config.state_dir = Some(state.into());
        config.vsock = Some(vsock.into());
        config.control = Some(control.into());
        config.validate().unwrap()
    }

    /// Needs root, as `open_tree` does.
    #[test]
    fn paths_are_those_of_the_jail() {
        let (pod, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let sockets = pod.as_path().join("sockets");
        std::fs::create_dir(&sockets).unwrap();
        let mut config = config(pod.as_path(), &sockets.join("v.sock"), &other.as_path().join("c.sock"));
        match directories(&mut config) {
            Err(_) => eprintln!("SKIP: mounting needs root"),
            Ok(trees) => {
                let places: Vec<_> = trees.iter().map(|tree| tree.place.to_str().unwrap()).collect();
                assert_eq!(places, ["/vsock", "/control"]);
                assert_eq!(config.state_dir.unwrap(), Path::new("/vsock"));
                assert_eq!(config.vsock.unwrap(), Path::new("/vsock/v.sock"));
                assert_eq!(config.control.unwrap(), Path::new("/control/c.sock"));
            }
        }
    }

    #[test]
    fn whole_root_and_missing_directories_are_refused() {
        let socket = Path::new("/v.sock");
        assert!(matches!(copy(Path::new("/tmp/.."), socket), Err(JailError::WholeRoot(_))));
        assert!(matches!(copy(Path::new("/nonexistent"), socket), Err(JailError::Directory { .. })));
    }
}
