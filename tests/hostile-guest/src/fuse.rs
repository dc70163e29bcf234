//! Attacks on the share, by a driver that keeps to virtio and lies in FUSE (Linux' `fuse.h`).

use crate::dice::Dice;
use crate::driver::{Device, EVENT_IDX, NEXT, Queue, WRITE};
use crate::machine::{self, BUFFERS, read};
use crate::report::Report;

const REQUEST: u64 = BUFFERS;
const REPLY: u64 = BUFFERS + 0x10_0000;
const REPLY_ROOM: u32 = 0x1_1000;
/// Of a reply, what is searched.
const SEARCHED: u32 = 4096;
/// Begins each file of the host that the guest must not read, see the host half.
const CANARY: &[u8] = b"KRX-CANARY";

const ROOT: u64 = 1;
const ENOENT: i32 = 2;

mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
}

/// Names that are none. The host must not resolve any of them.
const NAMES: [&[u8]; 12] = [
    b"..\0",
    b".\0",
    b"\0",
    b"/\0",
    b"/etc/passwd\0",
    b"a/b\0",
    b"files/../fixed\0",
    b"../canary/secret\0",
    b"out/secret\0",
    b"../../../../../../etc/passwd\0",
    b"/proc/self/fd/0\0",
    // Without an end.
    b"no-end",
];

/// A request's body.
struct Body {
    bytes: [u8; 512],
    length: usize,
}

impl Body {
    fn of(words: &[u64]) -> Self {
        let mut body = Self { bytes: [0; 512], length: 0 };
        words.iter().for_each(|word| body.add(&word.to_le_bytes()));
        body
    }

    fn add(&mut self, bytes: &[u8]) {
        let end = self.length + bytes.len();
        self.bytes[self.length..end].copy_from_slice(bytes);
        self.length = end;
    }

    fn and(mut self, bytes: &[u8]) -> Self {
        self.add(bytes);
        self
    }
}

/// Two halves of a 64-bit word, the lower first.
fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

struct Client<'d> {
    device: &'d Device,
    queue: Queue,
    unique: u64,
    report: Report,
}

impl<'d> Client<'d> {
    fn new(device: &'d Device) -> Option<Self> {
        let queue = Queue::of(device, 1, 64);
        let mut client = Self { device, queue, unique: 0, report: Report::default() };
        client.begin().then_some(client)
    }

    /// Starts the device, and greets.
    fn begin(&mut self) -> bool {
        if !self.device.open(64, EVENT_IDX) {
            return false;
        }
        self.queue = Queue::of(self.device, 1, 64);
        let greeting = [pair(7, 38), pair(1 << 20, u32::MAX), pair(u32::MAX, 0), 0, 0, 0, 0, 0];
        self.ask(op::INIT, 0, &Body::of(&greeting)).is_ok()
    }

    /// One request, and the answer to it: that there is an error, or what follows the header begins with.
    fn ask(&mut self, opcode: u32, node: u64, body: &Body) -> Result<u64, i32> {
        self.ask_as(opcode, node, body, 40 + body.length as u32)
    }

    /// With a length in its header that may be a lie.
    fn ask_as(&mut self, opcode: u32, node: u64, body: &Body, claimed: u32) -> Result<u64, i32> {
        self.unique += 1;
        let header = [pair(claimed, opcode), self.unique, node, 0, 0];
        for (at, word) in (0..).zip(header) {
            machine::write(REQUEST + 8 * at, word);
        }
        machine::put(REQUEST + 40, &body.bytes[..body.length]);
        machine::clear(REPLY, 64);
        self.queue.describe(0, (REQUEST, 40 + body.length as u32), (NEXT, 1));
        self.queue.describe(1, (REPLY, REPLY_ROOM), (WRITE, 0));
        self.queue.offer(0);
        self.queue.publish(0);
        self.report.sent += 1;
        let Some((_, written)) = self.queue.wait() else {
            self.report.broken += 1;
            self.begin();
            return Err(0);
        };
        self.report.answered += 1;
        self.search(written);
        match read::<i32>(REPLY + 4) {
            0 => Ok(read(REPLY + 16)),
            error => Err(-error),
        }
    }

    /// Looks for what belongs to the host.
    fn search(&mut self, written: u32) {
        let end = u64::from(written.min(SEARCHED)).saturating_sub(CANARY.len() as u64);
        let found = (0..end)
            .any(|at| (0..).zip(CANARY).all(|(offset, byte)| read::<u8>(REPLY + at + offset) == *byte));
        self.report.leaked += u64::from(found);
    }

    /// A request that has to fail.
    fn must_fail(&mut self, opcode: u32, node: u64, body: &Body) {
        if self.ask(opcode, node, body).is_ok() {
            self.report.granted += 1;
            machine::say(format_args!("granted opcode={opcode} node={node} {:x?}", &body.bytes[..24]));
        }
    }

    fn lookup(&mut self, parent: u64, name: &[u8]) -> u64 {
        self.ask(op::LOOKUP, parent, &Body::of(&[]).and(name)).unwrap_or(0)
    }
}

