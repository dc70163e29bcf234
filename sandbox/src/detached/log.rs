//! The log of a detached container, in the format that the kubelet knows (CRI, Container Logging): a line for each line of
//! output, `TIME stdout|stderr F|P TEXT`, where P says that the output has no line break there.
//!
//! What comes is written at once, so that nothing is lost with the owner. Two files take turns: when `log` is full it
//! becomes `log.1`, in the place of the one before. The log lies in memory (`/run`), and the guest decides how long it is.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use humantime::format_rfc3339_nanos;
use nix::fcntl::{OFlag, openat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::stat::Mode;

use super::OutputStream;

/// Largest of the two files.
pub const SEGMENT: u64 = 4 << 20;
/// Longest text of one line of the log; more of it goes on the next, as containerd does it.
const MAX_TEXT: usize = 16 << 10;
/// With the words before it. What is longer is nothing of ours, and left out.
const MAX_LINE: u64 = MAX_TEXT as u64 + 128;

/// The end of the year 9999.
const LAST: Duration = Duration::from_secs(253_402_300_799);

const CURRENT: &str = "log";
const FORMER: &str = "log.1";

fn current(directory: &Path) -> PathBuf {
    directory.join(CURRENT)
}

fn former(directory: &Path) -> PathBuf {
    directory.join(FORMER)
}

/// Gives up the older half of a log, or all of it where there is one file.
pub fn make_room(directory: &Path) {
    if fs::remove_file(former(directory)).is_err() {
        let _ = OpenOptions::new().write(true).truncate(true).open(current(directory));
    }
}

/// Writes a log.
#[derive(Debug)]
pub struct LogWriter {
    directory: PathBuf,
    file: File,
    length: u64,
    /// Bytes of output that there was no room for.
    lost: u64,
}

impl LogWriter {
    /// Begins an empty one.
    ///
    /// # Errors
    /// The file exists, or cannot be made.
    pub fn create(directory: &Path) -> io::Result<Self> {
        Ok(Self { directory: directory.into(), file: open_new(directory)?, length: 0, lost: 0 })
    }

    /// Adds what was written at a time since 1970. Where that cannot be, as on a full file system, it is left out: a
    /// container is not to be held up by its log.
    pub fn append(&mut self, stream: OutputStream, bytes: &[u8], at: Duration) {
        let stamp = stamp(at);
        if self.lost > 0 {
            let text = format!("krx: {} bytes of output could not be written to this log\n", self.lost);
            let told = self.write(&entry(&stamp, OutputStream::Stderr, text.as_bytes()));
            self.lost = if told.is_ok() { 0 } else { self.lost };
        }
        // In one piece as far as there is room, as most output is not one line.
        let (mut lines, mut held) = (Vec::with_capacity(bytes.len() + 256), 0);
        for text in bytes.split_inclusive(|byte| *byte == b'\n').flat_map(|line| line.chunks(MAX_TEXT)) {
            let line = entry(&stamp, stream, text);
            if self.length + (lines.len() + line.len()) as u64 > SEGMENT {
                self.write_or_lose(&lines, held);
                (lines, held) = (Vec::new(), 0);
            }
            lines.extend_from_slice(&line);
            held += text.len() as u64;
        }
        self.write_or_lose(&lines, held);
    }

    fn write_or_lose(&mut self, lines: &[u8], held: u64) {
        if self.write(lines).is_err() {
            self.lost += held;
        }
    }

    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.length > 0 && self.length + lines.len() as u64 > SEGMENT {
            match fs::rename(current(&self.directory), former(&self.directory)) {
                // It was done before, and there was no room for the next file.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                renamed => renamed?,
            }
            self.file = open_new(&self.directory)?;
            self.length = 0;
        }
        let written = self.file.write_all(lines);
        match written {
            Ok(()) => self.length += lines.len() as u64,
            // No half of a line is to be in the way of the next.
            Err(_) => drop(self.file.set_len(self.length)),
        }
        written
    }
}

