//! A root file system in memory, of the few programs that a benchmark runs, for who measures programs that open many
//! files: libraries, configuration, and those that are not there. On an emulated host each would be asked for of the share.
//!
//! The calling process moves into it, with `/proc`, `/sys`, `/dev` and `/run` as they were; there is no way back. It lies in
//! a mount namespace of the process, and is gone with it.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::pivot_root;

use crate::host::Memory;

/// What stays the host's.
const KEPT: [&str; 4] = ["proc", "sys", "dev", "run"];
/// What programs expect to be there.
const EXPECTED: [&str; 5] = ["tmp", "etc", "var/lib", "root", "bin"];
/// Where the host's root is for a moment.
const OLD: &str = "old";

/// A root file system being filled.
#[derive(Debug)]
pub struct Root {
    memory: Memory,
    /// Where programs' libraries are looked for first.
    libraries: PathBuf,
}

impl Root {
    /// To be called before there are threads: they would stay where they are.
    ///
    /// # Errors
    /// No permission to mount.
    pub fn new(libraries: PathBuf) -> io::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        let root = Self { memory: Memory::new()?, libraries };
        for directory in KEPT.iter().chain(&EXPECTED).chain(&[OLD]) {
            fs::create_dir_all(root.memory.path(directory))?;
        }
        Ok(root)
    }

    /// Copies a file, to the same path; a link stays one and leads to a copy, too.
    ///
    /// # Errors
    /// It is not there.
    pub fn copy(&self, file: &Path) -> io::Result<()> {
        let inside = self.memory.path(&relative(file));
        if inside.symlink_metadata().is_ok() {
            return Ok(());
        }
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", file.display()));
        if file.symlink_metadata().map_err(named)?.is_symlink() {
            fs::create_dir_all(inside.parent().unwrap_or(&inside))?;
            let target = fs::read_link(file)?;
            symlink(&target, &inside)?;
            return self.copy(&file.parent().unwrap_or(file).join(target));
        }
        self.memory.copy(file, &relative(file)).map(drop)
    }

    /// Copies a program, with the libraries that its dynamic linker says it needs.
    ///
    /// # Errors
    /// It is not there.
    pub fn copy_program(&self, file: &Path) -> io::Result<()> {
        self.copy(file)?;
        let needed = Command::new("ldd").env("LD_LIBRARY_PATH", &self.libraries).arg(file).output()?;
        // Of a static program it says that it is none of its; there is no path in that.
        let needed = String::from_utf8_lossy(&needed.stdout).into_owned();
        let paths: BTreeSet<_> = needed.split_whitespace().filter(|word| word.starts_with('/')).collect();
        paths.into_iter().filter(|path| !path.ends_with(':')).try_for_each(|path| self.copy(Path::new(path)))
    }

    /// Copies all files of a directory.
    ///
    /// # Errors
    /// It is not there.
    pub fn copy_all(&self, directory: &Path) -> io::Result<()> {
        fs::read_dir(directory)?.try_for_each(|entry| self.copy(&entry?.path()))
    }

    /// Where a path inside is until it is entered.
    #[must_use]
    pub fn path(&self, inside: &Path) -> PathBuf {
        self.memory.path(&relative(inside))
    }

    /// Makes it the root of this process and of those it will start.
    ///
    /// # Errors
    /// No permission.
    pub fn enter(self) -> io::Result<()> {
        let top = self.memory.path("");
        for kept in KEPT {
            let from = Path::new("/").join(kept);
            let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(Some(&from), &top.join(kept), None::<&str>, flags, None::<&str>)?;
        }
        pivot_root(&top, &top.join(OLD))?;
        std::env::set_current_dir("/")?;
        let old = Path::new("/").join(OLD);
        umount2(&old, MntFlags::MNT_DETACH)?;
        std::mem::forget(self);
        Ok(())
    }
}

/// `/a//b/../c` gives `a/c`.
fn relative(path: &Path) -> String {
    let mut parts: Vec<String> = Vec::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => drop(parts.pop()),
            std::path::Component::Normal(name) => parts.push(name.to_string_lossy().into_owned()),
            _ => {}
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_made_plain() {
        assert_eq!(relative(Path::new("/a//b/../c/./d")), "a/c/d");
        assert_eq!(relative(Path::new("/../a")), "a");
    }
}
