//! The action `delete`: the shim of a task is gone, and containerd asks another process to remove what it has left.
//!
//! The VMM ends by itself when its owner does, and its mounts with it. What may be left is the pod's directory, its
//! cgroup, and the socket.
//!
//! Or the shim is there, but containerd has given it up: one that was killed while its shim made a pod finds, when it is
//! back, a shim without a task. Nobody would ever end that one.

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use containerd_shim::StartOpts;
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use krx_sandbox::state_dir::StateRoot;
use nix::poll::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::cgroup;
use crate::config_json::{ConfigJson, Role};
use crate::flags::Flags;
use crate::start::socket_path;
use crate::vm::pod_name;
use crate::watch::timestamp;

/// Name of this program.
const PROGRAM: &str = "containerd-shim-krx-v2";
/// What containerd is told of tasks whose shim was killed.
const KILLED: u32 = 137;
/// Milliseconds that a killed shim may take to be gone.
const GONE: u16 = 5_000;

/// Carries the action out.
pub(crate) fn delete(flags: &Flags) -> io::Result<()> {
    let bundle = if flags.bundle.is_empty() { PathBuf::from(".") } else { PathBuf::from(&flags.bundle) };
    let config = ConfigJson::read(&bundle).ok();
    let is_member = config.as_ref().is_some_and(|config| matches!(config.role, Role::Member(_)));
    if !is_member {
        clean_up(flags, &bundle, config.as_ref());
    }
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..DeleteResponse::default()
    };
    io::stdout().write_all(&response.write_to_bytes().map_err(io::Error::other)?)
}

/// Ends shims that still serve this id, and waits until they are gone.
fn end_shim(flags: &Flags) {
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = process.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        let Some(Ok(shim)) = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) else { continue };
        // A process that ends meanwhile has no command line.
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        if serves(&line, flags) && pidfd_send_signal(&shim, Signal::KILL).is_ok() {
            // Until then, it is there to answer at its socket.
            let _ = poll(&mut [PollFd::new(shim.as_fd(), PollFlags::POLLIN)], GONE);
        }
    }
}

/// Whether a command line is that of the shim which serves the id of `flags`.
fn serves(line: &[u8], flags: &Flags) -> bool {
    let mut words = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    let is_shim =
        words.next().is_some_and(|name| Path::new(&name).file_name().is_some_and(|name| name == PROGRAM));
    let Ok(its) = Flags::parse(words) else { return false };
    is_shim && its.action == "serve" && its.id == flags.id && its.namespace == flags.namespace
}

fn clean_up(flags: &Flags, bundle: &Path, config: Option<&ConfigJson>) {
    end_shim(flags);
    // Waits for a VMM that is about to end, and removes the directory.
    if let Ok(directory) = StateRoot::from_env().create(&pod_name(&flags.namespace, &flags.id)) {
        drop(directory);
    }
    // Without a bundle, the address is that which `start` would give it.
    let address = fs::read_to_string(bundle.join("address"));
    let address = address.unwrap_or_else(|_| {
        let options = StartOpts {
            id: flags.id.clone(),
            namespace: flags.namespace.clone(),
            address: flags.address.clone(),
            ..StartOpts::default()
        };
        options.socket_address(&options.id)
    });
    let socket = socket_path(address.trim());
    // One that is answered at is another pod's: a bundle that has lost its configuration does not say that it is a
    // member's.
    if UnixStream::connect(socket).is_err() {
        let _ = fs::remove_file(socket);
    }
    // At last, as systemd may have to be waited for.
    if let Some(cgroup) = config.and_then(|config| config.cgroup.as_deref()) {
        cgroup::clean_up(cgroup);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shim_of_an_id_is_known_by_its_command_line() {
        let flags = Flags { namespace: "k8s.io".into(), id: "abc".into(), ..Flags::default() };
        let line = |program: &str, id: &str, action: &str| {
            let words = [program, "-namespace", "k8s.io", "-id", id, "-address", "/run/c.sock", action, ""];
            serves(words.join("\0").as_bytes(), &flags)
        };
        assert!(line("/usr/bin/containerd-shim-krx-v2", "abc", "serve"));
        assert!(!line("/usr/bin/containerd-shim-krx-v2", "abcd", "serve"), "another pod's");
        assert!(!line("/usr/bin/containerd-shim-krx-v2", "abc", "delete"), "this one");
        assert!(!line("/usr/bin/containerd-shim-runc-v2", "abc", "serve"));
        assert!(!serves(b"", &flags) && !serves(b"\xff\0-id", &flags));
    }
}
