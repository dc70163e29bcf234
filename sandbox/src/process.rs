//! A process of a container, by its name: what can be done with it, over whichever connection to the agent.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use krx_proto::{
    Answer, ExitStatus, ProcessSpec, Request, Stream, StreamHello, TerminalSize, port, write_frame,
};

use crate::agent::{AgentClient, CallError, Pending, accepted, dial};

/// A process in a container of a pod.
#[derive(Debug, Clone)]
pub struct Process {
    agent: Arc<AgentClient>,
    vsock: PathBuf,
    container: String,
    process: String,
}

impl Process {
    #[must_use]
    pub fn new(agent: Arc<AgentClient>, vsock: PathBuf, container: &str, process: &str) -> Self {
        Self { agent, vsock, container: container.into(), process: process.into() }
    }

    /// Makes this a further process of its container, stopped before its exec.
    ///
    /// # Errors
    /// The agent refuses, or is gone.
    pub fn exec(&self, spec: ProcessSpec) -> Result<(), CallError> {
        let (container, process) = (self.container.clone(), self.process.clone());
        self.agent.send(Request::Exec { container, process, spec: Box::new(spec) })?.answer().map(drop)
    }

    /// Connects one of its standard streams; to be done before the start, so that no byte is held up.
    ///
    /// # Errors
    /// The guest does not take the connection.
    pub fn connect(&self, stream: Stream) -> Result<UnixStream, CallError> {
        let socket = self.ask_for(stream)?;
        accepted(&socket, port::STREAM)?;
        Ok(socket)
    }

    /// Connects several, in one round trip to the guest.
    ///
    /// # Errors
    /// As [`Self::connect`], of any of them.
    pub fn connect_all(&self, streams: &[Stream]) -> Result<Vec<UnixStream>, CallError> {
        let sockets = streams.iter().map(|stream| self.ask_for(*stream)).collect::<Result<Vec<_>, _>>()?;
        sockets.iter().try_for_each(|socket| accepted(socket, port::STREAM))?;
        Ok(sockets)
    }

    fn ask_for(&self, stream: Stream) -> Result<UnixStream, CallError> {
        let mut socket = dial(&self.vsock, port::STREAM)?;
        let (container, process) = (self.container.clone(), self.process.clone());
        write_frame(&mut socket, &StreamHello { container, process, stream }).map_err(CallError::Send)?;
        Ok(socket)
    }

    /// Lets it exec.
    ///
    /// # Errors
    /// Its program does not exist or cannot be executed; the agent is gone.
    pub fn start(&self) -> Result<(), CallError> {
        let (container, process) = (self.container.clone(), self.process.clone());
        self.agent.send(Request::Start { container, process })?.done()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The agent is gone.
    pub fn wait(&self) -> Result<ExitStatus, CallError> {
        let (container, process) = (self.container.clone(), self.process.clone());
        match self.agent.send(Request::Wait { container, process })?.outcome()? {
            Answer::Exited(status) => Ok(status),
            _ => Err(CallError::Unexpected),
        }
    }

    /// Sends it a signal without waiting for the agent's reply: it may be about to end.
    ///
    /// # Errors
    /// The agent is gone.
    pub fn forward(&self, signal: i32) -> Result<Pending, CallError> {
        let (container, process) = (self.container.clone(), self.process.clone());
        self.agent.send(Request::Signal { container, process, signal, all: false })
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// No such process, no such signal.
    pub fn kill(&self, signal: i32) -> Result<(), CallError> {
        let (container, process) = (self.container.clone(), self.process.clone());
        self.agent.send(Request::Signal { container, process, signal, all: false })?.done()
    }

    /// Tells its terminal a new size.
    pub fn resize(&self, size: TerminalSize) {
        let (container, process) = (self.container.clone(), self.process.clone());
        let _ = self.agent.send(Request::Resize { container, process, size });
    }

    /// Forgets it after its end.
    ///
    /// # Errors
    /// It still runs.
    pub fn delete(&self) -> Result<(), CallError> {
        let (container, process) = (self.container.clone(), self.process.clone());
        self.agent.send(Request::Delete { container, process })?.done()
    }
}
