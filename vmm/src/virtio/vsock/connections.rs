//! The table of connections: finds them by ports or by socket, bounds their number, and keeps the order in which those
//! with something to say get the guest's receive buffers.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};

use super::channel::Channel;
use super::connection::Ports;
use super::packet::Header;

/// Connections at a time, closing and draining ones included. Stops a guest, or a client on the host, that opens
/// connections without end from exhausting the VMM's descriptors and memory.
pub(super) const MAX_CONNECTIONS: usize = 1023;
/// Bytes a connection buffers for a slow reader on the host. One packet's worth would stall a fast guest at every
/// packet; four let it run.
pub(super) const WIDE_WINDOW: u32 = 256 << 10;
/// Connections that get a wide window; the others get a narrow one. Together they stop a guest that fills all its
/// connections towards readers that do not read at 8 MiB + 15.5 MiB.
pub(super) const WIDE_CONNECTIONS: usize = 32;
pub(super) const NARROW_WINDOW: u32 = 16 << 10;
/// Resets waiting for receive buffers. Stops a guest that sends packets for no connection and takes no answers from
/// growing the list: the transmit queue rests while it is full. As long as a queue, because a driver that cannot
/// send either may have that many replies outstanding (virtio 1.2, 5.10.6.1.1).
pub(super) const MAX_RESETS: usize = 256;
/// Packets a connection may send before the next one's turn, so that no stream delays the others by more.
const TURN: u32 = 16;
/// Host ports of connections that host clients open, the upper of two halves: no service listens there.
const FIRST_HOST_PORT: u32 = 1 << 30;
const LAST_HOST_PORT: u32 = (1 << 31) - 1;

/// Names a socket for epoll; never used twice, so that an event cannot meet the wrong one.
pub(super) type Id = u64;

#[derive(Debug)]
pub(super) struct Connections {
    guest_cid: u64,
    table: HashMap<Id, Slot>,
    by_ports: HashMap<Ports, Id>,
    /// Connections with a packet for the guest, each once.
    ready: VecDeque<Id>,
    /// What the first of `ready` has left of its turn.
    turn: u32,
    resets: VecDeque<Header>,
    wide: usize,
    next_host_port: u32,
}

#[derive(Debug)]
struct Slot {
    channel: Channel,
    ready: bool,
}

