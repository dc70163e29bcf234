//! `krx stats` and `krx inspect`: what pods use, and what is known of one.

use krx_proto::{Answer, Request, Stats};
use krx_sandbox::agent::{AgentClient, CallError};
use krx_sandbox::state_dir::{PodPaths, PodState, StateError, StateRoot};
use serde_json::{Value, json};

use crate::args::{Inspect, StatsOptions};
use crate::error::{CliError, chain};
use crate::list;
use crate::pods::print;

pub(crate) fn stats(arguments: &StatsOptions) -> Result<u8, CliError> {
    let root = StateRoot::from_env();
    let named = !arguments.names.is_empty();
    let names = match named {
        true => arguments.names.clone(),
        // Those that are still starting use nothing that could be asked for.
        false => root.list()?.into_iter().filter(|pod| pod.state.is_some()).map(|pod| pod.name).collect(),
    };
    let mut used = Vec::new();
    for name in names {
        let asked = root.open(&name).map_err(CliError::from).and_then(|(paths, state)| {
            let stats = ask(&paths)?;
            Ok((state, stats))
        });
        match asked {
            Ok(asked) => used.push(asked),
            Err(error) if named => return Err(error),
            // It may have ended meanwhile.
            Err(error) => eprintln!("krx: warning: pod {name} is left out: {}", chain(&error)),
        }
    }
    if arguments.json {
        let all = used.iter().map(|(state, stats)| figures(state, stats));
        return print(&format!("{}\n", Value::from_iter(all)));
    }
    print(&table(&used))
}

pub(crate) fn inspect(arguments: &Inspect) -> Result<u8, CliError> {
    let (root, name) = (StateRoot::from_env(), &arguments.name);
    let kept = root.records().open(name);
    let (paths, state) = match (root.open(name), &kept) {
        // What is over has no pod, and what is not started no container.
        (Err(StateError::NotFound(_) | StateError::Starting(_)), Ok(kept)) => {
            return print_pretty(&list::of_record(kept));
        }
        (opened, _) => opened?,
    };
    let mut pod = list::of_pod(&state);
    if let Ok(kept) = &kept {
        pod["log"] = json!(kept.directory().join("log"));
    }
    pod["state_dir"] = json!(paths.directory());
    if let Some(container) = &state.container {
        let process = &container.process;
        pod["container"] = json!({
            "id": container.id,
            "cwd": process.cwd,
            "uid": process.user.uid,
            "gid": process.user.gid,
            "additional_gids": process.user.additional_gids,
            "terminal": process.terminal.is_some(),
            "no_new_privileges": process.no_new_privileges,
            "seccomp": process.seccomp.is_some(),
            "capabilities": process.capabilities.map(|sets| format!("{:016x}", sets.effective)),
        });
    }
    // A guest that does not answer is looked at all the same.
    pod["stats"] = ask(&paths).map_or(Value::Null, |stats| figures(&state, &stats));
    print_pretty(&pod)
}

fn print_pretty(value: &Value) -> Result<u8, CliError> {
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    print(&format!("{text}\n"))
}

/// What all containers of a pod use together.
fn ask(paths: &PodPaths) -> Result<Stats, CliError> {
    let agent = AgentClient::connect(&paths.vsock())?;
    match agent.send(Request::Stats { container: String::new() })?.answer()? {
        Answer::Stats(stats) => Ok(*stats),
        _ => Err(CallError::Unexpected.into()),
    }
}

/// Bytes received and sent by all interfaces.
fn traffic(stats: &Stats) -> (u64, u64) {
    let interfaces = stats.guest.iter().flat_map(|guest| &guest.interfaces);
    interfaces.fold((0, 0), |(received, sent), interface| {
        (received.saturating_add(interface.received.bytes), sent.saturating_add(interface.sent.bytes))
    })
}

fn figures(state: &PodState, stats: &Stats) -> Value {
    let (received, sent) = traffic(stats);
    json!({
        "name": state.name,
        "cpu_usec": stats.cpu.usage_usec,
        "memory_bytes": stats.memory.current,
        "vm_memory_bytes": state.memory_mib << 20,
        "pids": stats.pids.current,
        "received_bytes": received,
        "sent_bytes": sent,
    })
}

fn table(pods: &[(PodState, Stats)]) -> String {
    let mut table = format!(
        "{:<24} {:>10} {:>10} {:>8} {:>6} {:>10} {:>10}\n",
        "NAME", "CPU TIME", "MEMORY", "OF", "PIDS", "RECEIVED", "SENT"
    );
    for (state, stats) in pods {
        let (received, sent) = traffic(stats);
        let seconds =
            format!("{}.{:02}s", stats.cpu.usage_usec / 1_000_000, stats.cpu.usage_usec / 10_000 % 100);
        table += &format!(
            "{:<24} {seconds:>10} {:>9}K {:>7}M {:>6} {:>9}K {:>9}K\n",
            state.name,
            stats.memory.current >> 10,
            state.memory_mib,
            stats.pids.current,
            received >> 10,
            sent >> 10
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use krx_proto::{CpuStats, GuestStats, InterfaceStats, PidsStats, TrafficStats};

    use super::*;

    fn pod() -> (PodState, Stats) {
        let state = PodState {
            name: "web".into(),
            owner_pid: 1,
            vmm_pid: 2,
            started: 3,
            vcpus: 1,
            memory_mib: 128,
            container: None,
        };
        let bytes = |bytes| TrafficStats { bytes, ..TrafficStats::default() };
        // A guest may say what it likes.
        let interface =
            |sent| InterfaceStats { name: "eth0".into(), received: bytes(2048), sent: bytes(sent) };
        let stats = Stats {
            cpu: CpuStats { usage_usec: 61_050_000, ..CpuStats::default() },
            pids: PidsStats { current: 3, max: None },
            guest: Some(GuestStats {
                interfaces: vec![interface(u64::MAX), interface(1)],
                ..GuestStats::default()
            }),
            ..Stats::default()
        };
        (state, stats)
    }

    #[test]
    fn figures_are_lined_up() {
        let table = table(&[pod()]);
        let line: Vec<_> = table.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(line[..6], ["web", "61.05s", "0K", "128M", "3", "4K"]);
    }

    #[test]
    fn traffic_of_all_interfaces_is_added_without_overflow() {
        let (state, stats) = pod();
        assert_eq!(traffic(&stats), (4096, u64::MAX));
        assert_eq!(figures(&state, &stats)["cpu_usec"], 61_050_000);
    }
}
