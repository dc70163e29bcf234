//! The tasks of a pod: the table of them, and of the processes of each.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use krx_proto::ProcessSpec;

use crate::error::{Result, ShimError};
use crate::process::Process;
use crate::vm::{Belongings, Vm};

/// A task of containerd's: a container, or the sandbox that stands for the pod.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) vm: Arc<Vm>,
    /// `None` for the sandbox, which has no process in the guest.
    pub(crate) container: Option<ContainerPart>,
    pub(crate) first: Process,
    added: Mutex<BTreeMap<String, Arc<Process>>>,
    paused: AtomicBool,
    /// Held while it is paused or resumed: of two who want the same, one does.
    pub(crate) pausing: tokio::sync::Mutex<()>,
}

/// What a container has beside its task.
#[derive(Debug)]
pub(crate) struct ContainerPart {
    /// What processes that are added start from.
    pub(crate) spec: ProcessSpec,
    pub(crate) placed: Belongings,
    /// It is alone in its VM, which ends with it.
    pub(crate) is_single: bool,
}

/// A process of a task, held by either.
pub(crate) enum Held {
    First(Arc<Task>),
    Added(Arc<Process>),
}

impl std::ops::Deref for Held {
    type Target = Process;

    fn deref(&self) -> &Process {
        match self {
            Self::First(task) => &task.first,
            Self::Added(process) => process,
        }
    }
}

impl Task {
    pub(crate) fn new(
        id: String,
        bundle: PathBuf,
        vm: Arc<Vm>,
        container: Option<ContainerPart>,
        first: Process,
    ) -> Self {
        let (added, paused) = (Mutex::default(), AtomicBool::new(false));
        let pausing = tokio::sync::Mutex::default();
        Self { id, bundle, vm, container, first, added, paused, pausing }
    }

