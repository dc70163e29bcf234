//! What happens in a pod unasked: processes end, the kernel kills for want of memory, the VM ends.
//!
//! All of it comes through one queue, in the order in which the guest tells it, and is handled by one task: so containerd
//! learns that memory ran out before it learns that the process is gone.

use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use krx_proto::{Answer, ExitStatus, Request};
use krx_sandbox::agent::{AgentClient, CallError};
use log::{error, info};
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use crate::error::{Result, chain};
use crate::process::Exit;
use crate::shim::Shim;
use crate::tasks::Task;
use crate::vm::Vm;

/// Exit status of processes that went with their VM: as if killed.
const WITH_VM: u32 = 137;
/// Time for a VMM that has ended to be asked why.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Time between two events of a container that memory ran out: a guest could tell of it without end, and of nothing else.
const BETWEEN_OOMS: Duration = Duration::from_secs(1);
/// Time for the start of a process to fail whose container is gone: the guest has answered it by then.
const LAST_START: Duration = Duration::from_secs(1);

/// Something has happened. A task is known by itself and not by its id: once it is deleted, another may have that.
#[derive(Debug)]
pub(crate) enum Notice {
    /// `None`: the connection to the guest was lost before.
    Exited {
        task: Weak<Task>,
        exec: String,
        status: Option<ExitStatus>,
    },
    /// So many processes of the container were killed for want of memory since it was made.
    Oom {
        task: Weak<Task>,
        kills: u64,
    },
    VmEnded,
    /// Answered when all that came before is handled.
    Handled(oneshot::Sender<()>),
    /// The shim ends: what comes later is told to nobody.
    Last,
}

/// Tells of a process's end, also when it can only be inferred: dropped, it says that the connection was lost.
struct Watch {
    notices: mpsc::UnboundedSender<Notice>,
    task: Weak<Task>,
    exec: String,
    status: Option<ExitStatus>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let (task, exec) = (std::mem::take(&mut self.task), std::mem::take(&mut self.exec));
        let _ = self.notices.send(Notice::Exited { task, exec, status: self.status });
    }
}

/// Sends a request whose reply is handled on the thread that reads replies. Sending may have to wait for the guest.
async fn send(
    agent: Arc<AgentClient>,
    request: Request,
    then: impl FnOnce(std::result::Result<Answer, krx_proto::AgentError>) + Send + 'static,
) -> std::result::Result<(), CallError> {
    spawn_blocking(move || agent.send_then(request, then)).await.unwrap_or(Err(CallError::Lost))
}

/// Waits for the end of a process.
pub(crate) async fn process(shim: &Shim, task: &Arc<Task>, exec: &str) -> Result<()> {
    let (notices, exec) = (shim.notices.clone(), exec.to_string());
    let request = Request::Wait { container: task.id.clone(), process: exec.clone() };
    let watch = Watch { notices, task: Arc::downgrade(task), exec, status: None };
    Ok(send(task.vm.pod.agent(), request, move |reply| {
        let mut watch = watch;
        if let Ok(Answer::Exited(status)) = reply {
            watch.status = Some(status);
        }
    })
    .await?)
}

/// Waits until more than `seen` processes of a container have been killed for want of memory.
pub(crate) async fn oom(shim: &Shim, task: &Arc<Task>, seen: u64) {
    let (notices, told) = (shim.notices.clone(), Arc::downgrade(task));
    let request = Request::WaitOom { container: task.id.clone(), seen };
    let sent = send(task.vm.pod.agent(), request, move |reply| {
        // A guest that tells of none that are new makes no sense, and is not asked again.
        if let Ok(Answer::OomKills(kills)) = reply
            && kills > seen
        {
            let _ = notices.send(Notice::Oom { task: told, kills });
        }
    });
    // Without it, only the event is missing.
    let _ = sent.await;
}

/// Waits for the end of the VM.
pub(crate) fn vm(vm: &Vm, notices: mpsc::UnboundedSender<Notice>) {
    vm.pod.vmm().on_end(move || drop(notices.send(Notice::VmEnded)));
}

