//! The VMM's control socket: one JSON request a line, one JSON answer a line. An open file that a request is about is passed with the
//! line (unix(7), SCM_RIGHTS).
//!
//! Each client is served on a short-lived thread of its own, never on the event loop: pausing waits for the vCPUs,
//! and a vCPU may be waiting for the loop.

use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use event_manager::EventSet;
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::disks::{DiskError, DiskPlace, Disks};
use crate::event_loop::{EventLoop, Stop, on_readable};
use crate::host_socket::{self, Listener};
use crate::jail::seccomp::{self, Kind};
use crate::klog;
use crate::kvm::vcpu::{PAUSE_LIMIT, Vcpus};
use crate::machine::Outcome;
use crate::phase::{self, Reached};
use crate::report;

/// More clients at a time are turned away: each has a thread.
const MAX_CLIENTS: usize = 4;
/// Longest request line; stops a client from growing the VMM's memory.
const MAX_LINE: u64 = 4096;
/// A client that says nothing for so long is hung up on.
const IDLE: Duration = Duration::from_secs(60);
/// Time the guest has for an orderly power-off before its vCPUs are stopped.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// One line of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    request: Request,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Request {
    Pause,
    Resume,
    Shutdown,
    Status,
    Timings,
    /// The guest kernel's log, see [`klog`].
    Log,
    /// Makes the file that comes with the line a disk of the guest.
    AttachDisk {
        read_only: bool,
    },
    DetachDisk {
        slot: u32,
    },
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Ok(&'static str),
    Phases(Vec<Reached>),
    Log(String),
    Disk(DiskPlace),
    Error(String),
}

/// What a request can do to the machine.
#[derive(Debug, Clone)]
pub struct Handles {
    /// `None` until the vCPUs have been started.
    pub vcpus: Arc<Mutex<Option<Arc<Vcpus>>>>,
    pub stop: Stop<Outcome>,
    /// Set before the vCPUs are started.
    disks: Arc<OnceLock<Arc<Mutex<Disks>>>>,
    /// What the guest kernel's log is read from: the guest's memory, and the kernel that runs in it.
    guest: Arc<OnceLock<(GuestMemoryMmap, File)>>,
    /// Socket of the vsock device, to reach the guest's power button.
    vsock: Option<PathBuf>,
    /// Somebody has asked for a shutdown, which always ends in a stop.
    shutting_down: Arc<AtomicBool>,
}

impl Handles {
    /// `vsock` is the socket of the vsock device, if there is one.
    #[must_use]
    pub fn new(stop: Stop<Outcome>, vsock: Option<PathBuf>) -> Self {
        let (vcpus, disks, guest) = (Arc::default(), Arc::default(), Arc::default());
        Self { vcpus, stop, disks, guest, vsock, shutting_down: Arc::default() }
    }

    /// Lets clients attach disks from now on.
    pub(crate) fn set_disks(&self, disks: Arc<Mutex<Disks>>) {
        // There is one machine, which has one set of them.
        let _ = self.disks.set(disks);
    }

    /// Lets clients read the log of the guest that runs `kernel` in `memory` from now on.
    pub(crate) fn set_guest(&self, memory: GuestMemoryMmap, kernel: File) {
        // There is one machine, which has one guest.
        let _ = self.guest.set((memory, kernel));
    }

    /// The guest kernel's log as it is now: the guest may run, which the reader bears.
    fn log(&self) -> Result<String, String> {
        let (memory, kernel) = self.guest.get().ok_or("the VM has not been made yet")?;
        klog::read_from(memory, kernel).map_err(|error| report::line(&error))
    }

    fn with_disks<T>(&self, action: impl FnOnce(&mut Disks) -> Result<T, DiskError>) -> Result<T, String> {
        let disks = self.disks.get().ok_or("the VM has not been made yet")?;
        let mut disks = disks.lock().unwrap_or_else(PoisonError::into_inner);
        action(&mut disks).map_err(|error| report::line(&error))
    }

