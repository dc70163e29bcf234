//! The verbs of a shim, as containerd has them, over the pod's VM. What they are called with and answer on the wire is
//! the business of `service`.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO, TaskStart,
};
use krx_proto::ErrorKind;
use krx_sandbox::agent::CallError;
use krx_sandbox::bundle;
use krx_sandbox::timings::{Timings, monotonic_ns};
use log::{Level, debug, info, log_enabled, warn};
use tokio::sync::{Notify, mpsc};
use tokio::task::spawn_blocking;

use crate::config_json::ConfigJson;
use crate::error::{Result, ShimError};
use crate::events::Events;
use crate::io::Stdio;
use crate::logger::Owner;
use crate::make::{Order, make, unmake};
use crate::observe::{self, Starts};
use crate::process::{Exit, Life, Process};
use crate::requests::KILL;
use crate::tasks::{ContainerPart, Task, Tasks};
use crate::vm::Vm;
use crate::watch::{self, Notice};

/// A shell's code for a program that was not found, and for one that cannot be executed.
const NOT_FOUND: u32 = 127;
const NOT_EXECUTABLE: u32 = 126;

/// How long the tasks of a pod whose VM and sandbox are gone may be asked for.
const LAST_TASKS: Duration = Duration::from_secs(20);

/// Everything a shim has.
#[derive(Debug)]
pub(crate) struct Shim {
    pub(crate) namespace: String,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) events: Events,
    pub(crate) notices: mpsc::UnboundedSender<Notice>,
    /// Told when the shim is to end, see [`Self::end`].
    pub(crate) done: Notify,
    /// It is served at.
    pub(crate) socket: Option<PathBuf>,
    /// When it began to serve (`CLOCK_MONOTONIC`).
    pub(crate) served_since: u64,
    pub(crate) starts: Arc<Starts>,
}

/// Logs where the time of a task's making went, with that of its pod if it was made, too.
fn tell_timings(timings: &Timings, task: &Task, made_vm: bool) {
    // What costs a round trip to the VMM is only done for who reads it.
    if !log_enabled!(Level::Debug) {
        return;
    }
    if made_vm {
        task.vm.pod.collect_timings(timings);
    }
    debug!("timings of create {}: {}", task.id, timings.line());
}

/// Runs what blocks where it may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let result = spawn_blocking(work).await;
    result.unwrap_or_else(|_| Err(ShimError::internal("The shim has failed at this request")))
}

impl Shim {
    /// Makes a task: the pod's VM, a container, or both.
    pub(crate) async fn create(self: &Arc<Self>, order: Order) -> Result<u32> {
        order.stdio.check()?;
        let (reservation, vm) = self.tasks.reserve(&order.id)?;
        vm.as_ref().map_or(Ok(()), |vm| vm.awake())?;
        let made_first = vm.is_none();
        let outputs = order.stdio.open(Owner { namespace: &self.namespace, id: &order.id }).await?;
        let (order, made) = blocking(move || make(&order, vm).map(|made| (order, made))).await?;
        let (vm, made) = made;
        let (container, copied) = match made {
            None => (None, Ok(None)),
            Some(made) => {
                let part = ContainerPart { spec: made.spec, placed: made.placed, is_single: made_first };
                (Some(part), order.stdio.copy(made.connected, outputs).map(Some))
            }
        };
        let (copies, refused) = copied.map_or_else(|error| (None, Some(error)), |copies| (copies, None));
        let rootfs = order.rootfs.clone();
        let first = Process::new(order.stdio.clone(), copies);
        let task = Task::new(order.id, order.bundle, vm.clone(), container, first);
        if let Some(error) = refused {
            self.give_up(&Arc::new(task)).await;
            return Err(error);
        }
        let task = reservation.fill(task);
        if made_first {
            watch::vm(&vm, self.notices.clone());
        }
        if task.container.is_some() {
            // A VM that has ended since has told its tasks of it, and this one was not among them yet.
            if let Err(error) = watch::process(self, &task, "").await {
                self.give_up(&task).await;
                return Err(error);
            }
            watch::oom(self, &task, 0).await;
        }
        let Stdio { terminal, stdin, stdout, stderr } = order.stdio;
        let io = TaskIO { stdin, stdout, stderr, terminal, ..TaskIO::default() };
        self.events.send(TaskCreate {
            container_id: task.id.clone(),
            bundle: task.bundle.display().to_string(),
            rootfs,
            io: Some(io).into(),
            pid: vm.pid(),
            ..TaskCreate::default()
        });
        if made_first {
            order.timings.add("shim serves", self.served_since);
        }
        order.timings.mark("created");
        tell_timings(&order.timings, &task, made_first);
        self.starts.add(&task.id, order.timings);
        info!("task {} is created, in VM {}", task.id, vm.pid());
        Ok(vm.pid())
    }

