//! COM1 as a 16550 whose output goes to standard error. Only there with `console`: each character costs an exit.
//! Nothing can be typed into it.

use std::io::{self, Stderr};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{BusDevice, Effect};

/// Raises COM1's interrupt.
#[derive(Debug)]
pub struct SerialIrq(pub EventFd);

impl Trigger for SerialIrq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The console.
#[derive(Debug)]
pub struct Console(Serial<SerialIrq, NoEvents, Stderr>);

impl Console {
    /// `irq` is registered with KVM as COM1's irqfd.
    #[must_use]
    pub fn new(irq: EventFd) -> Self {
        Self(Serial::new(SerialIrq(irq), io::stderr()))
    }
}

impl BusDevice for Console {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([byte], Ok(register)) = (data, u8::try_from(offset)) {
            *byte = self.0.read(register);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let ([byte], Ok(register)) = (data, u8::try_from(offset)) {
            // A standard error that is gone loses the console's output, nothing else.
            let _ = self.0.write(register, *byte);
        }
        Effect::None
    }
}
