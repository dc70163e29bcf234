//! `krx completions` and the man pages: made of the command line's own description, so that they say what it says.

use std::fs;

use clap::CommandFactory;

use crate::args::{Cli, Completions, Man};
use crate::error::CliError;
use crate::pods::print;

/// The name of the program, which its pages and completions are for.
const NAME: &str = "krx";

pub(crate) fn completions(arguments: &Completions) -> Result<u8, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), NAME, &mut script);
    print(&String::from_utf8_lossy(&script))
}

pub(crate) fn man(arguments: &Man) -> Result<u8, CliError> {
    let directory = &arguments.directory;
    let made =
        fs::create_dir_all(directory).and_then(|()| clap_mangen::generate_to(Cli::command(), directory));
    let failed =
        |error| CliError::Usage(format!("Man pages cannot be written to {}: {error}", directory.display()));
    made.map_err(failed)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("man1");
        man(&Man { directory: directory.clone() }).unwrap();
        let read = |page: &str| fs::read_to_string(directory.join(page)).unwrap();
        let page = read("krx.1");
        assert!(read("krx-run.1").contains("entrypoint"));
        assert!(page.contains("doctor") && page.contains("Exit codes"), "{page}");
        assert!(!page.contains("man pages"), "what is hidden is not told of");
    }
}
