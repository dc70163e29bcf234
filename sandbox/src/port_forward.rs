//! Connections to `localhost` in the pod's network namespace on the host, carried to the same port in the guest.
//!
//! That is where containerd's port-forward and others dial, knowing nothing of a VM. Which ports programs will listen on
//! nobody knows, so one listener takes them all: a program of the kernel's socket lookup (`BPF_PROG_TYPE_SK_LOOKUP`) gives it every
//! connection to 127.0.0.0/8 and ::1 in the namespace, and the accepted socket's own address says which port was meant.
//! The program is attached by a descriptor, and gone with it, however its owner ends.

mod lookup;

use std::io::{self, Read};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use krx_proto::{FORWARDED, ForwardHello, port, write_frame};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{setsockopt, sockopt};

use crate::agent::{CONNECT_TIMEOUT, accepted, dial};
use crate::network::{self, NetworkError};

/// Connections at a time, each of which has two threads. Further ones are refused.
const MAX_CONNECTIONS: usize = 128;
/// After a failure to accept, which is want of descriptors or memory: others may give some back.
const PAUSE: Duration = Duration::from_millis(100);

/// Why ports cannot be forwarded.
#[derive(Debug, thiserror::Error)]
pub enum PortForwardError {
    #[error(transparent)]
    Namespace(NetworkError),
    #[error("Cannot listen on the loopback of the network namespace")]
    Listen(#[source] io::Error),
    #[error(
        "Cannot have connections looked up by a BPF program: it needs Linux 5.9, CAP_BPF and CAP_NET_ADMIN"
    )]
    Lookup(#[source] io::Error),
    #[error("Cannot start the thread that forwards")]
    Thread(#[source] io::Error),
}

/// Forwards until it is dropped. Connections that are open then go on as long as the VM.
#[derive(Debug)]
pub struct PortForward {
    /// Closing it detaches the program.
    link: Option<OwnedFd>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl PortForward {
    /// Forwards from the namespace that `netns` is a file of, to the guest behind the unix socket `vsock`.
    ///
    /// # Errors
    /// [`PortForwardError`]
    pub fn start(netns: &Path, vsock: PathBuf) -> Result<Self, PortForwardError> {
        let listen = |namespace: &std::fs::File| {
            network::loopback_up().map_err(PortForwardError::Namespace)?;
            let listeners = listeners().map_err(PortForwardError::Listen)?;
            let link = lookup::attach(namespace.as_fd(), &listeners);
            Ok((listeners, link.map_err(|error| PortForwardError::Lookup(error.into()))?))
        };
        let (listeners, link) = network::inside(netns, listen).map_err(PortForwardError::Namespace)??;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let stop = EventFd::from_value_and_flags(0, flags);
        let stop = Arc::new(stop.map_err(|error| PortForwardError::Thread(error.into()))?);
        let stopped = stop.clone();
        let thread = thread::Builder::new()
            .name("port-forward".into())
            .spawn(move || serve(&listeners, &stopped, &vsock))
            .map_err(PortForwardError::Thread)?;
        Ok(Self { link: Some(link), stop, thread: Some(thread) })
    }
}

impl Drop for PortForward {
    fn drop(&mut self) {
        self.link = None;
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Listeners on any ports, of the calling thread's namespace: for IPv4, and for IPv6 where there is such.
fn listeners() -> io::Result<Vec<TcpListener>> {
    let v4 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let v6 = match TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT)) => None,
        v6 => Some(v6?),
    };
    let all: Vec<_> = [Some(v4), v6].into_iter().flatten().collect();
    all.iter().try_for_each(|listener| listener.set_nonblocking(true))?;
    Ok(all)
}

/// Body of the thread: accepts until it is told to stop.
fn serve(listeners: &[TcpListener], stop: &EventFd, vsock: &Path) {
    let vsock: Arc<Path> = vsock.into();
    let open = Arc::new(());
    loop {
        let listening = listeners.iter().map(AsFd::as_fd);
        let mut fds: Vec<_> = [stop.as_fd()]
            .into_iter()
            .chain(listening)
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::Error::EINTR) => continue,
            Err(_) => return,
            Ok(_) if fds[0].any() == Some(true) => return,
            Ok(_) => {}
        }
        for listener in listeners {
            match listener.accept() {
                Ok((socket, _)) if Arc::strong_count(&open) > MAX_CONNECTIONS => reset(&socket),
                Ok((socket, _)) => {
                    let (vsock, open) = (vsock.clone(), open.clone());
                    let carry = move || {
                        carry(&socket, &vsock).unwrap_or_else(|_| reset(&socket));
                        drop(open);
                    };
                    // Without a thread the connection is closed.
                    let _ = thread::Builder::new().name("forwarded".into()).spawn(carry);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }
}

/// Carries one connection to its end. An error is one before the first byte.
fn carry(socket: &TcpStream, vsock: &Path) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    let port = socket.local_addr().map(|address: SocketAddr| address.port())?;
    let mut guest = dial(vsock, port::FORWARD).map_err(io::Error::other)?;
    guest.set_read_timeout(Some(CONNECT_TIMEOUT))?;
    write_frame(&mut guest, &ForwardHello { port }).map_err(io::Error::other)?;
    accepted(&guest, port::FORWARD).map_err(io::Error::other)?;
    let mut answer = [0];
    guest.read_exact(&mut answer)?;
    if answer != [FORWARDED] {
        return Err(io::ErrorKind::InvalidData.into());
    }
    guest.set_read_timeout(None)?;
    thread::scope(|scope| {
        let there = || copy(socket, &guest, || guest.shutdown(Shutdown::Write));
        // Without a second thread there is only one direction.
        let there = thread::Builder::new().name("forwarded".into()).spawn_scoped(scope, there);
        copy(&guest, socket, || socket.shutdown(Shutdown::Write));
        if there.is_err() {
            let _ = guest.shutdown(Shutdown::Both);
        }
    });
    Ok(())
}

/// One direction. Whoever cannot write any more ends the reading, too.
fn copy<'a, A, B>(from: &'a A, to: &'a B, end: impl FnOnce() -> io::Result<()>)
where
    &'a A: Read + HalfClose,
    &'a B: io::Write,
{
    let (mut reader, mut writer) = (from, to);
    if io::copy(&mut reader, &mut writer).is_err() {
        reader.close_reading();
    }
    let _ = end();
}

/// Sockets of both kinds.
trait HalfClose {
    fn close_reading(&self);
}

impl HalfClose for &TcpStream {
    fn close_reading(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

impl HalfClose for &UnixStream {
    fn close_reading(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

/// Closes a connection so that its other end sees that nobody was there.
fn reset(socket: &TcpStream) {
    let _ = setsockopt(socket, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 });
}
