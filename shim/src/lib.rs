//! `containerd-shim-krx-v2`: containerd's runtime `io.containerd.krx.v2`. Each pod has one such process, which owns the pod's
//! VM and makes containers in it as containerd asks.
//!
//! The way of a request, by file: [`start`] makes the process, [`serve`] takes requests, `service` carries them to the verbs
//! of `shim`; `make` makes a container and, for the first one, its `vm`; `tasks` and `process` know what there is and in
//! which state; `io` copies streams; what happens unasked comes through `watch` and goes out as `events`.
//!
//! A library, so that what reads bytes of others can be fuzzed: `config_json`, `pod_config`, `log_uri` and `http`; and the program, which is
//! [`main`].
//!
//! Knows containerd, and nothing of how a VM works: that is `krx_sandbox`'s.

#![forbid(unsafe_code)]

mod cgroup;
pub mod config_json;
mod delete;
mod error;
mod events;
mod flags;
pub mod http;
mod io;
pub mod log_uri;
mod logger;
mod make;
mod metrics;
mod observe;
pub mod pod_config;
mod process;
mod requests;
mod root_disk;
mod sandbox_service;
mod scope;
mod serve;
mod service;
mod shim;
mod start;
mod tasks;
mod vm;
mod volumes;
mod watch;

use std::process::ExitCode;

use crate::error::chain;
use crate::flags::Flags;

/// The name by which containerd knows this runtime.
const RUNTIME: &str = "io.containerd.krx.v2";
const USAGE: &str = "\
containerd-shim-krx-v2 is started by containerd, as the runtime io.containerd.krx.v2:
  ctr run --runtime io.containerd.krx.v2 IMAGE ID
Actions: start, delete. -info tells what the runtime can do, -version its version.";

/// What the program does.
#[must_use]
pub fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if std::env::args().nth(1).as_deref() == Some(logger::ACTION) {
        return fail(&logger::become_program(arguments.by_ref().skip(1)).to_string());
    }
    let flags = match Flags::parse(arguments) {
        Ok(flags) => flags,
        Err(error) => return fail(&error),
    };
    if flags.version {
        println!("containerd-shim-krx-v2 {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let done = match flags.action.as_str() {
        _ if flags.info => info().map_err(|error| chain(&error)),
        "start" => start::start(&flags).map_err(|error| chain(&error)),
        "delete" => delete::delete(&flags).map_err(|error| chain(&error)),
        "serve" => serve::serve(&flags).map_err(|error| chain(&error)),
        _ => Err(USAGE.into()),
    };
    done.map_or_else(|error| fail(&error), |()| ExitCode::SUCCESS)
}

fn fail(error: &str) -> ExitCode {
    eprintln!("containerd-shim-krx-v2: {error}");
    ExitCode::FAILURE
}

/// What containerd 2 asks before it makes a container.
fn info() -> std::io::Result<()> {
    use containerd_shim_protos::protobuf::Message;
    use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
    use std::io::Write;

    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..RuntimeVersion::default() };
    let info = RuntimeInfo { name: RUNTIME.into(), version: Some(version).into(), ..RuntimeInfo::default() };
    std::io::stdout().write_all(&info.write_to_bytes().map_err(std::io::Error::other)?)
}
