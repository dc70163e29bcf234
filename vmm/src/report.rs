//! How errors reach people: the chain once, each cause on its own line.

use std::error::Error;
use std::fmt::Write;
use std::sync::atomic::{AtomicU32, Ordering};

/// `error` and its causes, one line each.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, "\n  because: {cause}");
        source = cause.source();
    }
    text
}

/// `error` and its causes, in one line.
#[must_use]
pub fn line(error: &dyn Error) -> String {
    chain(error).replace("\n  because: ", ": ")
}

/// One warning on standard error: something was lost that the VM can live without.
pub fn warn(what: &str, error: &dyn Error) {
    eprintln!("krx-vmm: {what}: {}", chain(error));
}

/// Warnings that a guest can provoke, as often as it likes: only the first [`Limited::SHOWN`] are shown.
#[derive(Debug, Default)]
pub struct Limited(AtomicU32);

impl Limited {
    /// So many of one device tell what is wrong; the log of a host is not a guest's to fill.
    pub const SHOWN: u32 = 8;

    /// As [`warn`], while there is something left to show.
    pub fn warn(&self, what: &str, error: &dyn Error) {
        if let Some(rest) = self.count() {
            warn(&format!("{what}{rest}"), error);
        }
    }

    /// What is to be added to the next warning, if it is shown at all.
    fn count(&self) -> Option<&'static str> {
        let shown = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |shown| {
            (shown < Self::SHOWN).then_some(shown + 1)
        });
        match shown {
            Ok(shown) if shown + 1 == Self::SHOWN => Some(" (further warnings of this device are not shown)"),
            Ok(_) => Some(""),
            Err(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn chain_has_each_text_once() {
        let error = Config::from_json(b"{").unwrap_err();
        let text = chain(&error);
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("because: EOF"), "{text}");
    }

    #[test]
    fn warnings_without_end_are_shown_a_few_times() {
        let limited = Limited::default();
        let shown: Vec<_> = (0..1000).filter_map(|_| limited.count()).collect();
        assert_eq!(shown.len(), 8);
        assert_eq!(shown.iter().filter(|rest| !rest.is_empty()).count(), 1);
        assert!(shown[7].contains("not shown"));
    }
}
