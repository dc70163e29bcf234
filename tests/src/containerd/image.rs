//! Images for the tests, made of files that were built here: no registry is asked for anything.
//!
//! An archive is an OCI image layout in a tar file, its one layer not compressed.

use std::fs::File;
use std::io::{BufWriter, Read};
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
    let root = tools.built("guest/python-rootfs", "make rootfs");
    let workload = tools.built("x86_64-unknown-linux-gnu/agent/workload", "scripts/workload");
    let layer = at.with_extension("layer");
    let mut tar = Builder::new(BufWriter::new(File::create(&layer).expect("layer")));
    for directory in DIRECTORIES {
        entry(
            &mut tar,
            EntryType::Directory,
            directory,
            if directory == "tmp" { 0o1777 } else { 0o755 },
            b"",
        );
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
        entry(&mut tar, EntryType::Regular, &name, 0o755, &content);
    }
    let workload = std::fs::read(workload).expect("workload");
    entry(&mut tar, EntryType::Regular, "usr/bin/workload", 0o755, &workload);
    entry(&mut tar, EntryType::Regular, "etc/passwd", 0o644, PASSWD.as_bytes());
    entry(&mut tar, EntryType::Regular, "etc/group", 0o644, GROUP.as_bytes());
    finish(tar);
    archive(SMALL, &["/usr/bin/workload", "pause"], &layer, at);
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

fn entry(tar: &mut Builder<BufWriter<File>>, kind: EntryType, name: &str, mode: u32, content: &[u8]) {
    let mut header = header(kind, mode, content.len());
    tar.append_data(&mut header, name, content).unwrap_or_else(|error| panic!("{name}: {error}"));
}

fn digest(mut content: impl Read) -> String {
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
fn blob(tar: &mut Builder<BufWriter<File>>, media: &str, content: &Value) -> Value {
    let content = content.to_string();
    let hash = digest(content.as_bytes());
    entry(tar, EntryType::Regular, &format!("blobs/sha256/{hash}"), 0o644, content.as_bytes());
    json!({ "mediaType": media, "digest": format!("sha256:{hash}"), "size": content.len() })
}
