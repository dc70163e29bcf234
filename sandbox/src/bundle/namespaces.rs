//! `linux.namespaces` of a configuration: which a container gets of its own in the guest. Pure.

use std::collections::HashMap;
use std::path::PathBuf;

use krx_proto::{Namespace, TimeOffset};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, LinuxTimeOffset};

use super::{BundleError, invalid, unsupported};

const FIELD: &str = "linux.namespaces";

/// Which of the namespaces that a configuration speaks of are the pod's. In the guest those are the guest's own, as
/// nothing but the pod runs in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodNamespaces {
    /// The pod's namespaces, as a container that joins them names them: `/proc/PID/ns/ipc`, `/run/netns/NAME`.
    pub paths: Vec<PathBuf>,
    /// The container is the one that the pod begins with: the network, IPC and UTS namespaces it is to have anew are
    /// the pod's.
    pub is_sandbox: bool,
    /// What the container's names in the pod's share begin with.
    pub share_prefix: String,
}

/// New namespaces of a container, and whether it has the pod's host name.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Namespaces {
    pub(super) own: Vec<Namespace>,
    /// A new user namespace, which owns them.
    pub(super) user: bool,
    /// The UTS namespace is the pod's, and another container has named it.
    pub(super) joins_uts: bool,
}

/// Outside a pod nothing can be joined, and what is not asked for is the guest's.
pub(super) fn read(
    wanted: &[LinuxNamespace],
    pod: Option<&PodNamespaces>,
) -> Result<Namespaces, BundleError> {
    use LinuxNamespaceType as Type;
    let mut found = Namespaces { own: Vec::new(), user: false, joins_uts: false };
    for (index, namespace) in wanted.iter().enumerate() {
        let field = |name: &str| format!("{FIELD}[{index}].{name}");
        if wanted[..index].iter().any(|other| other.typ() == namespace.typ()) {
            return Err(invalid(field("type"), "is there twice"));
        }
        let path = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty());
        let can_be_joined = matches!(namespace.typ(), Type::Pid | Type::Ipc | Type::Uts | Type::Network);
        let joins = path.is_some_and(|path| pod.is_some_and(|pod| can_be_joined && pod.paths.contains(path)));
        if let Some(path) = path.filter(|_| !joins) {
            let what = format!("{}, which is no namespace of the pod", path.display());
            return Err(unsupported(field("path"), what));
        }
        let is_sandbox = pod.is_some_and(|pod| pod.is_sandbox);
        match namespace.typ() {
            Type::User => found.user = true,
            // A mount namespace is always made; the network is the VM's, in which nothing else runs.
            Type::Mount | Type::Network => {}
            Type::Cgroup => found.own.push(Namespace::Cgroup),
            Type::Time => found.own.push(Namespace::Time),
            Type::Pid if !joins => found.own.push(Namespace::Pid),
            Type::Ipc if !joins && !is_sandbox => found.own.push(Namespace::Ipc),
            Type::Uts if !joins && !is_sandbox => found.own.push(Namespace::Uts),
            Type::Uts => found.joins_uts = joins && !is_sandbox,
            Type::Pid | Type::Ipc => {}
        }
    }
    // In a pod that is not asked for is the host's, of which a guest has nothing. Its processes are the guest's.
    let has = |wanted_type: Type| wanted.iter().any(|namespace| namespace.typ() == wanted_type);
    if pod.is_some() && !has(Type::Network) {
        return Err(unsupported(
            FIELD,
            "the host's network (hostNetwork): a namespace of type network is missing",
        ));
    }
    if pod.is_some() && !has(Type::Ipc) {
        return Err(unsupported(FIELD, "the host's IPC (hostIPC): a namespace of type ipc is missing"));
    }
    Ok(found)
}

