//! Sockets: accepting, receiving a descriptor, and the loopback interface.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType};

use super::new_descriptor;

/// Accepts a connection, non-blocking and closed on exec.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    let raw = socket::accept4(listener.as_raw_fd(), SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4 has just returned this new descriptor.
    unsafe { new_descriptor(raw.into()) }
}

/// Receives one message, with the descriptor that came with it. Does not block.
pub(crate) fn receive(from: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<(usize, Option<OwnedFd>)> {
    let mut control = nix::cmsg_space!(i32);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = socket::recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let mut received = None;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = part {
            for raw in descriptors {
                // SAFETY: the kernel installed this descriptor for this message; each is taken once.
                received = Some(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
    }
    Ok((message.bytes, received))
}

/// Sets the loopback interface of the calling thread's network namespace up; the kernel then gives it its addresses.
pub(crate) fn loopback_up() -> nix::Result<()> {
    let any = socket::socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut name = [0; libc::IFNAMSIZ];
    name[0] = b'l'.cast_signed();
    name[1] = b'o'.cast_signed();
    let flags = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or(0);
    let request =
        libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    // SAFETY: SIOCSIFFLAGS reads the name and the flags of one ifreq, and both are set.
    Errno::result(unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }).map(drop)
}
