//! Gives the guest the network of its pod: interfaces, addresses, routes and neighbours as the host found them in the
//! pod's network namespace. It knows nothing of what is behind an interface, and keeps nothing: it is done once.
//!
//! Addresses are added without the routes that the kernel would make for them, because those come with all others; and
//! without asking whether somebody else has them, because the host has given them to this pod alone.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;

use krx_proto::{
    AgentError, InterfaceAddress, MAX_NETWORK_ENTRIES, MAX_NETWORK_INTERFACES, Neighbour, NetworkInterface,
    NetworkSpec, Route, RouteKind, validate_interface_name,
};
use nix::errno::Errno;

use crate::error::{Doing, StepError, invalid};
use crate::netlink::{
    APPEND, CREATE, Message, NEW_ADDRESS, NEW_LINK, NEW_NEIGHBOUR, NEW_ROUTE, Netlink, REPLACE, attribute,
};

/// Where the kernel lists interfaces.
const INTERFACES: &str = "/sys/class/net";
/// Settings of IPv6, by interface.
const IPV6: &str = "/proc/sys/net/ipv6/conf";

/// Attributes of links, addresses, routes and neighbours (`linux/if_link.h`, `if_addr.h`, `rtnetlink.h`, `neighbour.h`).
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_VIA: u16 = 18;
const RTAX_MTU: u16 = 2;
const RTAX_ADVMSS: u16 = 8;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

/// `IFA_F_NODAD`, `IFA_F_PERMANENT` and `IFA_F_NOPREFIXROUTE`.
const ADDRESS_FLAGS: u32 = 0x02 | 0x80 | 0x200;
const RT_TABLE_MAIN: u8 = 254;
const RTNH_F_ONLINK: u32 = 4;
const NUD_PERMANENT: u16 = 0x80;

/// Makes the network. What it was given is checked before anything is done.
pub(crate) fn apply(spec: &NetworkSpec) -> Result<(), AgentError> {
    check(spec)?;
    let indices = find(&spec.interfaces)?;
    let mut netlink = Netlink::open().doing(|| "Cannot open a netlink socket")?;
    make(&mut netlink, spec, &indices).map_err(AgentError::from)
}

fn check(spec: &NetworkSpec) -> Result<(), AgentError> {
    let entries = [spec.addresses.len(), spec.routes.len(), spec.neighbours.len()];
    if spec.interfaces.len() > MAX_NETWORK_INTERFACES || entries.iter().any(|len| *len > MAX_NETWORK_ENTRIES)
    {
        return Err(invalid(format_args!(
            "network: at most {MAX_NETWORK_INTERFACES} interfaces, and {MAX_NETWORK_ENTRIES} addresses, routes and \
             neighbours each are allowed"
        )));
    }
    for (at, interface) in spec.interfaces.iter().enumerate() {
        let NetworkInterface { name, mac, .. } = interface;
        if !validate_interface_name(name) {
            return Err(invalid(format_args!("network: {name:?} is not a name for an interface")));
        }
        if spec.interfaces[..at].iter().any(|other| other.name == *name || other.mac == *mac) {
            return Err(invalid(format_args!(
                "network: {interface} is named twice",
                interface = shown(interface)
            )));
        }
    }
    let known = |interface: u8| usize::from(interface) < spec.interfaces.len();
    let fits = |address: IpAddr, prefix: u8| prefix <= if address.is_ipv4() { 32 } else { 128 };
    let addresses = spec.addresses.iter().all(|entry| {
        known(entry.interface)
            && fits(entry.address, entry.prefix)
            && entry.peer.is_none_or(|peer| peer.is_ipv4() == entry.address.is_ipv4())
    });
    let routes = spec.routes.iter().all(|route| {
        let there = match route.kind {
            RouteKind::Unicast { interface } => known(interface),
            _ => true,
        };
        there
            && fits(route.destination, route.prefix)
            && route.source.is_none_or(|source| source.is_ipv4() == route.destination.is_ipv4())
    });
    if addresses && routes && spec.neighbours.iter().all(|neighbour| known(neighbour.interface)) {
        Ok(())
    } else {
        Err(invalid("network: an entry names an interface that is not there, or mixes what cannot be"))
    }
}

