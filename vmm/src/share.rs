//! The pod's share: one directory tree for the guest, put together of bind mounts in a mount namespace of the VMM's own.
//!
//! Because the mounts exist in this namespace only, none of them can outlive the process, whatever ends it. What is
//! shared read-only is mounted so, recursively: the host's kernel enforces it, not the guest. No mount below the share
//! honours device nodes: a guest may make one, and must not have the host open it.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount as mount_at};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::{Share, ShareEntry};
use crate::sys::{self, MountAttributes};

/// The tree holds mount points only; what the guest tries to put there beside them has no room.
const TREE_OPTIONS: &str = "size=1m,nr_inodes=4k,mode=755";

/// Descriptors the VMM may hold. A guest can make it hold as many as it may have, by opening files again and again: each
/// costs memory of the host's kernel, and hard limits of a billion are common.
const MAX_DESCRIPTORS: u64 = 65_536;

/// Why the share cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    #[error(
        "Cannot make a mount namespace: the VMM needs root (CAP_SYS_ADMIN) to share files with its guest"
    )]
    Namespace(#[source] nix::Error),
    #[error("Cannot mount the share on {root}")]
    Root {
        root: PathBuf,
        #[source]
        source: nix::Error,
    },
    #[error("Cannot share {path}: nothing can be read there")]
    Source {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Cannot make the place {name} for {path} in the share")]
    Place {
        name: String,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Cannot mount {path} into the share")]
    Bind {
        path: PathBuf,
        #[source]
        source: nix::Error,
    },
    #[error("Cannot restrict the mount of {path}; Linux 5.12 or later is needed")]
    Restrict {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Builds the tree in a mount namespace of its own. To be called before the process has a second thread: a mount namespace
/// is a thread's own.
///
/// # Errors
/// [`ShareError`]: what is missing, or not permitted.
pub fn mount(share: &Share) -> Result<(), ShareError> {
    take_namespaces(CloneFlags::CLONE_NEWNS).map_err(ShareError::Namespace)?;
    build(share)
}

/// Takes new namespaces, a mount namespace among them.
pub(crate) fn take_namespaces(namespaces: CloneFlags) -> nix::Result<()> {
    unshare(namespaces)?;
    let none = None::<&str>;
    // A slave: what the host unmounts goes here, too, or the VMM would hold it; nothing travels the other way. The share
    // itself is cut off below: a mount that came into it later would be writable, and honour device nodes.
    mount_at(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
}

/// Builds the tree, in the mount namespace there is.
///
/// # Errors
/// [`ShareError`]: what is missing, or not permitted.
pub(crate) fn build(share: &Share) -> Result<(), ShareError> {
    let failed = |source| ShareError::Root { root: share.root.clone(), source };
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_at(Some("krx"), &share.root, Some("tmpfs"), flags, Some(TREE_OPTIONS)).map_err(failed)?;
    for entry in &share.entries {
        bind(&share.root, entry)?;
    }
    restrict(&share.root, MountAttributes { read_only: true, recursive: false })?;
    raise_descriptor_limit();
    Ok(())
}

fn bind(root: &Path, ShareEntry { name, source: path, read_only }: &ShareEntry) -> Result<(), ShareError> {
    let metadata = fs::metadata(path).map_err(|source| ShareError::Source { path: path.clone(), source })?;
    let place = root.join(name);
    let made = if metadata.is_dir() {
        DirBuilder::new().mode(0o755).create(&place)
    } else {
        File::create(&place).map(drop)
    };
    made.map_err(|source| ShareError::Place { name: name.clone(), path: path.clone(), source })?;
    let none = None::<&str>;
    // Recursive: file systems mounted below a volume belong to it.
    mount_at(Some(path), &place, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .map_err(|source| ShareError::Bind { path: path.clone(), source })?;
    restrict(&place, MountAttributes { read_only: *read_only, recursive: true })
}

fn restrict(path: &Path, attributes: MountAttributes) -> Result<(), ShareError> {
    sys::restrict_mount(path, attributes).map_err(|source| ShareError::Restrict { path: path.into(), source })
}

/// A file server needs a descriptor for each file the guest knows, up to [`MAX_DESCRIPTORS`]. Where the limit cannot be
/// raised, the guest meets it earlier. (The umask is cleared by the library, when the guest begins.)
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let limit = hard.min(MAX_DESCRIPTORS);
        let _ = setrlimit(Resource::RLIMIT_NOFILE, limit, limit);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    const NONE: Option<&str> = None;

    /// Options of the mount at `path` in the namespace of the calling thread.
    fn options(path: &Path) -> Option<String> {
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let mut found = fields.filter(|fields| Path::new(fields[4]) == path);
        found.next().map(|fields| fields[5..7].join(" "))
    }

    /// The host's side: its own namespace, with a shared tmpfs at `host` that has a mount in the volume.
    fn make_host(host: &Path) -> nix::Result<()> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount_at(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
        mount_at(Some("host"), host, Some("tmpfs"), MsFlags::empty(), NONE)?;
        mount_at(NONE, host, NONE, MsFlags::MS_SHARED, NONE)?;
        for place in ["share", "volume/early", "volume/late"] {
            fs::create_dir_all(host.join(place)).unwrap();
        }
        mount_at(Some("early"), &host.join("volume/early"), Some("tmpfs"), MsFlags::empty(), NONE)
    }

    /// Needs root; a host that does not let it mount is as good as none.
    #[test]
    fn mounts_made_later_do_not_appear_in_the_share() {
        let directory = TempDir::new().unwrap();
        let host = directory.as_path().to_path_buf();
        let test = move || {
            if make_host(&host).is_err() {
                eprintln!("SKIP: mounting needs root");
                return;
            }
            let (built, wait_built) = mpsc::channel();
            let (mounted, wait_mounted) = mpsc::channel();
            let root = host.join("share");
            let entry = ShareEntry { name: "volume".into(), source: host.join("volume"), read_only: true };
            // A namespace is a thread's own, and a new thread has that of its parent.
            let vmm = thread::spawn(move || {
                mount(&Share { root: root.clone(), entries: vec![entry] }).unwrap();
                built.send(()).unwrap();
                wait_mounted.recv().unwrap();
                ["", "volume", "volume/early", "volume/late"].map(|place| options(&root.join(place)))
            });
            wait_built.recv().unwrap();
            let late = host.join("volume/late");
            mount_at(Some("late"), &late, Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
            mounted.send(()).unwrap();
            let [tree, volume, early, late] = vmm.join().unwrap();
            // No optional field (`shared:`, `master:`) stands before the separator.
            for options in [tree, volume, early] {
                let options = options.unwrap();
                assert!(options.starts_with("ro,nosuid,nodev,") && options.ends_with(" -"), "{options}");
            }
            assert_eq!(late, None);
        };
        // On a thread of its own: what it does to its namespace must not meet another test.
        thread::spawn(test).join().unwrap();
    }
}
