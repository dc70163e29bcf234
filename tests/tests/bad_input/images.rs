//! Images that are none, or not what they are said to be. What is in one layer's entries has its unit tests in `image/`.

use std::io::Read;
use std::process::Command;

use serde_json::json;
use tar::{Archive, Builder, EntryType, Header};
use tests::containerd::image::{Draft, entry};

use crate::desk::Desk;

fn run(desk: &Desk, image: &str) -> Command {
    desk.krx(&["run", "--image", image, "--", "true"])
}

/// The archive of an image with one layer, as a file.
fn archive(desk: &Desk, image: &[u8]) -> Command {
    desk.write("image.tar", image);
    run(desk, "oci-archive:image.tar")
}

fn draft(layers: Vec<Vec<u8>>, diff_ids: Option<Vec<String>>) -> Vec<u8> {
    Draft { process: json!({}), layers, diff_ids }.oci()
}

fn layer(make: impl FnOnce(&mut Builder<Vec<u8>>)) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    make(&mut tar);
    tar.into_inner().expect("layer")
}

/// A layer of one entry, under a name that no honest program would write.
fn odd(kind: EntryType, name: &str, link: &str, size: u64) -> Vec<u8> {
    layer(|tar| {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(size);
        let fields = header.as_old_mut();
        fields.name[..name.len()].copy_from_slice(name.as_bytes());
        fields.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        tar.append(&header, &b""[..]).expect("entry");
    })
}

/// An archive without the files that `gone` chooses.
fn without(image: &[u8], gone: impl Fn(&str) -> bool) -> Vec<u8> {
    layer(|tar| {
        for file in Archive::new(image).entries().expect("entries") {
            let mut file = file.expect("entry");
            let name = file.path().expect("path").display().to_string();
            let mut content = Vec::new();
            file.read_to_end(&mut content).expect("content");
            if !gone(&name) {
                entry(tar, EntryType::Regular, &name, 0o644, &content);
            }
        }
    })
}

#[test]
fn images_that_are_none() {
    let desk = Desk::new();
    let good = layer(|tar| entry(tar, EntryType::Regular, "bin/true", 0o755, b"x"));
    desk.goes_on("a good image", &mut archive(&desk, &draft(vec![good.clone()], None)));
    let quiet = &mut desk.krx(&["run", "--image", "oci-archive:image.tar"]);
    desk.refused("nothing to run", quiet, &["Give a command after `--`"]);
    for (what, image, words) in [
        ("no kind", "nonsense", &["`nonsense`", "oci-archive:FILE"][..]),
        ("a kind of others", "docker://debian", &["docker://debian", "oci-archive:FILE"]),
        ("no file", "oci-archive:none", &["none", "No such file"]),
        ("a directory", "oci-archive:root", &["root", "not a regular file"]),
        ("a device", "oci-archive:/dev/zero", &["/dev/zero", "not a regular file"]),
        ("a file for a directory", "oci:kernel", &["kernel"]),
        ("no layout", "oci:root", &["index.json is missing"]),
        ("no archive of docker's", "docker-archive:image.tar", &["manifest.json is missing"]),
        ("no tag", "oci-archive:image.tar:none", &["named none", "leave it out"]),
    ] {
        desk.refused(what, &mut run(&desk, image), &[&["Image "], words].concat());
    }
    for (what, image, words) in [
        ("nothing", &b""[..], &["index.json is missing"][..]),
        ("a text", &b"#!/bin/sh\n"[..], &["image.tar", "because"]),
        ("noise", &[0xa5; 4096][..], &["image.tar", "because"]),
    ] {
        desk.refused(what, &mut archive(&desk, image), words);
    }
    let index = |content: &[u8]| layer(|tar| entry(tar, EntryType::Regular, "index.json", 0o644, content));
    desk.refused("no JSON", &mut archive(&desk, &index(b"{")), &["index.json", "not an image index"]);
    let large = index(&vec![b' '; (4 << 20) + 1]);
    desk.refused("more JSON than there may be", &mut archive(&desk, &large), &["index.json", "4"]);
}

#[test]
fn images_that_are_not_what_they_are_said_to_be() {
    let desk = Desk::new();
    let good = layer(|tar| entry(tar, EntryType::Regular, "bin/true", 0o755, b"x"));
    desk.goes_on("a good image", &mut archive(&desk, &draft(vec![good.clone()], None)));
    let other = layer(|tar| entry(tar, EntryType::Regular, "bin/false", 0o755, b"y"));
    let wrong = format!("sha256:{}", "0".repeat(64));
    let whole = draft(vec![other.clone()], None);
    let hash = tests::containerd::image::digest(other.as_slice());
    let missing = without(&whole, |name| name.ends_with(&hash));
    let flipped: Vec<u8> = other.iter().map(|byte| if *byte == b'y' { b'z' } else { *byte }).collect();
    let forged = layer(|tar| {
        Archive::new(whole.as_slice()).entries().expect("entries").for_each(|file| {
            let mut file = file.expect("entry");
            let name = file.path().expect("path").display().to_string();
            let mut content = Vec::new();
            file.read_to_end(&mut content).expect("content");
            let content = if name.ends_with(&hash) { &flipped } else { &content };
            entry(tar, EntryType::Regular, &name, 0o644, content);
        });
    });
    for (what, image, words) in [
        ("a wrong digest", draft(vec![other.clone()], Some(vec![wrong])), &["not what it is said to be"][..]),
        ("digests that are none", draft(vec![other.clone()], Some(vec!["sha256:../x".into()])), &["../x"]),
        ("digests of fewer layers", draft(vec![other.clone()], Some(vec![])), &["1 layers"]),
        ("other content", forged, &["not what it is said to be"]),
        ("a layer that is missing", missing, &["is missing in the image"]),
        ("a layer that is none", draft(vec![vec![0x1f, 0x8b, 8, 0]], None), &["Layer 1", "because"]),
        ("a name from the root", draft(vec![odd(EntryType::Regular, "/etc/x", "", 0)], None), &["absolute"]),
        ("a name from above", draft(vec![odd(EntryType::Regular, "a/../../x", "", 0)], None), &["`..`"]),
        ("a link out", draft(vec![odd(EntryType::Link, "x", "../../etc/shadow", 0)], None), &["`..`"]),
        ("a link to nothing", draft(vec![odd(EntryType::Link, "x", "etc/shadow", 0)], None), &["not there"]),
        ("a bomb", draft(vec![odd(EntryType::Regular, "x", "", 1 << 40)], None), &["64 GiB", "may have"]),
        ("one layer too many", draft(vec![other; 121], None), &["121 layers", "120 at most"]),
    ] {
        desk.refused(what, &mut archive(&desk, &image), words);
    }
}
