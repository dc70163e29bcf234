//! The Sandbox service (containerd.runtime.sandbox.v1), for `sandboxer = "shim"` of containerd 2: the pod's VM is asked for
//! by its own requests, and no container stands for it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim::util::convert_to_any;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;
use containerd_shim_protos::types::platform::Platform;
use krx_sandbox::settings::size::Limits;

use crate::config_json::{ConfigJson, Role};
use crate::error::{Result, ShimError};
use crate::metrics::metrics;
use crate::pod_config::PodSandboxConfig;
use crate::service::{answered, check_type, to_its_end};
use crate::shim::Shim;
use crate::vm::Vm;
use crate::watch::timestamp;

/// The pod ends by this signal, for whoever asks how.
const TERMINATED: i32 = 15;

/// The service of one pod.
#[derive(Clone)]
pub(crate) struct SandboxService {
    shim: Arc<Shim>,
    /// What was created and not yet started.
    created: Arc<Mutex<Option<(String, ConfigJson)>>>,
}

impl SandboxService {
    pub(crate) fn new(shim: Arc<Shim>) -> Self {
        Self { shim, created: Arc::default() }
    }

    fn created(&self) -> MutexGuard<'_, Option<(String, ConfigJson)>> {
        self.created.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn create(&self, request: CreateSandboxRequest) -> Result<()> {
        let id = request.sandbox_id.clone();
        if !krx_proto::validate_id(&id) {
            return Err(ShimError::invalid(format!("No sandbox can be named {id:?}")));
        }
        let config = config(request)?;
        let mut created = self.created();
        // A task, or the place of one, is that of a pod that is on its way.
        if created.is_some() || self.shim.tasks.vm().is_some() || !self.shim.tasks.is_empty() {
            return Err(ShimError::exists("This shim has a sandbox already"));
        }
        *created = Some((id, config));
        Ok(())
    }

    async fn start(&self, id: &str) -> Result<Arc<Vm>> {
        let created = self.created().take_if(|(own, _)| own == id);
        let missing = || ShimError::not_found(format!("Sandbox {id} was not created, or is started already"));
        let (id, config) = created.ok_or_else(missing)?;
        // Until the VM is there, nobody else is to make one.
        let (_place, other) = self.shim.tasks.reserve(&id)?;
        if other.is_some() {
            return Err(ShimError::exists("This shim has a sandbox already"));
        }
        self.shim.start_vm(&id, config).await
    }

    fn vm(&self, id: &str) -> Result<Arc<Vm>> {
        let vm = self.shim.tasks.vm().filter(|vm| vm.sandbox == id);
        vm.ok_or_else(|| ShimError::not_found(format!("There is no sandbox {id} that was started")))
    }

    async fn stop(&self, id: &str) -> Result<()> {
        let vm = self.vm(id)?;
        vm.ended_by(TERMINATED);
        self.shim.end_vm(vm).await;
        Ok(())
    }

    async fn shut_down(&self, id: &str) -> Result<()> {
        let created = self.created().as_ref().map(|(own, _)| own.clone());
        let vm = self.shim.tasks.vm();
        let own = vm.as_ref().map(|vm| vm.sandbox.clone()).or(created);
        if own.is_some_and(|own| own != id) {
            return Err(ShimError::not_found(format!("There is no sandbox {id} that was created")));
        }
        if vm.is_none() && !self.shim.tasks.is_empty() {
            return Err(ShimError::wrong_state(format!("Sandbox {id} is being started")));
        }
        // One that was never started, or was shut down before, has nothing to be stopped.
        let _ = self.stop(id).await;
        vm.map(|vm| self.shim.tasks.take_vm(&vm));
        self.shim.end();
        Ok(())
    }

    async fn metrics(&self, id: &str) -> Result<SandboxMetricsResponse> {
        let vm = self.vm(id)?;
        let stats = self.shim.stats_of(&vm, String::new()).await?;
        let data = convert_to_any(Box::new(metrics(&stats)));
        let mut response = SandboxMetricsResponse::default();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = Some(timestamp(SystemTime::now())).into();
        metric.id = id.into();
        metric.data = Some(data.map_err(|error| ShimError::internal(error.to_string()))?).into();
        Ok(response)
    }
}

