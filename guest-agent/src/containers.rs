//! The containers and processes there are: makes them, signals them, takes note of their end, forgets them.
//!
//! No call waits here for a process: what a call starts is answered by a later event, through [`Containers::replies`].

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use krx_proto::{
    AgentError, Answer, ContainerSpec, ErrorKind, ExitStatus, ProcessInfo, ProcessSpec, ProcessState,
    Request, Resources, Stats, StreamHello, TerminalSize, UserNamespace, validate_id, validate_live_target,
};
use nix::sched::{CloneFlags, setns};

use crate::cgroup::{self, Cgroup};
use crate::container::{ContainerPlan, MountKind, NEW_TIME, RootPlan};
use crate::error::{Doing, StepError, invalid};
use crate::forked::{Process, fork, make_first};
use crate::freezer::Freezer;
use crate::lifecycle::{Caller, Next, Reply, wrong_state};
use crate::limits::Limits;
use crate::live::{Refreshes, Replica};
use crate::oom::OomWatch;
use crate::process::ProcessPlan;
use crate::relay::Relay;
use crate::shm::SharedMemory;
use crate::{child, clock, disks, guest, id_map, identity, network, stats, sys};

/// More containers than a pod has. Stops a host gone wild from using up the guest's descriptors.
const MAX_CONTAINERS: usize = 128;
/// Processes made by the host, ended ones that it has not deleted included; for the same reason.
const MAX_PROCESSES: usize = 512;
/// Linux has signals 1 to 64; 0 asks whether the process is there.
const SIGNALS: std::ops::RangeInclusive<i32> = 0..=64;

/// All containers of the pod.
#[derive(Debug)]
pub(crate) struct Containers {
    containers: BTreeMap<String, Container>,
    replies: Vec<Reply>,
    shared_memory: SharedMemory,
    refreshes: Refreshes,
    /// Finds the way back to the agent's own PID namespace.
    own: OwnedFd,
}

#[derive(Debug)]
struct Container {
    namespaces: CloneFlags,
    user_namespace: Option<UserNamespace>,
    cgroup: Cgroup,
    oom: OomWatch,
    freezer: Freezer,
    /// Copies of its live volumes.
    replicas: Vec<Replica>,
    /// The first process, whose namespaces are the container's.
    first: OwnedFd,
    /// By id; the first process has the empty one.
    processes: BTreeMap<String, Process>,
}

impl Containers {
    pub(crate) fn new() -> Result<Self, StepError> {
        let own = sys::process::own_pidfd().doing(|| "Cannot open the agent's own pidfd")?;
        Ok(Self {
            containers: BTreeMap::new(),
            replies: Vec::new(),
            shared_memory: SharedMemory::default(),
            refreshes: Refreshes::new()?,
            own,
        })
    }

    /// Carries out a call. Its reply is in [`Self::replies`], at once or some day.
    pub(crate) fn call(&mut self, caller: Caller, request: Request) {
        let result = match request {
            Request::Create(spec) => self.create(caller, *spec),
            Request::Exec { container, process, spec } => self.exec(caller, &container, process, *spec),
            Request::Start { container, process } => self.start(caller, &container, &process),
            Request::Wait { container, process } => self.wait(caller, &container, &process),
            Request::Signal { container, process, signal, all } => {
                self.signal(&container, &process, signal, all).map(Some)
            }
            Request::Resize { container, process, size } => self.resize(&container, &process, size).map(Some),
            Request::Delete { container, process } => self.delete(&container, &process).map(Some),
            Request::List => Ok(Some(self.list())),
            Request::Stats { container } => self.stats(&container).map(Some),
            Request::WaitOom { container, seen } => self.wait_oom(caller, &container, seen),
            Request::Pids { container } => self.pids(&container).map(Some),
            Request::Freeze { container, frozen } => self.freeze(caller, &container, frozen),
            Request::Refresh { path, target } => self.refresh(caller, path, &target),
            Request::Update { container, resources } => self.update(&container, *resources).map(Some),
            Request::Identity { hostname, sysctls } => {
                identity::apply(hostname.as_deref(), sysctls).map(|()| Some(Answer::Done))
            }
            Request::ReleaseDisk { slot } => disks::release(slot).map(|()| Some(Answer::Done)),
            Request::Clock { adjust_ns } => clock::adjust(adjust_ns).map(Some),
            Request::Network(spec) => network::apply(&spec).map(|()| Some(Answer::Done)),
            Request::Shutdown => Ok(Some(Answer::Done)), // The server's own: it ends all of this.
        };
        match result {
            Ok(None) => {}
            Ok(Some(answer)) => self.replies.push((caller, Ok(answer))),
            Err(error) => self.replies.push((caller, Err(error))),
        }
    }

