//! Client of the agent in the guest, over the unix socket that stands for the guest's vsock.
//!
//! Calls may be made from several threads and need not wait for each other: [`AgentClient::send`] returns a
//! [`Pending`] reply, one thread reads replies and hands each to who waits for it. The guest is not trusted: frames
//! are capped, a reply that nobody asked for ends the connection, and every wait for a first word has a deadline.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, BufReader, Cursor, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use krx_proto::{
    AgentError, Answer, Call, FrameError, GuestInfo, MAX_FRAME, Message, Request, VERSION, port, read_frame,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use std::os::fd::AsRawFd;

use crate::clock::{self, Clock};
use crate::plain_file;

/// How long an agent that already runs may take to answer a new connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a call over such a connection may take, if it does not wait for a process's end.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest message of the agent that is shown, in bytes.
const MAX_MESSAGE: usize = 4096;
/// Longest line `OK port\n` by which the VMM says that the guest accepted a connection.
const MAX_OK: usize = 32;

/// Why a call to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("Cannot reach the pod's VM at {path}")]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Nothing in the guest listens on vsock port {0}")]
    Refused(u32),
    #[error("The agent did not say hello within {0:?}")]
    Silent(Duration),
    #[error(
        "The agent speaks version {theirs} of the protocol, this krx {VERSION}: use a kernel, initramfs and krx of one build"
    )]
    Version { theirs: u16 },
    #[error("The agent's hello makes no sense")]
    Hello(#[source] FrameError),
    #[error("The VMM ended before the agent said hello")]
    VmmEnded,
    #[error("The connection to the agent was lost")]
    Lost,
    #[error("The agent did not answer within {0:?}: the guest hangs, or is not what it should be")]
    NoAnswer(Duration),
    #[error("The call could not be sent")]
    Send(#[source] FrameError),
    #[error("The agent answered something else than was asked")]
    Unexpected,
    #[error(transparent)]
    Agent(#[from] AgentError),
}

/// A connection on which calls are made.
#[derive(Debug)]
pub struct AgentClient {
    line: Arc<Line>,
    guest: GuestInfo,
    /// For each call that is to be answered at once.
    limit: Duration,
}

/// A call whose reply is on its way.
#[derive(Debug)]
pub struct Pending {
    reply: mpsc::Receiver<Result<Answer, AgentError>>,
    limit: Duration,
}

/// The connection, of which one thread reads.
pub(crate) struct Line {
    socket: UnixStream,
    next: AtomicU32,
    /// Who waits for which reply; `None` once the connection is gone.
    replies: Mutex<Option<Waiting>>,
}

type Waiting = HashMap<u32, Continuation>;
/// What is to be done with a reply. Dropped when there will be none.
type Continuation = Box<dyn FnOnce(Result<Answer, AgentError>) + Send>;

impl Pending {
    /// With a shorter limit for [`Self::answer`] than its connection has.
    #[must_use]
    pub fn within(self, limit: Duration) -> Self {
        Self { limit: self.limit.min(limit), ..self }
    }

    /// Waits for the reply. A guest that is silent for too long is broken, or worse.
    ///
    /// # Errors
    /// What the agent says, its silence, or the loss of the connection.
    pub fn answer(self) -> Result<Answer, CallError> {
        let reply = self.reply.recv_timeout(self.limit).map_err(|error| match error {
            RecvTimeoutError::Timeout => CallError::NoAnswer(self.limit),
            RecvTimeoutError::Disconnected => CallError::Lost,
        });
        Ok(reply??)
    }

    /// Waits for the reply to a call that is answered when a process ends, however long that takes.
    ///
    /// # Errors
    /// What the agent says, or the loss of the connection.
    pub fn outcome(self) -> Result<Answer, CallError> {
        Ok(self.reply.recv().map_err(|_| CallError::Lost)??)
    }

    /// Whether the reply has come, or never will.
    #[must_use]
    pub fn is_over(&self) -> bool {
        !matches!(self.reply.try_recv(), Err(TryRecvError::Empty))
    }

    /// Waits for a reply that has nothing to say.
    ///
    /// # Errors
    /// As [`Self::answer`]; any other answer.
    pub fn done(self) -> Result<(), CallError> {
        match self.answer()? {
            Answer::Done => Ok(()),
            _ => Err(CallError::Unexpected),
        }
    }
}

impl AgentClient {
    /// Waits for the agent of a booting VM, which dials the host by itself, twice `timeout`: until PID 1 runs the VMM
    /// itself watches over the guest, for the first half. Later calls may take `timeout`. `vmm_ended` becomes readable
    /// when the VMM ends: no need to wait longer then.
    ///
    /// # Errors
    /// The VMM's end, the deadline, a hello that is not one of this version.
    pub fn accept(
        listener: &UnixListener,
        vmm_ended: BorrowedFd<'_>,
        timeout: Duration,
    ) -> Result<Self, CallError> {
        let (limit, timeout) = (timeout, timeout * 2);
        let deadline = Instant::now() + timeout;
        listener.set_nonblocking(true).map_err(|_| CallError::Lost)?;
        let socket = loop {
            ready(listener.as_fd(), Some(vmm_ended), deadline, timeout)?;
            match listener.accept() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                accepted => break accepted.map_err(|_| CallError::Lost)?.0,
            }
        };
        Self::greet(socket, Some(vmm_ended), deadline, timeout, limit, Some(Clock::new()))
    }

    /// Connects to the agent of a running pod.
    ///
    /// # Errors
    /// No VM at that socket, or no agent of this version in it.
    pub fn connect(vsock: &Path) -> Result<Self, CallError> {
        let socket = dial(vsock, port::CONTROL)?;
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        ready(socket.as_fd(), None, deadline, CONNECT_TIMEOUT)?;
        accepted(&socket, port::CONTROL)?;
        Self::greet(socket, None, deadline, CONNECT_TIMEOUT, CALL_TIMEOUT, None)
    }

    /// What the guest says of itself.
    #[must_use]
    pub fn guest(&self) -> &GuestInfo {
        &self.guest
    }

    /// Sends a call without waiting for its reply.
    ///
    /// # Errors
    /// The connection is gone, or the request is larger than a frame.
    pub fn send(&self, request: Request) -> Result<Pending, CallError> {
        let (sender, receiver) = mpsc::channel();
        // Nobody waits for the reply to, say, a forwarded signal.
        self.send_then(request, move |reply| drop(sender.send(reply)))?;
        Ok(Pending { reply: receiver, limit: self.limit })
    }

    /// Sends a call and has its reply handed to `then`, on the thread that reads replies: it must not block. When the
    /// connection is lost before there is a reply, `then` is dropped.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_then(
        &self,
        request: Request,
        then: impl FnOnce(Result<Answer, AgentError>) + Send + 'static,
    ) -> Result<(), CallError> {
        self.line.send(request, then)
    }

    /// Reads the hello, then starts the thread that reads replies.
    fn greet(
        socket: UnixStream,
        vmm_ended: Option<BorrowedFd<'_>>,
        deadline: Instant,
        timeout: Duration,
        limit: Duration,
        clock: Option<Clock>,
    ) -> Result<Self, CallError> {
        socket.set_nonblocking(true).map_err(|_| CallError::Lost)?;
        let mut received = Vec::new();
        let guest = loop {
            if let Some(guest) = take_hello(&mut received)? {
                break guest;
            }
            ready(socket.as_fd(), vmm_ended, deadline, timeout)?;
            let mut buffer = [0; 4096];
            match (&socket).read(&mut buffer) {
                Ok(0) => return Err(CallError::Lost),
                Ok(read) => received.extend_from_slice(&buffer[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Err(CallError::Lost),
            }
        };
        socket.set_nonblocking(false).map_err(|_| CallError::Lost)?;
        // A guest that takes no calls must not hold up who makes them.
        socket.set_write_timeout(Some(limit)).map_err(|_| CallError::Lost)?;
        if clock.is_some() {
            socket.set_read_timeout(Some(clock::EVERY)).map_err(|_| CallError::Lost)?;
        }
        let line =
            Arc::new(Line { socket, next: AtomicU32::new(1), replies: Mutex::new(Some(HashMap::new())) });
        let reader = Reader { line: line.clone(), clock };
        thread::Builder::new()
            .name("agent-replies".into())
            .spawn(move || reader.run(received))
            .map_err(|_| CallError::Lost)?;
        Ok(Self { line, guest, limit })
    }
}

impl Drop for AgentClient {
    fn drop(&mut self) {
        // The reading thread holds the same connection; this ends it.
        let _ = self.line.socket.shutdown(std::net::Shutdown::Both);
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Line {
    fn replies(&self) -> MutexGuard<'_, Option<Waiting>> {
        self.replies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a call, see [`AgentClient::send_then`].
    pub(crate) fn send(
        &self,
        request: Request,
        then: impl FnOnce(Result<Answer, AgentError>) + Send + 'static,
    ) -> Result<(), CallError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let frame = krx_proto::encode(&Call { number, request }).map_err(CallError::Send)?;
        // Written under the lock, so that frames of several threads do not mix.
        let mut replies = self.replies();
        replies.as_mut().ok_or(CallError::Lost)?.insert(number, Box::new(then));
        (&self.socket).write_all(&frame).map_err(|_| CallError::Lost)
    }

    /// Sends a call that can as well be left out, by the thread that reads: only if that needs no waiting, for the guest or
    /// for others who send.
    pub(crate) fn send_now(
        &self,
        request: Request,
        then: impl FnOnce(Result<Answer, AgentError>) + Send + 'static,
    ) {
        let Ok(mut replies) = self.replies.try_lock() else { return };
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (Ok(frame), Some(waiting)) = (krx_proto::encode(&Call { number, request }), replies.as_mut())
        else {
            return;
        };
        waiting.insert(number, Box::new(then));
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.socket.as_raw_fd(), &frame, flags) {
            // A part of a frame has to be followed by the rest.
            Ok(sent) => drop((&self.socket).write_all(&frame[sent..])),
            Err(_) => drop(waiting.remove(&number)),
        }
    }
}

/// The reading thread's end of the connection.
#[derive(Debug)]
struct Reader {
    line: Arc<Line>,
    /// That of the guest, where this is its owner.
    clock: Option<Clock>,
}

impl Reader {
    /// Body of the reading thread. Ends with the connection; all who still wait then learn of its loss.
    fn run(self, received: Vec<u8>) {
        let line = self.line.clone();
        let mut from = BufReader::new(Cursor::new(received).chain(self));
        while let Ok(Message::Reply { number, result }) = read_frame(&mut from) {
            let waiting = line.replies().as_mut().and_then(|replies| replies.remove(&number));
            let Some(then) = waiting else { break };
            then(result.map_err(presentable));
        }
        *line.replies() = None;
    }
}

impl Read for Reader {
    /// Reads what comes, and looks at the guest's clock meanwhile.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = (&self.line.socket).read(buffer);
            self.clock.iter_mut().for_each(|clock| clock.check(&self.line));
            if read.as_ref().map_err(io::Error::kind) != Err(io::ErrorKind::WouldBlock) {
                return read;
            }
        }
    }
}