/// What a bundle's configuration says of a pod, from what the request says.
fn config(request: CreateSandboxRequest) -> Result<ConfigJson> {
    let options = request.options.clone().unwrap_or_default();
    check_type(&options, "PodSandboxConfig")?;
    let pod = PodSandboxConfig::parse(&options.value).map_err(ShimError::invalid)?;
    let cgroup = (!pod.cgroup_parent.is_empty()).then(|| match pod.cgroup_parent.ends_with(".slice") {
        true => PathBuf::from(format!("{}:cri-containerd:{}", pod.cgroup_parent, request.sandbox_id)),
        false => PathBuf::from(pod.cgroup_parent.clone()).join(&request.sandbox_id),
    });
    Ok(ConfigJson {
        role: Role::Sandbox,
        annotations: request.annotations,
        hostname: Some(pod.hostname).filter(|name| !name.is_empty()),
        sysctls: pod.sysctls,
        netns: Some(PathBuf::from(request.netns_path)).filter(|path| !path.as_os_str().is_empty()),
        cgroup,
        limits: Limits::new(pod.memory_limit, pod.cpu_quota, pod.cpu_period),
    })
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let id = request.sandbox_id.clone();
        answered("create_sandbox", &id, self.create(request).map(|()| CreateSandboxResponse::default()))
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let (service, id) = (self.clone(), request.sandbox_id.clone());
        let started = to_its_end(async move { service.start(&id).await }).await;
        let response = started.map(|vm| StartSandboxResponse {
            pid: vm.pid(),
            created_at: Some(timestamp(vm.started)).into(),
            ..StartSandboxResponse::default()
        });
        answered("start_sandbox", &request.sandbox_id, response)
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        let platform = Platform { os: "linux".into(), architecture: "amd64".into(), ..Platform::default() };
        let response = PlatformResponse { platform: Some(platform).into(), ..PlatformResponse::default() };
        answered("platform", &request.sandbox_id, Ok(response))
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let stopped = self.stop(&request.sandbox_id).await;
        answered("stop_sandbox", &request.sandbox_id, stopped.map(|()| StopSandboxResponse::default()))
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let response = match self.vm(&request.sandbox_id) {
            Err(error) => Err(error),
            Ok(vm) => {
                let exit = vm.wait().await;
                Ok(WaitSandboxResponse {
                    exit_status: exit.status,
                    exited_at: Some(timestamp(exit.at)).into(),
                    ..WaitSandboxResponse::default()
                })
            }
        };
        answered("wait_sandbox", &request.sandbox_id, response)
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let response = self.vm(&request.sandbox_id).map(|vm| {
            let exit = vm.exit();
            let state = if exit.is_none() { "SANDBOX_READY" } else { "SANDBOX_NOTREADY" };
            let info = match request.verbose {
                true => HashMap::from([("kernel".to_string(), vm.pod.guest().kernel.clone())]),
                false => HashMap::new(),
            };
            SandboxStatusResponse {
                sandbox_id: request.sandbox_id.clone(),
                pid: vm.pid(),
                state: state.into(),
                info,
                created_at: Some(timestamp(vm.started)).into(),
                exited_at: exit.map(|exit| timestamp(exit.at)).into(),
                ..SandboxStatusResponse::default()
            }
        });
        answered("sandbox_status", &request.sandbox_id, response)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        let alive = self.vm(&request.sandbox_id).and_then(|vm| match vm.exit() {
            None => Ok(PingResponse::default()),
            Some(_) => {
                Err(ShimError::wrong_state(format!("The VM of sandbox {} has ended", request.sandbox_id)))
            }
        });
        answered("ping_sandbox", &request.sandbox_id, alive)
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let (service, id) = (self.clone(), request.sandbox_id.clone());
        let ended = to_its_end(async move { service.shut_down(&id).await }).await;
        answered("shutdown_sandbox", &request.sandbox_id, ended.map(|()| ShutdownSandboxResponse::default()))
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        answered("sandbox_metrics", &request.sandbox_id, self.metrics(&request.sandbox_id).await)
    }
}
