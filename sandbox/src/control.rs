//! Client of the VMM's control socket: one JSON request a line, one JSON answer a line. Answers are `{"ok":...}`,
//! `{"error":"..."}` or the request's own.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};

use crate::plain_file;
use crate::vmm_process::VmmError;

/// Longest answer taken.
const MAX_ANSWER: u64 = 1 << 20;
/// The VMM answers at once; seconds are a VMM that hangs.
pub(crate) const CONTROL_TIMEOUT: Duration = Duration::from_secs(5);

/// The log of the kernel in the guest of the VMM that listens at `socket`: its last 64 KiB, in lines of printable ASCII.
///
/// # Errors
/// The VMM does not answer, or finds no log in its guest.
pub fn guest_log(socket: &Path) -> Result<String, VmmError> {
    let answer = ask(socket, "log", &json!("log"), None)?;
    let log = answer["log"].as_str().ok_or_else(|| VmmError::Control(io::ErrorKind::InvalidData.into()))?;
    // A VMM that its guest has taken over has no business with the caller's terminal.
    Ok(log.replace(|c: char| c.is_control() && c != '\n', "?"))
}

/// Makes a request, and passes `file` with it. `name` is that of the request.
pub(crate) fn ask(
    socket: &Path,
    name: &'static str,
    request: &Value,
    file: Option<&File>,
) -> Result<Value, VmmError> {
    let answer = exchange(socket, request, file).map_err(VmmError::Control)?;
    match answer.get("error") {
        None => Ok(answer),
        Some(error) => {
            let answer = error.as_str().map_or_else(|| error.to_string(), str::to_owned);
            Err(VmmError::Refused { request: name, answer })
        }
    }
}

fn exchange(socket: &Path, request: &Value, file: Option<&File>) -> io::Result<Value> {
    let socket = plain_file::connect(socket)?;
    socket.set_read_timeout(Some(CONTROL_TIMEOUT))?;
    socket.set_write_timeout(Some(CONTROL_TIMEOUT))?;
    let mut line = json!({ "request": request }).to_string();
    line.push('\n');
    match file {
        None => (&socket).write_all(line.as_bytes())?,
        Some(file) => send_with(&socket, line.as_bytes(), file)?,
    }
    let mut answer = String::new();
    BufReader::new(socket.take(MAX_ANSWER)).read_line(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}

/// Sends a line, and passes a file with it (unix(7), SCM_RIGHTS).
fn send_with(socket: &UnixStream, line: &[u8], file: &File) -> io::Result<()> {
    let passed = [file.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&passed)];
    let sent =
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(line)], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    // The file goes with the first byte.
    (&*socket).write_all(&line[sent..])
}
