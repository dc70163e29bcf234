//! profiled WHAT RUNS DIRECTORY: starts of a VM or of a container between two marks, for `benches/profile/profile.py`, which
//! runs this in an emulated host that counts. DIRECTORY has `mark`; the host's symbols are written there.

use std::io;
use std::path::Path;
use std::process::{Command, ExitCode};

use benches::host::{self, Memory};
use benches::start::{self, Programs, Size, Start};

const SIZE: Size = Size { memory_mib: 128, vcpus: 1 };
/// Runs before the first mark: what is read is in memory then.
const WARM: usize = 2;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let outcome = match &arguments[..] {
        [what, runs, directory] => {
            runs.parse().map_err(io::Error::other).and_then(|runs| profile(what, runs, Path::new(directory)))
        }
        _ => Err(io::Error::other("profiled WHAT RUNS DIRECTORY")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("profiled: {error}");
            ExitCode::FAILURE
        }
    }
}

fn profile(what: &str, runs: usize, directory: &Path) -> io::Result<()> {
    let one: fn(&Programs, &Memory, Size) -> io::Result<Start> = match what {
        "vm" => start::vmm,
        "container" => start::container,
        _ => return Err(io::Error::other(format!("{what} cannot be profiled: vm or container"))),
    };
    let memory = Memory::new()?;
    let programs = Programs::load(&memory, &host::root())?;
    let mark = memory.copy(&directory.join("mark"), "mark")?;
    let set = |number: &str| Command::new(&mark).arg(number).status().map(drop);
    for _ in 0..WARM {
        one(&programs, &memory, SIZE)?;
    }
    std::fs::copy("/proc/kallsyms", directory.join("kallsyms"))?;
    set("1")?;
    for _ in 0..runs {
        one(&programs, &memory, SIZE)?;
    }
    set("2")
}
