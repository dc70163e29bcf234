//! What a network plugin has made in a pod's network namespace, read into the form that the guest takes. The kernel's
//! lists come in; which of their entries are the plugin's is decided here. Pure, but for the asking.

use std::net::{IpAddr, Ipv6Addr};

use krx_proto::{
    InterfaceAddress, MAX_NETWORK_ENTRIES, MAX_NETWORK_INTERFACES, Neighbour, NetworkInterface, NetworkSpec,
    validate_interface_name,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressProtocol};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::Netlink;
use super::{NetworkError, routes, tap};

/// An interface that a plugin has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) interface: NetworkInterface,
}

/// Reads all. `has_ipv6` tells whether IPv6 is on, by an interface's name.
pub(super) fn read(
    netlink: &mut Netlink,
    has_ipv6: impl Fn(&str) -> bool,
) -> Result<(Vec<Link>, NetworkSpec), NetworkError> {
    let mut list = |what: &str, message: &RouteNetlinkMessage| {
        netlink
            .list(message)
            .map_err(|source| NetworkError::Netlink { doing: format!("list {what}"), source })
    };
    let answers = list("interfaces", &RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let links = links(answers.iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    }))?;
    let answers = list("addresses", &RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let addresses = answers.iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewAddress(address) => address_of(address, &links),
        _ => None,
    });
    let addresses = capped("addresses", addresses)?;
    let answers = list("routes", &RouteNetlinkMessage::GetRoute(RouteMessage::default()))?;
    let routes = answers.iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewRoute(route) => Some(routes::of(route, &links)),
        _ => None,
    });
    let routes = capped("routes", routes.flatten())?;
    let answers = list("neighbours", &RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()))?;
    let neighbours = answers.iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewNeighbour(neighbour) => neighbour_of(neighbour, &links),
        _ => None,
    });
    let neighbours = capped("permanent neighbours", neighbours)?;
    let interfaces = links.iter().map(|link| link.interface.clone()).map(|mut interface| {
        interface.ipv6 = has_ipv6(&interface.name);
        interface
    });
    let spec = NetworkSpec { interfaces: interfaces.collect(), addresses, routes, neighbours };
    Ok((links, spec))
}

/// Place of an interface among `links`.
pub(super) fn place(links: &[Link], index: u32) -> Option<u8> {
    links.iter().position(|link| link.index == index).and_then(|place| u8::try_from(place).ok())
}

fn capped<T>(what: &'static str, entries: impl Iterator<Item = T>) -> Result<Vec<T>, NetworkError> {
    let entries: Vec<_> = entries.take(MAX_NETWORK_ENTRIES + 1).collect();
    if entries.len() > MAX_NETWORK_ENTRIES { Err(NetworkError::TooMany(what)) } else { Ok(entries) }
}

/// Interfaces that are up, but for the loopback one. All have to be such as a VM can have.
fn links<'a>(messages: impl Iterator<Item = &'a LinkMessage>) -> Result<Vec<Link>, NetworkError> {
    let mut found: Vec<Link> = Vec::new();
    for message in messages {
        let flags = message.header.flags;
        if !flags.contains(LinkFlags::Up) || flags.contains(LinkFlags::Loopback) {
            continue;
        }
        let link = link(message)?;
        if let Some(other) = found.iter().find(|other| other.interface.mac == link.interface.mac) {
            let why =
                format!("it has the address of {}, and a guest tells interfaces by it", other.interface.name);
            return Err(NetworkError::Unsupported { name: link.interface.name, why });
        }
        found.push(link);
    }
    if found.len() > MAX_NETWORK_INTERFACES {
        let names: Vec<_> = found.iter().map(|link| &*link.interface.name).collect();
        return Err(NetworkError::TooManyInterfaces(names.join(", ")));
    }
    Ok(found)
}

