//! BPF programs of cgroups.

use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::new_descriptor;

/// Commands of bpf(2), a type of program and where it is attached, of `linux/bpf.h`.
const PROG_LOAD: i32 = 5;
const PROG_ATTACH: i32 = 8;
const TYPE_CGROUP_DEVICE: u32 = 15;
const CGROUP_DEVICE: u32 = 6;
/// Cgroups below may have further programs; all have to agree.
const ALLOW_MULTI: u32 = 1 << 1;

/// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`; the kernel takes the rest as zero.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
}

/// And for `BPF_PROG_ATTACH`.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// Loads a program that judges accesses to devices; the kernel verifies it.
pub(crate) fn load_device_filter(program: &[u64]) -> nix::Result<OwnedFd> {
    let arguments = Load {
        kind: TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
    };
    // SAFETY: the structure is whole; the kernel reads `count` instructions of eight bytes, which are there, and a
    // terminated constant, and keeps its own copies.
    let result = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const arguments, size_of::<Load>()) };
    // SAFETY: BPF_PROG_LOAD returns a new descriptor.
    unsafe { new_descriptor(result) }
}

/// Makes a loaded program judge for all processes of a cgroup.
pub(crate) fn attach_device_filter(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> nix::Result<()> {
    let arguments = Attach {
        target: cgroup.as_raw_fd().cast_unsigned(),
        program: program.as_raw_fd().cast_unsigned(),
        kind: CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    // SAFETY: the structure is whole and read during the call only.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &raw const arguments, size_of::<Attach>()) };
    Errno::result(result).map(drop)
}
