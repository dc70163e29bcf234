//! Traffic between two interfaces: all that comes in at one goes out at the other. A filter of traffic control (tc) takes
//! every frame before the host's own network stack sees it, so the interface stays as it was made and yet answers nothing.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcHandle, TcHeader, TcMessage,
    TcMirror, TcMirrorActionType, TcOption,
};
use nix::Error;

use super::netlink::{Netlink, NetlinkError};

/// Holds filters of both directions, without being in the way of a queue.
const QDISC: &str = "clsact";
/// Before all others.
const PRIORITY: u32 = 1;
/// By which a filter is known as one of krx: the letters.
const HANDLE: u32 = 0x006b_7278;
/// `ETH_P_ALL`, in the order of the network.
const ALL_PROTOCOLS: u32 = 0x0300;

/// What was made on an interface, and is to be removed.
#[derive(Debug)]
pub(super) struct Redirect {
    from: i32,
    /// The queueing discipline was not there before.
    owns_qdisc: bool,
}

impl Redirect {
    /// Sends all that comes in at `from` out at `to`.
    pub(super) fn make(netlink: &mut Netlink, from: u32, to: u32) -> Result<Self, NetlinkError> {
        let index = i32::try_from(from).map_err(|_| Error::ENODEV)?;
        let made =
            netlink.request(RouteNetlinkMessage::NewQueueDiscipline(qdisc(index)), NLM_F_CREATE | NLM_F_EXCL);
        let owns_qdisc = match made {
            Ok(()) => true,
            // That of a pod whose owner was killed, or somebody else's.
            Err(error) if error.is(Error::EEXIST) => remove_filter(netlink, index).is_ok(),
            Err(error) => return Err(error),
        };
        let redirect = Self { from: index, owns_qdisc };
        let filter = RouteNetlinkMessage::NewTrafficFilter(filter(index, Some(to)));
        if let Err(error) = netlink.request(filter, NLM_F_CREATE | NLM_F_EXCL) {
            redirect.undo(netlink);
            return Err(error);
        }
        Ok(redirect)
    }

    /// Leaves the interface as it was. What is gone, with its interface or its namespace, needs no removing.
    pub(super) fn undo(&self, netlink: &mut Netlink) {
        let _ = remove_filter(netlink, self.from);
        if self.owns_qdisc {
            let _ = netlink.request(RouteNetlinkMessage::DelQueueDiscipline(qdisc(self.from)), 0);
        }
    }
}

fn remove_filter(netlink: &mut Netlink, index: i32) -> Result<(), NetlinkError> {
    netlink.request(RouteNetlinkMessage::DelTrafficFilter(filter(index, None)), 0)
}

fn qdisc(index: i32) -> TcMessage {
    let handle = TcHandle { major: u16::MAX, minor: 0 };
    let header = TcHeader { index, handle, parent: TcHandle::CLSACT, ..TcHeader::default() };
    TcMessage::from_parts(header, vec![TcAttribute::Kind(QDISC.into())])
}

/// The filter, with what it does unless it is only to be named.
fn filter(index: i32, to: Option<u32>) -> TcMessage {
    let header = TcHeader {
        index,
        handle: HANDLE.into(),
        parent: TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS },
        info: PRIORITY << 16 | ALL_PROTOCOLS,
        ..TcHeader::default()
    };
    let mut attributes = vec![TcAttribute::Kind(TcFilterMatchAll::KIND.into())];
    attributes.extend(to.map(|to| {
        let action = TcFilterMatchAllOption::Action(vec![redirect(to)]);
        TcAttribute::Options(vec![TcOption::MatchAll(action)])
    }));
    TcMessage::from_parts(header, attributes)
}

fn redirect(to: u32) -> TcAction {
    let mut generic = TcActionGeneric::default();
    generic.action = TcActionType::Stolen;
    let mut mirror = TcMirror::default();
    (mirror.generic, mirror.eaction, mirror.ifindex) = (generic, TcMirrorActionType::EgressRedir, to);
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    action
}
