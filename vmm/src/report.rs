//! How errors reach people: the chain once, each cause on its own line.

use std::error::Error;
use std::fmt::Write;

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

/// One warning on standard error: something was lost that the VM can live without.
pub fn warn(what: &str, error: &dyn Error) {
    eprintln!("krx-vmm: {what}: {}", chain(error));
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
}
