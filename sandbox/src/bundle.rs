//! OCI bundles: a directory with a `config.json`, read into a [`Container`].
//!
//! A configuration can ask for more than a micro-VM honours. Whatever would make the container less confined or work
//! otherwise than asked is refused by the name of its field ([`REFUSED`]); what has no meaning in a VM of its own is
//! accepted and does nothing (`linux.cgroupsPath`, `annotations`, a network namespace: the VM is one).
//! `docs/oci.md` has the table of all fields.

mod devices;
mod hooks;
mod id_map;
mod json;
mod namespaces;
mod pod_mounts;
mod process;
mod profile;
mod resources;
mod scheduling;
mod seccomp;
mod seccomp_program;
mod user_namespace;

use std::io;
use std::path::{Path, PathBuf};

use krx_proto::{ContainerSpec, Mount, Namespace, ProcessSpec, Resources, SeccompFilter};
use oci_spec::runtime::{Linux, Spec};
use serde_json::Value;

use self::json::Strict;
use crate::container::{Container, ContainerError};
use crate::default_spec::MAX_HOSTNAME;
use crate::disks::HostDisk;
use crate::image_file;
use crate::volume::destination;

pub use namespaces::PodNamespaces;

/// Largest `config.json` that is read; a hostile one could fill memory.
const MAX_CONFIG: u64 = 4 << 20;
/// Most mounts of a container: pods have some dozens, a hostile bundle would have the host make one for each.
const MAX_MOUNTS: usize = 1024;

