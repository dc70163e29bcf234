//! The running device: waits on one epoll for the driver's kicks and all unix sockets, and moves packets between the
//! queues and the connections. Nothing here blocks; every loop has a budget, so that no peer holds up the event loop.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, recv};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::channel::{self, Channel};
use super::connection::{Connection, Ports, Reaction};
use super::connections::{Connections, Id};
use super::handshake::{self, Line};
use super::packet::{GuestPacket, HOST_CID, Header, Op, TYPE_STREAM};
use super::rings::{Put, ReceiveRing, TransmitRing};
use super::service;
use crate::host_socket::Listener;
use crate::virtio::device::{Activation, DeviceError, Worker};
use crate::virtio::queue::LiveQueue;

/// Packets moved in each direction by one run. Stops a guest that sends without pause from keeping the thread; large
/// enough that a stream needs few interrupts.
const PACKET_BUDGET: usize = 64;
/// Clients accepted by one run. Stops a storm of connects on the host from starving the running connections.
const ACCEPT_BUDGET: usize = 32;
/// Socket events taken by one run; the rest stays in the epoll.
const EVENT_BUDGET: usize = 64;
/// Clients that have connected and not sent their line yet. Stops silent clients from holding descriptors: the
/// oldest is closed for the next.
const MAX_WAITING_CLIENTS: usize = 64;

const MORE: Id = 0;
const RECEIVE_KICK: Id = 1;
const TRANSMIT_KICK: Id = 2;
const LISTENER: Id = 3;
const FIRST_SOCKET: Id = 16;

/// The device between activation and reset.
#[derive(Debug)]
pub(super) struct VsockWorker {
    epoll: Epoll,
    /// Signalled by a run that stopped at its budget.
    more: EventFd,
    receive: ReceiveRing,
    transmit: TransmitRing,
    /// Nothing is said there, see `EVENT_QUEUE`.
    _events: LiveQueue,
    listener: Arc<Listener>,
    /// The listener is not watched because the process ran out of descriptors.
    deaf: bool,
    /// Clients whose line is not complete, oldest first.
    clients: BTreeMap<Id, UnixStream>,
    connections: Connections,
    next_id: Id,
}

impl VsockWorker {
    pub(super) fn new(
        guest_cid: u64,
        listener: Arc<Listener>,
        activation: Activation,
    ) -> Result<Self, DeviceError> {
        let queues: [LiveQueue; 3] =
            activation.queues.try_into().map_err(|_| DeviceError::BadChain("vsock has three queues"))?;
        let [receive, transmit, events] = queues;
        let epoll = Epoll::new().map_err(DeviceError::Host)?;
        let more = EventFd::new(EFD_NONBLOCK).map_err(DeviceError::Host)?;
        for (id, fd) in [
            (MORE, more.as_raw_fd()),
            (RECEIVE_KICK, receive.kick_fd()),
            (TRANSMIT_KICK, transmit.kick_fd()),
            (LISTENER, listener.as_raw_fd()),
        ] {
            watch(&epoll, fd, id, EventSet::IN).map_err(DeviceError::Host)?;
        }
        Ok(Self {
            epoll,
            more,
            receive: ReceiveRing::new(receive)?,
            transmit: TransmitRing::new(transmit),
            _events: events,
            listener,
            deaf: false,
            clients: BTreeMap::new(),
            connections: Connections::new(guest_cid),
            next_id: FIRST_SOCKET,
        })
    }

