//! Images for the tests, made of files that were built here: no registry is asked for anything.
//!
//! An archive is an OCI image layout in a tar file, its one layer not compressed.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use super::tools::Tools;

/// dash, coreutils and `workload`; also the pause image.
pub const SMALL: &str = "krx.test/small:1";
/// All of target/guest/python-rootfs.
pub const PYTHON: &str = "krx.test/python:1";
/// All of target/guest/software-rootfs: redis, PostgreSQL and nginx.
pub const SOFTWARE: &str = "krx.test/software:1";
/// All of target/guest/throughput-rootfs: fio and iperf3.
pub const THROUGHPUT: &str = "krx.test/throughput:1";

/// Of the Debian root file system, what the small image has.
const PROGRAMS: &str = "dash cat chmod df echo env grep head hostname id ls mkdir mknod mount rm sed sleep stat stty tail touch true tty unshare";
/// What its programs are linked with.
pub const LIBRARIES: [&str; 4] = ["libc.so.6", "libselinux.so.1", "libpcre2-8.so.0", "libacl.so.1"];
const MOUNT_LIBRARIES: [&str; 2] = ["libmount.so.1", "libblkid.so.1"];
const DIRECTORIES: [&str; 11] = [
    "dev",
    "etc",
    "proc",
    "run",
    "sys",
    "tmp",
    "usr",
    "usr/bin",
    "usr/lib",
    "usr/lib64",
    "usr/lib/x86_64-linux-gnu",
];
const LINKS: [(&str, &str); 4] =
    [("bin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64"), ("usr/bin/sh", "dash")];
const PASSWD: &str =
    "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\nweb:x:1000:1000::/:/bin/sh\n";
const GROUP: &str = "root:x:0:\nweb:x:1000:\nlogs:x:2000:web\nnogroup:x:65534:\n";
const SEARCH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Writes the small image's archive.
///
/// # Panics
/// When something is not built.
pub fn small(tools: &Tools, at: &Path) {
    let layer = at.with_extension("layer");
    let mut tar = Builder::new(BufWriter::new(File::create(&layer).expect("layer")));
    small_layer(tools, &mut tar);
    finish(tar);
    archive(SMALL, &["/usr/bin/workload", "pause"], &layer, at);
}

/// Writes the one layer of the small image.
///
/// # Panics
/// As [`small`].
pub fn small_layer(tools: &Tools, tar: &mut Builder<impl Write>) {
    let root = tools.built("guest/python-rootfs", "make rootfs");
    let workload = tools.built("x86_64-unknown-linux-gnu/agent/workload", "scripts/workload");
    for directory in DIRECTORIES {
        let mode = if directory == "tmp" { 0o1777 } else { 0o755 };
        entry(tar, EntryType::Directory, directory, mode, b"");
    }
    for (name, target) in LINKS {
        let mut header = header(EntryType::Symlink, 0o777, 0);
        tar.append_link(&mut header, name, target).expect("link");
    }
    let programs = PROGRAMS.split(' ').map(|name| format!("usr/bin/{name}"));
    let libraries = LIBRARIES.iter().chain(&MOUNT_LIBRARIES);
    let libraries = libraries.map(|name| format!("usr/lib/x86_64-linux-gnu/{name}"));
    for name in programs.chain(libraries).chain(["usr/lib64/ld-linux-x86-64.so.2".to_string()]) {
        let content = std::fs::read(root.join(&name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        entry(tar, EntryType::Regular, &name, 0o755, &content);
    }
    let workload = std::fs::read(workload).expect("workload");
    entry(tar, EntryType::Regular, "usr/bin/workload", 0o755, &workload);
    entry(tar, EntryType::Regular, "etc/passwd", 0o644, PASSWD.as_bytes());
    entry(tar, EntryType::Regular, "etc/group", 0o644, GROUP.as_bytes());
}

/// Writes the archive of the image with Python: a hundred megabytes.
///
/// # Panics
/// When the root file system is not built.
pub fn python(tools: &Tools, at: &Path) {
    tree(&tools.built("guest/python-rootfs", "make rootfs"), PYTHON, &["python3"], at);
}

/// Writes the archive of the image with servers.
///
/// # Panics
/// When the root file system is not built.
pub fn software(tools: &Tools, at: &Path) {
    tree(&tools.built("guest/software-rootfs", "make rootfs"), SOFTWARE, &["sh"], at);
}

/// Writes the archive of the image with programs that measure.
///
/// # Panics
/// When the root file system is not built.
pub fn throughput(tools: &Tools, at: &Path) {
    let made_by = "rootfs/software-rootfs.sh throughput";
    tree(&tools.built("guest/throughput-rootfs", made_by), THROUGHPUT, &["sh"], at);
}

/// Writes the archive of an image that is a directory.
fn tree(root: &Path, name: &str, command: &[&str], at: &Path) {
    let layer = at.with_extension("layer");
    let mut tar = Builder::new(BufWriter::new(File::create(&layer).expect("layer")));
    tar.follow_symlinks(false);
    tar.append_dir_all(".", root).expect("root file system");
    finish(tar);
    archive(name, command, &layer, at);
}

fn finish(tar: Builder<BufWriter<File>>) {
    tar.into_inner().and_then(|writer| writer.into_inner().map_err(std::io::Error::from)).expect("layer");
}

fn header(kind: EntryType, mode: u32, size: usize) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size as u64);
    header
}

