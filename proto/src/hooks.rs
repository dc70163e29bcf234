//! Programs that are run in a container on its way to its start: `hooks` of an OCI runtime configuration. Those that
//! run outside of it are not a guest's.

use serde::{Deserialize, Serialize};

/// Most hooks of a container; each costs its start a process.
pub const MAX_HOOKS: usize = 64;
/// Seconds that the hooks of one point have together: less than the host waits for an answer.
pub const HOOKS_SECONDS: u32 = 50;

/// What is run when. An error of one is the end of the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hooks {
    /// `createContainer`: when the container's namespaces and mounts are made.
    pub create: Vec<Hook>,
    /// `startContainer`: right before its program.
    pub start: Vec<Hook>,
    /// What each reads on its standard input, the container's state (an object of JSON), without the closing brace: the
    /// agent adds `status` and `pid`.
    pub state: String,
}

/// A program of the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// Absolute path in the container.
    pub path: String,
    /// With the name of the program, which is `path` if there are none.
    pub args: Vec<String>,
    /// `NAME=value`; nothing else is in its environment.
    pub env: Vec<String>,
    /// Seconds after which it is killed, at most [`HOOKS_SECONDS`].
    pub timeout: Option<u32>,
}
