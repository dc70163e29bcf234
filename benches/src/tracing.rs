//! The kernel's own events of KVM (tracefs, `Documentation/trace/events.rst`), by the monotonic clock.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

const TRACEFS: &str = "/sys/kernel/tracing";
/// KiB of events kept a CPU: a boot of ten thousand exits is below 2 MiB.
const BUFFER_KIB: &str = "16384";

/// Events being recorded; dropping it ends that.
#[derive(Debug)]
pub struct Recording {
    tracefs: PathBuf,
}

/// One recorded event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// `CLOCK_MONOTONIC`, microseconds.
    pub monotonic_us: u64,
    pub name: String,
    pub fields: String,
}

impl Recording {
    /// Starts to record these events (`kvm/kvm_exit`), each with a filter, which may be empty.
    ///
    /// # Errors
    /// No tracefs, or no such event.
    pub fn start(events: &[(&str, &str)]) -> io::Result<Self> {
        let recording = Self { tracefs: TRACEFS.into() };
        if !recording.tracefs.join("trace").exists() {
            mount(Some("tracefs"), TRACEFS, Some("tracefs"), MsFlags::empty(), None::<&str>)?;
        }
        recording.write("tracing_on", "0")?;
        recording.write("trace_clock", "mono")?;
        recording.write("buffer_size_kb", BUFFER_KIB)?;
        recording.write("trace", "")?;
        for (event, filter) in events {
            let directory = Path::new("events").join(event);
            // An empty filter is written as "0".
            let filter = if filter.is_empty() { "0" } else { filter };
            recording.write(directory.join("filter"), filter)?;
            recording.write(directory.join("enable"), "1")?;
        }
        recording.write("tracing_on", "1")?;
        Ok(recording)
    }

    /// Ends the recording.
    ///
    /// # Errors
    /// The trace cannot be read.
    pub fn finish(self) -> io::Result<Vec<Event>> {
        self.write("tracing_on", "0")?;
        let trace = fs::read_to_string(self.tracefs.join("trace"))?;
        Ok(trace.lines().filter_map(parse).collect())
    }

    fn write(&self, file: impl AsRef<Path>, text: &str) -> io::Result<()> {
        let path = self.tracefs.join(file);
        fs::write(&path, text)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let _ = self.write("tracing_on", "0");
        let _ = self.write("events/enable", "0");
        let _ = self.write("trace", "");
    }
}

/// A line such as `krx-vcpu0-812 [000] d..1. 12.345678: kvm_exit: vcpu 0 reason npf rip 0x1000`.
fn parse(line: &str) -> Option<Event> {
    if line.starts_with('#') {
        return None;
    }
    let (front, rest) = line.split_once(": ")?;
    let (name, fields) = rest.split_once(": ")?;
    let (seconds, fraction) = front.split_whitespace().last()?.split_once('.')?;
    let monotonic_us = seconds.parse::<u64>().ok()? * 1_000_000 + fraction.parse::<u64>().ok()?;
    Some(Event { monotonic_us, name: name.trim().into(), fields: fields.trim().into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_trace_are_taken_apart() {
        let line = " krx-vcpu0-812     [000] d..1.    12.345678: kvm_exit: vcpu 0 reason npf rip 0x10";
        let event = parse(line).unwrap();
        assert_eq!((event.monotonic_us, event.name.as_str()), (12_345_678, "kvm_exit"));
        assert_eq!(event.fields, "vcpu 0 reason npf rip 0x10");
        assert_eq!(parse("# tracer: nop"), None);
        assert_eq!(parse("nonsense"), None);
    }
}
