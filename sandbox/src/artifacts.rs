//! Where the three things a pod is started from lie: the VMM, the guest kernel and the initramfs with the agent.
//!
//! A path that the user gave is taken as it is; otherwise the places of a development tree and of an installation
//! are tried, both relative to the running program. Nothing is opened here: the VMM says what is wrong inside.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The files a pod is started from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifacts {
    pub vmm: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

/// Why an artifact was not found.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    #[error("No {what} at {path}: {origin} names it")]
    Named { what: &'static str, path: PathBuf, origin: &'static str },
    #[error("No {what} found: looked for {looked}. Build it with `make {target}`, or name it with {origin}")]
    Nowhere { what: &'static str, looked: String, target: &'static str, origin: &'static str },
}

/// One kind of artifact and how it is found.
struct Artifact {
    what: &'static str,
    variable: &'static str,
    /// Tried in this order, relative to the directory of the running program.
    places: &'static [&'static str],
    target: &'static str,
}

const VMM: Artifact = Artifact {
    what: "VMM",
    variable: "KRX_VMM",
    places: &["krx-vmm", "../lib/krx/krx-vmm"],
    target: "build",
};
const KERNEL: Artifact = Artifact {
    what: "guest kernel",
    variable: "KRX_KERNEL",
    places: &["../guest/vmlinux", "../lib/krx/vmlinux"],
    target: "kernel",
};
const INITRAMFS: Artifact = Artifact {
    what: "guest initramfs",
    variable: "KRX_INITRAMFS",
    places: &["../guest/initramfs.cpio", "../lib/krx/initramfs.cpio"],
    target: "initramfs",
};

impl Artifacts {
    /// Finds all three; `kernel` is the user's own choice of a kernel.
    ///
    /// # Errors
    /// The first artifact that is missing, with where it was looked for and how to build it.
    pub fn find(kernel: Option<&Path>) -> Result<Self, ArtifactError> {
        // Without /proc there is no program directory; the relative places then miss, which the error says.
        let program = env::current_exe().unwrap_or_default();
        let directory = program.parent().unwrap_or_else(|| Path::new(""));
        Self::find_from(directory, kernel, |variable| env::var_os(variable))
    }

    fn find_from(
        directory: &Path,
        kernel: Option<&Path>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, ArtifactError> {
        let kernel = match kernel {
            Some(path) => KERNEL.named(path.into(), "--kernel")?,
            None => KERNEL.find(directory, &variable)?,
        };
        Ok(Self {
            vmm: VMM.find(directory, &variable)?,
            kernel,
            initramfs: INITRAMFS.find(directory, &variable)?,
        })
    }
}

impl Artifact {
    fn named(&self, path: PathBuf, origin: &'static str) -> Result<PathBuf, ArtifactError> {
        if path.exists() { Ok(path) } else { Err(ArtifactError::Named { what: self.what, path, origin }) }
    }

    fn find(
        &self,
        directory: &Path,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<PathBuf, ArtifactError> {
        if let Some(path) = variable(self.variable) {
            return self.named(path.into(), self.variable);
        }
        let candidates = || self.places.iter().map(|place| directory.join(place));
        candidates().find(|path| path.exists()).ok_or_else(|| {
            let looked: Vec<_> = candidates().map(|path| path.display().to_string()).collect();
            ArtifactError::Nowhere {
                what: self.what,
                looked: looked.join(", "),
                target: self.target,
                origin: self.variable,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scratch;

    fn tree() -> Scratch {
        let scratch = Scratch::new("artifacts");
        for file in ["target/release/krx-vmm", "target/guest/vmlinux", "target/guest/initramfs.cpio"] {
            scratch.write(file, b"");
        }
        scratch
    }

    #[test]
    fn development_tree_is_found_from_the_program() {
        let tree = tree();
        let directory = tree.path().join("target/release");
        let found = Artifacts::find_from(&directory, None, |_| None).unwrap();
        assert_eq!(found.vmm, directory.join("krx-vmm"));
        assert_eq!(found.kernel, directory.join("../guest/vmlinux"));
    }

    #[test]
    fn missing_artifact_names_places_and_make_target() {
        let scratch = Scratch::new("artifacts");
        let error = Artifacts::find_from(scratch.path(), None, |_| None).unwrap_err().to_string();
        assert!(error.contains("../guest/vmlinux") && error.contains("lib/krx/vmlinux"), "{error}");
        assert!(error.contains("make kernel") && error.contains("KRX_KERNEL"), "{error}");
    }

    #[test]
    fn named_artifact_is_never_replaced_by_another() {
        let tree = tree();
        let directory = tree.path().join("target/release");
        let missing = Path::new("/nonexistent/vmlinux");
        let error = Artifacts::find_from(&directory, Some(missing), |_| None).unwrap_err();
        assert!(matches!(error, ArtifactError::Named { origin: "--kernel", .. }), "{error}");
        let error = Artifacts::find_from(&directory, None, |name| {
            (name == "KRX_INITRAMFS").then(|| "/nonexistent/initramfs".into())
        });
        assert!(matches!(error, Err(ArtifactError::Named { origin: "KRX_INITRAMFS", .. })));
    }
}