    fn with_vcpus<T>(&self, action: impl FnOnce(&Vcpus) -> T) -> Option<T> {
        let vcpus = self.vcpus.lock().unwrap_or_else(PoisonError::into_inner).clone();
        vcpus.as_deref().map(action)
    }

    /// Asks the guest to power off, and stops the machine when it has not within [`SHUTDOWN_GRACE`], or cannot be asked.
    /// Returns at once.
    pub fn shut_down(&self) {
        if self.shutting_down.swap(true, Ordering::SeqCst) {
            return;
        }
        let handles = self.clone();
        let spawned = thread::Builder::new().name("krx-shutdown".into()).spawn(move || {
            seccomp::confine(Kind::Control);
            // A paused guest cannot hear.
            handles.with_vcpus(Vcpus::resume);
            let pressed = handles.vsock.as_deref().map(press_power_button);
            if let Some(Ok(_connection)) = pressed {
                thread::sleep(SHUTDOWN_GRACE);
            }
            handles.stop.set(Outcome::Stopped);
        });
        if spawned.is_err() {
            self.stop.set(Outcome::Stopped);
        }
    }
}

/// Connects to the guest's power port, as any client of the vsock socket could. Without waiting: a device that takes no
/// clients leaves its backlog full for ever.
fn press_power_button(socket: &Path) -> io::Result<UnixStream> {
    let mut connection = host_socket::dial(socket)?;
    writeln!(connection, "CONNECT {}", krx_proto::port::POWER)?;
    Ok(connection)
}

/// Serves the clients of `listener` from now on.
///
/// # Errors
/// When the loop cannot watch the socket, or the host is out of descriptors.
pub fn serve_on(event_loop: &mut EventLoop, listener: Listener, handles: Handles) -> io::Result<()> {
    let spare = Arc::new(Mutex::new(Some(listener.as_fd().try_clone_to_owned()?)));
    let door = Door { handles, clients: Arc::default(), spare };
    // Edge-triggered: a client that cannot be let in does not keep the loop awake.
    let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
    on_readable(event_loop, listener.as_raw_fd(), events, move || door.admit(|| listener.accept()))
}

/// Where clients come in.
struct Door {
    handles: Handles,
    clients: Arc<AtomicUsize>,
    /// A guest can make the VMM hold as many descriptors as it may have. One is kept to be given up for a client, whose
    /// own takes its place in the end: the guest never gets it.
    spare: Arc<Mutex<Option<OwnedFd>>>,
}

impl Door {
    /// Lets all in who wait.
    fn admit(&self, mut accept: impl FnMut() -> io::Result<UnixStream>) {
        loop {
            match accept() {
                Ok(client) => self.serve_on_thread(client),
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                    ErrorKind::WouldBlock => return,
                    // Without a spare they wait until the next one comes.
                    _ if self.spare().take().is_none() => return,
                    _ => {}
                },
            }
        }
    }

    fn serve_on_thread(&self, client: UnixStream) {
        if self.clients.fetch_add(1, Ordering::SeqCst) >= MAX_CLIENTS {
            self.clients.fetch_sub(1, Ordering::SeqCst);
            keep(&self.spare, client);
            return;
        }
        let (handles, clients, spare) =
            (self.handles.clone(), Arc::clone(&self.clients), Arc::clone(&self.spare));
        let spawned = thread::Builder::new().name("krx-control".into()).spawn(move || {
            seccomp::confine(Kind::Control);
            // A client that goes away in the middle is its own affair.
            let _ = serve(&client, &handles);
            clients.fetch_sub(1, Ordering::SeqCst);
            keep(&spare, client);
        });
        if let Err(error) = spawned {
            self.clients.fetch_sub(1, Ordering::SeqCst);
            report::warn("Control client not served", &error);
        }
    }

    fn spare(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hangs up on `client`, whose descriptor becomes the spare one if that was given up.
fn keep(spare: &Mutex<Option<OwnedFd>>, client: UnixStream) {
    // Hung up already is as good.
    let _ = client.shutdown(Shutdown::Both);
    spare.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(client.into());
}

fn serve(client: &UnixStream, handles: &Handles) -> io::Result<()> {
    client.set_nonblocking(false)?;
    client.set_read_timeout(Some(IDLE))?;
    client.set_write_timeout(Some(IDLE))?;
    let mut reader = BufReader::new(Receiver { client, file: None });
    loop {
        let mut line = Vec::new();
        if (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let answer = answer(&line, reader.get_mut().file.take(), handles);
        let mut text = serde_json::to_vec(&answer).map_err(io::Error::other)?;
        text.push(b'\n');
        (&*client).write_all(&text)?;
    }
}

/// What a client sends, with the last file that it has passed.
struct Receiver<'a> {
    client: &'a UnixStream,
    file: Option<File>,
}

impl Read for Receiver<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (count, file) = self.client.recv_with_fd(buffer)?;
        self.file = file.or_else(|| self.file.take());
        Ok(count)
    }
}

