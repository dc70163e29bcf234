//! An init that does what no agent should, for the tests of the host's side. Built static, packed as `/init`.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use krx_proto::{Answer, GuestInfo, Message, VERSION, io_port, mark, port, read_frame, write_frame};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

const HOST_CID: u32 = 2;
/// Says what to do, see the tests' `guest::Mode`.
const MODE_FILE: &str = "/mode";

fn main() -> io::Result<()> {
    let ports = OpenOptions::new().write(true).open("/dev/port")?;
    ports.write_all_at(&[mark::PID1], io_port::BOOT_MARK.into())?;
    let mode = std::fs::read_to_string(MODE_FILE)?;
    match mode.as_str() {
        "exit" => return Ok(()),
        "silent" => {}
        "version" => write_frame(&mut &dial()?, &hello(VERSION + 1)).map_err(io::Error::other)?,
        "huge" => dial()?.write_all(&[0xff; 4096])?,
        "garbage" => dial()?.write_all(&[4, 0, 0, 0, 0xde, 0xad, 0xbe, 0xef])?,
        "mute" => {
            let mut owner = dial()?;
            write_frame(&mut owner, &hello(VERSION)).map_err(io::Error::other)?;
            io::copy(&mut owner, &mut io::sink())?;
        }
        "liar" => lie(&dial()?)?,
        "redial" => redial(),
        mode => eprintln!("odd-init: no mode {mode}"),
    }
    thread::sleep(Duration::from_secs(3600));
    Ok(())
}

/// A stream to the host's control port. A socket is a socket: the standard library's type for unix streams reads and
/// writes this one as well.
fn dial() -> io::Result<UnixStream> {
    let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(stream.as_raw_fd(), &VsockAddr::new(HOST_CID, port::CONTROL))?;
    Ok(stream.into())
}

fn hello(version: u16) -> Message {
    Message::Hello { version, guest: GuestInfo::default() }
}

/// Says hello, waits for the first call and answers others.
fn lie(mut owner: &UnixStream) -> io::Result<()> {
    write_frame(&mut owner, &hello(VERSION)).map_err(io::Error::other)?;
    let _: krx_proto::Call = read_frame(&mut owner).map_err(io::Error::other)?;
    for number in 1000..2000 {
        let reply = Message::Reply { number, result: Ok(Answer::Done) };
        write_frame(&mut owner, &reply).map_err(io::Error::other)?;
    }
    let mut rest = [0; 64];
    while owner.read(&mut rest)? > 0 {}
    Ok(())
}

fn redial() {
    loop {
        if let Ok(stream) = dial() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
