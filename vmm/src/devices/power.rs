//! How a guest ends, and how it says where it is: three write-only ports.
//!
//! There is no i8042 and no ACPI. The kernel resets through the PC's Reset Control Register (`reboot=p`), and its
//! command line makes a panic's reset a warm one (`panic_warm`), so that the two can be told apart. The agent
//! powers off by its own port, without a trip through the kernel's reboot code.

use krx_proto::mark;

use crate::bus::{BusDevice, Effect};
use crate::phase::{self, Phase};

/// Reset Control Register, port 0xcf9.
#[derive(Debug)]
pub struct ResetControl;

/// Bit 2: reset the CPU now. The kernel sets it last.
const RESET_CPU: u8 = 1 << 2;
/// Bit 3: full reset, which Linux asks for unless the reboot is a warm one.
const FULL_RESET: u8 = 1 << 3;

impl BusDevice for ResetControl {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: u64, data: &[u8]) -> Effect {
        match data.first() {
            Some(value) if value & RESET_CPU == 0 => Effect::None,
            Some(value) if value & FULL_RESET == 0 => Effect::Panic,
            Some(_) => Effect::Reset,
            None => Effect::None,
        }
    }
}

/// Power-off port: any write ends the VM.
#[derive(Debug)]
pub struct PowerOff;

impl BusDevice for PowerOff {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: u64, _: &[u8]) -> Effect {
        phase::mark(Phase::PowerOff);
        Effect::PowerOff
    }
}

/// Boot mark: the guest names the point it has reached, the VMM notes the time.
#[derive(Debug)]
pub struct BootMark;

impl BusDevice for BootMark {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: u64, data: &[u8]) -> Effect {
        if data.first() == Some(&mark::PID1) {
            phase::mark(Phase::Pid1);
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sequence of Linux's `native_machine_emergency_restart` for `BOOT_CF9_FORCE`.
    #[test]
    fn linux_reset_sequences_are_told_apart() {
        let writes = |codes: &[u8]| codes.iter().map(|c| ResetControl.write(0, &[*c])).collect::<Vec<_>>();
        assert_eq!(writes(&[0x02, 0x0e]), [Effect::None, Effect::Reset]);
        assert_eq!(writes(&[0x02, 0x06]), [Effect::None, Effect::Panic]);
    }

    #[test]
    fn empty_and_wide_writes_are_harmless() {
        assert_eq!(ResetControl.write(0, &[]), Effect::None);
        assert_eq!(BootMark.write(0, &[0xff; 8]), Effect::None);
        assert_eq!(PowerOff.write(0, &[0; 4]), Effect::PowerOff);
    }
}
