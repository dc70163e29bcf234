//! Seccomp profiles in files, as docker and containerd have them: OCI's `linux.seccomp`, whose rules may say besides for which
//! containers they are (`includes`, `excludes`: of capabilities, machines and kernels). Pure.

use oci_spec::runtime::LinuxSeccomp;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{BundleError, invalid, objects, refuse};
use crate::capability;

/// Version of the guest's kernel, for rules that are of newer ones alone.
const KERNEL: (u32, u32) = (6, 12);
/// The machine, as profiles have it.
const ARCH: &str = "amd64";

/// When a rule counts; all that is said has to hold.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Filter {
    caps: Option<Vec<String>>,
    arches: Option<Vec<String>>,
    min_kernel: Option<String>,
}

/// What of a profile is for a container with these capabilities.
pub(super) fn read(json: &[u8], capabilities: u64) -> Result<LinuxSeccomp, BundleError> {
    let failed = |error: serde_json::Error| invalid("seccomp profile", error.to_string());
    let mut raw: Value = serde_json::from_slice(json).map_err(failed)?;
    objects(&raw, "seccomp profile", &[""])?;
    refuse(&raw, "seccomp profile", &["/listenerPath", "/listenerMetadata"])?;
    if let Some(Value::Array(rules)) = raw.get_mut("syscalls") {
        let mut kept = Vec::new();
        for (index, mut rule) in std::mem::take(rules).into_iter().enumerate() {
            let Some(fields) = rule.as_object_mut() else {
                return Err(invalid(format!("seccomp profile.syscalls[{index}]"), "is not an object"));
            };
            if counts(fields, capabilities).map_err(failed)? {
                kept.push(rule);
            }
        }
        *rules = kept;
    }
    serde_json::from_value(raw).map_err(failed)
}

/// Whether a rule is for this container; what says so, and the old way to name one call, are put in OCI's form.
fn counts(rule: &mut Map<String, Value>, capabilities: u64) -> serde_json::Result<bool> {
    let mut filter = |name: &str| match rule.remove(name) {
        None | Some(Value::Null) => Ok(Filter::default()),
        Some(filter) => serde_json::from_value(filter),
    };
    let (includes, excludes): (Filter, Filter) = (filter("includes")?, filter("excludes")?);
    if let (Some(name), None) = (rule.remove("name"), rule.get("names")) {
        rule.insert("names".into(), Value::Array(vec![name]));
    }
    let has = |name: &String| capability::named(name).is_some_and(|mask| capabilities & mask != 0);
    let is_here = |arch: &String| arch == ARCH;
    let newer = |version: &String| self::version(version).is_none_or(|version| version <= KERNEL);
    let included = includes.caps.iter().flatten().all(has)
        && includes.arches.as_ref().is_none_or(|arches| arches.is_empty() || arches.iter().any(is_here))
        && includes.min_kernel.iter().all(newer);
    let excluded = excludes.caps.iter().flatten().any(has)
        || excludes.arches.iter().flatten().any(is_here)
        || excludes.min_kernel.iter().any(newer);
    Ok(included && !excluded)
}

fn version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Names of the rules that are left.
    fn names(profile: &Value, capabilities: u64) -> Vec<String> {
        let profile = read(profile.to_string().as_bytes(), capabilities).unwrap();
        profile.syscalls().iter().flatten().flat_map(|rule| rule.names().clone()).collect()
    }

    #[test]
    fn rules_are_for_some_containers() {
        let rule = |name: &str, includes: Value, excludes: Value| json!({"names": [name], "action": "SCMP_ACT_ALLOW", "args": null, "comment": "", "includes": includes, "excludes": excludes});
        let profile = json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
            "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
            "syscalls": [
                rule("read", json!({}), json!({})),
                rule("mount", json!({"caps": ["CAP_SYS_ADMIN"]}), json!({})),
                rule("clone", json!({}), json!({"caps": ["CAP_SYS_ADMIN"]})),
                rule("arch_prctl", json!({"arches": ["amd64", "x32"]}), json!({})),
                rule("s390_runtime_instr", json!({"arches": ["s390"]}), json!({})),
                rule("ptrace", json!({"minKernel": "4.8"}), json!({})),
                rule("futex", json!({"minKernel": "7.0"}), Value::Null),
                json!({"name": "write", "action": "SCMP_ACT_ALLOW", "args": []}),
            ],
        });
        assert_eq!(names(&profile, 0), ["read", "clone", "arch_prctl", "ptrace", "write"]);
        assert_eq!(names(&profile, 1 << 21), ["read", "mount", "arch_prctl", "ptrace", "write"]);
    }

    #[test]
    fn odd_profiles_are_errors() {
        for bad in [
            "",
            "[]",
            "7",
            "{}",
            r#"{"defaultAction":"SCMP_ACT_NONSENSE"}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[7]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"action":"SCMP_ACT_ALLOW"}]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_KILL","includes":7}]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#,
        ] {
            assert!(read(bad.as_bytes(), 0).is_err(), "{bad}");
        }
    }
}