/// The kernel's number for each interface.
fn find(wanted: &[NetworkInterface]) -> Result<Vec<u32>, AgentError> {
    let mut there = BTreeMap::new();
    let entries = fs::read_dir(INTERFACES).doing(|| format!("Cannot list {INTERFACES}"))?;
    for entry in entries.flatten() {
        let read = |file: &str| fs::read_to_string(entry.path().join(file)).ok();
        if let (Some(mac), Some(index)) = (read("address"), read("ifindex")) {
            let index = index.trim().parse::<u32>().ok();
            there.extend(parse_mac(mac.trim()).zip(index));
        }
    }
    let number = |interface: &NetworkInterface| {
        let index = there.get(&interface.mac).copied();
        index
            .ok_or_else(|| invalid(format_args!("network: the guest has no device for {}", shown(interface))))
    };
    wanted.iter().map(number).collect()
}

fn make(netlink: &mut Netlink, spec: &NetworkSpec, indices: &[u32]) -> Result<(), StepError> {
    let interfaces = || spec.interfaces.iter().zip(indices.iter().copied());
    // By way of names that nobody has: one may be called what another is called so far.
    for (interface, index) in interfaces() {
        let name = format!("krx-{index}");
        netlink.request(link(index, Some(&name), None, false)).doing(|| naming(interface))?;
    }
    for (interface, index) in interfaces() {
        let NetworkInterface { name, mtu, ipv6, .. } = interface;
        let doing = || format!("Cannot set up interface {} with MTU {mtu}", shown(interface));
        netlink.request(link(index, Some(name), None, false)).doing(|| naming(interface))?;
        netlink.request(link(index, None, Some(*mtu), false)).doing(doing)?;
        let (setting, value) = if *ipv6 { ("accept_dad", "0") } else { ("disable_ipv6", "1") };
        match fs::write(format!("{IPV6}/{name}/{setting}"), value) {
            // A kernel without IPv6.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            result => result.doing(|| format!("Cannot set {setting} of interface {}", shown(interface)))?,
        }
        netlink.request(link(index, None, None, true)).doing(doing)?;
    }
    let one = |at: u8| (&spec.interfaces[usize::from(at)], indices[usize::from(at)]);
    for entry in &spec.addresses {
        let (interface, index) = one(entry.interface);
        let InterfaceAddress { address, prefix, .. } = entry;
        existing(netlink.request(address_message(entry, index)))
            .doing(|| format!("Cannot give interface {} the address {address}/{prefix}", shown(interface)))?;
    }
    for route in in_order(&spec.routes) {
        let index = match route.kind {
            RouteKind::Unicast { interface } => Some(one(interface).1),
            _ => None,
        };
        existing(netlink.request(route_message(route, index))).doing(|| {
            let Route { destination, prefix, gateway, kind, .. } = route;
            let by = match kind {
                RouteKind::Unicast { interface } => format!(" by interface {}", shown(one(*interface).0)),
                kind => format!(" ({kind:?})"),
            };
            let over = gateway.map_or_else(String::new, |gateway| format!(" over {gateway}"));
            format!("Cannot add the route to {destination}/{prefix}{over}{by}")
        })?;
    }
    for neighbour in &spec.neighbours {
        let (interface, index) = one(neighbour.interface);
        netlink.request(neighbour_message(neighbour, index)).doing(|| {
            format!("Cannot add the neighbour {} of interface {}", neighbour.address, shown(interface))
        })?;
    }
    Ok(())
}

fn naming(interface: &NetworkInterface) -> String {
    format!("Cannot name the interface {}", shown(interface))
}

/// What the kernel has made by itself is as good.
fn existing(result: nix::Result<()>) -> nix::Result<()> {
    if result == Err(Errno::EEXIST) { Ok(()) } else { result }
}

/// Routes to links before those that go over a gateway, which has to be on one.
fn in_order(routes: &[Route]) -> impl Iterator<Item = &Route> {
    let (near, far): (Vec<_>, Vec<_>) = routes.iter().partition(|route| route.gateway.is_none());
    near.into_iter().chain(far)
}

