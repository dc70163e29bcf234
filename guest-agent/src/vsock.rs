//! The agent's vsock: its four listeners, and the call to the host that tells it the guest is up.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use krx_proto::port;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, getpeername, listen, socket,
};

use crate::error::{Doing, StepError};
use crate::sys;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// What is listened for, by port.
#[derive(Debug)]
pub(crate) struct Listeners {
    pub(crate) power: OwnedFd,
    pub(crate) control: OwnedFd,
    pub(crate) stream: OwnedFd,
    pub(crate) forward: OwnedFd,
}

impl Listeners {
    pub(crate) fn open() -> Result<Self, StepError> {
        Ok(Self {
            power: listener(port::POWER)?,
            control: listener(port::CONTROL)?,
            stream: listener(port::STREAM)?,
            forward: listener(port::FORWARD)?,
        })
    }
}

fn listener(port: u32) -> Result<OwnedFd, StepError> {
    let doing = || format!("Cannot listen on vsock port {port}");
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None).doing(doing)?;
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port)).doing(doing)?;
    listen(&listener, Backlog::new(BACKLOG).doing(doing)?).doing(doing)?;
    Ok(listener)
}

/// Accepts a connection of the host. `None`: there is none, or it is not the host's; a container has no say here.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> Option<OwnedFd> {
    let connection = sys::socket::accept(listener).ok()?;
    let peer: VsockAddr = getpeername(connection.as_raw_fd()).ok()?;
    (peer.cid() == libc::VMADDR_CID_HOST).then_some(connection)
}

/// Calls the owner, who listens on the host.
pub(crate) fn dial_owner() -> Result<OwnedFd, StepError> {
    let doing = || format!("Cannot reach the owner on vsock port {} of the host", port::CONTROL);
    let connection =
        socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).doing(doing)?;
    let host = VsockAddr::new(libc::VMADDR_CID_HOST, port::CONTROL);
    match connect(connection.as_raw_fd(), &host) {
        Err(Errno::ENODEV | Errno::ENETUNREACH) => {
            return Err(StepError::new("This machine has no vsock device", Errno::ENODEV));
        }
        result => result.doing(doing)?,
    }
    let flags = fcntl(connection.as_fd(), FcntlArg::F_GETFL).doing(doing)?;
    let flags = OFlag::from_bits_truncate(flags) | OFlag::O_NONBLOCK;
    fcntl(connection.as_fd(), FcntlArg::F_SETFL(flags)).doing(doing)?;
    Ok(connection)
}
