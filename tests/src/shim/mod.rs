//! containerd as its shims see it, played by a test: bundles, the actions `start` and `delete`, a socket for events, and
//! requests that containerd itself would never make.

pub mod bundle;
pub mod events;
mod requests;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::sandbox_sync::SandboxClient;
use containerd_shim_protos::ttrpc::context::{Context, with_duration};
use containerd_shim_protos::ttrpc::{Code, Error};
use containerd_shim_protos::{Client, TaskClient};
use serde_json::Value;

use self::events::Recorder;
use crate::Host;
use crate::pod::{Ended, finish, patience};
use crate::scratch::Scratch;

/// containerd's namespace of all tasks here.
pub const NAMESPACE: &str = "shim-test";
/// Longest that a request may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Plays containerd.
#[derive(Debug)]
pub struct Player {
    pub host: Host,
    pub scratch: Scratch,
    pub events: Recorder,
    serial: AtomicU32,
}

/// How `start` is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Flags and the environment, up to containerd 2.2.
    Flags,
    /// A message on standard input, from containerd 2.3 on.
    Bootstrap,
}

/// A shim that was started, and the clients of its services.
pub struct Shim {
    /// Of the task or the sandbox that it was started for.
    pub id: String,
    pub bundle: PathBuf,
    pub address: String,
    pub task: TaskClient,
    pub sandbox: SandboxClient,
}

/// What each request is given.
#[must_use]
pub fn limit() -> Context {
    with_duration(patience(LIMIT))
}

impl Player {
    /// # Panics
    /// When the shim is not built, or no socket can be had.
    #[must_use]
    pub fn new(host: Host) -> Self {
        let scratch = Scratch::under(Path::new("/run"));
        let events = Recorder::new(&scratch.join("events.sock"));
        Self { host, scratch, events, serial: AtomicU32::new(0) }
    }

    fn program(&self) -> PathBuf {
        let program = self.host.krx().with_file_name("containerd-shim-krx-v2");
        assert!(program.exists(), "{} is not built: run make build", program.display());
        program
    }

    /// An id that nobody has had.
    #[must_use]
    pub fn id(&self, name: &str) -> String {
        format!("{name}-{}", self.serial.fetch_add(1, Ordering::Relaxed))
    }

