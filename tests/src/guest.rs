//! The init that misbehaves: what it can be told to do instead of being an agent (`guest-agent/examples/odd-init.rs`).

use std::fs;
use std::path::PathBuf;

use crate::scratch::Scratch;
use crate::{Host, image};

/// File of the initramfs that names the misbehaviour.
pub const MODE_FILE: &str = "/mode";

/// A guest's misbehaviour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// PID 1 ends: the kernel panics.
    Exit,
    /// Reaches PID 1 and never says hello.
    Silent,
    /// Says hello in another version of the protocol.
    Version,
    /// Sends a frame of 4 GiB.
    Huge,
    /// Sends bytes that are no frame.
    Garbage,
    /// Says hello, answers nothing.
    Mute,
    /// Says hello, then answers calls that were never made.
    Liar,
    /// Hangs up and dials again for ever.
    Redial,
}

impl Mode {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Exit => "exit",
            Self::Silent => "silent",
            Self::Version => "version",
            Self::Huge => "huge",
            Self::Garbage => "garbage",
            Self::Mute => "mute",
            Self::Liar => "liar",
            Self::Redial => "redial",
        }
    }
}

/// An initramfs whose init does `mode`.
///
/// # Panics
/// When it is not built.
#[must_use]
pub fn initramfs(host: &Host, scratch: &Scratch, mode: Mode) -> PathBuf {
    let mut archive = fs::read(host.odd_initramfs()).expect("target/guest/odd-initramfs.cpio: run make test");
    archive.extend(image::cpio(&MODE_FILE[1..], mode.name().as_bytes()));
    scratch.write("initramfs.cpio", archive)
}
