//! The pod's cgroup on the host: the shim is in it before it starts the VMM, so that all memory and CPU time of the pod
//! is counted where the kubelet looks for it, and held to the limits it has set there.
//!
//! The action `start` reads its name and has the shim begin there. A pod of which nothing is known by then is entered
//! later, see `krx_sandbox::cgroup_child` for what that costs. Where systemd has the cgroups, it is told of a pod's by
//! `scope`.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The hierarchy of version 2, or where it is beside one of version 1.
const ROOTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// Longest that systemd may take to remove the cgroup of a scope that has ended: containerd gives the action `delete` 5 s in all.
const SYSTEMD: Duration = Duration::from_secs(3);
/// Where it keeps the units that it was told of while it runs (systemd.unit(5)).
const TRANSIENT: &str = "/run/systemd/transient";
/// Between two looks at whether something is gone.
const MOMENT: Duration = Duration::from_millis(5);

/// In the environment of a shim that has begun in its pod's cgroup: where the process was that has started it.
pub(crate) const HOME: &str = "KRX_SHIM_HOME";

/// A unit of systemd's whose cgroup is the pod's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scope {
    pub(crate) slice: String,
    pub(crate) unit: String,
}

/// A cgroup that the shim is in. Left and removed when dropped.
#[derive(Debug)]
pub(crate) struct PodCgroup {
    path: PathBuf,
    /// Where the shim goes when it leaves.
    home: PathBuf,
    /// Whether systemd removes it when nobody is in it.
    kept: Arc<AtomicBool>,
}

impl PodCgroup {
    /// Makes the cgroup that a configuration names, and enters it, if the shim has not begun there. `None` where the host
    /// has no cgroups of version 2.
    pub(crate) fn enter(name: &Path) -> io::Result<Option<Self>> {
        let Some(path) = make(name)? else { return Ok(None) };
        let begun = begun()?.filter(|begun| begun.path == path);
        if begun.is_some() {
            return Ok(begun);
        }
        let Some(home) = own()? else { return Ok(None) };
        let cgroup = Self { path, home, kept: Arc::default() };
        cgroup.move_to(&cgroup.path)?;
        Ok(Some(cgroup))
    }

    /// Leaves the removal to systemd, from now on and as long as the flag is set.
    pub(crate) fn keep(&self) -> Arc<AtomicBool> {
        self.kept.store(true, Ordering::Relaxed);
        self.kept.clone()
    }

    fn move_to(&self, path: &Path) -> io::Result<()> {
        fs::write(path.join("cgroup.procs"), std::process::id().to_string())
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        if self.move_to(&self.home).is_ok() && !self.kept.load(Ordering::Relaxed) {
            remove(&self.path);
        }
    }
}

/// Makes the cgroup that a configuration names, if it is not there: its directory. `None` where the host has none.
pub(crate) fn make(name: &Path) -> io::Result<Option<PathBuf>> {
    let Some(root) = root() else { return Ok(None) };
    let path = root.join(relative(name)?);
    fs::create_dir_all(&path)?;
    Ok(Some(path))
}

/// Directory of this process's cgroup.
pub(crate) fn own() -> io::Result<Option<PathBuf>> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    Ok(root().map(|root| root.join(own)))
}

/// The cgroup in which the action `start` had this process begin, as long as it is there.
fn begun() -> io::Result<Option<PodCgroup>> {
    let home = env::var_os(HOME).map(PathBuf::from);
    let begun = own()?.zip(home).map(|(path, home)| PodCgroup { path, home, kept: Arc::default() });
    Ok(begun.filter(|begun| begun.path != begun.home))
}

/// Leaves and removes the cgroup in which this process has begun, if no pod has come to be that would have done so.
pub(crate) fn leave() {
    let _ = begun();
}

/// Removes the cgroup that a configuration names, if nobody is in it. Blocks as long as systemd may be about to.
pub(crate) fn clean_up(name: &Path) {
    let (Some(root), Ok(relative)) = (root(), relative(name)) else { return };
    let path = root.join(relative);
    // Of the scope of a pod that did not come up, it was not told.
    if scope(name).is_some_and(|scope| Path::new(TRANSIENT).join(scope.unit).exists()) {
        // It does not see that nobody is in a cgroup that is not there, and would keep the unit.
        let patience = Instant::now() + SYSTEMD;
        while path.exists() && Instant::now() < patience {
            thread::sleep(MOMENT);
        }
    }
    remove(&path);
}

/// Whether cgroups are systemd's (sd_booted(3)).
pub(crate) fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Removes a cgroup's directory, if nobody is in it.
pub(crate) fn remove(path: &Path) {
    // Its parents are the kubelet's. A process that has just ended may be counted for a moment more.
    for _ in 0..20 {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                thread::sleep(MOMENT);
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
    let path = match scope(name) {
        Some(Scope { slice, unit }) => slice_path(&slice).ok_or_else(refused)?.join(unit),
        None if text.contains(':') => return Err(refused()),
        None => PathBuf::from(text.trim_start_matches('/')),
    };
    let steps = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if steps && path.components().next().is_some() { Ok(path) } else { Err(refused()) }
}

/// The unit of a name that is of the systemd driver's form.
pub(crate) fn scope(name: &Path) -> Option<Scope> {
    let [slice, prefix, name] = *name.to_str()?.split(':').collect::<Vec<_>>() else { return None };
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let unit = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
    Some(Scope { slice: slice.into(), unit })
}

/// The directories of a slice: `a-b.slice` lies in `a.slice` (systemd.slice(5)).
fn slice_path(slice: &str) -> Option<PathBuf> {
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
