//! Which device answers at which address. Two tables, port I/O and MMIO, filled once before the vCPUs start.
//!
//! No lock guards a table; each device has its own, and no device calls another through the bus.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// A device that registers of the guest reach. `offset` counts from the start of the device's range.
pub trait BusDevice: Send {
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Answers with what the machine has to do about the write, if anything.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect;
}

/// What a write to a device means for the whole machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    None,
    /// The guest has finished and wants to be gone.
    PowerOff,
    /// The guest asks for a reset. A micro-VM is not started again, so it ends the VM.
    Reset,
    /// The guest's kernel has panicked and asks for a reset.
    Panic,
}

/// A table of devices by address.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

struct Range {
    start: u64,
    length: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

impl Bus {
    /// Puts `device` at `[start, start + length)`. Ranges come from the address map and do not overlap.
    pub fn attach(&mut self, start: u64, length: u64, device: Arc<Mutex<dyn BusDevice>>) {
        self.ranges.push(Range { start, length, device });
    }

    /// Reads; where no device is, all bits are set, as on a PC's bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes; where no device is, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) -> Effect {
        match self.find(address) {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data)
            }
            None => Effect::None,
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        self.ranges.iter().find_map(|range| {
            let offset = address.checked_sub(range.start)?;
            (offset < range.length).then_some((offset, &*range.device))
        })
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ranges.iter().map(|range| (range.start, range.length))).finish()
    }
}

/// The machine's two address spaces.
#[derive(Debug, Default)]
pub struct Buses {
    pub ports: Bus,
    pub mmio: Bus,
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(Vec<u8>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&mut self, _: u64, data: &[u8]) -> Effect {
            self.0 = data.to_vec();
            Effect::PowerOff
        }
    }

    #[test]
    fn addresses_reach_their_device_only() {
        let mut bus = Bus::default();
        bus.attach(0x1000, 0x10, Arc::new(Mutex::new(Echo(Vec::new()))));
        let read = |address| {
            let mut byte = [0];
            bus.read(address, &mut byte);
            byte[0]
        };
        assert_eq!((read(0x0fff), read(0x1000), read(0x100f), read(0x1010)), (0xff, 0, 0x0f, 0xff));
        assert_eq!(bus.write(0x1004, &[1]), Effect::PowerOff);
        assert_eq!(bus.write(u64::MAX, &[1]), Effect::None);
    }
}
