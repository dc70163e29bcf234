//! Which of the kernel's routes are a pod's, and what of them a guest is told. Pure.
//!
//! Only the main table: rules and further tables are not carried into the guest.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use krx_proto::{Route, RouteKind};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHopFlags,
    RouteProtocol, RouteType, RouteVia,
};

use super::read::{Link, place};

/// Routes of one message. One with several ways becomes several routes: IPv6 joins them again, and of IPv4's the first
/// is taken, as the guest's kernel knows no several ways.
pub(super) fn of(message: &RouteMessage, links: &[Link]) -> Vec<Route> {
    let Some(plain) = plain(message) else { return Vec::new() };
    let kind = match message.header.kind {
        RouteType::Unicast => None,
        RouteType::BlackHole => Some(RouteKind::Blackhole),
        RouteType::Unreachable => Some(RouteKind::Unreachable),
        RouteType::Prohibit => Some(RouteKind::Prohibit),
        _ => return Vec::new(),
    };
    if let Some(kind) = kind {
        return vec![Route { kind, ..plain }];
    }
    let mut ways = Vec::new();
    let onlink = message.header.flags.contains(RouteFlags::Onlink);
    ways.extend(way(&message.attributes, None, onlink, plain, links));
    for attribute in &message.attributes {
        let RouteAttribute::MultiPath(hops) = attribute else { continue };
        ways.extend(hops.iter().filter_map(|hop| {
            let onlink = hop.flags.contains(RouteNextHopFlags::Onlink);
            way(&hop.attributes, Some(hop.interface_index), onlink, plain, links)
        }));
    }
    ways
}