fn answer(line: &[u8], file: Option<File>, handles: &Handles) -> Answer {
    let not_started = || Answer::Error("the vCPUs have not been started yet".into());
    let request = match serde_json::from_slice::<Line>(line) {
        Ok(line) => line.request,
        Err(error) => return Answer::Error(error.to_string()),
    };
    match request {
        Request::Pause => {
            let paused = |paused| if paused { Answer::Ok("paused") } else { not_paused() };
            handles.with_vcpus(Vcpus::pause).map_or_else(not_started, paused)
        }
        Request::Resume => {
            handles.with_vcpus(Vcpus::resume).map_or_else(not_started, |()| Answer::Ok("running"))
        }
        Request::Status => handles
            .with_vcpus(Vcpus::paused)
            .map_or_else(not_started, |paused| Answer::Ok(if paused { "paused" } else { "running" })),
        Request::Timings => Answer::Phases(phase::all()),
        Request::Log => handles.log().map_or_else(Answer::Error, Answer::Log),
        Request::AttachDisk { read_only } => {
            let Some(file) = file else { return Answer::Error("no file came with the request".into()) };
            let attached = handles.with_disks(|disks| disks.attach(file, read_only));
            attached.map_or_else(Answer::Error, Answer::Disk)
        }
        Request::DetachDisk { slot } => {
            let detached = handles.with_disks(|disks| disks.detach(slot));
            detached.map_or_else(Answer::Error, |()| Answer::Ok("detached"))
        }
        Request::Shutdown => {
            handles.shut_down();
            Answer::Ok("shutting down")
        }
    }
}

