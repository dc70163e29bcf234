//! The system calls that no crate wraps in a safe function. Each wrapper here is safe to call with any arguments and makes
//! exactly one call; what the calls are for is said where they are used.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// Attaches an open `/dev/net/tun` to a new interface; its name. A `%d` in `name` becomes the first number that is free.
pub(crate) fn attach_tun(tun: BorrowedFd<'_>, name: &str, flags: libc::c_int) -> nix::Result<String> {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    // One byte stays zero, as the end.
    if name.len() >= ifr_name.len() {
        return Err(Errno::ENAMETOOLONG);
    }
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let ifru_flags = i16::try_from(flags).map_err(|_| Errno::EINVAL)?;
    let mut request = libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags } };
    // SAFETY: TUNSETIFF reads the name and the flags of one ifreq, and both are set; it writes the name of the same.
    Errno::result(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned());
    String::from_utf8(name.collect()).map_err(|_| Errno::EILSEQ)
}