/// RFC 3339, in UTC, to the nanosecond.
fn stamp(since_1970: Duration) -> String {
    // As far as that format goes: a clock can be set to any time.
    format_rfc3339_nanos(UNIX_EPOCH + since_1970.min(LAST)).to_string()
}

fn open_new(directory: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create_new(true).mode(0o600).open(current(directory))
}

fn entry(stamp: &str, stream: OutputStream, text: &[u8]) -> Vec<u8> {
    let stream = match stream {
        OutputStream::Stdout => "stdout",
        OutputStream::Stderr => "stderr",
    };
    let (tag, text) = text.strip_suffix(b"\n").map_or(("P", text), |text| ("F", text));
    [format!("{stamp} {stream} {tag} ").as_bytes(), text, b"\n"].concat()
}

/// A line of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    pub stamp: &'a str,
    pub stream: OutputStream,
    /// The output had a line break there.
    pub full: bool,
    pub text: &'a [u8],
}

impl<'a> Entry<'a> {
    /// Reads one, without its line break; `None` if it is none.
    #[must_use]
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let mut words = line.splitn(4, |byte| *byte == b' ');
        let stamp = std::str::from_utf8(words.next()?).ok()?;
        let stream = match words.next()? {
            b"stdout" => OutputStream::Stdout,
            b"stderr" => OutputStream::Stderr,
            _ => return None,
        };
        let full = match words.next()? {
            b"F" => true,
            b"P" => false,
            _ => return None,
        };
        Some(Self { stamp, stream, full, text: words.next()? })
    }
}

/// Reads a log from its begin, while it may be written.
#[derive(Debug)]
pub struct LogReader {
    /// Another container may get the name.
    directory: File,
    /// In their order; the last one is the one that is written, as far as is known.
    files: VecDeque<BufReader<File>>,
    /// What has come of a line that is not whole yet.
    begun: Vec<u8>,
    missed: bool,
}

impl LogReader {
    /// Opens what there is.
    ///
    /// # Errors
    /// There is no log, or it cannot be opened.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let directory = File::open(directory)?;
        let (former, current) = pair(&directory)?;
        let files = former.into_iter().chain([current]).map(BufReader::new).collect();
        Ok(Self { directory, files, begun: Vec::new(), missed: false })
    }

    /// The next whole line, without its line break; `None` at what is the end for now.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn next_line(&mut self) -> io::Result<Option<Vec<u8>>> {
        while let Some(file) = self.files.front_mut() {
            let room = MAX_LINE.saturating_sub(self.begun.len() as u64);
            let read = file.take(room).read_until(b'\n', &mut self.begun)?;
            if self.begun.last() == Some(&b'\n') {
                self.begun.pop();
                return Ok(Some(std::mem::take(&mut self.begun)));
            }
            if self.begun.len() as u64 >= MAX_LINE {
                file.skip_until(b'\n')?;
                self.begun.clear();
            } else if read == 0 {
                if self.files.len() == 1 {
                    return Ok(None);
                }
                self.files.pop_front();
                self.begun.clear();
            }
        }
        Ok(None)
    }

    /// Looks whether the log goes on in another file; to be called at its end.
    ///
    /// # Errors
    /// That cannot be opened.
    pub fn advance(&mut self) -> io::Result<bool> {
        let (former, current) = match pair(&self.directory) {
            // Removed, with the container.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            pair => pair?,
        };
        let Some(last) = self.files.back() else { return Ok(false) };
        let last = last.get_ref().metadata()?.ino();
        if current.metadata()?.ino() == last {
            return Ok(false);
        }
        // The last one may have got more before it was full.
        if let Some(former) = former
            && former.metadata()?.ino() != last
        {
            self.missed = true;
            self.files.push_back(BufReader::new(former));
        }
        self.files.push_back(BufReader::new(current));
        Ok(true)
    }

    /// Whether it is the log in that directory still: another container may have got the name.
    #[must_use]
    pub fn is_in(&self, directory: &Path) -> bool {
        let id = |metadata: io::Result<fs::Metadata>| {
            metadata.ok().map(|metadata| (metadata.dev(), metadata.ino()))
        };
        id(fs::metadata(directory)) == id(self.directory.metadata())
    }

    /// Whether a part was gone before it could be read, since the last time this was asked.
    pub fn missed(&mut self) -> bool {
        std::mem::take(&mut self.missed)
    }
}