    /// A bundle with this configuration, or without one.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn bundle(&self, id: &str, config: Option<&Value>) -> PathBuf {
        let bundle = self.scratch.join("bundles").join(id);
        fs::create_dir_all(&bundle).expect("bundle");
        if let Some(config) = config {
            fs::write(bundle.join("config.json"), config.to_string()).expect("config.json");
        }
        bundle
    }

    /// The shim's program, as containerd calls it in a bundle.
    #[must_use]
    pub fn call(&self, id: &str, bundle: &Path, action: &[&str]) -> Command {
        let mut command = Command::new(self.program());
        let address = self.scratch.join("containerd.sock");
        command
            .current_dir(bundle)
            .env("TTRPC_ADDRESS", self.events.path())
            .args(["-namespace", NAMESPACE, "-id", id, "-publish-binary", "/bin/true", "-address"])
            .arg(address)
            .args(action);
        command
    }

    /// The action `start`.
    #[must_use]
    pub fn start(&self, id: &str, bundle: &Path, way: Way) -> Ended {
        let mut command = self.call(id, bundle, &["start"]);
        let mut input = Vec::new();
        if way == Way::Bootstrap {
            let params = BootstrapParams {
                instance_id: id.into(),
                namespace: NAMESPACE.into(),
                containerd_ttrpc_address: self.events.path().display().to_string(),
                containerd_grpc_address: self.scratch.join("containerd.sock").display().to_string(),
                ..BootstrapParams::default()
            };
            input = params.write_to_bytes().expect("parameters");
            command.env_remove("TTRPC_ADDRESS");
        }
        finish(&mut command, &input)
    }

    /// The action `delete`: the exit status that it tells.
    ///
    /// # Panics
    /// When it fails.
    pub fn delete(&self, id: &str, bundle: &Path) -> u32 {
        let bundle_flag = bundle.to_string_lossy().into_owned();
        let mut command = self.call(id, Path::new("/"), &["-bundle", &bundle_flag, "delete"]);
        command.stdin(Stdio::null());
        let output = command.output().expect("delete");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let response = containerd_shim_protos::api::DeleteResponse::parse_from_bytes(&output.stdout);
        response.expect("an answer").exit_status
    }

    /// Starts a shim for a bundle.
    ///
    /// # Panics
    /// When it does not start, or answers in another way than it was called.
    #[must_use]
    pub fn shim_by(&self, id: &str, config: Option<&Value>, way: Way) -> Shim {
        let bundle = self.bundle(id, config);
        let mut command = self.call(id, &bundle, &["start"]);
        let started = self.start(id, &bundle, way).ok();
        command.stdin(Stdio::null());
        let address = match way {
            Way::Flags => started.out,
            Way::Bootstrap => {
                let result = BootstrapResult::parse_from_bytes(started.out.as_bytes()).expect("a result");
                assert_eq!((result.protocol.as_str(), result.version), ("ttrpc", 3));
                result.address
            }
        };
        Shim::at(id, bundle, &address)
    }

    /// As containerd up to 2.2 does.
    #[must_use]
    pub fn shim(&self, id: &str, config: &Value) -> Shim {
        self.shim_by(id, Some(config), Way::Flags)
    }

    /// A pod of its own, whose container runs `command`: created and started.
    ///
    /// # Panics
    /// When it is not.
    #[must_use]
    pub fn running(&self, name: &str, command: &[&str]) -> Shim {
        let id = self.id(name);
        let shim = self.shim(&id, &bundle::config(&self.host, command));
        shim.create(&id).expect("create");
        shim.start(&id, "").expect("start");
        shim
    }

    /// A FIFO of the test's.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn fifo(&self, name: &str) -> String {
        let path = self.scratch.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("FIFO");
        path.to_string_lossy().into_owned()
    }
}

impl Shim {
    /// The shim that listens at an address.
    ///
    /// # Panics
    /// When none does.
    #[must_use]
    pub fn at(id: &str, bundle: PathBuf, address: &str) -> Self {
        let connect = || Client::connect(address).unwrap_or_else(|error| panic!("{address}: {error}"));
        let (task, sandbox) = (TaskClient::new(connect()), SandboxClient::new(connect()));
        Self { id: id.into(), bundle, address: address.into(), task, sandbox }
    }

    /// Another client of the same shim.
    #[must_use]
    pub fn again(&self) -> Self {
        Self::at(&self.id, self.bundle.clone(), &self.address)
    }
}

/// The code and the sentence of a request that is to fail.
///
/// # Panics
/// When it does not, or has no sentence of a fit length.
pub fn refusal<T: std::fmt::Debug>(result: Result<T, Error>) -> (Code, String) {
    match result {
        Err(Error::RpcStatus(status)) => {
            let message = status.message.clone();
            assert!((8..6000).contains(&message.len()), "{} bytes: {message:.300}", message.len());
            (status.code(), message)
        }
        Err(other) => panic!("the connection is lost: {other}"),
        Ok(answer) => panic!("not refused: {answer:?}"),
    }
}

/// Asserts a refusal's code and a part of its sentence.
///
/// # Panics
/// When it is another.
#[track_caller]
pub fn assert_refused<T: std::fmt::Debug>(result: Result<T, Error>, code: Code, part: &str) {
    let (found, message) = refusal(result);
    assert!(found == code && message.contains(part), "{found:?} {message:.300}, not {code:?} {part}");
}

/// Writes all to a FIFO whose other end the shim has.
///
/// # Panics
/// When that fails.
pub fn write_fifo(path: &str, bytes: &[u8]) {
    let mut file = fs::File::options().write(true).open(path).expect("FIFO");
    file.write_all(bytes).expect("write");
}
