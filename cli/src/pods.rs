//! `krx exec`, `krx console` and `krx kill`: what is done with a pod of somebody else.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;

use krx_proto::ProcessSpec;
use krx_sandbox::agent::AgentClient;
use krx_sandbox::control;
use krx_sandbox::exec_limits;
use krx_sandbox::pod_containers::{self, PodMember};
use krx_sandbox::process::Process;
use krx_sandbox::state_dir::{ExecBase, PodContainer, PodPaths, PodState, StateRoot};
use krx_sandbox::timings::Timings;
use nix::sys::signal::Signal;

use crate::args::{Console, Exec, Kill};
use crate::error::{CliError, LookupError};
use crate::parse;
use crate::process::attend;
use crate::signals::Signals;

pub(crate) fn exec(arguments: &Exec) -> Result<u8, CliError> {
    arguments.process.check(true)?;
    let (paths, state) = StateRoot::from_env().open(&arguments.name)?;
    let (container, rootfs, mut spec) = base(arguments, &paths, &state)?;
    spec.args.clone_from(&arguments.command);
    arguments.process.apply(&mut spec, &rootfs)?;
    exec_limits::check(&spec)?;
    let signals = Signals::watch()?;
    signals.own();
    // The PID makes it unique among this host's, which are all that talk to the pod.
    let process = named(&paths, &container, &format!("exec-{}", process::id()))?;
    process.exec(spec.clone())?;
    let status = attend(&process, None, &spec, &signals, &Arc::new(Timings::default()));
    // Gone with its pod, if that has ended meanwhile.
    let _ = process.delete();
    Ok(status?.shell_code())
}

/// The container that a process is added to, its root file system on the host, and what the process starts from.
fn base(
    arguments: &Exec,
    paths: &PodPaths,
    state: &PodState,
) -> Result<(String, PathBuf, ProcessSpec), CliError> {
    let (container, user) = (arguments.container.as_deref(), arguments.process.user.as_deref());
    let Some(own) = &state.container else {
        // Its files are the shim's to see, so nobody's name is known here.
        if let Some(user) = user.filter(|user| user.contains(|c: char| c != ':' && !c.is_ascii_digit())) {
            let text =
                format!("User {user} is a name: in a pod of containerd's, give users and groups by number");
            return Err(CliError::Usage(text));
        }
        let PodMember { id, process } =
            pod_containers::choose(pod_containers::ask(&paths.metrics())?, container)?;
        return Ok((id, Path::new("/nonexistent").into(), process));
    };
    if container.is_some_and(|container| !own.id.starts_with(container)) {
        return Err(CliError::Usage(format!(
            "Pod {} has one container, {}: leave out -c",
            state.name, own.id
        )));
    }
    let mut spec = own.process.clone();
    if user.is_some() {
        ExecBase::unbind(&own.exec, &mut spec);
    }
    Ok((own.id.clone(), own.rootfs.clone(), spec))
}

pub(crate) fn console(arguments: &Console) -> Result<u8, CliError> {
    let (paths, _) = StateRoot::from_env().open(&arguments.name)?;
    let log = control::guest_log(&paths.control()).map_err(LookupError::Log)?;
    print(&format!("{}\n", log.trim_end()))
}

pub(crate) fn kill(arguments: &Kill) -> Result<u8, CliError> {
    signal(&StateRoot::from_env(), &arguments.name, parse::signal(&arguments.signal)?)?;
    Ok(0)
}

/// Sends a signal to the first process of a pod of `krx run`.
pub(crate) fn signal(root: &StateRoot, name: &str, signal: i32) -> Result<(), CliError> {
    let (paths, state) = root.open(name)?;
    let killed = own(&state)
        .and_then(|container| named(&paths, &container.id, ""))
        .and_then(|process| Ok(process.kill(signal)?));
    match killed {
        // A guest that does not do what it is told ends with its VM, and so with its process.
        Err(error) if signal == Signal::SIGKILL as i32 && !error.is_answer() => Ok(root.kill_vmm(name)?),
        killed => killed,
    }
}

/// The pod's container, where it is one of `krx run`.
pub(crate) fn own(state: &PodState) -> Result<&PodContainer, CliError> {
    let containerds = || {
        let name = &state.name;
        CliError::Usage(format!(
            "Pod {name} is one of containerd's, which knows its containers: use `crictl` or `ctr`, or end it with `krx kill -s KILL {name}`"
        ))
    };
    state.container.as_ref().ok_or_else(containerds)
}

pub(crate) fn named(paths: &PodPaths, container: &str, name: &str) -> Result<Process, CliError> {
    let agent = Arc::new(AgentClient::connect(&paths.vsock())?);
    Ok(Process::new(agent, paths.vsock(), container, name))
}

/// Writes to standard output. A reader that has seen enough is no error.
pub(crate) fn print(text: &str) -> Result<u8, CliError> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(LookupError::Output(error).into()),
        _ => Ok(0),
    }
}
