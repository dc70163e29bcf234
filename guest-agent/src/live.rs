//! Live volumes on the agent's side: where the copies lie, and the children that renew them. What is in a copy is
//! `replica`'s.

use std::ffi::{CStr, OsStr};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use krx_proto::{AgentError, ErrorKind};
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::CloneFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::Mode;

use crate::child::{self, MAX_REPORT, Report};
use crate::error::{Doing, StepError};
use crate::guest::CGROUPS;
use crate::lifecycle::{Caller, Reply, wrong_state};
use crate::replica::{self, MAX_BYTES, MAX_ENTRIES};
use crate::sys;

/// Where copies are mounted, each in a directory of its own.
const PARENT: &str = "/run/krx/live";
/// Children that renew copies at a time; one whose file system hangs stays.
const MAX_RUNNING: usize = 32;

/// Where the copy for one mount of a container is.
pub(crate) fn place(container: &str, mount: usize) -> String {
    format!("{PARENT}/{container}-{mount}")
}

/// The tmpfs that holds a copy of a volume for one mount of a container; gone when dropped.
#[derive(Debug)]
pub(crate) struct Replica {
    /// The volume in the share.
    source: PathBuf,
    path: PathBuf,
}

impl Replica {
    /// Makes room for a copy; the container's first process fills it, or the one that helps it.
    pub(crate) fn mount(source: &CStr, path: &CStr) -> Result<Self, StepError> {
        let [source, path] = [source, path].map(|text| Path::new(OsStr::from_bytes(text.to_bytes())));
        let doing = || format!("Cannot make room for a copy of {}", source.display());
        fs::create_dir_all(path).doing(doing)?;
        let replica = Self { source: source.into(), path: path.into() };
        // Room for two: the new content is there before the old goes.
        let options = format!("mode=755,size={},nr_inodes={}", 2 * MAX_BYTES + (4 << 20), 3 * MAX_ENTRIES);
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("live"), path, Some("tmpfs"), flags, Some(options.as_str())).doing(doing)?;
        Ok(replica)
    }

    /// Whether it is a copy of that volume.
    pub(crate) fn is_of(&self, source: &str) -> bool {
        self.source == Path::new(source)
    }

    /// Whether there is a copy, of something else than `target`.
    pub(crate) fn is_stale(&self, target: &str) -> bool {
        replica::current(&self.path).is_some_and(|current| current != OsStr::new(target))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        // Where the mount failed there is only the directory.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.path);
    }
}

/// Children that renew copies.
#[derive(Debug)]
pub(crate) struct Refreshes {
    /// The root of all cgroups, where the agent itself is.
    cgroup: OwnedFd,
    running: Vec<Refresh>,
}

#[derive(Debug)]
struct Refresh {
    pid: i32,
    source: String,
    caller: Caller,
    report: OwnedFd,
}

impl Refreshes {
    pub(crate) fn new() -> Result<Self, StepError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let cgroup = open(CGROUPS, flags, Mode::empty()).doing(|| format!("Cannot open {CGROUPS}"))?;
        Ok(Self { cgroup, running: Vec::new() })
    }

    /// Has the copies of a volume renewed. The caller is answered at the child's end.
    pub(crate) fn begin(
        &mut self,
        caller: Caller,
        source: String,
        copies: &[PathBuf],
        target: &str,
    ) -> Result<(), AgentError> {
        if self.running.iter().any(|refresh| refresh.source == source) {
            return Err(wrong_state("The copies of the volume are being renewed"));
        }
        if self.running.len() >= MAX_RUNNING {
            return Err(AgentError::new(ErrorKind::Failed, "Too many volumes are being renewed"));
        }
        let doing = || "Cannot make a process that renews a copy";
        let (report, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .doing(doing)?;
        match sys::process::fork_into(CloneFlags::empty(), Some(self.cgroup.as_fd())).doing(doing)? {
            None => child::helper(theirs.as_fd(), &[], || {
                copies.iter().try_for_each(|copy| replica::refresh(Path::new(&source), copy, target))
            }),
            Some(sys::process::Child { pid, .. }) => {
                self.running.push(Refresh { pid, source, caller, report });
                Ok(())
            }
        }
    }

    /// A child of the agent has ended: the reply that is due, if it was one of these.
    pub(crate) fn reaped(&mut self, pid: i32) -> Option<Reply> {
        let index = self.running.iter().position(|refresh| refresh.pid == pid)?;
        let Refresh { caller, report, .. } = self.running.swap_remove(index);
        let mut buffer = [0; MAX_REPORT];
        let length = sys::socket::receive(report.as_fd(), &mut buffer).map_or(0, |(length, _)| length);
        let said = krx_proto::read_frame::<Report>(&mut &buffer[..length]);
        let ended = |_| Err(AgentError::new(ErrorKind::Failed, "The process that renews a copy was killed"));
        Some((caller, said.unwrap_or_else(ended).map(|()| krx_proto::Answer::Done)))
    }
}