/// The share of the host half: `files`, in which `out`, `dir-out` and `fifo` lie, and `fixed`, which is read-only.
struct Places {
    files: u64,
    fixed: u64,
    constant: u64,
    link: u64,
    fifo: u64,
    own: u64,
}

pub(crate) fn play(device: &Device, dice: &mut Dice, rounds: u64) -> Report {
    let Some(mut client) = Client::new(device) else { return Report::default() };
    let (files, fixed) = (client.lookup(ROOT, b"files\0"), client.lookup(ROOT, b"fixed\0"));
    let places = Places {
        files,
        fixed,
        constant: client.lookup(fixed, b"constant\0"),
        link: client.lookup(files, b"out\0"),
        fifo: client.lookup(files, b"fifo\0"),
        own: client.lookup(files, b"own\0"),
    };
    let all = [files, fixed, places.constant, places.link, places.fifo, places.own];
    if all.contains(&0) {
        machine::say(format_args!("the share is not as it should be: {all:?}"));
        machine::reset();
    }
    escapes(&mut client, &places);
    special_files(&mut client, &places);
    sizes(&mut client, &places, dice);
    for _ in 0..rounds {
        anything(&mut client, &all, dice);
    }
    client.device.reset();
    client.report
}

/// Names and links that lead out of their directory.
fn escapes(client: &mut Client<'_>, places: &Places) {
    let Places { files, fixed, link, fifo, own, .. } = *places;
    for name in NAMES {
        let named = |words: &[u64]| Body::of(words).and(name);
        for parent in [ROOT, files, fixed, link, fifo, own, 0, 99, u64::MAX] {
            client.must_fail(op::LOOKUP, parent, &named(&[]));
        }
        client.must_fail(op::MKDIR, files, &named(&[pair(0o777, 0)]));
        client.must_fail(op::MKNOD, files, &named(&[pair(0o100_666, 0), 0]));
        client.must_fail(op::UNLINK, files, &named(&[]));
        client.must_fail(op::RMDIR, files, &named(&[]));
        client.must_fail(op::CREATE, files, &named(&[pair(0o102, 0o666), 0]));
        client.must_fail(op::SYMLINK, files, &named(&[]).and(b"/etc\0"));
        client.must_fail(op::LINK, files, &named(&[own]));
        client.must_fail(op::RENAME, files, &Body::of(&[files]).and(b"own\0").and(name));
        client.must_fail(op::RENAME, files, &named(&[files]).and(b"new\0"));
        client.must_fail(op::RENAME2, files, &Body::of(&[files, 2]).and(b"own\0").and(name));
    }
    for name in [&b"secret\0"[..], b"passwd\0", b"canary\0"] {
        // Below what only leads to a directory.
        client.must_fail(op::LOOKUP, link, &Body::of(&[]).and(name));
        client.must_fail(op::CREATE, link, &Body::of(&[pair(0o102, 0o666), 0]).and(name));
    }
    // From one mount to another, and where nothing may be written.
    client.must_fail(op::LINK, files, &Body::of(&[places.constant]).and(b"new\0"));
    client.must_fail(op::RENAME, files, &Body::of(&[fixed]).and(b"own\0new\0"));
    client.must_fail(op::RENAME, fixed, &Body::of(&[files]).and(b"constant\0new\0"));
    client.must_fail(op::CREATE, fixed, &Body::of(&[pair(0o102, 0o666), 0]).and(b"new\0"));
    client.must_fail(op::UNLINK, fixed, &Body::of(&[]).and(b"constant\0"));
    client.must_fail(op::MKDIR, ROOT, &Body::of(&[pair(0o777, 0)]).and(b"new\0"));
    client.must_fail(op::UNLINK, ROOT, &Body::of(&[]).and(b"files\0"));
    client.must_fail(op::RMDIR, ROOT, &Body::of(&[]).and(b"files\0"));
    // The link's target is the guest's to resolve: following it here would be the host's.
    for flags in [0, 1, 2, 0o1000, 0o20_0000, 0o1000_0000, u32::MAX] {
        client.must_fail(op::OPEN, link, &Body::of(&[pair(flags, 0)]));
        client.must_fail(op::OPENDIR, link, &Body::of(&[pair(flags, 0)]));
    }
    // Cut to nothing, and given to another.
    for valid in [1 << 3, 1 << 0, 1 << 1] {
        let mut words = [0; 11];
        words[0] = valid;
        words[8] = pair(0, 0o4777);
        let _ = client.ask(op::SETATTR, link, &Body::of(&words));
        client.must_fail(op::SETATTR, places.constant, &Body::of(&words));
    }
    let _ = client.ask(op::READLINK, link, &Body::of(&[]));
    let _ = client.ask(op::READLINK, own, &Body::of(&[]));
    // A link that leads out may be made. It is a name.
    for target in [&b"/etc/shadow\0"[..], b"../../canary/secret\0"] {
        let _ = client.ask(op::UNLINK, files, &Body::of(&[]).and(b"made\0"));
        let made = client.ask(op::SYMLINK, files, &Body::of(&[]).and(b"made\0").and(target)).unwrap_or(0);
        client.must_fail(op::OPEN, made, &Body::of(&[0]));
    }
}

