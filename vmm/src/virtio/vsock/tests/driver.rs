//! A driver with the guest's side of connections: lays chains by hand, so that it can also lay wrong ones.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempdir::TempDir;

use super::super::packet::{HOST_CID, Header, Op, SHUTDOWN_BOTH, TYPE_STREAM};
use super::super::worker::VsockWorker;
use super::super::{QUEUE_SIZES, Vsock};
use crate::testing::{self, NEXT, WRITE};
use crate::virtio::device::{Activation, DeviceError, Worker};
use crate::virtio::queue::QueueConfig;

pub(super) const CID: u32 = 3;
/// `Header::SIZE`, as a descriptor has it.
pub(super) const HEADER: u32 = 44;
/// Guest memory no ring and no buffer of the driver lies in.
pub(super) const FREE_MEMORY: u64 = 12 << 20;
pub(super) const MEMORY_MIB: usize = 16;

const RX_BUFFERS: u64 = 1 << 20;
const RX_STRIDE: u64 = 16 << 10;
const TX_BUFFERS: u64 = 4 << 20;
const TX_STRIDE: u64 = 128 << 10;
/// Transmit chains at a time: each has four descriptors of its own.
const TX_SLOTS: u16 = QUEUE_SIZES[1] / 4;

/// xorshift64: the same numbers in every run.
pub(super) struct Prng(pub(super) u64);

impl Prng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn below(&mut self, end: u64) -> usize {
        usize::try_from(self.next() % end).unwrap()
    }

    pub(super) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next().to_le_bytes()[4]).collect()
    }
}

/// One queue as the driver sees it.
pub(super) struct Ring {
    base: u64,
    size: u16,
    /// Whether event indices were negotiated.
    event_idx: bool,
    pub(super) available: u16,
    used: u16,
}

impl Ring {
    fn new(index: u64, size: u16, event_idx: bool) -> Self {
        Self { base: 0x1_0000 * (index + 1), size, event_idx, available: 0, used: 0 }
    }

    fn config(&self) -> QueueConfig {
        QueueConfig {
            ready: true,
            descriptors: self.base,
            available: self.base + 0x4000,
            used: self.base + 0x8000,
            ..QueueConfig::new(self.size)
        }
    }

    pub(super) fn describe(
        &self,
        memory: &GuestMemoryMmap,
        index: u16,
        (address, len, flags, next): (u64, u32, u16, u16),
    ) {
        let at = self.base + u64::from(index) * 16;
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    pub(super) fn offer(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let slot = self.base + 0x4004 + u64::from(self.available % self.size) * 2;
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        memory.write_obj(self.available, GuestAddress(self.base + 0x4002)).unwrap();
    }

    /// The next chain the device gave back: head and bytes written.
    fn take_used(&mut self, memory: &GuestMemoryMmap) -> Option<(u16, u32)> {
        let index: u16 = memory.read_obj(GuestAddress(self.base + 0x8002)).unwrap();
        if index == self.used {
            return None;
        }
        let at = self.base + 0x8004 + u64::from(self.used % self.size) * 8;
        self.used = self.used.wrapping_add(1);
        // The next one shall interrupt.
        let used_event = self.base + 0x4004 + u64::from(self.size) * 2;
        memory.write_obj(self.used, GuestAddress(used_event)).unwrap();
        let head: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }

    /// Whether the device wants to be told of the chain offered last.
    fn kick_wanted(&self, memory: &GuestMemoryMmap) -> bool {
        let read = |at| memory.read_obj::<u16>(GuestAddress(at)).unwrap();
        if self.event_idx {
            read(self.base + 0x8004 + u64::from(self.size) * 8) == self.available.wrapping_sub(1)
        } else {
            read(self.base + 0x8000) == 0
        }
    }
}

/// How a packet lies in descriptors.
#[derive(Clone, Copy)]
pub(super) enum Framing {
    One,
    Two,
    Scattered,
}

/// The guest: memory, driver, and the device under test.
pub(super) struct Guest {
    pub(super) memory: GuestMemoryMmap,
    pub(super) rx: Ring,
    pub(super) tx: Ring,
    pub(super) worker: VsockWorker,
    pub(super) device: Vsock,
    pub(super) irq: EventFd,
    pub(super) received: VecDeque<(Header, Vec<u8>)>,
    event_idx: bool,
    /// Receive buffers that came back are offered again.
    pub(super) recycle: bool,
    rx_kick: EventFd,
    tx_kick: EventFd,
    tx_free: Vec<u16>,
    /// The VMM's, in which the device's own epoll nests.
    event_loop: Epoll,
    dir: TempDir,
}

impl Guest {
    /// With `buffers` receive buffers of Linux's size, and event indices as it has them.
    pub(super) fn new(buffers: u16) -> Self {
        Self::with(buffers, true)
    }

