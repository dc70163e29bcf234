//! Images of file systems, as snapshotters of block devices have them, and block devices over files.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Host;
use crate::containerd::image::LIBRARIES;

/// What a container on an image has, out of the Debian root file system.
const PROGRAMS: &str = "dash cat dd echo ls mkdir rm sleep stat sync touch wc";

/// Makes a small root file system in a directory.
///
/// # Panics
/// When it cannot be written.
pub fn small_root(host: &Host, at: &Path) {
    for directory in ["dev", "etc", "proc", "tmp", "usr/bin", "usr/lib64", "usr/lib/x86_64-linux-gnu"] {
        fs::create_dir_all(at.join(directory)).expect("root");
    }
    for (name, target) in
        [("bin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64"), ("usr/bin/sh", "dash")]
    {
        symlink(target, at.join(name)).expect("root");
    }
    let programs = PROGRAMS.split(' ').map(|name| format!("usr/bin/{name}"));
    let libraries = LIBRARIES.map(|name| format!("usr/lib/x86_64-linux-gnu/{name}"));
    for name in programs.chain(libraries).chain(["usr/lib64/ld-linux-x86-64.so.2".into()]) {
        fs::copy(host.rootfs().join(&name), at.join(&name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

/// Makes an ext4 of 24 MiB in the file `at`, with what is in `root`.
///
/// # Panics
/// When it cannot be made.
pub fn ext4(root: &Path, at: &Path) {
    done(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(root).arg(at).arg("24M"));
}

/// Makes an EROFS in the file `at`, with what is in `root`.
///
/// # Panics
/// When it cannot be made.
pub fn erofs(root: &Path, at: &Path) {
    done(Command::new("mkfs.erofs").arg("--quiet").arg(at).arg(root));
}

/// What the file `path` of an ext4 has, that nobody has mounted.
///
/// # Panics
/// When it cannot be looked at.
#[must_use]
pub fn read_ext4(image: &Path, path: &str) -> String {
    done(Command::new("debugfs").args(["-R", &format!("cat {path}")]).arg(image))
}

/// Asserts that an ext4 was unmounted in order.
///
/// # Panics
/// When it was not.
pub fn assert_clean(image: &Path) {
    let check = done(Command::new("e2fsck").args(["-f", "-n"]).arg(image));
    assert!(!check.contains("recover"), "{check}");
}

/// A loop device; it is gone when dropped.
#[derive(Debug)]
pub struct LoopDevice(pub PathBuf);

impl LoopDevice {
    /// # Panics
    /// When the host has none.
    #[must_use]
    pub fn over(file: &Path) -> Self {
        let name = done(Command::new("losetup").args(["--find", "--show"]).arg(file));
        Self(name.trim().into())
    }

    /// Its numbers.
    ///
    /// # Panics
    /// When it is gone.
    #[must_use]
    pub fn numbers(&self) -> (u64, u64) {
        use std::os::unix::fs::MetadataExt;

        let device = fs::metadata(&self.0).expect("loop device").rdev();
        (nix::sys::stat::major(device), nix::sys::stat::minor(device))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

fn done(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}
