//! `linux.resources` of a configuration, and of an update, as limits of a cgroup of version 2. Pure.
//!
//! OCI's fields are those of version 1; what they are in version 2 is computed here, as runc does it.

use krx_proto::{CpuMax, Limit, Resources, UNIFIED};
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};
use serde_json::Value;

use super::{BundleError, invalid, objects, refuse, unsupported};

/// Fields that are refused unless empty, below `linux.resources`. The guest has no such controllers, or its devices
/// are not the host's.
const REFUSED: [&str; 15] = [
    "/blockIO/leafWeight",
    "/blockIO/throttleReadBpsDevice",
    "/blockIO/throttleReadIOPSDevice",
    "/blockIO/throttleWriteBpsDevice",
    "/blockIO/throttleWriteIOPSDevice",
    "/blockIO/weightDevice",
    "/cpu/realtimePeriod",
    "/cpu/realtimeRuntime",
    "/memory/checkBeforeUpdate",
    "/memory/disableOOMKiller",
    "/memory/kernel",
    "/memory/kernelTCP",
    "/memory/swappiness",
    "/network",
    "/rdma",
];
const FIELD: &str = "linux.resources";
const OBJECTS: [&str; 7] = ["", "/blockIO", "/cpu", "/memory", "/network", "/pids", "/unified"];

/// What the kernel takes for a period that is not said.
const PERIOD: u64 = 100_000;
/// Least and most of OCI's `cpu.shares`, and of `blockIO.weight`.
const SHARES: (u64, u64) = (2, 262_144);
const IO_WEIGHTS: (u64, u64) = (10, 1000);
/// Longest value of `unified` and of a list of CPUs, as the agent takes it.
const MAX_VALUE: usize = 2048;

/// Limits out of the JSON of `linux.resources`. Rules for devices are not among them.
pub(super) fn read(raw: &Value) -> Result<Resources, BundleError> {
    objects(raw, FIELD, &OBJECTS)?;
    refuse(raw, FIELD, &REFUSED)?;
    // A page size of which none may be used is a limit kept: a guest has no huge pages of that kind.
    for (index, limit) in array(raw, "/hugepageLimits").enumerate() {
        if limit.get("limit").and_then(Value::as_u64) != Some(0) {
            return Err(unsupported(format!("{FIELD}.hugepageLimits[{index}]"), "huge pages"));
        }
    }
    let wanted: LinuxResources = if raw.is_null() {
        LinuxResources::default()
    } else {
        serde_json::from_value(raw.clone()).map_err(|error| invalid(FIELD, error.to_string()))?
    };
    let mut limits = Resources::default();
    if let Some(memory) = wanted.memory() {
        read_memory(memory, &mut limits)?;
    }
    if let Some(cpu) = wanted.cpu() {
        read_cpu(cpu, &mut limits)?;
    }
    let pids = wanted.pids().as_ref().map_or(0, oci_spec::runtime::LinuxPids::limit);
    limits.pids_max = limit(pids);
    let io_weight = wanted.block_io().as_ref().and_then(oci_spec::runtime::LinuxBlockIo::weight);
    limits.io_weight = io_weight.filter(|weight| *weight > 0).map(|weight| {
        let (least, most) = IO_WEIGHTS;
        1 + (u64::from(weight).clamp(least, most) - least) * 9999 / (most - least)
    });
    limits.unified = unified(wanted.unified().iter().flatten())?;
    Ok(limits)
}

/// The entries of an array; none of anything else.
pub(super) fn array<'a>(raw: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    raw.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

/// OCI's limits: zero says nothing, a negative one that there is none.
fn limit(value: i64) -> Option<Limit> {
    match value {
        0 => None,
        _ => Some(u64::try_from(value).map_or(Limit::Max, Limit::At)),
    }
}

