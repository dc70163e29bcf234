//! What an owner and who looks on say to each other, on the owner's socket: a hello, its answer, and from then on notices one
//! way and the bytes of the input the other. Frames are the agent protocol's, and capped as those are.

use serde::{Deserialize, Serialize};

/// Both are to have the same: an owner lives on when krx is replaced by another version.
pub(crate) const VERSION: u16 = 1;
/// Most bytes of output in one notice.
pub(crate) const MAX_OUTPUT: usize = 64 << 10;

/// Where output comes out. A terminal has the first only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OutputStream {
    Stdout,
    Stderr,
}

/// The first word of who looks on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub version: u16,
    /// Wants what is written, and not just the end.
    pub output: bool,
}

/// The first word of the owner.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Welcome {
    pub version: u16,
    pub terminal: bool,
    /// Takes bytes for the standard input.
    pub input: bool,
    /// There are too many who look on already.
    pub full: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Notice {
    /// So many bytes follow.
    Output {
        stream: OutputStream,
        length: u32,
    },
    /// So many were left out, as they were not taken.
    Missed(u64),
    Ended(u8),
}
