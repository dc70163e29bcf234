//! What a VM exit means, as a function of the exit and the buses: no KVM, no descriptors, no threads.

use kvm_ioctls::VcpuExit;

use crate::bus::{Buses, Effect};

/// What the vCPU does after an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Continue,
    PowerOff,
    Reset,
    Panic,
    Crash(Crash),
}

/// Why a vCPU cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// A fault while handling a double fault; the processor shuts down.
    TripleFault,
    /// KVM cannot emulate or continue from what the guest did.
    KvmInternal,
    /// The processor refuses the guest's state; its reason.
    FailedEntry(u64),
    /// An exit that this machine's configuration excludes.
    Unexpected(&'static str),
}

impl Crash {
    /// What happened, for people.
    #[must_use]
    pub fn meaning(self) -> String {
        match self {
            Self::TripleFault => "The guest crashed with a triple fault".into(),
            Self::KvmInternal => "The guest did what this host's KVM cannot emulate".into(),
            Self::FailedEntry(reason) => {
                format!("The processor refused the guest's state (reason {reason:#x})")
            }
            Self::Unexpected(exit) => format!("The guest caused an exit this machine excludes ({exit})"),
        }
    }
}

/// Carries out the exit on the buses.
pub fn handle(exit: VcpuExit<'_>, buses: &Buses) -> Next {
    match exit {
        VcpuExit::MmioRead(address, data) => {
            buses.mmio.read(address, data);
            Next::Continue
        }
        VcpuExit::MmioWrite(address, data) => after(buses.mmio.write(address, data)),
        VcpuExit::IoIn(port, data) => {
            buses.ports.read(port.into(), data);
            Next::Continue
        }
        VcpuExit::IoOut(port, data) => after(buses.ports.write(port.into(), data)),
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => Next::Continue,
        VcpuExit::Shutdown => Next::Crash(Crash::TripleFault),
        VcpuExit::InternalError => Next::Crash(Crash::KvmInternal),
        VcpuExit::FailEntry(reason, _) => Next::Crash(Crash::FailedEntry(reason)),
        // The in-kernel local APIC handles HLT.
        VcpuExit::Hlt => Next::Crash(Crash::Unexpected("HLT")),
        VcpuExit::SystemEvent(..) => Next::Crash(Crash::Unexpected("system event")),
        _ => Next::Crash(Crash::Unexpected("unknown to this machine")),
    }
}

fn after(effect: Effect) -> Next {
    match effect {
        Effect::None => Next::Continue,
        Effect::PowerOff => Next::PowerOff,
        Effect::Reset => Next::Reset,
        Effect::Panic => Next::Panic,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::arch::x86_64::layout;
    use crate::devices::power::{PowerOff, ResetControl};

    fn buses() -> Buses {
        let mut buses = Buses::default();
        buses.ports.attach(layout::RESET_CONTROL.into(), 1, Arc::new(Mutex::new(ResetControl)));
        buses.ports.attach(krx_proto::io_port::POWER_OFF.into(), 1, Arc::new(Mutex::new(PowerOff)));
        buses
    }

    #[test]
    fn port_writes_end_the_machine() {
        let out = |port, byte| handle(VcpuExit::IoOut(port, &[byte]), &buses());
        assert_eq!(out(krx_proto::io_port::POWER_OFF, 0), Next::PowerOff);
        assert_eq!(out(layout::RESET_CONTROL, 0x06), Next::Panic);
        assert_eq!(out(layout::RESET_CONTROL, 0x0e), Next::Reset);
        assert_eq!(out(0x80, 0), Next::Continue);
    }

    #[test]
    fn absent_devices_read_as_all_ones() {
        let mut data = [0; 4];
        assert_eq!(handle(VcpuExit::MmioRead(u64::MAX, &mut data), &buses()), Next::Continue);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn crashes_are_told_apart() {
        assert_eq!(handle(VcpuExit::Shutdown, &buses()), Next::Crash(Crash::TripleFault));
        assert_eq!(handle(VcpuExit::InternalError, &buses()), Next::Crash(Crash::KvmInternal));
        assert_eq!(handle(VcpuExit::FailEntry(7, 0), &buses()), Next::Crash(Crash::FailedEntry(7)));
    }
}
