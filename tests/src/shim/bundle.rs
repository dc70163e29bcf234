//! Configurations of bundles.

use serde_json::{Value, json};

use crate::Host;

/// A container that runs `command` in the Python root file system, read-only, as containerd would have it.
#[must_use]
pub fn config(host: &Host, command: &[&str]) -> Value {
    let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({ "type": kind }));
    let mount = |at: &str, kind: &str| json!({"destination": at, "type": kind, "source": kind, "options": ["nosuid"]});
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": command, "cwd": "/",
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        },
        "root": {"path": host.rootfs(), "readonly": true},
        "mounts": [mount("/proc", "proc"), mount("/tmp", "tmpfs")],
        "linux": {"namespaces": namespaces},
    })
}

/// A container of the CRI's in the pod of `sandbox`, whose process is `pid`.
#[must_use]
pub fn member(host: &Host, command: &[&str], sandbox: &str, pid: u32) -> Value {
    let mut config = config(host, command);
    config["annotations"] = json!({
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": sandbox,
    });
    let of = |kind: &str, name: &str| json!({"type": kind, "path": format!("/proc/{pid}/ns/{name}")});
    config["linux"]["namespaces"] = json!([
        {"type": "pid"}, {"type": "mount"}, of("ipc", "ipc"), of("uts", "uts"), of("network", "net"),
    ]);
    config
}

/// The container that stands for a pod of the CRI's.
#[must_use]
pub fn sandbox(host: &Host, id: &str) -> Value {
    let mut config = config(host, &["/pause"]);
    config["annotations"] = json!({
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-id": id,
    });
    config
}

/// A process as `exec` takes it.
#[must_use]
pub fn process(command: &[&str]) -> Value {
    json!({
        "user": {"uid": 0, "gid": 0}, "args": command, "cwd": "/",
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
    })
}
