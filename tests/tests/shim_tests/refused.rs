//! Bundles and streams that are refused.

use std::fs;

use containerd_shim_protos::api::Mount;
use containerd_shim_protos::shim::shim::CreateTaskRequest;
use containerd_shim_protos::ttrpc::Code;
use serde_json::{Value, json};
use tests::shim::{Player, Shim, assert_refused, bundle, limit, refusal};

use super::SLEEP;

/// A shim that is asked for one thing after the other.
fn asked(player: &Player, name: &str) -> Shim {
    let id = player.id(name);
    player.shim(&id, &bundle::config(&player.host, &SLEEP))
}

fn create_with(player: &Player, shim: &Shim, rootfs: Vec<Mount>) -> (Code, String) {
    let mut config = bundle::config(&player.host, &SLEEP);
    config["root"]["path"] = json!("rootfs");
    fs::create_dir_all(shim.bundle.join("rootfs")).expect("rootfs");
    fs::write(shim.bundle.join("config.json"), config.to_string()).expect("config.json");
    refusal(shim.task.create(limit(), &CreateTaskRequest { rootfs, ..shim.creation(&shim.id) }))
}

pub(crate) fn bundles(player: &Player) {
    let shim = asked(player, "bundles");
    let id = shim.id.as_str();
    let path = shim.bundle.join("config.json");
    let written = |json: &[u8]| {
        fs::write(&path, json).expect("config.json");
        shim.create(id)
    };
    let invalid = Code::INVALID_ARGUMENT;
    assert_refused(written(b""), invalid, "config.json");
    assert_refused(written(b"{\"ociVersion\": "), invalid, "config.json");
    assert_refused(written(b"[]"), invalid, "config.json");
    assert_refused(written(&[b' '; 5 << 20]), invalid, "config.json");
    assert_refused(written(b"{\"ociVersion\": \"1.1.0\"}"), invalid, "");
    assert_refused(written("[".repeat(1 << 20).as_bytes()), invalid, "config.json");
    fs::remove_file(&path).expect("remove");
    assert_refused(shim.create(id), invalid, "config.json");
    fs::create_dir(&path).expect("directory");
    assert_refused(shim.create(id), invalid, "config.json");
    fs::remove_dir(&path).expect("remove");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("FIFO");
    assert_refused(shim.create(id), invalid, "config.json");
    fs::remove_file(&path).expect("remove");
    let mut elsewhere = shim.creation(id);
    elsewhere.bundle = "/no/such/bundle".into();
    assert_refused(shim.task.create(limit(), &elsewhere), invalid, "/no/such/bundle");

    let mount = |kind: &str, source: &str, target: &str, options: &[&str]| Mount {
        type_: kind.into(),
        source: source.into(),
        target: target.into(),
        options: options.iter().map(ToString::to_string).collect(),
        ..Mount::default()
    };
    let missing: Vec<_> = (0..300).map(|layer| format!("/no/such/snapshots/{layer}/fs")).collect();
    let many = format!("lowerdir={}", missing.join(":"));
    for (rootfs, part) in [
        (mount("nosuchfs", "none", "", &[]), "nosuchfs"),
        (mount("overlay", "overlay", "", &["lowerdir=/no/such/layer"]), "/no/such/layer"),
        (mount("overlay", "overlay", "", &[&many]), "/no/such/snapshots/0/fs"),
        (mount("bind", "/no/such/directory", "", &["rbind"]), "/no/such/directory"),
        (mount("bind", "/tmp", "../../x", &["rbind"]), "leads out"),
        (mount("tmpfs", "tmpfs", "", &["no-such-option=1"]), "tmpfs"),
        (mount("", "", "", &[]), "mount"),
    ] {
        let (code, message) = create_with(player, &shim, vec![rootfs]);
        assert!(code == invalid, "{part}: {code:?} {message}");
        assert!(message.contains(part) || message.contains("mounted"), "{part}: {message}");
    }
    // After all that it makes one that can be made.
    fs::write(&path, bundle::config(&player.host, &SLEEP).to_string()).expect("config.json");
    shim.create(id).expect("create");
    shim.delete(id, "").expect("delete");
    shim.shut_down();
}

