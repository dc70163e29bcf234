//! `krx run --image`: images in files, and what is kept of them.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};
use tests::containerd::image::{Draft, entry, small_layer};
use tests::containerd::tools::Tools;
use tests::pod::{Ended, Place, finish, until};
use tests::scratch::Scratch;

/// A place with a cache of its own, on a file system that overlayfs takes as its upper layer.
struct Images {
    place: Place,
    cache: Scratch,
}

impl Images {
    fn new() -> Option<Self> {
        Some(Self { place: Place::new()?, cache: Scratch::under("/run".as_ref()) })
    }

    fn write(&self, name: &str, content: &[u8]) -> String {
        self.cache.write(name, content).display().to_string()
    }

    fn krx(&self, arguments: &[&str]) -> Command {
        let mut krx = self.place.krx(arguments);
        krx.env("KRX_IMAGE_DIR", self.cache.join("store"));
        krx
    }

    fn run(&self, image: &str, options: &[&str], command: &[&str]) -> Ended {
        let mut krx = self.krx(&["run", "--image", image]);
        finish(krx.args(options).arg("--").args(command), b"")
    }

    /// What is in a directory of the cache.
    fn kept(&self, directory: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.cache.join("store").join(format!("krx-{directory}")))
            .into_iter()
            .flatten()
            .flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// Nothing is left but whole layers.
    fn assert_clean(&self) {
        self.place.assert_clean();
        assert_eq!((self.kept("tmp"), self.kept("runs")), (vec![], vec![]));
    }
}

fn layer(make: impl FnOnce(&mut Builder<Vec<u8>>)) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    make(&mut tar);
    tar.into_inner().expect("layer")
}

fn base() -> Vec<u8> {
    layer(|tar| {
        small_layer(&Tools::find(), tar);
        for name in ["opt", "opt/full"] {
            entry(tar, EntryType::Directory, name, 0o755, b"");
        }
        for name in ["opt/full/lower", "opt/gone", "opt/kept"] {
            entry(tar, EntryType::Regular, name, 0o644, b"lower\n");
        }
    })
}

/// The small image with another layer on it, which removes and replaces, and reaches through a link of the first.
fn two_layers(process: Value) -> Draft {
    let upper = layer(|tar| {
        entry(tar, EntryType::Regular, "opt/.wh.gone", 0o644, b"");
        entry(tar, EntryType::Regular, "opt/full/.wh..wh..opq", 0o644, b"");
        entry(tar, EntryType::Regular, "opt/full/upper", 0o640, b"upper\n");
        entry(tar, EntryType::Regular, "bin/hello", 0o755, b"#!/bin/sh\necho hello $*\n");
        let mut header = Header::new_gnu();
        header.set_mode(0o4711);
        header.set_uid(1000);
        header.set_gid(2000);
        header.set_mtime(1_000_000_000);
        header.set_size(4);
        tar.append_data(&mut header, "opt/owned", &b"own\n"[..]).expect("entry");
    });
    Draft { process, layers: vec![base(), upper], diff_ids: None }
}

#[test]
fn an_image_is_run_as_it_wishes() {
    let Some(images) = Images::new() else { return };
    let process = json!({
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo $COLOUR; pwd; id -u; id -G"],
        "Env": ["PATH=/usr/bin", "COLOUR=green"], "WorkingDir": "/opt", "User": "web",
    });
    let draft = two_layers(process);
    let path = images.write("image.tar", &draft.oci());
    let image = format!("oci-archive:{path}");
    assert_eq!(images.run(&image, &[], &[]).ok().out, "green\n/opt\n1000\n1000 2000\n");
    assert_eq!(images.kept("layers").len(), 2);
    let options = ["-e", "COLOUR=red", "-u", "0", "-w", "/tmp"];
    assert_eq!(images.run(&image, &options, &[]).ok().out, "red\n/tmp\n0\n0\n");
    let entrypoint = images.run(&image, &["--entrypoint", "hello"], &["you"]);
    assert_eq!(entrypoint.ok().out, "hello you\n");
    let script =
        "cd /opt; ls; ls full; cat full/upper kept; stat -c '%a %u %g %Y' owned; test -L /bin && echo link";
    let seen = images.run(&image, &["-u", "0"], &[script]).ok().out;
    assert_eq!(seen, "full\nkept\nowned\nupper\nupper\nlower\n4711 1000 2000 1000000000\nlink\n");
    // The same layers, told of in other ways: nothing is unpacked again.
    let docker = images.write("docker.tar", &draft.docker("krx.test/two:1"));
    let again =
        images.run(&format!("docker-archive:{docker}:krx.test/two:1"), &["-u", "0"], &["ls /opt/full"]);
    assert_eq!(again.ok().out, "upper\n");
    let layout = images.cache.join("layout");
    fs::create_dir(&layout).expect("directory");
    let unpacked = Command::new("tar").arg("-xf").arg(&path).arg("-C").arg(&layout).status().expect("tar");
    assert!(unpacked.success());
    let again = images.run(&format!("oci:{}", layout.display()), &["-u", "0"], &["ls /opt/full"]);
    assert_eq!(again.ok().out, "upper\n");
    assert_eq!(images.kept("layers").len(), 2);
    images.assert_clean();
}

