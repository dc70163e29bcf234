//! Directories on top of each other (overlayfs.rst in the kernel's documentation), in this process's own mount namespace: nobody
//! else sees them, and they go with it, also when it is killed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Gives the calling thread, and those it starts later, a mount namespace in which mounts are made that the host does not
/// see. It still sees the host's.
///
/// # Errors
/// This process may not: it wants `CAP_SYS_ADMIN`.
pub fn private_mounts() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    Ok(mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?)
}

/// A name for what is open, for calls that take no handles.
pub(crate) fn fd_path(file: impl AsFd) -> String {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())
}

/// A mounted overlay, unmounted when dropped.
pub(crate) struct Overlay {
    at: PathBuf,
}

impl Overlay {
    /// Mounts `layers`, the lowest first, at `at`, below a directory for what is written.
    pub(crate) fn mount(layers: &[PathBuf], upper: &Path, work: &Path, at: &Path) -> io::Result<Self> {
        // By handles: paths could have characters that mean something in options, and all of them have to fit in a page.
        let handles: Vec<OwnedFd> =
            layers.iter().rev().map(|layer| Ok(File::open(layer)?.into())).collect::<io::Result<_>>()?;
        let (upper, work): (OwnedFd, OwnedFd) = (File::open(upper)?.into(), File::open(work)?.into());
        let lower: Vec<_> = handles.iter().map(fd_path).collect();
        let options =
            format!("lowerdir={},upperdir={},workdir={}", lower.join(":"), fd_path(&upper), fd_path(&work));
        mount(Some("overlay"), at, Some("overlay"), MsFlags::empty(), Some(options.as_str()))?;
        Ok(Self { at: at.into() })
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        // Somebody may still be in it.
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}
