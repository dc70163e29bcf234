//! Bundles that are none, or ask for what cannot be.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};

use crate::desk::Desk;

/// A bundle that runs.
fn good() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs"},
        "process": {"args": ["true"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]}
    })
}

fn with(pointer: &str, value: Value) -> Value {
    let mut config = good();
    let (above, name) = pointer.rsplit_once('/').expect("pointer");
    config.pointer_mut(above).expect("object")[name] = value;
    config
}

/// A directory with `rootfs` in it, empty before.
fn directory(desk: &Desk) -> PathBuf {
    let bundle = desk.path("bundle");
    let _ = fs::remove_dir_all(&bundle);
    desk.write("bundle/rootfs/bin/true", "");
    desk.write("outside/file", "");
    bundle
}

fn run(desk: &Desk) -> Command {
    desk.krx(&["run", "--bundle", "bundle"])
}

fn configured(desk: &Desk, config: impl AsRef<[u8]>) -> Command {
    fs::write(directory(desk).join("config.json"), config).expect("config.json");
    run(desk)
}

#[test]
fn config_json_that_cannot_be_read() {
    let desk = Desk::new();
    desk.goes_on("a good bundle", &mut configured(&desk, good().to_string()));
    desk.refused("no directory", &mut desk.krx(&["run", "--bundle", "nowhere"]), &["nowhere/config.json"]);
    let refused = |what: &str, make: &dyn Fn(PathBuf), words: &[&str]| {
        make(directory(&desk).join("config.json"));
        let words = [&["bundle/config.json cannot be read", "4 MiB at most"], words].concat();
        desk.refused(what, &mut run(&desk), &words);
    };
    refused("no config.json", &|_| (), &["No such file"]);
    let sparse = |path| fs::File::create(path).and_then(|file| file.set_len(100 << 20)).expect("sparse file");
    refused("100 MiB of it", &sparse, &["over 4194304 bytes"]);
    refused("a fifo", &|path| mkfifo(&path, Mode::S_IRWXU).expect("fifo"), &["Not a regular file"]);
    refused("a directory", &|path| fs::create_dir(path).expect("directory"), &["Not a regular file"]);
    refused("a loop", &|path| symlink("config.json", path).expect("link"), &["symbolic links"]);
    refused("a device", &|path| symlink("/dev/zero", path).expect("link"), &["Not a regular file"]);
}