/// Fields that are refused unless empty, in JSON's own paths. Everything here either confines the container or
/// changes what its processes meet.
const REFUSED: [&str; 14] = [
    "/hooks/createRuntime",
    "/hooks/poststart",
    "/hooks/poststop",
    "/hooks/prestart",
    "/solaris",
    "/windows",
    "/vm",
    "/zos",
    "/linux/intelRdt",
    "/linux/memoryPolicy",
    "/linux/mountLabel",
    "/linux/netDevices",
    "/linux/seccomp/listenerMetadata",
    "/linux/seccomp/listenerPath",
];
/// The objects whose fields are looked at by name.
const OBJECTS: [&str; 5] = ["", "/hooks", "/linux", "/linux/personality", "/linux/seccomp"];
/// File systems of the guest that a container may mount; `bind` is not one of them.
const FILE_SYSTEMS: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// Why a bundle cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error(
        "Bundle configuration {path} cannot be read: a bundle is a directory with a file config.json of 4 MiB at most"
    )]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "Bundle configuration {path} is not an OCI runtime configuration; `runc spec` writes one to begin with"
    )]
    Parse {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("Bundle field {0} is missing")]
    Missing(&'static str),
    #[error("Bundle field {field}: krx does not support {what}")]
    Unsupported { field: String, what: String },
    #[error("Bundle field {field}: {what}")]
    Invalid { field: String, what: String },
    #[error("Bundle field {field}: {path} cannot be used")]
    Source {
        field: String,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Bundle's container cannot be made")]
    Container(#[source] ContainerError),
}

fn unsupported(field: impl Into<String>, what: impl Into<String>) -> BundleError {
    BundleError::Unsupported { field: field.into(), what: what.into() }
}

fn invalid(field: impl Into<String>, what: impl Into<String>) -> BundleError {
    BundleError::Invalid { field: field.into(), what: what.into() }
}

/// Reads the bundle in `directory` as a container named `name`, which is alone in its VM.
///
/// # Errors
/// The configuration cannot be read, makes no sense, or asks for what krx does not do.
pub fn read(name: &str, directory: &Path) -> Result<Container, BundleError> {
    read_bundle(name, directory, None)
}

/// Reads a bundle as a container of a pod.
///
/// # Errors
/// As [`read`]; it asks for namespaces of the host.
pub fn read_in_pod(name: &str, directory: &Path, pod: &PodNamespaces) -> Result<Container, BundleError> {
    read_bundle(name, directory, Some(pod))
}

/// The bytes of a bundle's configuration.
///
/// # Errors
/// It is missing, no regular file, or larger than any configuration that krx takes.
pub fn config_json(directory: &Path) -> Result<Vec<u8>, BundleError> {
    let path = directory.join("config.json");
    image_file::read(&path, MAX_CONFIG).map_err(|source| BundleError::Read { path, source })
}

fn read_bundle(name: &str, directory: &Path, pod: Option<&PodNamespaces>) -> Result<Container, BundleError> {
    let json = config_json(directory)?;
    let path = directory.join("config.json");
    let failed = |source| BundleError::Parse { path: path.clone(), source };
    let Strict(raw) = serde_json::from_slice(&json).map_err(failed)?;
    let spec: Spec = serde_json::from_slice(&json).map_err(failed)?;
    check(&raw)?;
    let (mut container, disks) = container_spec(name, &spec, pod)?;
    container.hooks = hooks::read(name, directory, &spec)?;
    container.resources = resources::read(raw.pointer("/linux/resources").unwrap_or(&Value::Null))?;
    let root = spec.root().as_ref().ok_or(BundleError::Missing("root"))?;
    let path = directory.join(root.path());
    within(directory, root.path(), "root.path")?;
    let mut container = Container::new(container, &path, pod.map_or("", |pod| &pod.share_prefix))
        .map_err(BundleError::Container)?;
    disks.into_iter().for_each(|disk| container.add_disk(disk));
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    if mounts.len() > MAX_MOUNTS {
        return Err(invalid("mounts", format!("has {}, krx makes {MAX_MOUNTS} at most", mounts.len())));
    }
    for (index, mount) in mounts.iter().enumerate() {
        add_mount(&mut container, directory, &format!("mounts[{index}]"), mount, pod.is_some())?;
    }
    Ok(container)
}

/// A further process of a container, out of the JSON of an OCI `process`. It is under the same filter of system calls as
/// the container's first one.
///
/// # Errors
/// It is no such JSON, or asks for what krx does not do.
pub fn process(json: &[u8], first: &ProcessSpec) -> Result<ProcessSpec, BundleError> {
    process::read_further(json, first)
}

/// The filter of system calls of a profile in docker's form, for a container with these capabilities (bit n is the
/// capability of that number); `None` where it lets everything pass.
///
/// # Errors
/// It is no such JSON, or asks for what krx does not do.
pub fn seccomp_profile(json: &[u8], capabilities: u64) -> Result<Option<SeccompFilter>, BundleError> {
    seccomp::read(&profile::read(json, capabilities)?)
}

/// Limits out of the JSON of an OCI `linux.resources`, to change those of a running container.
///
/// # Errors
/// It is no such JSON, or asks for what a guest cannot keep.
pub fn resources(json: &[u8]) -> Result<Resources, BundleError> {
    let raw = serde_json::from_slice(json).map_err(|error| invalid("linux.resources", error.to_string()))?;
    resources::read(&raw)
}

/// Refuses fields, by their pointers into `raw`, unless they ask for nothing.
fn refuse(raw: &Value, parent: &str, fields: &[&str]) -> Result<(), BundleError> {
    for pointer in fields {
        if raw.pointer(pointer).is_some_and(|value| !is_empty(value)) {
            let field = format!("{parent}{}", pointer.replace('/', "."));
            return Err(unsupported(field.trim_start_matches('.'), "it"));
        }
    }
    Ok(())
}

/// Refuses arrays where there are to be objects: read by position, their fields would have no names to be refused by.
fn objects(raw: &Value, parent: &str, fields: &[&str]) -> Result<(), BundleError> {
    match fields.iter().find(|pointer| raw.pointer(pointer).is_some_and(Value::is_array)) {
        Some(pointer) => {
            let field = format!("{parent}{}", pointer.replace('/', "."));
            Err(invalid(field.trim_start_matches('.'), "is not an object"))
        }
        None => Ok(()),
    }
}

/// Refuses what cannot be honoured.
fn check(raw: &Value) -> Result<(), BundleError> {
    objects(raw, "", &OBJECTS)?;
    refuse(raw, "", &REFUSED)?;
    let version = raw.get("ociVersion").and_then(Value::as_str).unwrap_or_default();
    if !version.starts_with("1.") {
        return Err(unsupported("ociVersion", format!("version {version:?} of the specification")));
    }
    if let Some(field) = json::with_nul(raw) {
        return Err(invalid(field.trim_start_matches('.'), "has a NUL in it. Leave it out"));
    }
    process::check(raw.pointer("/process").unwrap_or(&Value::Null))
}

/// Refuses a relative path that leads out of the bundle, by `..` or a link: it was written to be the bundle's own, and
/// is another file on each host. One that leads nowhere is refused by who wants it.
fn within(bundle: &Path, path: &Path, field: &str) -> Result<(), BundleError> {
    let (Ok(bundle), Ok(found)) = (bundle.canonicalize(), bundle.join(path).canonicalize()) else {
        return Ok(());
    };
    if path.is_absolute() || found.starts_with(bundle) {
        return Ok(());
    }
    let what = format!(
        "{:?} leads out of the bundle, to {}. Give that path itself if it is meant",
        path.display().to_string(),
        found.display()
    );
    Err(invalid(field, what))
}

/// Whether a value asks for nothing: limits of zero or less mean none.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64().is_some_and(|number| number <= 0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.values().all(is_empty),
    }
}

