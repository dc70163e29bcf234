//! Where a benchmark runs, and the place there in which nothing is slower than memory.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use krx_image::private_mounts;
use nix::mount::{MsFlags, mount};

/// Set by `tests/kvm-host` for what runs in an emulated host; `icount` where time is counted.
const INSIDE: &str = "KRX_KVM_HOST_INSIDE";

/// Whether the clock counts instructions.
#[must_use]
pub fn is_counting() -> bool {
    std::env::var(INSIDE).is_ok_and(|mode| mode == "icount")
}

/// Whether this is the emulated host.
#[must_use]
pub fn is_emulated() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// The repository's root.
#[must_use]
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).into()
}

/// What the tmpfs covers: a directory that is on every host, with nobody's sources in it.
const COVERED: &str = "/dev/shm";

/// A tmpfs of its own with all that is executed and read: a page that is fetched from elsewhere would be measured. This process
/// and its children alone see it, and it goes with them, however they end.
#[derive(Debug)]
pub struct Memory(());

impl Memory {
    /// # Errors
    /// No permission to mount.
    pub fn new() -> io::Result<Self> {
        private_mounts()?;
        mount(Some("krx-bench"), COVERED, Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
        Ok(Self(()))
    }

    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        Path::new(COVERED).join(name)
    }

    /// Copies a file of the build, or of the machine.
    ///
    /// # Errors
    /// It is not there: the text says how to make it.
    pub fn copy(&self, from: &Path, name: &str) -> io::Result<PathBuf> {
        let to = self.path(name);
        fs::create_dir_all(to.parent().unwrap_or_else(|| Path::new(COVERED)))?;
        fs::copy(from, &to).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}; run `make build` first", from.display()))
        })?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
        Ok(to)
    }
}
