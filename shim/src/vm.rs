//! The VM of a pod, as the shim makes it from the configuration of the pod's sandbox.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::time::SystemTime;

use krx_sandbox::artifacts::Artifacts;
use krx_sandbox::bundle::PodNamespaces;
use krx_sandbox::container::Container;
use krx_sandbox::disks::Attached;
use krx_sandbox::pod::{Pod, PodConfig};
use krx_sandbox::settings::Settings;
use krx_sandbox::settings::annotations::Wishes;
use krx_sandbox::settings::size::{self, PodSize, SizeError};
use krx_sandbox::share::{Placed, Prepared};
use krx_sandbox::state_dir::StateRoot;
use krx_sandbox::timings::Timings;
use log::warn;
use tokio::sync::watch;

use crate::cgroup::{self, PodCgroup};
use crate::config_json::ConfigJson;
use crate::error::{Result, ShimError, chain};
use crate::process::Exit;
use crate::scope;
use crate::volumes::Volumes;

/// Longest id of a pod (`krx_proto::validate_id`).
const MAX_NAME: usize = 76;

/// What a container has of the host.
#[derive(Debug, Clone)]
pub(crate) struct Belongings {
    files: Placed,
    disks: Attached,
}

/// A pod's VM.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) pod: Pod,
    /// Id of the container that the pod begins with.
    pub(crate) sandbox: String,
    pub(crate) started: SystemTime,
    /// How it ended.
    exit: watch::Sender<Option<Exit>>,
    netns: Option<PathBuf>,
    pub(crate) volumes: Volumes,
    /// Containers made so far: their names in the share must differ.
    serial: AtomicU32,
    /// The signal by which containerd has ended the pod; 0 while it has not.
    ended_by: AtomicI32,
    /// The lowest `oom_score_adj` of its containers.
    oom_score: AtomicI32,
    /// Whether it stands still.
    paused: watch::Sender<bool>,
    /// Somebody serves the timings of its starts.
    observed: AtomicBool,
    // Last: it can only be removed when the VMM is gone.
    _cgroup: Option<PodCgroup>,
}

/// Name of the pod in krx's state directory: `krx ps` and the action `delete` know it by that.
pub(crate) fn pod_name(namespace: &str, id: &str) -> String {
    let name = format!("{namespace}.{id}");
    if name.len() <= MAX_NAME {
        return name;
    }
    // The hasher's keys are fixed: another process of this shim makes the same name.
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    let hash = format!("{:016x}", hasher.finish());
    let begin: String = name.chars().take(MAX_NAME - hash.len() - 1).collect();
    format!("{begin}.{hash}")
}

impl Vm {
    /// Boots a VM; blocks until its agent is ready.
    pub(crate) fn boot(namespace: &str, id: &str, config: &ConfigJson, timings: &Timings) -> Result<Self> {
        let cgroup = config.cgroup.as_deref().and_then(enter);
        timings.mark("in the pod's cgroup");
        let settings = Settings::load().map_err(|error| ShimError::wrong_state(chain(&error)))?;
        let artifacts =
            Artifacts::find(None, &settings).map_err(|error| ShimError::wrong_state(chain(&error)))?;
        let size = size(&settings, config)?;
        let pod_config = PodConfig {
            name: pod_name(namespace, id),
            artifacts,
            vcpus: size.vcpus.get().into(),
            memory_mib: size.memory.mib(),
            kernel_args: size.kernel_args,
            console: size.console,
            boot_timeout: settings.vm.boot_timeout,
            share: Vec::new(),
            netns: config.netns.clone(),
            vhost_net: settings.vm.vhost_net,
            jail: true,
        };
        let pod = Pod::boot(&StateRoot::from_env(), pod_config, timings, |_| ())?;
        pod.publish(None)?;
        let scope = config.cgroup.as_deref().and_then(cgroup::scope).filter(|_| cgroup::has_systemd());
        if let Some((scope, cgroup)) = scope.zip(cgroup.as_ref()) {
            tokio::spawn(scope::register(scope, cgroup.keep()));
        }
        let volumes = Volumes::of(&pod.agent());
        Ok(Self {
            pod,
            sandbox: id.into(),
            started: SystemTime::now(),
            exit: watch::Sender::new(None),
            netns: config.netns.clone(),
            volumes,
            serial: AtomicU32::new(1),
            ended_by: AtomicI32::new(0),
            oom_score: AtomicI32::new(i32::MAX),
            paused: watch::Sender::new(false),
            observed: AtomicBool::new(false),
            _cgroup: cgroup,
        })
    }

    /// What containerd is told to be the PID of every process of the pod: the one process of it that the host sees.
    pub(crate) fn pid(&self) -> u32 {
        self.pod.vmm().pid()
    }

    /// Has the host's kernel think of the VM as of the one of its containers that is to be killed last when there is no memory. By
    /// itself a VM would be worth as much as containerd, from which it has its score.
    pub(crate) fn set_oom_score(&self, wanted: Option<i32>) {
        let Some(wanted) = wanted else { return };
        let before = self.oom_score.fetch_min(wanted, Ordering::Relaxed);
        if wanted < before {
            let path = format!("/proc/{}/oom_score_adj", self.pid());
            if let Err(error) = fs::write(path, wanted.to_string()) {
                warn!("pod {} keeps containerd's oom_score_adj: {error}", self.sandbox);
            }
        }
    }