fn container_spec(
    name: &str,
    spec: &Spec,
    pod: Option<&PodNamespaces>,
) -> Result<(ContainerSpec, Vec<HostDisk>), BundleError> {
    let linux = spec.linux().clone().unwrap_or_else(no_linux);
    let process = spec.process().as_ref().ok_or(BundleError::Missing("process"))?;
    let propagation = linux.rootfs_propagation().as_deref().unwrap_or_default();
    if !["", "private", "rprivate", "slave", "rslave"].contains(&propagation) {
        return Err(unsupported("linux.rootfsPropagation", propagation));
    }
    let namespaces = namespaces::read(linux.namespaces().as_deref().unwrap_or_default(), pod)?;
    let time_offsets = namespaces::time_offsets(linux.time_offsets().as_ref(), &namespaces.own)?;
    let has_uts = namespaces.own.contains(&Namespace::Uts) || pod.is_some();
    if spec.hostname().is_some() && !has_uts {
        return Err(invalid("hostname", "needs a namespace of type uts"));
    }
    if spec.hostname().as_ref().is_some_and(|name| name.len() > MAX_HOSTNAME) {
        return Err(invalid("hostname", format!("is longer than the {MAX_HOSTNAME} bytes that Linux takes")));
    }
    let domainname = spec.domainname().clone().filter(|name| !name.is_empty());
    if domainname.is_some() && !namespaces.own.contains(&Namespace::Uts) {
        return Err(invalid("domainname", "needs a namespace of type uts of the container's own"));
    }
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().clone());
    let rules = rules.as_deref().unwrap_or_default();
    let nodes = devices::nodes(linux.devices().as_deref().unwrap_or_default(), rules)?;
    let mut sysctls: Vec<_> = linux.sysctl().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
    sysctls.sort_unstable();
    let mut first = process::read(process)?;
    first.seccomp = linux.seccomp().as_ref().map(seccomp::read).transpose()?.flatten();
    first.scheduling.personality = linux.personality().as_ref().map(scheduling::personality).transpose()?;
    let (uids, gids) = (linux.uid_mappings().as_deref(), linux.gid_mappings().as_deref());
    let user_namespace = user_namespace::read(
        namespaces.user,
        uids.unwrap_or_default(),
        gids.unwrap_or_default(),
        &first.user,
    )?;
    let container = ContainerSpec {
        id: name.into(),
        root_readonly: spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly).unwrap_or(false),
        // The pod's is set by its sandbox.
        hostname: spec.hostname().clone().filter(|name| !name.is_empty() && !namespaces.joins_uts),
        domainname,
        namespaces: namespaces.own,
        user_namespace: user_namespace.map(Box::new),
        time_offsets,
        masked_paths: linux.masked_paths().clone().unwrap_or_default(),
        readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
        sysctls,
        device_rules: devices::rules(rules, &nodes.disks)?,
        devices: nodes.devices,
        process: first,
        ..ContainerSpec::default()
    };
    Ok((container, nodes.disks))
}

