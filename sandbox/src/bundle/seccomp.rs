//! `linux.seccomp` of a configuration as a filter that the kernel takes. Pure.
//!
//! Not by way of `seccompiler`: its filters have one action for all rules beside the default one, while docker's default
//! profile has several. What a profile means where OCI is silent is taken from runc and libseccomp: a rule that says
//! what the default says is none; an unconditional rule of a call goes before conditional ones; the others are tried
//! in their order; arguments with the same index are alternatives; names of calls that x86-64 does not have are left
//! out; and where the default is an error, calls newer than all in the profile fail with ENOSYS, as on an older kernel.

use std::collections::BTreeMap;

use krx_proto::SeccompFilter;
use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};
use syscalls::x86_64::Sysno;

use super::seccomp_program::{Call, Comparison, Condition, Policy, Rule, compile};
use super::{BundleError, invalid, unsupported};

const FIELD: &str = "linux.seccomp";
/// Arguments of one rule; more only repeat some. Stops a profile from having each of them stand in for thousands of names.
const MAX_ARGS: usize = 64;
/// Arguments of a system call.
const ARGS: usize = 6;
/// Greatest number of an error that a filter can return (`MAX_ERRNO`).
const MAX_ERRNO: u32 = 4095;
const ENOSYS: u32 = 38;

/// `SECCOMP_FILTER_FLAG_*` of `linux/seccomp.h`.
const FLAG_LOG: u32 = 1 << 1;
const FLAG_SPEC_ALLOW: u32 = 1 << 2;

/// `SECCOMP_RET_ERRNO` with an error's number.
pub(super) const fn error(number: u32) -> u32 {
    0x0005_0000 | number
}

/// The filter for a profile; `None` where it lets everything pass.
pub(super) fn read(profile: &LinuxSeccomp) -> Result<Option<SeccompFilter>, BundleError> {
    let default = action(FIELD, "default", profile.default_action(), profile.default_errno_ret())?;
    let mut calls = BTreeMap::new();
    let mut newest = None;
    for (index, wanted) in profile.syscalls().iter().flatten().enumerate() {
        let field = format!("{FIELD}.syscalls[{index}]");
        let action = action(&field, "", wanted.action(), wanted.errno_ret())?;
        let alternatives = alternatives(&field, wanted.args().as_deref().unwrap_or_default())?;
        for number in wanted.names().iter().filter_map(|name| number(name)) {
            newest = newest.max(Some(number));
            if action != default {
                let call: &mut Call = calls.entry(number).or_default();
                if alternatives.is_empty() {
                    call.always.get_or_insert(action);
                }
                let rules =
                    alternatives.iter().map(|conditions| Rule { conditions: conditions.clone(), action });
                call.rules.extend(rules);
            }
        }
    }
    if calls.is_empty() && profile.default_action() == LinuxSeccompAction::ScmpActAllow {
        return Ok(None);
    }
    let is_error = profile.default_action() == LinuxSeccompAction::ScmpActErrno;
    let unknown_from = newest.filter(|_| is_error).map(|newest| newest + 1);
    let program = compile(&Policy { default, calls, unknown_from, unknown: error(ENOSYS) });
    let program = program.ok_or_else(|| unsupported(FIELD, "profiles of more than 4096 instructions"))?;
    Ok(Some(SeccompFilter { flags: flags(profile.flags().as_deref().unwrap_or_default())?, program }))
}

/// The number of a system call; `None` for one of other machines alone.
fn number(name: &str) -> Option<u32> {
    name.parse::<Sysno>().ok().and_then(|call| u32::try_from(call.id()).ok())
}

fn flags(wanted: &[LinuxSeccompFilterFlag]) -> Result<u32, BundleError> {
    wanted.iter().try_fold(0, |flags, flag| match flag {
        // A process has one thread when it gets its filter.
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => Ok(flags),
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => Ok(flags | FLAG_LOG),
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => Ok(flags | FLAG_SPEC_ALLOW),
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
            Err(unsupported(format!("{FIELD}.flags"), "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"))
        }
    })
}