    pub(super) fn with(buffers: u16, event_idx: bool) -> Self {
        let dir = TempDir::new().unwrap();
        let mut device = Vsock::new(CID, dir.as_path().join("v")).unwrap();
        let (memory, rx, tx, parts) = Self::start(&mut device, event_idx);
        let (worker, irq, rx_kick, tx_kick) = parts;
        let received = VecDeque::new();
        let tx_free = (0..TX_SLOTS).collect();
        let mut guest = Self {
            memory,
            rx,
            tx,
            worker,
            device,
            irq,
            received,
            event_idx,
            recycle: true,
            rx_kick,
            tx_kick,
            tx_free,
            event_loop: Epoll::new().unwrap(),
            dir,
        };
        guest.watch();
        for index in 0..buffers {
            guest.lend(index, 3776);
        }
        guest
    }

    fn start(
        device: &mut Vsock,
        event_idx: bool,
    ) -> (GuestMemoryMmap, Ring, Ring, (VsockWorker, EventFd, EventFd, EventFd)) {
        let memory = testing::memory(MEMORY_MIB);
        let rings: Vec<Ring> =
            (0..3).zip(QUEUE_SIZES).map(|(i, size)| Ring::new(i, size, event_idx)).collect();
        let (interrupt, irq) = testing::interrupt();
        let kicks: Vec<EventFd> = (0..3).map(|_| testing::event()).collect();
        let queues = rings.iter().zip(&kicks).map(|(ring, kick)| {
            let mut queue =
                ring.config().activate(&memory, kick.try_clone().unwrap(), interrupt.clone()).unwrap();
            queue.set_event_idx(event_idx);
            queue
        });
        let queues = queues.collect();
        let activation = Activation { memory: memory.clone(), features: 0, queues, interrupt };
        let listener = std::sync::Arc::clone(&device.listener);
        let worker = VsockWorker::new(device.guest_cid, listener, activation).unwrap();
        let mut rings = rings.into_iter();
        let mut kicks = kicks.into_iter();
        let (rx, tx) = (rings.next().unwrap(), rings.next().unwrap());
        (memory, rx, tx, (worker, irq, kicks.next().unwrap(), kicks.next().unwrap()))
    }

    /// The driver resets the device and starts it anew; all of its own state is gone.
    pub(super) fn restart(&mut self, buffers: u16) {
        let (memory, rx, tx, (worker, irq, rx_kick, tx_kick)) = Self::start(&mut self.device, self.event_idx);
        (self.memory, self.rx, self.tx, self.worker) = (memory, rx, tx, worker);
        (self.irq, self.rx_kick, self.tx_kick) = (irq, rx_kick, tx_kick);
        self.tx_free = (0..TX_SLOTS).collect();
        self.received.clear();
        self.watch();
        for index in 0..buffers {
            self.lend(index, 3776);
        }
    }

    fn watch(&self) {
        let event = EpollEvent::new(EventSet::IN, 0);
        self.event_loop.ctl(ControlOperation::Add, self.worker.fd(), event).unwrap();
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.as_path().join("v")
    }

    pub(super) fn service_path(&self, port: u32) -> PathBuf {
        self.dir.as_path().join(format!("v_{port}"))
    }

    /// Lends receive buffer `index` with `len` bytes.
    pub(super) fn lend(&mut self, index: u16, len: u32) {
        let address = RX_BUFFERS + u64::from(index) * RX_STRIDE;
        self.rx.describe(&self.memory, index, (address, len, WRITE, 0));
        self.offer_rx(index);
    }

    pub(super) fn offer_rx(&mut self, head: u16) {
        self.rx.offer(&self.memory, head);
        if self.rx.kick_wanted(&self.memory) {
            self.rx_kick.write(1).unwrap();
        }
    }

    pub(super) fn offer_tx(&mut self, head: u16) {
        self.tx.offer(&self.memory, head);
        if self.tx.kick_wanted(&self.memory) {
            self.tx_kick.write(1).unwrap();
        }
    }

    /// Whether a packet can be sent without waiting for the device.
    pub(super) fn can_send(&self) -> bool {
        !self.tx_free.is_empty()
    }

    /// Puts a packet into the transmit queue.
    pub(super) fn send(&mut self, header: &Header, payload: &[u8], framing: Framing) {
        if self.tx_free.is_empty() {
            self.settle();
        }
        let slot = self.tx_free.pop().expect("device takes packets");
        let (head, address) = (slot * 4, TX_BUFFERS + u64::from(slot) * TX_STRIDE);
        self.memory.write_slice(&header.to_bytes(), GuestAddress(address)).unwrap();
        let data = address + Header::SIZE as u64;
        self.memory.write_slice(payload, GuestAddress(data)).unwrap();
        let (size, len) = (HEADER, u32::try_from(payload.len()).unwrap());
        match framing {
            _ if len == 0 => self.tx.describe(&self.memory, head, (address, size, 0, 0)),
            Framing::One => self.tx.describe(&self.memory, head, (address, size + len, 0, 0)),
            Framing::Two => {
                self.tx.describe(&self.memory, head, (address, size, NEXT, head + 1));
                self.tx.describe(&self.memory, head + 1, (data, len, 0, 0));
            }
            Framing::Scattered => {
                let (a, b) = (len / 3, len / 2);
                let at = |offset: u32| data + u64::from(offset);
                self.tx.describe(&self.memory, head, (address, size + a, NEXT, head + 1));
                self.tx.describe(&self.memory, head + 1, (at(a), b - a, NEXT, head + 2));
                self.tx.describe(&self.memory, head + 2, (at(b), len - b, 0, 0));
            }
        }
        self.offer_tx(head);
    }