fn link(message: &LinkMessage) -> Result<Link, NetworkError> {
    let (mut name, mut mac, mut mtu, mut kind) = (String::new(), None::<[u8; 6]>, 0, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name.clone_from(text),
            LinkAttribute::Address(bytes) => mac = bytes.as_slice().try_into().ok(),
            LinkAttribute::Mtu(bytes) => mtu = *bytes,
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    if name.starts_with(tap::PREFIX) {
        return Err(NetworkError::InUse { tap: name });
    }
    let why = match (kind, mac) {
        (Some(kind @ (InfoKind::IpVlan | InfoKind::IpVtap)), _) => {
            format!("an {kind} shares its hardware address with others, and takes no frames for a VM's")
        }
        _ if !validate_interface_name(&name) => "its name is none that a guest could take".into(),
        _ if message.header.link_layer_type != LinkLayerType::Ether => "it carries no Ethernet frames".into(),
        (_, Some(mac)) if mac != [0; 6] && mac[0] & 1 == 0 => {
            let interface = NetworkInterface { name, mac, mtu, ipv6: true };
            return Ok(Link { index: message.header.index, interface });
        }
        _ => "it has no hardware address that one interface may have".into(),
    };
    Err(NetworkError::Unsupported { name, why })
}

/// An address that is there to stay. The link-local one that the kernel makes for itself, the guest's will make, too.
fn address_of(message: &AddressMessage, links: &[Link]) -> Option<InterfaceAddress> {
    let interface = place(links, message.header.index)?;
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    let (mut address, mut local, mut broadcast, mut protocol) = (None, None, None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Broadcast(ip) => broadcast = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Protocol(who) => protocol = Some(who),
            _ => {}
        }
    }
    let (address, peer) = match (address, local) {
        (Some(address), Some(local)) if address != local => (local, Some(address)),
        (Some(address), _) => (address, None),
        (None, local) => (local?, None),
    };
    let stays = flags.contains(AddressFlags::Permanent) && !flags.contains(AddressFlags::Dadfailed);
    let is_kernels = protocol == Some(&AddressProtocol::LinkLocal)
        || address == IpAddr::V6(link_local(links[usize::from(interface)].interface.mac));
    let scope = message.header.scope.into();
    let prefix = message.header.prefix_len;
    (stays && !is_kernels).then_some(InterfaceAddress { interface, address, prefix, peer, broadcast, scope })
}

/// The address that IPv6 makes of a hardware address (RFC 4291, appendix A).
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

