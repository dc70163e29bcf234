//! The processor as far as the attacks need it: memory by address, ports, time, the end. All that is unsafe is here and in `mem`.
//!
//! Addresses are physical, which are the virtual ones. Nothing that Rust owns lies at [`RINGS`] or above.

use core::arch::{asm, global_asm};
use core::fmt::{self, Write};

/// Where the rings of the queues are, and behind them buffers, up to the end of memory.
pub(crate) const RINGS: u64 = 32 << 20;
pub(crate) const BUFFERS: u64 = 40 << 20;
/// What the VM is given.
pub(crate) const MEMORY_END: u64 = 64 << 20;
/// Page directory for the fourth GiB, where the devices are; the VMM has mapped the first.
const DEVICE_PAGES: u64 = 30 << 20;
/// The VMM's second-level page table (vmm/src/arch/x86_64/layout.rs).
const PDPT: u64 = 0xa000;

const BOOT_MARK: u16 = 0x510;
const RESET_CONTROL: u16 = 0xcf9;
const COM1: u16 = 0x3f8;
const LEAF_TIMING: u32 = 0x4000_0010;

// Interrupts stay off and there is no table of handlers: what faults is a triple fault. The compiler's code has SSE.
global_asm!(
    ".section .text.entry, \"ax\"",
    ".globl _start",
    "_start:",
    "cli",
    "lea rsp, [rip + krx_stack_end]",
    "mov rax, cr0",
    "and rax, -5",
    "or rax, 2",
    "mov cr0, rax",
    "mov rax, cr4",
    "or rax, 0x600",
    "mov cr4, rax",
    "mov rdi, rsi",
    "call krx_main",
    "ud2",
    ".section .bss.stack, \"aw\", @nobits",
    ".balign 16",
    ".skip 0x40000",
    "krx_stack_end:",
    ".text",
);

/// Maps the fourth GiB one to one, and says to the VMM that the guest runs.
pub(crate) fn set_up() {
    for page in 0..512_u64 {
        write(DEVICE_PAGES + page * 8, (3 << 30) + page * (2 << 20) + 0x93);
    }
    write(PDPT + 3 * 8, DEVICE_PAGES + 3);
    out8(BOOT_MARK, 1);
}

/// Reads memory or a register; a read has the width of `T`.
pub(crate) fn read<T: Copy + Default>(address: u64) -> T {
    let mut value = T::default();
    // SAFETY: mapped, as all below 1 GiB and from 3 to 4 GiB is; `T` is a number, and any is one.
    unsafe { transfer(address, &raw mut value as u64, size_of::<T>()) }
    value
}

/// Writes memory or a register; a write has the width of `T`.
pub(crate) fn write<T: Copy>(address: u64, value: T) {
    // SAFETY: mapped, see `read`; the attacks write registers, and memory from `DEVICE_PAGES` on.
    unsafe { transfer(&raw const value as u64, address, size_of::<T>()) }
}

/// One load and one store of 1, 2, 4, 8 or 16 bytes.
/// # Safety
/// Both are mapped, and `to` is the caller's to write.
unsafe fn transfer(from: u64, to: u64, width: usize) {
    match width {
        // SAFETY: as above.
        1 => unsafe {
            asm!("mov {v:l}, byte ptr [{f}]", "mov byte ptr [{t}], {v:l}", f = in(reg) from, t = in(reg) to, v = out(reg_abcd) _, options(nostack));
        },
        // SAFETY: as above.
        2 => unsafe {
            asm!("mov {v:x}, word ptr [{f}]", "mov word ptr [{t}], {v:x}", f = in(reg) from, t = in(reg) to, v = out(reg) _, options(nostack));
        },
        // SAFETY: as above.
        4 => unsafe {
            asm!("mov {v:e}, dword ptr [{f}]", "mov dword ptr [{t}], {v:e}", f = in(reg) from, t = in(reg) to, v = out(reg) _, options(nostack));
        },
        // SAFETY: as above.
        8 => unsafe {
            asm!("mov {v}, qword ptr [{f}]", "mov qword ptr [{t}], {v}", f = in(reg) from, t = in(reg) to, v = out(reg) _, options(nostack));
        },
        // SAFETY: as above.
        _ => unsafe {
            asm!("movdqu {v}, [{f}]", "movdqu [{t}], {v}", f = in(reg) from, t = in(reg) to, v = out(xmm_reg) _, options(nostack));
        },
    }
}

