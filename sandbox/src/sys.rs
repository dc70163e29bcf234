//! The system calls that no crate wraps in a safe function. Each wrapper here is safe to call with any arguments and makes
//! exactly one call; what the calls are for is said where they are used.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::unistd::Pid;

/// Attaches an open `/dev/net/tun` to a new interface; its name. A `%d` in `name` becomes the first number that is free.
pub(crate) fn attach_tun(tun: BorrowedFd<'_>, name: &str, flags: libc::c_int) -> nix::Result<String> {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    // One byte stays zero, as the end.
    if name.len() >= ifr_name.len() {
        return Err(Errno::ENAMETOOLONG);
    }
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let ifru_flags = i16::try_from(flags).map_err(|_| Errno::EINVAL)?;
    let mut request = libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags } };
    // SAFETY: TUNSETIFF reads the name and the flags of one ifreq, and both are set; it writes the name of the same.
    Errno::result(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned());
    String::from_utf8(name.collect()).map_err(|_| Errno::EILSEQ)
}

/// Forks, the child being in `cgroup` from its first instruction on; returns when the child has become another program
/// or has ended. `None` is returned to the child, which has this thread alone.
pub(crate) fn fork_into(cgroup: BorrowedFd<'_>) -> nix::Result<Option<Pid>> {
    /// `linux/sched.h`; libc's constant of the name is too narrow for it.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let arguments = libc::clone_args {
        flags: u64::from(libc::CLONE_VFORK.cast_unsigned()) | CLONE_INTO_CGROUP,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: u64::from(libc::SIGCHLD.cast_unsigned()),
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: u64::from(cgroup.as_raw_fd().cast_unsigned()),
    };
    // SAFETY: the structure is whole and read during the call. Without CLONE_VM the child has its own copy of the memory
    // and continues on the same stack, as after fork.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    let pid = i32::try_from(Errno::result(pid)?).map_err(|_| Errno::EOVERFLOW)?;
    Ok((pid != 0).then(|| Pid::from_raw(pid)))
}

/// Has all descriptors from `first` on closed at the next exec.
pub(crate) fn close_at_exec(first: u32) -> nix::Result<()> {
    // SAFETY: close_range(2) with CLOSE_RANGE_CLOEXEC takes three numbers and closes nothing now.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    Errno::result(result).map(drop)
}

/// Commands of bpf(2), and types of maps, programs and attachments (`linux/bpf.h`).
const MAP_CREATE: i32 = 0;
const MAP_UPDATE: i32 = 2;
const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;
const MAP_OF_SOCKETS: u32 = 15;
const TYPE_SK_LOOKUP: u32 = 30;
const SK_LOOKUP: u32 = 36;

/// Beginnings of `union bpf_attr`; the kernel takes the rest as zero.
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// A BPF map of sockets by number.
#[derive(Debug)]
pub(crate) struct SocketMap(OwnedFd);

impl AsRawFd for SocketMap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Makes an empty one.
pub(crate) fn socket_map(entries: u32) -> nix::Result<SocketMap> {
    let arguments = MapCreate { kind: MAP_OF_SOCKETS, key_size: 4, value_size: 4, entries };
    // SAFETY: the structure is whole and read during the call only.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, MAP_CREATE, &raw const arguments, size_of::<MapCreate>()) };
    // SAFETY: BPF_MAP_CREATE returns a new descriptor.
    unsafe { new_descriptor(result) }.map(SocketMap)
}

/// Puts a socket into such a map.
pub(crate) fn put_socket(map: &SocketMap, key: u32, socket: BorrowedFd<'_>) -> nix::Result<()> {
    let value = socket.as_raw_fd().cast_unsigned();
    let arguments = MapUpdate {
        map: map.as_raw_fd().cast_unsigned(),
        pad: 0,
        key: (&raw const key).addr() as u64,
        value: (&raw const value).addr() as u64,
        flags: 0,
    };
    // SAFETY: the structure is whole; the kernel reads a key and a value of four bytes each, as the map was made for.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, MAP_UPDATE, &raw const arguments, size_of::<MapUpdate>()) };
    Errno::result(result).map(drop)
}

/// Loads a program that chooses the socket for a connection; the kernel verifies it.
pub(crate) fn load_socket_lookup(program: &[u64]) -> nix::Result<OwnedFd> {
    let arguments = ProgLoad {
        kind: TYPE_SK_LOOKUP,
        count: u32::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        attach_type: SK_LOOKUP,
        ..ProgLoad::default()
    };
    // SAFETY: the structure is whole; the kernel reads `count` instructions of eight bytes, which are there, and a
    // terminated constant, and keeps its own copies.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const arguments, size_of::<ProgLoad>()) };
    // SAFETY: BPF_PROG_LOAD returns a new descriptor.
    unsafe { new_descriptor(result) }
}

/// Makes such a program choose for all connections in a network namespace, as long as the returned descriptor is open.
pub(crate) fn attach_socket_lookup(netns: BorrowedFd<'_>, program: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    let arguments = LinkCreate {
        program: program.as_raw_fd().cast_unsigned(),
        target: netns.as_raw_fd().cast_unsigned(),
        attach_type: SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: the structure is whole and read during the call only.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, LINK_CREATE, &raw const arguments, size_of::<LinkCreate>()) };
    // SAFETY: BPF_LINK_CREATE returns a new descriptor.
    unsafe { new_descriptor(result) }
}

/// Turns the return value of a system call that makes a descriptor into its owner.
///
/// # Safety
/// `result` is what such a call has just returned, and nothing else owns the descriptor.
unsafe fn new_descriptor(result: libc::c_long) -> nix::Result<OwnedFd> {
    let raw = RawFd::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: by the caller's promise `raw` is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}
