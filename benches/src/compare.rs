//! `compare A B`: two reports of one benchmark, each a JSON file or a revision that was measured here.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use benches::report::{self, Report};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [a, b] = arguments.as_slice() else {
        eprintln!(
            "Usage: benches/compare A B\nA, B: a report of target/bench/, the revision it was made of, or containerd-REVISION"
        );
        return ExitCode::from(2);
    };
    match load(a).and_then(|a| Ok(report::compare(&a, &load(b)?))) {
        Ok(table) => {
            print!("{table}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

fn load(name: &str) -> Result<Report, String> {
    let path = find(name)?;
    let json = std::fs::read(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    serde_json::from_slice(&json).map_err(|error| format!("{} is no report: {error}", path.display()))
}

/// The file itself, or the report whose revision begins with `name`.
fn find(name: &str) -> Result<PathBuf, String> {
    let path = Path::new(name);
    if path.is_file() {
        return Ok(path.into());
    }
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    let entries = std::fs::read_dir(&directory).into_iter().flatten().flatten();
    let wanted = [format!("boot-{name}"), name.to_string()];
    let mut found: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            wanted.iter().any(|wanted| file.starts_with(wanted))
        })
        .collect();
    found.sort();
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(format!("{name} is neither a file nor a revision measured in {}", directory.display())),
        several => {
            Err(format!("{name} could be any of {} reports: give more of the revision", several.len()))
        }
    }
}
