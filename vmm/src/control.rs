//! The VMM's control socket: one JSON request a line, one JSON answer a line.
//!
//! Each client is served on a short-lived thread of its own, never on the event loop: pausing waits for the vCPUs,
//! and a vCPU may be waiting for the loop.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::event_loop::{Stop, Subscriber, on_readable};
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
#[serde(rename_all = "snake_case")]
enum Request {
    Pause,
    Resume,
    Shutdown,
    Status,
    Timings,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Ok(&'static str),
    Phases(Vec<Reached>),
    Error(String),
}

/// What a request can do to the machine.
#[derive(Debug, Clone)]
pub struct Handles {
    /// `None` until the vCPUs have been started.
    pub vcpus: Arc<Mutex<Option<Arc<Vcpus>>>>,
    pub stop: Stop<Outcome>,
    /// Socket of the vsock device, to reach the guest's power button.
    pub vsock: Option<PathBuf>,
}

impl Handles {
    fn with_vcpus<T>(&self, action: impl FnOnce(&Vcpus) -> T) -> Option<T> {
        let vcpus = self.vcpus.lock().unwrap_or_else(PoisonError::into_inner).clone();
        vcpus.as_deref().map(action)
    }

    /// Asks the guest to power off, and stops the machine when it has not within [`SHUTDOWN_GRACE`]. Returns at
    /// once.
    pub fn shut_down(&self) {
        let handles = self.clone();
        let spawned = thread::Builder::new().name("krx-shutdown".into()).spawn(move || {
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

/// Connects to the guest's power port, as any client of the vsock socket could.
fn press_power_button(socket: &Path) -> io::Result<UnixStream> {
    let mut connection = UnixStream::connect(socket)?;
    writeln!(connection, "CONNECT {}", krx_proto::port::POWER)?;
    Ok(connection)
}

/// Listens at `path`, replacing what a dead VMM has left there.
///
/// # Errors
/// When the socket cannot be made, or another process listens on it.
pub fn listen(path: &Path, handles: Handles) -> io::Result<Subscriber> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens on it"));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    let clients = Arc::new(AtomicUsize::new(0));
    Ok(on_readable(listener.as_raw_fd(), move || {
        if let Ok((client, _)) = listener.accept() {
            serve_on_thread(client, &handles, &clients);
        }
    }))
}

fn serve_on_thread(client: UnixStream, handles: &Handles, clients: &Arc<AtomicUsize>) {
    if clients.fetch_add(1, Ordering::SeqCst) >= MAX_CLIENTS {
        clients.fetch_sub(1, Ordering::SeqCst);
        return;
    }
    let (handles, clients) = (handles.clone(), Arc::clone(clients));
    let count = Arc::clone(&clients);
    let spawned = thread::Builder::new().name("krx-control".into()).spawn(move || {
        // A client that goes away in the middle is its own affair.
        let _ = serve(&client, &handles);
        count.fetch_sub(1, Ordering::SeqCst);
    });
    if let Err(error) = spawned {
        clients.fetch_sub(1, Ordering::SeqCst);
        report::warn("Control client not served", &error);
    }
}

fn serve(client: &UnixStream, handles: &Handles) -> io::Result<()> {
    client.set_nonblocking(false)?;
    client.set_read_timeout(Some(IDLE))?;
    client.set_write_timeout(Some(IDLE))?;
    let mut reader = BufReader::new(client);
    loop {
        let mut line = Vec::new();
        if (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let answer = answer(&line, handles);
        let mut text = serde_json::to_vec(&answer).map_err(io::Error::other)?;
        text.push(b'\n');
        (&*client).write_all(&text)?;
    }
}

fn answer(line: &[u8], handles: &Handles) -> Answer {
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
    use super::*;

    fn handles() -> Handles {
        Handles { vcpus: Arc::default(), stop: Stop::new().unwrap(), vsock: None }
    }

    fn ask(request: &[u8]) -> String {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&ours).write_all(request).unwrap();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
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
    fn malformed_and_endless_requests_get_an_error() {
        assert!(ask(b"pause\n").starts_with(r#"{"error":"#));
        assert!(ask(b"{\"request\":\"explode\"}\n").starts_with(r#"{"error":"#));
        let endless = vec![b'{'; 3 * usize::try_from(MAX_LINE).unwrap()];
        assert_eq!(ask(&endless).lines().count(), 3);
    }

    #[test]
    fn shutdown_without_a_vsock_stops_the_machine() {
        let handles = handles();
        handles.shut_down();
        let stopped = std::iter::repeat_with(|| {
            thread::sleep(Duration::from_millis(1));
            handles.stop.take()
        });
        assert!(matches!(stopped.take(5000).flatten().next(), Some(Outcome::Stopped)));
    }
}
