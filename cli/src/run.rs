//! `krx run`: a pod from its making to its end.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::time::Duration;

use krx_image::ContainerRoot;
use krx_proto::ProcessSpec;
use krx_sandbox::artifacts::Artifacts;
use krx_sandbox::container::{Container, ContainerError};
use krx_sandbox::pod::{Pod, PodConfig, PodError};
use krx_sandbox::preflight::Finding;
use krx_sandbox::process::Process;
use krx_sandbox::settings::{self, Settings};
use krx_sandbox::state_dir::{ExecBase, PodContainer, StateRoot};
use krx_sandbox::timings::Timings;
use krx_sandbox::volume::Volume;
use krx_sandbox::{bundle, exec_limits, preflight};

use crate::args::{Run, TimingsFormat};
use crate::error::CliError;
use crate::image::{self, Prepared};
use crate::process::attend;
use crate::signals::Signals;
use crate::{detach, parse};

pub(crate) fn run(arguments: &Run) -> Result<u8, CliError> {
    match (arguments.detach, arguments.owner) {
        (true, false) => return detach::start(),
        (true, true) => return detach::own(arguments),
        (false, _) => {}
    }
    let timings = Arc::new(Timings::default());
    timings.mark("krx main");
    let root = StateRoot::from_env();
    let name = arguments.name.clone().unwrap_or_else(|| format!("krx-{}", process::id()));
    let plan = plan(arguments, &name)?;
    if arguments.name.is_some() {
        root.records().check_free(&name)?;
    }
    check_host(&root, &plan)?;
    timings.mark("planned");
    let signals = Signals::watch()?;
    let made = make(&root, plan, &signals, &timings)?;
    let status = attend(&made.process, Some(made.pod.vmm()), &made.spec, &signals, &timings)
        .map_err(|error| made.pod.explain(error, PodError::Start));
    if arguments.timings.is_some() {
        made.pod.collect_timings(&timings);
    }
    made.end(matches!(status, Err(PodError::Lost(_) | PodError::Broken(_))));
    match arguments.timings {
        Some(TimingsFormat::Table) => eprint!("{}", timings.table()),
        Some(TimingsFormat::Json) => eprintln!("{}", timings.json()),
        None => {}
    }
    match (status, signals.interrupted()) {
        // It came when the VM was up and the process was not yet there to take it.
        (Err(_), Some(signal)) => Err(CliError::Interrupted(signal)),
        (status, _) => Ok(status?.shell_code()),
    }
}

/// What is to be started.
pub(crate) struct Plan {
    config: PodConfig,
    pub(crate) container: Container,
    /// What a further process in the container starts from.
    exec: ExecBase,
    pub(crate) labels: BTreeMap<String, String>,
    detached: bool,
    /// The root file system, if it is an image's. Last, as it goes when nobody is in it.
    root: Option<ContainerRoot>,
}

/// A pod with a process in it that waits to be started.
pub(crate) struct Made {
    pub(crate) pod: Pod,
    pub(crate) process: Process,
    pub(crate) spec: ProcessSpec,
    /// See [`Plan`].
    _root: Option<ContainerRoot>,
}

impl Made {
    /// The end of the pod, in good order unless its guest is lost.
    pub(crate) fn end(self, is_lost: bool) {
        if !is_lost {
            self.pod.delete();
        }
    }
}

/// Says what will not work on this host, or that nothing will.
pub(crate) fn check_host(root: &StateRoot, plan: &Plan) -> Result<(), CliError> {
    for Finding { what, meaning, remedy, .. } in preflight::check_start(root, plan.config.memory_mib)? {
        eprintln!("krx: warning: {what}: {meaning}. {remedy}");
    }
    Ok(())
}

/// Makes the pod and its container, unless a signal comes in between.
pub(crate) fn make(
    root: &StateRoot,
    plan: Plan,
    signals: &Signals,
    timings: &Timings,
) -> Result<Made, CliError> {
    let Plan { config, mut container, exec, labels, detached, root: image } = plan;
    let create = || -> Result<_, CliError> {
        let pod = Pod::boot(root, config, timings, |vmm| signals.booting(vmm))?;
        if pod.network().is_some_and(|network| network.interfaces().next().is_none()) {
            eprintln!(
                "krx: warning: the network namespace has no interface that is up but lo: the pod has no network"
            );
        }
        // They go with the pod.
        pod.attach_disks(&mut container)?;
        let process = pod.create(&container.spec)?;
        timings.mark("container created");
        pod.publish(Some(PodContainer {
            id: container.spec.id.clone(),
            rootfs: seen_by_all(container.rootfs(), image.is_some()),
            process: container.spec.process.clone(),
            exec,
            labels,
            detached,
        }))?;
        Ok((pod, process))
    };
    let (pod, process) = match (create(), signals.interrupted()) {
        (_, Some(signal)) => return Err(CliError::Interrupted(signal)),
        (created, None) => created?,
    };
    Ok(Made { pod, process, spec: container.spec.process, _root: image })
}

