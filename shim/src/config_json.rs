//! What the shim itself needs of a bundle's `config.json`: to which pod a container belongs, and what a pod's sandbox says
//! of the pod. What a container is made of is the business of `krx_sandbox::bundle`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use krx_sandbox::bundle::{self, BundleError};
use krx_sandbox::settings::size::{Limits, SizeError};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, LinuxResources};
use serde::Deserialize;

/// The annotations by which containerd's CRI plugin and CRI-O tell of pods: of the kind of a container, and of the
/// id of its pod's sandbox.
const KINDS: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
const SANDBOXES: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];

/// Why a bundle says nothing of its pod.
#[derive(Debug, thiserror::Error)]
pub enum ConfigJsonError {
    #[error(transparent)]
    Read(BundleError),
    #[error("Bundle configuration {path} is not an OCI runtime configuration")]
    Parse {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("Annotation {name}: {value:?} is neither sandbox nor container")]
    Kind { name: &'static str, value: String },
    #[error("Limits of the pod cannot be read")]
    Limits(#[source] SizeError),
    #[error("Annotation {0} is missing: a container of a pod has to say of which")]
    NoSandbox(&'static str),
}

/// A container's place in a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It is a pod of its own.
    Single,
    /// It stands for the pod: its VM.
    Sandbox,
    /// It runs in the pod of that sandbox.
    Member(String),
}

/// A configuration as far as it concerns the pod.
#[derive(Debug)]
pub struct ConfigJson {
    pub role: Role,
    pub annotations: HashMap<String, String>,
    pub hostname: Option<String>,
    pub sysctls: Vec<(String, String)>,
    /// Path of the network namespace to join.
    pub netns: Option<PathBuf>,
    /// Path in the cgroup tree, or `slice:prefix:name` for systemd.
    pub cgroup: Option<PathBuf>,
    /// Of the pod, which a container alone is.
    pub limits: Limits,
}

/// The part of a configuration that is looked at here: it is read by each process of a start, and most of it is a
/// seccomp profile. Whoever makes the container reads, and judges, all of it.
#[derive(Default, Deserialize)]
struct Outline {
    annotations: Option<HashMap<String, String>>,
    hostname: Option<String>,
    linux: Option<OutlineLinux>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OutlineLinux {
    namespaces: Option<Vec<LinuxNamespace>>,
    sysctl: Option<HashMap<String, String>>,
    resources: Option<LinuxResources>,
    cgroups_path: Option<PathBuf>,
}

impl ConfigJson {
    /// Reads a bundle's configuration.
    ///
    /// # Errors
    /// As [`Self::parse`]; it cannot be read.
    pub fn read(bundle: &Path) -> Result<Self, ConfigJsonError> {
        let json = bundle::config_json(bundle).map_err(ConfigJsonError::Read)?;
        Self::parse(&json, &bundle.join("config.json"))
    }

    /// The configuration in `json`, which is that of the file at `path`.
    ///
    /// # Errors
    /// It is no OCI configuration, or its annotations make no sense.
    pub fn parse(json: &[u8], path: &Path) -> Result<Self, ConfigJsonError> {
        let failed = |source| ConfigJsonError::Parse { path: path.into(), source };
        Self::of(serde_json::from_slice(json).map_err(failed)?)
    }

    fn of(outline: Outline) -> Result<Self, ConfigJsonError> {
        let Outline { annotations, hostname, linux } = outline;
        let annotations = annotations.unwrap_or_default();
        let OutlineLinux { namespaces, sysctl, resources, cgroups_path } = linux.unwrap_or_default();
        let network = namespaces.into_iter().flatten().find(|one| one.typ() == LinuxNamespaceType::Network);
        let role = role(&annotations)?;
        let limits = match role {
            Role::Single => resources.as_ref().map(Limits::of_container).unwrap_or_default(),
            Role::Sandbox | Role::Member(_) => {
                Limits::of_sandbox(&annotations).map_err(ConfigJsonError::Limits)?
            }
        };
        Ok(Self {
            role,
            hostname: hostname.filter(|name| !name.is_empty()),
            sysctls: sysctl.into_iter().flatten().collect(),
            netns: network.and_then(|network| network.path().clone()).filter(|p| !p.as_os_str().is_empty()),
            cgroup: cgroups_path.filter(|p| !p.as_os_str().is_empty()),
            limits,
            annotations,
        })
    }
}

fn role(annotations: &HashMap<String, String>) -> Result<Role, ConfigJsonError> {
    let found = KINDS
        .iter()
        .zip(SANDBOXES)
        .find_map(|(kind, sandbox)| annotations.get(*kind).map(|value| (*kind, value.as_str(), sandbox)));
    match found {
        None => Ok(Role::Single),
        Some((_, "sandbox", _)) => Ok(Role::Sandbox),
        Some((_, "container", sandbox)) => {
            let id = annotations.get(sandbox).filter(|id| !id.is_empty());
            id.cloned().map(Role::Member).ok_or(ConfigJsonError::NoSandbox(sandbox))
        }
        Some((name, value, _)) => Err(ConfigJsonError::Kind { name, value: value.into() }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(config: serde_json::Value) -> Result<ConfigJson, ConfigJsonError> {
        let mut whole = json!({"ociVersion": "1.0.2", "root": {"path": "rootfs"}});
        whole.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
        ConfigJson::of(serde_json::from_value(whole).unwrap())
    }

    fn role_of(annotations: serde_json::Value) -> Result<Role, ConfigJsonError> {
        read(json!({ "annotations": annotations })).map(|config| config.role)
    }

    #[test]
    fn both_engines_tell_of_pods() {
        assert_eq!(role_of(json!({})).unwrap(), Role::Single);
        for (kind, id) in [
            ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
            ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
        ] {
            assert_eq!(role_of(json!({kind: "sandbox", id: "p"})).unwrap(), Role::Sandbox);
            assert_eq!(role_of(json!({kind: "container", id: "p"})).unwrap(), Role::Member("p".into()));
            assert!(matches!(role_of(json!({kind: "container"})), Err(ConfigJsonError::NoSandbox(_))));
            assert!(matches!(role_of(json!({kind: "x"})), Err(ConfigJsonError::Kind { .. })));
        }
    }

    #[test]
    fn what_concerns_the_pod_is_found() {
        let config = read(json!({"hostname": "web-0", "linux": {
            "cgroupsPath": "kubepods-pod1.slice:cri-containerd:p",
            "sysctl": {"net.ipv4.ip_forward": "1"},
            "resources": {"memory": {"limit": 1 << 20}},
            "namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/cni-1"}]
        }}))
        .unwrap();
        assert_eq!(config.hostname.as_deref(), Some("web-0"));
        assert_eq!(config.netns.as_deref(), Some(Path::new("/run/netns/cni-1")));
        assert_eq!(config.cgroup.as_deref(), Some(Path::new("kubepods-pod1.slice:cri-containerd:p")));
        assert_ne!(config.limits, Limits::default());
        assert_eq!(config.sysctls, [("net.ipv4.ip_forward".to_string(), "1".to_string())]);
        let config = read(json!({})).unwrap();
        assert!(config.netns.is_none() && config.hostname.is_none() && config.sysctls.is_empty());
    }
}
