//! Attacks on what the VMM sees of a guest's accesses: registers, ports, and queues that are set up wrongly.

use crate::dice::Dice;
use crate::driver::{Device, EVENT_IDX, Queue, RNG, STEPS, WRITE, register};
use crate::machine::{self, BUFFERS, While};
use crate::report::Report;

/// Beside the slots of the devices there are those of disks, and then nothing.
const WINDOW: u64 = 0xd000_0000;
const WINDOW_END: u64 = 0xd002_0000;
const IOAPIC: u64 = 0xfec0_0000;
const LOCAL_APIC: u64 = 0xfee0_0000;
/// Ends the VM, which is not what is to be shown here.
const POWER_OFF: u64 = 0x511;
const RESET_CONTROL: u64 = 0xcf9;
/// Has to tell how it went.
const CONSOLE: core::ops::Range<u64> = 0x3f5..0x400;

/// Reads and writes of all widths in and around the devices, at any address.
pub(crate) fn anywhere(devices: &[Device], dice: &mut Dice, rounds: u64) -> Report {
    let mut report = Report::default();
    for _ in 0..rounds {
        let device = dice.of(devices);
        let address = match dice.below(4) {
            0 => device.base + dice.below(0x200),
            1 => device.base + dice.below(0x1000),
            2 => WINDOW - 64 + dice.below(WINDOW_END - WINDOW),
            _ => machine::MEMORY_END + dice.below(1 << 20),
        };
        access(address, dice);
        report.sent += 1;
    }
    // As they were, for who asks whether they still work.
    devices.iter().for_each(Device::reset);
    report
}

fn access(address: u64, dice: &mut Dice) {
    let value = dice.number();
    match dice.below(12) {
        0 => drop(machine::read::<u8>(address)),
        1 => drop(machine::read::<u16>(address)),
        2 => drop(machine::read::<u32>(address)),
        3 => drop(machine::read::<u64>(address)),
        4 => drop(machine::read::<u128>(address)),
        5 => machine::write(address, value as u8),
        6 => machine::write(address, value as u16),
        7 => machine::write(address, value as u32),
        8 => machine::write(address, value),
        9 => machine::write(address, u128::from(value) << dice.below(64)),
        10 => machine::copy(BUFFERS, address, dice.below(64)),
        _ => machine::copy(address, BUFFERS, dice.below(64)),
    }
}

/// Ports, with all widths, and by the string instructions.
pub(crate) fn ports(dice: &mut Dice, rounds: u64) -> Report {
    let mut report = Report::default();
    for _ in 0..rounds {
        let near = dice.of(&[0_u64, 0x20, 0x40, 0x60, 0x70, 0x80, 0xa0, 0x500, 0xcf8, 0xffff]);
        let port = if dice.one_in(2) { near + dice.below(8) } else { dice.below(1 << 16) };
        // A wide access reaches those that follow.
        let kept = [POWER_OFF, RESET_CONTROL].into_iter().any(|kept| (kept - 3..=kept).contains(&port));
        if kept || CONSOLE.contains(&port) {
            continue;
        }
        let (port, value) = (port as u16, dice.number());
        match dice.below(6) {
            0 => machine::out8(port, value as u8),
            1 => machine::out16(port, value as u16),
            2 => machine::out32(port, value as u32),
            3 => drop(machine::in8(port)),
            4 => drop(machine::in32(port)),
            _ => machine::string_io(port, dice.below(40)),
        }
        report.sent += 1;
    }
    report
}

/// A driver that goes through the states of its device as it likes.
pub(crate) fn states(devices: &[Device], dice: &mut Dice, rounds: u64) -> Report {
    let mut report = Report::default();
    for _ in 0..rounds {
        let device = dice.of(devices);
        match dice.below(10) {
            0..4 => device.set(register::STATUS, dice.of(&STEPS)),
            4 => device.set(register::STATUS, dice.number() as u32),
            5 => drop(device.negotiate(dice.number())),
            6 => {
                device.set(register::DRIVER_FEATURES_SEL, dice.below(3) as u32);
                device.set(register::DRIVER_FEATURES, dice.number() as u32);
            }
            7 => wrong_queue(&device, dice),
            8 => drop(device.open(dice.of(&[1, 2, 64, 1024]), dice.of(&[0, EVENT_IDX]))),
            _ => device.kick(dice.number() as u32),
        }
        report.sent += 1;
        report.broken += u64::from(device.is_broken());
    }
    devices.iter().for_each(Device::reset);
    report
}

