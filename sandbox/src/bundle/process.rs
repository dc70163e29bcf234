//! `process` of a configuration, and of a later exec, as the agent runs it. Pure.

use krx_proto::{Capabilities, ProcessSpec, Rlimit, TerminalSize, User};
use oci_spec::runtime::{LinuxCapabilities, PosixRlimit, Process};
use serde_json::Value;

use super::json::{self, Strict};
use super::{BundleError, invalid, objects, refuse, scheduling, unsupported};
use crate::{capability, exec_limits};

/// Fields that are refused unless empty, below `process`.
const REFUSED: [&str; 3] = ["/commandLine", "/selinuxLabel", "/user/username"];
/// The objects whose fields are looked at by name.
const OBJECTS: [&str; 6] = ["", "/capabilities", "/execCPUAffinity", "/ioPriority", "/scheduler", "/user"];

/// Profiles that runtimes give to each container unasked where the host has `AppArmor`: they keep containers from the
/// host's kernel, which the VM does. The guest has no `AppArmor`; a profile that somebody chose is refused.
const DEFAULT_PROFILES: [&str; 6] =
    ["", "unconfined", "cri-containerd.apparmor.d", "crio-default", "docker-default", "nerdctl-default"];

/// Refuses what cannot be honoured.
pub(super) fn check(raw: &Value) -> Result<(), BundleError> {
    objects(raw, "process", &OBJECTS)?;
    refuse(raw, "process", &REFUSED)
}

/// A container's first process, without its filter of system calls.
pub(super) fn read(process: &Process) -> Result<ProcessSpec, BundleError> {
    let profile = process.apparmor_profile().as_deref().unwrap_or_default();
    if !DEFAULT_PROFILES.contains(&profile) {
        return Err(unsupported("process.apparmorProfile", format!("the AppArmor profile {profile:?}")));
    }
    let cwd = process.cwd().to_str().filter(|cwd| cwd.starts_with('/'));
    let args = process.args().clone().filter(|args| !args.is_empty());
    let process = ProcessSpec {
        args: args.ok_or(BundleError::Missing("process.args"))?,
        env: process.env().clone().unwrap_or_default(),
        cwd: cwd.ok_or_else(|| invalid("process.cwd", "is not an absolute path"))?.into(),
        user: User {
            uid: process.user().uid(),
            gid: process.user().gid(),
            additional_gids: process.user().additional_gids().clone().unwrap_or_default(),
            umask: process.user().umask(),
        },
        // Without the field a process has no capabilities: the kernel's own would be all of them.
        capabilities: Some(process.capabilities().as_ref().map(capabilities).unwrap_or_default()),
        rlimits: process.rlimits().iter().flatten().map(rlimit).collect(),
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        oom_score_adj: process.oom_score_adj(),
        scheduling: scheduling::read(process)?,
        terminal: process.terminal().unwrap_or(false).then(|| console_size(process)),
        ..ProcessSpec::default()
    };
    exec_limits::check(&process).map_err(|error| invalid("process", error.to_string()))?;
    Ok(process)
}

/// A further process of the container whose first one is `first`.
pub(super) fn read_further(json: &[u8], first: &ProcessSpec) -> Result<ProcessSpec, BundleError> {
    let failed = |error: serde_json::Error| invalid("process", error.to_string());
    let Strict(raw) = serde_json::from_slice(json).map_err(failed)?;
    check(&raw)?;
    if let Some(field) = json::with_nul(&raw) {
        return Err(invalid(format!("process{field}"), "has a NUL in it. Leave it out"));
    }
    let process: Process = serde_json::from_value(raw).map_err(failed)?;
    let mut further = ProcessSpec { seccomp: first.seccomp.clone(), ..read(&process)? };
    further.scheduling.cpus = scheduling::affinity(&process)?;
    further.scheduling.personality = first.scheduling.personality;
    // As runc does: what an exec does not say is the container's.
    if process.capabilities().is_none() {
        further.capabilities = first.capabilities;
    }
    if process.oom_score_adj().is_none() {
        further.oom_score_adj = first.oom_score_adj;
    }
    Ok(further)
}

fn console_size(process: &Process) -> TerminalSize {
    let cells = |count: u64| u16::try_from(count).unwrap_or(u16::MAX);
    let size = process.console_size().unwrap_or_default();
    TerminalSize { columns: cells(size.width()), rows: cells(size.height()) }
}

