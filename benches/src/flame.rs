//! flame TITLE FILE: draws the stacks on the standard input, a line for each with its count, as a flame graph (SVG).

use std::fs::File;
use std::io::{self, BufReader};
use std::process::ExitCode;

use inferno::flamegraph::{self, Options};

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let drawn = match &arguments[..] {
        [title, file] => draw(title, file),
        _ => Err("flame TITLE FILE".into()),
    };
    match drawn {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flame: {error}");
            ExitCode::FAILURE
        }
    }
}

fn draw(title: &str, file: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut options = Options::default();
    options.title = title.into();
    options.count_name = "us".into();
    options.deterministic = true;
    flamegraph::from_reader(&mut options, BufReader::new(io::stdin()), File::create(file)?)?;
    Ok(())
}