    fn added(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Process>>> {
        self.added.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container, for what a sandbox cannot do.
    pub(crate) fn container(&self) -> Result<&ContainerPart> {
        let missing = || {
            ShimError::unimplemented(format!(
                "{} is the pod's sandbox, which is the VM itself: no process runs in it",
                self.id
            ))
        };
        self.container.as_ref().ok_or_else(missing)
    }

    /// A process by its id; the first one has the empty one.
    pub(crate) fn process(self: &Arc<Self>, exec: &str) -> Result<Held> {
        if exec.is_empty() {
            return Ok(Held::First(self.clone()));
        }
        let found = self.added().get(exec).cloned();
        found
            .map(Held::Added)
            .ok_or_else(|| ShimError::not_found(format!("Task {} has no process {exec}", self.id)))
    }

    pub(crate) fn add(&self, exec: &str, process: Process) -> Result<()> {
        let mut added = self.added();
        if added.contains_key(exec) {
            return Err(ShimError::exists(format!("Process {exec} exists already in task {}", self.id)));
        }
        added.insert(exec.into(), Arc::new(process));
        Ok(())
    }

    pub(crate) fn forget(&self, exec: &str) {
        self.added().remove(exec);
    }

    /// Its processes by id, the first one last: the others end before it.
    pub(crate) fn processes(self: &Arc<Self>) -> Vec<(String, Held)> {
        let added = self.added();
        let added = added.iter().map(|(exec, process)| (exec.clone(), Held::Added(process.clone())));
        added.chain([(String::new(), Held::First(self.clone()))]).collect()
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Refuses what no process of a frozen container could do.
    pub(crate) fn thawed(&self) -> Result<()> {
        if !self.is_paused() || self.first.has_exited() {
            return Ok(());
        }
        Err(ShimError::wrong_state(format!(
            "Task {} is paused, and no process begins in it: it has to be resumed first",
            self.id
        )))
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }
}

/// A place in the table.
#[derive(Debug)]
enum Entry {
    /// Being made.
    Reserved,
    Task(Arc<Task>),
}

/// All tasks of the pod, and its VM.
#[derive(Debug, Default)]
pub(crate) struct Tasks(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    entries: BTreeMap<String, Entry>,
    vm: Option<Arc<Vm>>,
}

/// An id that is taken for a task to be. Given back when dropped.
#[derive(Debug)]
pub(crate) struct Reservation<'a> {
    tasks: &'a Tasks,
    id: String,
}

impl Tasks {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an id, and says in which VM its task is to be. Only one task at a time can be that which makes the VM.
    pub(crate) fn reserve(&self, id: &str) -> Result<(Reservation<'_>, Option<Arc<Vm>>)> {
        if !krx_proto::validate_id(id) {
            return Err(ShimError::invalid(format!("No task can be named {id:?}")));
        }
        let mut table = self.lock();
        if table.entries.contains_key(id) {
            return Err(ShimError::exists(format!("Task {id} exists already")));
        }
        if table.vm.is_none() && !table.entries.is_empty() {
            return Err(ShimError::wrong_state("The pod is not up yet, or is no more"));
        }
        table.entries.insert(id.into(), Entry::Reserved);
        let vm = table.vm.clone();
        drop(table);
        Ok((Reservation { tasks: self, id: id.into() }, vm))
    }

    pub(crate) fn get(&self, id: &str) -> Result<Arc<Task>> {
        match self.lock().entries.get(id) {
            Some(Entry::Task(task)) => Ok(task.clone()),
            Some(Entry::Reserved) => Err(ShimError::wrong_state(format!("Task {id} is still being made"))),
            None => Err(ShimError::not_found(format!("There is no task {id}"))),
        }
    }

    /// Forgets a task; another one with its id stays.
    pub(crate) fn remove(&self, task: &Arc<Task>) {
        let mut table = self.lock();
        if matches!(table.entries.get(&task.id), Some(Entry::Task(found)) if Arc::ptr_eq(found, task)) {
            table.entries.remove(&task.id);
        }
    }

    /// All tasks, the sandbox last: it ends after its containers.
    pub(crate) fn all(&self) -> Vec<Arc<Task>> {
        let mut all: Vec<_> = self
            .lock()
            .entries
            .values()
            .filter_map(|entry| match entry {
                Entry::Task(task) => Some(task.clone()),
                Entry::Reserved => None,
            })
            .collect();
        all.sort_by_key(|task| task.container.is_none());
        all
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().entries.is_empty()
    }

    /// The pod's VM.
    pub(crate) fn vm(&self) -> Option<Arc<Vm>> {
        self.lock().vm.clone()
    }

    /// Sets the pod's VM, if it has none.
    pub(crate) fn set_vm(&self, vm: Arc<Vm>) {
        self.lock().vm.get_or_insert(vm);
    }

    /// Gives the pod's VM up; whoever still holds it, holds one that has ended. Another one stays.
    pub(crate) fn take_vm(&self, vm: &Arc<Vm>) -> Option<Arc<Vm>> {
        self.lock().vm.take_if(|found| Arc::ptr_eq(found, vm))
    }
}

impl Reservation<'_> {
    /// Puts the task into its place.
    pub(crate) fn fill(self, task: Task) -> Arc<Task> {
        let task = Arc::new(task);
        let mut table = self.tasks.lock();
        table.vm.get_or_insert_with(|| task.vm.clone());
        table.entries.insert(self.id.clone(), Entry::Task(task.clone()));
        drop(table);
        task
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut table = self.tasks.lock();
        if matches!(table.entries.get(&self.id), Some(Entry::Reserved)) {
            table.entries.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_once_and_given_back() {
        let tasks = Tasks::default();
        let (first, vm) = tasks.reserve("a").unwrap();
        assert!(vm.is_none());
        assert!(tasks.reserve("a").is_err(), "taken");
        assert!(tasks.reserve("b").is_err(), "there is no VM yet for it");
        assert!(tasks.get("a").unwrap_err().to_string().contains("being made"));
        drop(first);
        assert!(tasks.is_empty() && tasks.get("a").unwrap_err().is_not_found());
        assert!(tasks.reserve("a").is_ok());
        assert!(tasks.reserve("../a").is_err());
    }
}
