//! Why an image cannot be used. The sentences are what a person reads, each with its cause.

use std::io;
use std::path::PathBuf;

use crate::digest::Digest;

/// Why there is no container of an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(
        "Image `{0}` cannot be: give oci:DIR, oci-archive:FILE or docker-archive:FILE, and :TAG after it where it has several"
    )]
    Reference(String),
    #[error("Image {path} cannot be read")]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Archive {path} cannot be read")]
    Archive {
        path: PathBuf,
        #[source]
        source: crate::tar::TarError,
    },
    #[error("{0} is missing in the image: it is incomplete, or of another kind")]
    Missing(String),
    #[error("{name} of the image cannot be read")]
    Read {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("{name} of the image is not {what}")]
    Json {
        name: String,
        what: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error(
        "{name} of the image is damaged, or not what it is said to be: its content has the digest {found}"
    )]
    Digest { name: String, found: Digest },
    #[error("Image is not usable: {0}")]
    Unusable(String),
    #[error("Several images are there: choose one by its tag, {0}")]
    Choice(String),
    #[error("Layer {number} of the image cannot be unpacked")]
    Layer {
        /// From 1 on, the lowest first.
        number: usize,
        #[source]
        source: LayerError,
    },
    #[error("Images cannot be kept in {path} (KRX_IMAGE_DIR names another directory)")]
    Store {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "Layers cannot be stacked in {path}: overlayfs wants a file system such as ext4, xfs or tmpfs (KRX_IMAGE_DIR names another directory)"
    )]
    Overlay {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Why a layer is none.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("It cannot be decompressed")]
    Decode(#[source] io::Error),
    #[error("It is no archive")]
    Tar(#[from] crate::tar::TarError),
    #[error("{name} cannot be: {why}")]
    Entry { name: String, why: &'static str },
    #[error("{name} cannot be made")]
    Make {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("It holds more than the {0} GiB that an image may have")]
    TooLarge(u64),
    #[error("It holds more files than the {0} that an image may have")]
    TooMany(u64),
    #[error("It is damaged, or not what it is said to be: the {what} has the digest {found}, not {wanted}")]
    Digest { what: &'static str, found: Digest, wanted: Digest },
}

/// Words of a stranger's, for a terminal: without characters that mean something to it, and not too many.
pub(crate) fn shown(text: &str) -> String {
    const MOST: usize = 300;
    let mut shown: String = text.chars().take(MOST).flat_map(char::escape_debug).collect();
    if text.chars().nth(MOST).is_some() {
        shown.push_str("...");
    }
    shown
}