    /// A task whose guest can be asked.
    pub(crate) fn awake(&self, id: &str) -> Result<Arc<Task>> {
        let task = self.tasks.get(id)?;
        task.vm.awake()?;
        Ok(task)
    }

    /// Adds a process to a running container.
    pub(crate) async fn exec(
        self: &Arc<Self>,
        id: &str,
        exec: &str,
        stdio: Stdio,
        spec: &[u8],
    ) -> Result<()> {
        stdio.check()?;
        let task = self.awake(id)?;
        let container = task.container()?;
        task.thawed()?;
        if !krx_proto::validate_id(exec) {
            return Err(ShimError::invalid(format!("No process can be named {exec:?}")));
        }
        let mut spec = bundle::process(spec, &container.spec)?;
        spec.stdin = !stdio.stdin.is_empty();
        if task.process(exec).is_ok() {
            return Err(ShimError::exists(format!("Process {exec} exists already in task {id}")));
        }
        let outputs = stdio.open(Owner { namespace: &self.namespace, id: exec }).await?;
        let (wanted, made) = (stdio.clone(), task.vm.pod.process(id, exec));
        let connecting = spawn_blocking(move || -> std::result::Result<_, (bool, ShimError)> {
            made.exec(spec).map_err(|error| (matches!(error, CallError::NoAnswer(_)), error.into()))?;
            // As with a container: a guest that takes no connections is not to be dealt with any longer.
            wanted.connect(&made).map_err(|error| (true, error.into()))
        });
        let connected = match connecting.await.unwrap_or_else(|_| Err((false, CallError::Lost.into()))) {
            Ok(connected) => connected,
            Err((made, error)) => {
                if made {
                    // Not waited for: the guest has as many processes as it has room for, and this one is nobody's.
                    let (vm, id, exec) = (task.vm.clone(), task.id.clone(), exec.to_string());
                    spawn_blocking(move || unmake(&vm, &id, &exec));
                }
                return Err(error);
            }
        };
        let added = match stdio.copy(connected, outputs) {
            Ok(copies) => task.add(exec, Process::new(stdio, Some(copies))),
            Err(error) => Err(error),
        };
        let watched = match added {
            Ok(()) => watch::process(self, &task, exec).await.inspect_err(|_| task.forget(exec)),
            Err(error) => Err(error),
        };
        if let Err(error) = watched {
            let (vm, id, exec) = (task.vm.clone(), task.id.clone(), exec.to_string());
            let _ = spawn_blocking(move || unmake(&vm, &id, &exec)).await;
            return Err(error);
        }
        self.events.send(TaskExecAdded {
            container_id: id.into(),
            exec_id: exec.into(),
            ..TaskExecAdded::default()
        });
        Ok(())
    }

    /// Lets a process begin.
    pub(crate) async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32> {
        let asked = monotonic_ns();
        let task = self.awake(id)?;
        let process = task.process(exec)?;
        task.thawed()?;
        let pid = task.vm.pid();
        process.starting()?;
        let started = if task.container.is_some() {
            let guest = task.vm.pod.process(id, exec);
            spawn_blocking(move || guest.start()).await.unwrap_or(Err(CallError::Lost))
        } else {
            Ok(())
        };
        if let Err(error) = started {
            if let CallError::NoAnswer(_) = error {
                // It may begin yet, and nobody would know of it.
                let (vm, id, exec) = (task.vm.clone(), id.to_string(), exec.to_string());
                spawn_blocking(move || unmake(&vm, &id, &exec));
            }
            process.failed(match &error {
                CallError::Agent(error) if error.kind == ErrorKind::CommandNotFound => NOT_FOUND,
                _ => NOT_EXECUTABLE,
            });
            return Err(error.into());
        }
        let (container_id, exec_id) = (id.to_string(), exec.to_string());
        let early = process.started(|| {
            if exec.is_empty() {
                self.events.send(TaskStart { container_id, pid, ..TaskStart::default() });
            } else {
                self.events.send(TaskExecStarted {
                    container_id,
                    exec_id,
                    pid,
                    ..TaskExecStarted::default()
                });
            }
        });
        if let Some(exit) = early {
            watch::tell_exit(self, &task, exec, exit);
        }
        if exec.is_empty() {
            self.starts.started(id, asked);
            observe::serve(&task.vm, &self.namespace, self.starts.clone(), self.tasks.clone());
        }
        Ok(pid)
    }

