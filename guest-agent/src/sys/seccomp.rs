//! Filters of system calls.

use std::ptr;

use nix::errno::Errno;

/// Installs a filter on the calling thread; it stays for good, over forks and execs. The kernel judges the program.
pub(crate) fn install(flags: u32, program: &[libc::sock_filter]) -> nix::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| Errno::EINVAL)?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: `program` names as many instructions as there are; the kernel copies them and writes nothing.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, ptr::from_ref(&program))
    };
    // A positive result is a thread that was in the way of all threads' getting the filter: not with these flags.
    Errno::result(result).map(drop)
}
