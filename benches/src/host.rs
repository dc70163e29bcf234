//! Where a benchmark runs, and the place there in which nothing is slower than memory.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount, umount};
use nix::unistd::mkdtemp;

/// Set by `tests/kvm-host` for what runs in an emulated host; `icount` where time is counted.
const INSIDE: &str = "KRX_KVM_HOST_INSIDE";

/// Whether the clock counts instructions.
#[must_use]
pub fn is_counting() -> bool {
    std::env::var(INSIDE).is_ok_and(|mode| mode == "icount")
}

/// The repository's root.
#[must_use]
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).into()
}

/// A tmpfs of its own with all that is executed and read: a page that is fetched from elsewhere would be measured.
#[derive(Debug)]
pub struct Memory(PathBuf);

impl Memory {
    /// # Errors
    /// No permission to mount.
    pub fn new() -> io::Result<Self> {
        // Not named by PID: an emulated host has the PIDs of the one before, which may have been killed.
        let path = mkdtemp("/tmp/krx-bench-XXXXXX")?;
        mount(Some("krx-bench"), &path, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
        Ok(Self(path))
    }

    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Copies a file of the build, or of the machine.
    ///
    /// # Errors
    /// It is not there: the text says how to make it.
    pub fn copy(&self, from: &Path, name: &str) -> io::Result<PathBuf> {
        let to = self.path(name);
        fs::create_dir_all(to.parent().unwrap_or(&self.0))?;
        fs::copy(from, &to).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}; run `make build` first", from.display()))
        })?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
        Ok(to)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = umount(&self.0);
        let _ = fs::remove_dir(&self.0);
    }
}
