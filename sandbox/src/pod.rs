//! A pod: its name, its VM, the agent in it. Containers are made in it one by one; it is gone when dropped.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use krx_proto::{ContainerSpec, GuestInfo, Request};
use krx_vmm::config::interface::{Interface, MAX_PAIRS};
use krx_vmm::config::{Config, ConfigError, Share, ShareEntry};

use crate::agent::{AgentClient, CallError, Pending};
use crate::artifacts::Artifacts;
use crate::container::{Container, ContainerError};
use crate::disks::Attached;
use crate::network::{Network, NetworkError};
use crate::port_forward::{PortForward, PortForwardError};
use crate::process::Process;
use crate::settings::units::KernelArgs;
use crate::state_dir::{PodContainer, PodPaths, PodState, StateDir, StateError, StateRoot};
use crate::timings::Timings;
use crate::vmm_process::{Launch, VmmError, VmmProcess};

/// Time for a guest that was told to power off; then its VM is stopped.
const POWER_OFF: Duration = Duration::from_secs(5);
/// Time for a VMM that lost its guest's connection to say why: milliseconds, but on a host that stands still.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Why a pod did not come up, or did not stay up.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    #[error("Pod cannot have its name")]
    State(#[source] StateError),
    #[error("Size of the pod cannot be")]
    Config(#[source] ConfigError),
    #[error("Pod cannot have the network it is to have")]
    Network(#[source] NetworkError),
    #[error("Ports of the pod cannot be reached from its network namespace")]
    PortForward(#[source] PortForwardError),
    #[error("Guest cannot be given what its pod is to have")]
    Guest(#[source] CallError),
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
    /// Appended to the guest kernel's command line.
    pub kernel_args: KernelArgs,
    /// Shows the guest kernel's console on standard error.
    pub console: bool,
    /// From the VMM's start to PID 1, again as long until the agent's hello, and then for each answer of the agent.
    pub boot_timeout: Duration,
    /// What is shared with the guest from its start.
    pub share: Vec<ShareEntry>,
    /// File of the network namespace whose interfaces the pod gets; without, it has no network.
    pub netns: Option<PathBuf>,
    /// The host's kernel moves its frames, where it has vhost-net.
    pub vhost_net: bool,
    /// The VMM is jailed. Off is for debugging.
    pub jail: bool,
}

/// A running pod.
#[derive(Debug)]
pub struct Pod {
    // In this order when dropped: the connection, the VM, its network, its directory.
    agent: Arc<AgentClient>,
    vmm: Arc<VmmProcess>,
    _forward: Option<PortForward>,
    network: Option<Network>,
    /// What the guest says of its network, until somebody has heard it.
    network_made: Mutex<Option<Pending>>,
    directory: StateDir,
    vcpus: u32,
    memory_mib: u64,
    jail: bool,
}

impl Pod {
    /// Starts the VM. `spawned` gets the VMM as soon as it runs, so that a start can be given up by ending it.
    ///
    /// # Errors
    /// [`PodError`]: what is in the way, with the VMM's own words where it ended.
    pub fn boot(
        root: &StateRoot,
        config: PodConfig,
        timings: &Timings,
        spawned: impl FnOnce(&Arc<VmmProcess>),
    ) -> Result<Self, PodError> {
        let PodConfig { vcpus, memory_mib, boot_timeout, jail, .. } = config;
        let directory = root.create(&config.name).map_err(PodError::State)?;
        let netns = config.netns.clone();
        let queues = queue_pairs(&config);
        let network = netns.as_deref().map(|netns| Network::attach(netns, queues));
        let network = network.transpose().map_err(PodError::Network)?;
        let program = config.artifacts.vmm.clone();
        let paths = directory.paths();
        let interfaces: Vec<_> = network.iter().flat_map(Network::interfaces).collect();
        let vmm_config = vmm_config(config, &paths, interfaces.iter().map(Interface::from).collect());
        vmm_config.clone().validate().map_err(PodError::Config)?;
        let path = paths.agent_listener();
        let listener =
            UnixListener::bind(&path).map_err(|source| PodError::Listen { path: path.clone(), source })?;
        let taps: Vec<_> = interfaces.iter().flat_map(|interface| interface.taps.clone()).collect();
        let launch = Launch { program: &program, config: vmm_config, lock: directory.lock(), taps: &taps };
        timings.mark("vmm spawned");
        let vmm = Arc::new(VmmProcess::spawn(launch).map_err(PodError::Spawn)?);
        spawned(&vmm);
        let agent = AgentClient::accept(&listener, vmm.ended(), boot_timeout)
            .map_err(|what| PodError::Boot { verdict: boot_verdict(&vmm, &what), what });
        // Others may hold the VMM, too: it has to be gone before its directory is, which may be another pod's then.
        let agent = agent.inspect_err(|_| vmm.kill_and_wait())?;
        timings.mark("agent ready");
        let forward = netns.map(|netns| PortForward::start(&netns, paths.vsock()));
        let _forward =
            forward.transpose().map_err(PodError::PortForward).inspect_err(|_| vmm.kill_and_wait())?;
        let wanted = network.as_ref().map(Network::guest).filter(|guest| !guest.interfaces.is_empty());
        let made = wanted.map(|guest| agent.send(Request::Network(Box::new(guest.clone()))));
        // A connection that is gone shows in the next call, with what became of the VM.
        let network_made = Mutex::new(made.and_then(Result::ok));
        Ok(Self {
            agent: Arc::new(agent),
            vmm,
            _forward,
            network,
            network_made,
            directory,
            vcpus,
            memory_mib,
            jail,
        })
    }

    /// Gives the VM the disks of a container that is to be made next.
    ///
    /// # Errors
    /// One of them cannot be had; then none is.
    pub fn attach_disks(&self, container: &mut Container) -> Result<Attached, ContainerError> {
        if container.disks().is_empty() {
            return Ok(Attached::default());
        }
        let (attached, disks) =
            Attached::attach(container.disks(), &self.vmm).map_err(ContainerError::Disk)?;
        container.spec.disks = disks;
        Ok(attached)
    }

    /// Takes the disks of a container that has ended away; `answers` says whether the guest can be asked to let go of them.
    pub fn detach_disks(&self, disks: &Attached, answers: bool) {
        disks.detach(answers.then_some(&self.agent), &self.vmm);
    }

    /// Makes a container, whose first process is stopped before its exec. What it shares is in the share already.
    ///
    /// # Errors
    /// The agent refuses, or is gone.
    pub fn create(&self, container: &ContainerSpec) -> Result<Process, PodError> {
        let create = Request::Create(Box::new(container.clone()));
        let sent = self.agent.send(create);
        // The first container is on its way meanwhile: most networks can be had.
        self.network_made()?;
        let created = sent.and_then(Pending::answer);
        created.map_err(|error| self.explain(error, PodError::Create))?;
        Ok(self.process(&container.id, ""))
    }

    /// Gives the guest a host name and kernel parameters, for all containers without namespaces of their own; and makes
    /// sure of its network.
    ///
    /// # Errors
    /// One of them cannot be had.
    pub fn identify(&self, hostname: Option<String>, sysctls: Vec<(String, String)>) -> Result<(), PodError> {
        let sent = self.agent.send(Request::Identity { hostname, sysctls });
        self.network_made()?;
        let identified = sent.and_then(Pending::done);
        identified.map_err(|error| self.explain(error, PodError::Guest))
    }

    /// Takes the guest's answer to its network, once.
    fn network_made(&self) -> Result<(), PodError> {
        let network = self.network_made.lock().unwrap_or_else(PoisonError::into_inner).take();
        network.map_or(Ok(()), Pending::done).map_err(|error| self.explain(error, PodError::Guest))
    }

    /// A process by its name; a container's first one has the empty name.
    #[must_use]
    pub fn process(&self, container: &str, process: &str) -> Process {
        Process::new(self.agent.clone(), self.directory.paths().vsock(), container, process)
    }

    /// Tells other commands of the pod, and of its container if it is one of `krx run`.
    ///
    /// # Errors
    /// The state cannot be written.
    pub fn publish(&self, container: Option<PodContainer>) -> Result<(), PodError> {
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let state = PodState {
            name: self.directory.name(),
            owner_pid: std::process::id(),
            vmm_pid: self.vmm.pid(),
            started: since_1970.as_secs(),
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            container,
        };
        self.directory.publish(&state).map_err(PodError::State)
    }

    /// The pod's network, if it is to have one.
    #[must_use]
    pub fn network(&self) -> Option<&Network> {
        self.network.as_ref()
    }

    /// The connection to the agent.
    #[must_use]
    pub fn agent(&self) -> Arc<AgentClient> {
        self.agent.clone()
    }

    /// Where the VMM has the pod's share, in its mount namespace.
    #[must_use]
    pub fn share(&self) -> PathBuf {
        if self.jail { krx_vmm::jail::SHARE.into() } else { self.directory.paths().share() }
    }

    /// Where the owner may listen for who asks for the timings of starts. Gone with the pod.
    #[must_use]
    pub fn metrics_socket(&self) -> PathBuf {
        self.directory.paths().metrics()
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
        self.shut_down();
    }

    /// As [`Self::delete`], for a pod that others hold, too.
    pub fn shut_down(&self) {
        let asked = self.agent.send(Request::Shutdown).is_ok();
        if !asked || self.vmm.wait(POWER_OFF).is_none() {
            self.vmm.kill_and_wait();
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // Others may hold it: it has to be gone before the directory is.
        self.vmm.kill_and_wait();
    }
}

/// Pairs of queues of an interface: one for each vCPU, where vhost-net may serve them.
fn queue_pairs(config: &PodConfig) -> usize {
    let vcpus = usize::try_from(config.vcpus).unwrap_or(MAX_PAIRS);
    if config.vhost_net { vcpus.min(MAX_PAIRS) } else { 1 }
}

fn vmm_config(config: PodConfig, paths: &PodPaths, net: Vec<Interface>) -> Config {
    Config {
        kernel: config.artifacts.kernel,
        initramfs: Some(config.artifacts.initramfs),
        cmdline: config.kernel_args.as_str().into(),
        memory_mib: config.memory_mib,
        vcpus: config.vcpus,
        console: config.console,
        share: Some(Share { root: paths.share(), entries: config.share }),
        vsock: Some(paths.vsock()),
        net,
        vhost_net: config.vhost_net,
        control: Some(paths.control()),
        lifeline_fd: None,
        state_dir: Some(paths.directory().into()),
        boot_timeout_ms: u64::try_from(config.boot_timeout.as_millis()).unwrap_or(u64::MAX),
        jail: config.jail,
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
