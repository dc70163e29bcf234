//! The running device: takes requests off both queues, has them judged and served, hands the replies back. On a thread
//! of its own, one request at a time.

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;

use fuse_backend_rs::api::server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::bounded::Bounded;
use super::negotiation;
use super::request::{self, Header, IN_HEADER, Judgement};
use crate::virtio::device::{Activation, DeviceError, Worker};
use crate::virtio::queue::{Chain, LiveQueue};

pub(super) type Server = server::Server<Bounded>;

/// Requests served from one queue before the other one is looked at: a flood of forgets must not stop the files.
const BUDGET: usize = 64;
/// Most descriptors of a request: the queue has no more, and the library holds a slice for each. An indirect table, which
/// is not offered, could have 65,535.
const MAX_PARTS: usize = super::QUEUE_SIZES[1] as usize;
/// Bytes behind the header that are looked at.
const PEEK: usize = negotiation::REQUEST;
/// Bytes of the reply that this device writes itself.
const FRONT: usize = negotiation::REPLY;

pub(super) struct FsWorker {
    root: PathBuf,
    most: u64,
    /// None until the first request.
    server: Option<Server>,
    memory: GuestMemoryMmap,
    epoll: Epoll,
    queues: Vec<LiveQueue>,
}

impl FsWorker {
    pub(super) fn new(root: PathBuf, most: u64, activation: Activation) -> Result<Self, DeviceError> {
        let epoll = Epoll::new().map_err(DeviceError::Host)?;
        for queue in &activation.queues {
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, queue.kick_fd(), event).map_err(DeviceError::Host)?;
        }
        Ok(Self { root, most, server: None, memory: activation.memory, epoll, queues: activation.queues })
    }
}

impl Worker for FsWorker {
    fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    fn run(&mut self) -> Result<(), DeviceError> {
        let server = match &mut self.server {
            Some(server) => server,
            none => none.insert(super::serve(&self.root, self.most).map_err(DeviceError::Host)?),
        };
        for queue in &mut self.queues {
            serve_queue(server, &self.memory, queue)?;
        }
        Ok(())
    }
}

/// Serves what is in one queue, up to the budget; what may be left makes the kick readable.
pub(super) fn serve_queue(
    server: &Server,
    memory: &GuestMemoryMmap,
    queue: &mut LiveQueue,
) -> Result<(), DeviceError> {
    queue.clear_kick();
    for _ in 0..BUDGET {
        let Some(chain) = queue.pop()? else {
            // Asking for kicks may show that requests came just before.
            if queue.enable_kicks()? {
                continue;
            }
            return Ok(());
        };
        let head = chain.head_index();
        let written = serve(server, memory, chain)?;
        queue.add_used(head, written)?;
        // At once: the process that asked sleeps until then.
        queue.notify()?;
    }
    queue.kick_again();
    Ok(())
}

/// Serves one request and says how long the reply is.
fn serve(server: &Server, memory: &GuestMemoryMmap, chain: Chain<'_>) -> Result<u32, DeviceError> {
    let shape = Shape::of(memory, chain.clone())?;
    match request::judge(shape.header, shape.readable, shape.writable) {
        Judgement::Drop => Ok(0),
        Judgement::Answer(error) => refuse(memory, &shape, error),
        Judgement::Serve => {
            let reader = Reader::from_descriptor_chain(memory, chain.clone()).map_err(unusable)?;
            let writer = VirtioFsWriter::new(memory, chain).map_err(unusable)?;
            match server.handle_message(reader, Writer::VirtioFs(writer), None, None) {
                Ok(written) => {
                    if shape.header.opcode == negotiation::OPCODE && written >= FRONT {
                        negotiate(memory, &shape)?;
                    }
                    Ok(u32::try_from(written).unwrap_or(u32::MAX))
                }
                // Malformed in a way the library saw: the guest gets an error, as from any file system.
                Err(_) if shape.header.is_unanswered() => Ok(0),
                Err(_) => refuse(memory, &shape, libc::EINVAL),
            }
        }
    }
}

fn unusable(_: fuse_backend_rs::transport::Error) -> DeviceError {
    DeviceError::BadChain("a FUSE request does not lie in guest memory")
}

fn refuse(memory: &GuestMemoryMmap, shape: &Shape, error: i32) -> Result<u32, DeviceError> {
    shape.write_reply(memory, &request::error_reply(shape.header.unique, error))?;
    Ok(16)
}

/// Adds to the library's answer to the first request what this device can do besides.
fn negotiate(memory: &GuestMemoryMmap, shape: &Shape) -> Result<(), DeviceError> {
    let mut reply = [0; FRONT];
    let mut rest = &mut reply[..];
    for (address, room) in &shape.reply_room {
        let (now, later) = rest.split_at_mut(rest.len().min(*room));
        memory.read_slice(now, *address).map_err(DeviceError::Memory)?;
        rest = later;
    }
    negotiation::amend(&shape.peek, &mut reply);
    shape.write_reply(memory, &reply)
}

/// A chain as far as it is looked at before it is served.
struct Shape {
    header: Header,
    readable: u64,
    writable: u64,
    peek: [u8; PEEK],
    /// Where the front of the reply goes: its places and their sizes.
    reply_room: Vec<(GuestAddress, usize)>,
}

impl Shape {
    fn of(memory: &GuestMemoryMmap, chain: Chain<'_>) -> Result<Self, DeviceError> {
        let mut front = [0; IN_HEADER + PEEK];
        let (mut filled, mut readable, mut writable) = (0, 0, 0);
        let mut reply_room = Vec::new();
        let mut room = 0;
        for (part, descriptor) in chain.enumerate() {
            if part == MAX_PARTS {
                return Err(DeviceError::BadChain("a FUSE request has too many parts"));
            }
            let len = descriptor.len() as usize;
            // In one region, as the library needs it.
            memory.get_slice(descriptor.addr(), len).map_err(DeviceError::Memory)?;
            if descriptor.is_write_only() {
                writable += u64::from(descriptor.len());
                let part = len.min(FRONT - room);
                if part > 0 {
                    reply_room.push((descriptor.addr(), part));
                    room += part;
                }
            } else if writable > 0 {
                return Err(DeviceError::BadChain("a readable part follows a writable one"));
            } else {
                readable += u64::from(descriptor.len());
                let part = len.min(front.len() - filled);
                memory
                    .read_slice(&mut front[filled..filled + part], descriptor.addr())
                    .map_err(DeviceError::Memory)?;
                filled += part;
            }
        }
        let (header, peek) = front.split_first_chunk().unwrap_or((&[0; IN_HEADER], &[]));
        let peek = peek.first_chunk().copied().unwrap_or_default();
        Ok(Self { header: Header::parse(header), readable, writable, peek, reply_room })
    }

    /// Writes the front of the reply, as far as the guest has room for it.
    fn write_reply(&self, memory: &GuestMemoryMmap, reply: &[u8]) -> Result<(), DeviceError> {
        let mut rest = reply;
        for (address, room) in &self.reply_room {
            let (now, later) = rest.split_at(rest.len().min(*room));
            memory.write_slice(now, *address).map_err(DeviceError::Memory)?;
            rest = later;
        }
        Ok(())
    }
}

impl fmt::Debug for FsWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FsWorker").field("queues", &self.queues.len()).finish_non_exhaustive()
    }
}
