//! Taps: interfaces whose other end is a descriptor, which the VMM gets. An interface lives as long as its last
//! descriptor, so none outlives the processes that have one, however they end.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use nix::net::if_::if_nametoindex;

use super::NetworkError;
use super::netlink::Netlink;
use crate::sys;

/// Names of taps begin so; the kernel adds a number.
pub(super) const PREFIX: &str = "krx-tap";
/// As the VMM wants them.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
const DEVICE: &str = "/dev/net/tun";

#[derive(Debug)]
pub(super) struct Tap {
    /// One for each of its queues.
    fds: Vec<OwnedFd>,
    pub(super) index: u32,
}

impl Tap {
    /// Makes one with so many queues in the calling thread's network namespace, which is also `netlink`'s, and brings it up.
    pub(super) fn make(netlink: &mut Netlink, mtu: u32, queues: usize) -> Result<Self, NetworkError> {
        let (fds, name) = open(queues).map_err(NetworkError::Tap)?;
        // Else the host would have an address on it, and send into it what nobody asked for.
        match fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1") {
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result.map_err(NetworkError::Tap)?,
        }
        let index = if_nametoindex(&*name).map_err(|error| NetworkError::Tap(error.into()))?;
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = vec![LinkAttribute::Mtu(mtu)];
        netlink.request(RouteNetlinkMessage::SetLink(message), 0).map_err(|source| {
            NetworkError::Netlink { doing: format!("set up the tap {name} with MTU {mtu}"), source }
        })?;
        Ok(Self { fds, index })
    }

    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.fds.iter().map(AsFd::as_fd)
    }
}

fn open(queues: usize) -> io::Result<(Vec<OwnedFd>, String)> {
    let flags = if queues > 1 { FLAGS | libc::IFF_MULTI_QUEUE } else { FLAGS };
    let (mut fds, mut name) = (Vec::with_capacity(queues), format!("{PREFIX}%d"));
    for _ in 0..queues.max(1) {
        let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE)?;
        // The first makes the interface, the others are queues of it.
        name = sys::attach_tun(device.as_fd(), &name, flags)?;
        fds.push(device.into());
    }
    Ok((fds, name))
}
