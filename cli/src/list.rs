//! `krx ps`: pods that run, and detached containers that have ended.

use std::collections::BTreeMap;
use std::time::SystemTime;

use krx_sandbox::detached::Kept;
use krx_sandbox::state_dir::{Listed, PodState, StateRoot};
use serde_json::{Value, json};

use crate::args::Ps;
use crate::error::CliError;
use crate::parse;
use crate::pods::print;

/// One line, whatever it is of.
struct Line {
    name: String,
    /// A pod is there for it.
    pod: Option<PodState>,
    status: String,
    /// Since when it is so; seconds since 1970.
    since: Option<u64>,
    command: String,
    labels: BTreeMap<String, String>,
    /// `None` for a pod that is still starting.
    json: Option<Value>,
}

/// What a line is to be like.
enum Filter {
    Label(String, Option<String>),
    Name(String),
    Status(String),
}

const STATES: [&str; 4] = ["running", "starting", "exited", "dead"];

pub(crate) fn ps(arguments: &Ps) -> Result<u8, CliError> {
    let filters = arguments.filters.iter().map(|text| filter(text)).collect::<Result<Vec<_>, _>>()?;
    // Who asks for those that have ended by their state need not say so twice.
    let all =
        arguments.all || filters.iter().any(|filter| matches!(filter, Filter::Status(s) if s != "running"));
    let mut lines = lines(&StateRoot::from_env(), all)?;
    lines.retain(|line| filters.iter().all(|filter| filter.takes(line)));
    if arguments.quiet {
        let names: Vec<_> = lines.iter().map(|line| format!("{}\n", line.name)).collect();
        return print(&names.concat());
    }
    if arguments.json {
        let all: Vec<_> = lines.into_iter().filter_map(|line| line.json).collect();
        return print(&format!("{}\n", Value::from(all)));
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    print(&table(&lines, all, now))
}

fn lines(root: &StateRoot, all: bool) -> Result<Vec<Line>, CliError> {
    // Before the pods: a container that ends in between is seen once or twice, but not missed.
    let kept = root.records().list()?;
    let mut lines: Vec<_> = root.list()?.into_iter().map(Line::of_pod).collect();
    if all {
        let is_pod = |kept: &&Kept| lines.iter().any(|line| line.name == kept.record.name);
        let ended: Vec<_> = kept.iter().filter(|kept| !is_pod(kept)).map(Line::of_record).collect();
        lines.extend(ended);
        lines.sort_by(|a, b| a.name.cmp(&b.name));
    }
    Ok(lines)
}

impl Line {
    fn of_pod(listed: Listed) -> Self {
        let Listed { name, state, .. } = listed;
        let container = state.as_ref().and_then(|state| state.container.as_ref());
        let command = match (&state, container) {
            (None, _) => "(starting)".into(),
            (_, None) => "(of containerd)".into(),
            (_, Some(container)) => shown(&container.process.args),
        };
        Self {
            name,
            status: if state.is_some() { "running" } else { "starting" }.into(),
            since: state.as_ref().map(|state| state.started),
            command,
            labels: container.map(|container| container.labels.clone()).unwrap_or_default(),
            json: state.as_ref().map(of_pod),
            pod: state,
        }
    }

    fn of_record(kept: &Kept) -> Self {
        let record = &kept.record;
        Self {
            name: record.name.clone(),
            pod: None,
            status: kept.status(),
            since: record.ended.as_ref().map(|ended| ended.at).or(record.started),
            command: shown(&record.args),
            labels: record.labels.clone(),
            json: Some(of_record(kept)),
        }
    }
}

/// A command as one line.
fn shown(args: &[String]) -> String {
    args.join(" ").escape_debug().to_string()
}

fn filter(text: &str) -> Result<Filter, CliError> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    match key {
        "label" => {
            let (key, wanted) = parse::label(value)?;
            Ok(Filter::Label(key, value.contains('=').then_some(wanted)))
        }
        "name" => Ok(Filter::Name(value.into())),
        "status" if STATES.contains(&value) => Ok(Filter::Status(value.into())),
        _ => Err(CliError::Usage(format!(
            "Filter `{text}` cannot be: give label=KEY[=VALUE], name=PART or status={}",
            STATES.join("|")
        ))),
    }
}

