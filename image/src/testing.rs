//! What unit tests share: directories that go with them, and archives.

use std::fs;
use std::path::{Path, PathBuf};

use ::tar::{Builder, EntryType, Header};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::digest::Digest;

/// A directory of one test.
pub(crate) struct Scratch(TempDir);

impl Scratch {
    pub(crate) fn new(test: &str) -> Self {
        Self(TempDir::with_prefix(format!("krx-{test}-")).unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file, making the directories above it.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }
}

/// A header for an entry of this process's user.
pub(crate) fn header(kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(rustix::process::getuid().as_raw().into());
    header.set_gid(rustix::process::getgid().as_raw().into());
    header.set_mtime(1_000_000_000);
    header.set_size(0);
    header
}

/// An archive that is being made.
pub(crate) struct Archive(Builder<Vec<u8>>);

impl Archive {
    pub(crate) fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    /// Adds an entry under a name that `tar` itself may refuse to write.
    pub(crate) fn add(mut self, kind: EntryType, name: &str, link: &str, data: &[u8]) -> Self {
        let mut header = header(kind, if kind == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_size(data.len() as u64);
        let fields = header.as_old_mut();
        fields.name[..name.len()].copy_from_slice(name.as_bytes());
        fields.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.add(EntryType::Regular, name, "", data)
    }

    pub(crate) fn directory(self, name: &str) -> Self {
        self.add(EntryType::Directory, name, "", b"")
    }

    pub(crate) fn link(self, name: &str, to: &str) -> Self {
        self.add(EntryType::Symlink, name, to, b"")
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// An OCI layout that is being made.
pub(crate) struct Layout<'a> {
    scratch: &'a Scratch,
    name: &'a str,
}

impl<'a> Layout<'a> {
    pub(crate) fn new(scratch: &'a Scratch, name: &'a str) -> Self {
        Self { scratch, name }
    }

    /// Adds a blob, of which the descriptor is returned.
    pub(crate) fn blob(&self, content: &[u8], media_type: &str) -> Value {
        let digest = Digest::of(content);
        self.scratch.write(&format!("{}/blobs/sha256/{}", self.name, digest.hex()), content);
        json!({ "mediaType": media_type, "digest": digest.to_string(), "size": content.len() })
    }

    /// Puts something else in the place of a blob.
    pub(crate) fn overwrite(&self, descriptor: &Value, content: &[u8]) {
        let hex = descriptor["digest"].as_str().unwrap().trim_start_matches("sha256:");
        self.scratch.write(&format!("{}/blobs/sha256/{hex}", self.name), content);
    }

    pub(crate) fn manifest(&self, config: &Value, layers: &[Value]) -> Value {
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers });
        self.blob(manifest.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json")
    }

    pub(crate) fn index(&self, manifests: &[Value]) {
        let index = json!({ "schemaVersion": 2, "manifests": manifests });
        self.scratch.write(&format!("{}/index.json", self.name), index.to_string().as_bytes());
    }
}
