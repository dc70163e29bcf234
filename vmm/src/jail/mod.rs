//! The jail of the VMM: what is left to whoever takes over this process from inside its guest.
//!
//! Entered before the kernel image is read and before a second thread is started; the order is this module's:
//!
//! 1. [`root`]: own mount, IPC, UTS and network namespaces, and a root in which only the share and the directories of
//!    the VM's sockets exist.
//! 2. [`janitor`]: the one thread that may remove the pod's directory itself, and can do nothing else.
//! 3. [`capabilities`]: those that serving files of any owner takes; and no way to get more.
//! 4. [`landlock`]: the same limits on files once more, where the kernel has it.
//! 5. [`seccomp`]: each thread has its list of system calls; threads confine themselves as they begin.
//!
//! What is outside of it is handed in as open descriptors ([`Opened`](crate::machine::Opened)). The process stays in its
//! PID namespace, which it could only leave by a fork, and stays root, as it serves files of all owners.

pub mod capabilities;
mod decision;
pub mod janitor;
pub mod landlock;
pub mod root;
pub mod seccomp;

use std::io;
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, setrlimit};

use self::janitor::Janitor;
use crate::config::ValidConfig;
use crate::share::ShareError;

/// Where a jailed VMM has the pod's share.
pub const SHARE: &str = "/share";

/// Why the jail cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error(
        "Cannot make the namespaces of a jail: the VMM needs root (CAP_SYS_ADMIN), or `\"jail\": false` in its configuration"
    )]
    Namespaces(#[source] nix::Error),
    #[error("The pod's share cannot be built")]
    Share(#[source] ShareError),
    #[error("Cannot take the directory of {path} into the jail")]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{0} lies in the host's root directory, and all of that would be in the jail: use another")]
    WholeRoot(PathBuf),
    #[error("Cannot make the root of the jail: {what}")]
    Root {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("Capabilities cannot be dropped")]
    Capabilities(#[source] io::Error),
    #[error("Capabilities cannot be kept for all users of the guest")]
    Keep(#[source] io::Error),
    #[error("Thread that is to remove the pod's directory cannot be made")]
    Janitor(#[source] io::Error),
    #[error("Privileges cannot be given up: {what}")]
    Process {
        what: &'static str,
        #[source]
        source: nix::Error,
    },
    #[error("Landlock rules cannot be put in force")]
    Landlock(#[source] ::landlock::RulesetError),
    #[error("Filters of system calls cannot be made")]
    Seccomp(#[source] seccompiler::BackendError),
}

/// A process in its jail.
#[derive(Debug)]
pub struct Jailed {
    /// The configuration, with the paths that hold from now on.
    pub config: ValidConfig,
    pub janitor: Option<Janitor>,
}

/// Jails the process. To be called before it has a second thread: most of this is a thread's own, and is inherited.
///
/// # Errors
/// [`JailError`]. The process is then neither jailed nor as it was: it has to end.
pub fn enter(mut config: ValidConfig) -> Result<Jailed, JailError> {
    seccomp::prepare().map_err(JailError::Seccomp)?;
    let place = janitor::place(config.state_dir.as_deref())?;
    let directories = root::enter(&mut config)?;
    give_up()?;
    let janitor = place.map(Janitor::start).transpose().map_err(JailError::Janitor)?;
    let share = config.share.as_ref().map(|_| Path::new(SHARE));
    landlock::restrict(share, &directories).map_err(JailError::Landlock)?;
    Ok(Jailed { config, janitor })
}

fn give_up() -> Result<(), JailError> {
    let failed = |what| move |source| JailError::Process { what, source };
    // First, as it takes one that is dropped.
    capabilities::keep_for_all_users().map_err(JailError::Keep)?;
    capabilities::drop_others().map_err(JailError::Capabilities)?;
    nix::sys::prctl::set_no_new_privs().map_err(failed("no_new_privs"))?;
    // Another VMM has the same user and no less capabilities: without this, it might look into this one's memory.
    nix::sys::prctl::set_dumpable(false).map_err(failed("the dumpable attribute"))?;
    // A core would be guest memory on the host's disk.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(failed("RLIMIT_CORE"))
}
