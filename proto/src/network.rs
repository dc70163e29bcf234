//! The pod's network as the guest is to have it: what a network plugin made on the host, in the kernel's own terms
//! (rtnetlink). Names and addresses of hosts are none of it: containers find those in files.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

/// More than a pod has, of addresses, routes and neighbours each: a guard for both sides.
pub const MAX_NETWORK_ENTRIES: usize = 256;
/// As many as the VMM has devices for.
pub const MAX_NETWORK_INTERFACES: usize = 4;

/// Interfaces by address, and what belongs to them. Everything names an interface by its place in `interfaces`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    pub interfaces: Vec<NetworkInterface>,
    pub addresses: Vec<InterfaceAddress>,
    pub routes: Vec<Route>,
    /// Those that are never asked for by ARP or NDP.
    pub neighbours: Vec<Neighbour>,
}

/// One interface. The guest finds it by its hardware address.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkInterface {
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u32,
    /// Without, the interface has not even a link-local address.
    pub ipv6: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceAddress {
    pub interface: u8,
    pub address: IpAddr,
    pub prefix: u8,
    /// The other end of a link between two; `prefix` is then its.
    pub peer: Option<IpAddr>,
    pub broadcast: Option<Ipv4Addr>,
    /// `RT_SCOPE_*` of `linux/rtnetlink.h`.
    pub scope: u8,
}

/// One route of the main table. That of a network which an address is in is one, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    pub kind: RouteKind,
    pub destination: IpAddr,
    pub prefix: u8,
    /// Not of the destination's family where IPv4 goes over a router known by its IPv6 address.
    pub gateway: Option<IpAddr>,
    /// The gateway is on the link though no route says so.
    pub onlink: bool,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    pub scope: u8,
    /// `RTPROT_*`: who made it.
    pub protocol: u8,
    /// Type of service, of IPv4.
    pub tos: u8,
    pub metric: Option<u32>,
    pub mtu: Option<u32>,
    pub advmss: Option<u32>,
}

/// What becomes of a packet on a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RouteKind {
    /// It leaves by this interface.
    Unicast {
        interface: u8,
    },
    Blackhole,
    Unreachable,
    Prohibit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    pub interface: u8,
    pub address: IpAddr,
    pub mac: [u8; 6],
}

/// Whether an interface may be called so: as Linux has it, and not as what every guest has (`lo`). A `%` would have
/// the kernel make up a number.
#[must_use]
pub fn validate_interface_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
    (1..=15).contains(&name.len()) && !matches!(name, "." | ".." | "lo") && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_linux_would_refuse_or_change_are_refused() {
        for bad in ["", ".", "..", "lo", "a/b", "a:b", "eth%d", "a b", "\u{e4}", "sixteen-letters-"] {
            assert!(!validate_interface_name(bad), "{bad:?}");
        }
        assert!(validate_interface_name("eth0") && validate_interface_name("fifteen.letters"));
    }
}
