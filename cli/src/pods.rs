//! `krx exec`, `krx ps` and `krx kill`: what is done with a pod of somebody else.

use std::process;
use std::sync::Arc;
use std::time::SystemTime;

use krx_proto::ProcessSpec;
use krx_sandbox::agent::AgentClient;
use krx_sandbox::process::Process;
use krx_sandbox::state_dir::{Listed, PodContainer, PodPaths, PodState, StateRoot};
use krx_sandbox::timings::Timings;
use nix::sys::signal::Signal;

use crate::args::{Exec, Kill, Ps};
use crate::error::CliError;
use crate::parse;
use crate::process::attend;
use crate::signals::Signals;

pub(crate) fn exec(arguments: &Exec) -> Result<u8, CliError> {
    arguments.process.check()?;
    let (paths, state) = StateRoot::from_env().open(&arguments.name)?;
    let container = own(&state)?;
    let mut spec = ProcessSpec { args: arguments.command.clone(), ..container.process.clone() };
    if arguments.process.user.is_some() {
        container.exec.unbind(&mut spec);
    }
    arguments.process.apply(&mut spec, &container.rootfs)?;
    let signals = Signals::watch()?;
    signals.own();
    // The PID makes it unique among this host's, which are all that talk to the pod.
    let process = named(&paths, container, &format!("exec-{}", process::id()))?;
    process.exec(spec.clone())?;
    let status = attend(&process, None, &spec, &signals, &Arc::new(Timings::default()));
    // Gone with its pod, if that has ended meanwhile.
    let _ = process.delete();
    Ok(status?.shell_code())
}

pub(crate) fn kill(arguments: &Kill) -> Result<u8, CliError> {
    let signal = parse::signal(&arguments.signal)?;
    let (paths, state) = StateRoot::from_env().open(&arguments.name)?;
    let killed = own(&state)
        .and_then(|container| named(&paths, container, ""))
        .and_then(|process| Ok(process.kill(signal)?));
    match killed {
        // A guest that does not do what it is told ends with its VM, and so with its process.
        Err(error) if signal == Signal::SIGKILL as i32 && !error.is_answer() => {
            StateRoot::from_env().kill_vmm(&arguments.name)?;
        }
        killed => killed?,
    }
    Ok(0)
}

/// The pod's container, where it is one of `krx run`.
fn own(state: &PodState) -> Result<&PodContainer, CliError> {
    let containerds = || {
        let name = &state.name;
        CliError::Usage(format!(
            "Pod {name} is one of containerd's, which knows its containers: use `crictl` or `ctr`, or end it with `krx kill -s KILL {name}`"
        ))
    };
    state.container.as_ref().ok_or_else(containerds)
}

fn named(paths: &PodPaths, container: &PodContainer, name: &str) -> Result<Process, CliError> {
    let agent = Arc::new(AgentClient::connect(&paths.vsock())?);
    Ok(Process::new(agent, paths.vsock(), &container.id, name))
}

pub(crate) fn ps(arguments: &Ps) -> Result<u8, CliError> {
    let pods = StateRoot::from_env().list()?;
    if arguments.json {
        let states: Vec<_> = pods.iter().filter_map(|pod| pod.state.as_ref()).map(public).collect();
        println!("{}", serde_json::Value::from(states));
        return Ok(0);
    }
    println!("{:<24} {:>8} {:>5} {:>8} {:>8}  COMMAND", "NAME", "VMM", "CPUS", "MEMORY", "AGE");
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    for Listed { name, state, .. } in &pods {
        match state {
            Some(state) => println!(
                "{name:<24} {:>8} {:>5} {:>7}M {:>7}s  {}",
                state.vmm_pid,
                state.vcpus,
                state.memory_mib,
                now.saturating_sub(state.started),
                state.container.as_ref().map_or_else(
                    || "(of containerd)".into(),
                    |container| container.process.args.join(" ").escape_debug().to_string()
                )
            ),
            None => println!("{name:<24} {:>8} {:>5} {:>8} {:>8}  (starting)", "-", "-", "-", "-"),
        }
    }
    Ok(0)
}

/// A pod's state without its environment, which may hold secrets.
fn public(state: &PodState) -> serde_json::Value {
    serde_json::json!({
        "name": state.name,
        "owner_pid": state.owner_pid,
        "vmm_pid": state.vmm_pid,
        "started": state.started,
        "vcpus": state.vcpus,
        "memory_mib": state.memory_mib,
        "rootfs": state.container.as_ref().map(|container| &container.rootfs),
        "args": state.container.as_ref().map(|container| &container.process.args),
    })
}