pub(crate) fn by_name(player: &Player) {
    let shim = asked(player, "named");
    let refused_as = |wanted: Code, field: &str, change: &dyn Fn(&mut Value)| {
        let mut config = bundle::config(&player.host, &SLEEP);
        change(&mut config);
        fs::write(shim.bundle.join("config.json"), config.to_string()).expect("config.json");
        let (code, message) = refusal(shim.create(&shim.id));
        assert!(message.contains(field), "{field}: {message}");
        assert_eq!(code, wanted, "{message}");
    };
    let refused = |field: &str, change: &dyn Fn(&mut Value)| refused_as(Code::UNIMPLEMENTED, field, change);
    let namespaces = |kinds: &[&str]| kinds.iter().map(|kind| json!({ "type": kind })).collect::<Vec<_>>();
    refused("hostNetwork", &|config| {
        config["linux"]["namespaces"] = namespaces(&["pid", "ipc", "mount"]).into()
    });
    refused("hostIPC", &|config| {
        config["linux"]["namespaces"] = namespaces(&["pid", "network", "mount"]).into()
    });
    refused_as(Code::INVALID_ARGUMENT, "linux.uidMappings", &|config| {
        config["linux"]["namespaces"] = namespaces(&["pid", "ipc", "network", "user"]).into();
    });
    let mapping = || json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
    refused_as(Code::INVALID_ARGUMENT, "linux.uidMappings", &|config| {
        config["linux"]["uidMappings"] = mapping();
    });
    refused("hostUsers: false", &|config| {
        let linux = &mut config["linux"];
        linux["namespaces"] = namespaces(&["pid", "ipc", "network", "mount", "user"]).into();
        (linux["uidMappings"], linux["gidMappings"]) = (mapping(), mapping());
        config["annotations"] = json!({"io.kubernetes.cri.container-type": "sandbox"});
    });
    refused("process.apparmorProfile", &|config| config["process"]["apparmorProfile"] = json!("of-mine"));
    refused("hooks", &|config| config["hooks"] = json!({"createRuntime": [{"path": "/bin/true"}]}));
    refused("linux.devices", &|config| {
        config["linux"]["devices"] = json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]);
    });
    refused("linux.namespaces[0].path", &|config| {
        config["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/pid");
    });
    shim.shut_down();
}

pub(crate) fn streams(player: &Player) {
    let shim = asked(player, "streams");
    let id = shim.id.as_str();
    let file = player.scratch.write("a-file", "x").to_string_lossy().into_owned();
    let missing = player.scratch.join("no-fifo").to_string_lossy().into_owned();
    for path in [missing.as_str(), &file, "/dev/zero", "/", "attachablebinary:///bin/log", "file://log"] {
        let code = if path.starts_with("a") { Code::UNIMPLEMENTED } else { Code::INVALID_ARGUMENT };
        for stream in 0..3 {
            let mut request = shim.creation(id);
            *[&mut request.stdin, &mut request.stdout, &mut request.stderr][stream] = path.into();
            let said = if path == "file://log" { "file://log cannot be used" } else { "FIFO" };
            assert_refused(shim.task.create(limit(), &request), code, said);
        }
    }
    for (uri, said) in [
        ("binary:///no/such/program", "/no/such/program cannot be started"),
        ("binary:///etc/passwd", "/etc/passwd cannot be started"),
        ("file:///dev/null", "/dev/null cannot be opened"),
        ("file:///etc/passwd/x", "/etc/passwd/x cannot be opened"),
    ] {
        let request = CreateTaskRequest { stdout: uri.into(), stderr: uri.into(), ..shim.creation(id) };
        assert_refused(shim.task.create(limit(), &request), Code::INVALID_ARGUMENT, said);
    }
    // Nobody opens their other ends.
    let fifos = ["in", "out", "err"].map(|name| player.fifo(&format!("streams-{name}")));
    let request = CreateTaskRequest {
        stdin: fifos[0].clone(),
        stdout: fifos[1].clone(),
        stderr: fifos[2].clone(),
        ..shim.creation(id)
    };
    shim.task.create(limit(), &request).expect("create");
    shim.start(id, "").expect("start");
    let mut process = shim.addition(id, "odd", &bundle::process(&["true"]));
    process.stdout = missing;
    assert_refused(shim.task.exec(limit(), &process), Code::INVALID_ARGUMENT, "FIFO");
    shim.exec(id, "odd", &["true"]).expect("the id is free still");
    shim.end();
}
