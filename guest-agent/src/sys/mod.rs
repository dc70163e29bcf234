//! The system calls that no crate wraps in a safe function. Each wrapper here is safe to call with any arguments
//! and makes exactly one call; what the calls are for is said where they are used.

pub(crate) mod bpf;
pub(crate) mod clock;
pub(crate) mod mount;
pub(crate) mod process;
pub(crate) mod seccomp;
pub(crate) mod socket;
pub(crate) mod terminal;

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// Turns the return value of a system call that makes a descriptor into its owner.
///
/// # Safety
/// `result` is what such a call has just returned, and nothing else owns the descriptor.
unsafe fn new_descriptor(result: libc::c_long) -> nix::Result<OwnedFd> {
    let raw = RawFd::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: by the caller's promise `raw` is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}