/// `linux.timeOffsets`, for the container's own clocks.
pub(super) fn time_offsets(
    wanted: Option<&HashMap<String, LinuxTimeOffset>>,
    own: &[Namespace],
) -> Result<Vec<TimeOffset>, BundleError> {
    const FIELD: &str = "linux.timeOffsets";
    const NANOSECONDS: u32 = 1_000_000_000;
    let mut offsets = Vec::new();
    for (name, offset) in wanted.into_iter().flatten() {
        let clock = match name.as_str() {
            "monotonic" => 1,
            "boottime" => 7,
            _ => return Err(invalid(format!("{FIELD}.{name}"), "is neither monotonic nor boottime")),
        };
        let nanoseconds = offset.nanosecs().unwrap_or(0);
        if nanoseconds >= NANOSECONDS {
            return Err(invalid(format!("{FIELD}.{name}.nanosecs"), "has to be less than a second"));
        }
        offsets.push(TimeOffset { clock, seconds: offset.secs().unwrap_or(0), nanoseconds });
    }
    if !offsets.is_empty() && !own.contains(&Namespace::Time) {
        return Err(invalid(FIELD, "needs a namespace of type time"));
    }
    offsets.sort_unstable_by_key(|offset| offset.clock);
    Ok(offsets)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read_json(wanted: Value, pod: Option<&PodNamespaces>) -> Result<Namespaces, BundleError> {
        read(&serde_json::from_value::<Vec<LinuxNamespace>>(wanted).unwrap(), pod)
    }

    fn pod(is_sandbox: bool) -> PodNamespaces {
        let paths =
            ["/proc/7/ns/ipc", "/proc/7/ns/uts", "/proc/7/ns/net", "/proc/7/ns/pid", "/run/netns/cni"];
        PodNamespaces { paths: paths.map(PathBuf::from).into(), is_sandbox, share_prefix: String::new() }
    }

    #[test]
    fn a_container_alone_has_its_own() {
        let all = json!([{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}, {"type": "cgroup"}]);
        let found = read_json(all, None).unwrap();
        assert_eq!(found.own, [Namespace::Pid, Namespace::Ipc, Namespace::Uts, Namespace::Cgroup]);
        assert_eq!(read_json(json!([]), None).unwrap().own, []);
        let found = read_json(json!([{"type": "user"}, {"type": "mount"}]), None).unwrap();
        assert!(found.user && found.own.is_empty());
    }

    #[test]
    fn clocks_are_ahead_or_behind() {
        let read = |offsets: Value| {
            time_offsets(Some(&serde_json::from_value(offsets).unwrap()), &[Namespace::Time])
        };
        let read_all = read(json!({"boottime": {"secs": 7}, "monotonic": {"secs": -1, "nanosecs": 5}}));
        let expected = [(1, -1, 5), (7, 7, 0)];
        let expected =
            expected.map(|(clock, seconds, nanoseconds)| TimeOffset { clock, seconds, nanoseconds });
        assert_eq!(read_all.unwrap(), expected);
        for (bad, word) in [
            (json!({"realtime": {"secs": 1}}), "realtime"),
            (json!({"monotonic": {"nanosecs": 1_000_000_000}}), "nanosecs"),
        ] {
            let error = read(bad).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let offsets = serde_json::from_value(json!({"monotonic": {"secs": 1}})).unwrap();
        assert!(time_offsets(Some(&offsets), &[Namespace::Pid]).is_err());
        assert_eq!(time_offsets(None, &[]).unwrap(), []);
        assert_eq!(read_json(json!([{"type": "time"}]), None).unwrap().own, [Namespace::Time]);
    }

    /// What containerd's CRI plugin writes for the sandbox, a container, and one that shares its processes.
    #[test]
    fn a_pod_s_namespaces_are_the_guest_s() {
        let sandbox = json!([{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network", "path": "/run/netns/cni"}]);
        let found = read_json(sandbox, Some(&pod(true))).unwrap();
        assert_eq!(found, Namespaces { own: vec![Namespace::Pid], user: false, joins_uts: false });
        let mut container = json!([{"type": "pid"}, {"type": "mount"}, {"type": "ipc", "path": "/proc/7/ns/ipc"},
            {"type": "uts", "path": "/proc/7/ns/uts"}, {"type": "network", "path": "/proc/7/ns/net"}]);
        let found = read_json(container.clone(), Some(&pod(false))).unwrap();
        assert_eq!(found, Namespaces { own: vec![Namespace::Pid], user: false, joins_uts: true });
        container[0]["path"] = json!("/proc/7/ns/pid");
        assert_eq!(read_json(container, Some(&pod(false))).unwrap().own, []);
    }

    #[test]
    fn what_is_the_host_s_is_refused() {
        let with = |namespace: Value| json!([{"type": "network"}, {"type": "ipc"}, namespace]);
        for (wanted, word) in [
            (json!([{"type": "ipc"}]), "hostNetwork"),
            (json!([{"type": "network"}]), "hostIPC"),
            (with(json!({"type": "pid", "path": "/proc/1/ns/pid"})), "[2].path"),
            (with(json!({"type": "mount", "path": "/proc/7/ns/ipc"})), "[2].path"),
            (with(json!({"type": "cgroup", "path": "/proc/7/ns/ipc"})), "[2].path"),
            (with(json!({"type": "user", "path": "/proc/7/ns/ipc"})), "[2].path"),
            (with(json!({"type": "time", "path": "/proc/7/ns/time"})), "[2].path"),
            (with(json!({"type": "ipc"})), "[2].type"),
        ] {
            let error = read_json(wanted, Some(&pod(false))).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let joined = json!([{"type": "pid", "path": "/proc/7/ns/pid"}]);
        assert!(read_json(joined, None).unwrap_err().to_string().contains("[0].path"));
    }
}