/// Copies bytes into memory.
pub(crate) fn put(address: u64, bytes: &[u8]) {
    for (at, byte) in (address..).zip(bytes) {
        write(at, *byte);
    }
}

/// Fills memory with zeroes; whole words of 8 bytes.
pub(crate) fn clear(address: u64, count: u64) {
    // SAFETY: mapped, see `write`.
    unsafe {
        asm!("rep stosq", inout("rcx") count / 8 => _, inout("rdi") address => _, in("rax") 0_u64, options(nostack));
    }
}

/// `rep movsb`, which KVM has to play in the place of the processor where it touches a device.
pub(crate) fn copy(from: u64, to: u64, count: u64) {
    // SAFETY: mapped, see `write`.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack));
    }
}

/// An instruction that no driver uses on a register: one of [`ODD`]. It may end the guest.
pub(crate) fn odd(which: u64, address: u64) {
    match which % ODD {
        // SAFETY: what becomes of the guest does not matter.
        0 => unsafe {
            asm!("lock xadd dword ptr [{a}], {v:e}", a = in(reg) address, v = inout(reg) 1_u64 => _)
        },
        // SAFETY: as above.
        1 => unsafe {
            asm!("xor eax, eax", "lock cmpxchg qword ptr [{a}], {v}", a = in(reg) address, v = in(reg) 1_u64, out("rax") _);
        },
        // SAFETY: as above.
        2 => unsafe { asm!("fxsave [{a}]", a = in(reg) address & !15) },
        // SAFETY: as above.
        3 => unsafe {
            asm!("push rsp", "mov {s}, rsp", "mov rsp, {a}", "push {s}", "push {s}", "mov rsp, {s}", "add rsp, 8", a = in(reg) address + 64, s = out(reg) _)
        },
        // SAFETY: as above.
        4 => unsafe { asm!("call {a}", a = in(reg) address) },
        // SAFETY: as above.
        5 => unsafe { asm!("lidt [{a}]", "int3", a = in(reg) address) },
        // SAFETY: as above.
        6 => unsafe { asm!("mov cr3, {a}", a = in(reg) address & !0xfff) },
        // SAFETY: as above.
        _ => unsafe { asm!("mov rsp, {a}", "int3", a = in(reg) address, options(noreturn)) },
    }
}

pub(crate) const ODD: u64 = 8;

pub(crate) fn out8(port: u16, value: u8) {
    // SAFETY: ports are not memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

pub(crate) fn out16(port: u16, value: u16) {
    // SAFETY: ports are not memory.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) }
}

pub(crate) fn out32(port: u16, value: u32) {
    // SAFETY: ports are not memory.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) }
}

pub(crate) fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: ports are not memory.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) }
    value
}

pub(crate) fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: ports are not memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
    value
}

/// `rep outsd` and `rep insd` of the buffers.
pub(crate) fn string_io(port: u16, count: u64) {
    // SAFETY: `BUFFERS` is memory that nobody owns.
    unsafe {
        asm!("rep outsd", in("dx") port, inout("rcx") count => _, inout("rsi") BUFFERS => _, options(nostack))
    }
    // SAFETY: as above.
    unsafe {
        asm!("rep insd", in("dx") port, inout("rcx") count => _, inout("rdi") BUFFERS => _, options(nostack))
    }
}

/// A while that begins now.
pub(crate) struct While(u64);

impl While {
    /// In milliseconds, by the time stamp counter.
    pub(crate) fn of(ms: u64) -> Self {
        let khz = u64::from(core::arch::x86_64::__cpuid(LEAF_TIMING).eax);
        Self(now() + ms * if khz == 0 { 1_000_000 } else { khz })
    }

    pub(crate) fn is_over(&self) -> bool {
        core::hint::spin_loop();
        now() >= self.0
    }
}

fn now() -> u64 {
    // SAFETY: every 64-bit processor has the counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Stands still: no interrupt will ever wake it.
pub(crate) fn halt() -> ! {
    loop {
        // SAFETY: touches nothing.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}

/// Resets, which the VMM has an exit code of its own for.
pub(crate) fn reset() -> ! {
    out8(RESET_CONTROL, 0x0e);
    halt()
}

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| out8(COM1, byte));
        Ok(())
    }
}

/// A line on the console, of which the host half reads how it went.
pub(crate) fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(Serial, "HOSTILE {line}");
}
