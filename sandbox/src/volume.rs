//! Volumes as a user writes them: `HOST:GUEST[:ro]`.

use std::io;
use std::path::{Path, PathBuf};

/// Why a volume cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("Volume `{0}` is not of the form HOST:GUEST or HOST:GUEST:ro")]
    Form(String),
    #[error("Volume {text}: {guest} is not an absolute path below / without `..`")]
    Guest { text: String, guest: String },
    #[error("Volume {text}: {host} cannot be used")]
    Host {
        text: String,
        host: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A directory or file of the host that the container sees at `destination`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    pub source: PathBuf,
    pub destination: String,
    pub read_only: bool,
}

impl Volume {
    /// Reads a volume and checks both of its sides.
    ///
    /// # Errors
    /// Another form, a guest path that is not one, a host path that does not exist.
    pub fn parse(text: &str) -> Result<Self, VolumeError> {
        let parts: Vec<_> = text.split(':').collect();
        let (host, guest, read_only) = match parts[..] {
            [host, guest] | [host, guest, "rw"] => (host, guest, false),
            [host, guest, "ro"] => (host, guest, true),
            _ => return Err(VolumeError::Form(text.into())),
        };
        if host.is_empty() || guest.is_empty() {
            return Err(VolumeError::Form(text.into()));
        }
        let destination = destination(guest)
            .ok_or_else(|| VolumeError::Guest { text: text.into(), guest: guest.into() })?;
        let source = Path::new(host).canonicalize().map_err(|source| VolumeError::Host {
            text: text.into(),
            host: host.into(),
            source,
        })?;
        Ok(Self { source, destination, read_only })
    }
}

/// The path with single slashes; `None` for a relative one, the root itself and one with `..`.
pub(crate) fn destination(path: &str) -> Option<String> {
    if !path.starts_with('/') || path.contains('\0') {
        return None;
    }
    let names: Vec<_> = path.split('/').filter(|name| !matches!(*name, "" | ".")).collect();
    (!names.is_empty() && !names.contains(&"..")).then(|| format!("/{}", names.join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read() {
        let volume = Volume::parse("/tmp:/data//in/").unwrap();
        assert_eq!((volume.destination.as_str(), volume.read_only), ("/data/in", false));
        assert!(Volume::parse("/tmp:/data:ro").unwrap().read_only);
        assert!(!Volume::parse("/tmp:/data:rw").unwrap().read_only);
    }

    #[test]
    fn bad_forms_are_refused() {
        for bad in ["", "/tmp", ":", "/tmp:", ":/data", "/tmp:/data:rx", "/a:/b:ro:x"] {
            assert!(matches!(Volume::parse(bad), Err(VolumeError::Form(_))), "{bad}");
        }
    }

    #[test]
    fn guest_paths_are_absolute_and_inside() {
        for bad in ["/tmp:data", "/tmp:/", "/tmp:/../x", "/tmp:/a/../../x", "/tmp:/a\0b"] {
            assert!(matches!(Volume::parse(bad), Err(VolumeError::Guest { .. })), "{bad}");
        }
    }

    #[test]
    fn missing_host_path_is_named() {
        let error = Volume::parse("/nonexistent:/data").unwrap_err();
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }
}
