//! The standard streams of a process, between containerd's FIFOs and the guest.
//!
//! Each stream is a task of its own with one buffer: who does not read stops who writes, through the pipe of the process in
//! the guest, and nobody else.

use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use krx_proto::Stream;
use krx_sandbox::agent::CallError;
use krx_sandbox::process::Process;
use tokio::io::{self, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::error::{Result, ShimError};

/// What one step moves, half of what a pipe holds; it takes memory as long as bytes are on their way.
const BUFFER: usize = 32 << 10;
/// How long output may be on its way once its process has ended. Another process may hold on to the stream for ever.
const LAST_OUTPUT: Duration = Duration::from_secs(10);

/// Where containerd has the other ends: paths of FIFOs, empty for what there is not.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stdio {
    pub(crate) terminal: bool,
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Connections to a process's streams in the guest.
#[derive(Debug)]
pub(crate) struct Connected {
    input: Option<StdUnixStream>,
    output: StdUnixStream,
    error: Option<StdUnixStream>,
}

/// Streams being copied.
#[derive(Debug, Default)]
pub(crate) struct Copies {
    /// The guest's end of the input, and the FIFO, until the process is started.
    waiting_input: Option<(UnixStream, Stdio)>,
    /// Our own writing end of the input: without it a client that goes would be the end of the input.
    keep_input: Option<pipe::Sender>,
    /// The end of the input was told before the process was started.
    input_closed: bool,
    input: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
}

impl Stdio {
    /// Refuses what is no FIFO: URIs of logging programs, files, devices, and what does not exist.
    pub(crate) fn check(&self) -> Result<()> {
        for path in [&self.stdin, &self.stdout, &self.stderr] {
            if let Some((scheme, _)) = path.split_once("://") {
                return Err(ShimError::unimplemented(format!(
                    "Standard streams by {scheme}:// are not supported: containerd has to give FIFOs"
                )));
            }
            if path.is_empty() {
                continue;
            }
            let kind = std::fs::metadata(path)
                .map_err(|error| ShimError::invalid(format!("FIFO {path} cannot be used: {error}")))?;
            if !kind.file_type().is_fifo() {
                return Err(ShimError::invalid(format!("Standard stream {path} is not a FIFO")));
            }
        }
        Ok(())
    }

    /// Connects to the streams of a created process; blocks for a round trip to the guest. A stream that containerd
    /// does not want is connected, too: a process whose output nobody takes would wait when its pipe is full.
    pub(crate) fn connect(&self, process: &Process) -> std::result::Result<Connected, CallError> {
        if self.terminal {
            let output = process.connect(Stream::Terminal)?;
            let input = output.try_clone().map_err(|_| CallError::Lost)?;
            return Ok(Connected { input: (!self.stdin.is_empty()).then_some(input), output, error: None });
        }
        let input = (!self.stdin.is_empty()).then_some(Stream::Stdin);
        let streams: Vec<_> = [Stream::Stdout, Stream::Stderr].into_iter().chain(input).collect();
        let mut sockets = process.connect_all(&streams)?.into_iter();
        let (Some(output), error) = (sockets.next(), sockets.next()) else {
            return Err(CallError::Unexpected);
        };
        Ok(Connected { input: sockets.next(), output, error })
    }

    /// Begins to copy output.
    pub(crate) fn copy(&self, connected: Connected) -> Result<Copies> {
        let mut copies = Copies::default();
        if let Some(input) = connected.input {
            copies.waiting_input = Some((asynchronous(input)?, self.clone()));
        }
        copies.outputs.push(output(&self.stdout, connected.output)?);
        if let Some(error) = connected.error {
            copies.outputs.push(output(&self.stderr, error)?);
        }
        Ok(copies)
    }
}

impl Copies {
    /// Begins to copy input. Not before the process is started: a client whose input is at its end says so to the task,
    /// which it does not know before it is created.
    pub(crate) fn begin_input(&mut self) -> Result<()> {
        let Some((to, Stdio { terminal, stdin, .. })) = self.waiting_input.take() else { return Ok(()) };
        let from = open(&stdin, |options, path| options.open_receiver(path))?;
        // There is a reader now, so this does not fail for want of one. One that is dropped again makes the end of the
        // input, which a FIFO has not before its first writer.
        let sender = open(&stdin, |options, path| options.open_sender(path))?;
        self.keep_input = (!self.input_closed).then_some(sender);
        self.input = Some(tokio::spawn(feed(from, to, !terminal)));
        Ok(())
    }

    /// What was written is still delivered; then the process has the end of its input.
    pub(crate) fn close_input(&mut self) {
        self.input_closed = true;
        self.keep_input = None;
    }

    /// Waits until all output has been delivered.
    pub(crate) async fn finish(mut self) {
        for mut copy in self.outputs.drain(..) {
            if timeout(LAST_OUTPUT, &mut copy).await.is_err() {
                copy.abort();
            }
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.outputs.iter().chain(&self.input).for_each(JoinHandle::abort);
    }
}

fn open<T>(path: &str, open: impl FnOnce(&pipe::OpenOptions, &str) -> std::io::Result<T>) -> Result<T> {
    open(&pipe::OpenOptions::new(), path)
        .map_err(|error| ShimError::invalid(format!("FIFO {path} cannot be opened: {error}")))
}

fn asynchronous(socket: StdUnixStream) -> Result<UnixStream> {
    socket
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(socket))
        .map_err(|error| ShimError::internal(format!("Stream cannot be used: {error}")))
}

/// Host to guest. The end of the input is the end of the stream, but not of a terminal, which has output to come.
async fn feed(from: pipe::Receiver, mut to: UnixStream, half_close: bool) {
    let _ = io::copy_buf(&mut BufReader::with_capacity(BUFFER, from), &mut to).await;
    if half_close {
        let _ = to.shutdown().await;
    }
}

fn output(path: &str, from: StdUnixStream) -> Result<JoinHandle<()>> {
    let mut from = BufReader::with_capacity(BUFFER, asynchronous(from)?);
    if path.is_empty() {
        return Ok(tokio::spawn(async move {
            let _ = io::copy_buf(&mut from, &mut io::sink()).await;
        }));
    }
    // Read, too: a containerd that restarts leaves the FIFO without a reader for a while, which is no error.
    let mut to = pipe::OpenOptions::new()
        .read_write(true)
        .open_sender(path)
        .map_err(|error| ShimError::invalid(format!("FIFO {path} cannot be opened: {error}")))?;
    Ok(tokio::spawn(async move {
        let _ = io::copy_buf(&mut from, &mut to).await;
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_input_that_is_closed_before_the_start_stays_closed() {
        let fifo = std::env::temp_dir().join(format!("krx-closed-{}", std::process::id()));
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let stdio = Stdio { stdin: fifo.to_str().unwrap().into(), ..Stdio::default() };
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut copies = Copies::default();
        copies.waiting_input = Some((theirs, stdio));
        copies.close_input();
        copies.begin_input().unwrap();
        std::fs::remove_file(&fifo).unwrap();
        let mut ours = BufReader::new(ours);
        let ended = timeout(Duration::from_secs(5), io::copy_buf(&mut ours, &mut io::sink())).await;
        assert!(ended.is_ok(), "the process waits for input");
    }

    #[test]
    fn what_is_no_fifo_is_refused() {
        let with = |stdout: &str| Stdio { stdout: stdout.into(), ..Stdio::default() };
        let fifo = std::env::temp_dir().join(format!("krx-fifo-{}", std::process::id()));
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(with(fifo.to_str().unwrap()).check().is_ok() && with("").check().is_ok());
        std::fs::remove_file(&fifo).unwrap();
        for path in [fifo.to_str().unwrap(), "/dev/zero", "/etc/passwd", "/"] {
            assert!(with(path).check().unwrap_err().to_string().contains("FIFO"), "{path}");
        }
        assert!(with("binary:///bin/log?x=y").check().unwrap_err().to_string().contains("binary://"));
    }
}
