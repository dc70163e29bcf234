//! `krx attach` and `krx wait`: staying with a detached container, with its streams or without.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use krx_sandbox::detached::attachment::{AttachError, Attachment, Event};
use krx_sandbox::detached::{Kept, OutputStream};
use krx_sandbox::state_dir::{StateError, StateRoot};

use crate::args;
use crate::error::{CliError, DetachedError};
use crate::pods::{self, print};
use crate::signals::Signals;
use crate::terminal::{self, Raw};

/// Ctrl-P and Ctrl-Q.
const DETACH: [u8; 2] = [0x10, 0x11];

pub(crate) fn attach(arguments: &args::Attach) -> Result<u8, CliError> {
    let (root, name) = (StateRoot::from_env(), &arguments.name);
    let kept = running(&root, name)?;
    if kept.is_over() {
        return Err(over(name, &kept));
    }
    let mut attachment = Attachment::open(&kept.socket(), true).map_err(DetachedError::from)?;
    let signals = Signals::watch()?;
    signals.own();
    let (paths, state) = root.open(name)?;
    let process = pods::named(&paths, &pods::own(&state)?.id, "")?;
    signals.looking_on(&process, arguments.sig_proxy, attachment.input()?);
    let types = attachment.input && !arguments.no_stdin;
    let is_terminal = attachment.terminal && terminal::is_terminal();
    if is_terminal {
        process.resize(terminal::size());
    }
    let raw = (types && is_terminal).then(Raw::enter).transpose().ok().flatten();
    let detached = Arc::new(AtomicBool::new(false));
    if types {
        let (socket, detached, keys) = (attachment.input()?, detached.clone(), raw.is_some());
        thread::Builder::new().name("stdin".into()).spawn(move || feed(&socket, keys, &detached))?;
    }
    let ended = copy(&mut attachment);
    drop(raw);
    signals.own();
    match ended {
        Err(_) if signals.interrupted().is_some() => Ok(128 + signals.interrupted().unwrap_or_default()),
        Err(Stopped::Attachment(_)) if detached.load(Ordering::SeqCst) => {
            eprintln!("krx: detached from {name}, which runs on");
            Ok(0)
        }
        Err(Stopped::Attachment(error)) => code(&root, name, error),
        // As a program whose reader has left. The container does not hear of it.
        Err(Stopped::Output) => Ok(128 + 13),
        Ok(code) => Ok(code),
    }
}

pub(crate) fn wait(arguments: &args::Wait) -> Result<u8, CliError> {
    let root = StateRoot::from_env();
    for name in &arguments.names {
        let kept = running(&root, name)?;
        let code = match &kept.record.ended {
            Some(ended) => ended.code,
            None if kept.is_over() => return Err(over(name, &kept)),
            None => match Attachment::open(&kept.socket(), false).and_then(|mut owner| last(&mut owner)) {
                Ok(code) => code,
                Err(error) => code(&root, name, error)?,
            },
        };
        print(&format!("{code}\n"))?;
    }
    Ok(0)
}

/// The record of a container that is not just starting.
fn running(root: &StateRoot, name: &str) -> Result<Kept, CliError> {
    match root.records().open(name) {
        Err(StateError::NoRecord(_)) if root.open(name).is_ok() => {
            Err(DetachedError::NotDetached(name.into()).into())
        }
        Ok(kept) if kept.record.started.is_none() => Err(StateError::Starting(name.into()).into()),
        kept => Ok(kept?),
    }
}

fn over(name: &str, kept: &Kept) -> CliError {
    DetachedError::Over { name: name.into(), status: kept.status() }.into()
}

/// The exit code of a container whose owner is not heard any more: in its record, if it came to write it.
fn code(root: &StateRoot, name: &str, error: AttachError) -> Result<u8, CliError> {
    let ended = root.records().open(name).ok().and_then(|kept| kept.record.ended);
    ended.map(|ended| ended.code).ok_or_else(|| DetachedError::from(error).into())
}

fn last(owner: &mut Attachment) -> Result<u8, AttachError> {
    loop {
        if let Event::Ended(code) = owner.next_event()? {
            return Ok(code);
        }
    }
}

/// Why no more is copied.
enum Stopped {
    Attachment(AttachError),
    /// Nobody reads it.
    Output,
}

/// Writes all output until the container's end.
fn copy(attachment: &mut Attachment) -> Result<u8, Stopped> {
    loop {
        match attachment.next_event().map_err(Stopped::Attachment)? {
            Event::Output(stream, bytes) => {
                let write = |to: &mut dyn Write| to.write_all(&bytes).and_then(|()| to.flush());
                match stream {
                    OutputStream::Stdout => write(&mut io::stdout()),
                    OutputStream::Stderr => write(&mut io::stderr()),
                }
                .map_err(|_| Stopped::Output)?;
            }
            Event::Missed(bytes) => {
                eprintln!("krx: {bytes} bytes of output are left out here: they were not read in time");
            }
            Event::Ended(code) => return Ok(code),
        }
    }
}

/// Sends what is typed. Its end is nothing to the container, which others may type into.
fn feed(mut socket: &UnixStream, keys: bool, detached: &AtomicBool) {
    let (mut buffer, mut watch) = ([0; 4096], Keys::default());
    while let Ok(count @ 1..) = io::stdin().read(&mut buffer) {
        let typed = if keys { watch.pass(&buffer[..count]) } else { (buffer[..count].to_vec(), false) };
        if typed.1 {
            detached.store(true, Ordering::SeqCst);
        }
        if socket.write_all(&typed.0).is_err() || typed.1 {
            let _ = socket.shutdown(Shutdown::Both);
            return;
        }
    }
}

/// Finds the keys to detach in what is typed.
#[derive(Default)]
struct Keys {
    /// The first was typed, and is held back until the next one is known.
    held: bool,
}

impl Keys {
    /// What is to be sent, and whether this is the end.
    fn pass(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut sent = Vec::with_capacity(typed.len() + 1);
        for byte in typed {
            match (self.held, *byte) {
                (true, byte) if byte == DETACH[1] => return (sent, true),
                (true, byte) if byte == DETACH[0] => sent.push(byte),
                (true, byte) => {
                    self.held = false;
                    sent.extend([DETACH[0], byte]);
                }
                (false, byte) if byte == DETACH[0] => self.held = true,
                (false, byte) => sent.push(byte),
            }
        }
        (sent, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_to_detach_are_found_wherever_they_are_cut() {
        let pass = |pieces: &[&[u8]]| {
            let mut keys = Keys::default();
            let mut sent = Vec::new();
            for piece in pieces {
                let (more, end) = keys.pass(piece);
                sent.extend(more);
                if end {
                    return (sent, true);
                }
            }
            (sent, false)
        };
        assert_eq!(pass(&[b"ab\x10\x11cd"]), (b"ab".to_vec(), true));
        assert_eq!(pass(&[b"ab\x10", b"\x11"]), (b"ab".to_vec(), true));
        assert_eq!(pass(&[b"\x10", b"a\x11"]), (b"\x10a\x11".to_vec(), false));
        assert_eq!(pass(&[b"\x10\x10\x11"]), (b"\x10".to_vec(), true));
        assert_eq!(pass(&[b"\x11\x10"]), (b"\x11".to_vec(), false));
    }
}