fn neighbour_of(message: &NeighbourMessage, links: &[Link]) -> Option<Neighbour> {
    let interface = place(links, message.header.ifindex)?;
    let is_ip = matches!(message.header.family, AddressFamily::Inet | AddressFamily::Inet6);
    if !is_ip || message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(IpAddr::V4(*ip)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some(IpAddr::V6(*ip)),
            NeighbourAttribute::LinkLocalAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour { interface, address: address?, mac: mac? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0x42, 0, 0, 0, 1];

    fn message(index: u32, name: &str, attributes: Vec<LinkAttribute>) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.attributes = vec![LinkAttribute::IfName(name.into()), LinkAttribute::Mtu(1450)];
        message.attributes.extend(attributes);
        message
    }

    fn veth(index: u32, name: &str) -> LinkMessage {
        let last = u8::try_from(index).unwrap();
        message(index, name, vec![LinkAttribute::Address(vec![2, 0x42, 0, 0, 0, last])])
    }

    fn of(messages: &[LinkMessage]) -> Result<Vec<Link>, NetworkError> {
        links(messages.iter())
    }

    fn why(messages: &[LinkMessage]) -> String {
        of(messages).unwrap_err().to_string()
    }

    #[test]
    fn interfaces_that_are_up_are_taken() {
        let mut lo = veth(9, "lo");
        lo.header.flags = LinkFlags::Up | LinkFlags::Loopback;
        let mut tunnel = veth(8, "tunl0");
        tunnel.header.flags = LinkFlags::empty();
        let found = of(&[lo, tunnel, veth(1, "eth0")]).unwrap();
        let interface = NetworkInterface { name: "eth0".into(), mac: MAC, mtu: 1450, ipv6: true };
        assert_eq!(found, [Link { index: 1, interface }]);
        assert_eq!(of(&[]).unwrap(), []);
    }

    #[test]
    fn interfaces_that_a_vm_cannot_have_are_named() {
        let kind = |kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]);
        let ipvlan = message(1, "eth0", vec![LinkAttribute::Address(MAC.into()), kind(InfoKind::IpVlan)]);
        assert!(why(&[ipvlan]).contains("eth0"));
        let mut tunnel = veth(1, "wg0");
        tunnel.header.link_layer_type = LinkLayerType::None;
        assert!(why(&[tunnel]).contains("wg0"));
        for mac in [vec![], vec![2; 5], vec![2; 20], vec![0; 6], vec![0xff; 6]] {
            assert!(why(&[message(1, "eth0", vec![LinkAttribute::Address(mac)])]).contains("eth0"));
        }
        assert!(why(&[message(1, "eth0", vec![])]).contains("eth0"));
        assert!(why(&[veth(1, "a/b")]).contains("a/b"));
        let twins = [veth(1, "eth0"), message(2, "eth0.5", vec![LinkAttribute::Address(MAC.into())])];
        assert!(why(&twins).contains("eth0.5") && why(&twins).contains("eth0"));
        let many: Vec<_> = (1..6).map(|index| veth(index, &format!("net{index}"))).collect();
        assert!(of(&many[..4]).is_ok());
        assert!(why(&many).contains("net1, net2, net3, net4, net5"));
        let tap = veth(2, "krx-tap0");
        assert!(matches!(of(&[veth(1, "eth0"), tap]), Err(NetworkError::InUse { .. })));
    }

    fn address(ip: &str, attributes: Vec<AddressAttribute>) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.index = 1;
        message.header.prefix_len = 24;
        message.attributes = vec![AddressAttribute::Address(ip.parse().unwrap())];
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Permanent));
        message.attributes.extend(attributes);
        message
    }

    #[test]
    fn addresses_that_stay_are_taken_but_not_those_the_kernel_makes() {
        let links = of(&[veth(1, "eth0")]).unwrap();
        let taken =
            |message: &AddressMessage| address_of(message, &links).map(|taken| (taken.address, taken.peer));
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(taken(&address("fd00::1", vec![])), Some((ip("fd00::1"), None)));
        let plain = address("10.0.0.1", vec![AddressAttribute::Local(ip("10.0.0.1"))]);
        assert_eq!(taken(&plain), Some((ip("10.0.0.1"), None)));
        let pair = address("10.0.0.2", vec![AddressAttribute::Local(ip("10.0.0.1"))]);
        assert_eq!(taken(&pair), Some((ip("10.0.0.1"), Some(ip("10.0.0.2")))));
        assert_eq!(taken(&address("fe80::42:ff:fe00:1", vec![])), None);
        let random = vec![AddressAttribute::Protocol(AddressProtocol::LinkLocal)];
        assert_eq!(taken(&address("fe80::7", random)), None);
        assert_eq!(taken(&address("fe80::7", vec![])), Some((ip("fe80::7"), None)));
        let announced = address("fd00::2", vec![AddressAttribute::Flags(AddressFlags::empty())]);
        assert_eq!(taken(&announced), None);
        let failed = AddressFlags::Permanent | AddressFlags::Dadfailed;
        assert_eq!(taken(&address("fd00::3", vec![AddressAttribute::Flags(failed)])), None);
        let mut elsewhere = address("10.0.0.1", vec![]);
        elsewhere.header.index = 2;
        assert_eq!(taken(&elsewhere), None);
        let mut empty = address("10.0.0.1", vec![]);
        empty.attributes.clear();
        assert_eq!(taken(&empty), None);
    }

    #[test]
    fn lists_beyond_the_cap_are_refused_by_name() {
        assert_eq!(capped("routes", 0..256).unwrap().len(), 256);
        assert!(capped("routes", 0..).unwrap_err().to_string().contains("routes"));
    }

    #[test]
    fn only_permanent_neighbours_are_taken() {
        let links = of(&[veth(1, "eth0")]).unwrap();
        let mut message = NeighbourMessage::default();
        message.header.ifindex = 1;
        message.header.family = AddressFamily::Inet;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet([10, 0, 0, 1].into())),
            NeighbourAttribute::LinkLocalAddress(vec![2, 0, 0, 0, 0, 9]),
        ];
        assert_eq!(neighbour_of(&message, &links).unwrap().mac, [2, 0, 0, 0, 0, 9]);
        message.attributes[1] = NeighbourAttribute::LinkLocalAddress(vec![2; 20]);
        assert_eq!(neighbour_of(&message, &links), None);
        message.header.state = NeighbourState::Reachable;
        assert_eq!(neighbour_of(&message, &links), None);
    }
}
