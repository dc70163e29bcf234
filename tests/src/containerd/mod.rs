//! containerd of the tests: Debian's program with a configuration, state and images of its own on a tmpfs.
//!
//! The runtime that its pods and containers get is the one of `KRX_TEST_RUNTIME`: `krx` unless given, or `runc`,
//! which tells whether it is the test that is wrong.

mod ctr;
pub mod image;
pub mod remains;
pub mod suite;
pub mod tools;

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use krx_sandbox::settings::annotations::Annotation;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use self::image::SMALL;
use self::remains::Remains;
use self::tools::Tools;
use crate::cri::Client;
use crate::cri::pod::CGROUPS;
use crate::pod::{finish, until};
use crate::scratch::Scratch;

/// Longest that containerd may take to be ready: it starts in seconds under emulation, on an idle machine.
const START: Duration = Duration::from_secs(120);
/// Longest that it may take to stop.
const STOP: Duration = Duration::from_secs(20);
/// Of its log, what a failed test shows.
const LAST_LINES: usize = 60;
/// Network of the pods, and the host's address in it.
const BRIDGE: &str = "krx-test0";
const SUBNET: &str = "10.88.0.0/24";
pub const GATEWAY: &str = "10.88.0.1";

/// A runtime as containerd knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Runtime {
    /// In the CRI plugin's configuration.
    pub handler: &'static str,
    /// Names the shim's program.
    pub kind: &'static str,
}

pub const KRX: Runtime = Runtime { handler: "krx", kind: "io.containerd.krx.v2" };
pub const RUNC: Runtime = Runtime { handler: "runc", kind: "io.containerd.runc.v2" };

/// What a containerd is started with.
#[derive(Debug)]
pub struct Setup {
    pub tools: Tools,
    /// Of pods and containers for which no other is named.
    pub runtime: Runtime,
    /// Level of its log, which is its shims', too.
    pub log: String,
    /// The small image, which is made without one.
    pub image: Option<PathBuf>,
}

/// A containerd that runs.
#[derive(Debug)]
pub struct Engine {
    scratch: Scratch,
    tools: Tools,
    runtime: Runtime,
    client: Client,
    child: Mutex<Option<Child>>,
    before: Remains,
}

impl Engine {
    /// Starts containerd and imports the small image.
    ///
    /// # Panics
    /// When something is not built, or containerd is not ready in time.
    #[must_use]
    pub fn start() -> Self {
        let runtime = match std::env::var("KRX_TEST_RUNTIME").as_deref() {
            Ok("runc") => RUNC,
            Ok("krx") | Err(_) => KRX,
            Ok(other) => panic!("KRX_TEST_RUNTIME is krx or runc, not {other}"),
        };
        let log = std::env::var("KRX_TEST_LOG").unwrap_or_else(|_| "info".into());
        Self::start_with(Setup { tools: Tools::find(), runtime, log, image: None })
    }

    /// As [`Self::start`].
    ///
    /// # Panics
    /// As [`Self::start`].
    #[must_use]
    pub fn start_with(setup: Setup) -> Self {
        let Setup { tools, runtime, log, image } = setup;
        if runtime == KRX {
            let _ = tools.built("release/containerd-shim-krx-v2", "make build");
        }
        // A tmpfs: overlayfs refuses other file systems that an emulated host has as its upper layer.
        let scratch = Scratch::under(Path::new("/run"));
        let client = Client::new(&scratch.join("containerd.sock"));
        // Of ctr's namespace; runtimes make it for the first container, and leave it.
        let _ = fs::create_dir(Path::new(CGROUPS).join("default"));
        let before = Remains::now();
        let engine = Self { scratch, tools, runtime, client, child: Mutex::new(None), before };
        // Above all pods', so that none is the first to make it.
        let cgroup = Path::new(CGROUPS).join(engine.cgroup().trim_start_matches('/'));
        fs::create_dir(cgroup).expect("cgroup of the pods");
        engine.write_configuration(&log);
        engine.spawn();
        let archive = image.unwrap_or_else(|| {
            let archive = engine.scratch.join("small.tar");
            image::small(&engine.tools, &archive);
            archive
        });
        engine.import(&archive);
        engine
    }

