//! A pod through the CRI: planned, run, and stopped and removed when dropped, with its cgroup as the kubelet makes it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use tonic::Status;

use super::container::Plan;
use super::messages::{
    Dns, Empty, Namespaces, PodConfig, PodLinux, PodMetadata, PodNetwork, PodSecurity, PodStatsAnswer,
    PodStatus, PodStatusAnswer, PortForward, PortMapping, RunPod, SecurityProfile, Text,
};
use super::stream::Stream;
use crate::containerd::{Engine, Runtime};

/// Where cgroup v2 is.
pub const CGROUPS: &str = "/sys/fs/cgroup";
const CONTROLLERS: &str = "+cpu +memory +pids";
static SERIAL: AtomicU32 = AtomicU32::new(0);

/// A pod to be: change `config` before [`PodPlan::run`].
#[derive(Debug)]
pub struct PodPlan<'a> {
    engine: &'a Engine,
    /// The engine's, unless changed.
    pub runtime: Runtime,
    pub config: PodConfig,
}

impl<'a> PodPlan<'a> {
    /// # Panics
    /// When its log directory cannot be made.
    #[must_use]
    pub fn new(engine: &'a Engine, name: &str) -> Self {
        let uid = format!("{name}-{}", SERIAL.fetch_add(1, Ordering::Relaxed));
        let logs = engine.scratch().join("logs").join(&uid);
        fs::create_dir_all(&logs).expect("log directory");
        let security = PodSecurity {
            namespaces: Some(Namespaces { pid: super::messages::CONTAINER, ..Default::default() }),
            seccomp: Some(SecurityProfile::default()),
            ..Default::default()
        };
        let config = PodConfig {
            hostname: name.into(),
            log_directory: logs.to_string_lossy().into_owned(),
            dns: Some(Dns { servers: vec!["10.96.0.10".into()], ..Default::default() }),
            linux: Some(PodLinux {
                cgroup_parent: format!("{}/pod{uid}", engine.cgroup()),
                security: Some(security),
                ..Default::default()
            }),
            metadata: Some(PodMetadata { name: name.into(), uid, namespace: "default".into(), attempt: 0 }),
            ..Default::default()
        };
        Self { engine, runtime: engine.runtime(), config }
    }

    /// # Panics
    /// Never: the plan has a Linux part.
    pub fn linux(&mut self) -> &mut PodLinux {
        self.config.linux.get_or_insert_default()
    }

    pub fn security(&mut self) -> &mut PodSecurity {
        self.linux().security.get_or_insert_default()
    }

    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.config.annotations.insert(key.into(), value.into());
        self
    }

    #[must_use]
    pub fn host_port(mut self, host_port: i32, container_port: i32) -> Self {
        self.config.port_mappings.push(PortMapping { host_port, container_port, ..Default::default() });
        self
    }

    #[must_use]
    pub fn sysctl(mut self, key: &str, value: &str) -> Self {
        self.linux().sysctls.insert(key.into(), value.into());
        self
    }

    #[must_use]
    pub fn namespaces(mut self, namespaces: Namespaces) -> Self {
        self.security().namespaces = Some(namespaces);
        self
    }

    /// # Errors
    /// What containerd answers; the pod's cgroup is removed then.
    pub fn try_run(self) -> Result<Pod<'a>, Status> {
        let cgroup = self.config.linux.as_ref().map(|linux| linux.cgroup_parent.clone()).unwrap_or_default();
        let mut pod = Pod { engine: self.engine, id: String::new(), config: self.config, cgroup };
        pod.make_cgroup();
        let request =
            RunPod { config: Some(pod.config.clone()), runtime_handler: self.runtime.handler.into() };
        pod.id = pod.engine.client().call::<_, Text>("RunPodSandbox", request)?.text;
        Ok(pod)
    }

    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn run(self) -> Pod<'a> {
        let engine = self.engine;
        self.try_run().unwrap_or_else(|status| panic!("RunPodSandbox: {status:?}{}", engine.last_words()))
    }
}

/// A pod that runs, or did.
#[derive(Debug)]
pub struct Pod<'a> {
    pub engine: &'a Engine,
    pub id: String,
    pub config: PodConfig,
    cgroup: String,
}

impl<'a> Pod<'a> {
    /// A container to be, of the small image.
    #[must_use]
    pub fn container(&self, name: &str, command: &[&str]) -> Plan<'_, 'a> {
        Plan::new(self, name, command)
    }

    /// A container to be, of the small image, that runs a shell script.
    #[must_use]
    pub fn shell(&self, name: &str, script: &str) -> Plan<'_, 'a> {
        Plan::new(self, name, &["sh", "-c", script])
    }

    /// # Panics
    /// When containerd knows it not.
    #[must_use]
    pub fn status(&self) -> PodStatus {
        let answer: PodStatusAnswer =
            self.engine.client().call_for("PodSandboxStatus", &self.id).expect("PodSandboxStatus");
        answer.status.expect("status")
    }

    /// # Panics
    /// When it has no address.
    #[must_use]
    pub fn ip(&self) -> String {
        let PodNetwork { ip } = self.status().network.expect("network");
        assert!(!ip.is_empty(), "the pod has no address");
        ip
    }

    /// # Panics
    /// When containerd does not answer.
    #[must_use]
    pub fn stats(&self) -> PodStatsAnswer {
        self.engine.client().call_for("PodSandboxStats", &self.id).expect("PodSandboxStats")
    }

    /// A connection to a port of the pod, through containerd.
    ///
    /// # Panics
    /// When containerd refuses.
    #[must_use]
    pub fn forward(&self, port: i32) -> Stream {
        let request = PortForward { pod_sandbox_id: self.id.clone(), port: vec![port] };
        let Text { text } = self.engine.client().call("PortForward", request).expect("PortForward");
        Stream::open(&text)
    }

    /// # Errors
    /// What containerd answers.
    pub fn stop(&self) -> Result<(), Status> {
        self.engine.client().call_for("StopPodSandbox", &self.id).map(|Empty {}| ())
    }

    /// # Errors
    /// What containerd answers.
    pub fn remove(&self) -> Result<(), Status> {
        self.engine.client().call_for("RemovePodSandbox", &self.id).map(|Empty {}| ())
    }

    /// The pod's cgroup.
    #[must_use]
    pub fn cgroup(&self) -> PathBuf {
        Path::new(CGROUPS).join(self.cgroup.trim_start_matches('/'))
    }

    /// As the kubelet does before it runs a pod.
    fn make_cgroup(&self) {
        let cgroup = self.cgroup();
        fs::create_dir_all(&cgroup).expect("cgroup of the pod");
        let mut above = Path::new(CGROUPS).to_path_buf();
        for part in Path::new(&self.cgroup.trim_start_matches('/')) {
            // The root may have fewer controllers.
            let _ = fs::write(above.join("cgroup.subtree_control"), CONTROLLERS);
            above.push(part);
        }
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if !self.id.is_empty() {
            let ended = self.stop().and_then(|()| self.remove());
            if let Err(status) = ended
                && status.code() != tonic::Code::NotFound
            {
                eprintln!("pod {}: {status}", self.id);
            }
        }
        // Fails when something is left in it, which the count of what is left then shows.
        let _ = fs::remove_dir(self.cgroup());
    }
}