fn not_paused() -> Answer {
    let seconds = PAUSE_LIMIT.as_secs();
    Answer::Error(format!(
        "the guest runs on: another client resumed it, or a vCPU waits for the host and did not stop within {seconds} s; \
         ask again"
    ))
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    fn handles() -> Handles {
        Handles::new(Stop::new().unwrap(), None)
    }

    fn ask(request: &[u8]) -> String {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&ours).write_all(request).unwrap();
        ours.shutdown(Shutdown::Write).unwrap();
        serve(&theirs, &handles()).unwrap();
        drop(theirs);
        let mut text = String::new();
        (&ours).read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn requests_are_answered_line_by_line() {
        phase::mark(phase::Phase::Main);
        let text = ask(b"{\"request\":\"timings\"}\n{\"request\":\"status\"}\n");
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with(r#"{"phases":[{"name":"main","monotonic_ns":"#), "{text}");
        assert!(lines[1].starts_with(r#"{"error":"#), "{text}");
    }

    #[test]
    fn a_log_needs_a_guest() {
        assert_eq!(ask(b"{\"request\":\"log\"}\n"), "{\"error\":\"the VM has not been made yet\"}\n");
    }

    #[test]
    fn malformed_and_endless_requests_get_an_error() {
        assert!(ask(b"pause\n").starts_with(r#"{"error":"#));
        assert!(ask(b"{\"request\":\"explode\"}\n").starts_with(r#"{"error":"#));
        let endless = vec![b'{'; 3 * usize::try_from(MAX_LINE).unwrap()];
        assert_eq!(ask(&endless).lines().count(), 3);
    }

    #[test]
    fn disks_need_a_file_a_machine_and_known_fields() {
        let attach = b"{\"request\":{\"attach_disk\":{\"read_only\":true}}}\n";
        assert_eq!(ask(attach), "{\"error\":\"no file came with the request\"}\n");
        assert!(
            ask(b"{\"request\":{\"attach_disk\":{\"read_only\":true,\"x\":1}}}\n").contains("unknown field")
        );
        assert!(ask(b"{\"request\":{\"attach_disk\":{}}}\n").contains("missing field"));
        assert!(ask(b"{\"request\":{\"detach_disk\":{\"slot\":-1}}}\n").starts_with("{\"error\":"));
        assert!(ask(b"{\"request\":{\"detach_disk\":{\"slot\":11}}}\n").contains("not been made yet"));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        ours.send_with_fd(&attach[..], file.as_raw_fd()).unwrap();
        ours.shutdown(Shutdown::Write).unwrap();
        serve(&theirs, &handles()).unwrap();
        drop(theirs);
        let mut text = String::new();
        (&ours).read_to_string(&mut text).unwrap();
        assert!(text.contains("not been made yet"), "{text}");
    }

    fn stops(handles: &Handles) -> bool {
        let stopped = std::iter::repeat_with(|| {
            thread::sleep(Duration::from_millis(1));
            handles.stop.take()
        });
        matches!(stopped.take(2000).flatten().next(), Some(Outcome::Stopped))
    }

    #[test]
    fn shutdown_without_a_vsock_stops_the_machine() {
        let handles = handles();
        handles.shut_down();
        assert!(stops(&handles));
    }

    #[test]
    fn shutdown_does_not_wait_for_a_vsock_that_takes_no_clients() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("v");
        let service = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
        bind(service.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&service, Backlog::new(1).unwrap()).unwrap();
        let waiting: Vec<_> = std::iter::from_fn(|| host_socket::dial(&path).ok()).take(100).collect();
        assert!(waiting.len() < 100, "the backlog is full");
        let handles = Handles::new(Stop::new().unwrap(), Some(path));
        handles.shut_down();
        assert!(stops(&handles));
        handles.shut_down();
        assert!(handles.stop.take().is_none(), "one shutdown is enough");
    }

    fn door() -> Door {
        let spare = OwnedFd::from(File::open("/dev/null").unwrap());
        Door { handles: handles(), clients: Arc::default(), spare: Arc::new(Mutex::new(Some(spare))) }
    }

    #[test]
    fn client_is_served_when_descriptors_are_all_taken() {
        let door = door();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let none_left = || Err(io::Error::from_raw_os_error(libc::EMFILE));
        let mut accepted = [none_left(), Ok(theirs), none_left()].into_iter();
        door.admit(|| accepted.next().unwrap());
        assert!(door.spare().is_none());
        (&ours).write_all(b"{\"request\":\"status\"}\n").unwrap();
        ours.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        (&ours).read_to_string(&mut text).unwrap();
        assert!(text.starts_with("{\"error\":"), "{text}");
        let back = std::iter::repeat_with(|| {
            thread::sleep(Duration::from_millis(1));
            door.spare().is_some()
        });
        assert!(back.take(2000).any(|back| back), "the client's descriptor is the spare one now");
    }

    #[test]
    fn accept_that_fails_for_ever_ends() {
        door().admit(|| Err(io::Error::from_raw_os_error(libc::ENFILE)));
    }

    #[test]
    fn clients_beyond_the_limit_are_hung_up_on() {
        let door = door();
        let (mut ours, mut theirs): (Vec<_>, Vec<_>) =
            (0..=MAX_CLIENTS).map(|_| UnixStream::pair().unwrap()).unzip();
        door.admit(|| theirs.pop().ok_or_else(|| ErrorKind::WouldBlock.into()));
        // Taken from the end, so the first one is the one too many.
        assert_eq!(ours.remove(0).read(&mut [0]).unwrap(), 0);
    }
}
