//! Copies a process's standard streams between vsock connections and this process's own descriptors.
//!
//! Each direction is a thread with one buffer: who does not read stops who writes, through the pipe of the process, and
//! nobody else. The connection's half-close is the end of a stream.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use krx_proto::Stream;

use crate::agent::CallError;
use crate::process::Process;
use crate::timings::Timings;

/// What one copy step moves: a pipe's capacity.
const BUFFER: usize = 64 << 10;
/// How long to wait for a stream in non-blocking mode.
const BLOCKED: Duration = Duration::from_millis(10);

/// Where the streams of a process come from and go to.
pub struct Ends {
    /// Not attached if `None`.
    pub input: Option<Box<dyn Read + Send>>,
    pub output: Box<dyn Write + Send>,
    /// `None` for a terminal, which has one output.
    pub error: Option<Box<dyn Write + Send>>,
}

/// Streams being copied.
#[derive(Debug)]
pub struct Copies(Vec<JoinHandle<()>>);

impl Copies {
    /// Connects the streams of a created process and starts to copy them. `timings` gets the first byte of output.
    ///
    /// # Errors
    /// The guest does not take a connection.
    pub fn start(process: &Process, ends: Ends, timings: &Arc<Timings>) -> Result<Self, CallError> {
        let Ends { input, output, error } = ends;
        let (main, error) = match error {
            Some(error) => (Stream::Stdout, Some((process.connect(Stream::Stderr)?, error))),
            None => (Stream::Terminal, None),
        };
        let main_socket = process.connect(main)?;
        if let Some(input) = input {
            let socket = match main {
                Stream::Terminal => main_socket.try_clone().map_err(|_| CallError::Lost)?,
                _ => process.connect(Stream::Stdin)?,
            };
            let half_close = main != Stream::Terminal;
            // Never joined: a read of a terminal or of a pipe whose writer lives ends only with this process.
            spawn("stdin", move || feed(input, &socket, half_close))?;
        }
        let first = FirstByte(Some(timings.clone()));
        let mut copies = vec![spawn("stdout", move || drain(main_socket, output, first))?];
        if let Some((socket, error)) = error {
            let first = FirstByte(Some(timings.clone()));
            copies.push(spawn("stderr", move || drain(socket, error, first))?);
        }
        Ok(Self(copies))
    }

    /// Waits until all output has been written.
    pub fn finish(self) {
        for copy in self.0 {
            let _ = copy.join();
        }
    }
}

/// Notes when the first byte of output has been written.
struct FirstByte(Option<Arc<Timings>>);

/// Name of the phase: only the first of several marks counts.
pub const FIRST_OUTPUT: &str = "first output byte";

impl FirstByte {
    fn written(&mut self) {
        if let Some(timings) = self.0.take() {
            timings.mark_once(FIRST_OUTPUT);
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, CallError> {
    thread::Builder::new().name(name.into()).spawn(body).map_err(|_| CallError::Lost)
}

/// Host to guest. The end of the input is the end of the stream, but not of a terminal, which has output to come.
fn feed(mut input: impl Read, mut socket: &UnixStream, half_close: bool) {
    let _ = copy(&mut input, &mut socket, || ());
    if half_close {
        let _ = socket.shutdown(Shutdown::Write);
    }
}

/// Guest to host. A reader that is gone ends the stream, so that the process in the guest hears of it.
fn drain(mut socket: UnixStream, mut output: impl Write, mut first: FirstByte) {
    let written = copy(&mut socket, &mut output, || first.written());
    if written.is_err() {
        let _ = socket.shutdown(Shutdown::Both);
    }
}

fn copy(from: &mut impl Read, to: &mut impl Write, mut moved: impl FnMut()) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                write_all(to, &buffer[..count])?;
                moved();
            }
            Err(error) => retry(error)?,
        }
    }
}

fn write_all(to: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) => retry(error)?,
        }
    }
    while let Err(error) = to.flush() {
        retry(error)?;
    }
    Ok(())
}

/// Errors that mean "again". The caller's streams may be in non-blocking mode, which another program sharing them has
/// set: then one waits, as nobody else will.
fn retry(error: io::Error) -> io::Result<()> {
    match error.kind() {
        ErrorKind::Interrupted => Ok(()),
        ErrorKind::WouldBlock => {
            thread::sleep(BLOCKED);
            Ok(())
        }
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Takes a bounded number of bytes, then fails as a pipe without reader does.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>, usize);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut taken = self.0.lock().unwrap();
            if self.1 > 0 && taken.len() >= self.1 {
                return Err(ErrorKind::BrokenPipe.into());
            }
            taken.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_is_copied_to_its_end() {
        let (guest, host) = UnixStream::pair().unwrap();
        let sink = Sink::default();
        let copied = sink.clone();
        let thread = thread::spawn(move || drain(host, copied, FirstByte(None)));
        let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
        (&guest).write_all(&bytes).unwrap();
        drop(guest);
        thread.join().unwrap();
        assert_eq!(*sink.0.lock().unwrap(), bytes);
    }

    #[test]
    fn reader_that_is_gone_ends_the_stream() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let thread = thread::spawn(move || drain(host, Sink(Arc::default(), 1), FirstByte(None)));
        guest.write_all(b"one").unwrap();
        let refused = (0..100).find_map(|_| {
            thread::sleep(std::time::Duration::from_millis(5));
            guest.write_all(&[0; 4096]).err()
        });
        assert!(refused.is_some());
        thread.join().unwrap();
    }

    #[test]
    fn non_blocking_streams_are_waited_for() {
        struct Slow(usize, Vec<u8>);
        impl Slow {
            fn turn(&mut self) -> io::Result<()> {
                self.0 += 1;
                if self.0 % 2 == 1 { Err(ErrorKind::WouldBlock.into()) } else { Ok(()) }
            }
        }
        impl Read for Slow {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                self.turn()?;
                let count = self.1.len().min(buffer.len()).min(3);
                buffer[..count].copy_from_slice(&self.1[..count]);
                self.1.drain(..count);
                Ok(count)
            }
        }
        impl Write for Slow {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.turn()?;
                self.1.extend_from_slice(&bytes[..2.min(bytes.len())]);
                Ok(2.min(bytes.len()))
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut sink = Slow(0, Vec::new());
        copy(&mut Slow(0, b"seven bytes".to_vec()), &mut sink, || ()).unwrap();
        assert_eq!(sink.1, b"seven bytes");
    }

    #[test]
    fn end_of_input_is_a_half_close() {
        let (guest, host) = UnixStream::pair().unwrap();
        feed(&b"input"[..], &host, true);
        let mut received = Vec::new();
        (&guest).read_to_end(&mut received).unwrap();
        assert_eq!(received, b"input");
        (&guest).write_all(b"output").unwrap();
    }
}
