//! Terminals: the ioctls of a pseudo-terminal pair.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use krx_proto::TerminalSize;
use nix::errno::Errno;

use super::new_descriptor;

/// Opens the other end of the pair that `controller` is one end of, without any path, so no file system the
/// container controls has a say in what is opened.
pub(crate) fn open_peer(controller: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int.
    Errno::result(unsafe { libc::ioctl(controller.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) })?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags, an integer.
    let result = unsafe { libc::ioctl(controller.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    // SAFETY: TIOCGPTPEER returns a new descriptor.
    unsafe { new_descriptor(result.into()) }
}

/// Makes `terminal` the controlling terminal of the calling session leader.
pub(crate) fn set_controlling(terminal: BorrowedFd<'_>) -> nix::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// Sets the window size; the foreground process group gets its SIGWINCH from the kernel.
pub(crate) fn set_size(terminal: BorrowedFd<'_>, size: TerminalSize) -> nix::Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }).map(drop)
}