fn link(index: u32, name: Option<&str>, mtu: Option<u32>, up: bool) -> Message {
    let flags = if up { libc::IFF_UP.unsigned_abs() } else { 0 };
    // Family and type, index, flags, and which of the flags are meant.
    let fixed = [0, index, flags, flags].map(u32::to_ne_bytes).concat();
    let name = name.map(|name| [name.as_bytes(), b"\0"].concat());
    Message::new(NEW_LINK, 0, &fixed).with_if(IFLA_IFNAME, name).with_if(IFLA_MTU, mtu.map(u32::to_ne_bytes))
}

fn address_message(entry: &InterfaceAddress, index: u32) -> Message {
    let InterfaceAddress { address, prefix, peer, broadcast, scope, .. } = *entry;
    let mut fixed = vec![family(address), prefix, 0, scope];
    fixed.extend(index.to_ne_bytes());
    Message::new(NEW_ADDRESS, CREATE | REPLACE, &fixed)
        .with(IFA_LOCAL, &octets(address))
        .with(IFA_ADDRESS, &octets(peer.unwrap_or(address)))
        .with_if(IFA_BROADCAST, broadcast.map(|address| address.octets()))
        .with(IFA_FLAGS, &ADDRESS_FLAGS.to_ne_bytes())
}

fn route_message(route: &Route, index: Option<u32>) -> Message {
    let kind = match route.kind {
        RouteKind::Unicast { .. } => libc::RTN_UNICAST,
        RouteKind::Blackhole => libc::RTN_BLACKHOLE,
        RouteKind::Unreachable => libc::RTN_UNREACHABLE,
        RouteKind::Prohibit => libc::RTN_PROHIBIT,
    };
    let Route { destination, prefix, source, scope, protocol, tos, .. } = *route;
    let mut fixed = vec![family(destination), prefix, 0, tos, RT_TABLE_MAIN, protocol, scope, kind];
    fixed.extend((if route.onlink { RTNH_F_ONLINK } else { 0 }).to_ne_bytes());
    let mut message = Message::new(NEW_ROUTE, CREATE | APPEND, &fixed);
    if prefix > 0 {
        message = message.with(RTA_DST, &octets(destination));
    }
    let gateway = route.gateway.map(|gateway| match family(gateway) == family(destination) {
        true => (RTA_GATEWAY, octets(gateway)),
        false => (RTA_VIA, [&u16::from(family(gateway)).to_ne_bytes()[..], &octets(gateway)].concat()),
    });
    if let Some((kind, gateway)) = gateway {
        message = message.with(kind, &gateway);
    }
    let metrics = [(RTAX_MTU, route.mtu), (RTAX_ADVMSS, route.advmss)]
        .into_iter()
        .filter_map(|(kind, value)| Some(attribute(kind, &value?.to_ne_bytes())))
        .collect::<Vec<_>>()
        .concat();
    message
        .with_if(RTA_OIF, index.map(u32::to_ne_bytes))
        .with_if(RTA_PRIORITY, route.metric.map(u32::to_ne_bytes))
        .with_if(RTA_PREFSRC, source.map(octets))
        .with_if(RTA_METRICS, (!metrics.is_empty()).then_some(metrics))
}

