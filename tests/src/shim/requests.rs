//! Requests of the Task API with what they mostly say.

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, StartRequest,
    StateRequest, StateResponse, WaitRequest,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::Result;
use serde_json::Value;

use super::{Shim, limit};

/// The type that containerd gives the specification of a process.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

impl Shim {
    /// A request to create the task that the shim was started for.
    #[must_use]
    pub fn creation(&self, id: &str) -> CreateTaskRequest {
        let bundle = self.bundle.to_string_lossy().into_owned();
        CreateTaskRequest { id: id.into(), bundle, ..CreateTaskRequest::default() }
    }

    /// # Errors
    /// The shim's.
    pub fn create(&self, id: &str) -> Result<u32> {
        self.task.create(limit(), &self.creation(id)).map(|response| response.pid)
    }

    /// # Errors
    /// The shim's.
    pub fn start(&self, id: &str, exec: &str) -> Result<u32> {
        let request = StartRequest { id: id.into(), exec_id: exec.into(), ..StartRequest::default() };
        self.task.start(limit(), &request).map(|response| response.pid)
    }

    /// A request to add a process.
    #[must_use]
    pub fn addition(&self, id: &str, exec: &str, process: &Value) -> ExecProcessRequest {
        let spec =
            Any { type_url: PROCESS.into(), value: process.to_string().into_bytes(), ..Any::default() };
        ExecProcessRequest {
            id: id.into(),
            exec_id: exec.into(),
            spec: Some(spec).into(),
            ..ExecProcessRequest::default()
        }
    }

    /// # Errors
    /// The shim's.
    pub fn exec(&self, id: &str, exec: &str, command: &[&str]) -> Result<Empty> {
        self.task.exec(limit(), &self.addition(id, exec, &super::bundle::process(command)))
    }

    /// # Errors
    /// The shim's.
    pub fn kill(&self, id: &str, exec: &str, signal: u32) -> Result<Empty> {
        let request = KillRequest { id: id.into(), exec_id: exec.into(), signal, ..KillRequest::default() };
        self.task.kill(limit(), &request)
    }

    /// The exit status, once there is one.
    ///
    /// # Errors
    /// The shim's.
    pub fn wait(&self, id: &str, exec: &str) -> Result<u32> {
        let request = WaitRequest { id: id.into(), exec_id: exec.into(), ..WaitRequest::default() };
        self.task.wait(limit(), &request).map(|response| response.exit_status)
    }

    /// # Errors
    /// The shim's.
    pub fn delete(&self, id: &str, exec: &str) -> Result<DeleteResponse> {
        let request = DeleteRequest { id: id.into(), exec_id: exec.into(), ..DeleteRequest::default() };
        self.task.delete(limit(), &request)
    }

    /// # Errors
    /// The shim's.
    pub fn state(&self, id: &str, exec: &str) -> Result<StateResponse> {
        let request = StateRequest { id: id.into(), exec_id: exec.into(), ..StateRequest::default() };
        self.task.state(limit(), &request)
    }

    /// Ends the shim, as containerd does when its last task is deleted.
    pub fn shut_down(&self) {
        let request =
            containerd_shim_protos::api::ShutdownRequest { id: self.id.clone(), ..Default::default() };
        // It may be gone before its answer is read.
        let _ = self.task.shutdown(limit(), &request);
    }

    /// Kills a task, deletes it, and ends the shim.
    ///
    /// # Panics
    /// When it cannot be deleted.
    pub fn end(&self) {
        let _ = self.kill(&self.id, "", 9);
        self.wait(&self.id, "").expect("wait");
        self.delete(&self.id, "").expect("delete");
        self.shut_down();
    }

    /// PID of the shim.
    ///
    /// # Panics
    /// When there is no task of its.
    #[must_use]
    pub fn pid(&self) -> i32 {
        let request =
            containerd_shim_protos::api::ConnectRequest { id: self.id.clone(), ..Default::default() };
        let response = self.task.connect(limit(), &request).expect("connect");
        i32::try_from(response.shim_pid).expect("pid")
    }
}