impl Filter {
    fn takes(&self, line: &Line) -> bool {
        match self {
            Self::Label(key, wanted) => {
                line.labels.get(key).is_some_and(|value| wanted.as_ref().is_none_or(|wanted| wanted == value))
            }
            Self::Name(part) => line.name.contains(part),
            Self::Status(status) => line.status.split(' ').next() == Some(status),
        }
    }
}

fn table(lines: &[Line], with_status: bool, now: u64) -> String {
    let status = |text: &str| if with_status { format!("{text:<13} ") } else { String::new() };
    let mut table = format!(
        "{:<24} {:>8} {:>5} {:>8} {:>8}  {}COMMAND\n",
        "NAME",
        "VMM",
        "CPUS",
        "MEMORY",
        "AGE",
        status("STATUS")
    );
    for line in lines {
        let of_pod = |value: fn(&PodState) -> String| line.pod.as_ref().map_or_else(|| "-".into(), value);
        table += &format!(
            "{:<24} {:>8} {:>5} {:>8} {:>8}  {}{}\n",
            line.name,
            of_pod(|pod| pod.vmm_pid.to_string()),
            of_pod(|pod| pod.vcpus.to_string()),
            of_pod(|pod| format!("{}M", pod.memory_mib)),
            line.since.map_or_else(|| "-".into(), |since| format!("{}s", now.saturating_sub(since))),
            status(&line.status),
            line.command
        );
    }
    table
}

/// A pod's state without its environment, which may hold secrets.
pub(crate) fn of_pod(state: &PodState) -> Value {
    let container = state.container.as_ref();
    json!({
        "name": state.name,
        "status": "running",
        "owner_pid": state.owner_pid,
        "vmm_pid": state.vmm_pid,
        "started": state.started,
        "vcpus": state.vcpus,
        "memory_mib": state.memory_mib,
        "rootfs": container.map(|container| &container.rootfs),
        "args": container.map(|container| &container.process.args),
        "labels": container.map(|container| &container.labels),
        "detached": container.is_some_and(|container| container.detached),
    })
}

/// What is known of a container without a pod.
pub(crate) fn of_record(kept: &Kept) -> Value {
    let record = &kept.record;
    let ended = record.ended.as_ref();
    let status = kept.status();
    json!({
        "name": record.name,
        "status": status.split(' ').next(),
        "exit_code": ended.map(|ended| ended.code),
        "error": ended.and_then(|ended| ended.error.as_ref()),
        "created": record.created,
        "started": record.started,
        "ended": ended.map(|ended| ended.at),
        "args": record.args,
        "labels": record.labels,
        "detached": true,
        "log": kept.directory().join("log"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, status: &str, labels: &[(&str, &str)]) -> Line {
        Line {
            name: name.into(),
            pod: None,
            status: status.into(),
            since: Some(90),
            command: "sleep 1".into(),
            labels: labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
            json: None,
        }
    }

    #[test]
    fn filters_take_what_they_say() {
        let line = line("web-1", "exited (3)", &[("app", "web"), ("empty", "")]);
        for (text, takes) in [
            ("label=app", true),
            ("label=app=web", true),
            ("label=app=", false),
            ("label=empty=", true),
            ("label=ap", false),
            ("name=web", true),
            ("name=db", false),
            ("status=exited", true),
            ("status=running", false),
        ] {
            assert_eq!(filter(text).unwrap().takes(&line), takes, "{text}");
        }
        for bad in ["", "label", "label=", "status=ended", "status", "app=web"] {
            assert!(filter(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn status_is_a_column_when_it_differs() {
        let lines = [line("web", "exited (3)", &[])];
        let row = |with| table(&lines, with, 100).lines().nth(1).unwrap().to_string();
        assert_eq!(
            row(true).split_whitespace().collect::<Vec<_>>()[4..],
            ["10s", "exited", "(3)", "sleep", "1"]
        );
        assert!(!row(false).contains("exited"));
    }
}
