//! A tree of all kinds of files, and what it consists of as a text: made on both sides of a share, the texts are the same.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use super::attributes::Attributes;
use super::exerciser::sum;
use super::{Outcome, check};

const IN_A_DIRECTORY: usize = 100;

/// `tree DIRECTORY COUNT`: so many small files, and some of each other kind.
pub(crate) fn make(directory: &str, count: &str) -> Outcome {
    let top = Path::new(directory);
    fs::create_dir(top)?;
    let mut directories = vec![top.to_path_buf()];
    for number in 0..count.parse::<usize>()? {
        let below = top.join(format!("part {}", number / IN_A_DIRECTORY));
        if number % IN_A_DIRECTORY == 0 {
            fs::create_dir(&below)?;
            directories.push(below.clone());
        }
        let path = below.join(format!("file {number}"));
        // Not of zeros, of which a copy may be a hole.
        fs::write(&path, vec![(1 + number % 251).to_le_bytes()[0]; number * 37 % 3000])?;
        match number % 20 {
            0 => fs::hard_link(&path, top.join(format!("link {number}")))?,
            1 => symlink(format!("file {}", number + 1), below.join(format!("soft {number}")))?,
            2 => Attributes::of(&path)?.set("user.number", number.to_string().as_bytes(), 0)?,
            3 => chown(&path, Some(1000), Some(2000))?,
            4 => fs::set_permissions(&path, Permissions::from_mode(0o4751))?,
            _ => {}
        }
        date(&path, number)?;
    }
    let odd = top.join("odd");
    fs::create_dir(&odd)?;
    for byte in (1..=255_u8).filter(|byte| *byte != b'/') {
        fs::write(odd.join(OsStr::from_bytes(&[b'n', byte])), [byte])?;
    }
    symlink("nowhere/".repeat(100), odd.join("dangling"))?;
    fs::write(odd.join("empty"), "")?;
    nix::unistd::mkfifo(&odd.join("fifo"), nix::sys::stat::Mode::S_IRUSR)?;
    let sparse = File::create(odd.join("sparse"))?;
    sparse.write_all_at(b"after a hole", 9 << 20)?;
    sparse.set_len(20 << 20)?;
    directories.push(odd);
    for (number, directory) in directories.iter().enumerate() {
        Attributes::of(directory)?.set("user.directory", &[number.to_le_bytes()[0], 0, 255], 0)?;
        date(directory, number)?;
    }
    Ok(())
}

/// Sets times to which the number is a key.
fn date(path: &Path, number: usize) -> Outcome {
    let time =
        UNIX_EPOCH + Duration::new(1_000_000_000 + number as u64, 123_456_000 + u32::try_from(number % 999)?);
    Ok(File::open(path)?.set_times(FileTimes::new().set_accessed(time).set_modified(time))?)
}

/// `manifest DIRECTORY`: a line for each file, sorted by name.
pub(crate) fn manifest(directory: &str) -> Outcome {
    let top = Path::new(directory);
    let mut paths = vec![top.to_path_buf()];
    collect(top, &mut paths)?;
    paths.sort_unstable();
    let mut known = HashMap::new();
    let mut text = String::new();
    for path in &paths {
        describe(top, path, &mut known, &mut text).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    print!("{text}");
    Ok(())
}

fn collect(directory: &Path, paths: &mut Vec<PathBuf>) -> Outcome {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        paths.push(entry.path());
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), paths)?;
        }
    }
    Ok(())
}

fn describe(top: &Path, path: &Path, known: &mut HashMap<u64, String>, text: &mut String) -> Outcome {
    let status = path.symlink_metadata()?;
    let kind = status.file_type();
    let name = path.strip_prefix(top)?.as_os_str().as_bytes().escape_ascii().to_string();
    let owners = (status.uid(), status.gid());
    let time = (status.mtime(), status.mtime_nsec());
    write!(text, "{name} {:o} {owners:?} {time:?}", status.mode())?;
    if kind.is_file() {
        write!(text, " {} bytes, {:016x}, {} names", status.len(), sum(&fs::read(path)?), status.nlink())?;
        let first = known.entry(status.ino()).or_insert_with(|| name.clone());
        write!(text, ", as {first}")?;
        // What is mostly a hole on one side is that on the other; blocks are a file system's own.
        write!(text, "{}", if status.blocks() * 512 < status.len() / 2 { ", sparse" } else { "" })?;
    } else if kind.is_symlink() {
        write!(text, " to {}", fs::read_link(path)?.as_os_str().as_bytes().escape_ascii())?;
    } else {
        check!(kind.is_dir() || kind.is_fifo(), "neither a file nor a directory, link or FIFO");
    }
    let attributes = Attributes::of(path)?;
    let list = attributes.list()?;
    let mut names: Vec<_> = list.split(|byte| *byte == 0).filter(|name| name.starts_with(b"user.")).collect();
    names.sort_unstable();
    for name in names {
        let name = std::str::from_utf8(name)?;
        write!(text, " {name}={}", attributes.get(name, 1000)?.escape_ascii())?;
    }
    text.push('\n');
    Ok(())
}
