//! What POSIX and Linux promise of files, tried in one directory of the file system in question. Where a pod's share is known to differ
//! from a local file system, the check says so and tries that it does.

mod attributes;
mod children;
mod data;
mod exerciser;
mod locks;
mod mapping;
mod names;
mod tree;

use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::sys::stat::{Mode, umask};

pub(crate) use children::child;
pub(crate) use tree::{make, manifest};

pub(crate) type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;
type Check = fn(&Ground) -> Outcome;

/// Where a check does its work: a directory of its own.
pub(crate) struct Ground {
    directory: PathBuf,
    /// Whether the directory lies on a pod's share.
    is_share: bool,
    /// How much is done, in percent.
    scale: usize,
}

impl Ground {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A new file with this content.
    fn file(&self, name: &str, content: &[u8]) -> Outcome<PathBuf> {
        let path = self.path(name);
        fs::write(&path, content)?;
        Ok(path)
    }
}

/// Fails with a text unless a condition holds.
macro_rules! check {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err(format!($($text)+).into());
        }
    };
}
pub(crate) use check;

fn same<T: PartialEq + Debug>(what: &str, is: T, wanted: T) -> Outcome {
    check!(is == wanted, "{what}: {is:?}, not {wanted:?}");
    Ok(())
}

/// Fails unless a call failed with this error.
fn refused<T, E: Into<std::io::Error>>(what: &str, result: Result<T, E>, errno: i32) -> Outcome {
    let wanted = std::io::Error::from_raw_os_error(errno);
    let Err(error) = result else { return Err(format!("{what} succeeded instead of: {wanted}").into()) };
    let error = error.into();
    check!(error.raw_os_error() == Some(errno), "{what}: {error}, not: {wanted}");
    Ok(())
}

const CHECKS: [(&str, Check); 24] = [
    ("rename-over-an-open-file", names::rename_over),
    ("rename-flags", names::rename_flags),
    ("rename-of-directories", names::rename_directories),
    ("unlink-while-open", names::unlink_while_open),
    ("errors-of-names", names::errors),
    ("names-of-every-byte", names::bytes),
    ("links", names::links),
    ("exclusive-creation", names::exclusive),
    ("unnamed-files", names::unnamed),
    ("fifos-and-sockets", names::special),
    ("large-directory", names::large_directory),
    ("sizes-of-64-bits", data::sizes),
    ("allocate-and-punch", data::allocate),
    ("copy-file-range", data::copy_range),
    ("direct-io", data::direct),
    ("append-by-two", data::append),
    ("shared-mappings", data::shared_mappings),
    ("executables-are-not-written", data::text_busy),
    ("times", attributes::times),
    ("modes-and-owners", attributes::modes),
    ("permissions", attributes::permissions),
    ("extended-attributes", attributes::extended),
    ("locks-of-files", locks::files),
    ("locks-of-ranges", locks::ranges),
];

/// `files DIRECTORY share|local SCALE [CHECK]`: prints a line for each check, and fails if one did.
pub(crate) fn run(directory: &str, kind: &str, scale: &str, only: &str) -> Outcome {
    umask(Mode::from_bits_truncate(0o022));
    let mut failed = 0;
    let full = [("full-file-system", data::full as Check)];
    // Wants a small file system of its own.
    let checks = if only == full[0].0 { &full[..] } else { &CHECKS[..] };
    for (name, check) in checks.iter().filter(|(name, _)| name.contains(only)) {
        let directory = Path::new(directory).join(name);
        fs::create_dir(&directory)?;
        let ground = Ground { directory, is_share: kind == "share", scale: scale.parse()? };
        let begin = Instant::now();
        match check(&ground) {
            Ok(()) => println!("ok {name}, {} ms", begin.elapsed().as_millis()),
            Err(error) => {
                println!("FAILED {name}: {error}");
                failed += 1;
            }
        }
    }
    check!(failed == 0, "{failed} checks failed");
    Ok(())
}

/// `exercise FILE SEED STEPS`.
pub(crate) fn exercise(path: &str, seed: &str, steps: &str) -> Outcome {
    exerciser::run(Path::new(path), seed.parse()?, steps.parse()?)
}
