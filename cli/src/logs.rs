//! `krx logs`: what a detached container has written, and writes.

use std::collections::VecDeque;
use std::io::{self, BufWriter, ErrorKind, Stderr, Stdout, Write};
use std::path::Path;
use std::time::Duration;

use krx_sandbox::detached::OutputStream;
use krx_sandbox::detached::log::{Changes, Entry, LogReader};
use krx_sandbox::state_dir::{StateError, StateRoot};

use crate::args::Logs;
use crate::error::{CliError, DetachedError, LookupError};

/// The longest time until the end of a container is seen, should it not show in its directory.
const PATIENCE: Duration = Duration::from_secs(1);

pub(crate) fn logs(arguments: &Logs) -> Result<u8, CliError> {
    let root = StateRoot::from_env();
    let name = &arguments.name;
    let kept = match root.records().open(name) {
        Err(StateError::NoRecord(_)) if root.open(name).is_ok() => {
            return Err(DetachedError::NotDetached(name.clone()).into());
        }
        kept => kept?,
    };
    let is_over = || !root.records().open(name).is_ok_and(|kept| !kept.is_over());
    let mut printer = Printer::new(arguments.timestamps);
    match show(kept.directory(), arguments, &mut printer, is_over) {
        Err(Failed::Log(error)) if error.kind() == ErrorKind::NotFound && kept.record.started.is_none() => {
            Err(StateError::Starting(name.clone()).into())
        }
        Err(Failed::Log(error)) => Err(DetachedError::Log(name.clone(), error).into()),
        // Who has seen enough is no error.
        Err(Failed::Output(error)) if error.kind() == ErrorKind::BrokenPipe => Ok(0),
        Err(Failed::Output(error)) => Err(LookupError::Output(error).into()),
        Ok(()) => Ok(0),
    }
}

enum Failed {
    Log(io::Error),
    Output(io::Error),
}

fn show(
    directory: &Path,
    arguments: &Logs,
    printer: &mut Printer,
    is_over: impl Fn() -> bool,
) -> Result<(), Failed> {
    let changes = arguments.follow.then(|| Changes::of(directory)).transpose().map_err(Failed::Log)?;
    let mut log = LogReader::open(directory).map_err(Failed::Log)?;
    match arguments.tail {
        Some(count) => {
            let mut tail = Tail::of(count);
            while let Some(line) = log.next_line().map_err(Failed::Log)? {
                tail.push(line);
            }
            tail.end().try_for_each(|line| printer.print(&line)).map_err(Failed::Output)?;
        }
        None => print_all(&mut log, printer)?,
    }
    while let Some(changes) = &changes {
        printer.flush().map_err(Failed::Output)?;
        // What is written before the end is there when the end is seen.
        let over = is_over() || !log.is_in(directory);
        print_all(&mut log, printer)?;
        while log.advance().map_err(Failed::Log)? {
            if log.missed() {
                eprintln!("krx: the log went on faster than it was read: a part of it may be left out here");
            }
            print_all(&mut log, printer)?;
        }
        if over {
            break;
        }
        printer.flush().map_err(Failed::Output)?;
        changes.wait(PATIENCE);
    }
    printer.flush().map_err(Failed::Output)
}

fn print_all(log: &mut LogReader, printer: &mut Printer) -> Result<(), Failed> {
    while let Some(line) = log.next_line().map_err(Failed::Log)? {
        printer.print(&line).map_err(Failed::Output)?;
    }
    Ok(())
}

/// The last lines of output, each of which may be several of the log: with pieces of the other stream in between.
struct Tail {
    count: usize,
    lines: VecDeque<Vec<Vec<u8>>>,
    /// Of each stream, the line that has no end yet.
    open: [Vec<Vec<u8>>; 2],
}

impl Tail {
    fn of(count: usize) -> Self {
        Self { count, lines: VecDeque::new(), open: Default::default() }
    }

    fn push(&mut self, line: Vec<u8>) {
        let Some(Entry { stream, full, .. }) = Entry::parse(&line) else { return };
        let open = &mut self.open[stream as usize];
        open.push(line);
        if full {
            self.lines.push_back(std::mem::take(open));
        }
        while self.lines.len() > self.count {
            self.lines.pop_front();
        }
    }

    /// The lines of the log.
    fn end(self) -> impl Iterator<Item = Vec<u8>> {
        let open = self.open.into_iter().filter(|line| !line.is_empty());
        let all: Vec<_> = self.lines.into_iter().chain(open).collect();
        let over = all.len().saturating_sub(self.count);
        all.into_iter().skip(over).flatten()
    }
}

/// Writes each stream where it belongs.
struct Printer {
    out: BufWriter<Stdout>,
    err: Stderr,
    timestamps: bool,
    /// A line of this stream has begun.
    open: [bool; 2],
}

impl Printer {
    fn new(timestamps: bool) -> Self {
        Self { out: BufWriter::new(io::stdout()), err: io::stderr(), timestamps, open: [false; 2] }
    }

    fn print(&mut self, line: &[u8]) -> io::Result<()> {
        let Some(entry) = Entry::parse(line) else { return Ok(()) };
        let open = &mut self.open[entry.stream as usize];
        let text = text(entry, self.timestamps && !*open);
        *open = !entry.full;
        match entry.stream {
            OutputStream::Stdout => self.out.write_all(&text),
            OutputStream::Stderr => {
                // On a terminal they are to come in their order.
                self.out.flush()?;
                self.err.write_all(&text)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// What the container wrote, with a time before it if it is to be seen.
fn text(entry: Entry<'_>, stamped: bool) -> Vec<u8> {
    let (stamp, space) = if stamped { (entry.stamp, " ") } else { ("", "") };
    let end: &[u8] = if entry.full { b"\n" } else { b"" };
    [stamp.as_bytes(), space.as_bytes(), entry.text, end].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(count: usize, lines: &[&str]) -> Vec<String> {
        let mut tail = Tail::of(count);
        for line in lines {
            tail.push(format!("t {line}").into_bytes());
        }
        tail.end().map(|line| String::from_utf8_lossy(&line[2..]).into_owned()).collect()
    }

    #[test]
    fn lines_in_pieces_count_once() {
        let lines = [
            "stdout F one",
            "stdout P t",
            "stderr F bad",
            "stdout P w",
            "stdout F o",
            "junk",
            "stdout P end",
        ];
        assert_eq!(tail(1, &lines), ["stdout P end"]);
        assert_eq!(tail(2, &lines), ["stdout P t", "stdout P w", "stdout F o", "stdout P end"]);
        assert_eq!(tail(3, &lines)[0], "stderr F bad");
        assert_eq!(tail(9, &lines).len(), 6);
        assert_eq!(tail(0, &lines), [""; 0]);
    }

    #[test]
    fn stamps_are_at_the_begin_of_lines() {
        let entry = |line: &'static str| Entry::parse(line.as_bytes()).unwrap();
        assert_eq!(text(entry("t stdout P a"), true), b"t a");
        assert_eq!(text(entry("t stdout F b "), false), b"b \n");
    }
}
