//! Attacks on the vsock device, by a driver that keeps to virtio and lies in the packets (virtio 1.2, 5.10.6).

use crate::dice::Dice;
use crate::driver::{Device, EVENT_IDX, NEXT, Queue, WRITE};
use crate::machine::{self, BUFFERS, While, read};
use crate::report::Report;

const GUEST: u64 = 3;
const HOST: u64 = 2;
/// A port on which the host half listens.
const PORT: u32 = 5000;
const HEADER: u32 = 44;
const SIZE: u16 = 64;

const PACKET: u64 = BUFFERS;
const RECEIVED: u64 = BUFFERS + 0x10_0000;
const ROOM: u32 = HEADER + 4096;
/// How long the last answers may take.
const LAST_MS: u64 = 300;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

#[derive(Clone, Copy)]
struct Packet {
    cids: (u64, u64),
    ports: (u32, u32),
    length: u32,
    kind: (u16, u16),
    flags: u32,
    credit: (u32, u32),
}

impl Packet {
    fn of(source: u32, operation: u16) -> Self {
        let (cids, ports) = ((GUEST, HOST), (source, PORT));
        Self { cids, ports, length: 0, kind: (1, operation), flags: 0, credit: (1 << 18, 0) }
    }

    fn write(&self) {
        machine::write(PACKET, self.cids.0);
        machine::write(PACKET + 8, self.cids.1);
        machine::write(PACKET + 16, self.ports.0);
        machine::write(PACKET + 20, self.ports.1);
        machine::write(PACKET + 24, self.length);
        machine::write(PACKET + 28, self.kind.0);
        machine::write(PACKET + 30, self.kind.1);
        machine::write(PACKET + 32, self.flags);
        machine::write(PACKET + 36, self.credit.0);
        machine::write(PACKET + 40, self.credit.1);
    }
}

struct Wire<'d> {
    device: &'d Device,
    receive: Queue,
    transmit: Queue,
    report: Report,
}

impl<'d> Wire<'d> {
    fn new(device: &'d Device) -> Option<Self> {
        let queue = |number| Queue::of(device, number, SIZE);
        let mut wire = Self { device, receive: queue(0), transmit: queue(1), report: Report::default() };
        wire.begin().then_some(wire)
    }

    fn begin(&mut self) -> bool {
        if !self.device.open(SIZE, EVENT_IDX) {
            return false;
        }
        self.receive = Queue::of(self.device, 0, SIZE);
        self.transmit = Queue::of(self.device, 1, SIZE);
        for index in 0..SIZE {
            self.lend(index);
        }
        self.receive.publish(0);
        true
    }

    fn lend(&mut self, index: u16) {
        let place = RECEIVED + u64::from(index) * 0x2000;
        self.receive.describe(index, (place, ROOM), (WRITE, 0));
        self.receive.offer(index);
    }

    /// Sends `packet` with so many bytes behind it, whatever it says of itself.
    fn send(&mut self, packet: Packet, bytes: u32) {
        packet.write();
        let flags = if bytes > 0 { (NEXT, 1) } else { (0, 0) };
        self.transmit.describe(0, (PACKET, HEADER), flags);
        self.transmit.describe(1, (PACKET + 0x1000, bytes), (0, 0));
        self.transmit.offer(0);
        self.transmit.publish(0);
        self.report.sent += 1;
        // One at a time: it is written over by the next one.
        if self.transmit.wait().is_none() {
            self.report.broken += 1;
            if !self.device.is_broken() {
                machine::say(format_args!("granted: vsock takes no packets any more"));
                machine::reset();
            }
            self.begin();
            return;
        }
        self.hear();
    }

