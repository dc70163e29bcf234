//! Makes the containers of a pod, the first with its VM. All of it blocks, and is called on threads that may.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::thread;

use containerd_shim::mount_linux::mount_rootfs;
use containerd_shim_protos::api::Mount;
use krx_proto::{ProcessSpec, Request};
use krx_sandbox::agent::{CallError, Pending};
use krx_sandbox::bundle::{self, PodNamespaces};
use krx_sandbox::container::Container;
use krx_sandbox::share::Prepared;
use krx_sandbox::timings::Timings;

use crate::config_json::{ConfigJson, Role};
use crate::error::{Result, ShimError};
use crate::io::{Connected, Stdio};
use crate::requests::KILL;
use crate::root_disk;
use crate::vm::{Belongings, Vm};

/// What containerd says of a container to be made.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    /// The snapshotter's mounts; empty for a root that is there already.
    pub(crate) rootfs: Vec<Mount>,
    pub(crate) stdio: Stdio,
    /// Of its making.
    pub(crate) timings: Arc<Timings>,
}

/// A container in the guest, whose first process waits for its start.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) spec: ProcessSpec,
    pub(crate) placed: Belongings,
    pub(crate) connected: Connected,
}

/// Makes what was ordered: a pod with its VM (and no container where the order is for its sandbox), or, in `vm`, a
/// container more.
pub(crate) fn make(order: &Order, vm: Option<Arc<Vm>>) -> Result<(Arc<Vm>, Option<Made>)> {
    let config = ConfigJson::read(&order.bundle)?;
    order.timings.mark("config.json read");
    match (&config.role, vm) {
        (Role::Sandbox, None) => {
            // What the pod cannot have is refused now, as its containers could not be told of it.
            let pause = bundle::read_in_pod(&order.id, &order.bundle, &first(&config))?;
            if pause.spec.user_namespace.is_some() {
                return Err(ShimError::unimplemented(
                    "krx does not support user namespaces of a whole pod (hostUsers: false): a pod has a kernel of its own. A container outside of Kubernetes can have one",
                ));
            }
            let vm = Vm::boot(&order.namespace, &order.id, &config, &order.timings)?;
            vm.pod.identify(config.hostname, config.sysctls)?;
            order.timings.mark("guest has its name and network");
            Ok((Arc::new(vm), None))
        }
        (Role::Single, None) => single(order, &config),
        (Role::Member(sandbox), Some(vm)) if *sandbox == vm.sandbox => {
            let made = member(order, &vm)?;
            Ok((vm, Some(made)))
        }
        (Role::Member(sandbox), _) => Err(ShimError::not_found(format!(
            "This shim has no pod {sandbox}: it was not made, or has ended"
        ))),
        (Role::Sandbox | Role::Single, Some(vm)) => {
            Err(ShimError::wrong_state(format!("This shim has a pod already, that of {}", vm.sandbox)))
        }
    }
}

/// Namespaces of a pod, as the container with which it begins speaks of them.
fn first(config: &ConfigJson) -> PodNamespaces {
    PodNamespaces {
        paths: config.netns.iter().cloned().collect(),
        is_sandbox: true,
        share_prefix: "0-".into(),
    }
}

/// A container alone in its VM. Its files are got ready while the VM boots.
fn single(order: &Order, config: &ConfigJson) -> Result<(Arc<Vm>, Option<Made>)> {
    let mut container = bundle::read_in_pod(&order.id, &order.bundle, &first(config))?;
    let (vm, prepared) = thread::scope(|scope| {
        let preparing = scope.spawn(|| prepare(&mut container, order));
        let vm = Vm::boot(&order.namespace, &order.id, config, &order.timings);
        let prepared = preparing.join().unwrap_or_else(|_| Err(ShimError::internal("Mounting has failed")));
        (vm, prepared)
    });
    let vm = vm?;
    let made = finish(order, container, prepared?, &vm)?;
    Ok((Arc::new(vm), Some(made)))
}

fn member(order: &Order, vm: &Vm) -> Result<Made> {
    let mut container = bundle::read_in_pod(&order.id, &order.bundle, &vm.namespaces())?;
    let prepared = prepare(&mut container, order)?;
    finish(order, container, prepared, vm)
}