#[test]
fn what_a_container_writes_goes_with_it() {
    let Some(images) = Images::new() else { return };
    let draft = two_layers(json!({ "Cmd": ["sh", "-c", "echo up; touch /opt/mine; exec sleep 600"] }));
    let image = format!("oci-archive:{}", images.write("image.tar", &draft.oci()));
    let written =
        images.run(&image, &[], &["sh", "-c", "echo x >/opt/kept; rm -r /opt/full; ls /opt; rm -r /opt"]);
    assert_eq!(written.ok().out, "kept\nowned\n");
    // Deeper than a process may have descriptors.
    let script =
        "p=d; while [ ${#p} -lt 2400 ]; do p=$p/d; done; mkdir /deep && cd /deep && mkdir -p $p && echo made";
    assert_eq!(images.run(&image, &[], &["sh", "-c", script]).ok().out, "made\n");
    images.assert_clean();
    let seen = images.run(&image, &["--read-only"], &["sh", "-c", "cat /opt/kept; ls /opt/full; touch /x"]);
    assert_eq!((seen.out.as_str(), seen.code), ("lower\nupper\n", 1), "{seen:?}");
    images.assert_clean();

    let mut krx = images.krx(&["run", "--name", "living", "--image", &image]);
    let mut child = krx.stdout(Stdio::piped()).spawn().expect("krx");
    let exec = |command: &[&str]| {
        let arguments = [&["exec", "-u", "web", "living", "--"], command].concat();
        finish(&mut images.krx(&arguments), b"")
    };
    let id = until(Duration::from_secs(60), || Some(exec(&["id", "-un"])).filter(|ended| ended.code == 0));
    // By the image's own /etc/passwd, which nobody else sees.
    assert_eq!(id.expect("it runs").out, "web\n");
    assert_eq!(images.kept("runs").len(), 1);
    let others = fs::read_to_string("/proc/self/mounts").expect("mounts");
    assert!(!others.contains("merged"), "{others}");
    child.kill().expect("kill");
    child.wait().expect("end");
    // The next one removes what could not be removed.
    let next = images.run(&image, &[], &["ls", "/opt"]);
    assert_eq!(next.ok().out, "full\nkept\nowned\n");
    images.assert_clean();
}

#[test]
fn an_image_is_unpacked_by_one_at_a_time() {
    let Some(images) = Images::new() else { return };
    let draft = two_layers(json!({ "Cmd": ["hello", "world"] }));
    let image = format!("oci-archive:{}", images.write("image.tar", &draft.oci()));
    let begin = || images.krx(&["run", "--image", &image]).stdout(Stdio::piped()).spawn().expect("krx");
    let children: Vec<_> = (0..3).map(|_| begin()).collect();
    for child in children {
        let output = child.wait_with_output().expect("end");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "hello world\n");
    }
    images.assert_clean();
}

#[test]
fn a_full_disk_is_told_and_left_as_it_was() {
    let Some(images) = Images::new() else { return };
    let draft = two_layers(json!({ "Cmd": ["hello"] }));
    let image = format!("oci-archive:{}", images.write("image.tar", &draft.oci()));
    let store = images.cache.join("store");
    fs::create_dir(&store).expect("directory");
    mount(Some("krx-test"), &store, Some("tmpfs"), MsFlags::empty(), Some("size=2m")).expect("tmpfs");
    let full = images.run(&image, &[], &[]);
    assert!(full.code == 125 && full.err.contains("No space left"), "{full:?}");
    assert_eq!(images.kept("layers"), Vec::<PathBuf>::new());
    images.assert_clean();
    umount2(&store, MntFlags::MNT_DETACH).expect("unmount");
    assert_eq!(images.run(&image, &[], &[]).ok().out, "hello\n");
    images.assert_clean();
}
