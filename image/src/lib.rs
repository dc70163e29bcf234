//! Container images in files: an OCI layout in a directory or in an archive, or what `docker save` writes.
//!
//! The way of an image, by file: [`reference`](Reference) is what was typed; `blobs` finds files in the directory or archive; `manifest`
//! chooses the image and checks its JSON; `decode` decompresses a layer, of which `tar` reads the entries and `unpack` makes
//! files; [`store`](Store) keeps layers by what they contain, and [`root`](ContainerRoot) stacks them for one container.
//!
//! All of an image is a stranger's bytes: each part has a size cap, digests are compared before anything is used again,
//! and paths are resolved by the kernel with the layer's directory as their root (openat2(2)).

#![forbid(unsafe_code)]

mod blobs;
mod decode;
mod digest;
mod error;
mod manifest;
mod overlay;
mod reference;
mod remove;
mod root;
mod store;
pub mod tar;
#[cfg(test)]
mod testing;
mod unpack;

pub use crate::digest::Digest;
pub use crate::error::{ImageError, LayerError};
pub use crate::manifest::Config;
pub use crate::overlay::private_mounts;
pub use crate::reference::Reference;
pub use crate::root::ContainerRoot;
pub use crate::store::{Image, Step, Store};
