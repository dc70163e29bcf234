//! How a benchmark comes to the host it measures on, and where its report goes.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::host;
use crate::report::Report;

/// Set for the copy of the program that measures.
const REVISION: &str = "KRX_BENCH_REVISION";

/// What a benchmark is told.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whether instructions are counted as time.
    pub icount: bool,
    /// Samples of each figure.
    pub runs: usize,
}

/// Runs a benchmark: here to begin with, which becomes its copy on a host whose KVM runs Linux, where it measures.
pub fn main(name: &str, measure: fn(&Options, &str) -> io::Result<ExitCode>) -> ExitCode {
    let outcome = parse(name).and_then(|options| match std::env::var(REVISION) {
        Ok(revision) => measure(&options, &revision).map_err(|error| error.to_string()),
        Err(_) => Err(launch(&options).to_string()),
    });
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(name: &str) -> Result<Options, String> {
    let usage = format!(
        "\
Usage: cargo bench -p benches --bench {name} -- [--icount] [--runs N]

  --icount   count instructions as time, in an emulated host (tests/kvm-host)
  --runs N   samples of each figure (5)"
    );
    let mut options = Options { icount: false, runs: 5 };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            // Cargo's own.
            "--bench" => {}
            "--icount" => options.icount = true,
            "--runs" => {
                let number = arguments.next().and_then(|number| number.parse().ok());
                options.runs = number.filter(|runs| (1..=100).contains(runs)).ok_or(&*usage)?;
            }
            other => return Err(format!("unknown argument {other}\n{usage}")),
        }
    }
    Ok(options)
}

/// Becomes the program that measures; returns only when it cannot.
fn launch(options: &Options) -> io::Error {
    let root = host::root();
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return error,
    };
    let mut command = Command::new(root.join("tests/kvm-host"));
    if options.icount {
        command.arg("--icount");
    }
    command.args(["--timeout", "1500", "--"]).arg(program).args(["--runs", &options.runs.to_string()]);
    command.env(REVISION, revision(&root)).exec()
}

fn revision(root: &Path) -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(root).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
    };
    let revision = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".into());
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_none_or(|text| !text.is_empty());
    if changed { format!("{revision}-dirty") } else { revision }
}

/// Where a report will be: opened while its directory can be seen.
#[derive(Debug)]
pub struct ReportFile {
    path: PathBuf,
    file: File,
}

impl ReportFile {
    /// # Errors
    /// It cannot be made.
    pub fn create(bench: &str, revision: &str, unit: &str) -> io::Result<Self> {
        let path = host::root().join(format!("target/bench/{bench}-{revision}-{unit}.json"));
        std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
        let file = File::create(&path)?;
        Ok(Self { path, file })
    }

    /// Writes a drawing beside the report.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn draw(&self, svg: &str) -> io::Result<()> {
        let path = self.path.with_extension("svg");
        std::fs::write(&path, svg)?;
        println!("drawing: {}", path.display());
        Ok(())
    }

    /// Prints a report, writes it, and says whether it is within its budgets.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn publish(mut self, report: &Report) -> io::Result<ExitCode> {
        let Report { bench, revision, .. } = report;
        print!("{bench} of {revision}\n{}", report.table());
        self.file.write_all(&serde_json::to_vec_pretty(report)?)?;
        println!("report: {}", self.path.display());
        let over = report.over_budget();
        if over.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        eprintln!("{bench}: over budget: {}", over.join(", "));
        Ok(ExitCode::FAILURE)
    }
}
