//! A container through the CRI: planned, created, started; removed with its pod.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::Status;

use super::messages::{
    Attach, CONTAINER_EXITED, ContainerConfig, ContainerLinux, ContainerMetadata, ContainerStats,
    ContainerStatsAnswer, ContainerStatus, ContainerStatusAnswer, CreateContainer, Empty, Environment, Exec,
    ExecSync, ExecSyncAnswer, Image, Integer, Mount, Resources, Security, SecurityProfile, StopContainer,
    Text, UpdateResources,
};
use super::pod::Pod;
use super::stream::Stream;
use crate::containerd::image::SMALL;
use crate::pod::{Ended, until};

/// Longest a container may take to end, or to say what a test waits for.
pub const END: Duration = Duration::from_secs(90);

/// What the kubelet has masked, and made read-only, of each container; containerd leaves both out of one that is privileged.
pub const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
pub const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// A container to be: change `config` before [`Plan::start`].
#[derive(Debug)]
pub struct Plan<'p, 'e> {
    pod: &'p Pod<'e>,
    pub config: ContainerConfig,
}

impl<'p, 'e> Plan<'p, 'e> {
    pub(super) fn new(pod: &'p Pod<'e>, name: &str, command: &[&str]) -> Self {
        let paths = |paths: &[&str]| paths.iter().map(ToString::to_string).collect();
        let security = Security {
            seccomp: Some(SecurityProfile::default()),
            masked_paths: paths(&MASKED),
            readonly_paths: paths(&READ_ONLY),
            ..Default::default()
        };
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(Image { image: SMALL.into() }),
            command: command.iter().map(ToString::to_string).collect(),
            log_path: format!("{name}.log"),
            linux: Some(ContainerLinux { resources: None, security: Some(security) }),
            ..Default::default()
        };
        let mut plan = Self { pod, config };
        // The kubelet repeats the pod's.
        let of_pod = pod.config.linux.as_ref().and_then(|linux| linux.security.as_ref());
        plan.security().namespaces = of_pod.and_then(|security| security.namespaces.clone());
        plan
    }

    pub fn security(&mut self) -> &mut Security {
        self.config.linux.get_or_insert_default().security.get_or_insert_default()
    }

    #[must_use]
    pub fn image(mut self, image: &str) -> Self {
        self.config.image = Some(Image { image: image.into() });
        self
    }

    #[must_use]
    pub fn attempt(mut self, attempt: u32) -> Self {
        self.config.metadata.get_or_insert_default().attempt = attempt;
        self.config.log_path = format!("{attempt}-{}", self.config.log_path);
        self
    }

    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.config.envs.push(Environment { key: key.into(), value: value.into() });
        self
    }

    #[must_use]
    pub fn mount(mut self, host: &Path, at: &str, readonly: bool) -> Self {
        let host_path = host.to_string_lossy().into_owned();
        self.config.mounts.push(Mount { container_path: at.into(), host_path, readonly, propagation: 0 });
        self
    }

    #[must_use]
    pub fn user(mut self, uid: i64, gid: i64, groups: &[i64]) -> Self {
        let security = self.security();
        security.run_as_user = Some(Integer { value: uid });
        security.run_as_group = Some(Integer { value: gid });
        security.supplemental_groups = groups.to_vec();
        self
    }

    #[must_use]
    pub fn resources(mut self, resources: Resources) -> Self {
        self.config.linux.get_or_insert_default().resources = Some(resources);
        self
    }

    #[must_use]
    pub fn memory(self, limit: i64) -> Self {
        self.resources(Resources { memory_limit: limit, ..Default::default() })
    }

    #[must_use]
    pub fn tty(mut self) -> Self {
        self.config.tty = true;
        self.stdin()
    }

    #[must_use]
    pub fn stdin(mut self) -> Self {
        self.config.stdin = true;
        self
    }

    /// # Errors
    /// What containerd answers.
    pub fn try_create(self) -> Result<Container<'p, 'e>, Status> {
        let log = Path::new(&self.pod.config.log_directory).join(&self.config.log_path);
        let request = CreateContainer {
            pod_sandbox_id: self.pod.id.clone(),
            config: Some(self.config),
            sandbox_config: Some(self.pod.config.clone()),
        };
        let Text { text } = self.pod.engine.client().call("CreateContainer", request)?;
        Ok(Container { pod: self.pod, id: text, log })
    }

    /// # Panics
    /// When it cannot be created.
    #[must_use]
    pub fn create(self) -> Container<'p, 'e> {
        let engine = self.pod.engine;
        self.try_create()
            .unwrap_or_else(|status| panic!("CreateContainer: {status:?}{}", engine.last_words()))
    }

    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start(self) -> Container<'p, 'e> {
        let container = self.create();
        let engine = container.pod.engine;
        container
            .start()
            .unwrap_or_else(|status| panic!("StartContainer: {status:?}{}", engine.last_words()));
        container
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// When it does not start, or end.
    pub fn run(self) -> Ended {
        let container = self.start();
        let code = container.wait().exit_code;
        let (out, err) = container.logs();
        Ended { code, out, err }
    }
}