fn neighbour_message(neighbour: &Neighbour, index: u32) -> Message {
    let mut fixed = vec![family(neighbour.address), 0, 0, 0];
    fixed.extend(index.to_ne_bytes());
    fixed.extend(NUD_PERMANENT.to_ne_bytes());
    fixed.extend([0; 2]);
    Message::new(NEW_NEIGHBOUR, CREATE | REPLACE, &fixed)
        .with(NDA_DST, &octets(neighbour.address))
        .with(NDA_LLADDR, &neighbour.mac)
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    u8::try_from(family).unwrap_or_default()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

fn shown(interface: &NetworkInterface) -> String {
    let mac: Vec<_> = interface.mac.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{} ({})", interface.name, mac.join(":"))
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<_>> = text.split(':').map(|pair| u8::from_str_radix(pair, 16).ok()).collect();
    bytes?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, last: u8) -> NetworkInterface {
        NetworkInterface { name: name.into(), mac: [2, 0, 0, 0, 0, last], mtu: 1500, ipv6: true }
    }

    fn route(destination: &str, prefix: u8, gateway: Option<&str>) -> Route {
        Route {
            kind: RouteKind::Unicast { interface: 0 },
            destination: destination.parse().unwrap(),
            prefix,
            gateway: gateway.map(|gateway| gateway.parse().unwrap()),
            onlink: false,
            source: None,
            scope: 0,
            protocol: 3,
            tos: 0,
            metric: None,
            mtu: None,
            advmss: None,
        }
    }

    fn address(address: &str, prefix: u8) -> InterfaceAddress {
        let address = address.parse().unwrap();
        InterfaceAddress { interface: 0, address, prefix, peer: None, broadcast: None, scope: 0 }
    }

    fn spec() -> NetworkSpec {
        NetworkSpec { interfaces: vec![interface("eth0", 1)], ..NetworkSpec::default() }
    }

    #[test]
    fn numbers_that_a_pod_cannot_have_are_refused() {
        assert!(check(&spec()).is_ok());
        let many = |count| (0..count).map(|at| interface(&format!("eth{at}"), at)).collect();
        assert!(check(&NetworkSpec { interfaces: many(4), ..spec() }).is_ok());
        assert!(check(&NetworkSpec { interfaces: many(5), ..spec() }).is_err());
        assert!(check(&NetworkSpec { addresses: vec![address("10.0.0.1", 8); 256], ..spec() }).is_ok());
        assert!(check(&NetworkSpec { addresses: vec![address("10.0.0.1", 8); 257], ..spec() }).is_err());
        assert!(check(&NetworkSpec { routes: vec![route("::", 0, None); 257], ..spec() }).is_err());
    }

    #[test]
    fn entries_that_fit_nothing_are_refused() {
        for bad in [address("10.0.0.1", 33), address("::1", 129)] {
            assert!(check(&NetworkSpec { addresses: vec![bad], ..spec() }).is_err());
        }
        let strange = InterfaceAddress { interface: 1, ..address("10.0.0.1", 8) };
        assert!(check(&NetworkSpec { addresses: vec![strange], ..spec() }).is_err());
        let mixed = InterfaceAddress { peer: Some("::1".parse().unwrap()), ..address("10.0.0.1", 8) };
        assert!(check(&NetworkSpec { addresses: vec![mixed], ..spec() }).is_err());
        let strange = Route { kind: RouteKind::Unicast { interface: 1 }, ..route("::", 0, None) };
        assert!(check(&NetworkSpec { routes: vec![strange], ..spec() }).is_err());
        let nowhere = Route { kind: RouteKind::Blackhole, ..route("::", 0, None) };
        assert!(check(&NetworkSpec { routes: vec![nowhere], ..spec() }).is_ok());
        let neighbour = Neighbour { interface: 1, address: "10.0.0.1".parse().unwrap(), mac: [2; 6] };
        assert!(check(&NetworkSpec { neighbours: vec![neighbour], ..spec() }).is_err());
        for twice in [interface("eth0", 2), interface("eth1", 1), interface("a/b", 2)] {
            assert!(check(&NetworkSpec { interfaces: vec![interface("eth0", 1), twice], ..spec() }).is_err());
        }
    }

    #[test]
    fn gateways_come_behind_the_routes_to_them() {
        let routes = [route("0.0.0.0", 0, Some("10.0.0.1")), route("10.0.0.1", 32, None)];
        let order: Vec<_> = in_order(&routes).map(|route| route.prefix).collect();
        assert_eq!(order, [32, 0]);
    }

    #[test]
    fn an_interface_that_is_not_there_is_named() {
        let error = find(&[interface("eth7", 0xfe)]).unwrap_err();
        assert!(error.message.contains("eth7 (02:00:00:00:00:fe)"), "{error}");
    }

    #[test]
    fn addresses_of_hardware_are_six_bytes() {
        assert_eq!(parse_mac("02:00:00:00:00:ff"), Some([2, 0, 0, 0, 0, 255]));
        for bad in ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "zz:00:00:00:00:00"] {
            assert_eq!(parse_mac(bad), None);
        }
    }
}