/// The two files, the former one if there is one.
fn pair(directory: &File) -> io::Result<(Option<File>, File)> {
    let open = |name: &str| -> io::Result<File> {
        Ok(openat(directory, name, OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?
            .into())
    };
    // Between a file's new name and the next file, there is none for a moment: a few attempts see either.
    let mut attempts = 0;
    loop {
        attempts += 1;
        let opened = open(CURRENT);
        let before = match open(FORMER) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            before => Some(before?),
        };
        match (opened, &before) {
            (Err(error), Some(_)) if error.kind() == io::ErrorKind::NotFound && attempts < 100 => {}
            (opened, None) => return Ok((None, opened?)),
            (opened, Some(former)) => {
                let current = opened?;
                // It was renamed in between.
                if current.metadata()?.ino() != former.metadata()?.ino() {
                    return Ok((before, current));
                }
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Tells when there may be more in a log.
#[derive(Debug)]
pub struct Changes(Inotify);

impl Changes {
    /// Of the log in a directory. To be made before the log is read.
    ///
    /// # Errors
    /// The directory is gone, or there is no room for watches.
    pub fn of(directory: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let flags = AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_TO
            // The lock, by the end of its owner.
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_DELETE_SELF;
        inotify.add_watch(directory, flags)?;
        Ok(Self(inotify))
    }

    /// Waits for the next change, `limit` at most.
    pub fn wait(&self, limit: Duration) {
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let _ = poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], timeout);
        while self.0.read_events().is_ok_and(|events| !events.is_empty()) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scratch;

    const AT: Duration = Duration::from_secs(1);
    const STAMP: &str = "1970-01-01T00:00:01.000000000Z";

    fn all(reader: &mut LogReader) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| reader.next_line().unwrap()).collect()
    }

    #[test]
    fn lines_are_those_of_the_cri() {
        let scratch = Scratch::new("log");
        let mut log = LogWriter::create(scratch.path()).unwrap();
        log.append(OutputStream::Stdout, b"one\ntw", AT);
        log.append(OutputStream::Stderr, b"\xff\0 bad\n", AT);
        log.append(OutputStream::Stdout, b"o\n\n", AT);
        let expected: Vec<Vec<u8>> =
            [&b"stdout F one"[..], b"stdout P tw", b"stderr F \xff\0 bad", b"stdout F o", b"stdout F "]
                .iter()
                .map(|line| [STAMP.as_bytes(), b" ", line].concat())
                .collect();
        let lines = all(&mut LogReader::open(scratch.path()).unwrap());
        assert_eq!(lines, expected);
        let entry = Entry::parse(&lines[1]).unwrap();
        assert_eq!(
            (entry.stamp, entry.stream, entry.full, entry.text),
            (STAMP, OutputStream::Stdout, false, &b"tw"[..])
        );
    }

    #[test]
    fn any_time_has_a_stamp() {
        assert_eq!(stamp(Duration::new(951_782_400, 7)), "2000-02-29T00:00:00.000000007Z");
        assert_eq!(stamp(Duration::MAX), "9999-12-31T23:59:59.000000000Z");
    }

    #[test]
    fn what_is_no_line_of_a_log_is_none() {
        for bad in ["", "x", "t stdout F", "t stdin F x", "t stdout Q x", "\u{fffd}"] {
            assert_eq!(Entry::parse(bad.as_bytes()), None, "{bad}");
        }
        let scratch = Scratch::new("log");
        let junk = [vec![b'x'; 100_000], b"\nshort\nhalf".to_vec()].concat();
        scratch.write("log", &junk);
        assert_eq!(all(&mut LogReader::open(scratch.path()).unwrap()), [b"short"]);
    }

    #[test]
    fn flood_takes_two_files_and_no_more() {
        let scratch = Scratch::new("log");
        let mut log = LogWriter::create(scratch.path()).unwrap();
        let mut reader = LogReader::open(scratch.path()).unwrap();
        let chunk = [b'y'; 60_000];
        for _ in 0..400 {
            log.append(OutputStream::Stdout, &chunk, AT);
        }
        log.append(OutputStream::Stdout, b"\nlast\n", AT);
        let sizes: Vec<_> = fs::read_dir(scratch.path())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .collect();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().all(|size| *size <= SEGMENT), "{sizes:?}");
        assert!(sizes.iter().any(|size| *size > SEGMENT - 70_000), "{sizes:?}");
        // A reader that was there before hears that it was too slow, and goes on with what there is.
        let mut read = all(&mut reader).len();
        while reader.advance().unwrap() {
            read += all(&mut reader).len();
        }
        assert!(reader.missed());
        assert!(!reader.missed());
        assert!(read > 250, "{read}");
        let fresh = all(&mut LogReader::open(scratch.path()).unwrap());
        assert!(fresh.last().unwrap().ends_with(b" F last"));
    }

    #[test]
    fn followed_log_is_whole_beyond_its_turns() {
        let scratch = Scratch::new("log");
        let mut log = LogWriter::create(scratch.path()).unwrap();
        let mut reader = LogReader::open(scratch.path()).unwrap();
        let mut next = 0_u32;
        for number in 0..10_000_u32 {
            log.append(OutputStream::Stdout, format!("{number} {:1000}\n", "").as_bytes(), AT);
            if number % 100 != 99 {
                continue;
            }
            loop {
                while let Some(line) = reader.next_line().unwrap() {
                    let text = String::from_utf8(Entry::parse(&line).unwrap().text.to_vec()).unwrap();
                    assert_eq!(text.split(' ').next().unwrap(), next.to_string());
                    next += 1;
                }
                if !reader.advance().unwrap() {
                    break;
                }
            }
        }
        assert_eq!(next, 10_000);
        assert!(!reader.missed());
        fs::remove_file(scratch.path().join("log")).unwrap();
        fs::remove_file(scratch.path().join("log.1")).unwrap();
        assert!(!reader.advance().unwrap());
    }

    #[test]
    fn what_there_is_no_room_for_is_counted() {
        let scratch = Scratch::new("log");
        let mut log = LogWriter::create(scratch.path()).unwrap();
        log.append(OutputStream::Stdout, b"one\n", AT);
        let file = std::mem::replace(&mut log.file, File::options().write(true).open("/dev/full").unwrap());
        log.append(OutputStream::Stdout, b"two\n", AT);
        log.file = file;
        log.append(OutputStream::Stdout, b"three\n", AT);
        let lines = all(&mut LogReader::open(scratch.path()).unwrap());
        let texts: Vec<_> =
            lines.iter().map(|line| String::from_utf8_lossy(Entry::parse(line).unwrap().text)).collect();
        assert_eq!(texts, ["one", "krx: 4 bytes of output could not be written to this log", "three"]);
    }

    #[test]
    fn changes_are_told_of() {
        let scratch = Scratch::new("log");
        let mut log = LogWriter::create(scratch.path()).unwrap();
        let changes = Changes::of(scratch.path()).unwrap();
        let before = std::time::Instant::now();
        log.append(OutputStream::Stdout, b"one\n", AT);
        changes.wait(Duration::from_secs(60));
        assert!(before.elapsed() < Duration::from_secs(30));
        changes.wait(Duration::from_millis(50));
        assert!(before.elapsed() >= Duration::from_millis(50), "events are taken");
    }
}
