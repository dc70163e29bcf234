//! A pod: its name, its VM, the agent in it. Created with its container, and gone when dropped.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use krx_proto::{GuestInfo, Request};
use krx_vmm::config::{Config, ConfigError, Share};

use crate::agent::{AgentClient, CallError};
use crate::artifacts::Artifacts;
use crate::container::Container;
use crate::process::Process;
use crate::state_dir::{ExecBase, PodPaths, PodState, StateDir, StateError, StateRoot};
use crate::timings::Timings;
use crate::vmm_process::{Launch, VmmError, VmmProcess};

/// Time for a guest that was told to power off; then its VM is stopped.
const POWER_OFF: Duration = Duration::from_secs(5);
/// Time for a VMM that lost its guest's connection to say why.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Why a pod did not come up, or did not stay up.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    #[error("Pod cannot have its name")]
    State(#[source] StateError),
    #[error("Size of the pod cannot be")]
    Config(#[source] ConfigError),
    #[error("Cannot listen for the agent on {path}")]
    Listen {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("VM cannot be started")]
    Spawn(#[source] VmmError),
    /// With what the VMM said of it, if it ended.
    #[error("Guest did not come up: {what}")]
    Boot {
        what: CallError,
        #[source]
        verdict: VmmError,
    },
    #[error("Agent does not make the container")]
    Create(#[source] CallError),
    #[error("Container's process cannot be run")]
    Start(#[source] CallError),
    #[error("VM ended while the container ran")]
    Lost(#[source] VmmError),
    /// The VM ran on, so it was the guest that broke the connection, or the rules of it.
    #[error("The connection to the agent was lost, and its VM was stopped for that")]
    Broken(#[source] VmmError),
}

/// What a pod is made from.
#[derive(Debug, Clone)]
pub struct PodConfig {
    pub name: String,
    pub artifacts: Artifacts,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// Shows the guest kernel's console on standard error.
    pub console: bool,
    /// From the VMM's start to PID 1, again as long until the agent's hello, and then for each answer of the agent.
    pub boot_timeout: Duration,
    pub container: Container,
    /// What `krx exec` starts from.
    pub exec: ExecBase,
}

/// A running pod.
#[derive(Debug)]
pub struct Pod {
    // In this order when dropped: the connection, the VM, its directory.
    agent: Arc<AgentClient>,
    vmm: Arc<VmmProcess>,
    directory: StateDir,
    container: String,
}

impl Pod {
    /// Starts the VM and makes the container in it, its first process stopped before its exec. `spawned` gets the VMM
    /// as soon as it runs, so that a start can be given up by ending it.
    ///
    /// # Errors
    /// [`PodError`]: what is in the way, with the VMM's own words where it ended.
    pub fn create(
        root: &StateRoot,
        config: PodConfig,
        timings: &Timings,
        spawned: impl FnOnce(&Arc<VmmProcess>),
    ) -> Result<Self, PodError> {
        let PodConfig { name, container, boot_timeout, .. } = &config;
        let directory = root.create(name).map_err(PodError::State)?;
        let paths = directory.paths();
        let vmm_config = vmm_config(&config, &paths);
        vmm_config.clone().validate().map_err(PodError::Config)?;
        let path = paths.agent_listener();
        let listener =
            UnixListener::bind(&path).map_err(|source| PodError::Listen { path: path.clone(), source })?;
        let program = &config.artifacts.vmm;
        let launch = Launch { program, config: vmm_config, lock: directory.lock() };
        timings.mark("vmm spawned");
        let vmm = Arc::new(VmmProcess::spawn(launch).map_err(PodError::Spawn)?);
        spawned(&vmm);
        let up = || -> Result<AgentClient, PodError> {
            let agent = AgentClient::accept(&listener, vmm.ended(), *boot_timeout)
                .map_err(|what| PodError::Boot { verdict: boot_verdict(&vmm, &what), what })?;
            timings.mark("agent ready");
            let create = Request::Create(Box::new(container.spec.clone()));
            let created = agent.send(create).and_then(|pending| pending.answer());
            created.map_err(|error| lost(&vmm, error, PodError::Create))?;
            timings.mark("container created");
            directory.publish(&state(&config, &vmm)).map_err(PodError::State)?;
            Ok(agent)
        };
        // Others may hold the VMM, too: it has to be gone before its directory is, which may be another pod's then.
        let agent = up().inspect_err(|_| vmm.kill_and_wait())?;
        Ok(Self { agent: Arc::new(agent), vmm, directory, container: container.spec.id.clone() })
    }

    /// The container's first process.
    #[must_use]
    pub fn init(&self) -> Process {
        Process::new(self.agent.clone(), self.directory.paths().vsock(), &self.container, "")
    }

    /// The pod's VMM.
    #[must_use]
    pub fn vmm(&self) -> Arc<VmmProcess> {
        self.vmm.clone()
    }

    /// What the guest says of itself.
    #[must_use]
    pub fn guest(&self) -> &GuestInfo {
        self.agent.guest()
    }

    /// Adds the VMM's phases to `timings`.
    pub fn collect_timings(&self, timings: &Timings) {
        // A VMM that has just ended has no phases to tell; the others are still worth printing.
        for phase in self.vmm.timings().unwrap_or_default() {
            timings.add(&phase_name(&phase.name), phase.monotonic_ns);
        }
    }

    /// Turns the loss of the connection into what happened to the VM; other errors stay what they are.
    #[must_use]
    pub fn explain(&self, error: CallError, otherwise: impl FnOnce(CallError) -> PodError) -> PodError {
        lost(&self.vmm, error, otherwise)
    }

    /// Ends the pod in good order: the guest powers off, else its VM is stopped.
    pub fn delete(self) {
        let asked = self.agent.send(Request::Shutdown).is_ok();
        if !asked || self.vmm.wait(POWER_OFF).is_none() {
            self.vmm.kill_and_wait();
        }
    }
}

fn vmm_config(config: &PodConfig, paths: &PodPaths) -> Config {
    Config {
        kernel: config.artifacts.kernel.clone(),
        initramfs: Some(config.artifacts.initramfs.clone()),
        cmdline: String::new(),
        memory_mib: config.memory_mib,
        vcpus: config.vcpus,
        console: config.console,
        share: Some(Share { root: paths.share(), entries: config.container.shared().to_vec() }),
        vsock: Some(paths.vsock()),
        net: Vec::new(),
        control: Some(paths.control()),
        lifeline_fd: None,
        state_dir: Some(paths.directory().into()),
        boot_timeout_ms: u64::try_from(config.boot_timeout.as_millis()).unwrap_or(u64::MAX),
    }
}

fn state(config: &PodConfig, vmm: &VmmProcess) -> PodState {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    PodState {
        name: config.name.clone(),
        owner_pid: std::process::id(),
        vmm_pid: vmm.pid(),
        started: since_1970.as_secs(),
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
        rootfs: config.container.rootfs().into(),
        container: config.container.spec.id.clone(),
        process: config.container.spec.process.clone(),
        exec: config.exec,
    }
}

/// What the VMM says of a guest that did not come up. One that still runs is stopped, which makes it tell the guest
/// kernel's last lines.
fn boot_verdict(vmm: &VmmProcess, what: &CallError) -> VmmError {
    if !matches!(what, CallError::VmmEnded | CallError::Lost) {
        vmm.stop();
    }
    vmm.verdict(LAST_WORDS)
}

/// A connection that ended means a VM that ended, or one whose guest is not to be dealt with any longer.
fn lost(vmm: &VmmProcess, error: CallError, otherwise: impl FnOnce(CallError) -> PodError) -> PodError {
    match error {
        CallError::Lost | CallError::VmmEnded if vmm.wait(LAST_WORDS).is_some() => {
            PodError::Lost(vmm.verdict(LAST_WORDS))
        }
        CallError::Lost | CallError::VmmEnded => PodError::Broken(vmm.verdict(Duration::ZERO)),
        error => otherwise(error),
    }
}

/// The VMM's phases, as people read them.
fn phase_name(name: &str) -> String {
    match name {
        "main" => "vmm main",
        "configured" => "config",
        "vm_created" => "KVM and memory",
        "kernel_loaded" => "kernel load",
        "first_instruction" => "first guest instruction",
        "pid1" => "kernel to PID 1",
        other => other,
    }
    .into()
}