    /// Takes what has arrived. It must be for this guest.
    fn hear(&mut self) {
        let mut heard = false;
        while let Some((index, written)) = self.receive.take() {
            let place = RECEIVED + u64::from(index) * 0x2000;
            let foreign = read::<u64>(place) != HOST || read::<u64>(place + 8) != GUEST || written < HEADER;
            // What is answered to a false address comes from there.
            self.report.leaked += u64::from(foreign && read::<u16>(place + 30) != RESET);
            self.report.answered += 1;
            self.lend(index % SIZE);
            heard = true;
        }
        if heard {
            self.receive.publish(0);
        }
    }
}

pub(crate) fn play(device: &Device, dice: &mut Dice, rounds: u64) -> Report {
    let Some(mut wire) = Wire::new(device) else { return Report::default() };
    wrong_packets(&mut wire);
    credit(&mut wire);
    for _ in 0..rounds / 4 {
        anything(&mut wire, dice);
    }
    // Each a connection of its own, and none is ever used.
    for source in 0..rounds as u32 {
        wire.send(Packet::of(100_000 + source, REQUEST), 0);
    }
    let end = While::of(LAST_MS);
    while !end.is_over() {
        wire.hear();
    }
    wire.device.reset();
    wire.report
}

/// What is not for the host, not of this guest, or of no known kind.
fn wrong_packets(wire: &mut Wire<'_>) {
    for operation in [REQUEST, RESPONSE, RESET, SHUTDOWN, DATA, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8, u16::MAX]
    {
        let good = Packet::of(1, operation);
        for cids in
            [(0, HOST), (4, HOST), (u64::MAX, HOST), (GUEST, GUEST), (GUEST, 0), (GUEST, 4), (HOST, GUEST)]
        {
            wire.send(Packet { cids, ..good }, 0);
        }
        for socket in [0, 2, 3, u16::MAX] {
            wire.send(Packet { kind: (socket, operation), ..good }, 0);
        }
        for port in [0, 1, 1024, u32::MAX] {
            wire.send(Packet { ports: (1, port), ..good }, 0);
        }
        // Lengths that lie in either direction.
        for (length, bytes) in
            [(1, 0), (u32::MAX, 0), (1 << 20, 64), (0, 64), (64, 1 << 20), (65_537, 65_537)]
        {
            wire.send(Packet { length, ..good }, bytes);
        }
    }
}

/// Connections in every wrong order, and credit that was never given.
fn credit(wire: &mut Wire<'_>) {
    for (number, credit) in (0..).zip([(0, 0), (u32::MAX, 0), (0, u32::MAX), (1 << 18, 1 << 31), (1, 2)]) {
        let source = 1000 + number;
        wire.send(Packet { credit, ..Packet::of(source, REQUEST) }, 0);
        for operation in [DATA, CREDIT_UPDATE, CREDIT_REQUEST, RESPONSE, REQUEST, DATA, SHUTDOWN, DATA] {
            let length = if operation == DATA { 4096 } else { 0 };
            wire.send(Packet { credit, length, flags: number, ..Packet::of(source, operation) }, length);
        }
    }
    // More than the window, to who may not read.
    wire.send(Packet::of(2000, REQUEST), 0);
    for _ in 0..100 {
        wire.send(Packet { length: 4096, ..Packet::of(2000, DATA) }, 4096);
    }
}

fn anything(wire: &mut Wire<'_>, dice: &mut Dice) {
    let cid = |dice: &mut Dice, right| if dice.one_in(8) { dice.number() } else { right };
    let cids = (cid(dice, GUEST), cid(dice, HOST));
    let port = if dice.one_in(6) { dice.number() as u32 } else { PORT };
    let bytes = dice.of(&[0, 0, 1, 64, 4096, 65_536]);
    let packet = Packet {
        cids,
        ports: (dice.below(32) as u32, port),
        length: if dice.one_in(6) { dice.length() } else { bytes },
        kind: (if dice.one_in(10) { dice.number() as u16 } else { 1 }, dice.below(9) as u16),
        flags: dice.number() as u32,
        credit: (dice.number() as u32, dice.number() as u32),
    };
    wire.send(packet, bytes);
}