/// Handles what comes, until the shim ends.
pub(crate) async fn handle(shim: Arc<Shim>, mut notices: mpsc::UnboundedReceiver<Notice>) {
    while let Some(notice) = notices.recv().await {
        match notice {
            Notice::Exited { task, exec, status } => {
                let status = status.map_or(WITH_VM, |status| status.shell_code().into());
                if let Some(task) = task.upgrade() {
                    exited(&shim, &task, &exec, Exit::now(status));
                }
            }
            Notice::Oom { task, kills } => {
                if let Some(task) = task.upgrade() {
                    shim.events.send(TaskOOM { container_id: task.id.clone(), ..TaskOOM::default() });
                    let shim = shim.clone();
                    tokio::spawn(async move {
                        sleep(BETWEEN_OOMS).await;
                        oom(&shim, &task, kills).await;
                    });
                }
            }
            Notice::VmEnded => vm_ended(&shim).await,
            Notice::Handled(answer) => drop(answer.send(())),
            Notice::Last => return,
        }
    }
}

/// A process whose VM ended before it was known to have it.
pub(crate) fn went_with_vm(shim: &Arc<Shim>, task: &Arc<Task>, exec: &str) {
    exited(shim, task, exec, Exit::now(WITH_VM));
}

/// The processes that were added to a task which the guest has forgotten: all have ended with it, and containerd is told
/// so before it is told that the task is deleted.
pub(crate) async fn added_have_ended(shim: &Arc<Shim>, task: &Arc<Task>) {
    // Where the guest had told of an end, that is how it was: it answers who waits before it says that it forgot.
    let (answer, handled) = oneshot::channel();
    if shim.notices.send(Notice::Handled(answer)).is_ok() {
        let _ = handled.await;
    }
    for (exec, process) in task.processes().into_iter().filter(|(exec, _)| !exec.is_empty()) {
        exited(shim, task, &exec, Exit::now(WITH_VM));
        // One whose start is not answered yet is told of by that.
        let _ = timeout(LAST_START, process.wait()).await;
    }
}

fn exited(shim: &Arc<Shim>, task: &Arc<Task>, exec: &str, exit: Exit) {
    let Ok(process) = task.process(exec) else { return };
    if process.exited(exit) {
        tell_exit(shim, task, exec, exit);
    }
}

/// Tells containerd of a process's end. A container that was alone in its VM takes it along.
pub(crate) fn tell_exit(shim: &Arc<Shim>, task: &Arc<Task>, exec: &str, exit: Exit) {
    let is_first = exec.is_empty();
    shim.events.send(TaskExit {
        container_id: task.id.clone(),
        id: if is_first { task.id.clone() } else { exec.into() },
        pid: task.vm.pid(),
        exit_status: exit.status,
        exited_at: Some(timestamp(exit.at)).into(),
        ..TaskExit::default()
    });
    if is_first && task.container.as_ref().is_some_and(|container| container.is_single) {
        let (shim, task) = (shim.clone(), task.clone());
        tokio::spawn(async move {
            task.first.finish_output().await;
            shim.end_vm(task.vm.clone()).await;
        });
    }
}

/// Nothing of the pod runs any more: the containers' processes are told of first, then the sandbox.
async fn vm_ended(shim: &Arc<Shim>) {
    let Some(vm) = shim.tasks.vm() else { return };
    let tasks = shim.tasks.all();
    let expected = vm.why_ended().is_some() || tasks.iter().all(|task| task.first.has_exited());
    if !expected || tasks.is_empty() && vm.why_ended().is_none() {
        let vmm = vm.pod.vmm();
        let verdict = spawn_blocking(move || vmm.verdict(LAST_WORDS)).await;
        verdict.iter().for_each(|verdict| error!("the pod's VM has ended by itself: {}", chain(verdict)));
    }
    for task in tasks.iter().filter(|task| task.container.is_some()) {
        for (exec, _) in task.processes() {
            exited(shim, task, &exec, Exit::now(WITH_VM));
        }
    }
    let exit = vm.ended();
    for task in tasks.iter().filter(|task| task.container.is_none()) {
        exited(shim, task, "", exit);
    }
    info!("the pod's VM has ended");
}

/// A time as containerd has it.
pub(crate) fn timestamp(at: SystemTime) -> Timestamp {
    let since_1970 = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since_1970.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since_1970.subsec_nanos()).unwrap_or(0),
        ..Timestamp::default()
    }
}
