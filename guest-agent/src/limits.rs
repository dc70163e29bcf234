//! From limits as the host describes them to what is written into the files of a cgroup. Pure; `cgroup` writes.

use std::fmt::Display;

use krx_proto::{AgentError, CpuMax, Resources, UNIFIED};

use crate::error::invalid;

/// Longest value of a file, far below the page that the kernel takes in one write.
const MAX_VALUE: usize = 2048;
/// More than there are files; a longer list only repeats some.
const MAX_UNIFIED: usize = 64;
/// Range of `cpu.weight` and `io.weight`.
const WEIGHTS: std::ops::RangeInclusive<u64> = 1..=10_000;

/// Not in a kernel without swap, which keeps every limit of it.
pub(crate) const SWAP_MAX: &str = "memory.swap.max";

/// Files of the container's cgroup and what is written to them, in that order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits(pub(crate) Vec<(String, String)>);

impl Limits {
    pub(crate) fn new(wanted: Resources) -> Result<Self, AgentError> {
        let mut limits = Self::default();
        limits.add("memory.low", wanted.memory_low);
        limits.add("memory.high", wanted.memory_high);
        limits.add("memory.max", wanted.memory_max);
        limits.add(SWAP_MAX, wanted.swap_max);
        limits.add("cpu.weight", weight("cpu_weight", wanted.cpu_weight)?);
        limits.add("cpu.idle", wanted.cpu_idle.map(u8::from));
        limits.add("cpu.max", wanted.cpu_max.map(|CpuMax { quota, period }| format!("{quota} {period}")));
        limits.add("cpu.max.burst", wanted.cpu_burst);
        limits.add("cpuset.cpus", list("cpuset_cpus", wanted.cpuset_cpus)?);
        limits.add("cpuset.mems", list("cpuset_mems", wanted.cpuset_mems)?);
        limits.add("pids.max", wanted.pids_max);
        limits.add("io.weight", weight("io_weight", wanted.io_weight)?);
        if wanted.unified.len() > MAX_UNIFIED {
            return Err(invalid(format_args!("resources.unified: at most {MAX_UNIFIED} are allowed")));
        }
        for (file, value) in wanted.unified {
            // A name that is not in the list could be a path, or a file that moves processes.
            if !UNIFIED.contains(&file.as_str()) {
                return Err(invalid(format_args!(
                    "resources.unified: {file:?} is not a limit that can be set"
                )));
            }
            if value.len() > MAX_VALUE || value.contains(char::is_control) {
                return Err(invalid(format_args!("resources.unified: the value of {file} is not one line")));
            }
            limits.0.push((file, value));
        }
        Ok(limits)
    }

    fn add(&mut self, file: &str, value: Option<impl Display>) {
        self.0.extend(value.map(|value| (file.into(), value.to_string())));
    }
}

fn weight(field: &str, weight: Option<u64>) -> Result<Option<u64>, AgentError> {
    match weight {
        Some(weight) if !WEIGHTS.contains(&weight) => {
            Err(invalid(format_args!("resources.{field}: {weight} is not between 1 and 10000")))
        }
        _ => Ok(weight),
    }
}

/// A list of numbers and ranges; the kernel judges the numbers.
fn list(field: &str, list: Option<String>) -> Result<Option<String>, AgentError> {
    let is_list = |list: &String| {
        list.len() <= MAX_VALUE && list.bytes().all(|byte| byte.is_ascii_digit() || b",-".contains(&byte))
    };
    match list {
        Some(list) if !is_list(&list) => {
            Err(invalid(format_args!("resources.{field}: is not a list such as 0-1,3")))
        }
        _ => Ok(list),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use krx_proto::Limit;

    fn files(wanted: Resources) -> Vec<(String, String)> {
        Limits::new(wanted).unwrap().0
    }

    fn refused(wanted: Resources, field: &str) {
        let error = Limits::new(wanted).unwrap_err();
        assert!(error.message.starts_with(&format!("resources.{field}:")), "{}", error.message);
    }

    #[test]
    fn what_is_not_said_is_not_written() {
        assert_eq!(files(Resources::default()), []);
    }

    #[test]
    fn limits_are_written_as_the_kernel_reads_them() {
        let written = files(Resources {
            memory_max: Some(Limit::At(1 << 20)),
            swap_max: Some(Limit::Max),
            cpu_max: Some(CpuMax { quota: Limit::At(50_000), period: 100_000 }),
            cpu_idle: Some(true),
            cpuset_cpus: Some("0-1,3".into()),
            pids_max: Some(Limit::At(7)),
            unified: vec![("memory.oom.group".into(), "1".into())],
            ..Resources::default()
        });
        let expected = [
            ("memory.max", "1048576"),
            (SWAP_MAX, "max"),
            ("cpu.idle", "1"),
            ("cpu.max", "50000 100000"),
            ("cpuset.cpus", "0-1,3"),
            ("pids.max", "7"),
            ("memory.oom.group", "1"),
        ];
        assert_eq!(written, expected.map(|(file, value)| (file.to_string(), value.to_string())));
    }

    #[test]
    fn hostile_values_are_named() {
        refused(Resources { cpu_weight: Some(0), ..Resources::default() }, "cpu_weight");
        refused(Resources { io_weight: Some(10_001), ..Resources::default() }, "io_weight");
        refused(Resources { cpuset_cpus: Some("0\n1".into()), ..Resources::default() }, "cpuset_cpus");
        refused(Resources { cpuset_mems: Some("0".repeat(4096)), ..Resources::default() }, "cpuset_mems");
        let unified = |file: &str, value: &str| Resources {
            unified: vec![(file.into(), value.into())],
            ..Default::default()
        };
        for file in ["../cgroup.procs", "cgroup.procs", "cgroup.kill", "cgroup.subtree_control", ""] {
            refused(unified(file, "1"), "unified");
        }
        refused(unified("memory.max", "1\n2"), "unified");
        refused(unified("memory.max", &"1".repeat(4096)), "unified");
        let many = vec![("pids.max".to_string(), "1".to_string()); MAX_UNIFIED + 1];
        refused(Resources { unified: many, ..Resources::default() }, "unified");
    }
}
