//! Additions to the share of a VM that already runs: the root file systems and volumes of containers that come later.
//!
//! All of it happens out of the host's sight. What is to be shared is mounted in a mount namespace that lives as long as
//! one thread, copied from there into trees that are attached nowhere, and these are moved into the mount namespace of
//! the VMM. So no mount can stay on the host, whoever dies when; the VMM's own are gone with it.
//!
//! The mounts that make up the share of a VM from its start are made by the VMM itself, with the same restrictions.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use krx_vmm::config::ShareEntry;
use krx_vmm::sys::{self, MountAttributes};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::container::{Container, ContainerError};
use crate::vmm_process::VmmProcess;

/// Why something cannot be shared with a VM that runs.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    #[error("Cannot make a mount namespace: sharing files with a guest needs root (CAP_SYS_ADMIN)")]
    Namespace(#[source] Errno),
    #[error("Root file system cannot be mounted")]
    Rootfs(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error(transparent)]
    Container(#[from] ContainerError),
    #[error("Cannot share {path}")]
    Source {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("The VMM is gone, and with it the share")]
    VmmEnded(#[source] io::Error),
    #[error("Cannot put {name} into the share")]
    Place {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("Thread for the mounts cannot be made")]
    Thread(#[source] io::Error),
}

/// Trees of mounts that are ready to be put into a share.
#[derive(Debug)]
pub struct Prepared(Vec<Tree>);

#[derive(Debug)]
struct Tree {
    name: String,
    is_directory: bool,
    mounts: OwnedFd,
}

/// What was put into a share.
#[derive(Debug, Clone, Default)]
pub struct Placed(Vec<(String, bool)>);

impl Prepared {
    /// Prepares all that `container` shares. `mount_rootfs` mounts its root file system where `container` says it is, in a
    /// mount namespace that nobody else sees; one that is on the host already has nothing to do.
    ///
    /// # Errors
    /// [`ShareError`]: what cannot be mounted, or is not there.
    pub fn new<E: std::error::Error + Send + Sync + 'static>(
        container: &mut Container,
        mount_rootfs: impl FnOnce(&Path) -> Result<(), E> + Send,
    ) -> Result<Self, ShareError> {
        on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNS).map_err(ShareError::Namespace)?;
            let none = None::<&str>;
            // A slave: nothing that is mounted here is seen on the host.
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
                .map_err(ShareError::Namespace)?;
            mount_rootfs(container.rootfs()).map_err(|error| ShareError::Rootfs(error.into()))?;
            container.finish()?;
            container.shared().iter().map(Tree::new).collect::<Result<_, _>>().map(Self)
        })
    }

    /// Puts everything into the share that `vmm` has at `root`.
    ///
    /// # Errors
    /// The VMM has ended, or its share is full. What was put there already is taken away.
    pub fn place(self, vmm: &VmmProcess, root: &Path) -> Result<Placed, ShareError> {
        on_own_thread(|| {
            enter(vmm)?;
            let mut placed = Placed::default();
            for tree in &self.0 {
                if let Err(source) = tree.place(root) {
                    placed.take_away(root);
                    return Err(ShareError::Place { name: tree.name.clone(), source });
                }
                placed.0.push((tree.name.clone(), tree.is_directory));
            }
            Ok(placed)
        })
    }
}

impl Placed {
    /// Takes everything out of the share again. Files that the guest has open stay open.
    ///
    /// # Errors
    /// The VMM has ended, and all is gone anyway.
    pub fn remove(&self, vmm: &VmmProcess, root: &Path) -> Result<(), ShareError> {
        on_own_thread(|| {
            enter(vmm)?;
            self.take_away(root);
            Ok(())
        })
    }

    fn take_away(&self, root: &Path) {
        let Ok(places) = writable(root) else { return };
        for (name, is_directory) in &self.0 {
            let _ = umount2(&root.join(name), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            let kind = if *is_directory { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
            let _ = unlinkat(&places, name.as_str(), kind);
        }
    }
}

impl Tree {
    fn new(ShareEntry { name, source: path, read_only }: &ShareEntry) -> Result<Self, ShareError> {
        let tree = || -> io::Result<Self> {
            let is_directory = path.metadata()?.is_dir();
            // Recursive: file systems mounted below a volume belong to it.
            let mounts = sys::clone_tree(path, true)?;
            let attributes = MountAttributes { read_only: *read_only, recursive: true };
            sys::restrict_tree(mounts.as_fd(), attributes)?;
            Ok(Self { name: name.clone(), is_directory, mounts })
        };
        tree().map_err(|source| ShareError::Source { path: path.clone(), source })
    }

    fn place(&self, root: &Path) -> io::Result<()> {
        let places = writable(root)?;
        let name = self.name.as_str();
        if self.is_directory {
            mkdirat(&places, name, Mode::from_bits_truncate(0o755))?;
        } else {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
            openat(&places, name, flags, Mode::from_bits_truncate(0o644)).map(drop)?;
        }
        sys::attach_tree(self.mounts.as_fd(), &root.join(name))
    }
}

/// The directory of the share's places. Where the guest sees it, it is read-only; this is a copy that is attached nowhere.
fn writable(root: &Path) -> io::Result<OwnedFd> {
    let places = sys::clone_tree(root, false)?;
    sys::make_tree_writable(places.as_fd())?;
    Ok(places)
}

/// Enters the mount namespace of the VMM, for the rest of the calling thread's life.
fn enter(vmm: &VmmProcess) -> Result<(), ShareError> {
    let namespace = File::open(format!("/proc/{}/ns/mnt", vmm.pid())).map_err(ShareError::VmmEnded)?;
    // Looked at after the opening: a PID belongs to the VMM until its end is known.
    if vmm.has_ended() {
        return Err(ShareError::VmmEnded(Errno::ESRCH.into()));
    }
    // A mount namespace can only be changed by who shares neither root nor working directory.
    unshare(CloneFlags::CLONE_FS).map_err(ShareError::Namespace)?;
    setns(&namespace, CloneFlags::CLONE_NEWNS).map_err(ShareError::Namespace)
}

/// Runs `work` on a thread whose namespaces may be changed, as nobody uses it afterwards.
fn on_own_thread<T: Send>(work: impl FnOnce() -> Result<T, ShareError> + Send) -> Result<T, ShareError> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("share".into()).spawn_scoped(scope, work);
        let result = worker.map_err(ShareError::Thread)?.join();
        result.unwrap_or_else(|_| Err(ShareError::Thread(io::ErrorKind::Other.into())))
    })
}