/// The agent's error as it may be shown: a guest has no business with the caller's terminal.
fn presentable(mut error: AgentError) -> AgentError {
    let end = (0..=MAX_MESSAGE.min(error.message.len())).rev().find(|at| error.message.is_char_boundary(*at));
    error.message.truncate(end.unwrap_or(0));
    error.message = error.message.replace(char::is_control, "?");
    error
}

/// Opens a connection to a port of the guest. Bytes may be written at once, before the guest has accepted it.
///
/// # Errors
/// No VM listens at `vsock`.
pub fn dial(vsock: &Path, port: u32) -> Result<UnixStream, CallError> {
    let connect = || {
        let mut socket = plain_file::connect(vsock)?;
        socket.write_all(format!("CONNECT {port}\n").as_bytes())?;
        Ok(socket)
    };
    connect().map_err(|source| CallError::Connect { path: vsock.into(), source })
}

/// Waits for the line by which the VMM says that the guest has accepted; takes exactly that line.
///
/// # Errors
/// The guest refused, or the VMM says something else.
pub fn accepted(socket: &UnixStream, port: u32) -> Result<(), CallError> {
    let refused = |_| CallError::Refused(port);
    let mut line = [0; MAX_OK];
    // Looked at before it is taken: what follows the line belongs to the guest. The VMM writes it in one piece.
    let seen = recv(socket.as_raw_fd(), &mut line, MsgFlags::MSG_PEEK).map_err(refused)?;
    let end = line[..seen].iter().position(|byte| *byte == b'\n').ok_or(CallError::Refused(port))?;
    (&mut &*socket).read_exact(&mut line[..=end]).map_err(|_| CallError::Refused(port))?;
    if line.starts_with(b"OK ") { Ok(()) } else { Err(CallError::Refused(port)) }
}

