//! `--image`: the container of an image in a file.

use std::io::{self, IsTerminal};
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use krx_image::{Config, ContainerRoot, ImageError, Reference, Step, Store, private_mounts};
use krx_proto::ProcessSpec;

use crate::error::{CliError, SourceError};
use crate::parse;

/// Where layers are kept unless `KRX_IMAGE_DIR` says otherwise.
const STORE: &str = "/var/lib/krx/images";

/// The root file system of a container, and how its image wants it to be run.
pub(crate) struct Prepared {
    pub(crate) root: ContainerRoot,
    pub(crate) config: Config,
}

/// Unpacks the image, as far as that has not been done, and stacks its layers for the container `name`. This process has
/// mounts of its own from then on.
pub(crate) fn prepare(image: &str, name: &str) -> Result<Prepared, SourceError> {
    let reference = Reference::parse(image)?;
    private_mounts().map_err(SourceError::Mounts)?;
    let directory = std::env::var_os("KRX_IMAGE_DIR").filter(|directory| !directory.is_empty());
    let directory = directory.map_or_else(|| STORE.into(), PathBuf::from);
    // It is found again at the end, wherever the owner of a detached container is then.
    let directory = std::path::absolute(&directory).unwrap_or(directory);
    let make = || -> Result<_, ImageError> {
        let store = Store::open(&directory)?;
        let image = store.import(&reference, progress())?;
        let root = store.root(&image, name)?;
        Ok(Prepared { root, config: image.config })
    };
    Ok(make()?)
}

/// Draws a bar for each layer, where somebody looks.
fn progress() -> impl FnMut(Step) {
    let style = ProgressStyle::with_template("{msg} [{bar:40}] {binary_bytes} of {binary_total_bytes}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ");
    let bar = if io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    bar.set_style(style);
    move |step| match step {
        Step::Waiting => eprintln!("krx: waiting for another krx that unpacks an image"),
        Step::Layer { number, of, bytes } => {
            bar.reset();
            bar.set_length(bytes);
            bar.set_message(format!("krx: unpacking layer {number} of {of}"));
        }
        Step::Read(bytes) => bar.inc(bytes),
        Step::Done => bar.finish_and_clear(),
    }
}

/// Changes `spec` as an image wishes. A command, or another program to begin with, takes the place of its own.
pub(crate) fn configure(
    spec: &mut ProcessSpec,
    config: &Config,
    entrypoint: Option<&str>,
    command: &[String],
) -> Result<(), CliError> {
    for text in &config.env {
        // One without a value is nobody's: not the caller's either.
        if let Some(variable) = parse::variable(text, |_| None)? {
            parse::set_variable(&mut spec.env, variable);
        }
    }
    if let Some(directory) = &config.working_dir {
        spec.cwd = format!("/{}", directory.trim_start_matches('/'));
    }
    let (begin, usual) = match entrypoint {
        Some(_) => (&[][..], &[][..]),
        None => (config.entrypoint.as_slice(), config.cmd.as_slice()),
    };
    // An empty one is none, as with docker.
    let given = entrypoint.filter(|program| !program.is_empty()).map(String::from);
    let rest = if command.is_empty() { usual } else { command };
    spec.args = given.into_iter().chain(begin.iter().chain(rest).cloned()).collect();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    fn image() -> Config {
        Config {
            entrypoint: texts(&["/e", "-x"]),
            cmd: texts(&["c"]),
            env: texts(&["PATH=/bin", "ALONE"]),
            working_dir: Some("srv".into()),
            user: None,
        }
    }

    fn args(entrypoint: Option<&str>, command: &[&str]) -> Vec<String> {
        let mut spec = ProcessSpec::default();
        configure(&mut spec, &image(), entrypoint, &texts(command)).unwrap();
        spec.args
    }

    #[test]
    fn a_command_takes_the_place_of_the_images() {
        assert_eq!(args(None, &[]), ["/e", "-x", "c"]);
        assert_eq!(args(None, &["a", "b"]), ["/e", "-x", "a", "b"]);
        assert_eq!(args(Some("/other"), &[]), ["/other"]);
        assert_eq!(args(Some("/other"), &["a"]), ["/other", "a"]);
        assert_eq!(args(Some(""), &["a"]), ["a"]);
    }

    #[test]
    fn environment_and_directory_are_the_images() {
        let mut spec = ProcessSpec { env: texts(&["PATH=/usr/bin", "A=1"]), ..ProcessSpec::default() };
        configure(&mut spec, &image(), None, &[]).unwrap();
        assert_eq!((spec.env, spec.cwd.as_str()), (texts(&["A=1", "PATH=/bin"]), "/srv"));
    }
}
