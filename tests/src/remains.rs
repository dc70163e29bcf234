//! What runs of `krx` leave behind on their host: counted before and after, so that what was there before does not matter.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::pod::until;

/// Longest that what ends may take to be gone.
const GONE: Duration = Duration::from_secs(10);

/// All that can be left of those whose files lie in some directories, each a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remains {
    beneath: Vec<PathBuf>,
    found: BTreeSet<String>,
}

impl Remains {
    /// What is there now.
    ///
    /// # Panics
    /// When the kernel does not tell.
    #[must_use]
    pub fn now(beneath: &[&Path]) -> Self {
        let beneath: Vec<PathBuf> = beneath.iter().map(|path| (*path).to_owned()).collect();
        let found = look(&beneath);
        Self { beneath, found }
    }

    /// Waits until nothing is there that was not then.
    ///
    /// # Panics
    /// When something still is after a while.
    #[track_caller]
    pub fn assert_all(&self, what: &str) {
        let left = || look(&self.beneath).difference(&self.found).cloned().collect::<Vec<_>>();
        let gone = until(GONE, || Some(left()).filter(Vec::is_empty));
        assert!(gone.is_some(), "{what}: left behind:\n    {}", left().join("\n    "));
    }
}

/// Processes by whose environment or mounts they belong here, what such have open in memory, and what is the host's.
fn look(beneath: &[PathBuf]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let here = |text: &[u8]| {
        beneath.iter().any(|path| {
            let path = path.as_os_str().as_bytes();
            text.windows(path.len()).any(|part| part == path)
        })
    };
    for process in entries(Path::new("/proc")) {
        let read = |name: &str| fs::read(process.join(name)).unwrap_or_default();
        let comm = read("comm");
        // Of a process that is not reaped yet nothing else can be read.
        let own = comm.starts_with(b"krx") && (here(&read("environ")) || here(&read("mountinfo")));
        if !own {
            continue;
        }
        let name = format!("{} {}", String::from_utf8_lossy(&comm).trim(), process.display());
        for file in entries(&process.join("fd")) {
            let target = fs::read_link(file).unwrap_or_default();
            if target.as_os_str().as_bytes().starts_with(b"/memfd:") {
                found.insert(format!("memory file {} of {name}", target.display()));
            }
        }
        found.insert(format!("process {name}"));
    }
    let text = |path: &str| fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    found.extend(
        text("/proc/self/mounts")
            .lines()
            .filter(|line| here(line.as_bytes()))
            .map(|line| format!("mount {line}")),
    );
    let sockets = text("/proc/net/unix");
    let names = sockets.lines().filter_map(|line| line.split_whitespace().nth(7));
    found.extend(names.filter(|name| here(name.as_bytes())).map(|name| format!("socket {name}")));
    for (kind, directory) in [("link", "/sys/class/net"), ("cgroup", "/sys/fs/cgroup")] {
        found.extend(
            entries(Path::new(directory))
                .filter(|path| path.is_dir())
                .map(|path| format!("{kind} {}", path.display())),
        );
    }
    for device in entries(Path::new("/sys/block")) {
        if let Ok(file) = fs::read_to_string(device.join("loop/backing_file")) {
            found.insert(format!("loop device {} on {}", device.display(), file.trim()));
        }
    }
    beneath.iter().for_each(|path| walk(path, &mut found));
    found
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Files and directories below one; what is known of the host may stay.
fn walk(directory: &Path, found: &mut BTreeSet<String>) {
    for path in entries(directory) {
        if path.file_name().is_some_and(|name| name == ".host.json") {
            continue;
        }
        if path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
            walk(&path, found);
        }
        found.insert(format!("file {}", path.display()));
    }
}
