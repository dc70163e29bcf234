//! The standard streams of a process, between the guest and containerd's FIFOs, a file, or a logging program.
//!
//! Each stream is a task of its own with one buffer: who does not read stops who writes, through the pipe of the process in
//! the guest, and nobody else.

use std::fs::{DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::time::Duration;

use krx_proto::Stream;
use krx_sandbox::agent::CallError;
use krx_sandbox::process::Process;
use nix::fcntl::OFlag;
use tokio::fs::File;
use tokio::io::{self, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::error::{Result, ShimError};
use crate::log_uri::LogUri;
use crate::logger::{Logger, Owner};

/// What one step moves, half of what a pipe holds; it takes memory as long as bytes are on their way.
const BUFFER: usize = 32 << 10;
/// How long output may be on its way once its process has ended. Another process may hold on to the stream for ever.
const LAST_OUTPUT: Duration = Duration::from_secs(10);

/// Where containerd has the other ends: paths of FIFOs, or for output a log URI; empty for what there is not.
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

/// Where output goes, opened.
pub(crate) struct Outputs {
    stdout: Output,
    stderr: Output,
    logger: Option<Logger>,
}

type Output = Box<dyn AsyncWrite + Send + Unpin>;

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
    /// Sees to the end of the logging program.
    logger: Option<JoinHandle<()>>,
}

impl Stdio {
    /// Refuses what is neither a FIFO nor a log URI: files, devices, and what does not exist.
    pub(crate) fn check(&self) -> Result<()> {
        if LogUri::parse(&self.stdin)?.is_some() {
            return Err(ShimError::invalid(format!(
                "Standard input {:.200} is a log URI: containerd has to give a FIFO",
                self.stdin
            )));
        }
        let logged = LogUri::parse(&self.stdout)?.is_some();
        if self.stderr != self.stdout
            && (LogUri::parse(&self.stderr)?.is_some() || logged && !self.stderr.is_empty())
        {
            return Err(ShimError::invalid(
                "Standard output and error have different log URIs: they have to be the same, or FIFOs",
            ));
        }
        let outputs = if logged { [""; 2] } else { [self.stdout.as_str(), &self.stderr] };
        for path in outputs.into_iter().chain([self.stdin.as_str()]) {
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

    /// Opens where output goes, and starts the program that takes it.
    pub(crate) async fn open(&self, owner: Owner<'_>) -> Result<Outputs> {
        let (stdout, stderr, logger): (Output, Output, _) = match LogUri::parse(&self.stdout)? {
            None => (fifo(&self.stdout)?, fifo(&self.stderr)?, None),
            Some(LogUri::File(path)) => (Box::new(append(&path)?), Box::new(append(&path)?), None),
            Some(LogUri::Program { path, arguments }) => {
                let (logger, streams) = Logger::start(&path, &arguments, owner).await?;
                (Box::new(streams.stdout), Box::new(streams.stderr), Some(logger))
            }
        };
        Ok(Outputs { stdout, stderr, logger })
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
    pub(crate) fn copy(&self, connected: Connected, outputs: Outputs) -> Result<Copies> {
        let mut copies = Copies::default();
        if let Some(input) = connected.input {
            copies.waiting_input = Some((asynchronous(input)?, self.clone()));
        }
        // Held by the copies, and closed by the last of them.
        let (going_on, mut ended) = mpsc::channel(1);
        let error = connected.error.map(asynchronous).transpose()?;
        copies.outputs.push(output(asynchronous(connected.output)?, outputs.stdout, going_on.clone()));
        if let Some(error) = error {
            copies.outputs.push(output(error, outputs.stderr, going_on));
        }
        copies.logger = outputs.logger.map(|logger| {
            tokio::spawn(async move {
                let _ = ended.recv().await;
                logger.end().await;
            })
        });
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
        // It has its own limits.
        if let Some(logger) = self.logger.take() {
            let _ = logger.await;
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

fn fifo(path: &str) -> Result<Output> {
    if path.is_empty() {
        return Ok(Box::new(io::sink()));
    }
    // Read, too: a containerd that restarts leaves the FIFO without a reader for a while, which is no error.
    Ok(Box::new(open(path, |_, path| pipe::OpenOptions::new().read_write(true).open_sender(path))?))
}

/// A log file, made with its directories if it is not there. Each stream has an opening of its own: what they append
/// does not overwrite the other's.
fn append(path: &Path) -> Result<File> {
    let opened = || {
        if let Some(directory) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
        }
        // A FIFO without a reader is not to be waited for.
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o644).custom_flags(OFlag::O_NONBLOCK.bits());
        let file = options.open(path)?;
        if file.metadata()?.is_file() { Ok(file) } else { Err(std::io::Error::other("it is no file")) }
    };
    let refused =
        |error| ShimError::invalid(format!("Log file {} cannot be opened: {error}", path.display()));
    opened().map(File::from_std).map_err(refused)
}

fn output(from: UnixStream, mut to: Output, going_on: mpsc::Sender<()>) -> JoinHandle<()> {
    tokio::spawn(async move {
        let _ = io::copy_buf(&mut BufReader::with_capacity(BUFFER, from), &mut to).await;
        // A file has still to write what it was given.
        let _ = to.shutdown().await;
        drop((to, going_on));
    })
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
    }

    #[test]
    fn a_log_uri_is_for_both_outputs() {
        let uri = "binary:///bin/log?x=y";
        let with = |stdin: &str, stdout: &str, stderr: &str| Stdio {
            stdin: stdin.into(),
            stdout: stdout.into(),
            stderr: stderr.into(),
            terminal: false,
        };
        assert!(with("", uri, uri).check().is_ok() && with("", uri, "").check().is_ok());
        for odd in
            [with(uri, "", ""), with("", "", uri), with("", uri, "/dev/null"), with("", uri, "file:///x")]
        {
            assert!(odd.check().is_err(), "{odd:?}");
        }
    }

    #[tokio::test]
    async fn both_streams_are_appended_to_a_file() {
        let directory = std::env::temp_dir().join(format!("krx-log-{}", std::process::id()));
        let path = directory.join("a/log");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "before\n").unwrap();
        let uri = format!("file://{}", path.display());
        let stdio = Stdio { stdout: uri.clone(), stderr: uri, ..Stdio::default() };
        let outputs = stdio.open(Owner { namespace: "n", id: "i" }).await.unwrap();
        let ((out, mut to_out), (err, mut to_err)) =
            (StdUnixStream::pair().unwrap(), StdUnixStream::pair().unwrap());
        let copies = stdio.copy(Connected { input: None, output: out, error: Some(err) }, outputs).unwrap();
        std::io::Write::write_all(&mut to_out, b"one\n").unwrap();
        std::io::Write::write_all(&mut to_err, b"two\n").unwrap();
        drop((to_out, to_err));
        copies.finish().await;
        let mut lines: Vec<_> = std::fs::read_to_string(&path).unwrap().lines().map(String::from).collect();
        lines.sort_unstable();
        assert_eq!(lines, ["before", "one", "two"]);
        assert!(append(&directory).is_err(), "a directory");
        std::fs::remove_dir_all(directory).unwrap();
    }
}
