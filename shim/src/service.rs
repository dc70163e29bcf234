//! The Task service as ttrpc carries it: each request to the verb of the same name, and back. No decisions here.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim::util::convert_to_any;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest,
    WaitResponse,
};
use containerd_shim_protos::protobuf::EnumOrUnknown;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;
use krx_proto::TerminalSize;
use krx_sandbox::timings::Timings;
use log::{debug, warn};

use crate::error::{Result, ShimError};
use crate::io::Stdio;
use crate::make::Order;
use crate::metrics::metrics;
use crate::shim::Shim;
use crate::watch::timestamp;

/// The service of one pod.
pub(crate) struct Service(pub(crate) Arc<Shim>);

/// The answer, with a note in the log of what was refused.
pub(crate) fn answered<T>(name: &str, id: &str, result: Result<T>) -> ttrpc::Result<T> {
    match &result {
        Ok(_) => debug!("{name} {id}"),
        Err(error) if error.is_not_found() => debug!("{name} {id}: {error}"),
        Err(error) => warn!("{name} {id}: {error}"),
    }
    Ok(result?)
}

#[async_trait]
impl Task for Service {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let id = request.id.clone();
        let timings = Timings::default();
        timings.mark("create asked");
        let created = async {
            if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
                return Err(ShimError::unimplemented("A task cannot be made from a checkpoint"));
            }
            let stdio = Stdio {
                terminal: request.terminal,
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
            };
            let (namespace, bundle) = (self.0.namespace.clone(), request.bundle.into());
            let order = Order { namespace, id: request.id, bundle, rootfs: request.rootfs, stdio, timings };
            let pid = self.0.create(order).await?;
            Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
        };
        answered("create", &id, created.await)
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let timings = Timings::default();
        timings.mark("start asked");
        let started = self.0.start(&request.id, &request.exec_id).await;
        timings.mark("started");
        debug!("timings of start {}: {}", request.id, timings.line());
        answered("start", &request.id, started.map(|pid| StartResponse { pid, ..StartResponse::default() }))
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let deleted = self.0.delete(&request.id, &request.exec_id).await;
        let response = deleted.map(|(pid, exit)| DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..DeleteResponse::default()
        });
        answered("delete", &request.id, response)
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let stdio = Stdio {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let added = self.0.exec(&request.id, &request.exec_id, stdio, &request.spec.value).await;
        answered("exec", &request.id, added.map(|()| Empty::default()))
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let killed = self.0.kill(&request.id, &request.exec_id, request.signal, request.all).await;
        answered("kill", &request.id, killed.map(|()| Empty::default()))
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let state = self.0.state(&request.id, &request.exec_id);
        let response = state.map(|state| StateResponse {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            bundle: state.task.bundle.display().to_string(),
            pid: state.task.vm.pid(),
            status: EnumOrUnknown::new(state.status),
            stdin: state.stdio.stdin,
            stdout: state.stdio.stdout,
            stderr: state.stdio.stderr,
            terminal: state.stdio.terminal,
            exit_status: state.exit.map_or(0, |exit| exit.status),
            exited_at: state.exit.map(|exit| timestamp(exit.at)).into(),
            ..StateResponse::default()
        });
        answered("state", &request.id, response)
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let ended = self.0.wait(&request.id, &request.exec_id).await;
        let response = ended.map(|exit| WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..WaitResponse::default()
        });
        answered("wait", &request.id, response)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let process = |pid| ProcessInfo { pid, ..ProcessInfo::default() };
        let pids = self.0.pids(&request.id).await;
        let response = pids.map(|pids| PidsResponse {
            processes: pids.into_iter().map(process).collect(),
            ..PidsResponse::default()
        });
        answered("pids", &request.id, response)
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        answered("pause", &request.id, self.0.pause(&request.id, true).await.map(|()| Empty::default()))
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        answered("resume", &request.id, self.0.pause(&request.id, false).await.map(|()| Empty::default()))
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        let size = TerminalSize { columns: cells(request.width), rows: cells(request.height) };
        let resized = self.0.resize(&request.id, &request.exec_id, size).await;
        answered("resize", &request.id, resized.map(|()| Empty::default()))
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let closed = if request.stdin { self.0.close_input(&request.id, &request.exec_id) } else { Ok(()) };
        answered("close_io", &request.id, closed.map(|()| Empty::default()))
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let updated = self.0.update(&request.id, &request.resources.value).await;
        answered("update", &request.id, updated.map(|()| Empty::default()))
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.0.stats(&request.id).await.and_then(|stats| {
            convert_to_any(Box::new(metrics(&stats))).map_err(|error| ShimError::internal(error.to_string()))
        });
        let response =
            stats.map(|stats| StatsResponse { stats: Some(stats).into(), ..StatsResponse::default() });
        answered("stats", &request.id, response)
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let refused = ShimError::unimplemented("The state of a micro-VM's processes cannot be saved");
        answered("checkpoint", &request.id, Err(refused))
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let task = self.0.tasks.get(&request.id);
        let response = task.map(|task| ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: task.vm.pid(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..ConnectResponse::default()
        });
        answered("connect", &request.id, response)
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.0.shut_down();
        answered("shutdown", &request.id, Ok(Empty::default()))
    }
}