    /// Takes the replies that are due.
    pub(crate) fn replies(&mut self) -> Vec<Reply> {
        std::mem::take(&mut self.replies)
    }

    /// Joins a connection to the stream it asks for. `None`: there is no such stream to be had.
    pub(crate) fn attach(&mut self, hello: &StreamHello, connection: OwnedFd) -> Option<Vec<Relay>> {
        let process = self.containers.get_mut(&hello.container)?.processes.get_mut(&hello.process)?;
        process.streams.attach(hello.stream, connection)
    }

    /// Connections to the processes that have not exec'd yet, with their PIDs.
    pub(crate) fn waits_for(&self) -> impl Iterator<Item = (i32, BorrowedFd<'_>)> {
        let processes = self.containers.values().flat_map(|container| container.processes.values());
        processes.filter_map(|process| Some((process.pid, process.sync.as_ref()?.as_fd())))
    }

    /// Where the kernel shows what somebody waits for: priority events.
    pub(crate) fn cgroup_events(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.containers
            .values()
            .flat_map(|container| container.oom.waits_for().into_iter().chain(container.freezer.waits_for()))
    }

    /// Answers who waits for what has happened.
    pub(crate) fn check_cgroups(&mut self) {
        for container in self.containers.values_mut() {
            container.oom.check(&mut self.replies);
            container.freezer.check(&mut self.replies);
        }
    }

    /// Takes the reports of a process that has not exec'd yet.
    pub(crate) fn take_reports(&mut self, pid: i32) {
        let Some(process) = self
            .containers
            .values_mut()
            .flat_map(|container| container.processes.values_mut())
            .find(|process| process.is(pid))
        else {
            return;
        };
        process.take_reports(&mut self.replies);
    }

    /// A child of the agent has ended: one of these processes, or an orphan of one.
    pub(crate) fn reaped(&mut self, pid: i32, status: ExitStatus) {
        let found = self.containers.iter_mut().find_map(|(id, container)| {
            let (name, process) = container.processes.iter_mut().find(|(_, process)| process.is(pid))?;
            process.take_reports(&mut self.replies);
            // Who waits for both learns why it ended before that it did.
            container.oom.check(&mut self.replies);
            let next = process.life.exited(status, &mut self.replies);
            process.sync = None;
            process.streams.process_ended();
            let next = if process.orphaned { Next::Forget } else { next };
            Some((id.clone(), name.clone(), next))
        });
        let Some((id, name, next)) = found else {
            self.replies.extend(self.refreshes.reaped(pid));
            return;
        };
        let forget = next == Next::Forget;
        if name.is_empty() {
            if forget {
                self.remove_container(&id);
            } else if let Some(container) = self.containers.get(&id) {
                // Those of its own PID namespace are dead by now; others may not be.
                let _ = container.cgroup.kill();
            }
        } else if forget && let Some(container) = self.containers.get_mut(&id) {
            container.processes.remove(&name);
        }
    }

    /// A control connection is gone. Nobody will start or delete the further processes that it has made: those that
    /// do not run yet are killed, and each is forgotten at its end.
    pub(crate) fn forget_connection(&mut self, connection: u32) {
        for container in self.containers.values_mut() {
            container.oom.forget_connection(connection);
            container.freezer.forget_connection(connection);
            container.processes.retain(|name, process| {
                process.life.forget_connection(connection);
                if name.is_empty() || process.connection != connection {
                    return true;
                }
                process.orphaned = true;
                if process.life.is_waiting() {
                    let _ = sys::process::kill(process.pid, libc::SIGKILL);
                }
                !process.life.has_exited()
            });
        }
    }