/// Files that do something when they are opened, and attributes that only the host's root has.
fn special_files(client: &mut Client<'_>, places: &Places) {
    let Places { files, fixed, own, fifo, .. } = *places;
    for (mode, device) in [(0o020_666, 0x103), (0o060_666, 0x800), (0o020_666, 0x501), (0o060_666, 1)] {
        client.must_fail(op::MKNOD, files, &Body::of(&[pair(mode, device), 0]).and(b"node\0"));
    }
    for node in [fifo, client.lookup(files, b"socket\0"), client.lookup(files, b"null\0")] {
        // Neither waits for another's end, nor is there a device behind it.
        for flags in [0, 1, 2, 0o4000] {
            client.must_fail(op::OPEN, node, &Body::of(&[pair(flags, 0)]));
        }
    }
    for name in
        [&b"trusted.overlay.opaque\0"[..], b"trusted.krx\0", b"system.nothing\0", b"security.selinux.\0"]
    {
        let set = Body::of(&[pair(1, 0)]).and(name).and(b"y");
        client.must_fail(op::SETXATTR, own, &set);
        client.must_fail(op::SETXATTR, fixed, &set);
    }
    for size in [0, 1, 1 << 16, 1 << 31, u32::MAX] {
        let _ = client.ask(op::GETXATTR, own, &Body::of(&[pair(size, 0)]).and(b"trusted.krx\0"));
        let _ = client.ask(op::LISTXATTR, own, &Body::of(&[pair(size, 0)]));
        // The value is not there.
        let _ = client.ask(op::SETXATTR, own, &Body::of(&[pair(size, 0)]).and(b"user.k\0v"));
    }
}

/// Sizes, counts and offsets without end, of handles that are there and not there.
fn sizes(client: &mut Client<'_>, places: &Places, dice: &mut Dice) {
    let own = places.own;
    let file = client.ask(op::OPEN, own, &Body::of(&[2])).unwrap_or(0);
    let directory = client.ask(op::OPENDIR, places.files, &Body::of(&[0])).unwrap_or(0);
    for size in [0, 1, 1 << 20, (1 << 20) + 1, 1 << 31, u32::MAX] {
        let far = u64::from(size) << 31;
        for handle in [file, directory, 0, 77, u64::MAX] {
            let bounds = [handle, far, pair(size, 0), 0, 0];
            let _ = client.ask(op::READ, own, &Body::of(&bounds));
            let _ = client.ask(op::READDIR, places.files, &Body::of(&bounds));
            let _ = client.ask(op::READDIRPLUS, places.files, &Body::of(&bounds));
            let _ = client.ask(op::WRITE, own, &Body::of(&bounds).and(b"four"));
            let _ = client.ask(op::FALLOCATE, own, &Body::of(&[handle, far, far, u64::from(size & 3)]));
            let _ = client.ask(op::LSEEK, own, &Body::of(&[handle, u64::MAX - far, dice.below(6)]));
        }
        let nodes = [pair(size, 0), dice.number(), dice.number()];
        let _ = client.ask(op::BATCH_FORGET, 0, &Body::of(&nodes));
        let _ = client.ask(op::FORGET, dice.number(), &Body::of(&[dice.number()]));
    }
    for claimed in [0, 39, 40, 41, 47, 1 << 20, u32::MAX] {
        if let Ok(node) = client.ask_as(op::LOOKUP, ROOT, &Body::of(&[]).and(b"files\0"), claimed) {
            client.report.granted += u64::from(node != places.files);
        }
    }
    // After all of this it serves.
    match client.ask(op::LOOKUP, places.files, &Body::of(&[]).and(b"nobody\0")) {
        Err(ENOENT) => {}
        other => machine::say(format_args!("granted: a file that is not there: {other:?}")),
    }
}

/// Any operation, known or not, with any body.
fn anything(client: &mut Client<'_>, nodes: &[u64], dice: &mut Dice) {
    let opcode = match dice.below(8) {
        0 => dice.number() as u32,
        // IOCTL, POLL, NOTIFY_REPLY, SETUPMAPPING, REMOVEMAPPING, SYNCFS, TMPFILE, COPY_FILE_RANGE
        1 => dice.of(&[39, 40, 41, 47, 48, 49, 50, 51]),
        _ => 1 + dice.below(52) as u32,
    };
    // A server that was told to end is not to be played with.
    if opcode == 38 && !dice.one_in(8) {
        return;
    }
    let node = if dice.one_in(4) { dice.number() } else { dice.of(nodes) };
    let mut body = Body::of(&[]);
    for _ in 0..dice.below(8) {
        let word = if dice.one_in(2) { dice.number() } else { dice.below(8) };
        body.add(&word.to_le_bytes());
    }
    if dice.one_in(2) {
        let name = dice.of(&NAMES);
        let name = if dice.one_in(2) { name } else { b"scrap\0" };
        body.add(name);
        body.add(&name[..dice.below(1 + name.len() as u64) as usize]);
    }
    let length = 40 + body.length as u32;
    let claimed = if dice.one_in(6) { dice.length() } else { length };
    let _ = client.ask_as(opcode, node, &body, claimed);
}
