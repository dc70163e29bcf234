//! The agent in a living pod, called as krx calls it.

use std::io::Read;
use std::sync::Arc;

use krx_proto::{AgentError, Answer, ContainerSpec, ErrorKind, ExitStatus, Request, Stream};
use krx_sandbox::agent::{AgentClient, CallError};
use krx_sandbox::default_spec;
use krx_sandbox::process::Process;

use crate::pod::{Living, Place};

/// A living pod, and a connection of its own to the agent in it.
#[derive(Debug)]
pub struct Guest<'a> {
    pub pod: Living<'a>,
    pub agent: Arc<AgentClient>,
}

impl<'a> Guest<'a> {
    /// # Panics
    /// When the pod does not come up, or its agent cannot be reached.
    #[must_use]
    pub fn new(place: &'a Place) -> Self {
        Self::with(place, &[])
    }

    /// With further options of `krx run`.
    ///
    /// # Panics
    /// As [`Self::new`].
    #[must_use]
    pub fn with(place: &'a Place, options: &[&str]) -> Self {
        let pod = place.living_with("pod", options);
        let agent = AgentClient::connect(&place.state().join("pod/vmm/vsock")).expect("agent");
        Self { pod, agent: Arc::new(agent) }
    }

    /// # Errors
    /// The agent's own.
    ///
    /// # Panics
    /// When the connection is gone.
    pub fn call(&self, request: Request) -> Result<Answer, CallError> {
        self.agent.send(request).expect("sent").answer()
    }

    #[must_use]
    pub fn process(&self, container: &str, process: &str) -> Process {
        let vsock = self.pod.place.state().join("pod/vmm/vsock");
        Process::new(self.agent.clone(), vsock, container, process)
    }

    /// # Errors
    /// The agent's own.
    pub fn create(&self, spec: ContainerSpec) -> Result<Process, CallError> {
        let process = self.process(&spec.id, "");
        self.call(Request::Create(Box::new(spec))).map(|_| process)
    }

    /// Runs a shell script in a new container and returns its output and end.
    ///
    /// # Panics
    /// When the container cannot be made.
    pub fn run(
        &self,
        id: &str,
        script: &str,
        change: impl FnOnce(&mut ContainerSpec),
    ) -> (String, ExitStatus) {
        let mut spec = shell(id, script);
        change(&mut spec);
        let process = self.create(spec).expect("create");
        output(&process)
    }
}

/// A container on the pod's root file system.
#[must_use]
pub fn shell(id: &str, script: &str) -> ContainerSpec {
    let mut spec = default_spec::container(id);
    spec.rootfs = format!("{}/rootfs", krx_proto::SHARE_PATH);
    spec.process.args = vec!["sh".into(), "-c".into(), script.into()];
    spec
}

/// Starts a process and reads its output to the end.
///
/// # Panics
/// When that fails.
#[must_use]
pub fn output(process: &Process) -> (String, ExitStatus) {
    let mut stdout = process.connect(Stream::Stdout).expect("stdout");
    process.start().expect("start");
    let mut text = String::new();
    stdout.read_to_string(&mut text).expect("output");
    (text, process.wait().expect("wait"))
}

/// What kind of error the agent gave.
///
/// # Panics
/// When it gave none.
pub fn kind(result: Result<impl Sized, CallError>) -> ErrorKind {
    match result.err() {
        Some(CallError::Agent(AgentError { kind, .. })) => kind,
        other => panic!("no error of the agent: {other:?}"),
    }
}