    /// Kills everything. True when nothing is left alive.
    pub(crate) fn kill_all(&mut self) -> bool {
        for container in self.containers.values() {
            let _ = container.cgroup.kill();
        }
        let mut processes = self.containers.values().flat_map(|container| container.processes.values());
        processes.all(|process| process.life.has_exited())
    }

    fn create(&mut self, caller: Caller, mut spec: ContainerSpec) -> Result<Option<Answer>, AgentError> {
        let id = spec.id.clone();
        disks::attach(&mut spec)?;
        let disk = disks::mount_root(&spec.disks)?;
        let mut plan = ContainerPlan::new(spec)?;
        plan.root.disk = disk;
        id_map::prepare(&mut plan.root.mounts)?;
        if self.containers.contains_key(&id) {
            return Err(AgentError::new(ErrorKind::Exists, format_args!("Container {id} exists already")));
        }
        if self.containers.len() >= MAX_CONTAINERS {
            return Err(failed(format_args!("{MAX_CONTAINERS} containers exist already")));
        }
        self.check_process_count()?;
        let replicas = self.prepare_mounts(&plan.root)?;
        let cgroup = Cgroup::create(&id)?;
        // The cgroup namespace is the child's to make, when it is in its cgroup; the time namespace, before anybody is in it.
        let at_fork = plan.namespaces & !(CloneFlags::CLONE_NEWCGROUP | NEW_TIME);
        let limited = cgroup
            .limit(&plan.limits)
            .and_then(|()| plan.device_filter.iter().try_for_each(|filter| cgroup.filter_devices(filter)));
        let forked = limited.and_then(|()| make_first(caller, &plan, at_fork, cgroup.as_fd()));
        match forked {
            Ok((process, first)) => {
                let processes = BTreeMap::from([(String::new(), process)]);
                let container = Container {
                    namespaces: plan.namespaces,
                    user_namespace: plan.user_namespace,
                    oom: OomWatch::new(cgroup.path()),
                    freezer: Freezer::new(cgroup.path()),
                    cgroup,
                    replicas,
                    first,
                    processes,
                };
                self.containers.insert(id, container);
                Ok(None)
            }
            Err(error) => {
                cgroup.remove();
                Err(error.into())
            }
        }
    }

    /// Makes what a container's mounts have to find: it is the agent's, to be there for others or longer.
    fn prepare_mounts(&mut self, root: &RootPlan) -> Result<Vec<Replica>, StepError> {
        let mut replicas = Vec::new();
        for mount in &root.mounts {
            match &mount.what {
                MountKind::Shm { size } => self.shared_memory.provide(*size)?,
                MountKind::Live { source, copy } => replicas.push(Replica::mount(source, copy)?),
                MountKind::Bind { .. } | MountKind::FileSystem { .. } => {}
            }
        }
        Ok(replicas)
    }

    fn exec(
        &mut self,
        caller: Caller,
        container_id: &str,
        id: String,
        spec: ProcessSpec,
    ) -> Result<Option<Answer>, AgentError> {
        if !validate_id(&id) {
            return Err(invalid(format_args!("process: {id:?} cannot name a process")));
        }
        self.check_process_count()?;
        let container = find(&mut self.containers, container_id)?;
        let plan = ProcessPlan::new(spec, container.user_namespace.as_ref())?;
        if container.processes.contains_key(&id) {
            return Err(AgentError::new(ErrorKind::Exists, format_args!("Process {id} exists already")));
        }
        // The first process may still be on its way in, and its namespaces are not the container's before it is there.
        container.check_running()?;
        // The new process would freeze too, before it can say that it is there.
        if container.freezer.is_frozen() {
            return Err(wrong_state("The container is frozen"));
        }
        let namespaces = container.namespaces;
        let joined = namespaces & !CloneFlags::CLONE_NEWPID;
        let shares_pids = !namespaces.contains(CloneFlags::CLONE_NEWPID);
        let doing = || "Cannot join the container's PID namespace";
        if !shares_pids {
            setns(&container.first, CloneFlags::CLONE_NEWPID).doing(doing)?;
        }
        let (cgroup, first) = (container.cgroup.as_fd(), container.first.as_fd());
        let forked = fork(caller, &plan, CloneFlags::empty(), cgroup, |ends| {
            child::further(&plan, ends, first, joined)
        });
        if !shares_pids {
            setns(&self.own, CloneFlags::CLONE_NEWPID).doing(doing)?;
        }
        container.processes.insert(id, forked?.0);
        Ok(None)
    }

