//! The device against an emulated driver, honest and hostile, on a directory of the real host.

use std::fs;
use std::path::PathBuf;

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::testing::{self, NEXT, WRITE};

const REQUEST: u64 = 0x20_0000;
const REPLY: u64 = 0x30_0000;
const ROOT: u64 = 1;

mod op {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const FORGET: u32 = 2;
    pub(super) const SYMLINK: u32 = 6;
    pub(super) const MKNOD: u32 = 8;
    pub(super) const MKDIR: u32 = 9;
    pub(super) const UNLINK: u32 = 10;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const SETXATTR: u32 = 21;
    pub(super) const GETXATTR: u32 = 22;
    pub(super) const LISTXATTR: u32 = 23;
    pub(super) const INIT: u32 = 26;
    pub(super) const READDIR: u32 = 28;
    pub(super) const BATCH_FORGET: u32 = 42;
}

struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("krx-fs-{name}-{}", std::process::id()));
        fs::create_dir_all(path.join("inside")).unwrap();
        fs::write(path.join("inside/file"), "content").unwrap();
        fs::write(path.join("secret"), "outside").unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A driver that has one request under way at a time.
struct Driver {
    memory: GuestMemoryMmap,
    server: worker::Server,
    _directory: Directory,
}

impl Driver {
    fn new(name: &str) -> Self {
        let directory = Directory::new(name);
        let server = serve(&directory.0.join("inside"), u64::MAX).unwrap();
        let driver = Self { memory: testing::memory(8), server, _directory: directory };
        let init =
            driver.ask(op::INIT, 0, &[&7_u32.to_le_bytes()[..], &31_u32.to_le_bytes(), &[0; 8]].concat());
        assert_eq!(init.error, 0);
        driver
    }

    /// Gives the device a chain and returns its verdict and what it wrote.
    fn give(&self, chain: &[RawDescriptor]) -> Result<u32, DeviceError> {
        let mock = MockSplitQueue::new(&self.memory, 16);
        mock.add_desc_chains(chain, 0).unwrap();
        let (mut queue, _kick) = testing::live_queue(&self.memory, &mock, &testing::interrupt().0);
        worker::serve_queue(&self.server, &self.memory, &mut queue)?;
        assert_eq!(u16::from_le(mock.used().idx().load()), 1, "the chain was handed back");
        Ok(mock.used().ring().ref_at(0).unwrap().load().len())
    }

    fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> Reply {
        self.ask_claiming(u32::try_from(request::IN_HEADER + body.len()).unwrap(), opcode, node, body)
    }