fn read_memory(memory: &LinuxMemory, limits: &mut Resources) -> Result<(), BundleError> {
    let part = |value: Option<i64>| limit(value.unwrap_or(0));
    limits.memory_max = part(memory.limit());
    limits.memory_low = part(memory.reservation());
    // Version 1 counts memory and swap together, version 2 swap alone.
    limits.swap_max = match (part(memory.swap()), limits.memory_max) {
        (None, _) => None,
        (Some(Limit::Max), _) => Some(Limit::Max),
        (Some(Limit::At(both)), Some(Limit::At(memory))) if both >= memory => Some(Limit::At(both - memory)),
        (Some(Limit::At(_)), Some(Limit::At(_))) => {
            return Err(invalid("linux.resources.memory.swap", "is less than the limit of memory"));
        }
        (Some(Limit::At(_)), _) => {
            return Err(invalid("linux.resources.memory.swap", "needs a limit of memory"));
        }
    };
    Ok(())
}

fn read_cpu(cpu: &LinuxCpu, limits: &mut Resources) -> Result<(), BundleError> {
    let (least, most) = SHARES;
    let shares = cpu.shares().filter(|shares| *shares > 0);
    limits.cpu_weight = shares.map(|shares| 1 + (shares.clamp(least, most) - least) * 9999 / (most - least));
    limits.cpu_idle = match cpu.idle() {
        None => None,
        Some(idle @ (0 | 1)) => Some(idle == 1),
        Some(_) => return Err(invalid("linux.resources.cpu.idle", "is neither 0 nor 1")),
    };
    let (quota, period) = (limit(cpu.quota().unwrap_or(0)), cpu.period().filter(|period| *period > 0));
    if quota.is_some() || period.is_some() {
        limits.cpu_max =
            Some(CpuMax { quota: quota.unwrap_or(Limit::Max), period: period.unwrap_or(PERIOD) });
    }
    limits.cpu_burst = cpu.burst();
    limits.cpuset_cpus = list("cpus", cpu.cpus().as_deref())?;
    limits.cpuset_mems = list("mems", cpu.mems().as_deref())?;
    Ok(())
}

/// A list as in `0-1,3`.
fn list(field: &str, list: Option<&str>) -> Result<Option<String>, BundleError> {
    let Some(list) = list.filter(|list| !list.is_empty()) else { return Ok(None) };
    if list.len() > MAX_VALUE || !list.bytes().all(|byte| byte.is_ascii_digit() || b",-".contains(&byte)) {
        return Err(invalid(format!("{FIELD}.cpu.{field}"), "is not a list such as 0-1,3"));
    }
    Ok(Some(list.into()))
}

