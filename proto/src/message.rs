//! What is said: calls of the host, replies of the agent, and the header of a stream.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::network::NetworkSpec;
use crate::resources::Resources;
use crate::spec::{ContainerSpec, ProcessSpec, TerminalSize};
use crate::stats::Stats;

/// From the agent to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// First on every control connection. Variant zero with the version first, in every version to come.
    Hello { version: u16, guest: GuestInfo },
    /// The answer to the call of that number.
    Reply { number: u32, result: Result<Answer, AgentError> },
}

/// What the guest says of itself; shown to people, never relied on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInfo {
    /// Kernel release as `uname -r` prints it.
    pub kernel: String,
    /// Memory the guest kernel manages, in KiB.
    pub memory_kib: u64,
    /// Online CPUs.
    pub cpus: u32,
    /// Guest's `CLOCK_BOOTTIME` when the agent was ready, in nanoseconds.
    pub uptime_ns: u64,
}

/// From the host to the agent. `number` is the host's to choose; the reply carries it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    pub number: u32,
    pub request: Request,
}

/// A process is named by its container's id and its own; a container's first process has the empty id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Makes the container and its first process, stopped just before its exec (OCI `create`).
    Create(Box<ContainerSpec>),
    /// Makes a further process in a running container, stopped just before its exec.
    Exec { container: String, process: String, spec: Box<ProcessSpec> },
    /// Lets a created process exec. Answered once the exec succeeded or failed.
    Start { container: String, process: String },
    /// Answered with [`Answer::Exited`] when the process has ended; at once if it has already.
    Wait { container: String, process: String },
    /// Sends a signal to one process, or to all of the container.
    Signal { container: String, process: String, signal: i32, all: bool },
    /// Sets the window size of a process's terminal.
    Resize { container: String, process: String, size: TerminalSize },
    /// Forgets an ended process; the first process's id deletes the container.
    Delete { container: String, process: String },
    /// All processes of all containers.
    List,
    /// Ends every container, syncs and powers off. Answered before it begins.
    Shutdown,
    /// Changes limits of a container; what is not said stays as it is.
    Update { container: String, resources: Box<Resources> },
    /// What a container uses; all containers together, and the guest, where the id is empty.
    Stats { container: String },
    /// Answered with [`Answer::OomKills`] when the kernel has killed more than `seen` processes of the container for
    /// want of memory; before the answer to a wait for a process that it killed.
    WaitOom { container: String, seen: u64 },
    /// The processes in a container's cgroup, whoever made them. Answered with [`Answer::Pids`].
    Pids { container: String },
    /// Stops every process of a container where it is, or lets all go on. Answered when that is the case.
    Freeze { container: String, frozen: bool },
    /// Brings the copies of a live volume (see [`Mount`](crate::Mount)) up to date: those of the share's directory
    /// `path`, whose `..data` leads to `target` now. Answered when readers in containers see it.
    Refresh { path: String, target: String },
    /// Gives the guest itself what containers without namespaces of their own find: its host name (where one is given) and
    /// kernel parameters.
    Identity { hostname: Option<String>, sysctls: Vec<(String, String)> },
    /// Has the guest's kernel let go of a disk (see [`Disk`](crate::Disk)), so that it can be taken away. Refused
    /// ([`ErrorKind::WrongState`]) while something in the guest uses it.
    ReleaseDisk { slot: u32 },
    /// Gives the guest the network of the pod; once, before containers are made that are to find it.
    Network(Box<NetworkSpec>),
    /// Moves the guest's `CLOCK_REALTIME` by so many nanoseconds: half a second and more at once, less little by little. Zero
    /// leaves it. Answered with [`Answer::Clock`].
    Clock { adjust_ns: i64 },
}

/// What a successful call returns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Nothing to say beyond that it is done.
    Done,
    /// The process exists; its PID in the guest's root PID namespace.
    Created {
        pid: u32,
    },
    /// The process has ended.
    Exited(ExitStatus),
    Processes(Vec<ProcessInfo>),
    Stats(Box<Stats>),
    /// Processes of the container that were killed for want of memory since it was made.
    OomKills(u64),
    /// PIDs in the guest's root PID namespace, at most [`MAX_PIDS`].
    Pids(Vec<u32>),
    /// What the guest's `CLOCK_REALTIME` says, in nanoseconds since 1970.
    Clock {
        unix_ns: i64,
    },
}

/// Most PIDs of an answer, Linux' own default for the most there can be (`pid_max`).
pub const MAX_PIDS: usize = 32_768;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It called `exit` with this code (0 to 255).
    Code(u8),
    /// A signal ended it.
    Signal(u8),
}

impl ExitStatus {
    /// The exit code a shell would report: the code itself, or 128 plus the signal.
    #[must_use]
    pub fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// One process, for listings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    pub container: String,
    pub process: String,
    pub pid: u32,
    pub state: ProcessState,
}

/// Life of a process: created, running, exited, in that order; and running, but in a frozen container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProcessState {
    Created,
    Running,
    Exited(ExitStatus),
    Frozen,
}

/// Why the agent refused or failed; the kind decides exit codes and RPC statuses, the message is for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct AgentError {
    pub kind: ErrorKind,
    pub message: String,
}

impl AgentError {
    pub fn new(kind: ErrorKind, message: impl fmt::Display) -> Self {
        Self { kind, message: message.to_string() }
    }
}

/// What sort of failure it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    /// No such container or process.
    NotFound,
    /// The id is taken.
    Exists,
    /// The request is malformed or asks for what cannot be.
    Invalid,
    /// The process is not in the state the request needs.
    WrongState,
    /// The program does not exist in the container (shell code 127).
    CommandNotFound,
    /// The program exists and cannot be executed (shell code 126).
    NotExecutable,
    /// Anything else; the message has the guest's own error.
    Failed,
}

/// First and only frame on a stream connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamHello {
    pub container: String,
    pub process: String,
    pub stream: Stream,
}

/// Which of a process's standard streams a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    Stdin,
    Stdout,
    Stderr,
    /// Both directions of a terminal.
    Terminal,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shell_code_is_the_code_or_128_plus_the_signal() {
        assert_eq!(ExitStatus::Code(7).shell_code(), 7);
        assert_eq!(ExitStatus::Signal(9).shell_code(), 137);
        assert_eq!(ExitStatus::Signal(200).shell_code(), 255);
    }
}