/// A container that was created.
#[derive(Debug)]
pub struct Container<'p, 'e> {
    pub pod: &'p Pod<'e>,
    pub id: String,
    log: PathBuf,
}

impl Container<'_, '_> {
    /// # Errors
    /// What containerd answers.
    pub fn start(&self) -> Result<(), Status> {
        self.pod.engine.client().call_for("StartContainer", &self.id).map(|Empty {}| ())
    }

    /// `SIGTERM`, and `SIGKILL` after `grace` seconds.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn stop(&self, grace: i64) -> Result<(), Status> {
        let request = StopContainer { container_id: self.id.clone(), timeout: grace };
        self.pod.engine.client().call("StopContainer", request).map(|Empty {}| ())
    }

    /// # Errors
    /// What containerd answers.
    pub fn remove(&self) -> Result<(), Status> {
        self.pod.engine.client().call_for("RemoveContainer", &self.id).map(|Empty {}| ())
    }

    /// # Panics
    /// When containerd knows it not.
    #[must_use]
    pub fn status(&self) -> ContainerStatus {
        let answer: ContainerStatusAnswer =
            self.pod.engine.client().call_for("ContainerStatus", &self.id).expect("ContainerStatus");
        answer.status.expect("status")
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    #[must_use]
    pub fn wait(&self) -> ContainerStatus {
        until(END, || Some(self.status()).filter(|status| status.state == CONTAINER_EXITED))
            .unwrap_or_else(|| panic!("did not end: {:?} {:?}", self.status(), self.logs()))
    }

    /// What it wrote, by stream, from the log file that `kubectl logs` reads: `TIME STREAM TAG TEXT` a line, where the
    /// tag `P` says that the line goes on in the next.
    #[must_use]
    pub fn logs(&self) -> (String, String) {
        let (mut out, mut err) = (String::new(), String::new());
        for line in fs::read_to_string(&self.log).unwrap_or_default().lines() {
            let mut parts = line.splitn(4, ' ').skip(1);
            let stream = if parts.next() == Some("stderr") { &mut err } else { &mut out };
            let partial = parts.next() == Some("P");
            stream.push_str(parts.next().unwrap_or_default());
            if !partial {
                stream.push('\n');
            }
        }
        (out, err)
    }

    /// Waits until its log has `text`.
    ///
    /// # Panics
    /// When it does not come.
    pub fn wait_for(&self, text: &str) {
        let found = until(END, || self.logs().0.contains(text).then_some(()));
        assert!(found.is_some(), "no {text:?} in {:?}: {:?}", self.logs(), self.status());
    }

    /// # Errors
    /// What containerd answers: a timeout, too.
    pub fn try_exec(&self, command: &[&str], timeout: i64) -> Result<Ended, Status> {
        let command = command.iter().map(ToString::to_string).collect();
        let request = ExecSync { container_id: self.id.clone(), command, timeout };
        let answer: ExecSyncAnswer = self.pod.engine.client().call("ExecSync", request)?;
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Ok(Ended { code: answer.exit_code, out: text(&answer.stdout), err: text(&answer.stderr) })
    }

    /// # Panics
    /// When containerd does not execute it.
    #[must_use]
    pub fn exec(&self, command: &[&str]) -> Ended {
        self.try_exec(command, 0).unwrap_or_else(|status| {
            panic!("ExecSync of {command:?}: {status:?}{}", self.pod.engine.last_words())
        })
    }

    /// What a shell script prints; it has to succeed.
    ///
    /// # Panics
    /// When it does not.
    pub fn sh(&self, script: &str) -> String {
        self.exec(&["sh", "-c", script]).ok().out
    }

    /// Exec with its streams; `tty` has no separate stderr.
    ///
    /// # Panics
    /// When containerd refuses.
    #[must_use]
    pub fn exec_stream(&self, command: &[&str], tty: bool) -> Stream {
        let command = command.iter().map(ToString::to_string).collect();
        let request =
            Exec { container_id: self.id.clone(), command, tty, stdin: true, stdout: true, stderr: !tty };
        let Text { text } = self.pod.engine.client().call("Exec", request).expect("Exec");
        Stream::open(&text)
    }

    /// # Panics
    /// When containerd refuses.
    #[must_use]
    pub fn attach(&self, tty: bool) -> Stream {
        let request = Attach { container_id: self.id.clone(), stdin: true, tty, stdout: true, stderr: !tty };
        let Text { text } = self.pod.engine.client().call("Attach", request).expect("Attach");
        Stream::open(&text)
    }

    /// # Panics
    /// When containerd has none.
    #[must_use]
    pub fn stats(&self) -> ContainerStats {
        let answer: ContainerStatsAnswer =
            self.pod.engine.client().call_for("ContainerStats", &self.id).expect("ContainerStats");
        answer.stats.expect("stats")
    }

    /// # Errors
    /// What containerd answers.
    pub fn update(&self, resources: Resources) -> Result<(), Status> {
        let request = UpdateResources { container_id: self.id.clone(), linux: Some(resources) };
        self.pod.engine.client().call("UpdateContainerResources", request).map(|Empty {}| ())
    }
}
