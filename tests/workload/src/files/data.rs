//! What is in files: where it lies, and who sees it when.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use nix::fcntl::{FallocateFlags, copy_file_range, fallocate};
use nix::sys::statvfs::statvfs;

use super::children::Other;
use super::exerciser::Aligned;
use super::mapping::Mapping;
use super::{Ground, Outcome, check, refused, same};

const GIB: u64 = 1 << 30;
const PAGE: usize = 4096;

fn both(path: &std::path::Path) -> Outcome<File> {
    Ok(OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?)
}

fn seek(file: &File, offset: i64, whence: i32) -> std::io::Result<i64> {
    // SAFETY: the descriptor is open, and no memory is involved.
    let at = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    if at < 0 { Err(std::io::Error::last_os_error()) } else { Ok(at) }
}

pub(super) fn sizes(ground: &Ground) -> Outcome {
    let path = ground.path("large");
    let file = both(&path)?;
    for (number, place) in [0, 2 * GIB - 4, 4 * GIB - 4, 5 * GIB].into_iter().enumerate() {
        file.write_all_at(format!("number {number}").as_bytes(), place)?;
    }
    let size = 5 * GIB + 8;
    same("its size", (file.metadata()?.len(), fs::metadata(&path)?.len()), (size, size))?;
    check!(file.metadata()?.blocks() < 1 << 10, "{} blocks for four words", file.metadata()?.blocks());
    let mut word = [0; 8];
    file.read_exact_at(&mut word, 4 * GIB - 4)?;
    same("across 4 GiB", &word, b"number 2")?;
    file.read_exact_at(&mut word, 3 * GIB)?;
    same("in a hole", word, [0; 8])?;
    same("where data is", seek(&file, 3 << 30, libc::SEEK_DATA)?, (4 << 30) - 4096)?;
    same("where a hole is", seek(&file, 0, libc::SEEK_HOLE)?, 4096)?;
    refused("data beyond the end", seek(&file, i64::try_from(size)?, libc::SEEK_DATA), libc::ENXIO)?;
    let mapped = Mapping::shared(&file, usize::try_from(4 * GIB)?, PAGE)?;
    same("mapped beyond 4 GiB", &mapped.bytes()[..4], b"er 2")?;
    drop(mapped);
    file.set_len(1 << 40)?;
    same("1 TiB", fs::metadata(&path)?.len(), 1 << 40)?;
    file.set_len(4 * GIB)?;
    file.set_len(6 * GIB)?;
    file.read_exact_at(&mut word, 4 * GIB - 4)?;
    same("after it was cut off", &word, b"numb\0\0\0\0")?;
    refused("a negative size", nix::unistd::ftruncate(&file, -1), libc::EINVAL)
}

pub(super) fn allocate(ground: &Ground) -> Outcome {
    let file = both(&ground.path("file"))?;
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, FallocateFlags::empty(), 0, 1 << 20)?;
    same("allocated", (file.metadata()?.len(), file.metadata()?.blocks() >= 2048), (1 << 20, true))?;
    fallocate(&file, keep, 0, 2 << 20)?;
    same(
        "allocated beyond the end",
        (file.metadata()?.len(), file.metadata()?.blocks() >= 4096),
        (1 << 20, true),
    )?;
    file.write_all_at(&[1; 1 << 20], 0)?;
    let mapped = Mapping::shared(&file, 0, 1 << 20)?;
    same("mapped", mapped.bytes()[5000], 1)?;
    fallocate(&file, keep | FallocateFlags::FALLOC_FL_PUNCH_HOLE, 4100, 100_000)?;
    let mut read = vec![9; 1 << 20];
    file.read_exact_at(&mut read, 0)?;
    for (name, bytes) in [("read", &read[..]), ("mapped", mapped.bytes())] {
        let is_right =
            bytes.iter().enumerate().all(|(at, byte)| (*byte == 0) == (4100..104_100).contains(&at));
        check!(is_right, "{name}: another hole than was punched");
    }
    refused(
        "a hole without KEEP_SIZE",
        fallocate(&file, FallocateFlags::FALLOC_FL_PUNCH_HOLE, 0, 1),
        libc::EOPNOTSUPP,
    )?;
    refused("nothing", fallocate(&file, FallocateFlags::empty(), 0, 0), libc::EINVAL)
}

pub(super) fn copy_range(ground: &Ground) -> Outcome {
    let content: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251).to_le_bytes()[0]).collect();
    let from = both(&ground.file("from", &content)?)?;
    let to = both(&ground.path("to"))?;
    let (mut source, mut sink) = (0, 5);
    while source < 3_000_000 {
        let copied = copy_file_range(&from, Some(&mut source), &to, Some(&mut sink), 3_000_000)?;
        check!(copied > 0, "nothing is copied from {source} on");
    }
    same("offsets", (source, sink), (3_000_000, 3_000_005))?;
    let copy = fs::read(ground.path("to"))?;
    check!(copy.len() == 3_000_005 && copy[..5] == [0; 5] && copy[5..] == content[..], "another content");
    // What the standard library copies by, whichever way it takes.
    fs::copy(ground.path("from"), ground.path("third"))?;
    check!(fs::read(ground.path("third"))? == content, "another content by fs::copy");
    Ok(())
}