    /// One run of the device, then what it gave back is taken.
    pub(super) fn step(&mut self) -> Result<(), DeviceError> {
        self.worker.run()?;
        while let Some((head, _)) = self.tx.take_used(&self.memory) {
            self.tx_free.push(head / 4);
        }
        while let Some((head, len)) = self.rx.take_used(&self.memory) {
            let address = RX_BUFFERS + u64::from(head) * RX_STRIDE;
            let mut bytes = vec![0; len as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            let header = Header::from_bytes(bytes[..Header::SIZE].try_into().unwrap());
            assert_eq!(header.len as usize + Header::SIZE, bytes.len());
            assert_eq!(header.dst_cid, u64::from(CID));
            self.received.push_back((header, bytes.split_off(Header::SIZE)));
            if self.recycle {
                self.lend(head, 3776);
            }
        }
        Ok(())
    }

    /// Whether the VMM's event loop would call the device.
    pub(super) fn has_work(&self) -> bool {
        let mut events = [EpollEvent::default()];
        self.event_loop.wait(0, &mut events).unwrap() > 0
    }

    /// Runs the device as long as it asks to be run, which must come to an end.
    pub(super) fn settle(&mut self) {
        for _ in 0..10_000 {
            if !self.has_work() {
                return;
            }
            self.step().unwrap();
        }
        panic!("device spins");
    }

    /// The next packet for the guest after all work is done.
    pub(super) fn expect(&mut self, op: Op) -> Header {
        self.settle();
        let (header, _) = self.received.pop_front().unwrap_or_else(|| panic!("no packet, not {op:?}"));
        assert_eq!(Op::from_wire(header.op), Some(op), "{header:?}");
        header
    }

    pub(super) fn expect_nothing(&mut self) {
        self.settle();
        assert_eq!(self.received, []);
    }

    /// A header from the guest, with plenty of credit for the host.
    pub(super) fn header(op: Op, guest: u32, host: u32) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            socket_type: TYPE_STREAM,
            op: op as u16,
            flags: if op == Op::Shutdown { SHUTDOWN_BOTH } else { 0 },
            buf_alloc: 256 << 10,
            ..Header::default()
        }
    }

    pub(super) fn control(&mut self, op: Op, guest: u32, host: u32) {
        self.send(&Self::header(op, guest, host), &[], Framing::One);
    }

    pub(super) fn shutdown(&mut self, guest: u32, host: u32, flags: u32) {
        let header = Header { flags, ..Self::header(Op::Shutdown, guest, host) };
        self.send(&header, &[], Framing::One);
    }

    pub(super) fn data(&mut self, guest: u32, host: u32, payload: &[u8]) {
        let len = u32::try_from(payload.len()).unwrap();
        let header = Header { len, ..Self::header(Op::Data, guest, host) };
        self.send(&header, payload, Framing::Two);
    }

    /// A host client that has sent `line`.
    pub(super) fn client(&self, line: &[u8]) -> UnixStream {
        let mut client = UnixStream::connect(self.path()).unwrap();
        client.write_all(line).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    /// A host client connected to the guest's `port`, and the host port it got.
    pub(super) fn connected_client(&mut self, port: u32) -> (UnixStream, u32) {
        let mut client = self.client(format!("CONNECT {port}\n").as_bytes());
        let host = self.expect(Op::Request).src_port;
        self.control(Op::Response, port, host);
        self.settle();
        assert_eq!(read_available(&mut client).0, format!("OK {host}\n").into_bytes());
        (client, host)
    }

    /// The guest's connection to the host's `port`, and the service's end of it.
    pub(super) fn connected_service(&mut self, guest: u32, port: u32) -> UnixStream {
        let service = UnixListener::bind(self.service_path(port)).unwrap();
        self.control(Op::Request, guest, port);
        self.expect(Op::Response);
        let (stream, _) = service.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        std::fs::remove_file(self.service_path(port)).unwrap();
        stream
    }

    pub(super) fn connections(&self) -> usize {
        self.worker.connections().len()
    }

    /// Nothing of any connection is left.
    pub(super) fn assert_clean(&self) {
        let connections = self.worker.connections();
        assert_eq!((connections.len(), connections.ports_len(), connections.resets_len()), (0, 0, 0));
    }
}

/// What can be read now, and whether the end of the stream was met.
pub(super) fn read_available(stream: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let mut part = [0; 65536];
    loop {
        match stream.read(&mut part) {
            Ok(0) => return (bytes, true),
            Ok(count) => bytes.extend_from_slice(&part[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return (bytes, false),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return (bytes, true),
            Err(error) => panic!("{error}"),
        }
    }
}
