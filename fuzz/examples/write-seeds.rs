//! `write-seeds TARGET DIRECTORY`: the seeds of a target as files, for libFuzzer.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, target, directory] = arguments.as_slice() else {
        return Err(std::io::Error::other("usage: write-seeds TARGET DIRECTORY"));
    };
    for (number, seed) in krx_fuzz::seeds::of(target).into_iter().enumerate() {
        std::fs::write(Path::new(directory).join(format!("seed-{number}")), seed)?;
    }
    Ok(())
}
