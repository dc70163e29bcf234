//! The program in the test images that does what a shell and coreutils cannot: wait as a pause container does, listen,
//! dial, use memory, and try what a file system promises. Static, so that it runs in an image of one file.

mod files;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str =
    "usage: workload print TEXT | pause | serve PORT TEXT | echo PORT | dial HOST:PORT [TEXT] | allocate MIB
       workload files DIRECTORY share|local SCALE [CHECK] | exercise FILE SEED STEPS |
       tree DIRECTORY COUNT | manifest DIRECTORY";
/// Of a dialled connection, read and write.
const DIAL: Duration = Duration::from_secs(20);
const PAGE: usize = 4096;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["print", text] => {
            println!("{text}");
            Ok(())
        }
        ["pause"] => pause(),
        ["serve", port, text] => serve(port, text),
        ["echo", port] => echo(port),
        ["dial", address] => dial(address, ""),
        ["dial", address, text] => dial(address, text),
        ["allocate", mib] => allocate(mib),
        ["files", directory, kind @ ("share" | "local"), scale] => files::run(directory, kind, scale, ""),
        ["files", directory, kind @ ("share" | "local"), scale, only] => {
            files::run(directory, kind, scale, only)
        }
        ["exercise", path, seed, steps] => files::exercise(path, seed, steps),
        ["tree", directory, count] => files::make(directory, count),
        ["manifest", directory] => files::manifest(directory),
        ["child", ref part @ ..] => files::child(part),
        _ => Err(USAGE.into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("workload: {error}");
            ExitCode::FAILURE
        }
    }
}

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Lives until it is killed.
fn pause() -> Outcome {
    loop {
        std::thread::park();
    }
}

/// Says `text` to everyone who connects.
fn serve(port: &str, text: &str) -> Outcome {
    let listener = TcpListener::bind(("0.0.0.0", port.parse()?))?;
    println!("listening on {port}");
    for stream in listener.incoming() {
        // A peer that is gone is its own affair.
        let _ = stream.and_then(|mut stream| stream.write_all(text.as_bytes()));
    }
    Ok(())
}

/// Gives back what it gets, one connection after the other.
fn echo(port: &str) -> Outcome {
    let listener = TcpListener::bind(("0.0.0.0", port.parse()?))?;
    println!("listening on {port}");
    for stream in listener.incoming() {
        let _ = stream.and_then(|stream| std::io::copy(&mut &stream, &mut &stream));
    }
    Ok(())
}

/// Sends `text`, prints the answer up to its end.
fn dial(address: &str, text: &str) -> Outcome {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(DIAL))?;
    stream.write_all(text.as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    println!("{answer}");
    Ok(())
}

/// Touches so much memory, says so, and keeps it.
fn allocate(mib: &str) -> Outcome {
    let size = mib.parse::<usize>()? << 20;
    let mut memory = Vec::<u8>::with_capacity(size);
    for page in 0..size / PAGE {
        memory.resize((page + 1) * PAGE, 1);
    }
    println!("allocated {mib} MiB");
    std::hint::black_box(&memory);
    pause()
}
