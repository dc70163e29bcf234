//! What pods leave behind on their host: counted before and after, so that what was there before does not matter.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::cri::pod::CGROUPS;
use crate::pod::until;
use crate::scratch::PREFIX;

/// Names of processes (15 bytes, `proc(5)`): containerd itself is not among them.
const PROCESSES: [&str; 6] = ["krx", "krx-vmm", "containerd-shim", "runc", "runc:[2:INIT]", "workload"];
/// Directories whose files are the pods': sockets, state, network namespaces.
const DIRECTORIES: [&str; 5] =
    ["/run/krx", "/run/containerd", "/run/netns", "/var/lib/krx", "/var/lib/cni/results"];
/// Directories of a containerd of the tests whose directories, by namespace or kind, are tasks', pods' and containers'.
const BUNDLES: [&str; 3] = [
    "state/io.containerd.runtime.v2.task",
    "state/io.containerd.grpc.v1.cri",
    "root/io.containerd.grpc.v1.cri",
];
/// Beneath these, mounts are looked at.
const MOUNTS: [&str; 4] = ["/run/", "/var/", "/tmp/", "/dev/"];
/// Longest that what ends may take to be gone.
const GONE: Duration = Duration::from_secs(30);

/// All that can be left, each a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remains(BTreeSet<String>);

impl Remains {
    /// What is there now.
    #[must_use]
    pub fn now() -> Self {
        let mut found = BTreeSet::new();
        processes(&mut found);
        for line in fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines() {
            let at = line.split(' ').nth(4).unwrap_or_default();
            if MOUNTS.iter().any(|above| at.starts_with(above)) {
                found.insert(format!("mount {at}"));
            }
        }
        // Host ends of veth pairs, taps; what lies in a network namespace goes with it, tc filters too.
        for link in fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
            // The bridge is of all pods.
            if link.file_name() != super::BRIDGE {
                found.insert(format!("link {}", link.file_name().display()));
            }
        }
        for directory in DIRECTORIES {
            walk(Path::new(directory), "file", &mut found);
        }
        walk(Path::new(CGROUPS), "cgroup", &mut found);
        bundles(&mut found);
        Self(found)
    }

    /// What was not there `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }

    /// Waits until nothing is there that was not `before`; what is, after a while.
    #[must_use]
    pub fn left_since(before: &Self) -> Vec<String> {
        until(GONE, || Some(Self::now().since(before)).filter(Vec::is_empty))
            .unwrap_or_else(|| Self::now().since(before))
    }
}

fn processes(found: &mut BTreeSet<String>) {
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let comm = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        if PROCESSES.contains(&comm.trim()) {
            found.insert(format!("process {} {}", comm.trim(), process.file_name().display()));
        }
    }
}

/// What containerd has of tasks, and the CRI plugin of pods and containers.
fn bundles(found: &mut BTreeSet<String>) {
    let entries = |directory: &Path| fs::read_dir(directory).into_iter().flatten().flatten();
    for scratch in
        entries(Path::new("/run")).filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX))
    {
        for kind in BUNDLES.iter().flat_map(|bundles| entries(&scratch.path().join(bundles))) {
            found.extend(entries(&kind.path()).map(|bundle| format!("bundle {}", bundle.path().display())));
        }
    }
}

/// Files below a directory, or cgroups; not those of the jobs of an emulated host.
fn walk(directory: &Path, kind: &str, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory && path != Path::new("/sys/fs/cgroup/jobs") {
            walk(&path, kind, found);
        }
        if is_directory == (kind == "cgroup") {
            found.insert(format!("{kind} {}", path.display()));
        }
    }
}