    fn ask_claiming(&self, len: u32, opcode: u32, node: u64, body: &[u8]) -> Reply {
        let mut bytes = Vec::new();
        bytes.extend(len.to_le_bytes());
        bytes.extend(opcode.to_le_bytes());
        bytes.extend(42_u64.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(body);
        self.memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
        self.memory.write_slice(&[0; 8192], GuestAddress(REPLY)).unwrap();
        let readable = u32::try_from(bytes.len()).unwrap();
        let written = self.give(&[part(REQUEST, readable, NEXT, 1), part(REPLY, 8192, WRITE, 0)]).unwrap();
        let mut reply = vec![0; usize::try_from(written).unwrap()];
        self.memory.read_slice(&mut reply, GuestAddress(REPLY)).unwrap();
        Reply::parse(&reply)
    }

    fn lookup(&self, name: &str) -> Reply {
        self.ask(op::LOOKUP, ROOT, &[name.as_bytes(), b"\0"].concat())
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Reply {
    error: i32,
    body: Vec<u8>,
}

impl Reply {
    fn parse(bytes: &[u8]) -> Self {
        if bytes.len() < 16 {
            return Self { error: i32::MIN, body: Vec::new() };
        }
        assert_eq!(u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize, bytes.len());
        assert_eq!(bytes[8..16], 42_u64.to_le_bytes());
        let error = -i32::from_le_bytes(bytes[4..8].try_into().unwrap());
        Self { error, body: bytes[16..].to_vec() }
    }

    fn node(&self) -> u64 {
        u64::from_le_bytes(self.body[..8].try_into().unwrap())
    }
}

fn part(addr: u64, len: u32, flags: u16, next: u16) -> RawDescriptor {
    Descriptor::new(addr, len, flags, next).into()
}

#[test]
fn guest_that_can_may_write_a_mebibyte_at_once() {
    let driver = Driver::new("init");
    let flags = 1 << 5 | 1 << 22; // FUSE_BIG_WRITES, FUSE_MAX_PAGES
    let words = [7, 31, 0, flags].map(u32::to_le_bytes);
    let reply = driver.ask(op::INIT, 0, words.as_flattened());
    assert_eq!(reply.error, 0);
    assert_eq!(reply.body[20..24], (1_u32 << 20).to_le_bytes());
}

#[test]
fn files_are_found_and_read() {
    let driver = Driver::new("read");
    let node = driver.lookup("file").node();
    let handle = driver.ask(op::OPEN, node, &[0; 8]).body[..8].to_vec();
    let read = [&handle[..], &0_u64.to_le_bytes(), &100_u32.to_le_bytes(), &[0; 20]].concat();
    assert_eq!(driver.ask(op::READ, node, &read).body, b"content");
    assert_eq!(driver.lookup("none").error, libc::ENOENT);
}

#[test]
fn pages_are_kept_of_a_file_that_has_not_changed() {
    const KEEP_CACHE: u8 = 2;
    let driver = Driver::new("kept");
    let file = driver._directory.0.join("inside/file");
    let keeps = || {
        let node = driver.lookup("file").node();
        driver.ask(op::OPEN, node, &[0; 8]).body[8] & KEEP_CACHE != 0
    };
    // What is that young might change without a trace.
    let settle = || std::thread::sleep(Duration::from_millis(60));
    settle();
    assert_eq!([keeps(), keeps(), keeps()], [false, true, true]);
    fs::write(&file, "CONTENT").unwrap();
    assert_eq!([keeps(), keeps()], [false, false]);
    settle();
    assert_eq!([keeps(), keeps()], [false, true]);
    fs::rename(driver._directory.0.join("secret"), &file).unwrap();
    assert!(!keeps(), "another file has the name");
}

#[test]
fn names_do_not_lead_out_of_the_share() {
    let driver = Driver::new("names");
    for name in ["..", ".", "../secret", "inside/../../secret", "/etc/passwd", "file/..", ""] {
        let reply = driver.lookup(name);
        assert_ne!(reply.error, 0, "{name:?}");
    }
    let mkdir =
        |name: &str| driver.ask(op::MKDIR, ROOT, &[&[0; 8][..], name.as_bytes(), b"\0"].concat()).error;
    let mknod =
        |name: &str| driver.ask(op::MKNOD, ROOT, &[&[0; 16][..], name.as_bytes(), b"\0"].concat()).error;
    let unlink = |name: &str| driver.ask(op::UNLINK, ROOT, &[name.as_bytes(), b"\0"].concat()).error;
    let link = |name: &str| driver.ask(op::SYMLINK, ROOT, &[name.as_bytes(), b"\0/etc\0"].concat()).error;
    for name in ["../new", "a/b", "..", "."] {
        assert_ne!(mkdir(name), 0, "{name:?}");
        assert_ne!(mknod(name), 0, "{name:?}");
        assert_ne!(unlink(name), 0, "{name:?}");
        assert_ne!(link(name), 0, "{name:?}");
    }
    assert!(driver._directory.0.join("secret").exists());
}

#[test]
fn links_are_not_followed() {
    let driver = Driver::new("links");
    assert_eq!(driver.ask(op::SYMLINK, ROOT, b"up\0../secret\0").error, 0);
    let node = driver.lookup("up").node();
    let opened = driver.ask(op::OPEN, node, &[0; 8]);
    assert_ne!(opened.error, 0, "a link was opened as what it points to");
}

#[test]
fn unknown_nodes_handles_and_opcodes_are_errors() {
    let driver = Driver::new("unknown");
    for node in [0, 99, u64::MAX] {
        assert_ne!(driver.ask(op::OPEN, node, &[0; 8]).error, 0);
    }
    let read = [&u64::MAX.to_le_bytes()[..], &0_u64.to_le_bytes(), &100_u32.to_le_bytes(), &[0; 20]].concat();
    assert_ne!(driver.ask(op::READ, ROOT, &read).error, 0);
    for opcode in [0, 7, 1000, u32::MAX] {
        assert_eq!(driver.ask(opcode, ROOT, &[0; 64]).error, libc::ENOSYS, "{opcode}");
    }
}

/// Every opcode, with no body, a short one, zeroes and all ones: an error or nothing, never a panic.
#[test]
fn bodies_of_any_form_are_answered() {
    let driver = Driver::new("bodies");
    let forgets = [op::FORGET, op::BATCH_FORGET];
    for opcode in (1..60).filter(|opcode| !forgets.contains(opcode)) {
        for body in [&[][..], &[0; 3], &[0; 200], &[0xff; 7], &[0xff; 200]] {
            let _ = driver.ask(opcode, 99, body);
        }
    }
    for count in [0, 1, u32::MAX] {
        let body = [count.to_le_bytes(), [0; 4]].concat();
        assert_eq!(driver.ask(op::BATCH_FORGET, 0, &body).error, i32::MIN);
    }
    assert_eq!(driver.lookup("file").error, 0);
}

#[test]
fn false_lengths_are_refused() {
    let driver = Driver::new("lengths");
    for len in [0, 39, 45, 1 << 20, u32::MAX] {
        let reply = driver.ask_claiming(len, op::LOOKUP, ROOT, b"file");
        assert_eq!(reply.error, libc::EINVAL, "{len}");
    }
    for size in [1 << 20, u32::MAX] {
        let body = [&[0; 16][..], &size.to_le_bytes(), &[0; 20]].concat();
        assert_ne!(driver.ask(op::READ, ROOT, &body).error, 0);
        assert_ne!(driver.ask(op::READDIR, ROOT, &body).error, 0);
    }
}

/// A guest that claims to have room for 4 GiB gets what there is, and has the host allocate no more than that may be.
#[test]
fn attributes_are_found_whatever_room_is_claimed() {
    let driver = Driver::new("xattr");
    let node = driver.lookup("file").node();
    let value = [&5_u32.to_le_bytes()[..], &[0; 4], b"user.krx\0value"].concat();
    let set = driver.ask(op::SETXATTR, node, &value);
    if set.error == libc::EOPNOTSUPP {
        eprintln!("SKIP: the host's temporary directory has no attributes");
        return;
    }
    assert_eq!(set.error, 0);
    let before = peak_address_space();
    for size in [5, 64 << 10, 1 << 20, u32::MAX] {
        let get = [&size.to_le_bytes()[..], &[0; 4], b"user.krx\0"].concat();
        assert_eq!(driver.ask(op::GETXATTR, node, &get).body, b"value", "{size}");
    }
    let list = [u32::MAX.to_le_bytes(), [0; 4]].concat();
    let names = driver.ask(op::LISTXATTR, node, &list);
    assert!(names.body.windows(9).any(|name| name == b"user.krx\0"), "{names:?}");
    assert!(peak_address_space() - before < 3 << 20, "gigabytes were allocated");
}

/// Largest address space the process has had, in KiB.
fn peak_address_space() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// The library keeps the number of a file it has made up, even after a forget.
#[test]
fn node_numbers_are_made_of_the_hosts() {
    use std::os::unix::fs::MetadataExt;
    let driver = Driver::new("nodes");
    let node = driver.lookup("file").node();
    let number = fs::metadata(driver._directory.0.join("inside/file")).unwrap().ino();
    assert_eq!(node & ((1 << 47) - 1), number);
    assert_eq!(driver.ask(op::FORGET, node, &1_u64.to_le_bytes()).error, i32::MIN);
    assert_ne!(driver.ask(op::OPEN, node, &[0; 8]).error, 0, "a forgotten node is unknown");
    assert_eq!(driver.lookup("file").node(), node);
}

#[test]
fn fifos_are_not_opened_on_the_host() {
    let driver = Driver::new("fifo");
    let make = [&(libc::S_IFIFO | 0o600).to_le_bytes()[..], &[0; 12], b"fifo\0"].concat();
    assert_eq!(driver.ask(op::MKNOD, ROOT, &make).error, 0);
    let node = driver.lookup("fifo").node();
    assert_eq!(driver.ask(op::OPEN, node, &[0; 8]).error, libc::EBADF);
}

#[test]
fn chains_without_request_or_room_are_handed_back_empty() {
    let driver = Driver::new("room");
    assert_eq!(driver.give(&[part(REQUEST, 39, NEXT, 1), part(REPLY, 64, WRITE, 0)]).unwrap(), 0);
    assert_eq!(driver.give(&[part(REQUEST, 48, 0, 0)]).unwrap(), 0);
    assert_eq!(driver.give(&[part(REPLY, 64, WRITE, 0)]).unwrap(), 0);
    assert_eq!(driver.give(&[part(REQUEST, 48, NEXT, 1), part(REPLY, 15, WRITE, 0)]).unwrap(), 0);
}

#[test]
fn chains_that_break_the_rules_cost_the_device() {
    let driver = Driver::new("chains");
    for (addr, len) in
        [(u64::MAX - 8, 64), (1 << 40, 64), ((8 << 20) - 32, 64), (0, u32::MAX - 64), (8 << 20, 1)]
    {
        assert!(driver.give(&[part(addr, len, NEXT, 1), part(REPLY, 64, WRITE, 0)]).is_err());
        let result = driver.give(&[part(REQUEST, 48, NEXT, 1), part(addr, len, WRITE, 0)]);
        assert!(result.is_err(), "{addr:#x} {len:#x} {result:?}");
    }
    let backwards = [part(REPLY, 64, WRITE | NEXT, 1), part(REQUEST, 48, 0, 0)];
    assert!(matches!(driver.give(&backwards), Err(DeviceError::BadChain(_))));
}

#[test]
fn long_indirect_table_costs_the_device() {
    let driver = Driver::new("indirect");
    let table = |parts| testing::indirect_table(&driver.memory, (REPLY, 0, 0), parts);
    assert_eq!(driver.give(&[table(1024)]).unwrap(), 0, "no request");
    assert!(matches!(driver.give(&[table(1025)]), Err(DeviceError::BadChain(_))));
}

#[test]
fn looping_chain_ends() {
    let driver = Driver::new("loop");
    let looping = [part(REQUEST, 48, NEXT, 1), part(REQUEST, 48, NEXT, 0)];
    assert_eq!(driver.give(&looping).unwrap(), 0);
}

#[test]
fn configuration_has_tag_and_queue_count() {
    let device = Fs::new("krx", &std::env::temp_dir()).unwrap();
    let mut config = [0xff; 64];
    device.read_config(0, &mut config);
    assert_eq!(&config[..4], b"krx\0");
    assert_eq!(config[36..40], 1_u32.to_le_bytes());
    assert!(config[40..].iter().all(|byte| *byte == 0));
    device.read_config(u64::MAX, &mut config);
    assert!(Fs::new(&"x".repeat(37), &std::env::temp_dir()).is_err());
}

/// The driver's kick is cleared by the run before, which sees the first of many come when it asks for kicks again.
#[test]
fn requests_beyond_a_turn_are_served_in_the_next() {
    let driver = Driver::new("turns");
    let mut bytes = [0; request::IN_HEADER];
    bytes[0] = 40;
    bytes[4] = 99;
    driver.memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
    let mock = MockSplitQueue::new(&driver.memory, 256);
    let chains: Vec<_> =
        (0..100).flat_map(|at| [part(REQUEST, 40, NEXT, at * 2 + 1), part(REPLY, 16, WRITE, 0)]).collect();
    mock.add_desc_chains(&chains, 0).unwrap();
    let (mut queue, kick) = testing::live_queue(&driver.memory, &mock, &testing::interrupt().0);
    for served in [64, 100] {
        worker::serve_queue(&driver.server, &driver.memory, &mut queue).unwrap();
        assert_eq!(u16::from_le(mock.used().idx().load()), served);
        assert_eq!(kick.read().is_ok(), served < 100, "whether it is to be looked at again");
        kick.write(u64::from(served < 100)).unwrap();
    }
}
