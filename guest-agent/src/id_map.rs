//! Mounts whose files' owners are mapped (`mount_setattr(2)`, *ID-mapped mounts*). The kernel takes a map as a user
//! namespace that has it; one is made by a process that does nothing but be in it, and stays as long as a descriptor of it does.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use krx_proto::{AgentError, MountIdMap, UserNamespace, validate_id_mappings};
use nix::fcntl::{OFlag, openat};
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, pause};

use crate::child::open_proc;
use crate::container::{MountKind, MountPlan};
use crate::error::{Doing, StepError, invalid};
use crate::outside::map_ids;
use crate::sys;
use crate::user_namespace::bad_map;

/// The map of one mount.
#[derive(Debug)]
pub(crate) struct IdMapPlan {
    map: MountIdMap,
    /// Once there is one.
    users: Option<Rc<OwnedFd>>,
}

impl IdMapPlan {
    pub(crate) fn new(map: MountIdMap, what: &MountKind, destination: &str) -> Result<Self, AgentError> {
        if matches!(what, MountKind::FileSystem { .. }) {
            return Err(invalid(format_args!(
                "mounts: {destination} is not bound, so its IDs cannot be mapped"
            )));
        }
        for (name, ids) in [("uids", &map.ids.uids), ("gids", &map.ids.gids)] {
            validate_id_mappings(ids)
                .map_err(|bad| bad_map(&format!("mounts: {destination}: {name}"), &bad))?;
        }
        Ok(Self { map, users: None })
    }

    pub(crate) fn users(&self) -> Option<BorrowedFd<'_>> {
        self.users.as_ref().map(|users| users.as_fd())
    }

    /// Maps the owners in a mount that is attached nowhere yet.
    pub(crate) fn apply(&self, tree: BorrowedFd<'_>, destination: &str) -> Result<(), StepError> {
        let Some(users) = &self.users else { return Ok(()) };
        sys::mount::set_id_map(tree, users.as_fd(), self.map.recursive).doing(|| {
            format!("Cannot map the owners of what is mounted on {destination}, which its file system has to support")
        })
    }
}

/// Makes the user namespaces that a container's mounts need, one for each map.
pub(crate) fn prepare(mounts: &mut [MountPlan]) -> Result<(), StepError> {
    let mut made: Vec<(UserNamespace, Rc<OwnedFd>)> = Vec::new();
    for plan in mounts.iter_mut().filter_map(|mount| mount.id_map.as_mut()) {
        let same = made.iter().find(|(ids, _)| *ids == plan.map.ids).map(|(_, users)| Rc::clone(users));
        let users = match same {
            Some(users) => users,
            None => {
                let users = Rc::new(user_namespace(&plan.map.ids)?);
                made.push((plan.map.ids.clone(), Rc::clone(&users)));
                users
            }
        };
        plan.users = Some(users);
    }
    Ok(())
}

fn user_namespace(ids: &UserNamespace) -> Result<OwnedFd, StepError> {
    let doing = || "Cannot make a user namespace for ID-mapped mounts";
    let Some(child) = sys::process::fork_into(CloneFlags::CLONE_NEWUSER, None).doing(doing)? else {
        loop {
            pause();
        }
    };
    let made = map_ids(child.pid, ids).and_then(|()| {
        let path = format!("{}/ns/user", child.pid);
        openat(open_proc()?, path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).doing(doing)
    });
    sys::process::kill(child.pid, libc::SIGKILL).doing(doing)?;
    waitpid(Pid::from_raw(child.pid), None).doing(doing)?;
    made
}