fn wrong_queue(device: &Device, dice: &mut Dice) {
    let size = match dice.below(3) {
        0 => dice.of(&[0, 3, 1023, 65_535, 65_536, u32::MAX]),
        1 => dice.number() as u32,
        _ => 1 << dice.below(11),
    };
    let mut rings = [dice.address(), dice.address(), dice.address()];
    if dice.one_in(3) {
        // One over the other.
        rings = [rings[0]; 3];
    }
    device.place(dice.of(&[0, 0, 1, 2, 12, u32::MAX]), size, rings);
}

/// Devices that are started on queues as they must not be.
pub(crate) fn queues(devices: &[Device], dice: &mut Dice, rounds: u64) -> Report {
    let mut report = Report::default();
    for _ in 0..rounds {
        let device = dice.of(devices);
        if !device.negotiate(dice.of(&[0, EVENT_IDX])) {
            continue;
        }
        for number in 0..3 {
            let most = device.queue_max(number);
            let queue = Queue::of(&device, number, most.max(1));
            if dice.one_in(3) {
                wrong_queue(&device, dice);
            } else {
                device.place(number, most.into(), queue.rings());
            }
        }
        device.start();
        report.sent += 1;
        report.broken += u64::from(device.is_broken());
        (0..3).for_each(|queue| device.kick(queue));
    }
    devices.iter().for_each(Device::reset);
    report
}

/// Kicks without end, of queues that are there, empty, and not there.
pub(crate) fn notify(devices: &[Device], dice: &mut Dice, ms: u64) -> Report {
    let mut report = Report::default();
    for device in devices {
        device.open(64, EVENT_IDX);
        let end = While::of(ms / devices.len() as u64);
        while !end.is_over() {
            device.kick(dice.below(4) as u32);
            report.sent += 1;
        }
        report.broken += u64::from(device.is_broken());
    }
    report
}

/// An interrupt for each byte of randomness, as many as there can be, and an interrupt controller that is told nonsense.
pub(crate) fn storm(devices: &[Device], dice: &mut Dice, ms: u64) -> Report {
    let mut report = Report::default();
    let Some(device) = devices.iter().find(|device| device.kind == RNG) else { return report };
    device.open(64, EVENT_IDX);
    let mut queue = Queue::of(device, 0, device.queue_max(0).min(64));
    let end = While::of(ms);
    while !end.is_over() {
        for index in 0..queue.size {
            queue.describe(index, (BUFFERS + u64::from(index), 1), (WRITE, 0));
            queue.offer(index);
        }
        // Edge or level, masked or not, to any vector: fixed delivery, which the guest never takes.
        let entry = 0x10 + 2 * dice.below(24) as u32;
        machine::write(IOAPIC, entry);
        machine::write(IOAPIC + 0x10, (dice.number() as u32 & 0x1_a800) | dice.below(256) as u32);
        queue.publish(0);
        device.set(register::INTERRUPT_ACK, 3);
        report.sent += u64::from(queue.size);
        for _ in 0..queue.size {
            report.answered += u64::from(queue.wait().is_some());
        }
    }
    report.broken += u64::from(device.is_broken());
    device.reset();
    report
}

/// What every driver of this device does.
pub(crate) fn gives_randomness(device: &Device) -> bool {
    let works = device.open(8, 0);
    let mut queue = Queue::of(device, 0, device.queue_max(0).min(8));
    queue.describe(0, (BUFFERS, 32), (WRITE, 0));
    queue.offer(0);
    queue.publish(0);
    let answer = queue.wait();
    device.reset();
    works && answer == Some((0, 32))
}

/// The interrupt controllers, which may end the guest: it is told to start over, and has nothing to start with.
pub(crate) fn apic(dice: &mut Dice, rounds: u64) -> Report {
    let mut report = Report::default();
    for _ in 0..rounds {
        let value = dice.number() as u32;
        if dice.one_in(2) {
            machine::write(IOAPIC, dice.below(0x40) as u32);
            machine::write(IOAPIC + 0x10, value);
        } else {
            machine::write(LOCAL_APIC + (dice.below(0x400) & !0xf), value);
        }
        report.sent += 1;
    }
    report
}
