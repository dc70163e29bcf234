//! Debian's containerd and what it needs, unpacked by `scripts/containerd-tools` under `target/containerd`.

use std::path::{Path, PathBuf};
use std::process::Command;

const DIRECTORIES: [&str; 4] = ["usr/sbin", "usr/bin", "sbin", "bin"];
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// `target`, `target/containerd` below it.
#[derive(Debug, Clone)]
pub struct Tools {
    target: PathBuf,
    tree: PathBuf,
}

impl Tools {
    /// # Panics
    /// When they are not there.
    #[must_use]
    pub fn find() -> Self {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").canonicalize();
        Self::of(target.expect("target directory: run make build"))
    }

    /// Those of another `target` directory.
    ///
    /// # Panics
    /// When they are not there.
    #[must_use]
    pub fn of(target: PathBuf) -> Self {
        let tree = target.join("containerd");
        assert!(
            tree.join("usr/bin/containerd").exists(),
            "no target/containerd: run scripts/containerd-tools"
        );
        Self { target, tree }
    }

    /// A file below `target`.
    ///
    /// # Panics
    /// When it is not built.
    #[must_use]
    pub fn built(&self, path: &str, by: &str) -> PathBuf {
        let file = self.target.join(path);
        assert!(file.exists(), "target/{path} is not built: run {by}");
        file
    }

    /// Directory of the CNI plugins.
    #[must_use]
    pub fn cni(&self) -> PathBuf {
        self.tree.join("usr/lib/cni")
    }

    /// A command that finds the programs, krx's in front, and their libraries.
    ///
    /// # Panics
    /// When a directory's name has a colon in it.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut path = vec![self.target.join("release")];
        path.extend(DIRECTORIES.map(|directory| self.tree.join(directory)));
        path.extend(std::env::split_paths("/usr/sbin:/usr/bin:/sbin:/bin"));
        let found = path.iter().map(|directory| directory.join(program)).find(|file| file.exists());
        let mut command = Command::new(found.unwrap_or_else(|| program.into()));
        let libraries = self.tree.join(LIBRARIES);
        command
            .env("PATH", std::env::join_paths(path).expect("PATH"))
            .env("LD_LIBRARY_PATH", &libraries)
            .env("XTABLES_LIBDIR", libraries.join("xtables"));
        command
    }
}
