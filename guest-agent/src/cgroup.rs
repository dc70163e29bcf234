//! The cgroup of a container: it holds all of its processes, wherever they fork to, limits them, and can end them at
//! once.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use krx_proto::MAX_PIDS;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::device_filter::DeviceFilter;
use crate::error::{Doing, StepError};
use crate::guest::CGROUPS;
use crate::limits::{Limits, SWAP_MAX};
use crate::sys;

/// Parent of all containers' cgroups.
pub(crate) const PARENT: &str = "/sys/fs/cgroup/krx";
/// Controllers that containers have, as far as the kernel has them.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// Processes that were killed may take a moment to leave their cgroup; so often it is tried again, so long between.
const REMOVE_ATTEMPTS: u32 = 50;
const REMOVE_PAUSE: Duration = Duration::from_millis(2);
/// A container that may write its own cgroup tree can nest cgroups deeply to exhaust the agent's stack.
const MAX_DEPTH: u32 = 32;

/// One container's cgroup; removed by [`Cgroup::remove`], not by being dropped.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

/// Makes the parent of all containers' cgroups, with its controllers.
pub(crate) fn make_parent() -> Result<(), StepError> {
    let doing = || "Cannot give containers the controllers of cgroups";
    fs::create_dir_all(PARENT).doing(|| format!("Cannot make {PARENT}"))?;
    let root = Path::new(CGROUPS);
    let known = fs::read_to_string(root.join("cgroup.controllers")).doing(doing)?;
    let enabled = enabled(&known);
    for cgroup in [root, Path::new(PARENT)] {
        write(&cgroup.join("cgroup.subtree_control"), &enabled).doing(doing)?;
    }
    Ok(())
}

/// What enables those of [`CONTROLLERS`] that are known.
fn enabled(known: &str) -> String {
    let known: Vec<_> = known.split_whitespace().collect();
    let wanted = CONTROLLERS.iter().filter(|wanted| known.contains(wanted));
    wanted.map(|name| format!("+{name}")).collect::<Vec<_>>().join(" ")
}

/// Writes a file of a cgroup, which takes a value in one write.
fn write(file: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(file)?.write_all(value.as_bytes())
}

impl Cgroup {
    pub(crate) fn create(id: &str) -> Result<Self, StepError> {
        let path = Path::new(PARENT).join(id);
        let doing = || format!("Cannot make the cgroup {}", path.display());
        fs::create_dir(&path).doing(doing)?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(&path, flags, Mode::empty()).doing(doing)?;
        Ok(Self { path, directory })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Sets limits. Those before one that the kernel refuses are set then.
    pub(crate) fn limit(&self, limits: &Limits) -> Result<(), StepError> {
        for (file, value) in &limits.0 {
            match write(&self.path.join(file), value) {
                Err(error) if file == SWAP_MAX && error.kind() == io::ErrorKind::NotFound => {}
                result => result.doing(|| format!("Cannot set the container's {file} to {value}"))?,
            }
        }
        Ok(())
    }

    /// Lets a filter judge each access of its processes to devices.
    pub(crate) fn filter_devices(&self, filter: &DeviceFilter) -> Result<(), StepError> {
        let program =
            sys::bpf::load_device_filter(&filter.0).doing(|| "Cannot load the filter of devices")?;
        sys::bpf::attach_device_filter(self.as_fd(), program.as_fd())
            .doing(|| "Cannot attach the filter of devices")
    }

    /// Kills every process in it.
    pub(crate) fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }

    /// PIDs of all processes in it, those in cgroups the container made below included; at most [`MAX_PIDS`].
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        collect(&self.path, MAX_DEPTH, &mut found);
        found
    }

    /// Removes it. What cannot be removed after a while is left behind: it holds no process that matters.
    pub(crate) fn remove(&self) {
        let _ = self.kill();
        for _ in 0..REMOVE_ATTEMPTS {
            match remove_tree(&self.path, MAX_DEPTH) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => thread::sleep(REMOVE_PAUSE),
                _ => return,
            }
        }
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

fn collect(cgroup: &Path, depth: u32, found: &mut Vec<i32>) {
    let listed = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let pids = listed.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0);
    found.extend(pids.take(MAX_PIDS.saturating_sub(found.len())));
    if depth > 0 && found.len() < MAX_PIDS {
        children(cgroup).for_each(|child| collect(&child, depth - 1, found));
    }
}

fn remove_tree(cgroup: &Path, depth: u32) -> io::Result<()> {
    if depth > 0 {
        children(cgroup).try_for_each(|child| remove_tree(&child, depth - 1))?;
    }
    fs::remove_dir(cgroup)
}

fn children(cgroup: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(cgroup).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_of_all_levels_are_found_up_to_a_limit() {
        let cgroup = std::env::temp_dir().join(format!("krx-agent-cgroup-{}", std::process::id()));
        fs::create_dir_all(cgroup.join("a/b")).unwrap();
        let found = || {
            let mut found = Vec::new();
            collect(&cgroup, MAX_DEPTH, &mut found);
            found
        };
        assert_eq!(found(), []);
        fs::write(cgroup.join("cgroup.procs"), "7\n0\n-1\nx\n99999999999\n8\n").unwrap();
        fs::write(cgroup.join("a/b/cgroup.procs"), "9\n").unwrap();
        assert_eq!(found(), [7, 8, 9]);
        fs::write(cgroup.join("a/cgroup.procs"), "5\n".repeat(MAX_PIDS)).unwrap();
        assert_eq!(found().len(), MAX_PIDS);
        fs::remove_dir_all(&cgroup).unwrap();
    }

    #[test]
    fn only_known_controllers_are_enabled() {
        assert_eq!(enabled("cpuset cpu io memory hugetlb pids rdma\n"), "+cpu +cpuset +io +memory +pids");
        assert_eq!(enabled("memory misc"), "+memory");
        assert_eq!(enabled(""), "");
    }
}
