//! What can be asked of tasks that are there: signals, limits, figures, pause.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::Status;
use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};
use krx_proto::{Answer, ErrorKind, Request, Stats, TerminalSize};
use krx_sandbox::agent::CallError;
use krx_sandbox::bundle;
use log::warn;
use tokio::task::spawn_blocking;

use crate::error::{Result, ShimError};
use crate::io::Stdio;
use crate::process::{Exit, Life};
use crate::shim::{Shim, blocking};
use crate::tasks::Task;
use crate::vm::Vm;

/// What a pod's sandbox ends by, of the signals that it may get.
pub(crate) const KILL: i32 = 9;
const TERMINATE: i32 = 15;
const INTERRUPT: i32 = 2;

/// For a guest to take a signal. It is a moment, but on a node that has no time for it; after that it is not waited for.
const SIGNALLED: Duration = Duration::from_secs(20);
/// For a guest's figures: the kubelet asks for those of all pods, one after the other, and has 2 minutes.
const FIGURES: Duration = Duration::from_secs(10);

/// What is known of a process.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) task: Arc<Task>,
    pub(crate) stdio: Stdio,
    pub(crate) status: Status,
    pub(crate) exit: Option<Exit>,
}

async fn call(vm: &Vm, request: Request) -> std::result::Result<Answer, CallError> {
    call_within(vm, request, Duration::MAX).await
}

/// With a limit of its own, where it is shorter than that of all calls.
async fn call_within(vm: &Vm, request: Request, limit: Duration) -> std::result::Result<Answer, CallError> {
    let agent = vm.pod.agent();
    let called = spawn_blocking(move || agent.send(request)?.within(limit).answer()).await;
    called.unwrap_or(Err(CallError::Lost))
}

/// Sends a signal when the guest goes on, as to processes that a cgroup's freezer holds. containerd stops a container by
/// one that it may take its time for, and kills it if that is over: a refusal would be the end of that.
fn keep(task: &Arc<Task>, request: Request) {
    let (mut paused, task) = (task.vm.until_awake(), Arc::downgrade(task));
    tokio::spawn(async move {
        let goes_on = paused.wait_for(|paused| !paused).await.is_ok();
        if let Some(task) = task.upgrade().filter(|_| goes_on) {
            let _ = call(&task.vm, request).await;
        }
    });
}

impl Shim {
    /// Lets a pod go on whose VM stands still: a container is killed, and only a guest that runs can do that and forget it.
    async fn wake(&self, vm: &Arc<Vm>) -> Result<()> {
        let sandbox = self.tasks.all().into_iter().find(|task| task.container.is_none());
        if let Some(sandbox) = sandbox.filter(|_| vm.is_paused()) {
            warn!("pod {} is paused, and goes on: a container of it is killed", vm.sandbox);
            // Who has resumed it meanwhile has done the same.
            let resumed = self.pause(&sandbox.id, false).await;
            return if vm.is_paused() { resumed } else { Ok(()) };
        }
        Ok(())
    }

