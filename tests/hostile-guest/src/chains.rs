//! Attacks on live queues: whatever a descriptor, a chain or an index can say.

use crate::dice::Dice;
use crate::driver::{BLOCK, Device, EVENT_IDX, INDIRECT, NET, NEXT, Queue, VSOCK, WRITE, describe};
use crate::machine::{self, BUFFERS};
use crate::report::Report;

/// Where tables of indirect descriptors lie.
const TABLES: u64 = BUFFERS + 0x40_0000;
/// Queues of any device that are played on.
const QUEUES: u64 = 3;

/// Chains that no driver would make, on all queues of each device, which is started anew whenever it breaks.
pub(crate) fn play(devices: &[Device], dice: &mut Dice, rounds: u64) -> Report {
    let mut report = Report::default();
    for device in devices {
        for _ in 0..rounds {
            let size = dice.of(&[1, 2, 16, 64, 1024]);
            if !device.open(size, dice.of(&[0, EVENT_IDX])) {
                report.granted += 1;
                continue;
            }
            mistreat(device, size, dice, &mut report);
            if dice.one_in(4) {
                // In flight.
                device.reset();
            }
            report.broken += u64::from(device.is_broken());
        }
        device.reset();
    }
    report
}

fn mistreat(device: &Device, size: u16, dice: &mut Dice, report: &mut Report) {
    let number = dice.below(QUEUES) as u32;
    let most = device.queue_max(number);
    if most == 0 {
        return;
    }
    let mut queue = Queue::of(device, number, most.min(size));
    for _ in 0..4 {
        fill_buffers(device, dice);
        let [table, _, used] = queue.rings();
        for index in 0..queue.size.min(16) {
            descriptor(table, index, queue.size, dice);
        }
        if dice.one_in(8) {
            // The device writes what it has used over its own descriptors.
            queue.describe(0, (used, 4096), (WRITE, 0));
            queue.describe(1, (table, 4096), (WRITE | NEXT, 0));
        }
        for _ in 0..dice.below(8) {
            let head = if dice.one_in(6) { dice.number() as u16 } else { dice.below(16) as u16 };
            queue.offer(head % if dice.one_in(2) { queue.size } else { u16::MAX });
            report.sent += 1;
        }
        queue.publish(if dice.one_in(8) { dice.number() as u16 } else { 0 });
        if dice.one_in(3) {
            // While it is being read.
            descriptor(table, dice.below(4) as u16, queue.size, dice);
        }
        report.answered += u64::from(queue.take().is_some());
    }
}

/// What devices would take for a request of theirs, so that it is not thrown away at once.
fn fill_buffers(device: &Device, dice: &mut Dice) {
    match device.kind {
        BLOCK => {
            machine::write(BUFFERS, dice.of(&[0_u32, 1, 4, 8, 11, 13, 99]));
            machine::write(BUFFERS + 8, dice.number());
        }
        NET => {
            machine::write(BUFFERS, dice.roll());
            machine::write(BUFFERS + 8, dice.number() as u32);
        }
        VSOCK => {
            machine::write(BUFFERS, 3_u64);
            machine::write(BUFFERS + 8, 2_u64);
            machine::write(BUFFERS + 24, dice.length());
            machine::write(BUFFERS + 28, 1_u16);
            machine::write(BUFFERS + 30, dice.below(9) as u16);
        }
        _ => {
            machine::write(BUFFERS, dice.length());
            machine::write(BUFFERS + 4, dice.below(60) as u32);
            machine::write(BUFFERS + 16, dice.of(&[0, 1, 2, u64::MAX]));
        }
    }
}

fn descriptor(table: u64, index: u16, size: u16, dice: &mut Dice) {
    let next = if dice.one_in(6) { dice.number() as u16 } else { dice.below(u64::from(size.min(16))) as u16 };
    let (mut address, mut length) = (dice.address(), dice.length());
    if dice.one_in(2) {
        (address, length) = (BUFFERS, dice.of(&[16, 40, 44, 64, 4096]));
    }
    let mut flags = dice.of(&[0, 0, NEXT, NEXT, NEXT | WRITE, WRITE, u16::MAX]);
    if dice.one_in(5) {
        (address, length) = indirect(dice);
        flags = INDIRECT | dice.of(&[0, NEXT, WRITE]);
    }
    describe(table, index, (address, length), (flags, next));
}

/// A table: of 4 GiB, that leads to itself, of one that is indirect again, or with all the parts there can be.
fn indirect(dice: &mut Dice) -> (u64, u32) {
    let parts = dice.of(&[1_u16, 2, 100, 2000]);
    for part in 0..parts {
        let flags = dice.of(&[NEXT, NEXT, NEXT | WRITE, INDIRECT]);
        let address = if flags == INDIRECT { TABLES } else { BUFFERS };
        describe(TABLES, part, (address, 16), (flags, (part + 1) % parts));
    }
    (TABLES, dice.of(&[u32::from(parts) * 16, 16, 15, 0, 65_535 * 16, u32::MAX, 0xffff_fff0]))
}
