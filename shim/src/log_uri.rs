//! The log URIs of containerd: where the output of a process goes when it is not to FIFOs (containerd, runtime v2, Logging).
//!
//! It reads them, and opens nothing. Hosts, and schemes that need a containerd to talk to, are refused by name.

use std::path::PathBuf;

use crate::error::{Result, ShimError};

/// Longest URI; a path has at most as many bytes.
const MAX: usize = 4096;

/// Where output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogUri {
    /// Both streams are appended to a file.
    File(PathBuf),
    /// Both go to a program of their own, that is started for them.
    Program { path: PathBuf, arguments: Vec<String> },
}

impl LogUri {
    /// `None` for what is no URI: the path of a FIFO.
    ///
    /// # Errors
    /// It is a URI that nothing can be written to, or of a scheme that is not known.
    pub fn parse(text: &str) -> Result<Option<Self>> {
        let Some((scheme, rest)) = text.split_once("://") else { return Ok(None) };
        if scheme != "file" && scheme != "binary" {
            return Err(ShimError::unimplemented(format!(
                "Standard streams by {scheme:.20}:// are not supported: containerd has to give FIFOs, file:// or binary://"
            )));
        }
        let invalid = || {
            ShimError::invalid(format!(
                "Log URI {text:.200} cannot be used: it has to be {scheme}:///PATH, with at most {MAX} bytes"
            ))
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        // Not the path of a host, and not a directory.
        if text.len() > MAX || !path.starts_with('/') || path.ends_with('/') {
            return Err(invalid());
        }
        let path = PathBuf::from(decode(path).ok_or_else(invalid)?);
        if scheme == "file" {
            return Ok(Some(Self::File(path)));
        }
        let arguments = arguments(query).ok_or_else(invalid)?;
        Ok(Some(Self::Program { path, arguments }))
    }
}

/// A program's arguments: each key, and its value, in their order; of a key that comes again, the first value.
fn arguments(query: &str) -> Option<Vec<String>> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let pair = pair.replace('+', " ");
        let (key, value) = pair.split_once('=').unwrap_or((&pair, ""));
        let (key, value) = (decode(key)?, decode(value)?);
        if pairs.iter().all(|(known, _)| *known != key) {
            pairs.push((key, value));
        }
    }
    Some(pairs.into_iter().flat_map(|(key, value)| [key, value]).collect())
}

/// Percent-encoding (RFC 3986, 2.1). `None` for what is cut off, no UTF-8, or has a zero byte, which ends paths and arguments.
fn decode(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        let byte = if byte == b'%' { u8::try_from(digit()? * 16 + digit()?).ok()? } else { byte };
        if byte == 0 {
            return None;
        }
        decoded.push(byte);
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(path: &str, arguments: &[&str]) -> LogUri {
        LogUri::Program { path: path.into(), arguments: arguments.iter().map(ToString::to_string).collect() }
    }

    #[test]
    fn what_containerd_s_clients_give_is_understood() {
        let parse = |text| LogUri::parse(text).unwrap();
        assert_eq!(parse("/run/fifo/x-stdout"), None);
        assert_eq!(parse(""), None);
        assert_eq!(parse("file:///var/log/a%20b?mode=1#x"), Some(LogUri::File("/var/log/a b".into())));
        assert_eq!(parse("binary:///bin/log"), Some(program("/bin/log", &[])));
        let nerdctl = "binary:///usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib%2Fnerdctl";
        let arguments = ["_NERDCTL_INTERNAL_LOGGING", "/var/lib/nerdctl"];
        assert_eq!(parse(nerdctl), Some(program("/usr/bin/nerdctl", &arguments)));
        let query = "binary:///l?z=1+2&a&z=3&b=%3D%26";
        assert_eq!(parse(query), Some(program("/l", &["z", "1 2", "a", "", "b", "=&"])));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let long = format!("file:///{}", "x".repeat(MAX));
        for bad in [
            "file://",
            "file://host/log",
            "file://log",
            "file:///dir/",
            "file:///%",
            "file:///%4",
            "file:///%4é",
            "file:///%00",
            "file:///%ff",
            "binary://",
            "binary:///?a=b",
            "binary:///bin/log?%00=1",
            "binary:///bin/log?a=%zz",
            &long,
        ] {
            assert!(LogUri::parse(bad).unwrap_err().to_string().contains("cannot be used"), "{bad}");
        }
        let refused = LogUri::parse("attachablebinary:///bin/log").unwrap_err().to_string();
        assert!(refused.contains("attachablebinary://"), "{refused}");
    }
}