/// What is the same for all ways. `None`: the route is not one to be carried over.
fn plain(message: &RouteMessage) -> Option<Route> {
    let RouteHeader { address_family, table, flags, scope, protocol, tos, .. } = message.header;
    let mut destination = match address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let (mut table, mut metric, mut source, mut mtu, mut advmss) = (u32::from(table), None, None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::Priority(number) => metric = Some(*number),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(bytes) => mtu = Some(*bytes),
                        RouteMetric::Advmss(bytes) => advmss = Some(*bytes),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let prefix = message.header.destination_prefix_length;
    let is_link_locals = matches!(destination, IpAddr::V6(v6) if v6.is_unicast_link_local());
    // What routers announce they will announce to the guest, and what each interface has its own will have.
    let is_own = protocol == RouteProtocol::Ra || (protocol == RouteProtocol::Kernel && is_link_locals);
    let is_main = table == u32::from(RouteHeader::RT_TABLE_MAIN);
    (is_main && !is_own && !flags.contains(RouteFlags::Cloned)).then_some(Route {
        kind: RouteKind::Unreachable,
        destination,
        prefix,
        gateway: None,
        onlink: false,
        source,
        scope: scope.into(),
        protocol: protocol.into(),
        tos,
        metric,
        mtu,
        advmss,
    })
}

/// One way of a route, if it is by an interface of the pod.
fn way(
    attributes: &[RouteAttribute],
    index: Option<u32>,
    onlink: bool,
    plain: Route,
    links: &[Link],
) -> Option<Route> {
    let (mut index, mut gateway) = (index, None);
    for attribute in attributes {
        match attribute {
            RouteAttribute::Oif(number) => index = Some(*number),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some(IpAddr::V4(*address)),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some(IpAddr::V6(*address)),
            _ => {}
        }
    }
    let interface = place(links, index?)?;
    Some(Route { kind: RouteKind::Unicast { interface }, gateway, onlink, ..plain })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use krx_proto::NetworkInterface;
    use netlink_packet_route::route::{RouteNextHop, RouteScope};

    fn links() -> Vec<Link> {
        [3, 5].map(|index| Link { index, interface: NetworkInterface::default() }).into()
    }

    fn route(family: AddressFamily, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.kind = RouteType::Unicast;
        message.header.protocol = RouteProtocol::Static;
        message.attributes = attributes;
        message
    }

    fn via(index: u32, gateway: &str) -> Vec<RouteAttribute> {
        let gateway: IpAddr = gateway.parse().unwrap();
        vec![RouteAttribute::Oif(index), RouteAttribute::Gateway(gateway.into())]
    }

    #[test]
    fn a_default_route_keeps_what_it_has() {
        let mut message = route(AddressFamily::Inet, via(5, "169.254.1.1"));
        message.header.flags = RouteFlags::Onlink;
        message.attributes.push(RouteAttribute::Priority(100));
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(1400)]));
        let found = of(&message, &links());
        assert_eq!(found.len(), 1);
        let Route { kind, gateway, onlink, metric, mtu, prefix, .. } = found[0];
        assert_eq!(kind, RouteKind::Unicast { interface: 1 });
        assert_eq!((gateway, onlink), (Some("169.254.1.1".parse().unwrap()), true));
        assert_eq!((metric, mtu, prefix), (Some(100), Some(1400), 0));
    }

    #[test]
    fn other_tables_interfaces_and_makers_are_left_out() {
        let mut other = route(AddressFamily::Inet, via(3, "10.0.0.1"));
        other.header.table = 255;
        assert!(of(&other, &links()).is_empty());
        other.header.table = RouteHeader::RT_TABLE_MAIN;
        other.attributes.push(RouteAttribute::Table(1000));
        assert!(of(&other, &links()).is_empty());
        assert!(of(&route(AddressFamily::Inet, via(4, "10.0.0.1")), &links()).is_empty());
        assert!(of(&route(AddressFamily::Inet, vec![]), &links()).is_empty());
        assert!(of(&route(AddressFamily::Mpls, via(3, "10.0.0.1")), &links()).is_empty());
        let mut announced = route(AddressFamily::Inet6, via(3, "fe80::1"));
        announced.header.protocol = RouteProtocol::Ra;
        assert!(of(&announced, &links()).is_empty());
        let local: IpAddr = "fe80::".parse().unwrap();
        let attributes = vec![RouteAttribute::Oif(3), RouteAttribute::Destination(local.into())];
        let mut own = route(AddressFamily::Inet6, attributes);
        own.header.protocol = RouteProtocol::Kernel;
        assert!(of(&own, &links()).is_empty());
        let mut broadcast = route(AddressFamily::Inet, via(3, "10.0.0.1"));
        broadcast.header.kind = RouteType::Broadcast;
        assert!(of(&broadcast, &links()).is_empty());
    }

    #[test]
    fn a_router_of_the_other_family_and_the_networks_of_addresses_are_kept() {
        let attributes =
            vec![RouteAttribute::Oif(3), RouteAttribute::Via(RouteVia::Inet6("fe80::1".parse().unwrap()))];
        let found = of(&route(AddressFamily::Inet, attributes), &links());
        assert_eq!(found[0].gateway, Some("fe80::1".parse().unwrap()));
        let mut own = route(AddressFamily::Inet, vec![RouteAttribute::Oif(3)]);
        own.header.protocol = RouteProtocol::Kernel;
        own.header.scope = RouteScope::Link;
        assert_eq!(of(&own, &links())[0].scope, 253);
        let mut nowhere = route(AddressFamily::Inet6, vec![RouteAttribute::Oif(1)]);
        nowhere.header.kind = RouteType::BlackHole;
        assert_eq!(of(&nowhere, &links())[0].kind, RouteKind::Blackhole);
    }

    #[test]
    fn several_ways_become_several_routes() {
        let hop = |index, gateway: &str| {
            let mut hop = RouteNextHop::default();
            hop.interface_index = index;
            hop.attributes = vec![RouteAttribute::Gateway(gateway.parse::<IpAddr>().unwrap().into())];
            hop
        };
        let hops = vec![hop(3, "fd00::1"), hop(4, "fd00::2"), hop(5, "fd00::3")];
        let found = of(&route(AddressFamily::Inet6, vec![RouteAttribute::MultiPath(hops)]), &links());
        let kinds: Vec<_> = found.iter().map(|route| route.kind).collect();
        assert_eq!(kinds, [RouteKind::Unicast { interface: 0 }, RouteKind::Unicast { interface: 1 }]);
    }
}
