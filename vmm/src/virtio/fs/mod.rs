//! The file system device (virtio 1.2, 5.11): FUSE requests of the guest, served from a directory of the host by
//! fuse-backend-rs. `request` judges each request before the library sees it, `bounded` what the library makes of it,
//! `worker` moves them.
//!
//! The device knows nothing of mounts: the tree it serves is made by [`share`](crate::share). There is no DAX window.

mod bounded;
mod kept;
mod known;
mod negotiation;
pub mod request;
mod worker;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};

use self::bounded::Bounded;
use self::worker::FsWorker;
use super::device::{Activation, Device, DeviceError, DeviceKind, Placement, Worker};
use crate::jail::seccomp::Kind;

/// High priority (forgets), and one queue of requests.
const QUEUE_SIZES: [u16; 2] = [64, 1024];
/// `struct virtio_fs_config`: the tag, then the number of request queues.
const TAG_SIZE: usize = 36;
const CONFIG_SIZE: usize = TAG_SIZE + 4;
/// How long the guest may believe names and attributes: a change on the host is seen after at most this.
const METADATA_TIMEOUT: Duration = Duration::from_secs(1);

/// The file system device of one guest.
#[derive(Debug)]
pub struct Fs {
    config: [u8; CONFIG_SIZE],
    root: PathBuf,
    /// Files that the guest may know and have open.
    most: u64,
}

impl Fs {
    /// A device that shows `root` under `tag`.
    ///
    /// # Errors
    /// `InvalidInput` for a tag longer than 36 bytes, and what reading `root` says.
    pub fn new(tag: &str, root: &Path) -> io::Result<Self> {
        let mut config = [0; CONFIG_SIZE];
        let place = config[..TAG_SIZE].get_mut(..tag.len()).ok_or(io::ErrorKind::InvalidInput)?;
        place.copy_from_slice(tag.as_bytes());
        config[TAG_SIZE] = 1;
        root.metadata()?;
        Ok(Self { config, root: root.into(), most: known::most() })
    }
}

impl Device for Fs {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Fs
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(CONFIG_SIZE);
        let count = data.len().min(CONFIG_SIZE - start);
        data[..count].copy_from_slice(&self.config[start..start + count]);
    }

    /// It blocks on the host's file systems.
    fn placement(&self) -> Placement {
        Placement::OwnThread(Kind::Files)
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Worker>, DeviceError> {
        Ok(Box::new(FsWorker::new(self.root.clone(), self.most, activation)?))
    }
}

/// The FUSE server, new at each activation: a driver that starts over knows no inodes. Made by the thread that serves, as it
/// opens files.
fn serve(root: &Path, most: u64) -> io::Result<worker::Server> {
    let root_dir = root.to_str().ok_or(io::ErrorKind::InvalidInput)?.to_string();
    let config = Config {
        root_dir,
        // Data is kept between openings only while the file's times and size have not changed on the host: see `kept`.
        cache_policy: CachePolicy::Auto,
        attr_timeout: METADATA_TIMEOUT,
        entry_timeout: METADATA_TIMEOUT,
        xattr: true,
        // The host clears setuid bits and capabilities of a file that is written, in the same call.
        killpriv_v2: true,
        // One file shared twice, once read-only, is two files: else the first one opened would lend its rights.
        enable_mntid: true,
        // Node numbers are made of the host's: else the library keeps one for each file that was ever looked up, and
        // a guest that makes and removes files without end has no end of them.
        use_host_ino: true,
        ..Config::default()
    };
    Ok(worker::Server::new(Bounded::new(PassthroughFs::new(config)?, most)))
}

#[cfg(test)]
mod tests;
