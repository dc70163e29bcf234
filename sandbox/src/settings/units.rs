//! Sizes and kernel arguments as people write them: in the settings, in annotations, on a command line. Pure.

use std::fmt;

use krx_vmm::config::{MAX_CMDLINE, MemorySize};

const MIB: u64 = 1 << 20;
/// As much of a refused text as an error shows: an annotation may be a megabyte.
const SHOWN: usize = 64;

/// Why a text is not a size of memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("Memory {0} is not a size: give a number with K, M, G or T, as in 256M")]
    Form(Shown),
    #[error("Memory {text} cannot be: {source}")]
    Range {
        text: Shown,
        #[source]
        source: krx_vmm::config::ConfigError,
    },
}

/// What a number without a unit counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bare {
    Bytes,
    Mib,
}

/// Reads a size, rounded up to whole MiB: `256M`, `1G`, or a number alone.
///
/// # Errors
/// It has another form, or is no size that a VM can have.
pub fn memory(text: &str, bare: Bare) -> Result<MemorySize, MemoryError> {
    let (digits, unit) = match text.char_indices().next_back() {
        Some((at, unit)) if unit.is_ascii_alphabetic() => (&text[..at], Some(unit.to_ascii_uppercase())),
        _ => (text, None),
    };
    let shift = match (unit, bare) {
        (Some('B'), _) | (None, Bare::Bytes) => Some(0),
        (Some('K'), _) => Some(10),
        (Some('M'), _) | (None, Bare::Mib) => Some(20),
        (Some('G'), _) => Some(30),
        (Some('T'), _) => Some(40),
        (Some('P'), _) => Some(50),
        _ => None,
    };
    // Rust's own parser takes a sign.
    let decimal = digits.bytes().all(|byte| byte.is_ascii_digit());
    let number = if decimal { digits.parse::<u64>().ok() } else { None };
    let bytes = number.zip(shift).and_then(|(number, shift)| number.checked_mul(1 << shift));
    let mib = bytes.ok_or_else(|| MemoryError::Form(Shown::of(text)))?.div_ceil(MIB);
    MemorySize::from_mib(mib).map_err(|source| MemoryError::Range { text: Shown::of(text), source })
}

/// Additions to the guest kernel's command line that the VMM takes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelArgs(String);

/// A text that the VMM would refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Kernel arguments are not printable ASCII, or over {MAX_CMDLINE} bytes together")]
pub struct KernelArgsError;

impl KernelArgs {
    /// # Errors
    /// Other characters than printable ASCII, or too many.
    pub fn new(text: &str) -> Result<Self, KernelArgsError> {
        let printable = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if printable && text.len() <= MAX_CMDLINE {
            Ok(Self(text.trim().into()))
        } else {
            Err(KernelArgsError)
        }
    }

    /// These, and `more` behind them: of two that contradict each other the kernel takes the last.
    ///
    /// # Errors
    /// Both together are too long.
    pub fn and(&self, more: &Self) -> Result<Self, KernelArgsError> {
        Self::new(format!("{} {}", self.0, more.0).trim())
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The beginning of a text from outside, in quotation marks, control characters escaped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    start: String,
    cut: bool,
}

impl Shown {
    #[must_use]
    pub fn of(text: &str) -> Self {
        let mut characters = text.chars();
        let start = characters.by_ref().take(SHOWN).collect();
        Self { start, cut: characters.next().is_some() }
    }
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}{}`", self.start.escape_default(), if self.cut { "..." } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_every_unit() {
        for (text, bytes, mib) in [("256M", 256, 256), ("1g", 1024, 1024), ("1T", 1 << 20, 1 << 20)] {
            assert_eq!(memory(text, Bare::Bytes).unwrap().mib(), bytes, "{text}");
            assert_eq!(memory(text, Bare::Mib).unwrap().mib(), mib, "{text}");
        }
        assert_eq!(memory("268435457", Bare::Bytes).unwrap().mib(), 257);
        assert_eq!(memory("268435456B", Bare::Mib).unwrap().mib(), 256);
        assert_eq!(memory("512", Bare::Mib).unwrap().mib(), 512);
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let endless = "9".repeat(1 << 20);
        for bad in [
            "",
            "0",
            "M",
            "-1",
            "+512",
            "1M",
            "1P",
            "256X",
            "1.5G",
            "256MB",
            "\u{661}M",
            "256\u{b5}",
            "512\0",
            " 512",
            "99999999999999999999",
            "18446744073709551615",
            &endless,
        ] {
            for bare in [Bare::Bytes, Bare::Mib] {
                let error = memory(bad, bare).unwrap_err().to_string();
                assert!(error.len() < 256 && !error.contains('\0'), "{error}");
            }
        }
    }

    #[test]
    fn kernel_arguments_are_bounded() {
        let long = "a".repeat(MAX_CMDLINE);
        let args = KernelArgs::new(&long).unwrap();
        assert_eq!(args.and(&KernelArgs::default()).unwrap(), args);
        assert_eq!(args.and(&KernelArgs::new("b").unwrap()), Err(KernelArgsError));
        assert_eq!(
            KernelArgs::new("quiet").unwrap().and(&KernelArgs::new("debug ").unwrap()).unwrap().as_str(),
            "quiet debug"
        );
        for bad in ["a\nb", "a\0", "\u{e4}", &(long + "a")] {
            assert!(KernelArgs::new(bad).is_err());
        }
    }
}