/// Waits until `fd` is readable; the VMM's end and the deadline are errors.
fn ready(
    fd: BorrowedFd<'_>,
    vmm_ended: Option<BorrowedFd<'_>>,
    deadline: Instant,
    timeout: Duration,
) -> Result<(), CallError> {
    loop {
        let left = deadline.checked_duration_since(Instant::now()).ok_or(CallError::Silent(timeout))?;
        // Rounded up, so that a last fraction of a millisecond is slept rather than spun away.
        let wait = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let mut fds: Vec<_> = [Some(fd), vmm_ended]
            .into_iter()
            .flatten()
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        match poll(&mut fds, wait) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(_) => return Err(CallError::Lost),
        }
        // The connection first: an agent that speaks and dies at once has still spoken.
        if fds[0].any() == Some(true) {
            return Ok(());
        }
        return Err(CallError::VmmEnded);
    }
}

/// Takes the hello off the front of what was received; `None` when it is not whole yet.
fn take_hello(received: &mut Vec<u8>) -> Result<Option<GuestInfo>, CallError> {
    // The version is read by hand first: what follows it may have another form in another version.
    if let Some(theirs) = hello_version(received)
        && theirs != VERSION
    {
        return Err(CallError::Version { theirs });
    }
    match krx_proto::take_frame(received) {
        Ok(Some(Message::Hello { guest, .. })) => Ok(Some(guest)),
        Ok(Some(_)) => Err(CallError::Unexpected),
        Ok(None) => Ok(None),
        Err(error) => Err(CallError::Hello(error)),
    }
}

/// Version in a hello of any version: a length of four bytes, variant 0, the version as a postcard varint.
fn hello_version(received: &[u8]) -> Option<u16> {
    let (prefix, payload) = received.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_le_bytes(*prefix)).ok().filter(|length| *length <= MAX_FRAME)?;
    let payload = &payload[..length.min(payload.len())];
    let (0, varint) = payload.split_first().map(|(first, rest)| (*first, rest))? else { return None };
    let mut version = 0_u32;
    // A u16 takes at most three bytes of seven bits.
    for (index, byte) in varint.iter().take(3).enumerate() {
        version |= u32::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return u16::try_from(version).ok();
        }
    }
    None
}