pub(super) fn direct(ground: &Ground) -> Outcome {
    let path = ground.file("file", &[b'b'; 4 * PAGE])?;
    let buffered = both(&path)?;
    let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path)?;
    let mapped = Mapping::shared(&buffered, 0, 4 * PAGE)?;
    same("mapped", mapped.bytes()[PAGE], b'b')?;
    let mut block = Aligned::new(PAGE);
    block.bytes_mut().fill(b'd');
    direct.write_all_at(block.bytes(), PAGE as u64)?;
    let mut read = vec![0; 4 * PAGE];
    buffered.read_exact_at(&mut read, 0)?;
    let pages: Vec<_> = (0..4).map(|page| read[page * PAGE + 7]).collect();
    same("buffered, after a direct write", pages.as_slice(), b"bdbb")?;
    same("mapped, after a direct write", mapped.bytes()[PAGE + 7], b'd')?;
    buffered.write_all_at(b"new", 2 * PAGE as u64)?;
    direct.read_exact_at(block.bytes_mut(), 2 * PAGE as u64)?;
    same("direct, after a buffered write", &block.bytes()[..4], b"newb")?;
    // Beyond the end, and at it.
    direct.write_all_at(block.bytes(), 8 * PAGE as u64)?;
    same("its size", fs::metadata(&path)?.len(), 9 * PAGE as u64)?;
    same("read at the end", direct.read_at(block.bytes_mut(), 9 * PAGE as u64)?, 0)?;
    let mut large = Aligned::new(1 << 20);
    large.bytes_mut().iter_mut().zip(0_u32..).for_each(|(byte, at)| *byte = (at % 253).to_le_bytes()[0]);
    direct.write_all_at(large.bytes(), 0)?;
    check!(fs::read(&path)? == large.bytes(), "another megabyte than was written");
    Ok(())
}

pub(super) fn append(ground: &Ground) -> Outcome {
    let path = ground.file("log", b"")?;
    let lines = 300;
    let others: Vec<_> = ["a", "b"]
        .into_iter()
        .map(|letter| Other::start(&["append", letter, &lines.to_string()], &path))
        .collect::<Result<_, _>>()?;
    for other in others {
        same("its word", other.word()?.as_str(), "done")?;
        other.end()?;
    }
    let text = fs::read_to_string(&path)?;
    for letter in ["a", "b"] {
        let numbers: Vec<_> =
            text.lines().filter_map(|line| line.strip_prefix(letter)?.trim().parse().ok()).collect();
        same("each line once, and in order", numbers, (0..lines).collect::<Vec<usize>>())?;
    }
    same("lines", text.lines().count(), 2 * lines)
}

pub(super) fn shared_mappings(ground: &Ground) -> Outcome {
    let path = ground.file("file", &[0; 2 * PAGE])?;
    let file = both(&path)?;
    let mut mapping = Mapping::shared(&file, 0, 2 * PAGE)?;
    let other = Other::start(&["map"], &path)?;
    same("its word", other.word()?.as_str(), "mapped")?;
    mapping.bytes_mut()[0] = 41;
    same("its word", other.word()?.as_str(), "answered")?;
    same("what the other process wrote", mapping.bytes()[2048], 42)?;
    other.end()?;
    mapping.bytes_mut()[PAGE..].fill(7);
    mapping.sync()?;
    same("what is read", fs::read(&path)?[PAGE + 5], 7)?;
    // A write is seen in the mapping, and a page of it that is written does not take others back.
    file.write_all_at(b"written", 100)?;
    same("what is mapped", &mapping.bytes()[100..107], b"written")?;
    mapping.bytes_mut()[107] = b'!';
    drop(mapping);
    drop(file);
    same("after all is closed", &fs::read(&path)?[100..108], b"written!")
}

pub(super) fn text_busy(ground: &Ground) -> Outcome {
    let path = ground.path("program");
    fs::copy(std::env::current_exe()?, &path)?;
    let mut child =
        std::process::Command::new(&path).arg("pause").stdin(std::process::Stdio::piped()).spawn()?;
    let written = OpenOptions::new().write(true).open(&path).map(drop);
    child.kill()?;
    child.wait()?;
    refused("writing a program that runs", written, libc::ETXTBSY)?;
    let open = OpenOptions::new().write(true).open(&path)?;
    let started = std::process::Command::new(&path).arg("print").spawn().map(drop);
    refused("running a program that is written", started, libc::ETXTBSY)?;
    drop(open);
    let printed = std::process::Command::new(&path).args(["print", "runs"]).output()?;
    same("a program on the volume", printed.stdout.as_slice(), b"runs\n")
}

/// On a file system of a few megabytes.
pub(super) fn full(ground: &Ground) -> Outcome {
    let space = statvfs(&ground.directory)?;
    let free = space.blocks_available() * space.fragment_size();
    check!((1 << 20..64 << 20).contains(&free), "{free} bytes are free: this wants a small file system");
    let path = ground.path("file");
    let mut file = File::create(&path)?;
    let mut written = 0;
    let error = loop {
        match file.write(&[5; 40_000]) {
            Ok(count) => written += count as u64,
            Err(error) => break error,
        }
    };
    same("the error", error.raw_os_error(), Some(libc::ENOSPC))?;
    check!(written > free / 2 && written <= free, "{written} bytes were written of {free}");
    same("its size", fs::metadata(&path)?.len(), written)?;
    let content = fs::read(&path)?;
    check!(content.len() as u64 == written && content.iter().all(|byte| *byte == 5), "another content");
    refused("what is allocated", fallocate(&file, FallocateFlags::empty(), 0, 64 << 20), libc::ENOSPC)?;
    same("room that is left", statvfs(&ground.directory)?.blocks_available(), 0)?;
    let another = File::create(ground.path("another")).and_then(|mut file| file.write_all(&[1; PAGE]));
    check!(
        another.is_err_and(|error| error.kind() == ErrorKind::StorageFull),
        "a full file system takes more"
    );
    // Room that is made is used.
    fs::remove_file(&path)?;
    drop(file);
    fs::write(ground.path("after"), vec![6; usize::try_from(free / 2)?])?;
    same("after room was made", fs::metadata(ground.path("after"))?.len(), free / 2)
}
