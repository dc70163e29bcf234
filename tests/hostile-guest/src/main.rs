//! A kernel that attacks the VMM it runs on. `tests/tests/hostile.rs` starts it, and says on the command line what to play:
//! `krx_attack=NAME krx_seed=N krx_rounds=N`; the devices are where krx tells every kernel (`virtio_mmio.device=`).
//!
//! What it has done it says on the console, by one line that begins with `HOSTILE done`. Then it stands still.

#![no_std]
#![no_main]
#![allow(clippy::cast_possible_truncation, reason = "numbers are cut to what a register takes")]

mod chains;
mod dice;
mod driver;
mod fuse;
mod machine;
mod mem;
mod registers;
mod report;
mod vsock;

use dice::Dice;
use driver::{Device, FS, RNG, VSOCK};
use report::Report;

/// `cmd_line_ptr` of the boot parameters, and the longest line.
const COMMAND_LINE: u64 = 0x228;
const LONGEST: usize = 2048;
/// More slots than there are.
const MOST_DEVICES: usize = 12;
/// Where the first disk comes, while the guest runs.
const DISK: u64 = 0xd000_b000;
const DISK_WAIT_MS: u64 = 10_000;

#[unsafe(no_mangle)]
extern "C" fn krx_main(boot_parameters: u64) -> ! {
    machine::set_up();
    let mut line = [0; LONGEST];
    let line = command_line(boot_parameters, &mut line);
    let mut devices = [Device { base: 0, kind: 0 }; MOST_DEVICES];
    let mut count = 0;
    for place in values(line, "virtio_mmio.device=") {
        // 4K@0xd0000000:5
        let address = place.split(['@', ':']).nth(1).and_then(|text| text.strip_prefix("0x"));
        let address = address.and_then(|text| u64::from_str_radix(text, 16).ok());
        devices[count] = Device::at(address.expect("an address"));
        count += 1;
    }
    let number = |name| values(line, name).next().and_then(|text| text.parse().ok()).unwrap_or(1_u64);
    let (seed, rounds) = (number("krx_seed="), number("krx_rounds="));
    if values(line, "krx_disk=").next().is_some() {
        devices[count] = disk();
        count += 1;
    }
    let attack = values(line, "krx_attack=").next().expect("krx_attack=");
    machine::say(format_args!("plays {attack} seed={seed} devices={count}"));
    let mut report = play(attack, &devices[..count], seed, rounds);
    // Whatever was done to them, devices work for a driver that starts them anew.
    for device in devices[..count].iter().filter(|device| device.kind == RNG) {
        report.granted += u64::from(!registers::gives_randomness(device));
    }
    machine::say(format_args!("done {attack} {report}"));
    machine::halt()
}

fn play(attack: &str, devices: &[Device], seed: u64, rounds: u64) -> Report {
    let dice = &mut Dice::new(seed);
    let one = |kind| devices.iter().find(|device| device.kind == kind).expect("the device");
    match attack {
        "registers" => registers::anywhere(devices, dice, rounds),
        "ports" => registers::ports(dice, rounds),
        "states" => registers::states(devices, dice, rounds),
        "queues" => registers::queues(devices, dice, rounds),
        "notify" => registers::notify(devices, dice, rounds),
        "storm" => registers::storm(devices, dice, rounds),
        "apic" => registers::apic(dice, rounds),
        "chains" => chains::play(devices, dice, rounds),
        "fuse" => fuse::play(one(FS), dice, rounds),
        "vsock" => vsock::play(one(VSOCK), dice, rounds),
        "instruction" => {
            machine::odd(seed, devices[0].base + 0x70);
            Report::default()
        }
        other => panic!("no attack {other}"),
    }
}

/// Waits for the disk that the host half attaches.
fn disk() -> Device {
    machine::say(format_args!("waits for a disk"));
    let patience = machine::While::of(DISK_WAIT_MS);
    loop {
        let device = Device::at(DISK);
        if device.kind == driver::BLOCK {
            return device;
        }
        assert!(!patience.is_over(), "no disk came");
    }
}

fn command_line(boot_parameters: u64, line: &mut [u8; LONGEST]) -> &str {
    let start = u64::from(machine::read::<u32>(boot_parameters + COMMAND_LINE));
    let mut length = 0;
    for (at, place) in (start..).zip(line.iter_mut()) {
        *place = machine::read(at);
        if *place == 0 {
            break;
        }
        length += 1;
    }
    core::str::from_utf8(&line[..length]).expect("ASCII")
}

fn values<'l>(line: &'l str, name: &'l str) -> impl Iterator<Item = &'l str> {
    line.split(' ').filter_map(move |word| word.strip_prefix(name))
}

#[panic_handler]
fn panic(why: &core::panic::PanicInfo<'_>) -> ! {
    machine::say(format_args!("panicked: {why}"));
    machine::reset()
}