/// Appends an entry of root's.
///
/// # Panics
/// When it cannot be written.
pub fn entry(tar: &mut Builder<impl Write>, kind: EntryType, name: &str, mode: u32, content: &[u8]) {
    let mut header = header(kind, mode, content.len());
    tar.append_data(&mut header, name, content).unwrap_or_else(|error| panic!("{name}: {error}"));
}

/// The SHA-256 of what is read, in hexadecimal digits.
///
/// # Panics
/// When it cannot be read.
pub fn digest(mut content: impl Read) -> String {
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let read = content.read(&mut buffer).expect("read");
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An archive of one image with one layer, which is removed.
fn archive(name: &str, command: &[&str], layer: &Path, at: &Path) {
    let size = layer.metadata().expect("layer").len();
    let hash = digest(File::open(layer).expect("layer"));
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Cmd": command, "Env": [format!("PATH={SEARCH}")] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{hash}")] },
    });
    let mut tar = Builder::new(BufWriter::new(File::create(at).expect("archive")));
    let config = blob(&mut tar, "application/vnd.oci.image.config.v1+json", &config);
    let media = "application/vnd.oci.image.layer.v1.tar";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": config,
        "layers": [{ "mediaType": media, "digest": format!("sha256:{hash}"), "size": size }],
    });
    let mut manifest = blob(&mut tar, MANIFEST, &manifest);
    manifest["annotations"] = json!({ "io.containerd.image.name": name });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] }).to_string();
    entry(&mut tar, EntryType::Regular, "index.json", 0o644, index.as_bytes());
    entry(&mut tar, EntryType::Regular, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#);
    let mut content = File::open(layer).expect("layer");
    tar.append_file(format!("blobs/sha256/{hash}"), &mut content).expect("layer");
    finish(tar);
    std::fs::remove_file(layer).expect("layer");
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Appends a document, and gives its descriptor.
fn blob(tar: &mut Builder<impl Write>, media: &str, content: &Value) -> Value {
    let content = content.to_string();
    let hash = digest(content.as_bytes());
    entry(tar, EntryType::Regular, &format!("blobs/sha256/{hash}"), 0o644, content.as_bytes());
    json!({ "mediaType": media, "digest": format!("sha256:{hash}"), "size": content.len() })
}

/// An image in the making, all of it in memory.
#[derive(Debug, Clone)]
pub struct Draft {
    /// What its configuration says of the process.
    pub process: Value,
    /// Archives, the lowest first.
    pub layers: Vec<Vec<u8>>,
    /// Digests of the layers' content, the true ones unless told otherwise.
    pub diff_ids: Option<Vec<String>>,
}

impl Draft {
    fn config(&self) -> Value {
        let true_ids =
            || self.layers.iter().map(|layer| format!("sha256:{}", digest(layer.as_slice()))).collect();
        let ids = self.diff_ids.clone().unwrap_or_else(true_ids);
        json!({
            "architecture": "amd64", "os": "linux", "config": self.process,
            "rootfs": { "type": "layers", "diff_ids": ids },
        })
    }

    /// The archive of an OCI layout with it.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn oci(&self) -> Vec<u8> {
        let mut tar = Builder::new(Vec::new());
        let config = blob(&mut tar, "application/vnd.oci.image.config.v1+json", &self.config());
        let layers = self.layers.iter().map(|layer| {
            let hash = digest(layer.as_slice());
            entry(&mut tar, EntryType::Regular, &format!("blobs/sha256/{hash}"), 0o644, layer);
            let media = "application/vnd.oci.image.layer.v1.tar";
            json!({ "mediaType": media, "digest": format!("sha256:{hash}"), "size": layer.len() })
        });
        let layers: Vec<_> = layers.collect();
        let manifest =
            json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers });
        let manifest = blob(&mut tar, MANIFEST, &manifest);
        let index = json!({ "schemaVersion": 2, "manifests": [manifest] }).to_string();
        entry(&mut tar, EntryType::Regular, "index.json", 0o644, index.as_bytes());
        tar.into_inner().expect("archive")
    }

    /// What `docker save` would make of it.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn docker(&self, tag: &str) -> Vec<u8> {
        let mut tar = Builder::new(Vec::new());
        let config = self.config().to_string();
        let name = format!("{}.json", digest(config.as_bytes()));
        entry(&mut tar, EntryType::Regular, &name, 0o644, config.as_bytes());
        let layers = self.layers.iter().enumerate().map(|(index, layer)| {
            let name = format!("{index}/layer.tar");
            entry(&mut tar, EntryType::Regular, &name, 0o644, layer);
            name
        });
        let layers: Vec<_> = layers.collect();
        let images = json!([{ "Config": name, "RepoTags": [tag], "Layers": layers }]).to_string();
        entry(&mut tar, EntryType::Regular, "manifest.json", 0o644, images.as_bytes());
        tar.into_inner().expect("archive")
    }
}
