//! `process.scheduler`, `.ioPriority` and `.execCPUAffinity`, and `linux.personality`, as numbers of the kernel. Pure.

use krx_proto::{Scheduling, SchedulingPolicy};
use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, Process, Scheduler,
};

use super::{BundleError, invalid, unsupported};

/// As wide as the mask that the agent is given; a VM has fewer.
const MAX_CPUS: u32 = 64;

/// What a process says of itself, but for its CPUs.
pub(super) fn read(process: &Process) -> Result<Scheduling, BundleError> {
    Ok(Scheduling {
        policy: process.scheduler().as_ref().map(policy).transpose()?,
        io_priority: process.io_priority().as_ref().map(io_priority).transpose()?,
        ..Scheduling::default()
    })
}

/// The CPUs of a further process; the field is not for a container's first one. Those before it is in its cgroup are of no
/// process that krx makes.
pub(super) fn affinity(process: &Process) -> Result<Option<u64>, BundleError> {
    let last = process.exec_cpu_affinity().as_ref().and_then(|wanted| wanted.cpu_affinity_final().as_deref());
    last.filter(|list| !list.is_empty()).map(cpus).transpose()
}

/// All processes of a container have one.
pub(super) fn personality(wanted: &LinuxPersonality) -> Result<u32, BundleError> {
    if wanted.flags().as_ref().is_some_and(|flags| !flags.is_empty()) {
        return Err(unsupported("linux.personality.flags", "it: the specification has none"));
    }
    Ok(match wanted.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    })
}

/// `SCHED_*` and `SCHED_FLAG_*` of `linux/sched.h`.
fn policy(wanted: &Scheduler) -> Result<SchedulingPolicy, BundleError> {
    let number = match wanted.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => {
            return Err(unsupported("process.scheduler.policy", "SCHED_ISO: Linux does not have it"));
        }
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flag = |flag: &LinuxSchedulerFlag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    };
    let priority = wanted.priority().unwrap_or_default();
    Ok(SchedulingPolicy {
        policy: number,
        flags: wanted.flags().iter().flatten().map(flag).fold(0, |all, one| all | one),
        nice: wanted.nice().unwrap_or_default(),
        priority: u32::try_from(priority)
            .map_err(|_| invalid("process.scheduler.priority", format!("{priority} is negative")))?,
        runtime: wanted.runtime().unwrap_or_default(),
        deadline: wanted.deadline().unwrap_or_default(),
        period: wanted.period().unwrap_or_default(),
    })
}

/// `IOPRIO_PRIO_VALUE` of `linux/ioprio.h`.
fn io_priority(wanted: &LinuxIOPriority) -> Result<u16, BundleError> {
    let class = match wanted.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let level = wanted.priority();
    match u16::try_from(level) {
        Ok(priority @ 0..=7) => Ok(class << 13 | priority),
        _ => Err(invalid("process.ioPriority.priority", format!("{level} is not one of 0 to 7"))),
    }
}

/// A list of CPUs, as in cpuset(7): `0-3,7`.
fn cpus(list: &str) -> Result<u64, BundleError> {
    let field = "process.execCPUAffinity.final";
    let number = |text: &str| text.trim().parse::<u32>().ok().filter(|cpu| *cpu < MAX_CPUS);
    let range = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let (first, last) = (number(first)?, number(last)?);
        (first <= last).then(|| (first..=last).fold(0, |mask, cpu| mask | 1_u64 << cpu))
    };
    let mask = list.split(',').try_fold(0, |mask, text| Some(mask | range(text)?));
    mask.ok_or_else(|| invalid(field, format!("{list:.100?} is not a list of CPUs below {MAX_CPUS}")))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn process(fields: &Value) -> Process {
        let mut process = json!({"args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
        fields.as_object().unwrap().iter().for_each(|(name, value)| process[name] = value.clone());
        serde_json::from_value(process).unwrap()
    }

    #[test]
    fn words_are_the_kernels_numbers() {
        let fields = json!({
            "scheduler": {"policy": "SCHED_RR", "priority": 7, "flags": ["SCHED_RESET_ON_FORK"]},
            "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 6},
            "execCPUAffinity": {"initial": "0", "final": "0-1,3"},
        });
        let asked = process(&fields);
        let found = read(&asked).unwrap();
        let policy = SchedulingPolicy { policy: 2, priority: 7, flags: 1, ..SchedulingPolicy::default() };
        assert_eq!((found.policy, found.io_priority, found.cpus), (Some(policy), Some(2 << 13 | 6), None));
        assert_eq!(affinity(&asked).unwrap(), Some(0b1011));
        let usual = process(&json!({}));
        assert_eq!((read(&usual).unwrap(), affinity(&usual).unwrap()), (Scheduling::default(), None));
        let deadline =
            json!({"scheduler": {"policy": "SCHED_DEADLINE", "runtime": 1, "deadline": 2, "period": 3}});
        let deadline = read(&process(&deadline)).unwrap().policy.unwrap();
        assert_eq!((deadline.policy, deadline.runtime, deadline.deadline, deadline.period), (6, 1, 2, 3));
    }

    #[test]
    fn what_cannot_be_is_named() {
        let refused = |fields: Value| read(&process(&fields)).unwrap_err().to_string();
        assert!(refused(json!({"scheduler": {"policy": "SCHED_ISO"}})).contains("scheduler.policy"));
        let negative = json!({"scheduler": {"policy": "SCHED_RR", "priority": -1}});
        assert!(refused(negative).contains("scheduler.priority"));
        let high = json!({"ioPriority": {"class": "IOPRIO_CLASS_RT", "priority": 8}});
        assert!(refused(high).contains("ioPriority.priority"));
        for bad in ["64", "2-1", "0,-1", "0-99999999999"] {
            assert!(cpus(bad).unwrap_err().to_string().contains("execCPUAffinity"), "{bad}");
        }
        let flags = json!({"domain": "LINUX32", "flags": ["ADDR_NO_RANDOMIZE"]});
        assert!(personality(&serde_json::from_value(flags).unwrap()).is_err());
    }
}
