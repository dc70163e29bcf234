//! A connection to the owner of a detached container, to look on and to type.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use krx_proto::{FrameError, read_frame, write_frame};

use super::OutputStream;
use super::wire::{Hello, MAX_OUTPUT, Notice, VERSION, Welcome};

/// The owner answers at once.
const ANSWER: Duration = Duration::from_secs(10);

/// Why one cannot look on.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("Cannot reach the owner of the container at {path}")]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("The owner of the container does not answer")]
    Silent(#[source] FrameError),
    #[error("The container was started by another version of krx: `krx logs -f` shows its output")]
    Version,
    #[error("Too many look on already: `krx logs -f` shows the output, too")]
    Full,
    #[error("The owner of the container is gone, and the container with it")]
    Gone,
}

/// What an owner tells.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    Output(OutputStream, Vec<u8>),
    /// So many bytes were left out.
    Missed(u64),
    /// With the exit status.
    Ended(u8),
}

/// A connection to an owner.
#[derive(Debug)]
pub struct Attachment {
    socket: UnixStream,
    /// The container has a terminal.
    pub terminal: bool,
    /// It has an input.
    pub input: bool,
}

impl Attachment {
    /// Connects, to hear of the end, and of what is written where `output` says so.
    ///
    /// # Errors
    /// There is no owner, or one that does not take us.
    pub fn open(path: &Path, output: bool) -> Result<Self, AttachError> {
        let connect = || {
            let socket = UnixStream::connect(path)?;
            socket.set_read_timeout(Some(ANSWER))?;
            Ok(socket)
        };
        let failed = |source| AttachError::Connect { path: path.into(), source };
        let mut socket = connect().map_err(failed)?;
        write_frame(&mut socket, &Hello { version: VERSION, output }).map_err(AttachError::Silent)?;
        let welcome: Welcome = read_frame(&mut socket).map_err(AttachError::Silent)?;
        if welcome.version != VERSION {
            return Err(AttachError::Version);
        }
        if welcome.full {
            return Err(AttachError::Full);
        }
        socket.set_read_timeout(None).map_err(failed)?;
        Ok(Self { socket, terminal: welcome.terminal, input: welcome.input })
    }

    /// Waits for what comes next.
    ///
    /// # Errors
    /// The owner is gone without a word, or this end was closed.
    pub fn next_event(&mut self) -> Result<Event, AttachError> {
        match read_frame(&mut self.socket) {
            Ok(Notice::Output { stream, length }) => {
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                if length > MAX_OUTPUT {
                    return Err(AttachError::Gone);
                }
                let mut bytes = vec![0; length];
                self.socket.read_exact(&mut bytes).map_err(|_| AttachError::Gone)?;
                Ok(Event::Output(stream, bytes))
            }
            Ok(Notice::Missed(bytes)) => Ok(Event::Missed(bytes)),
            Ok(Notice::Ended(code)) => Ok(Event::Ended(code)),
            Err(_) => Err(AttachError::Gone),
        }
    }

    /// Where to write what is typed. Its being shut down ends the connection.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn input(&self) -> io::Result<UnixStream> {
        self.socket.try_clone()
    }
}