    fn take_events(&mut self) -> Result<(), DeviceError> {
        let mut events = [EpollEvent::default(); EVENT_BUDGET];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            Err(error) => return Err(DeviceError::Host(error)),
        };
        for event in &events[..count] {
            match event.data() {
                MORE => {
                    // Non-blocking: fails only if nothing was signalled.
                    let _ = self.more.read();
                }
                RECEIVE_KICK => self.receive.queue().clear_kick(),
                TRANSMIT_KICK => self.transmit.queue().clear_kick(),
                LISTENER => self.accept_clients(),
                id if self.clients.contains_key(&id) => self.hear_client(id, event.event_set()),
                id => {
                    if let Some(channel) = self.connections.get(id) {
                        channel.on_events(event.event_set());
                        self.connections.settle(id);
                    }
                }
            }
        }
        Ok(())
    }

    fn accept_clients(&mut self) {
        for _ in 0..ACCEPT_BUDGET {
            match self.listener.accept() {
                Ok(client) => self.admit_client(client),
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                    ErrorKind::WouldBlock => return,
                    // Out of descriptors, most likely. The listener stays readable, so looking away is all that
                    // keeps the thread from spinning; the next run tries again.
                    _ => {
                        let fd = self.listener.as_raw_fd();
                        let event = EpollEvent::default();
                        self.deaf = self.epoll.ctl(ControlOperation::Delete, fd, event).is_ok();
                        return;
                    }
                },
            }
        }
    }

    fn admit_client(&mut self, client: UnixStream) {
        if self.clients.len() >= MAX_WAITING_CLIENTS {
            self.clients.pop_first();
        }
        let id = self.assign_id();
        // On failure the client is closed, as if refused.
        if watch(&self.epoll, client.as_raw_fd(), id, channel::interest()).is_ok() {
            self.clients.insert(id, client);
            self.hear_client(id, EventSet::empty());
        }
    }

    /// Looks for the line of a client; `events` are those of its socket, which the connection inherits.
    fn hear_client(&mut self, id: Id, events: EventSet) {
        let Some(client) = self.clients.get(&id) else { return };
        match read_line(client) {
            Some(Line::Connect { port, .. }) => {
                if let Some(client) = self.clients.remove(&id)
                    && self.connections.make_room()
                {
                    let ports = self.connections.assign_ports(port);
                    let connection = Connection::from_host(ports, self.connections.window());
                    let mut channel = Channel::new(connection, client);
                    channel.on_events(events);
                    self.connections.insert(id, channel);
                }
            }
            Some(Line::Incomplete) if !events.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP) => {}
            _ => {
                self.clients.remove(&id);
            }
        }
    }

    /// Takes packets from the guest.
    fn run_transmit(&mut self) -> Result<Transmit, DeviceError> {
        let Self { transmit, connections, listener, epoll, next_id, .. } = self;
        transmit.suppress_kicks()?;
        for _ in 0..PACKET_BUDGET {
            if connections.resets_full() {
                return Ok(Transmit::Stalled);
            }
            let took = transmit.next(|packet| {
                let mut guest = FromGuest { connections, listener, epoll, next_id };
                guest.take(packet)
            })?;
            if !took {
                return Ok(Transmit::Idle);
            }
        }
        Ok(Transmit::More)
    }

    /// Sends packets to the guest; `true` if there are more and buffers, too.
    fn run_receive(&mut self) -> Result<bool, DeviceError> {
        let Self { receive, connections, .. } = self;
        let guest_cid = connections.guest_cid();
        let mut budget = PACKET_BUDGET;
        while budget > 0 {
            if let Some(reset) = connections.first_reset() {
                if receive.put(|_| Some(reset))? == Put::Starved {
                    return Ok(false);
                }
                connections.pop_reset();
                budget -= 1;
                continue;
            }
            let Some((id, channel)) = connections.first_ready() else { return Ok(false) };
            let Some(output) = channel.connection.output() else { continue };
            match receive.put(|buffer| channel.produce(output, buffer, guest_cid))? {
                Put::Starved => return Ok(false),
                Put::Sent => {
                    budget -= 1;
                    connections.count_turn();
                }
                // The socket had nothing, or ended: the connection knows, and asks for another packet or none.
                Put::Withdrawn => {}
            }
            connections.settle(id);
        }
        Ok(connections.has_output())
    }

    #[cfg(test)]
    pub(super) fn connections(&self) -> &Connections {
        &self.connections
    }

    #[cfg(test)]
    pub(super) fn waiting_clients(&self) -> usize {
        self.clients.len()
    }

    fn assign_id(&mut self) -> Id {
        assign_id(&mut self.next_id)
    }
}

