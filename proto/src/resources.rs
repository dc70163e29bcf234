//! Limits of a container, in the terms of cgroup v2. What is not said stays as it is, so that the same type serves a
//! container's making and a later change.

use serde::{Deserialize, Serialize};

/// Limits of one container's cgroup in the guest. CPUs and memory nodes are the guest's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// `memory.max`, bytes.
    pub memory_max: Option<Limit>,
    /// `memory.low`, bytes that are reclaimed last.
    pub memory_low: Option<Limit>,
    /// `memory.high`, bytes above which processes are slowed down.
    pub memory_high: Option<Limit>,
    /// `memory.swap.max`, bytes of swap alone. A guest without swap keeps any such limit.
    pub swap_max: Option<Limit>,
    /// `cpu.weight`, 1 to 10000.
    pub cpu_weight: Option<u64>,
    /// `cpu.idle`: scheduled only when nothing else runs.
    pub cpu_idle: Option<bool>,
    pub cpu_max: Option<CpuMax>,
    /// `cpu.max.burst`, microseconds.
    pub cpu_burst: Option<u64>,
    /// `cpuset.cpus`, a list such as `0-1,3`.
    pub cpuset_cpus: Option<String>,
    /// `cpuset.mems`.
    pub cpuset_mems: Option<String>,
    /// `pids.max`.
    pub pids_max: Option<Limit>,
    /// `io.weight`, 1 to 10000.
    pub io_weight: Option<u64>,
    /// Further files of the cgroup by name, of [`UNIFIED`] alone, and what is written to them.
    pub unified: Vec<(String, String)>,
}

/// A limit, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Limit {
    Max,
    At(u64),
}

/// `cpu.max`: time of all CPUs together that may be used in each period, both in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuMax {
    pub quota: Limit,
    pub period: u64,
}

/// The files that [`Resources::unified`] may name: limits, nothing that moves processes or changes the cgroup tree.
pub const UNIFIED: [&str; 18] = [
    "cgroup.max.depth",
    "cgroup.max.descendants",
    "cpu.idle",
    "cpu.max",
    "cpu.max.burst",
    "cpu.weight",
    "cpu.weight.nice",
    "cpuset.cpus",
    "cpuset.mems",
    "io.max",
    "io.weight",
    "memory.high",
    "memory.low",
    "memory.max",
    "memory.min",
    "memory.oom.group",
    "memory.swap.max",
    "pids.max",
];

impl std::fmt::Display for Limit {
    /// As the kernel reads and writes it.
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Max => to.write_str("max"),
            Self::At(limit) => limit.fmt(to),
        }
    }
}
