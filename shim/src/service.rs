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
use containerd_shim_protos::protobuf::well_known_types::any::Any;
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

/// Carries a request out to its end, whether or not its client still waits: one that goes away, or whose time is up, is to
/// leave nothing half made.
pub(crate) async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|_| Err(ShimError::internal("The shim has failed at this request")))
}

/// The service of one pod.
pub(crate) struct Service(pub(crate) Arc<Shim>);

/// The answer, with a note in the log of what was refused.
pub(crate) fn answered<T>(name: &str, id: &str, result: Result<T>) -> ttrpc::Result<T> {
    match &result {
        // An id may be as long as a message.
        Ok(_) => debug!("{name} {id:.100}"),
        Err(error) if error.is_not_found() => debug!("{name} {id:.100}: {error}"),
        Err(error) => warn!("{name} {id:.100}: {error}"),
    }
    Ok(result?)
}

/// Refuses what says that it is something else than is wanted; what says nothing is taken by its content. `wanted` is the
/// last part of a type's name.
pub(crate) fn check_type(any: &Any, wanted: &str) -> Result<()> {
    let name = any.type_url.rsplit(['/', '.']).next().unwrap_or_default();
    if any.type_url.is_empty() || name == wanted {
        return Ok(());
    }
    Err(ShimError::invalid(format!(
        "A message of type {:.100} was sent where {wanted} is wanted",
        any.type_url
    )))
}

impl Service {
    async fn pause_or_resume(&self, id: &str, paused: bool) -> Result<Empty> {
        let (shim, id) = (self.0.clone(), id.to_string());
        to_its_end(async move { shim.pause(&id, paused).await.map(|()| Empty::default()) }).await
    }
}

#[async_trait]
impl Task for Service {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let id = request.id.clone();
        let timings = Arc::new(Timings::default());
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
            let shim = self.0.clone();
            let pid = to_its_end(async move { shim.create(order).await }).await?;
            Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
        };
        answered("create", &id, created.await)
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let timings = Timings::default();
        timings.mark("start asked");
        let (shim, id) = (self.0.clone(), request.id.clone());
        let started = to_its_end(async move { shim.start(&id, &request.exec_id).await }).await;
        timings.mark("started");
        debug!("timings of start {}: {}", request.id, timings.line());
        answered("start", &request.id, started.map(|pid| StartResponse { pid, ..StartResponse::default() }))
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let (shim, id) = (self.0.clone(), request.id.clone());
        let deleted = to_its_end(async move { shim.delete(&id, &request.exec_id).await }).await;
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
        let (shim, id) = (self.0.clone(), request.id.clone());
        let added = async move {
            let spec = request.spec.unwrap_or_default();
            check_type(&spec, "Process")?;
            shim.exec(&id, &request.exec_id, stdio, &spec.value).await
        };
        answered("exec", &request.id, to_its_end(added).await.map(|()| Empty::default()))
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
        answered("pause", &request.id, self.pause_or_resume(&request.id, true).await)
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        answered("resume", &request.id, self.pause_or_resume(&request.id, false).await)
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
        let updated = async {
            let resources = request.resources.clone().unwrap_or_default();
            check_type(&resources, "LinuxResources")?;
            self.0.update(&request.id, &resources.value).await
        };
        answered("update", &request.id, updated.await.map(|()| Empty::default()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_is_known_by_its_last_name() {
        let any = |url: &str| Any { type_url: url.into(), ..Any::default() };
        for url in ["", "types.containerd.io/opencontainers/runtime-spec/1/Process", "Process"] {
            assert!(check_type(&any(url), "Process").is_ok(), "{url}");
        }
        assert!(check_type(&any("runtime.v1.PodSandboxConfig"), "PodSandboxConfig").is_ok());
        for url in ["types.containerd.io/opencontainers/runtime-spec/1/Spec", "x.NotProcess", "/"] {
            assert!(check_type(&any(url), "Process").is_err(), "{url}");
        }
    }

    #[tokio::test]
    async fn a_request_goes_on_when_its_client_is_gone() {
        let (sender, done) = tokio::sync::oneshot::channel();
        let request = to_its_end(async move {
            tokio::task::yield_now().await;
            let _ = sender.send(());
            Ok(())
        });
        let mut request = Box::pin(request);
        let once = std::future::poll_fn(|context| {
            assert!(request.as_mut().poll(context).is_pending());
            std::task::Poll::Ready(())
        });
        once.await;
        drop(request);
        assert!(done.await.is_ok());
    }
}
