//! Locks between processes: of whole files, of ranges by process, of ranges by open file.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

use nix::fcntl::{FcntlArg, fcntl};

use super::children::Other;
use super::{Ground, Outcome, check, refused, same};

/// The first bytes of a file, which the other process locks.
const LOCKED: i64 = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Exclusive,
    Shared,
    /// By process (`F_SETLK`).
    Process,
    /// By open file (`F_OFD_SETLK`).
    OpenFile,
}

impl Kind {
    pub(super) fn named(name: &str) -> Outcome<Self> {
        Ok(match name {
            "exclusive" => Self::Exclusive,
            "shared" => Self::Shared,
            "process" => Self::Process,
            "open-file" => Self::OpenFile,
            _ => return Err(format!("no such lock: {name}").into()),
        })
    }
}

/// Takes a lock, however long it takes.
pub(super) fn wait_for(file: &File, kind: Kind) -> Outcome {
    let lock = range(libc::F_WRLCK, 0, LOCKED);
    match kind {
        Kind::Exclusive => flock(file, libc::LOCK_EX)?,
        Kind::Shared => flock(file, libc::LOCK_SH)?,
        Kind::Process => {
            fcntl(file, FcntlArg::F_SETLKW(&lock))?;
        }
        Kind::OpenFile => {
            fcntl(file, FcntlArg::F_OFD_SETLKW(&lock))?;
        }
    }
    Ok(())
}

fn flock(file: &File, operation: i32) -> std::io::Result<()> {
    // SAFETY: the descriptor is open, and no memory is involved.
    if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error())
}

fn range(kind: i32, start: i64, length: i64) -> libc::flock {
    let kind = i16::try_from(kind).unwrap_or_default();
    libc::flock { l_type: kind, l_whence: 0, l_start: start, l_len: length, l_pid: 0 }
}

fn open(path: &std::path::Path) -> Outcome<File> {
    Ok(OpenOptions::new().read(true).write(true).open(path)?)
}

pub(super) fn files(ground: &Ground) -> Outcome {
    let path = ground.file("file", b"")?;
    let file = open(&path)?;
    let now = |operation| flock(&file, operation | libc::LOCK_NB);
    let other = Other::start(&["hold", "shared"], &path)?;
    same("the other's word", other.word()?.as_str(), "held")?;
    refused("an exclusive lock beside a shared one", now(libc::LOCK_EX), libc::EAGAIN)?;
    now(libc::LOCK_SH)?;
    now(libc::LOCK_UN)?;
    other.end()?;
    now(libc::LOCK_EX)?;
    let second = open(&path)?;
    refused("a lock of another open file", flock(&second, libc::LOCK_SH | libc::LOCK_NB), libc::EAGAIN)?;

    let waits = Other::start(&["hold", "exclusive"], &path)?;
    check!(waits.is_silent(), "two exclusive locks at once");
    // A copy of the descriptor is the same open file: its closing ends nothing.
    drop(file.try_clone()?);
    check!(waits.is_silent(), "a lock ended with a copy of its descriptor");
    now(libc::LOCK_UN)?;
    same("the waiting one's word", waits.word()?.as_str(), "held")?;
    // The end of a process ends its locks.
    waits.kill()?;
    now(libc::LOCK_EX)?;
    Ok(())
}

pub(super) fn ranges(ground: &Ground) -> Outcome {
    for kind in ["process", "open-file"] {
        let path = ground.file(kind, &[0; 300])?;
        let file = open(&path)?;
        let other = Other::start(&["hold", kind], &path)?;
        same("the other's word", other.word()?.as_str(), "held")?;
        let set = |lock| fcntl(&file, FcntlArg::F_SETLK(&lock)).map(drop);
        let set_open = |lock| fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).map(drop);
        refused("the locked range", set(range(libc::F_WRLCK, LOCKED - 1, 1)), libc::EAGAIN)?;
        refused("the locked range, to read", set_open(range(libc::F_RDLCK, 0, 1)), libc::EAGAIN)?;
        set(range(libc::F_WRLCK, LOCKED, 50))?;
        let mut found = range(libc::F_WRLCK, 0, 0);
        fcntl(&file, FcntlArg::F_GETLK(&mut found))?;
        let holder = if kind == "process" { i32::try_from(other.id())? } else { -1 };
        same("the lock that is found", (found.l_start, found.l_len, found.l_pid), (0, LOCKED, holder))?;
        other.kill()?;
        set(range(libc::F_WRLCK, 0, 10))?;

        let waits = Other::start(&["hold", kind], &path)?;
        check!(waits.is_silent(), "two locks of one range at once");
        set(range(libc::F_UNLCK, 0, 0))?;
        same("the waiting one's word", waits.word()?.as_str(), "held")?;
        waits.end()?;
        // The peculiarity of the older kind: any closing of the file ends the process' locks.
        set(range(libc::F_WRLCK, 0, 10))?;
        drop(open(&path)?);
        let free = Other::start(&["hold", kind], &path)?;
        same("the third one's word", free.word()?.as_str(), "held")?;
        free.end()?;
        set_open(range(libc::F_WRLCK, 0, 10))?;
        drop(open(&path)?);
        let waits = Other::start(&["hold", kind], &path)?;
        check!(waits.is_silent(), "a lock of an open file ended with another's closing");
        drop(file);
        same("the last one's word", waits.word()?.as_str(), "held")?;
        waits.end()?;
    }
    Ok(())
}
