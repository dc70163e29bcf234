//! The pod's network seen from the host: what a network plugin made in a network namespace becomes the network of a VM.
//!
//! The plugin's interfaces stay what they are. Each gets a tap beside it, in the same namespace ([`tap`]), and all frames go from
//! one to the other ([`traffic`]): the guest has the interface's hardware address, and is in its place on the wire. Its
//! addresses and routes are read ([`read`], [`routes`]) for the guest to have them, too.
//!
//! Makes no network, and knows none of the programs that do.

mod netlink;
mod read;
mod routes;
mod tap;
mod traffic;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::thread;

use krx_proto::{MAX_NETWORK_ENTRIES, MAX_NETWORK_INTERFACES, NetworkSpec};
use krx_vmm::config::interface::Interface;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use nix::sched::{CloneFlags, setns};

use self::netlink::Netlink;
pub use self::netlink::NetlinkError;
use self::read::Link;
use self::tap::Tap;
use self::traffic::Redirect;

/// Why a pod cannot have the network of its namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error(
        "Cannot enter the network namespace {path}: it has to be a file of one, as `ip netns add` makes it"
    )]
    Namespace {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Cannot {doing}")]
    Netlink {
        doing: String,
        #[source]
        source: NetlinkError,
    },
    #[error("The network namespace has more than {MAX_NETWORK_ENTRIES} {0}, which is too many for a pod")]
    TooMany(&'static str),
    #[error(
        "The network namespace has more than {MAX_NETWORK_INTERFACES} interfaces, the most a pod can have: {0}"
    )]
    TooManyInterfaces(String),
    #[error(
        "Interface {name} cannot be a pod's: {why}. Set it down, or have the network plugin make another kind"
    )]
    Unsupported { name: String, why: String },
    #[error("The network namespace is another pod's: its {tap} is there")]
    InUse { tap: String },
    #[error("Cannot make a tap: it needs /dev/net/tun (module tun) and root's rights")]
    Tap(#[source] io::Error),
    #[error("Cannot start a thread")]
    Thread(#[source] io::Error),
}

/// A pod's network. Dropping it leaves the namespace as it was.
#[derive(Debug)]
pub struct Network {
    /// Opened in the namespace, and so of it, wherever it is used.
    netlink: Netlink,
    redirects: Vec<Redirect>,
    taps: Vec<Tap>,
    guest: NetworkSpec,
}

/// One interface of the VM.
#[derive(Debug, Clone)]
pub struct VmInterface<'a> {
    /// For the VMM to inherit: the tap, once for each of its queues.
    pub taps: Vec<BorrowedFd<'a>>,
    pub mac: [u8; 6],
    pub mtu: u32,
}

impl From<&VmInterface<'_>> for Interface {
    fn from(VmInterface { taps, mac, mtu }: &VmInterface<'_>) -> Self {
        let mac: Vec<_> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut fds = taps.iter().map(AsRawFd::as_raw_fd);
        Self { tap_fd: fds.next().unwrap_or(-1), queue_fds: fds.collect(), mac: mac.join(":"), mtu: *mtu }
    }
}

impl Network {
    /// Takes over the interfaces in the namespace that `netns` is a file of. There may be none but the loopback one: the
    /// pod then has no network. Each gets so many `queues` in each direction. The caller's own namespace stays what it is.
    ///
    /// # Errors
    /// [`NetworkError`]: nothing of what was begun then stays.
    pub fn attach(netns: &Path, queues: usize) -> Result<Self, NetworkError> {
        inside(netns, |_| Self::take_over(queues))?
    }

    /// What the VM is to have, in the order of [`NetworkSpec::interfaces`].
    pub fn interfaces(&self) -> impl Iterator<Item = VmInterface<'_>> {
        let both = self.taps.iter().zip(&self.guest.interfaces);
        both.map(|(tap, interface)| {
            let taps = tap.fds().collect();
            VmInterface { taps, mac: interface.mac, mtu: interface.mtu }
        })
    }

    /// What the guest is to be told.
    #[must_use]
    pub fn guest(&self) -> &NetworkSpec {
        &self.guest
    }

    fn take_over(queues: usize) -> Result<Self, NetworkError> {
        let failed = |doing: String| |source| NetworkError::Netlink { doing, source };
        let mut netlink = Netlink::open().map_err(failed("open a netlink socket".into()))?;
        let (links, guest) = read::read(&mut netlink, has_ipv6)?;
        // Undone by its drop, as far as it came.
        let mut network = Self { netlink, redirects: Vec::new(), taps: Vec::new(), guest };
        for Link { index, interface } in links {
            let tap = Tap::make(&mut network.netlink, interface.mtu, queues)?;
            // The interface's own direction last: from then on the host's stack gets nothing more from it.
            for (from, to) in [(tap.index, index), (index, tap.index)] {
                let doing = format!(
                    "redirect the traffic of interface {}: it needs the modules sch_ingress, cls_matchall and act_mirred",
                    interface.name
                );
                let redirect = Redirect::make(&mut network.netlink, from, to).map_err(failed(doing))?;
                network.redirects.push(redirect);
            }
            network.taps.push(tap);
        }
        Ok(network)
    }
}

/// Does something in the namespace that `netns` is a file of, which it gets, too. The caller's own stays what it is.
///
/// # Errors
/// The namespace cannot be entered.
pub(crate) fn inside<T: Send>(netns: &Path, body: impl FnOnce(&File) -> T + Send) -> Result<T, NetworkError> {
    let failed = |source| NetworkError::Namespace { path: netns.into(), source };
    let namespace = File::open(netns).map_err(failed)?;
    // A namespace is a thread's, so a thread is spent on it.
    thread::scope(|scope| {
        let entered = || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(|error| failed(error.into()))?;
            Ok(body(&namespace))
        };
        let thread = thread::Builder::new().name("netns".into()).spawn_scoped(scope, entered);
        let thread = thread.map_err(NetworkError::Thread)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Brings up the loopback interface of the calling thread's namespace, as it is in every container.
pub(crate) fn loopback_up() -> Result<(), NetworkError> {
    let mut message = LinkMessage::default();
    // The first in every namespace.
    message.header.index = 1;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    let request = |mut netlink: Netlink| netlink.request(RouteNetlinkMessage::SetLink(message), 0);
    Netlink::open().and_then(request).map_err(|source| NetworkError::Netlink {
        doing: "bring up the loopback interface of the network namespace".into(),
        source,
    })
}

impl Drop for Network {
    fn drop(&mut self) {
        for redirect in self.redirects.iter().rev() {
            redirect.undo(&mut self.netlink);
        }
    }
}

/// Whether the interface of the calling thread's namespace speaks IPv6.
fn has_ipv6(name: &str) -> bool {
    let setting = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"));
    setting.is_ok_and(|value| value.trim() == "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_are_no_namespace_are_named() {
        for path in ["/no/such/netns", "/proc/self/ns/mnt", "/etc/passwd", "/"] {
            let error = Network::attach(Path::new(path), 1).unwrap_err();
            assert!(matches!(&error, NetworkError::Namespace { .. }), "{error:?}");
            assert!(error.to_string().contains(path), "{error}");
        }
    }
}