    fn start(
        &mut self,
        caller: Caller,
        container: &str,
        process: &str,
    ) -> Result<Option<Answer>, AgentError> {
        let process = find_process(&mut self.containers, container, process)?;
        if process.life.start(caller)? == Next::Release {
            process.release();
        }
        Ok(None)
    }

    fn wait(&mut self, caller: Caller, container: &str, process: &str) -> Result<Option<Answer>, AgentError> {
        let process = find_process(&mut self.containers, container, process)?;
        process.life.wait(caller, &mut self.replies).map(|()| None)
    }

    fn signal(&mut self, id: &str, process: &str, signal: i32, all: bool) -> Result<Answer, AgentError> {
        if !SIGNALS.contains(&signal) {
            return Err(invalid(format_args!("signal: {signal} is not the number of a signal")));
        }
        let container = find(&mut self.containers, id)?;
        if all {
            if signal == libc::SIGKILL {
                container.cgroup.kill().doing(|| "Cannot kill the container's processes")?;
            } else {
                for pid in container.cgroup.processes() {
                    // One that has ended in the meantime needs no signal.
                    let _ = sys::process::kill(pid, signal);
                }
            }
            return Ok(Answer::Done);
        }
        let process = container.process(process)?;
        if process.life.has_exited() {
            return Err(wrong_state("The process has ended"));
        }
        // Not reaped, so the PID is still this process's.
        sys::process::kill(process.pid, signal).doing(|| format!("Cannot send signal {signal}"))?;
        Ok(Answer::Done)
    }

    fn resize(&mut self, container: &str, process: &str, size: TerminalSize) -> Result<Answer, AgentError> {
        let process = find_process(&mut self.containers, container, process)?;
        match process.streams.resize(size) {
            Some(result) => Ok(result.map(|()| Answer::Done)?),
            None => Err(wrong_state("The process has no terminal")),
        }
    }

    fn update(&mut self, id: &str, resources: Resources) -> Result<Answer, AgentError> {
        let limits = Limits::new(resources)?;
        find(&mut self.containers, id)?.cgroup.limit(&limits)?;
        Ok(Answer::Done)
    }

    fn stats(&self, id: &str) -> Result<Answer, AgentError> {
        let stats = if id.is_empty() {
            Stats { guest: Some(stats::guest()), ..stats::read(Path::new(cgroup::PARENT)) }
        } else {
            let missing =
                || AgentError::new(ErrorKind::NotFound, format_args!("There is no container {id:?}"));
            stats::read(self.containers.get(id).ok_or_else(missing)?.cgroup.path())
        };
        Ok(Answer::Stats(Box::new(stats)))
    }

    fn wait_oom(&mut self, caller: Caller, id: &str, seen: u64) -> Result<Option<Answer>, AgentError> {
        find(&mut self.containers, id)?.oom.wait(caller, seen, &mut self.replies).map(|()| None)
    }

    fn pids(&mut self, id: &str) -> Result<Answer, AgentError> {
        let pids = find(&mut self.containers, id)?.cgroup.processes();
        Ok(Answer::Pids(pids.into_iter().filter_map(|pid| pid.try_into().ok()).collect()))
    }

    fn freeze(&mut self, caller: Caller, id: &str, frozen: bool) -> Result<Option<Answer>, AgentError> {
        let container = find(&mut self.containers, id)?;
        container.check_running()?;
        container.freezer.set(caller, frozen, &mut self.replies).map(|()| None)
    }