    fn write_configuration(&self, level: &str) {
        let at = self.scratch.path().display();
        // Also of a test that is the first, or the only one.
        fs::create_dir_all(self.scratch.join("logs")).expect("directory of the pods' logs");
        // Links, beside which a test may have plugins of its own.
        let cni = self.scratch.join("cni-bin");
        fs::create_dir_all(&cni).expect("directory of the CNI plugins");
        for plugin in fs::read_dir(self.tools.cni()).expect("CNI plugins").flatten() {
            let link = cni.join(plugin.file_name());
            // There already when the level alone changes.
            if !link.exists() {
                symlink(plugin.path(), link).expect("CNI plugin");
            }
        }
        self.scratch.write("config.toml", format!(
r#"version = 2
root = "{at}/root"
state = "{at}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing"]
[grpc]
address = "{at}/containerd.sock"
[debug]
level = "{level}"
[plugins."io.containerd.internal.v1.opt"]
path = "{at}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{SMALL}"
disable_apparmor = true
stream_server_address = "127.0.0.1"
stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{cni}"
conf_dir = "{at}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "{runc}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.krx]
runtime_type = "{krx}"
privileged_without_host_devices = true
pod_annotations = ["io.krx.*", "krx.*"]
container_annotations = ["io.krx.*", "krx.*"]
"#, cni = cni.display(), runc = RUNC.kind, krx = KRX.kind));
        // In place of the host's own.
        let allowed = Annotation::ALL.map(Annotation::name);
        self.scratch.write("krx.toml", format!("[annotations]\nallow = {}\n", serde_json::json!(allowed)));
        let network = serde_json::json!({
            "cniVersion": "0.4.0", "name": "krx-test",
            "plugins": [
                { "type": "bridge", "bridge": BRIDGE, "isGateway": true, "ipMasq": true, "hairpinMode": true,
                  "ipam": { "type": "host-local", "ranges": [[{ "subnet": SUBNET }]],
                            "routes": [{ "dst": "0.0.0.0/0" }], "dataDir": format!("{at}/ipam") } },
                { "type": "portmap", "capabilities": { "portMappings": true } },
            ],
        });
        self.scratch.write("cni/10-krx-test.conflist", network.to_string());
    }

    /// Starts the program and waits until its CRI plugin is ready.
    fn spawn(&self) {
        let log = File::options().create(true).append(true).open(self.log()).expect("log");
        let mut command = self.tools.command("containerd");
        command.arg("--config").arg(self.scratch.join("config.toml"));
        command.env("KRX_CONFIG", self.scratch.join("krx.toml"));
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("log")).stderr(log);
        // Its shims outlive it, and are no business of a terminal's.
        command.process_group(0);
        *self.child.lock().expect("lock") = Some(command.spawn().expect("containerd"));
        let mut last = String::new();
        let ready = until(START, || match self.client.unready() {
            Ok(unready) if unready.is_empty() => Some(()),
            other => {
                last = format!("{other:?}");
                None
            }
        });
        assert!(ready.is_some(), "containerd is not ready: {last}{}", self.last_words());
    }

    /// Imports an archive for the CRI plugin and for `ctr`'s own namespace.
    ///
    /// # Panics
    /// When containerd refuses it.
    pub fn import(&self, archive: &Path) {
        self.import_into(&["k8s.io", "default"], archive);
    }

    /// Imports an archive for the CRI plugin alone: a large one costs seconds each time.
    ///
    /// # Panics
    /// When containerd refuses it.
    pub fn import_for_pods(&self, archive: &Path) {
        self.import_into(&["k8s.io"], archive);
    }

    fn import_into(&self, namespaces: &[&str], file: &Path) {
        let archive = file.to_string_lossy();
        for namespace in namespaces {
            finish(&mut self.ctr(&["-n", namespace, "images", "import", &archive]), b"").ok();
        }
        fs::remove_file(file).expect("archive");
    }

    /// Ends containerd by a signal, but not its shims, and waits for it.
    ///
    /// # Panics
    /// When it does not run.
    pub fn end(&self, signal: Signal) {
        let mut child = self.child.lock().expect("lock").take().expect("containerd runs");
        kill(Pid::from_raw(i32::try_from(child.id()).expect("pid")), signal).expect("kill");
        if until(STOP, || child.try_wait().expect("wait")).is_none() {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
    }

    /// Starts it again after [`Engine::end`].
    pub fn start_again(&self) {
        self.spawn();
    }

    /// The same with another level of its log.
    pub fn start_again_logging(&self, level: &str) {
        self.write_configuration(level);
        self.spawn();
    }

    /// Of containerd's own process, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.lock().expect("lock").as_ref().map(Child::id)
    }

    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    #[must_use]
    pub fn tools(&self) -> &Tools {
        &self.tools
    }

    #[must_use]
    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// Whether pods are VMs.
    #[must_use]
    pub fn is_krx(&self) -> bool {
        self.runtime == KRX
    }

    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.scratch.join("containerd.sock")
    }

    /// containerd's log, with its shims'.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.scratch.join("containerd.log")
    }

    /// Cgroup above the pods', as `kubepods` is the kubelet's.
    #[must_use]
    pub fn cgroup(&self) -> String {
        format!("/{}", self.scratch.path().file_name().unwrap_or_default().display())
    }

    /// The end of containerd's log, for a test that fails.
    #[must_use]
    pub fn last_words(&self) -> String {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        format!("\n--- containerd's log\n{}\n---", lines[lines.len().saturating_sub(LAST_LINES)..].join("\n"))
    }

    /// Stops containerd and tells what is left of its pods, shims and mounts.
    #[must_use]
    pub fn stop_and_count(self) -> Vec<String> {
        let before = self.before.clone();
        drop(self);
        Remains::left_since(&before)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.child.lock().expect("lock").is_some() {
            self.end(Signal::SIGTERM);
        }
        let _ = finish(self.tools.command("ip").args(["link", "delete", BRIDGE]), b"");
        let _ = fs::remove_dir(Path::new(CGROUPS).join(self.cgroup().trim_start_matches('/')));
    }
}
