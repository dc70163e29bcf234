//! A process's terminal: a pair of the container's own devpts.

use std::os::fd::{AsFd, OwnedFd};

use krx_proto::TerminalSize;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::statfs::{FsType, fstatfs};

use crate::error::{Doing, StepError};
use crate::rootfs::Root;
use crate::sys;

/// `DEVPTS_SUPER_MAGIC` of `linux/magic.h`.
const DEVPTS: FsType = FsType(0x1cd1);

/// Both ends: the agent keeps the controller, the process gets the peer.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) controller: OwnedFd,
    pub(crate) peer: OwnedFd,
}

impl Pair {
    pub(crate) fn open(root: &Root, size: TerminalSize) -> Result<Self, StepError> {
        let doing = || "Cannot open a terminal in the container's /dev/pts";
        // The container may have put anything there since it runs: opening it must neither block nor be believed.
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
        let controller = root.open("/dev/pts/ptmx", flags).doing(doing)?;
        if fstatfs(&controller).doing(doing)?.filesystem_type() != DEVPTS {
            return Err(StepError::new(doing(), Errno::ENODEV));
        }
        let peer = sys::terminal::open_peer(controller.as_fd()).doing(doing)?;
        sys::terminal::set_size(peer.as_fd(), size).doing(|| "Cannot set the size of the terminal")?;
        Ok(Self { controller, peer })
    }

    /// Shows the terminal as `/dev/console`, which is what it is to the first process.
    pub(crate) fn show_as_console(&self, root: &Root) -> Result<(), StepError> {
        let doing = || "Cannot mount the terminal on /dev/console";
        let tree = sys::mount::clone_tree(self.peer.as_fd(), c"", false).doing(doing)?;
        let place = root.make("/dev/console", false).doing(doing)?;
        sys::mount::attach(tree.as_fd(), place.as_fd()).doing(doing)
    }
}
