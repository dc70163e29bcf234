//! Where the three things a pod is started from lie: the VMM, the guest kernel and the initramfs with the agent.
//!
//! A path that the user or the settings give is taken as it is; otherwise the places of a development tree and of an
//! installation are tried, both relative to the running program. Nothing is opened here: the VMM says what is wrong inside.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::settings::{Place, Settings};

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
    setting: &'static str,
    /// Tried in this order, relative to the directory of the running program.
    places: &'static [&'static str],
    target: &'static str,
}

const VMM: Artifact = Artifact {
    what: "VMM",
    variable: "KRX_VMM",
    setting: "`path` under [vmm] in krx's settings",
    places: &["krx-vmm", "../lib/krx/krx-vmm"],
    target: "build",
};
const KERNEL: Artifact = Artifact {
    what: "guest kernel",
    variable: "KRX_KERNEL",
    setting: "`kernel` under [guest] in krx's settings",
    places: &["../guest/vmlinux", "../lib/krx/vmlinux"],
    target: "kernel",
};
const INITRAMFS: Artifact = Artifact {
    what: "guest initramfs",
    variable: "KRX_INITRAMFS",
    setting: "`initramfs` under [guest] in krx's settings",
    places: &["../guest/initramfs.cpio", "../lib/krx/initramfs.cpio"],
    target: "initramfs",
};

impl Artifacts {
    /// Finds all three; `kernel` is the user's own choice of a kernel. The environment goes before the settings.
    ///
    /// # Errors
    /// The first artifact that is missing, with where it was looked for and how to build it.
    pub fn find(kernel: Option<&Path>, settings: &Settings) -> Result<Self, ArtifactError> {
        // Without /proc there is no program directory; the relative places then miss, which the error says.
        let program = env::current_exe().unwrap_or_default();
        let directory = program.parent().unwrap_or_else(|| Path::new(""));
        Self::find_from(directory, kernel, settings, |variable| env::var_os(variable))
    }

    fn find_from(
        directory: &Path,
        kernel: Option<&Path>,
        settings: &Settings,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, ArtifactError> {
        let kernel = match kernel {
            Some(path) => KERNEL.named(path.into(), "--kernel")?,
            None => KERNEL.find(directory, &settings.guest.kernel, &variable)?,
        };
        Ok(Self {
            vmm: VMM.find(directory, &settings.vmm, &variable)?,
            kernel,
            initramfs: INITRAMFS.find(directory, &settings.guest.initramfs, &variable)?,
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
        place: &Place,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<PathBuf, ArtifactError> {
        if let Some(path) = variable(self.variable) {
            return self.named(path.into(), self.variable);
        }
        if let Some(path) = place.path() {
            return self.named(path.into(), self.setting);
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
        let found = Artifacts::find_from(&directory, None, &Settings::default(), |_| None).unwrap();
        assert_eq!(found.vmm, directory.join("krx-vmm"));
        assert_eq!(found.kernel, directory.join("../guest/vmlinux"));
    }

    #[test]
    fn installation_is_found_from_the_program() {
        let scratch = Scratch::new("artifacts");
        for file in ["bin/krx-vmm", "lib/krx/vmlinux", "lib/krx/initramfs.cpio"] {
            scratch.write(file, b"");
        }
        let directory = scratch.path().join("bin");
        let found = Artifacts::find_from(&directory, None, &Settings::default(), |_| None).unwrap();
        assert_eq!(found.vmm, directory.join("krx-vmm"));
        assert_eq!(found.kernel, directory.join("../lib/krx/vmlinux"));
        assert_eq!(found.initramfs, directory.join("../lib/krx/initramfs.cpio"));
    }

    #[test]
    fn settings_name_artifacts_and_the_environment_goes_before() {
        let tree = tree();
        let directory = tree.path().join("target/release");
        let mut settings = Settings { vmm: Place::At(tree.write("vmm", b"")), ..Settings::default() };
        settings.guest.initramfs = Place::At("/nonexistent/initramfs".into());
        let error = Artifacts::find_from(&directory, None, &settings, |_| None).unwrap_err();
        assert!(error.to_string().contains("under [guest]"), "{error}");
        let own = tree.write("own", b"");
        let found = Artifacts::find_from(&directory, None, &settings, |name| {
            (name == "KRX_INITRAMFS").then(|| own.clone().into())
        });
        let found = found.unwrap();
        assert_eq!((found.vmm, found.initramfs), (tree.path().join("vmm"), own));
    }

    #[test]
    fn missing_artifact_names_places_and_make_target() {
        let scratch = Scratch::new("artifacts");
        let error = Artifacts::find_from(scratch.path(), None, &Settings::default(), |_| None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("../guest/vmlinux") && error.contains("lib/krx/vmlinux"), "{error}");
        assert!(error.contains("make kernel") && error.contains("KRX_KERNEL"), "{error}");
    }

    #[test]
    fn named_artifact_is_never_replaced_by_another() {
        let tree = tree();
        let directory = tree.path().join("target/release");
        let missing = Path::new("/nonexistent/vmlinux");
        let error =
            Artifacts::find_from(&directory, Some(missing), &Settings::default(), |_| None).unwrap_err();
        assert!(matches!(error, ArtifactError::Named { origin: "--kernel", .. }), "{error}");
        let error = Artifacts::find_from(&directory, None, &Settings::default(), |name| {
            (name == "KRX_INITRAMFS").then(|| "/nonexistent/initramfs".into())
        });
        assert!(matches!(error, Err(ArtifactError::Named { origin: "KRX_INITRAMFS", .. })));
    }
}
