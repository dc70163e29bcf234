//! The host side: a tap, or a socket that keeps frames apart, with a header of virtio 1 before each frame. One system
//! call a frame, never blocking.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::header::{self, Header, Offloads};
use crate::sys::{self, GuestPieces};

/// How a tap has to be opened: frames of Ethernet, nothing of the kernel's before them but the virtio header.
const NEEDED_FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Why a descriptor is no tap that a device could use.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error("It is not a tap that is attached to an interface")]
    NotATap(#[source] io::Error),
    #[error("The tap was not opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR: its frames would be misread")]
    Flags,
    #[error("It cannot be set up for the headers of virtio 1, or not for reading without waiting")]
    Setup(#[source] io::Error),
}

/// Frames in and out.
#[derive(Debug)]
pub(super) struct Tap {
    fd: File,
    /// Offloads are to be told to it.
    has_offloads: bool,
}

/// What became of a frame for the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// It went out, or was refused and is lost, as on any wire.
    Gone,
    /// The host takes no frame now.
    Full,
}

impl Tap {
    /// Sets up a tap that the owner has attached.
    pub(super) fn attached(fd: OwnedFd) -> Result<Self, TapError> {
        let flags = sys::tap_flags(fd.as_fd()).map_err(TapError::NotATap)?;
        if flags & NEEDED_FLAGS != NEEDED_FLAGS {
            return Err(TapError::Flags);
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "12")]
        let size = header::SIZE as i32;
        sys::set_tap_header_size(fd.as_fd(), size).map_err(TapError::Setup)?;
        let tap = Self::non_blocking(fd, true)?;
        // Until a driver says what it can do: an interface that was used before may have been told otherwise.
        tap.set_offloads(Offloads::default()).map_err(TapError::Setup)?;
        Ok(tap)
    }

    /// A socket that keeps frames apart in a tap's place.
    pub(super) fn socket(fd: OwnedFd) -> Result<Self, TapError> {
        Self::non_blocking(fd, false)
    }

    fn non_blocking(fd: OwnedFd, has_offloads: bool) -> Result<Self, TapError> {
        let failed = |error: nix::Error| TapError::Setup(error.into());
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL).map_err(failed)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map_err(failed)?;
        Ok(Self { fd: fd.into(), has_offloads })
    }

    /// Tells the kernel what it may leave to the guest.
    pub(super) fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        if !self.has_offloads {
            return Ok(());
        }
        let bit = |on: bool, bit: u32| if on { bit } else { 0 };
        let bits = bit(offloads.checksum, libc::TUN_F_CSUM)
            | bit(offloads.tso4, libc::TUN_F_TSO4)
            | bit(offloads.tso6, libc::TUN_F_TSO6);
        sys::set_tap_offloads(self.fd.as_fd(), bits)
    }

    /// Has the interface use this one of its queues, or do without.
    pub(super) fn set_used(&self, used: bool) -> io::Result<()> {
        sys::set_tap_queue(self.fd.as_fd(), used)
    }

    /// For a kernel that moves the frames itself.
    pub(super) fn file(&self) -> &File {
        &self.fd
    }

    /// Reads one header and frame; its length, or nothing when there is no frame. A length beyond that of `pieces` is of
    /// a frame that they could not hold, and that is lost.
    pub(super) fn read(&self, pieces: &mut GuestPieces) -> io::Result<Option<usize>> {
        loop {
            match pieces.read_from(self.fd.as_fd()) {
                // A tap never ends; a socket whose other end is closed does.
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(len) => return Ok(Some(len)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes the frame in `pieces` behind `header`.
    pub(super) fn write(&self, header: Header, pieces: &mut GuestPieces) -> io::Result<Sent> {
        loop {
            match pieces.write_to(self.fd.as_fd(), &header.to_bytes()) {
                Ok(_) => return Ok(Sent::Gone),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Sent::Full),
                // The interface was removed: there will never be a frame again, and the descriptor stays ready.
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return Err(error),
                // A frame that the kernel refuses, an interface that is down, no memory: lost on the wire.
                Err(_) => return Ok(Sent::Gone),
            }
        }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