    fn refresh(&mut self, caller: Caller, path: String, target: &str) -> Result<Option<Answer>, AgentError> {
        if !validate_live_target(target) {
            return Err(invalid(format_args!("target: {target:?} is not where ..data can lead to")));
        }
        let (mut found, mut stale) = (false, Vec::new());
        for container in self.containers.values() {
            for replica in container.replicas.iter().filter(|replica| replica.is_of(&path)) {
                if container.is_being_made() {
                    return Err(wrong_state("The first copy of the volume is being made"));
                }
                found = true;
                stale.extend(Some(replica.path().to_path_buf()).filter(|_| replica.is_stale(target)));
            }
        }
        if !found {
            let message = format_args!("No container has the live volume {path:?}");
            return Err(AgentError::new(ErrorKind::NotFound, message));
        }
        if stale.is_empty() {
            return Ok(Some(Answer::Done));
        }
        self.refreshes.begin(caller, path, &stale, target).map(|()| None)
    }

    fn delete(&mut self, container_id: &str, id: &str) -> Result<Answer, AgentError> {
        let container = find(&mut self.containers, container_id)?;
        if !container.process(id)?.life.has_exited() {
            return Err(wrong_state("The process has not ended"));
        }
        if id.is_empty() {
            self.remove_container(container_id);
        } else if let Some(process) = container.processes.remove(id) {
            self.replies.extend(process.life.abandon());
        }
        Ok(Answer::Done)
    }

    fn remove_container(&mut self, id: &str) {
        let Some(container) = self.containers.remove(id) else { return };
        container.cgroup.remove();
        guest::forget_files();
        self.replies.extend(container.oom.abandon());
        self.replies.extend(container.freezer.abandon());
        self.replies.extend(container.processes.into_values().flat_map(|process| process.life.abandon()));
    }

    fn list(&self) -> Answer {
        let processes = self.containers.iter().flat_map(|(container, there)| {
            there.processes.iter().map(|(process, known)| ProcessInfo {
                container: container.clone(),
                process: process.clone(),
                pid: known.public_pid(),
                state: match known.life.public() {
                    ProcessState::Running if there.freezer.is_frozen() => ProcessState::Frozen,
                    state => state,
                },
            })
        });
        Answer::Processes(processes.collect())
    }

    fn check_process_count(&self) -> Result<(), AgentError> {
        let count: usize = self.containers.values().map(|container| container.processes.len()).sum();
        if count < MAX_PROCESSES {
            return Ok(());
        }
        Err(failed(format_args!("{MAX_PROCESSES} processes exist already: delete those that have ended")))
    }
}

impl Container {
    /// The first process is on its way into the container, whose file systems are being made.
    fn is_being_made(&self) -> bool {
        self.processes.get("").is_some_and(|first| first.life.is_waiting() && !first.life.is_in_place())
    }

    fn check_running(&self) -> Result<(), AgentError> {
        match self.processes.get("") {
            Some(first) if first.life.is_in_place() => Ok(()),
            _ => Err(wrong_state("The container is not running")),
        }
    }

    fn process(&mut self, id: &str) -> Result<&mut Process, AgentError> {
        let missing = || AgentError::new(ErrorKind::NotFound, format_args!("There is no process {id:?}"));
        self.processes.get_mut(id).ok_or_else(missing)
    }
}

fn find<'a>(
    containers: &'a mut BTreeMap<String, Container>,
    id: &str,
) -> Result<&'a mut Container, AgentError> {
    let missing = || AgentError::new(ErrorKind::NotFound, format_args!("There is no container {id:?}"));
    containers.get_mut(id).ok_or_else(missing)
}

fn find_process<'a>(
    containers: &'a mut BTreeMap<String, Container>,
    container: &str,
    process: &str,
) -> Result<&'a mut Process, AgentError> {
    find(containers, container)?.process(process)
}

fn failed(message: std::fmt::Arguments<'_>) -> AgentError {
    AgentError::new(ErrorKind::Failed, message)
}