    /// How the configurations of the pod's further containers speak of its namespaces.
    pub(crate) fn namespaces(&self) -> PodNamespaces {
        let of = |kind: &str| PathBuf::from(format!("/proc/{}/ns/{kind}", self.pid()));
        let own = ["ipc", "uts", "net", "pid"].map(of);
        PodNamespaces {
            paths: own.into_iter().chain(self.netns.clone()).collect(),
            is_sandbox: false,
            share_prefix: format!("{}-", self.serial.fetch_add(1, Ordering::Relaxed)),
        }
    }

    /// Whether nobody serves the timings of its starts yet: whoever asks is to do so.
    pub(crate) fn begin_observing(&self) -> bool {
        !self.observed.swap(true, Ordering::Relaxed)
    }

    /// Stops all of the guest, or lets it go on; blocks.
    pub(crate) fn pause(&self, paused: bool) -> Result<()> {
        // Noted a little longer than it stands still: no call is to be on its way then.
        if paused {
            self.paused.send_replace(true);
        }
        let vmm = self.pod.vmm();
        let done = if paused { vmm.pause() } else { vmm.resume() };
        self.paused.send_replace(paused == done.is_ok());
        done.map_err(|error| ShimError::internal(chain(&error)))
    }

    /// Whether the guest stands still.
    pub(crate) fn is_paused(&self) -> bool {
        *self.paused.borrow() && !self.pod.vmm().has_ended()
    }

    /// What tells when the guest goes on; it holds no VM.
    pub(crate) fn until_awake(&self) -> watch::Receiver<bool> {
        self.paused.subscribe()
    }

    /// Refuses what a guest that stands still would never answer.
    pub(crate) fn awake(&self) -> Result<()> {
        if !self.is_paused() {
            return Ok(());
        }
        Err(ShimError::wrong_state(format!(
            "The VM of pod {} is paused, and nothing in it answers: the pod has to be resumed, or killed, first",
            self.sandbox
        )))
    }

    /// Ends it, in good order if the guest can; blocks.
    pub(crate) fn end(&self) {
        if self.awake().is_ok() {
            self.pod.shut_down();
        } else {
            self.pod.vmm().kill_and_wait();
        }
    }

    /// Notes that containerd ends the pod, and by which signal.
    pub(crate) fn ended_by(&self, signal: i32) {
        let _ = self.ended_by.compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The signal by which containerd has ended the pod.
    pub(crate) fn why_ended(&self) -> Option<u32> {
        u32::try_from(self.ended_by.load(Ordering::Relaxed)).ok().filter(|signal| *signal > 0)
    }

    /// Notes its end, which is told as that of the pod's sandbox.
    pub(crate) fn ended(&self) -> Exit {
        let exit = Exit::now(self.exit_status());
        self.exit.send_replace(Some(exit));
        exit
    }

    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub(crate) async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        ended.unwrap_or_else(|| Exit::now(self.exit_status()))
    }

    /// Exit status of the pod's sandbox, once the VM has ended.
    fn exit_status(&self) -> u32 {
        /// Of a VM that ended by itself.
        const UNKNOWN: u32 = 255;
        self.why_ended().map_or(UNKNOWN, |signal| 128 + signal)
    }

    /// Gives the guest what a container has of the host: its files and its disks.
    pub(crate) fn place(&self, prepared: Prepared, container: &mut Container) -> Result<Belongings> {
        let files = prepared.place(&self.pod.vmm(), &self.pod.share())?;
        match self.pod.attach_disks(container) {
            Ok(disks) => Ok(Belongings { files, disks }),
            Err(error) => {
                let _ = files.remove(&self.pod.vmm(), &self.pod.share());
                Err(error.into())
            }
        }
    }

    pub(crate) fn take_away(&self, belongings: &Belongings) {
        self.pod.detach_disks(&belongings.disks, !self.is_paused());
        // A VM that has ended has nothing left to be taken away.
        let _ = belongings.files.remove(&self.pod.vmm(), &self.pod.share());
    }
}

/// What the pod asks for, else what its limits need, else the node's default.
fn size(settings: &Settings, config: &ConfigJson) -> Result<PodSize> {
    let sized = || -> std::result::Result<_, SizeError> {
        let wishes = Wishes::read(&config.annotations, settings)?;
        size::size(settings, &wishes, &config.limits)
    };
    sized().map_err(|error| ShimError::invalid(chain(&error)))
}

fn enter(cgroup: &Path) -> Option<PodCgroup> {
    // A host without it runs the pod all the same, uncounted.
    PodCgroup::enter(cgroup).unwrap_or_else(|error| {
        warn!("cgroup {} cannot be entered, the pod stays in that of containerd: {error}", cgroup.display());
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_valid_and_differ() {
        let id = "f".repeat(64);
        assert_eq!(pod_name("k8s.io", &id), format!("k8s.io.{id}"));
        let long = pod_name("default", &"x".repeat(76));
        assert_eq!(long.len(), MAX_NAME);
        assert!(krx_proto::validate_id(&long));
        assert_ne!(long, pod_name("default", &format!("{}y", "x".repeat(75))));
        assert_eq!(long, pod_name("default", &"x".repeat(76)));
    }
}