/// Nothing of what `Linux::default` would ask for.
fn no_linux() -> Linux {
    let mut linux = Linux::default();
    linux.set_namespaces(None).set_masked_paths(None).set_readonly_paths(None);
    linux
}

fn add_mount(
    container: &mut Container,
    bundle: &Path,
    field: &str,
    wanted: &oci_spec::runtime::Mount,
    in_pod: bool,
) -> Result<(), BundleError> {
    let options = wanted.options().clone().unwrap_or_default();
    let (options, id_map) = id_map::read(field, wanted, options, container.spec.user_namespace.as_deref())?;
    let path = wanted.destination().to_str().and_then(destination);
    let destination =
        path.ok_or_else(|| invalid(format!("{field}.destination"), "is not an absolute path below /"))?;
    let kind = wanted.typ().clone().unwrap_or_default();
    let source = wanted.source().clone().unwrap_or_default();
    let is_bind = kind == "bind" || options.iter().any(|option| matches!(option.as_str(), "bind" | "rbind"));
    if options.iter().any(|option| option == "tmpcopyup") && (is_bind || kind != "tmpfs") {
        return Err(invalid(format!("{field}.options"), "tmpcopyup is an option of a tmpfs alone"));
    }
    let mount = if is_bind {
        let path = bundle.join(&source);
        let field = format!("{field}.source");
        within(bundle, &source, &field)?;
        let source = path.canonicalize().map_err(|source| BundleError::Source {
            field,
            path: path.clone(),
            source,
        })?;
        let mount = Mount { destination, kind: "bind".into(), source: String::new(), options, id_map };
        let replacement = if in_pod { pod_mounts::replacement(container, &mount, &source) } else { None };
        replacement.unwrap_or_else(|| {
            let source = container.share(source, is_read_only(&mount.options));
            Mount { source, ..mount }
        })
    } else if id_map.is_some() {
        return Err(unsupported(field, "ID mappings of what is not a bind mount"));
    } else if FILE_SYSTEMS.contains(&kind.as_str()) {
        user_namespace::check_owners(field, &options, container.spec.user_namespace.as_deref())?;
        Mount { destination, source: source.to_string_lossy().into_owned(), kind, options, id_map: None }
    } else {
        return Err(unsupported(format!("{field}.type"), format!("file system type {kind:?}")));
    };
    container.spec.mounts.push(mount);
    Ok(())
}