fn prepare(container: &mut Container, order: &Order) -> Result<Prepared> {
    // The host's CPUs are not the guest's, and the kubelet's CPU manager knows those of the host.
    container.spec.resources.cpuset_cpus = None;
    container.spec.resources.cpuset_mems = None;
    let disk = root_disk::of(&order.rootfs)?;
    let mounts = if disk.is_some() { &[] } else { order.rootfs.as_slice() };
    disk.into_iter().for_each(|disk| container.add_disk(disk));
    let prepared = Prepared::new(container, |root| mount_all(mounts, root))?;
    order.timings.mark("files ready");
    Ok(prepared)
}

fn mount_all(mounts: &[Mount], root: &Path) -> containerd_shim::Result<()> {
    mounts.iter().try_for_each(|mount| {
        check_mount(mount)?;
        let target = match mount.target.trim_start_matches('/') {
            "" => root.to_path_buf(),
            below => root.join(below),
        };
        let given = |value: &'_ str| (!value.is_empty()).then(|| value.to_string());
        let (kind, source) = (given(&mount.type_), given(&mount.source));
        mount_rootfs(kind.as_deref(), source.as_deref(), &mount.options, target)
    })
}

/// What the library that mounts takes for granted: a target below the root, and layers that are there. Of an overlay with
/// many it enters the directory above them, and ends the process when that is not there.
fn check_mount(mount: &Mount) -> containerd_shim::Result<()> {
    let refused = |what: String| Err(containerd_shim::Error::InvalidArgument(what));
    if Path::new(&mount.target).components().any(|part| part == Component::ParentDir) {
        return refused(format!("mount target {:.100} leads out of the root file system", mount.target));
    }
    let layers = mount.options.iter().filter_map(|option| option.strip_prefix("lowerdir="));
    match layers.flat_map(|layers| layers.split(':')).find(|layer| !Path::new(layer).is_dir()) {
        Some(layer) if mount.type_ == "overlay" => refused(format!("layer {layer:.100} is not a directory")),
        _ => Ok(()),
    }
}

/// Ends a process that was made and is not to be, in the guest; blocks. Each step has its time limit.
pub(crate) fn unmake(vm: &Vm, container: &str, exec: &str) {
    let process = vm.pod.process(container, exec);
    // A guest that does not do it has it until its end.
    if let Err(CallError::NoAnswer(_)) = process.kill(KILL) {
        return;
    }
    let wait = Request::Wait { container: container.into(), process: exec.into() };
    let _ = vm.pod.agent().send(wait).and_then(Pending::answer);
    let _ = process.delete();
}

/// Puts the container's files into the share and makes it; what fails leaves nothing.
fn finish(order: &Order, mut container: Container, prepared: Prepared, vm: &Vm) -> Result<Made> {
    container.spec.process.stdin = !order.stdio.stdin.is_empty();
    vm.set_oom_score(container.spec.process.oom_score_adj);
    let placed = vm.place(prepared, &mut container)?;
    order.timings.mark("files in the share");
    vm.volumes.add(&container);
    let made = || -> Result<Connected> {
        let process = vm.pod.create(&container.spec)?;
        order.timings.mark("container created");
        // A guest that does not take connections is not to be dealt with any longer; its containers go with it.
        let connected = order.stdio.connect(&process)?;
        order.timings.mark("streams connected");
        Ok(connected)
    };
    match made() {
        Ok(connected) => Ok(Made { spec: container.spec.process, placed, connected }),
        Err(error) => {
            vm.volumes.remove(&container.spec.id);
            // It may be there all the same, of a guest that did not answer in time: its files are not to go before it.
            unmake(vm, &container.spec.id, "");
            vm.take_away(&placed);
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(target: &str, options: &[&str]) -> Mount {
        let options = options.iter().map(ToString::to_string).collect();
        Mount { type_: "overlay".into(), target: target.into(), options, ..Mount::default() }
    }

    #[test]
    fn a_mount_that_would_lead_astray_is_refused() {
        assert!(check_mount(&mount("", &["lowerdir=/tmp:/", "upperdir=/no"])).is_ok());
        assert!(check_mount(&mount("/a/../../b", &[])).is_err());
        assert!(check_mount(&mount("a..b", &[])).is_ok());
        let missing = (0..200).map(|layer| format!("/no/such/snapshots/{layer}/fs")).collect::<Vec<_>>();
        let refused = check_mount(&mount("", &[&format!("lowerdir={}", missing.join(":"))])).unwrap_err();
        assert!(refused.to_string().contains("/no/such/snapshots/0/fs"), "{refused}");
    }
}
