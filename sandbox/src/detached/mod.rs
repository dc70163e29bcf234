//! Containers whose owner is a process of its own: what is kept of them ([`Records`]), what they have written ([`log`]), and
//! who looks on ([`relay`], [`attachment`]).
//!
//! All of it lies in `.kept/NAME` beside the pods' directories and not in them: a pod's own directory is its VMM's, too. A
//! guest that has taken over its VMM could put links there, and the log that root writes and reads would lead it to any file
//! of the host.

pub mod attachment;
pub mod log;
mod record;
pub mod relay;
mod wire;

use std::fs::File;
use std::io;
use std::process::Command;

use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

pub use record::{Ended, Keeping, Kept, Record, Records};
pub use wire::OutputStream;

use crate::sys;

/// Has only its standard streams go to a program that is started next: whoever waits for the end of another one would
/// wait for the end of the container.
///
/// # Errors
/// The kernel has no close_range(2) that can do so, which is one before 5.11.
pub fn isolate(program: &mut Command) -> io::Result<&mut Command> {
    // What this process has open and means to pass on is made inheritable after this, by the spawn.
    sys::close_at_exec(3)?;
    Ok(program)
}

/// Lets go of the caller's standard input, output and error.
///
/// # Errors
/// There is no `/dev/null`.
pub fn let_go() -> io::Result<()> {
    let nowhere = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&nowhere)?;
    dup2_stdout(&nowhere)?;
    dup2_stderr(&nowhere)?;
    Ok(())
}