/// The last of `ro` and `rw` counts, as in mount(8).
fn is_read_only(options: &[String]) -> bool {
    let access = options.iter().rev().find(|option| matches!(option.as_str(), "ro" | "rw" | "rro" | "rrw"));
    access.is_some_and(|access| access.ends_with('o'))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::Scratch;
    use krx_proto::{Limit, Rlimit, TerminalSize};

    /// What `runc spec` writes, word for word where it matters.
    fn runc_spec() -> Value {
        let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
        let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
        json!({
            "ociVersion": "1.2.0",
            "process": {
                "terminal": true,
                "user": {"uid": 0, "gid": 0},
                "args": ["sh"],
                "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
                "cwd": "/",
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
                "noNewPrivileges": true
            },
            "root": {"path": "rootfs", "readonly": true},
            "hostname": "runc",
            "mounts": [
                mount("/proc", "proc", &[]),
                mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
                mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
                mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"])
            ],
            "linux": {
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}],
                "maskedPaths": ["/proc/kcore"],
                "readonlyPaths": ["/proc/sys"]
            }
        })
    }

    fn read_json(config: &[u8]) -> Result<Container, BundleError> {
        let scratch = Scratch::new("bundle");
        scratch.write("config.json", config);
        scratch.write("rootfs/bin/sh", b"");
        read("web", scratch.path())
    }

    fn read_value(config: &Value) -> Result<Container, BundleError> {
        read_json(config.to_string().as_bytes())
    }

    /// Sets a field, making the objects above it.
    fn with(pointer: &str, value: Value) -> Value {
        let mut config = runc_spec();
        let mut place = &mut config;
        for name in pointer[1..].split('/') {
            place = match name.parse::<usize>() {
                Ok(index) => &mut place[index],
                Err(_) => &mut place[name],
            };
        }
        *place = value;
        config
    }

    #[test]
    fn runc_default_is_accepted() {
        let container = read_value(&runc_spec()).unwrap();
        let spec = &container.spec;
        assert_eq!(spec.namespaces, [Namespace::Pid, Namespace::Ipc, Namespace::Uts, Namespace::Cgroup]);
        assert_eq!(spec.hostname.as_deref(), Some("runc"));
        assert!(spec.root_readonly && spec.process.no_new_privileges);
        assert_eq!(spec.process.terminal, Some(TerminalSize::default()));
        assert_eq!(spec.process.capabilities.unwrap().bounding, 1 << 29 | 1 << 5 | 1 << 10);
        assert_eq!(spec.process.rlimits, [Rlimit { resource: 7, soft: 1024, hard: 1024 }]);
        assert_eq!(spec.mounts.len(), 4);
        assert!(container.rootfs().ends_with("rootfs"));
    }

    /// The shape of what containerd's CRI plugin writes for a container of a default pod, on a host with `AppArmor`.
    fn pod_container() -> Value {
        let all = json!(["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT"]);
        let bind = |at: &str| json!({"destination": at, "type": "bind", "source": "rootfs", "options": ["rbind", "rprivate", "rw"]});
        let mut config = runc_spec();
        config["process"] = json!({
            "user": {"uid": 1000, "gid": 1000, "additionalGids": [1000, 2000]},
            "args": ["/pause"], "env": ["PATH=/bin"], "cwd": "/",
            "capabilities": {"bounding": all, "effective": all, "permitted": all},
            "noNewPrivileges": false, "oomScoreAdj": 1000, "apparmorProfile": "cri-containerd.apparmor.d"
        });
        config["annotations"] = json!({"io.kubernetes.cri.container-type": "container"});
        config["mounts"].as_array_mut().unwrap().extend([
            json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]}),
            json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]}),
            bind("/etc/hosts"), bind("/dev/termination-log"), bind("/etc/resolv.conf"), bind("/dev/shm"),
        ]);
        config["linux"] = json!({
            "cgroupsPath": "kubepods-besteffort-pod1.slice:cri-containerd:1",
            "resources": {
                "devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 10, "minor": 200, "access": "rwm"}
                ],
                "memory": {"limit": 134_217_728, "swap": 134_217_728},
                "cpu": {"shares": 102, "quota": 20000, "period": 100_000},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
                "unified": {"memory.oom.group": "1"}
            },
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}, {"type": "ipc", "path": "/proc/7/ns/ipc"},
                {"type": "uts", "path": "/proc/7/ns/uts"}, {"type": "network", "path": "/proc/7/ns/net"}
            ],
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [{"names": ["read", "execve"], "action": "SCMP_ACT_ALLOW"}]},
            "maskedPaths": ["/proc/acpi"], "readonlyPaths": ["/proc/bus"]
        });
        config
    }

    fn read_pod(config: &Value, is_sandbox: bool) -> Result<Container, BundleError> {
        let scratch = Scratch::new("bundle");
        scratch.write("config.json", config.to_string().as_bytes());
        scratch.write("rootfs/bin/sh", b"");
        let paths = ["/proc/7/ns/ipc", "/proc/7/ns/uts", "/proc/7/ns/net"].map(PathBuf::from).into();
        read_in_pod("web", scratch.path(), &PodNamespaces { paths, is_sandbox, ..PodNamespaces::default() })
    }

    #[test]
    fn a_default_pod_is_honoured() {
        let spec = read_pod(&pod_container(), false).unwrap().spec;
        assert_eq!(spec.namespaces, [Namespace::Pid, Namespace::Cgroup]);
        // The sandbox has set it.
        assert_eq!(spec.hostname, None);
        assert_eq!(spec.resources.memory_max, Some(Limit::At(134_217_728)));
        assert_eq!(spec.resources.swap_max, Some(Limit::At(0)));
        assert_eq!(spec.resources.cpu_weight, Some(4));
        assert_eq!((spec.device_rules.len(), spec.mounts.len()), (3, 10));
        let process = spec.process;
        assert_eq!((process.oom_score_adj, process.user.additional_gids), (Some(1000), vec![1000, 2000]));
        assert!(process.seccomp.is_some() && !process.no_new_privileges);
    }

    #[test]
    fn a_sandbox_gives_the_guest_the_pod_s_name() {
        let mut config = pod_container();
        config["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"},
            {"type": "network", "path": "/proc/7/ns/net"}]);
        let spec = read_pod(&config, true).unwrap().spec;
        assert_eq!((spec.namespaces, spec.hostname.as_deref()), (vec![Namespace::Pid], Some("runc")));
        config["hostname"] = json!("");
        assert_eq!(read_pod(&config, true).unwrap().spec.hostname, None);
    }

    #[test]
    fn a_restricted_and_a_privileged_pod_are_honoured() {
        let mut restricted = pod_container();
        restricted["process"]["capabilities"] = json!({});
        restricted["process"]["noNewPrivileges"] = json!(true);
        restricted["root"]["readonly"] = json!(true);
        let spec = read_pod(&restricted, false).unwrap().spec;
        assert_eq!(spec.process.capabilities, Some(krx_proto::Capabilities::default()));
        assert!(spec.process.no_new_privileges && spec.root_readonly);
        let mut privileged = pod_container();
        privileged["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        privileged["linux"]["seccomp"] = Value::Null;
        privileged["linux"]["maskedPaths"] = json!([]);
        privileged["process"]["apparmorProfile"] = json!("");
        let spec = read_pod(&privileged, false).unwrap().spec;
        assert!(spec.process.seccomp.is_none() && spec.device_rules[0].allow && spec.masked_paths.is_empty());
        // Those that the host's devices were given to as well.
        privileged["linux"]["devices"] =
            json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]);
        assert!(read_pod(&privileged, false).unwrap_err().to_string().contains("/dev/kvm"));
    }

    fn one_id() -> Value {
        json!([{"containerID": 0, "hostID": 1, "size": 1}])
    }

    #[test]
    fn refused_fields_are_named() {
        let cases = [
            ("/hooks/createRuntime", json!([{"path": "/bin/true"}]), "hooks.createRuntime"),
            ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "linux.seccomp.defaultAction"),
            (
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x"}),
                "linux.seccomp.listenerPath",
            ),
            ("/linux/resources/memory", json!({"swappiness": 1}), "linux.resources.memory.swappiness"),
            ("/linux/resources/network", json!({"classID": 1}), "linux.resources.network"),
            (
                "/linux/resources/devices/0",
                json!({"allow": true, "type": "b", "major": 8, "minor": 0}),
                "linux.resources.devices[0]",
            ),
            (
                "/linux/devices",
                json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]),
                "linux.devices[0]",
            ),
            (
                "/linux/namespaces/1",
                json!({"type": "network", "path": "/run/netns/x"}),
                "linux.namespaces[1].path",
            ),
            (
                "/linux/namespaces/1",
                json!({"type": "user", "path": "/proc/7/ns/user"}),
                "linux.namespaces[1].path",
            ),
            ("/linux/rootfsPropagation", json!("shared"), "linux.rootfsPropagation"),
            ("/process/apparmorProfile", json!("p"), "process.apparmorProfile"),
            ("/process/selinuxLabel", json!("l"), "process.selinuxLabel"),
            ("/mounts/0/type", json!("nfs"), "mounts[0].type"),
            ("/mounts/0/options", json!(["ridmap=0:0:1"]), "mounts[0].options"),
            (
                "/mounts/0",
                json!({"destination": "/proc", "type": "proc", "uidMappings": one_id(), "gidMappings": one_id()}),
                "mounts[0]",
            ),
            ("/ociVersion", json!("2.0.0"), "ociVersion"),
            ("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt"),
            ("/linux/mountLabel", json!("l"), "linux.mountLabel"),
        ];
        for (pointer, value, field) in cases {
            let error = read_value(&with(pointer, value)).unwrap_err();
            let BundleError::Unsupported { field: named, .. } = &error else { panic!("{pointer}: {error}") };
            assert_eq!(named, field);
        }
    }

    #[test]
    fn limits_are_read_from_bundles_and_updates() {
        let wanted = json!({"memory": {"limit": 1 << 20}, "pids": {"limit": 10}});
        let limits = read_value(&with("/linux/resources", wanted.clone())).unwrap().spec.resources;
        assert_eq!(limits.pids_max, Some(Limit::At(10)));
        assert_eq!(resources(wanted.to_string().as_bytes()).unwrap(), limits);
        for bad in ["", "{", "[]", "null null", "7"] {
            assert!(resources(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn empty_forms_of_refused_fields_are_accepted() {
        for (pointer, value) in [
            ("/hooks", json!({"prestart": []})),
            ("/linux/resources/pids", json!({"limit": -1})),
            ("/linux/resources/memory", json!({"disableOOMKiller": false})),
            ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW"})),
            ("/linux/devices", json!([])),
            ("/process/apparmorProfile", json!("")),
            ("/linux/cgroupsPath", json!("/krx/web")),
            ("/annotations", json!({"a": "b"})),
        ] {
            read_value(&with(pointer, value)).unwrap_or_else(|error| panic!("{pointer}: {error}"));
        }
    }

    #[test]
    fn volumes_that_change_are_copied_in_pods_alone() {
        let scratch = Scratch::new("bundle");
        scratch.write("rootfs/bin/sh", b"");
        scratch.write("volume/..1/key", b"x");
        std::os::unix::fs::symlink("..1", scratch.path().join("volume/..data")).unwrap();
        let mut config = pod_container();
        config["mounts"].as_array_mut().unwrap().push(
            json!({"destination": "/config", "type": "bind", "source": "volume", "options": ["rbind", "rprivate", "ro"]}),
        );
        scratch.write("config.json", config.to_string().as_bytes());
        let paths = ["/proc/7/ns/ipc", "/proc/7/ns/uts", "/proc/7/ns/net"].map(PathBuf::from).into();
        let pod = PodNamespaces { paths, ..PodNamespaces::default() };
        let mut container = read_in_pod("web", scratch.path(), &pod).unwrap();
        let mount = container.spec.mounts.last().unwrap().clone();
        let entry = container.shared().last().unwrap().clone();
        assert_eq!((mount.kind.as_str(), mount.source), ("live", format!("/run/krx/share/{}", entry.name)));
        assert!(entry.read_only && entry.source.ends_with("volume"));
        // A mount point is made for it as for any directory.
        container.spec.root_readonly = true;
        container.finish().unwrap();
        assert!(scratch.path().join("rootfs/config").is_dir());
        config["linux"]["namespaces"] =
            json!([{"type": "pid"}, {"type": "uts"}, {"type": "ipc"}, {"type": "mount"}]);
        scratch.write("config.json", config.to_string().as_bytes());
        assert_eq!(read("web", scratch.path()).unwrap().spec.mounts.last().unwrap().kind, "bind");
    }

    #[test]
    fn bind_mounts_become_share_entries() {
        let scratch = Scratch::new("bundle");
        scratch.write("rootfs/x", b"");
        scratch.write("data/file", b"");
        let mut config = runc_spec();
        config["mounts"][0] =
            json!({"destination": "/data", "type": "none", "source": "data", "options": ["rbind", "ro"]});
        scratch.write("config.json", config.to_string().as_bytes());
        let container = read("web", scratch.path()).unwrap();
        let entry = &container.shared()[1];
        assert!(entry.source.ends_with("data") && entry.read_only);
        assert_eq!(container.spec.mounts[0].source, format!("/run/krx/share/{}", entry.name));
        assert_eq!(container.spec.mounts[0].kind, "bind");
    }

    #[test]
    fn bad_values_are_errors_with_a_name() {
        for (pointer, value, word) in [
            ("/process/args", json!([]), "process.args"),
            ("/process/cwd", json!("relative"), "process.cwd"),
            ("/mounts/0/destination", json!("proc"), "mounts[0].destination"),
            ("/mounts/0/destination", json!("/a/../../b"), "mounts[0].destination"),
            ("/mounts/0/options", json!(["idmap"]), "mounts[0].options"),
            ("/mounts/0/options", json!(["tmpcopyup"]), "mounts[0].options"),
            ("/mounts/0/uidMappings", one_id(), "mounts[0].gidMappings"),
            ("/linux/namespaces", json!([{"type": "pid"}]), "hostname"),
            ("/linux/namespaces/1", json!({"type": "pid"}), "linux.namespaces[1].type"),
            ("/linux/namespaces/1", json!({"type": "user"}), "linux.uidMappings"),
            ("/linux/uidMappings", json!([{"hostID": 0, "containerID": 0, "size": 1}]), "linux.uidMappings"),
            ("/process/user", json!([0, 0]), "process.user"),
            ("/linux/seccomp", json!(["SCMP_ACT_ALLOW"]), "linux.seccomp"),
            ("/root", Value::Null, "root"),
            ("/process", Value::Null, "process"),
        ] {
            let error = read_value(&with(pointer, value)).unwrap_err().to_string();
            assert!(error.contains(word), "{pointer}: {error}");
        }
        let missing =
            with("/mounts/0", json!({"destination": "/d", "type": "bind", "source": "/nonexistent"}));
        assert!(read_value(&missing).unwrap_err().to_string().contains("/nonexistent"));
    }

    #[test]
    fn hostile_files_are_errors_and_not_panics() {
        let nested = "[".repeat(200_000);
        let huge = vec![b' '; usize::try_from(MAX_CONFIG).unwrap() + 1];
        for bytes in [&b""[..], b"null", b"[]", b"{", b"{}", b"\xff\xfe", nested.as_bytes(), &huge] {
            assert!(read_json(bytes).is_err());
        }
        for (pointer, value) in [
            ("/process/user/uid", json!(-1)),
            ("/process/user/uid", json!(1_u64 << 32)),
            ("/process/rlimits/0/type", json!("RLIMIT_X")),
            ("/process/capabilities/bounding", json!(["CAP_EVERYTHING"])),
            ("/linux/namespaces/0/type", json!("galaxy")),
            ("/mounts", json!({})),
        ] {
            assert!(matches!(read_value(&with(pointer, value)), Err(BundleError::Parse { .. })), "{pointer}");
        }
    }
}