/// The filter's return value for an action. `which` tells the fields of the default action from those of a rule.
fn action(
    field: &str,
    which: &str,
    action: LinuxSeccompAction,
    errno: Option<u32>,
) -> Result<u32, BundleError> {
    use LinuxSeccompAction as Action;
    let name = |field_name: &str| match which {
        "" => format!("{field}.{}{}", field_name[..1].to_ascii_lowercase(), &field_name[1..]),
        _ => format!("{field}.{which}{field_name}"),
    };
    let takes_errno = matches!(action, Action::ScmpActErrno | Action::ScmpActTrace);
    match errno {
        Some(number) if number > MAX_ERRNO => Err(invalid(name("ErrnoRet"), "is not the number of an error")),
        Some(_) if !takes_errno => Err(invalid(name("ErrnoRet"), "has no meaning with this action")),
        _ if action == Action::ScmpActNotify => Err(unsupported(name("Action"), "SCMP_ACT_NOTIFY")),
        _ => Ok(action.as_u32(errno)),
    }
}

/// What the arguments of a rule ask for: all conditions of one of these. Empty where there are no arguments.
fn alternatives(field: &str, args: &[LinuxSeccompArg]) -> Result<Vec<Vec<Condition>>, BundleError> {
    if args.len() > MAX_ARGS {
        return Err(invalid(format!("{field}.args"), format!("are more than {MAX_ARGS}")));
    }
    let conditions =
        args.iter().enumerate().map(|(index, arg)| condition(&format!("{field}.args[{index}]"), arg));
    let conditions = conditions.collect::<Result<Vec<_>, _>>()?;
    let repeats =
        |index: usize| conditions[..index].iter().any(|other| other.argument == conditions[index].argument);
    Ok(match conditions.len() {
        0 => Vec::new(),
        count if (0..count).any(repeats) => conditions.into_iter().map(|condition| vec![condition]).collect(),
        _ => vec![conditions],
    })
}