/// A directory as other processes find it: an image's is mounted for this one alone.
fn seen_by_all(rootfs: &Path, private: bool) -> PathBuf {
    let mut own = OsString::from(format!("/proc/{}/root", process::id()));
    own.push(rootfs);
    if private { own.into() } else { rootfs.into() }
}

/// All that can be known to be right or wrong before anything is started.
pub(crate) fn plan(arguments: &Run, name: &str) -> Result<Plan, CliError> {
    arguments.process.check(!arguments.detach)?;
    if arguments.no_jail {
        eprintln!("krx: WARNING: --no-jail: a guest that takes over its VMM is root on this host");
    }
    let settings = Settings::load()?;
    let vm = &settings.vm;
    let memory = arguments.memory.as_deref().map_or(Ok(vm.memory), parse::memory)?;
    let (cpus, quota) = arguments.cpus.as_deref().map_or(Ok((vm.cpus, None)), parse::cpus)?;
    let labels = arguments.labels.iter().map(|text| parse::label(text)).collect::<Result<_, _>>()?;
    if !krx_proto::validate_id(name) {
        let form = "1 to 76 letters, digits, dots, dashes and underscores, the first a letter, a digit or an underscore";
        return Err(CliError::Usage(format!("Name `{name}` cannot be: give {form}")));
    }
    let (mut container, exec, root) = container(arguments, name)?;
    if quota.is_some() {
        container.spec.resources.cpu_max = quota;
    }
    let config = PodConfig {
        name: name.into(),
        artifacts: Artifacts::find(arguments.kernel.as_deref(), &settings)?,
        vcpus: cpus.get().into(),
        memory_mib: memory.mib(),
        kernel_args: settings.guest.kernel_args,
        console: arguments.console || settings.vm.console,
        boot_timeout: boot_timeout(settings.vm.boot_timeout)?,
        share: container.shared().to_vec(),
        netns: arguments.netns.clone(),
        vhost_net: settings.vm.vhost_net,
        jail: !arguments.no_jail,
    };
    Ok(Plan { config, container, exec, labels, detached: arguments.detach, root })
}

/// The container, what a further process in it starts from, and its root file system if that is an image's.
fn container(arguments: &Run, name: &str) -> Result<(Container, ExecBase, Option<ContainerRoot>), CliError> {
    let mut options = arguments.process.clone();
    let mut image = None;
    let mut container = match (&arguments.rootfs, &arguments.bundle, &arguments.image) {
        (Some(rootfs), None, None) => Container::on_rootfs(name, rootfs)?,
        (None, Some(directory), None) => bundle::read(name, directory)?,
        (None, None, Some(reference)) => {
            let Prepared { root, config } = image::prepare(reference, name)?;
            let mut container = Container::on_rootfs(name, &root.path())?;
            let entrypoint = arguments.entrypoint.as_deref();
            image::configure(&mut container.spec.process, &config, entrypoint, &arguments.command)?;
            options.user = options.user.or(config.user);
            image = Some(root);
            container
        }
        _ => return Err(CliError::Usage("Give one of --rootfs DIR, --bundle DIR and --image IMAGE".into())),
    };
    arguments.confinement.apply(&mut container.spec)?;
    let volumes: Result<Vec<_>, _> = arguments.volumes.iter().map(|text| Volume::parse(text)).collect();
    let volumes = volumes.map_err(ContainerError::Volume)?;
    // One would hide the other, and nobody would know.
    if let Some(both) = volumes.iter().find(|volume| arguments.confinement.has_tmpfs(&volume.destination)) {
        return Err(ContainerError::Twice(both.destination.clone()).into());
    }
    container.add_volumes(volumes)?;
    let rootfs = container.rootfs().to_owned();
    let spec = &mut container.spec;
    if !arguments.command.is_empty() && image.is_none() {
        spec.process.args.clone_from(&arguments.command);
    }
    if spec.process.args.is_empty() {
        return Err(CliError::Usage("Give a command after `--`".into()));
    }
    if arguments.bundle.is_some() && spec.process.terminal.is_some() && !options.tty {
        // The bundle's own wish, as far as there is a terminal to give.
        options.tty = true;
        options.check(!arguments.detach)?;
    }
    let exec = options.apply(&mut spec.process, &rootfs)?;
    exec_limits::check(&spec.process)?;
    if let Some(hostname) = &arguments.hostname {
        spec.hostname = Some(parse::hostname(hostname)?);
    }
    if arguments.read_only {
        spec.root_readonly = true;
    }
    container.finish()?;
    Ok((container, exec, image))
}

fn boot_timeout(default: Duration) -> Result<Duration, CliError> {
    let Ok(text) = std::env::var("KRX_BOOT_TIMEOUT") else { return Ok(default) };
    let timeout = text.parse().ok().and_then(|seconds| settings::boot_timeout(seconds).ok());
    let usage = || CliError::Usage(format!("KRX_BOOT_TIMEOUT is `{text}`: give seconds from 1 to 86400"));
    timeout.ok_or_else(usage)
}