impl Worker for VsockWorker {
    fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    fn run(&mut self) -> Result<(), DeviceError> {
        if self.deaf {
            let listening = watch(&self.epoll, self.listener.as_raw_fd(), LISTENER, EventSet::IN);
            self.deaf = listening.is_err();
        }
        self.take_events()?;
        let transmit = self.run_transmit()?;
        let more_for_guest = self.run_receive()?;
        let more_from_guest = match transmit {
            Transmit::Idle => false,
            Transmit::More => true,
            // Else the guest has to take its resets first: the kick of the receive queue will tell.
            Transmit::Stalled => !self.connections.resets_full(),
        };
        if more_from_guest || more_for_guest {
            self.more.write(1).map_err(DeviceError::Host)?;
        }
        self.receive.notify()?;
        self.transmit.notify()
    }
}

/// Why taking packets from the guest ended.
enum Transmit {
    /// There are none; the driver will kick.
    Idle,
    /// The budget is used up.
    More,
    /// The list of resets is full.
    Stalled,
}

/// What a packet from the guest may touch.
struct FromGuest<'w> {
    connections: &'w mut Connections,
    listener: &'w Listener,
    epoll: &'w Epoll,
    next_id: &'w mut Id,
}

impl FromGuest<'_> {
    fn take(&mut self, packet: &GuestPacket<'_>) -> Result<(), DeviceError> {
        let header = &packet.header;
        if header.src_cid != self.connections.guest_cid() {
            // Who forges its own address gets no answer: there is no address to send it to.
            return Ok(());
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let id = self.connections.find(ports);
        match id {
            _ if header.dst_cid != HOST_CID || header.socket_type != TYPE_STREAM => self.refuse(header),
            None if header.op == Op::Request as u16 => self.connect(ports, header),
            None => self.refuse(header),
            Some(id) => return self.take_for(id, packet),
        }
        Ok(())
    }

    /// A packet for a connection there is.
    fn take_for(&mut self, id: Id, packet: &GuestPacket<'_>) -> Result<(), DeviceError> {
        let Some(channel) = self.connections.get(id) else { return Ok(()) };
        match channel.connection.on_guest(&packet.header) {
            Reaction::Nothing | Reaction::HalfClosed => {}
            Reaction::Opened => channel.open(),
            Reaction::Deliver => channel.deliver(&packet.payload)?,
            Reaction::Closed => {
                self.refuse(&packet.header);
                self.connections.drain(id);
            }
            Reaction::Reset => self.connections.drain(id),
            Reaction::Refused => self.connections.remove(id),
            Reaction::Violation => self.connections.reset(id),
        }
        self.connections.settle(id);
        Ok(())
    }

    /// The guest wants to connect to a port of the host.
    fn connect(&mut self, ports: Ports, request: &Header) {
        let service =
            if self.connections.make_room() { service::dial(self.listener, ports.host).ok() } else { None };
        let id = assign_id(self.next_id);
        match service {
            Some(socket) if watch(self.epoll, socket.as_raw_fd(), id, channel::interest()).is_ok() => {
                let connection = Connection::from_guest(ports, self.connections.window(), request);
                self.connections.insert(id, Channel::new(connection, socket));
            }
            _ => self.refuse(request),
        }
    }

    /// Answers a packet with a reset, unless it is one itself.
    fn refuse(&mut self, header: &Header) {
        if header.op != Op::Reset as u16 {
            self.connections.push_reset(header.reset_reply());
        }
    }
}

fn assign_id(next: &mut Id) -> Id {
    let id = *next;
    *next += 1;
    id
}

fn watch(epoll: &Epoll, fd: RawFd, id: Id, events: EventSet) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, id))
}

/// Takes a client's line out of its socket if it is whole; `None` if it never will be.
fn read_line(client: &UnixStream) -> Option<Line> {
    let mut bytes = [0; handshake::MAX_LINE];
    let line = match recv(client.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK) {
        Ok(0) => return None,
        Ok(count) => handshake::scan(&bytes[..count]),
        Err(nix::Error::EAGAIN | nix::Error::EINTR) => Line::Incomplete,
        Err(_) => return None,
    };
    if let Line::Connect { len, .. } = line {
        let taken = recv(client.as_raw_fd(), &mut bytes[..len], MsgFlags::empty());
        // Fewer only if the line came with descriptors attached, which no honest client does.
        taken.ok().filter(|count| *count == len)?;
    }
    Some(line)
}
