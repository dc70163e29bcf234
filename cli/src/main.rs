//! `krx`: runs containers in micro-VMs. Knows people; pods are `krx_sandbox`'s.
//!
//! Each command is a module; a failure is one chain of causes on standard error and an exit code (`error`).

#![forbid(unsafe_code)]

mod args;
mod attach;
mod confinement;
mod detach;
mod doctor;
mod end;
mod error;
mod image;
mod list;
mod logs;
mod pages;
mod parse;
mod pods;
mod process;
mod run;
mod signals;
mod stats;
mod terminal;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    let code = match Cli::try_parse() {
        Ok(cli) => command(&cli.command),
        Err(error) => {
            let _ = error.print();
            // Help and version are no failure; a wrong command line is krx's own, not the container's.
            if error.use_stderr() { error::FAILED } else { 0 }
        }
    };
    let _ = std::io::stdout().flush();
    // Not by returning: a thread that reads standard input may still hold its lock.
    std::process::exit(code.into())
}

fn command(command: &Command) -> u8 {
    let result = match command {
        Command::Run(arguments) => run::run(arguments),
        Command::Exec(arguments) => pods::exec(arguments),
        Command::Console(arguments) => pods::console(arguments),
        Command::Logs(arguments) => logs::logs(arguments),
        Command::Attach(arguments) => attach::attach(arguments),
        Command::Wait(arguments) => attach::wait(arguments),
        Command::Ps(arguments) => list::ps(arguments),
        Command::Stats(arguments) => stats::stats(arguments),
        Command::Inspect(arguments) => stats::inspect(arguments),
        Command::Stop(arguments) => end::stop(arguments),
        Command::Rm(arguments) => end::rm(arguments),
        Command::Kill(arguments) => pods::kill(arguments),
        Command::Completions(arguments) => pages::completions(arguments),
        Command::Man(arguments) => pages::man(arguments),
        Command::Doctor(arguments) => return doctor::run(arguments.json),
    };
    result.unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "krx: {}", error::chain(&error));
        error.exit_code()
    })
}
