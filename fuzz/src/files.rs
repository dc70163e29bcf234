//! Directories and sockets of the targets, in memory, one set for each thread that runs targets.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use krx_image::Digest;

/// A directory of its own, removed when dropped.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let base =
            if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("krx-fuzz-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).expect("scratch directory");
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).expect("scratch file");
        path
    }

    /// A file of zeroes and holes.
    pub(crate) fn disk(&self, length: u64) -> fs::File {
        let path = self.file("disk", &[0; 4096]);
        let disk = fs::File::options().read(true).write(true).open(path).expect("disk");
        disk.set_len(length).expect("disk");
        disk
    }

    /// A share with a file, a directory and links, as it was before the last guest.
    pub(crate) fn fresh_share(&self) -> PathBuf {
        let share = self.path("share");
        let _ = fs::remove_dir_all(&share);
        fs::create_dir_all(share.join("directory")).expect("share");
        fs::write(share.join("file"), [b'x'; 5000]).expect("share");
        fs::write(self.path("secret"), "outside").expect("scratch file");
        for (name, to) in [("up", "../secret"), ("absolute", "/etc/passwd"), ("loop", "loop")] {
            std::os::unix::fs::symlink(to, share.join(name)).expect("share");
        }
        share
    }

    /// A directory with nothing in it, beside a file that is to stay as it is.
    pub(crate) fn empty(&self, name: &str) -> PathBuf {
        let directory = self.path(name);
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir(&directory).expect("directory");
        self.file("secret", b"outside");
        directory
    }

    /// An OCI layout with an image of one layer, which is this archive as it is.
    pub(crate) fn layout(&self, layer: &[u8]) -> PathBuf {
        let layout = self.empty("layout");
        let blobs = layout.join("blobs/sha256");
        fs::create_dir_all(&blobs).expect("layout");
        let blob = |content: &[u8], media: &str| {
            let digest = Digest::of(content);
            fs::write(blobs.join(digest.hex()), content).expect("blob");
            let media = format!("application/vnd.oci.image.{media}");
            format!(r#"{{"mediaType":"{media}","digest":"{digest}","size":{}}}"#, content.len())
        };
        let id = Digest::of(layer);
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{id}"]}}}}"#
        );
        let config = blob(config.as_bytes(), "config.v1+json");
        let layer = blob(layer, "layer.v1.tar");
        let manifest = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{layer}]}}"#);
        let manifest = blob(manifest.as_bytes(), "manifest.v1+json");
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{manifest}]}}"#);
        fs::write(layout.join("index.json"), index).expect("index");
        layout
    }

    /// A bundle with a root and this `config.json`.
    pub(crate) fn bundle(&self, config: &[u8]) -> PathBuf {
        let bundle = self.path("bundle");
        fs::create_dir_all(bundle.join("rootfs/etc")).expect("bundle");
        fs::write(bundle.join("config.json"), config).expect("bundle");
        bundle
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Clients of the host's vsock socket.
#[derive(Debug)]
pub(crate) struct Clients {
    socket: PathBuf,
    streams: Vec<UnixStream>,
}

impl Clients {
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket, streams: Vec::new() }
    }

    /// The first byte chooses who speaks: a new client, or one that is there, which may also leave.
    pub(crate) fn say(&mut self, bytes: &[u8]) {
        let Some((who, words)) = bytes.split_first() else { return };
        let who = usize::from(*who);
        if who % 4 == 0 || self.streams.is_empty() {
            if self.streams.len() < 16
                && let Ok(stream) = UnixStream::connect(&self.socket)
                && stream.set_nonblocking(true).is_ok()
            {
                self.streams.push(stream);
            }
            if let Some(stream) = self.streams.last_mut() {
                let _ = stream.write(words);
            }
            return;
        }
        let at = who % self.streams.len();
        if words.is_empty() {
            self.streams.swap_remove(at);
        } else {
            let _ = self.streams[at].write(words);
            let _ = self.streams[at].read(&mut [0; 4096]);
        }
    }
}

/// The far end of a network interface.
#[derive(Debug)]
pub(crate) struct Wire(UnixDatagram);

impl Wire {
    /// The wire, and the end for the device.
    pub(crate) fn new() -> Option<(Self, OwnedFd)> {
        let (near, far) = UnixDatagram::pair().ok()?;
        far.set_nonblocking(true).ok()?;
        Some((Self(far), near.into()))
    }

    /// The first byte chooses: take all frames there are, or send one that begins with the rest and is so many times
    /// 257 bytes long, up to what no tap would send.
    pub(crate) fn say(&mut self, bytes: &[u8]) {
        match bytes.split_first() {
            None | Some((0, _)) => while self.0.recv(&mut [0; 16]).is_ok() {},
            Some((size, front)) => {
                let mut frame = front.to_vec();
                frame.resize(front.len().max(usize::from(*size - 1) * 257), 0x5a);
                let _ = self.0.send(&frame);
            }
        }
    }
}
