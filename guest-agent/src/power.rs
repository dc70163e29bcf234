//! The VMM's two pseudo devices, reached through `/dev/port`: the boot mark and the power button's other end.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

use krx_proto::{io_port, mark};
use nix::sys::reboot::{RebootMode, reboot};

/// Tells the VMM that PID 1 runs. A VMM without the port lets the write go nowhere.
pub(crate) fn mark_pid1() {
    let _ = write_port(io_port::BOOT_MARK, mark::PID1);
}

/// Ends the VM at once. What is to be kept is on disk already.
pub(crate) fn off() -> ! {
    let _ = write_port(io_port::POWER_OFF, 0);
    // Still here: another VMM. Its machine halts by the kernel's own means, or at least does nothing any more.
    let _ = reboot(RebootMode::RB_POWER_OFF);
    loop {
        std::thread::park();
    }
}

fn write_port(port: u16, byte: u8) -> io::Result<()> {
    let ports: File = OpenOptions::new().write(true).open("/dev/port")?;
    ports.write_all_at(&[byte], port.into())
}