fn unified<'a>(
    wanted: impl Iterator<Item = (&'a String, &'a String)>,
) -> Result<Vec<(String, String)>, BundleError> {
    let mut unified = Vec::new();
    for (file, value) in wanted {
        let field = || format!("{FIELD}.unified[{file:?}]");
        if !UNIFIED.contains(&file.as_str()) {
            return Err(unsupported(field(), "this file"));
        }
        if value.len() > MAX_VALUE || value.contains(char::is_control) {
            return Err(invalid(field(), "is not one line"));
        }
        unified.push((file.clone(), value.clone()));
    }
    unified.sort_unstable();
    Ok(unified)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nothing_asked_is_nothing_limited() {
        for raw in [
            Value::Null,
            json!({}),
            json!({"memory": {}, "cpu": {"shares": 0, "cpus": ""}, "pids": {"limit": 0}}),
        ] {
            assert_eq!(read(&raw).unwrap(), Resources::default());
        }
    }

    #[test]
    fn limits_are_converted_as_runc_does() {
        let limits = read(&json!({
            "memory": {"limit": 1 << 20, "swap": 3 << 20, "reservation": 4096, "useHierarchy": true},
            "cpu": {"shares": 1024, "quota": 50000, "period": 20000, "cpus": "0-1", "mems": "0", "burst": 7, "idle": 1},
            "pids": {"limit": -1},
            "blockIO": {"weight": 500},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            "unified": {"memory.oom.group": "1"},
            "devices": [{"allow": false, "access": "rwm"}]
        }))
        .unwrap();
        assert_eq!(limits.memory_max, Some(Limit::At(1 << 20)));
        assert_eq!(limits.memory_low, Some(Limit::At(4096)));
        assert_eq!(limits.swap_max, Some(Limit::At(2 << 20)));
        assert_eq!(limits.cpu_weight, Some(39));
        assert_eq!(limits.cpu_max, Some(CpuMax { quota: Limit::At(50_000), period: 20_000 }));
        assert_eq!((limits.cpu_idle, limits.cpu_burst), (Some(true), Some(7)));
        assert_eq!((limits.cpuset_cpus.as_deref(), limits.cpuset_mems.as_deref()), (Some("0-1"), Some("0")));
        assert_eq!(limits.pids_max, Some(Limit::Max));
        assert_eq!(limits.io_weight, Some(4950));
        assert_eq!(limits.unified, [("memory.oom.group".to_string(), "1".to_string())]);
    }

    #[test]
    fn ends_of_scales_and_halves_of_pairs() {
        let weight = |shares: u64| read(&json!({"cpu": {"shares": shares}})).unwrap().cpu_weight;
        assert_eq!(
            (weight(1), weight(2), weight(262_144), weight(u64::MAX)),
            (Some(1), Some(1), Some(10_000), Some(10_000))
        );
        let cpu = |cpu: Value| read(&json!({"cpu": cpu})).unwrap().cpu_max.unwrap();
        assert_eq!(cpu(json!({"quota": 1000})), CpuMax { quota: Limit::At(1000), period: PERIOD });
        assert_eq!(cpu(json!({"quota": -1})), CpuMax { quota: Limit::Max, period: PERIOD });
        assert_eq!(cpu(json!({"period": 5000})), CpuMax { quota: Limit::Max, period: 5000 });
        let swap = |memory: Value| read(&json!({"memory": memory})).unwrap().swap_max;
        assert_eq!(swap(json!({"limit": 5, "swap": 5})), Some(Limit::At(0)));
        assert_eq!(swap(json!({"limit": 5, "swap": -1})), Some(Limit::Max));
    }

    #[test]
    fn what_a_guest_cannot_keep_is_named() {
        for (raw, field) in [
            (json!({"memory": {"kernel": 1}}), "memory.kernel"),
            (json!({"memory": {"disableOOMKiller": true}}), "memory.disableOOMKiller"),
            (json!({"memory": {"swappiness": 1}}), "memory.swappiness"),
            (json!({"memory": {"swap": 5}}), "memory.swap"),
            (json!({"memory": {"limit": 6, "swap": 5}}), "memory.swap"),
            (json!({"cpu": {"realtimeRuntime": 5}}), "cpu.realtimeRuntime"),
            (json!({"cpu": {"cpus": "0\n1"}}), "cpu.cpus"),
            (json!({"cpu": {"mems": "1".repeat(4096)}}), "cpu.mems"),
            (json!({"cpu": {"idle": 2}}), "cpu.idle"),
            (
                json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "1GB", "limit": 1}]}),
                "hugepageLimits[1]",
            ),
            (json!({"hugepageLimits": [{}]}), "hugepageLimits[0]"),
            (json!({"network": {"classID": 5}}), "network"),
            (json!({"rdma": {"mlx5_1": {"hcaHandles": 3}}}), "rdma"),
            (
                json!({"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}}),
                "blockIO.throttleReadBpsDevice",
            ),
            (json!({"unified": {"cgroup.procs": "1"}}), "unified"),
            (json!({"unified": {"../memory.max": "1"}}), "unified"),
            (json!({"unified": {"memory.max": "1\n2"}}), "unified"),
            (json!({"pids": {"limit": "many"}}), ""),
            (json!([]), ""),
            (json!({"memory": [1, 2, 3, 4, 5, 6]}), "memory"),
            (json!("x"), ""),
        ] {
            let error = read(&raw).unwrap_err().to_string();
            let named = format!("{FIELD}{}{field}", if field.is_empty() { "" } else { "." });
            assert!(error.contains(&named), "{raw}: {error}");
        }
    }
}
