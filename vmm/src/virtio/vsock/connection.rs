//! One connection as a state machine: packets and socket events in, packets and wishes out. It holds no descriptor and
//! does no I/O, that is `channel`'s.
//!
//! ```text
//!  host client: CONNECT             guest: REQUEST
//!        │                               │ unix socket connected
//!   Requesting ── RESPONSE ──▶ Established ◀──┘ (owes a RESPONSE)
//!        │                      │       │
//!        │RST                   │       └─ both directions ended, host last: SHUTDOWN(both) ─▶ Closing ─ RST ─▶ gone
//!        ▼                      └─ guest: RST, SHUTDOWN(both) ─▶ Draining ─ backlog written ─▶ gone
//!      gone
//! ```
//!
//! A packet that has no place in a state is a violation: the connection is reset, whatever it was doing.

use super::credit::{GuestCredit, HostCredit};
use super::packet::{
    HOST_CID, Header, MAX_PAYLOAD, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};

/// What names a connection to the guest; the CIDs are always the same two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// A host client wants the guest's port; `asked` once the REQUEST is in the guest's hands.
    Requesting { asked: bool },
    /// `answered` once the guest has the RESPONSE it may be owed.
    Established { answered: bool },
    /// All is said in both directions, the guest has to confirm by a reset. Its ports stay taken until then, so
    /// that no late packet meets a new connection (virtio 1.2, 5.10.6.5).
    Closing,
    /// The guest is done with the connection and may use its port again; the host's reader has bytes to come.
    Draining,
}

/// What a packet of the guest demands of the unix side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reaction {
    Nothing,
    /// The guest accepted: tell the host client.
    Opened,
    /// The payload is booked and to be delivered.
    Deliver,
    /// The guest ended one direction: [`Connection::socket_ends`] may have changed.
    HalfClosed,
    /// The guest ended the connection in good order: confirm by a reset, then drain.
    Closed,
    /// The guest reset the connection: nothing to confirm, drain what it sent before.
    Reset,
    /// The guest refused the connection a host client asked for.
    Refused,
    /// The guest broke the protocol: reset, and drop everything.
    Violation,
}

/// The next packet a connection has for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    Control {
        op: Op,
        flags: u32,
    },
    /// Up to so many bytes from the unix socket, which may turn out to have none.
    Data {
        max: u32,
    },
}

#[derive(Debug)]
pub(super) struct Connection {
    ports: Ports,
    phase: Phase,
    guest_credit: GuestCredit,
    host_credit: HostCredit,
    /// The guest asked for our counters.
    update_owed: bool,
    /// The guest was asked for its counters since it last told them.
    credit_asked: bool,
    /// The unix socket may have something to read.
    readable: bool,
    /// Directions that the guest, and the unix side, have ended: `SHUTDOWN_*` bits.
    guest_ended: u32,
    host_ended: u32,
    /// The part of what we ended that the guest has been told.
    told_ended: u32,
}

impl Connection {
    /// A host client asked for the guest's port.
    pub(super) fn from_host(ports: Ports, window: u32) -> Self {
        // Its line was read a moment ago; more may be right behind it.
        Self { readable: true, ..Self::new(ports, Phase::Requesting { asked: false }, window) }
    }