    /// Sends a signal to a process, or to all of a container.
    pub(crate) async fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let task = self.tasks.get(id)?;
        let process = task.process(exec)?;
        let signal =
            i32::try_from(signal).map_err(|_| ShimError::invalid(format!("{signal} is no signal")))?;
        if signal == KILL && exec.is_empty() && task.container.is_some() {
            // Also one that has ended: containerd cannot delete it before the guest goes on.
            self.wake(&task.vm).await?;
        }
        if process.has_exited() {
            return Err(ShimError::not_found(format!("The process of task {id} has ended")));
        }
        if task.container.is_none() {
            // Whatever the signal, it means that the pod is to end; all but these the pause program would not mind.
            if [KILL, TERMINATE, INTERRUPT].contains(&signal) {
                task.vm.ended_by(signal);
                self.end_vm(task.vm.clone()).await;
            }
            return Ok(());
        }
        let request = Request::Signal {
            container: id.into(),
            process: exec.into(),
            signal,
            all: all && exec.is_empty(),
        };
        if exec.is_empty() && task.vm.is_paused() {
            keep(&task, request);
            return Ok(());
        }
        task.vm.awake()?;
        match call_within(&task.vm, request, SIGNALLED).await {
            Err(CallError::Agent(error)) if error.kind == ErrorKind::WrongState => {
                Err(ShimError::not_found(format!("The process of task {id} has ended")))
            }
            Err(CallError::NoAnswer(_)) if exec.is_empty() => {
                self.kill_silent(&task, signal).await;
                Ok(())
            }
            result => Ok(result.map(drop)?),
        }
    }

    /// A container is to end whose guest does not answer. containerd goes on to the next step only when this one is no error,
    /// and to the pod's end only when all of its containers have ended: that is in the host's hands.
    async fn kill_silent(&self, task: &Arc<Task>, signal: i32) {
        if signal != KILL {
            return;
        }
        warn!(
            "the guest of pod {} does not answer, and is ended: a container of it is killed",
            task.vm.sandbox
        );
        task.vm.ended_by(KILL);
        let vm = task.vm.clone();
        let _ = spawn_blocking(move || vm.pod.vmm().kill_and_wait()).await;
    }

    pub(crate) async fn resize(&self, id: &str, exec: &str, size: TerminalSize) -> Result<()> {
        let task = self.awake(id)?;
        task.process(exec)?;
        task.container()?;
        let request = Request::Resize { container: id.into(), process: exec.into(), size };
        Ok(call(&task.vm, request).await.map(drop)?)
    }

    /// The end of a process's input.
    pub(crate) fn close_input(&self, id: &str, exec: &str) -> Result<()> {
        self.tasks.get(id)?.process(exec)?.close_input();
        Ok(())
    }

    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Result<()> {
        let task = self.awake(id)?;
        task.container()?;
        let mut resources = bundle::resources(resources)?;
        // Those are the host's, see `make`.
        (resources.cpuset_cpus, resources.cpuset_mems) = (None, None);
        let request = Request::Update { container: id.into(), resources: Box::new(resources) };
        Ok(call(&task.vm, request).await.map(drop)?)
    }

    /// What a container uses; a sandbox's figures are the pod's.
    pub(crate) async fn stats(&self, id: &str) -> Result<Stats> {
        let task = self.tasks.get(id)?;
        let container = if task.container.is_some() { id.into() } else { String::new() };
        self.stats_of(&task.vm, container).await
    }

    /// What a container uses, or all of a VM's.
    pub(crate) async fn stats_of(&self, vm: &Arc<Vm>, container: String) -> Result<Stats> {
        vm.awake()?;
        match call_within(vm, Request::Stats { container }, FIGURES).await? {
            Answer::Stats(stats) => Ok(*stats),
            _ => Err(CallError::Unexpected.into()),
        }
    }

    pub(crate) fn state(&self, id: &str, exec: &str) -> Result<State> {
        let task = self.tasks.get(id)?;
        let process = task.process(exec)?;
        let (status, exit) = match process.life() {
            Life::Exited(exit) => (Status::STOPPED, Some(exit)),
            Life::Running if task.is_paused() => (Status::PAUSED, None),
            Life::Running => (Status::RUNNING, None),
            Life::Created => (Status::CREATED, None),
        };
        let stdio = process.stdio.clone();
        Ok(State { task, stdio, status, exit })
    }

    pub(crate) async fn wait(&self, id: &str, exec: &str) -> Result<Exit> {
        let process = self.tasks.get(id)?.process(exec)?;
        Ok(process.wait().await)
    }

    /// PIDs in the guest of a container's processes; a sandbox is a process of the host, its VMM.
    pub(crate) async fn pids(&self, id: &str) -> Result<Vec<u32>> {
        let task = self.tasks.get(id)?;
        if task.container.is_none() {
            return Ok(vec![task.vm.pid()]);
        }
        // A containerd that begins anew asks for these, one task after the other, and gives up one that has none.
        let there = || Ok(vec![task.vm.pid()]);
        if task.vm.is_paused() {
            return there();
        }
        match call_within(&task.vm, Request::Pids { container: id.into() }, FIGURES).await {
            Ok(Answer::Pids(pids)) => Ok(pids),
            Ok(_) => Err(CallError::Unexpected.into()),
            Err(CallError::NoAnswer(_)) if !task.first.has_exited() => there(),
            Err(error) => Err(error.into()),
        }
    }

    /// Stops the processes of a container, or lets them go on; a sandbox is its VM.
    pub(crate) async fn pause(&self, id: &str, paused: bool) -> Result<()> {
        let task = self.tasks.get(id)?;
        let _turn = task.pausing.lock().await;
        if task.first.life() != Life::Running {
            return Err(ShimError::wrong_state(format!("Task {id} is not running")));
        }
        if task.is_paused() == paused {
            let state = if paused { "paused already" } else { "not paused" };
            return Err(ShimError::wrong_state(format!("Task {id} is {state}")));
        }
        if task.container.is_some() {
            task.vm.awake()?;
            let freeze = |frozen| Request::Freeze { container: id.into(), frozen };
            if let Err(error) = call(&task.vm, freeze(paused)).await {
                if let CallError::NoAnswer(_) = error {
                    // What is not known to be done is not to be half done. Not waited for, and not on the thread of all requests:
                    // a guest that takes nothing holds up who sends.
                    let (vm, back) = (task.vm.clone(), freeze(!paused));
                    spawn_blocking(move || vm.pod.agent().send(back).map(drop));
                }
                return Err(error.into());
            }
        } else {
            let vm = task.vm.clone();
            blocking(move || vm.pause(paused)).await?;
        }
        task.set_paused(paused);
        let container_id = id.to_string();
        if paused {
            self.events.send(TaskPaused { container_id, ..TaskPaused::default() });
        } else {
            self.events.send(TaskResumed { container_id, ..TaskResumed::default() });
        }
        Ok(())
    }
}
