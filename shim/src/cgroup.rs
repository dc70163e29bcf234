//! The pod's cgroup on the host: the shim goes into it before it starts the VMM, so that all memory and CPU time of the pod
//! is counted where the kubelet looks for it, and held to the limits it has set there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The hierarchy of version 2, or where it is beside one of version 1.
const ROOTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// A cgroup that the shim is in. Left and removed when dropped.
#[derive(Debug)]
pub(crate) struct PodCgroup {
    path: PathBuf,
    /// Where the shim came from.
    before: PathBuf,
}

impl PodCgroup {
    /// Makes the cgroup that a configuration names, and enters it. `None` where the host has no cgroups of version 2.
    pub(crate) fn enter(name: &Path) -> io::Result<Option<Self>> {
        let Some(root) = root() else { return Ok(None) };
        let path = root.join(relative(name)?);
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let before = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let cgroup = Self { before: root.join(before), path };
        fs::create_dir_all(&cgroup.path)?;
        cgroup.move_to(&cgroup.path)?;
        Ok(Some(cgroup))
    }

    fn move_to(&self, path: &Path) -> io::Result<()> {
        fs::write(path.join("cgroup.procs"), std::process::id().to_string())
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        if self.move_to(&self.before).is_ok() {
            remove(&self.path);
        }
    }
}

/// Removes the cgroup that a configuration names, if nobody is in it.
pub(crate) fn clean_up(name: &Path) {
    if let (Some(root), Ok(relative)) = (root(), relative(name)) {
        remove(&root.join(relative));
    }
}

fn remove(path: &Path) {
    // Its parents are the kubelet's. A process that has just ended may be counted for a moment more.
    for _ in 0..20 {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            _ => return,
        }
    }
}

fn root() -> Option<PathBuf> {
    let mut roots = ROOTS.iter().map(PathBuf::from);
    roots.find(|root| root.join("cgroup.controllers").exists())
}

/// The path in the tree of what OCI's `linux.cgroupsPath` says: a path, or `slice:prefix:name` as the systemd driver has it.
fn relative(name: &Path) -> io::Result<PathBuf> {
    let refused = || io::Error::new(io::ErrorKind::InvalidInput, format!("{} is no cgroup", name.display()));
    let text = name.to_str().ok_or_else(refused)?;
    let path = match *text.split(':').collect::<Vec<_>>() {
        [path] => PathBuf::from(path.trim_start_matches('/')),
        [slice, prefix, name] => {
            let scope =
                if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
            slice_path(slice).ok_or_else(refused)?.join(scope)
        }
        _ => return Err(refused()),
    };
    let steps = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if steps && path.components().next().is_some() { Ok(path) } else { Err(refused()) }
}

/// The directories of a slice: `a-b.slice` lies in `a.slice` (systemd.slice(5)).
fn slice_path(slice: &str) -> Option<PathBuf> {
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let name = slice.strip_suffix(".slice")?;
    if name.is_empty() || name.contains('/') || name.split('-').any(str::is_empty) {
        // `-.slice` is the root.
        return (name == "-").then(PathBuf::new);
    }
    let ends = name.match_indices('-').map(|(end, _)| end).chain([name.len()]);
    Some(ends.map(|end| format!("{}.slice", &name[..end])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> Option<String> {
        relative(Path::new(name)).ok().map(|path| path.display().to_string())
    }

    #[test]
    fn both_drivers_names_are_paths() {
        assert_eq!(path("/kubepods/burstable/pod1/abc").as_deref(), Some("kubepods/burstable/pod1/abc"));
        assert_eq!(path("default/x").as_deref(), Some("default/x"));
        assert_eq!(
            path("kubepods-burstable-pod1.slice:cri-containerd:abc").as_deref(),
            Some(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope"
            )
        );
        assert_eq!(path("-.slice:crio:x").as_deref(), Some("crio-x.scope"));
        assert_eq!(path(":krx:x").as_deref(), Some("system.slice/krx-x.scope"));
    }

    #[test]
    fn nothing_leads_out_of_the_tree() {
        for bad in [
            "",
            "/",
            "../x",
            "/a/../../x",
            "a:b",
            "x.slice:../..:y",
            "a--b.slice:c:d",
            "../a.slice:b:c",
            "slice:a:b",
        ] {
            assert_eq!(path(bad), None, "{bad}");
        }
    }
}