#[test]
fn config_json_that_is_none() {
    let desk = Desk::new();
    let nested = format!("{}1{}", "[".repeat(1 << 20), "]".repeat(1 << 20));
    let twice = good().to_string().replacen('{', r#"{"ociVersion":"1.0.0","#, 1);
    let twice_below = with("/linux/sysctl", json!({"a": "1"})).to_string();
    let twice_below = twice_below.replace(r#""a":"1""#, r#""net.a":"1","net.a":"2""#);
    let escape = with("/linux/namespaces/0/type", json!("\u{1b}]0;owned\u{7}\u{9b}2J")).to_string();
    let long = with("/linux/namespaces/0/type", json!("x".repeat(1 << 20))).to_string();
    for (what, config, words) in [
        ("nothing", "", &["line 1"][..]),
        ("half of it", &good().to_string()[..60], &["line 1"]),
        ("no JSON", "#!/bin/sh\nexit\n", &["line 1"]),
        ("nothing but depth", &nested, &["recursion"]),
        ("another kind of JSON", "[1, 2]", &["config.json"]),
        ("a field twice", &twice, &["ociVersion", "twice"]),
        ("a field twice, deeper", &twice_below, &["net.a", "twice"]),
        ("words for the terminal", &escape, &["unknown variant", "\\u{1b}]0;owned\\u{7}\\u{9b}2J"]),
        ("too many words", &long, &["unknown variant", "..."]),
    ] {
        let words = [&["config.json is not an OCI runtime configuration"], words].concat();
        desk.refused(what, &mut configured(&desk, config), &words);
    }
    let bytes = [good().to_string().as_bytes(), b"\xff\xfe"].concat();
    desk.refused("no text", &mut configured(&desk, bytes), &["config.json is not an OCI"]);
}

#[test]
fn what_a_bundle_asks_for_and_cannot_have() {
    let desk = Desk::new();
    let mount =
        |destination: &str, kind: &str| json!([{"destination": destination, "type": kind, "source": "x"}]);
    let bind = |source: &str| json!([{"destination": "/x", "type": "bind", "source": source}]);
    let mounts: Vec<_> = (0..10_000)
        .map(|number| json!({"destination": format!("/{number}"), "type": "tmpfs", "source": "tmpfs"}))
        .collect();
    let megabyte = "x".repeat(1 << 20);
    let many = vec!["x".repeat(1000); 3000];
    let cases: &[(&str, &str, Value, &[&str])] = &[
        ("another version", "/ociVersion", json!("2.0.0"), &["ociVersion", "2.0.0"]),
        ("a version that is none", "/ociVersion", json!("\u{1b}[2J1"), &["ociVersion"]),
        ("no version", "/ociVersion", json!(null), &["config.json", "null", "line 1"]),
        ("a version that is a number", "/ociVersion", json!(1.2), &["config.json", "line 1"]),
        ("an unknown mount", "/mounts", mount("/x", "nfs4"), &["mounts[0].type", "nfs4"]),
        ("a mount of no type", "/mounts", mount("/x", ""), &["mounts[0].type"]),
        ("a relative mount", "/mounts", mount("x", "tmpfs"), &["mounts[0].destination", "absolute"]),
        ("a mount above the root", "/mounts", mount("/a/../../x", "tmpfs"), &["mounts[0].destination"]),
        ("a mount of what is not there", "/mounts", bind("none"), &["mounts[0].source", "bundle/none"]),
        ("a mount from above", "/mounts", bind("../outside"), &["mounts[0].source", "out of the bundle"]),
        ("10,000 mounts", "/mounts", json!(mounts), &["mounts", "10000", "1024 at most"]),
        ("a relative directory", "/process/cwd", json!("../x"), &["process.cwd", "absolute"]),
        ("no root", "/root", json!(null), &["Bundle field root is missing"]),
        ("a root above", "/root/path", json!("../outside"), &["root.path", "out of the bundle", "meant"]),
        ("a root out of nowhere", "/root/path", json!("../../../none"), &["none", "give the directory"]),
        ("an unknown namespace", "/linux/namespaces/0/type", json!("galaxy"), &["galaxy", "line 1"]),
        (
            "users without a map",
            "/linux/namespaces/0/type",
            json!("user"),
            &["linux.uidMappings", "type user"],
        ),
        (
            "a map without users",
            "/linux/gidMappings",
            json!([{"containerID": 0, "hostID": 9, "size": 1}]),
            &["linux.gidMappings", "type user"],
        ),
        ("a namespace twice", "/linux/namespaces/0/type", json!("mount"), &["namespaces[1].type", "twice"]),
        ("no process", "/process", json!(null), &["Bundle field process is missing"]),
        ("no arguments", "/process/args", json!([]), &["process.args is missing"]),
        ("null for arguments", "/process/args", json!(null), &["process.args is missing"]),
        ("a NUL", "/process/args", json!(["sh", "-c", "a\0b"]), &["process.args[2]", "NUL"]),
        ("a NUL in a variable", "/process/env", json!(["A=\0"]), &["process.env[0]", "NUL"]),
        ("a NUL in a path", "/process/cwd", json!("/\0"), &["process.cwd", "NUL"]),
        ("a megabyte of argument", "/process/args", json!(["sh", megabyte]), &["args[1]", "1048576", "file"]),
        ("a megabyte of variable", "/process/env", json!([megabyte]), &["env[0]", "1048576", "file"]),
        ("more than a stack takes", "/process/args", json!(many), &["together", "2097152", "Shorten"]),
        ("hooks", "/hooks", json!({"prestart": [{"path": "/bin/true"}]}), &["hooks.prestart"]),
        ("a user that is none", "/process/user/uid", json!(-1), &["config.json", "-1"]),
        ("a long host name", "/hostname", json!("h".repeat(65)), &["hostname"]),
        ("a domain without a namespace", "/domainname", json!("d"), &["domainname", "uts"]),
    ];
    for (what, pointer, value, words) in cases {
        let config = with(pointer, value.clone()).to_string();
        desk.refused(what, &mut configured(&desk, config), &[&["Bundle "], *words].concat());
    }
    // What is large and can be.
    let much = vec!["x".repeat(1000); 1040];
    let mut large = with("/process/args", json!(much));
    large["process"]["env"] = json!(vec!["A=b"; 1000]);
    large["mounts"] = json!(mounts[..1024]);
    desk.goes_on("a megabyte of arguments", &mut configured(&desk, large.to_string()));
}

#[test]
fn a_root_that_is_none() {
    let desk = Desk::new();
    let refused = |what: &str, make: &dyn Fn(PathBuf), words: &[&str]| {
        let bundle = directory(&desk);
        fs::write(bundle.join("config.json"), good().to_string()).expect("config.json");
        fs::remove_dir_all(bundle.join("rootfs")).expect("rootfs");
        make(bundle.join("rootfs"));
        desk.refused(what, &mut run(&desk), &[&["bundle/rootfs"], words].concat());
    };
    refused("no root", &|_| (), &["No such file", "give the directory"]);
    refused("a file", &|path| fs::write(path, "").expect("file"), &["is not a directory", "give the one"]);
    refused("a loop", &|path| symlink("rootfs", path).expect("link"), &["symbolic links"]);
    let bundle = desk.path("bundle");
    for (what, target) in [("a link out", "/etc"), ("a link up", "../outside"), ("a link to all", "/")] {
        let mut command = configured(&desk, good().to_string());
        fs::remove_dir_all(bundle.join("rootfs")).expect("rootfs");
        symlink(target, bundle.join("rootfs")).expect("link");
        desk.refused(what, &mut command, &["root.path", "leads out of the bundle", "if it is meant"]);
    }
    let mut inside = configured(&desk, good().to_string());
    fs::rename(bundle.join("rootfs"), bundle.join("real")).expect("rename");
    symlink("real", bundle.join("rootfs")).expect("link");
    desk.goes_on("a link inside", &mut inside);
    let mut named = configured(&desk, with("/root/path", json!(desk.path("outside"))).to_string());
    desk.goes_on("a root that is named as it is", &mut named);
}