    /// Forgets a process that has ended, with its task if it is the first one.
    pub(crate) async fn delete(self: &Arc<Self>, id: &str, exec: &str) -> Result<(u32, Exit)> {
        let task = self.tasks.get(id)?;
        let process = task.process(exec)?;
        if task.container.is_some() {
            task.vm.awake()?;
        }
        let pid = task.vm.pid();
        match process.life() {
            Life::Running => {
                return Err(ShimError::wrong_state(format!(
                    "Task {id} is running: it has to be killed first"
                )));
            }
            Life::Created if task.container.is_some() => {
                let guest = task.vm.pod.process(id, exec);
                match spawn_blocking(move || guest.kill(KILL)).await.unwrap_or(Err(CallError::Lost)) {
                    Err(CallError::Lost | CallError::VmmEnded) => watch::went_with_vm(self, &task, exec),
                    killed => killed?,
                }
            }
            Life::Created => self.end_vm(task.vm.clone()).await,
            Life::Exited(_) => {}
        }
        let exit = process.wait().await;
        process.finish_output().await;
        if !process.claim() {
            return Err(ShimError::not_found(format!("The process of task {id} is deleted already")));
        }
        if !exec.is_empty() {
            let guest = task.vm.pod.process(id, exec);
            let _ = spawn_blocking(move || guest.delete()).await;
            task.forget(exec);
            return Ok((pid, exit));
        }
        self.release(&task, |vm, id| drop(vm.pod.process(id, "").delete())).await;
        watch::added_have_ended(self, &task).await;
        self.events.send(TaskDelete {
            container_id: id.into(),
            id: id.into(),
            pid,
            exit_status: exit.status,
            exited_at: Some(watch::timestamp(exit.at)).into(),
            ..TaskDelete::default()
        });
        Ok((pid, exit))
    }

    /// Takes a task back that could not be made whole.
    async fn give_up(&self, task: &Arc<Task>) {
        self.release(task, |vm, id| unmake(vm, id, "")).await;
    }

    /// Lets go of all that a task has. `forget` has the guest forget a container; a guest that has ended has forgotten it.
    async fn release(&self, task: &Arc<Task>, forget: impl FnOnce(&Vm, &str) + Send + 'static) {
        match &task.container {
            Some(container) if !container.is_single => {
                task.vm.volumes.remove(&task.id);
                let (vm, id, placed) = (task.vm.clone(), task.id.clone(), container.placed.clone());
                let _ = spawn_blocking(move || {
                    forget(&vm, &id);
                    vm.take_away(&placed);
                })
                .await;
            }
            // The VM goes with the task.
            _ => {
                self.end_vm(task.vm.clone()).await;
                self.tasks.take_vm(&task.vm);
            }
        }
        self.starts.remove(&task.id);
        self.tasks.remove(task);
    }

    /// Makes the pod's VM without a task that stands for it.
    pub(crate) async fn start_vm(&self, id: &str, config: ConfigJson) -> Result<Arc<Vm>> {
        let (namespace, id) = (self.namespace.clone(), id.to_string());
        let boot = move || {
            let timings = Timings::default();
            timings.mark("start asked");
            let vm = Vm::boot(&namespace, &id, &config, &timings)?;
            vm.pod.identify(config.hostname, config.sysctls)?;
            timings.mark("started");
            Ok((vm, timings))
        };
        let (vm, timings) = blocking(boot).await?;
        let vm = Arc::new(vm);
        self.starts.add(&vm.sandbox, Arc::new(timings));
        observe::serve(&vm, &self.namespace, self.starts.clone(), self.tasks.clone());
        self.tasks.set_vm(vm.clone());
        watch::vm(&vm, self.notices.clone());
        Ok(vm)
    }

    /// Ends the VM in good order.
    pub(crate) async fn end_vm(&self, vm: Arc<Vm>) {
        let _ = spawn_blocking(move || vm.end()).await;
    }

    /// Ends the shim, if it has nothing left to serve.
    pub(crate) fn shut_down(self: &Arc<Self>) {
        // A pod that was asked for by the Sandbox service has no task, and ends by that service.
        if self.tasks.is_empty() && self.tasks.vm().is_none() {
            self.end();
        } else if self.tasks.vm().is_none() {
            // Of a containerd that was killed while it made them, there may be tasks that it does not know.
            let shim = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(LAST_TASKS).await;
                if shim.tasks.vm().is_none() {
                    warn!("nobody asks for the tasks of a pod that is no more: the shim ends");
                    shim.end();
                }
            });
        } else {
            warn!("there is a pod, or tasks, left: the shim goes on");
        }
    }
    /// Ends the shim. From now on its address is free, for containerd may ask for the same pod again once it has the
    /// answer to the request that this is for.
    pub(crate) fn end(&self) {
        if let Some(socket) = &self.socket {
            let _ = fs::remove_file(socket);
        }
        self.done.notify_one();
    }
}
