//! A directory of a test's own, removed when dropped.

use std::fs;
use std::path::{Path, PathBuf};

/// Names of all of them begin so.
pub(crate) const PREFIX: &str = "krx-test-";

/// Under `/tmp`, so that socket paths stay short.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        Self::under(Path::new("/tmp"))
    }

    /// Elsewhere than under `/tmp`.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn under(directory: &Path) -> Self {
        // Not of PIDs: those of an emulated host are those of the one before.
        Self(nix::unistd::mkdtemp(&directory.join(format!("{PREFIX}XXXXXX"))).expect("scratch directory"))
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file and returns its path.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        fs::create_dir_all(path.parent().unwrap_or(&self.0)).expect("directory");
        fs::write(&path, content).expect("scratch file");
        path
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