    /// The guest's `request` found a listener on the host.
    pub(super) fn from_guest(ports: Ports, window: u32, request: &Header) -> Self {
        let mut connection = Self::new(ports, Phase::Established { answered: false }, window);
        // Nothing was sent yet: a count other than 0 is a lie, which the next packet would repeat and be reset for.
        let _ = connection.guest_credit.update(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(ports: Ports, phase: Phase, window: u32) -> Self {
        Self {
            ports,
            phase,
            guest_credit: GuestCredit::new(),
            host_credit: HostCredit::new(window),
            update_owed: false,
            credit_asked: false,
            readable: false,
            guest_ended: 0,
            host_ended: 0,
            told_ended: 0,
        }
    }

    pub(super) fn ports(&self) -> Ports {
        self.ports
    }

    pub(super) fn window(&self) -> u32 {
        self.host_credit.window()
    }

    /// A packet of the guest for this connection.
    pub(super) fn on_guest(&mut self, header: &Header) -> Reaction {
        let Some(op) = Op::from_wire(header.op) else { return Reaction::Violation };
        match self.phase {
            Phase::Requesting { .. } if op == Op::Reset => Reaction::Refused,
            Phase::Requesting { asked: true } if op == Op::Response => {
                if self.guest_credit.update(header.buf_alloc, header.fwd_cnt).is_err() {
                    return Reaction::Violation;
                }
                self.phase = Phase::Established { answered: true };
                Reaction::Opened
            }
            Phase::Requesting { .. } => Reaction::Violation,
            Phase::Established { .. } => self.on_guest_established(op, header),
            Phase::Closing => match op {
                Op::Reset => Reaction::Reset,
                Op::Shutdown if self.end_guest(header.flags) => Reaction::Closed,
                Op::Request | Op::Response => Reaction::Violation,
                // Sent before the guest saw our shutdown; nobody is there to read it.
                _ => Reaction::Nothing,
            },
            // Has no ports any more, so no packet finds it.
            Phase::Draining => Reaction::Nothing,
        }
    }

    fn on_guest_established(&mut self, op: Op, header: &Header) -> Reaction {
        if op == Op::Reset {
            return Reaction::Reset;
        }
        if self.guest_credit.update(header.buf_alloc, header.fwd_cnt).is_err() {
            return Reaction::Violation;
        }
        if self.guest_credit.free() > 0 {
            self.credit_asked = false;
        }
        match op {
            Op::Data => self.on_data(header.len),
            Op::Shutdown if self.end_guest(header.flags) => Reaction::Closed,
            Op::Shutdown => Reaction::HalfClosed,
            Op::CreditRequest => {
                self.update_owed = true;
                Reaction::Nothing
            }
            Op::CreditUpdate => Reaction::Nothing,
            Op::Request | Op::Response | Op::Reset => Reaction::Violation,
        }
    }

    fn on_data(&mut self, len: u32) -> Reaction {
        let promised = self.guest_ended & SHUTDOWN_SEND == 0;
        if !promised || self.host_credit.receive(len).is_err() {
            return Reaction::Violation;
        }
        if self.host_ended & SHUTDOWN_RECEIVE != 0 {
            // The reader left; the guest will hear, or did not when it sent this.
            self.host_credit.forward(len);
            return Reaction::Nothing;
        }
        if len == 0 { Reaction::Nothing } else { Reaction::Deliver }
    }

    /// Notes the directions the guest ended; `true` if none is left.
    fn end_guest(&mut self, flags: u32) -> bool {
        self.guest_ended |= flags & SHUTDOWN_BOTH;
        self.guest_ended == SHUTDOWN_BOTH
    }

    /// `bytes` of what the guest sent have reached the unix socket.
    pub(super) fn on_forwarded(&mut self, bytes: u32) {
        self.host_credit.forward(bytes);
    }

    /// The unix socket has, or may have, something to read.
    pub(super) fn on_readable(&mut self) {
        self.readable = true;
    }

    /// The unix socket had nothing to read.
    pub(super) fn on_drained(&mut self) {
        self.readable = false;
    }

    /// The host's writer has ended its stream, and all of it has been sent to the guest.
    pub(super) fn on_end_of_file(&mut self) {
        self.readable = false;
        self.host_ended |= SHUTDOWN_SEND;
    }

    /// The host's reader has gone: what the guest sent, or will send, is dropped.
    pub(super) fn on_reader_gone(&mut self) {
        self.host_ended |= SHUTDOWN_RECEIVE;
        self.host_credit.forward(self.host_credit.buffered());
    }

    pub(super) fn reader_gone(&self) -> bool {
        self.host_ended & SHUTDOWN_RECEIVE != 0
    }

    /// The directions to shut down on the unix socket: reading as soon as the guest will take no more, writing once
    /// all it sent is there.
    pub(super) fn socket_ends(&self) -> SocketEnds {
        SocketEnds {
            read: self.guest_ended & SHUTDOWN_RECEIVE != 0,
            write: self.guest_ended & SHUTDOWN_SEND != 0 && self.flushed(),
        }
    }

    fn flushed(&self) -> bool {
        self.host_credit.buffered() == 0
    }

    /// The next packet for the guest, if there is one. Stays the same until [`packet`](Self::packet) or an event.
    pub(super) fn output(&self) -> Option<Output> {
        let control = |op| Some(Output::Control { op, flags: 0 });
        match self.phase {
            Phase::Requesting { asked: false } => control(Op::Request),
            Phase::Established { answered: false } => control(Op::Response),
            Phase::Established { answered: true } => {
                let ended = self.ended();
                let free = self.guest_credit.free().min(MAX_PAYLOAD);
                let sending = self.readable && ended & SHUTDOWN_SEND == 0;
                if self.update_owed {
                    control(Op::CreditUpdate)
                } else if sending && free > 0 {
                    // Before a due update, as it carries the counters, too.
                    Some(Output::Data { max: free })
                } else if ended & !self.told_ended != 0 {
                    Some(Output::Control { op: Op::Shutdown, flags: ended })
                } else if self.host_credit.update_due() {
                    control(Op::CreditUpdate)
                } else if sending && !self.credit_asked {
                    control(Op::CreditRequest)
                } else {
                    None
                }
            }
            Phase::Requesting { asked: true } | Phase::Closing | Phase::Draining => None,
        }
    }

    /// The directions that are over as far as the guest has to know.
    fn ended(&self) -> u32 {
        let mut ended = self.host_ended;
        if self.guest_ended & SHUTDOWN_RECEIVE != 0 {
            ended |= SHUTDOWN_SEND;
        }
        // Each side ended its own stream, and all bytes arrived: that ends the connection.
        if ended & SHUTDOWN_SEND != 0 && self.guest_ended & SHUTDOWN_SEND != 0 && self.flushed() {
            ended |= SHUTDOWN_RECEIVE;
        }
        ended
    }

    /// Makes the packet that [`output`](Self::output) announced; it is taken as sent. `len` is that of its payload.
    pub(super) fn packet(&mut self, output: Output, len: u32, guest_cid: u64) -> Header {
        let (op, flags) = match output {
            Output::Control { op, flags } => (op, flags),
            Output::Data { .. } => (Op::Data, 0),
        };
        match op {
            Op::Request => self.phase = Phase::Requesting { asked: true },
            Op::Response => self.phase = Phase::Established { answered: true },
            Op::Data => self.guest_credit.spend(len),
            Op::CreditRequest => self.credit_asked = true,
            Op::Shutdown => {
                self.told_ended |= flags;
                if self.told_ended == SHUTDOWN_BOTH {
                    self.phase = Phase::Closing;
                }
            }
            Op::CreditUpdate | Op::Reset => {}
        }
        // Every packet carries the counters.
        self.update_owed = false;
        Header {
            len,
            flags,
            buf_alloc: self.host_credit.window(),
            fwd_cnt: self.host_credit.tell(),
            ..self.header(op, guest_cid)
        }
    }

    /// The reset of this connection, for when it is given up.
    pub(super) fn reset(&self, guest_cid: u64) -> Header {
        self.header(Op::Reset, guest_cid)
    }

    fn header(&self, op: Op, guest_cid: u64) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            socket_type: TYPE_STREAM,
            op: op as u16,
            ..Header::default()
        }
    }

    /// Whether the guest has heard of the connection, so that giving it up takes a reset.
    pub(super) fn known_to_guest(&self) -> bool {
        !matches!(self.phase, Phase::Requesting { asked: false } | Phase::Draining)
    }

    /// Nobody on the host waits for this connection any more: its place may be given to another.
    pub(super) fn is_abandoned(&self) -> bool {
        self.phase == Phase::Closing || (matches!(self.phase, Phase::Requesting { .. }) && self.reader_gone())
    }

    pub(super) fn is_closing(&self) -> bool {
        self.phase == Phase::Closing
    }

    pub(super) fn is_draining(&self) -> bool {
        self.phase == Phase::Draining
    }

    /// The guest's part is over; only the backlog keeps the connection alive.
    pub(super) fn drain(&mut self) {
        self.phase = Phase::Draining;
    }
}

/// Directions of a unix socket that are to be shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SocketEnds {
    pub(super) read: bool,
    pub(super) write: bool,
}