impl Connections {
    pub(super) fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            table: HashMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            turn: TURN,
            resets: VecDeque::new(),
            wide: 0,
            next_host_port: FIRST_HOST_PORT,
        }
    }

    pub(super) fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    pub(super) fn find(&self, ports: Ports) -> Option<Id> {
        self.by_ports.get(&ports).copied()
    }

    pub(super) fn get(&mut self, id: Id) -> Option<&mut Channel> {
        self.table.get_mut(&id).map(|slot| &mut slot.channel)
    }

    /// Whether there is a place for one more; makes one at the cost of a connection that nobody waits for.
    pub(super) fn make_room(&mut self) -> bool {
        if self.table.len() < MAX_CONNECTIONS {
            return true;
        }
        let abandoned = self.table.iter().find(|(_, slot)| slot.channel.connection.is_abandoned());
        match abandoned.map(|(id, _)| *id) {
            Some(id) if !self.resets_full() => {
                self.reset(id);
                true
            }
            _ => false,
        }
    }

    /// The window for the next connection.
    pub(super) fn window(&self) -> u32 {
        if self.wide < WIDE_CONNECTIONS { WIDE_WINDOW } else { NARROW_WINDOW }
    }

    /// Ports for a host client's connection to the guest's `port`.
    pub(super) fn assign_ports(&mut self, port: u32) -> Ports {
        loop {
            let ports = Ports { host: self.next_host_port, guest: port };
            self.next_host_port = if ports.host == LAST_HOST_PORT { FIRST_HOST_PORT } else { ports.host + 1 };
            // Ends: there are 2^30 host ports and at most MAX_CONNECTIONS are taken.
            if !self.by_ports.contains_key(&ports) {
                return ports;
            }
        }
    }

    /// Adds a connection whose ports are free; see [`make_room`](Self::make_room).
    pub(super) fn insert(&mut self, id: Id, channel: Channel) {
        self.wide += usize::from(channel.connection.window() == WIDE_WINDOW);
        self.by_ports.insert(channel.connection.ports(), id);
        self.table.insert(id, Slot { channel, ready: false });
        self.settle(id);
    }

    /// To be called after every event on a connection: gives it a turn if it has a packet, ends it if it is over.
    pub(super) fn settle(&mut self, id: Id) {
        let Some(slot) = self.table.get_mut(&id) else { return };
        slot.channel.settle();
        if slot.channel.is_over() {
            self.remove(id);
        } else if !slot.ready && slot.channel.connection.output().is_some() {
            slot.ready = true;
            self.ready.push_back(id);
        }
    }

    /// The guest's part in a connection is over: frees the ports, keeps the socket while there is a backlog.
    pub(super) fn drain(&mut self, id: Id) {
        if let Some(slot) = self.table.get_mut(&id) {
            let connection = &mut slot.channel.connection;
            connection.drain();
            release(&mut self.by_ports, connection.ports(), id);
            self.settle(id);
        }
    }

    /// Gives a connection up at once, with a reset for the guest if it knows of it.
    pub(super) fn reset(&mut self, id: Id) {
        if let Some(slot) = self.table.get(&id) {
            if slot.channel.connection.known_to_guest() {
                let reset = slot.channel.connection.reset(self.guest_cid);
                self.push_reset(reset);
            }
            self.remove(id);
        }
    }

    pub(super) fn remove(&mut self, id: Id) {
        if let Some(slot) = self.table.remove(&id) {
            let connection = &slot.channel.connection;
            self.wide -= usize::from(connection.window() == WIDE_WINDOW);
            release(&mut self.by_ports, connection.ports(), id);
            if slot.ready {
                // At once: a guest without receive buffers would grow the line by opening and resetting.
                if self.ready.front() == Some(&id) {
                    self.turn = TURN;
                }
                self.ready.retain(|other| *other != id);
            }
        }
        if self.table.is_empty() {
            // An idle device holds no memory for what it once did.
            self.table = HashMap::new();
            self.by_ports = HashMap::new();
            self.ready = VecDeque::new();
        }
    }

    /// Queues a reset; the caller has seen to it that there is room.
    pub(super) fn push_reset(&mut self, reset: Header) {
        self.resets.push_back(reset);
    }

    pub(super) fn resets_full(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    pub(super) fn first_reset(&self) -> Option<Header> {
        self.resets.front().copied()
    }

    pub(super) fn pop_reset(&mut self) {
        self.resets.pop_front();
    }

    /// Whether anything waits for a receive buffer.
    pub(super) fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The connection whose turn it is. It has a packet, or had one when it was put in line.
    pub(super) fn first_ready(&mut self) -> Option<(Id, &mut Channel)> {
        while let Some(&id) = self.ready.front() {
            let speaks = self.table.get(&id).is_some_and(|slot| slot.channel.connection.output().is_some());
            if speaks {
                let channel = &mut self.table.get_mut(&id)?.channel;
                return Some((id, channel));
            }
            self.end_turn();
            if let Some(slot) = self.table.get_mut(&id) {
                slot.ready = false;
            }
        }
        None
    }

    /// The first in line has used a receive buffer; after some it goes to the end of the line.
    pub(super) fn count_turn(&mut self) {
        self.turn -= 1;
        if self.turn == 0
            && let Some(id) = self.end_turn()
        {
            self.ready.push_back(id);
        }
    }

    fn end_turn(&mut self) -> Option<Id> {
        self.turn = TURN;
        self.ready.pop_front()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    #[cfg(test)]
    pub(super) fn resets_len(&self) -> usize {
        self.resets.len()
    }

    #[cfg(test)]
    pub(super) fn ports_len(&self) -> usize {
        self.by_ports.len()
    }

    #[cfg(test)]
    pub(super) fn backlog_bytes(&self) -> usize {
        self.table.values().map(|slot| slot.channel.backlog_bytes()).sum()
    }
}

/// Frees `ports` unless they are another connection's by now.
fn release(by_ports: &mut HashMap<Ports, Id>, ports: Ports, id: Id) {
    if let Entry::Occupied(taken) = by_ports.entry(ports)
        && *taken.get() == id
    {
        taken.remove();
    }
}
