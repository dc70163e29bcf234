//! Words of the command line that are more than words: sizes, counts, signals, variables, files. Pure, but for these.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use krx_proto::{CpuMax, Limit};
use krx_sandbox::default_spec::MAX_HOSTNAME;
use krx_sandbox::settings::units::{self, Bare};
use krx_vmm::config::{MemorySize, VcpuCount};
use nix::sys::signal::Signal;

use crate::error::CliError;

fn usage<T>(text: String) -> Result<T, CliError> {
    Err(CliError::Usage(text))
}

/// Memory: `268435456`, `256M`, `1G`.
pub(crate) fn memory(text: &str) -> Result<MemorySize, CliError> {
    units::memory(text, Bare::Bytes).or_else(|error| usage(error.to_string()))
}

/// CPUs: so many virtual ones, and for a number with a fraction the time of them that may be used.
pub(crate) fn cpus(text: &str) -> Result<(VcpuCount, Option<CpuMax>), CliError> {
    /// Microseconds.
    const PERIOD: u64 = 100_000;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let is_number =
        |digits: &str| (1..=3).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
    let thousandths = || -> Option<u64> {
        if !is_number(whole) || !is_number(fraction) {
            return None;
        }
        Some(whole.parse::<u64>().ok()? * 1000 + format!("{fraction:0<3}").parse::<u64>().ok()?)
    };
    // The kernel knows no quota below a millisecond, a hundredth of the period.
    let checked = thousandths().filter(|count| *count >= 10).and_then(|count| {
        let vcpus = VcpuCount::new(u8::try_from(count.div_ceil(1000)).ok()?.into()).ok()?;
        let quota = CpuMax { quota: Limit::At(count * PERIOD / 1000), period: PERIOD };
        Some((vcpus, (count % 1000 > 0).then_some(quota)))
    });
    match checked {
        Some(checked) => Ok(checked),
        None => usage(format!("CPUs `{text}` cannot be: give a number from 0.01 to {}", VcpuCount::MAX)),
    }
}

/// A host name as Linux takes it.
pub(crate) fn hostname(text: &str) -> Result<String, CliError> {
    let fits = (1..=MAX_HOSTNAME).contains(&text.len()) && !text.contains(['\0', '\n', '/']);
    if fits {
        Ok(text.into())
    } else {
        usage(format!("Host name {text:?} cannot be: give 1 to {MAX_HOSTNAME} bytes without slashes"))
    }
}

/// A signal by number, or by name with or without `SIG`.
pub(crate) fn signal(text: &str) -> Result<i32, CliError> {
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    let by_number = text.parse().ok().filter(|number| (1..=64).contains(number));
    let known = by_number.or_else(|| name.parse::<Signal>().ok().map(|signal| signal as i32));
    known.map_or_else(|| usage(format!("`{text}` is not a signal: give a name or a number from 1 to 64")), Ok)
}

/// `NAME=VALUE`, or `NAME` for the caller's own value; `None` if the caller has none.
pub(crate) fn variable(
    text: &str,
    own: impl FnOnce(&str) -> Option<String>,
) -> Result<Option<String>, CliError> {
    let name = text.split_once('=').map_or(text, |(name, _)| name);
    if name.is_empty() || text.contains('\0') {
        return usage(format!(
            "Environment variable `{text}` has no name or has a NUL in it: give NAME or NAME=VALUE"
        ));
    }
    if text.contains('=') {
        return Ok(Some(text.into()));
    }
    Ok(own(name).map(|value| format!("{name}={value}")))
}

/// A label: `KEY=VALUE`, or `KEY` for an empty value.
pub(crate) fn label(text: &str) -> Result<(String, String), CliError> {
    /// They are in each listing.
    const MAX_LABEL: usize = 4096;
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    if key.is_empty() || text.len() > MAX_LABEL || text.contains(char::is_control) {
        return usage(format!(
            "Label `{text:.64}` cannot be: give KEY=VALUE, {MAX_LABEL} bytes at most, without control characters"
        ));
    }
    Ok((key.into(), value.into()))
}

/// Puts `variable` in the place of an earlier one with its name.
pub(crate) fn set_variable(env: &mut Vec<String>, variable: String) {
    let name = variable.split_once('=').map_or(&*variable, |(name, _)| name);
    env.retain(|earlier| earlier.split_once('=').is_none_or(|(other, _)| other != name));
    env.push(variable);
}

/// Reads a file that somebody named, of 4 MiB at most; `what` says what it is.
pub(crate) fn small_file(what: &str, path: &Path) -> Result<Vec<u8>, CliError> {
    /// More than a process can be given.
    const MAX_FILE: u64 = 4 << 20;
    let failed = |why: &str| usage(format!("{what} {} cannot be used: {why}", path.display()));
    let mut content = Vec::new();
    match File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut content)) {
        Err(error) => failed(&error.to_string()),
        Ok(length) if length as u64 > MAX_FILE => failed("it is larger than 4 MiB"),
        Ok(_) => Ok(content),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_without_a_unit_counts_bytes() {
        assert_eq!(memory("268435457").unwrap().mib(), 257);
        for bad in ["", "0", "256", "-1", "1P"] {
            assert!(memory(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn cpu_counts_are_bounded() {
        let of = |text: &str| cpus(text).map(|(count, time)| (count.get(), time.map(|time| time.quota)));
        assert_eq!((of("8").unwrap(), of("2.0").unwrap()), ((8, None), (2, None)));
        assert_eq!(of("0.5").unwrap(), (1, Some(Limit::At(50_000))));
        assert_eq!(of("1.25").unwrap(), (2, Some(Limit::At(125_000))));
        for bad in ["0", "9", "8.001", "0.001", "1000", "-1", ".5", "1.", "1.2.3", "", "two", "1.0000"] {
            assert!(cpus(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["TERM", "SIGTERM", "sigterm", "15"] {
            assert_eq!(signal(text).unwrap(), 15, "{text}");
        }
        for bad in ["", "0", "65", "-9", "NONE"] {
            assert!(signal(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_have_keys() {
        let own = |key: &str, value: &str| (key.to_string(), value.to_string());
        assert_eq!(label("a.b/c=d=e").unwrap(), own("a.b/c", "d=e"));
        assert_eq!(label("alone").unwrap(), own("alone", ""));
        let long = "x".repeat(4097);
        for bad in ["", "=x", "a=\n", "a\u{1b}", &long] {
            assert!(label(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn variables_are_given_or_inherited() {
        let own = |name: &str| (name == "HOME").then(|| "/root".to_string());
        assert_eq!(variable("A=b=c", own).unwrap().unwrap(), "A=b=c");
        assert_eq!(variable("HOME", own).unwrap().unwrap(), "HOME=/root");
        assert_eq!(variable("NONE", own).unwrap(), None);
        assert!(variable("=x", own).is_err());
        let mut env = vec!["PATH=/bin".to_string(), "A=1".into()];
        set_variable(&mut env, "PATH=/usr/bin".into());
        assert_eq!(env, ["A=1", "PATH=/usr/bin"]);
    }
}