fn condition(field: &str, arg: &LinuxSeccompArg) -> Result<Condition, BundleError> {
    use LinuxSeccompOperator as Operator;
    let argument = u32::try_from(arg.index()).ok().filter(|_| arg.index() < ARGS);
    let argument = argument.ok_or_else(|| invalid(format!("{field}.index"), "is not between 0 and 5"))?;
    let value = arg.value();
    let comparison = match arg.op() {
        Operator::ScmpCmpNe => Comparison::NotEqual(value),
        Operator::ScmpCmpLt => Comparison::Less(value),
        Operator::ScmpCmpLe => Comparison::LessOrEqual(value),
        Operator::ScmpCmpEq => Comparison::Equal(value),
        Operator::ScmpCmpGe => Comparison::GreaterOrEqual(value),
        Operator::ScmpCmpGt => Comparison::Greater(value),
        Operator::ScmpCmpMaskedEq => {
            let masked = arg.value_two().unwrap_or(0);
            if masked & !value != 0 {
                return Err(invalid(format!("{field}.valueTwo"), "has bits that value masks out"));
            }
            Comparison::Masked { mask: value, value: masked }
        }
    };
    Ok(Condition { argument, comparison })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::seccomp_program::interpreter::run;
    use super::*;

    const ALLOW: u32 = 0x7fff_0000;
    const KILL_PROCESS: u32 = 0x8000_0000;
    const EPERM: u32 = 1;

    fn filter(profile: &Value) -> Result<Option<SeccompFilter>, BundleError> {
        read(&serde_json::from_value(profile.clone()).unwrap())
    }

    /// What a profile's filter says to a call.
    fn verdict(profile: &Value, name: &str, args: [u64; 6]) -> u32 {
        run(&filter(profile).unwrap().unwrap().program, number(name).unwrap(), args)
    }

    /// As docker's default: a list of names allowed, some by argument, some with an error of their own, names of other
    /// machines among them.
    fn docker_like() -> Value {
        json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"],
            "syscalls": [
                {"names": ["read", "write", "close", "execve", "exit_group", "futex", "capset", "futex_time64",
                    "arm_fadvise64_64", "openat2", "faccessat2"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}]},
                {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 0, "value": 0xffff_ffff_u64, "op": "SCMP_CMP_EQ"}]},
                {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 0, "value": 0x7e02_0000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
                {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
                {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
                {"names": ["reboot"], "action": "SCMP_ACT_KILL_PROCESS"},
                {"names": ["ptrace"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
            ]
        })
    }

    #[test]
    fn a_profile_of_dockers_shape_is_what_it_says() {
        let profile = docker_like();
        let say = |name: &str, first: u64| verdict(&profile, name, [first, 0, 0, 0, 0, 0]);
        assert_eq!(say("read", 0), ALLOW);
        assert_eq!(say("exit_group", 0), ALLOW);
        assert_eq!(say("mount", 0), error(EPERM));
        assert_eq!((say("personality", 0), say("personality", 0xffff_ffff)), (ALLOW, ALLOW));
        assert_eq!((say("personality", 8), say("personality", 1 << 32)), (error(EPERM), error(EPERM)));
        assert_eq!((say("clone", 0x11), say("clone", 0x1000_0011)), (ALLOW, error(EPERM)));
        assert_eq!(say("clone3", 0), error(ENOSYS));
        assert_eq!(
            (say("socket", 2), say("socket", 40), say("socket", 40 | 1 << 32)),
            (ALLOW, error(EPERM), ALLOW)
        );
        assert_eq!(say("reboot", 0), KILL_PROCESS);
        assert_eq!(say("ptrace", 0), error(EPERM));
        // faccessat2 is the newest the profile knows.
        assert_eq!(say("faccessat2", 0), ALLOW);
        assert_eq!(say("mseal", 0), error(ENOSYS));
        let filter = filter(&profile).unwrap().unwrap();
        assert_eq!(filter.flags, FLAG_LOG | FLAG_SPEC_ALLOW);
        assert!(filter.program.len() < 100, "{}", filter.program.len());
    }

    /// Every call of the machine but a few, as the real one has: some 350 names.
    #[test]
    fn a_profile_of_dockers_size_is_small() {
        let denied = ["mount", "umount2", "bpf", "kexec_load", "init_module", "setns", "unshare", "swapon"];
        let names: Vec<_> =
            Sysno::iter().map(|call| call.name()).filter(|name| !denied.contains(name)).collect();
        assert!(names.len() > 340);
        let mut profile = docker_like();
        profile["syscalls"][0]["names"] = json!(names);
        let filter = filter(&profile).unwrap().unwrap();
        assert!(filter.program.len() < 200, "{}", filter.program.len());
        for call in Sysno::iter() {
            let expected = if denied.contains(&call.name()) { error(EPERM) } else { ALLOW };
            let args = [0, 0, 0, 0, 0, 0];
            assert_eq!(
                run(&filter.program, u32::try_from(call.id()).unwrap(), args),
                expected,
                "{}",
                call.name()
            );
        }
    }

    #[test]
    fn rules_of_one_call_are_weighed_as_libseccomp_does() {
        let say = |rules: Value, args: [u64; 6]| {
            let profile = json!({"defaultAction": "SCMP_ACT_KILL", "syscalls": rules});
            verdict(&profile, "ioctl", args)
        };
        let arg = |index: u64, value: u64| json!({"index": index, "value": value, "op": "SCMP_CMP_EQ"});
        let allow = |args: Value| json!({"names": ["ioctl"], "action": "SCMP_ACT_ALLOW", "args": args});
        let log = |args: Value| json!({"names": ["ioctl"], "action": "SCMP_ACT_LOG", "args": args});
        const LOG: u32 = 0x7ffc_0000;
        // All of the arguments; any of those with one index; in order; the unconditional first.
        let all = json!([allow(json!([arg(0, 1), arg(1, 2)]))]);
        assert_eq!(say(all.clone(), [1, 2, 0, 0, 0, 0]), ALLOW);
        assert_eq!((say(all.clone(), [1, 3, 0, 0, 0, 0]), say(all, [0, 2, 0, 0, 0, 0])), (0, 0));
        let any = json!([allow(json!([arg(0, 1), arg(0, 2)]))]);
        assert_eq!((say(any.clone(), [1; 6]), say(any.clone(), [2; 6]), say(any, [3; 6])), (ALLOW, ALLOW, 0));
        let order = json!([log(json!([arg(0, 1)])), allow(json!([arg(1, 1)]))]);
        assert_eq!((say(order.clone(), [1; 6]), say(order, [0, 1, 0, 0, 0, 0])), (LOG, ALLOW));
        assert_eq!(say(json!([log(json!([arg(0, 1)])), allow(json!([]))]), [1; 6]), ALLOW);
        // What the default says is no rule.
        let nothing = json!({"names": ["ioctl"], "action": "SCMP_ACT_KILL_THREAD"});
        assert_eq!(say(json!([nothing, allow(json!([arg(0, 1)]))]), [1; 6]), ALLOW);
    }

    #[test]
    fn every_action_has_its_value() {
        for (name, errno, value) in [
            ("SCMP_ACT_KILL", None, 0),
            ("SCMP_ACT_KILL_THREAD", None, 0),
            ("SCMP_ACT_KILL_PROCESS", None, KILL_PROCESS),
            ("SCMP_ACT_TRAP", None, 0x0003_0000),
            ("SCMP_ACT_ERRNO", None, error(EPERM)),
            ("SCMP_ACT_ERRNO", Some(4095), error(4095)),
            ("SCMP_ACT_TRACE", Some(7), 0x7ff0_0007),
            ("SCMP_ACT_LOG", None, 0x7ffc_0000),
        ] {
            let mut rule = json!({"names": ["read"], "action": name});
            if let Some(errno) = errno {
                rule["errnoRet"] = json!(errno);
            }
            let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
            assert_eq!(verdict(&profile, "read", [0; 6]), value, "{name}");
            assert_eq!(verdict(&profile, "write", [0; 6]), ALLOW);
        }
    }

    #[test]
    fn a_profile_that_allows_all_is_none() {
        for profile in [
            json!({"defaultAction": "SCMP_ACT_ALLOW"}),
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}),
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["breakpoint"], "action": "SCMP_ACT_KILL"}]}),
        ] {
            assert_eq!(filter(&profile).unwrap(), None);
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        let rule = |change: Value| {
            let mut rule = json!({"names": ["read"], "action": "SCMP_ACT_ALLOW"});
            rule.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["x"], "action": "SCMP_ACT_ALLOW"}, rule]})
        };
        let arg = |change: Value| {
            let mut arg = json!({"index": 0, "value": 1, "op": "SCMP_CMP_EQ"});
            arg.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            rule(json!({"args": [arg]}))
        };
        let at = |index: u64| json!({"index": 0, "value": index, "op": "SCMP_CMP_GT"});
        let many: Vec<_> = (0..65).map(at).collect();
        let names: Vec<_> = Sysno::iter().map(|call| call.name()).collect();
        let large = json!({"names": names, "action": "SCMP_ACT_LOG", "args": many[..64]});
        for (profile, field) in [
            (json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "defaultAction"),
            (json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 4096}), "defaultErrnoRet"),
            (json!({"defaultAction": "SCMP_ACT_KILL", "defaultErrnoRet": 1}), "defaultErrnoRet"),
            (rule(json!({"action": "SCMP_ACT_NOTIFY"})), "syscalls[1].action"),
            (rule(json!({"action": "SCMP_ACT_ERRNO", "errnoRet": 70000})), "syscalls[1].errnoRet"),
            (rule(json!({"errnoRet": 1})), "syscalls[1].errnoRet"),
            (rule(json!({"args": many})), "syscalls[1].args"),
            (arg(json!({"index": 6})), "syscalls[1].args[0].index"),
            (arg(json!({"index": u64::MAX})), "syscalls[1].args[0].index"),
            (arg(json!({"op": "SCMP_CMP_MASKED_EQ", "valueTwo": 2})), "syscalls[1].args[0].valueTwo"),
            (json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [large]}), "linux.seccomp:"),
            (
                json!({"defaultAction": "SCMP_ACT_ERRNO", "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}),
                "flags",
            ),
        ] {
            let error = filter(&profile).unwrap_err().to_string();
            assert!(error.contains(field), "{field}: {error}");
        }
    }
}