fn capabilities(wanted: &LinuxCapabilities) -> Capabilities {
    Capabilities {
        bounding: capability::mask(wanted.bounding().iter().flatten()),
        effective: capability::mask(wanted.effective().iter().flatten()),
        permitted: capability::mask(wanted.permitted().iter().flatten()),
        inheritable: capability::mask(wanted.inheritable().iter().flatten()),
        ambient: capability::mask(wanted.ambient().iter().flatten()),
    }
}

fn rlimit(limit: &PosixRlimit) -> Rlimit {
    use oci_spec::runtime::PosixRlimitType as Type;
    let resource = match limit.typ() {
        Type::RlimitCpu => 0,
        Type::RlimitFsize => 1,
        Type::RlimitData => 2,
        Type::RlimitStack => 3,
        Type::RlimitCore => 4,
        Type::RlimitRss => 5,
        Type::RlimitNproc => 6,
        Type::RlimitNofile => 7,
        Type::RlimitMemlock => 8,
        Type::RlimitAs => 9,
        Type::RlimitLocks => 10,
        Type::RlimitSigpending => 11,
        Type::RlimitMsgqueue => 12,
        Type::RlimitNice => 13,
        Type::RlimitRtprio => 14,
        Type::RlimitRttime => 15,
    };
    Rlimit { resource, soft: limit.soft(), hard: limit.hard() }
}

#[cfg(test)]
mod tests {
    use krx_proto::{SeccompFilter, SeccompInstruction};
    use serde_json::json;

    use super::*;

    fn first() -> ProcessSpec {
        let program = vec![SeccompInstruction { code: 6, if_true: 0, if_false: 0, value: 0x7fff_0000 }];
        ProcessSpec {
            capabilities: Some(Capabilities { effective: 1 << 5, ..Capabilities::default() }),
            oom_score_adj: Some(-998),
            seccomp: Some(SeccompFilter { flags: 0, program }),
            ..ProcessSpec::default()
        }
    }

    fn further(process: &Value) -> Result<ProcessSpec, BundleError> {
        read_further(process.to_string().as_bytes(), &first())
    }

    #[test]
    fn an_exec_is_confined_as_its_container_is() {
        let spec = further(&json!({"args": ["ls"], "cwd": "/", "user": {"uid": 1, "gid": 2, "umask": 63},
            "terminal": true, "consoleSize": {"height": 24, "width": 100_000}}))
        .unwrap();
        assert_eq!((spec.seccomp, spec.capabilities), (first().seccomp, first().capabilities));
        assert_eq!(spec.oom_score_adj, Some(-998));
        assert_eq!((spec.user.uid, spec.user.umask), (1, Some(0o77)));
        assert_eq!(spec.terminal, Some(TerminalSize { columns: u16::MAX, rows: 24 }));
        let own = json!({"args": ["ls"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "oomScoreAdj": 5,
            "capabilities": {"bounding": ["CAP_KILL"], "ambient": ["CAP_CHOWN"], "inheritable": ["CAP_FOWNER"]}});
        let spec = further(&own).unwrap();
        let capabilities = spec.capabilities.unwrap();
        assert_eq!((capabilities.bounding, capabilities.effective), (1 << 5, 0));
        assert_eq!(
            (capabilities.ambient, capabilities.inheritable, spec.oom_score_adj),
            (1, 1 << 3, Some(5))
        );
    }

    #[test]
    fn profiles_that_nobody_chose_are_accepted() {
        let with = |profile: &str| {
            further(
                &json!({"args": ["ls"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "apparmorProfile": profile}),
            )
        };
        assert!(with("").is_ok() && with("unconfined").is_ok() && with("cri-containerd.apparmor.d").is_ok());
        assert!(with("localhost-x").unwrap_err().to_string().contains("process.apparmorProfile"));
    }

    #[test]
    fn hostile_processes_are_errors() {
        for bad in [
            &b""[..],
            b"{",
            b"[]",
            b"7",
            b"null",
            b"\xff",
            b"{\"args\":[\"x\"],\"cwd\":\"/\",\"user\":[0,0]}",
        ] {
            assert!(read_further(bad, &first()).is_err());
        }
        for (field, value) in [
            ("scheduler", json!(["SCHED_FIFO"])),
            ("ioPriority", json!({"class": "IOPRIO_CLASS_RT", "priority": 9})),
            ("execCPUAffinity", json!({"final": "77"})),
            ("selinuxLabel", json!("system_u:system_r:container_t:s0")),
            ("args", json!([])),
            ("cwd", json!("relative")),
        ] {
            let mut process = json!({"args": ["ls"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
            process[field] = value;
            assert!(further(&process).unwrap_err().to_string().contains(&format!("process.{field}")));
        }
    }
}
