//! The action `delete`: the shim of a task is gone, and containerd asks another process to remove what it has left.
//!
//! The VMM ends by itself when its owner does, and its mounts with it. What may be left is the pod's directory, its
//! cgroup, and the socket.

use std::env;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use krx_sandbox::state_dir::StateRoot;

use crate::cgroup;
use crate::config_json::{ConfigJson, Role};
use crate::flags::Flags;
use crate::start::socket_path;
use crate::vm::pod_name;
use crate::watch::timestamp;

/// What containerd is told of tasks whose shim was killed.
const KILLED: u32 = 137;

/// Carries the action out.
pub(crate) fn delete(flags: &Flags) -> io::Result<()> {
    let bundle = if flags.bundle.is_empty() { env::current_dir()? } else { PathBuf::from(&flags.bundle) };
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

fn clean_up(flags: &Flags, bundle: &Path, config: Option<&ConfigJson>) {
    // Waits for a VMM that is about to end, and removes the directory.
    if let Ok(directory) = StateRoot::from_env().create(&pod_name(&flags.namespace, &flags.id)) {
        drop(directory);
    }
    if let Some(cgroup) = config.and_then(|config| config.cgroup.as_deref()) {
        cgroup::clean_up(cgroup);
    }
    if let Ok(address) = fs::read_to_string(bundle.join("address")) {
        let _ = fs::remove_file(socket_path(address.trim()));
    }
}
