//! From a container as the host describes it to a plan that can be carried out: everything that can be judged by
//! looking is judged here, before any process exists. Pure; `rootfs` and `child` carry the plan out.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use krx_proto::{
    AgentError, ContainerSpec, Device, MOUNT_LIVE, MOUNT_SHM, Mount, Namespace, TimeOffset, UserNamespace,
    validate_id,
};
use nix::sched::CloneFlags;

use crate::device_filter::DeviceFilter;
use crate::error::invalid;
use crate::hooks::HooksPlan;
use crate::id_map::IdMapPlan;
use crate::limits::Limits;
use crate::mount_options::{Bind, MountOptions};
use crate::process::{ProcessPlan, c_string};
use crate::user_namespace::{self, is_the_guest_s};
use crate::{live, shm};

/// Caps on a container's lists. A frame's size bounds them too, but every mount costs kernel memory that is charged to
/// nobody.
const MAX_MOUNTS: usize = 4096;
const MAX_PATHS: usize = 4096;
/// `HOST_NAME_MAX` of Linux.
const MAX_HOSTNAME: usize = 64;

/// `CLONE_NEWTIME`, which `nix` does not know. For unshare(2) and setns(2) alone: to clone3(2) it is another flag's bit.
pub(crate) const NEW_TIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);

/// A container ready to be made.
#[derive(Debug)]
pub(crate) struct ContainerPlan {
    /// New namespaces, the mount namespace included.
    pub(crate) namespaces: CloneFlags,
    /// With a new user namespace, which owns the others.
    pub(crate) user_namespace: Option<UserNamespace>,
    pub(crate) hostname: Option<String>,
    pub(crate) domainname: Option<String>,
    /// Lines for `/proc/self/timens_offsets`.
    pub(crate) time_offsets: String,
    pub(crate) root: RootPlan,
    /// Files below `/proc/sys`, and what is written to them.
    pub(crate) sysctls: Vec<(String, String)>,
    pub(crate) limits: Limits,
    pub(crate) device_filter: Option<DeviceFilter>,
    pub(crate) hooks: HooksPlan,
    pub(crate) process: ProcessPlan,
}

/// The container's file system view.
#[derive(Debug)]
pub(crate) struct RootPlan {
    /// A directory of the guest; not looked at where there is a disk.
    pub(crate) path: CString,
    /// Mounted, and attached nowhere.
    pub(crate) disk: Option<OwnedFd>,
    pub(crate) readonly: bool,
    pub(crate) mounts: Vec<MountPlan>,
    pub(crate) masked: Vec<String>,
    pub(crate) readonly_paths: Vec<String>,
    pub(crate) devices: Vec<Device>,
    /// All nodes of its `/dev`, if they have to be made in the guest and bound: in a user namespace nobody can make any.
    pub(crate) bound: Vec<Device>,
}

impl RootPlan {
    /// The container has a `/dev` of its own. Who binds another directory there brings his own nodes.
    pub(crate) fn has_own_dev(&self) -> bool {
        let is_dev = |mount: &&MountPlan| mount.destination.trim_end_matches('/') == "/dev";
        let last = self.mounts.iter().rev().find(is_dev);
        last.is_some_and(|mount| matches!(mount.what, MountKind::FileSystem { .. }))
    }

    /// What a process that makes the container's mounts has to have of the agent's.
    pub(crate) fn kept(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let maps = self.mounts.iter().filter_map(|mount| mount.id_map.as_ref()?.users());
        self.disk.iter().map(AsFd::as_fd).chain(maps)
    }

    /// Its device nodes are bound into it.
    pub(crate) fn binds_devices(&self) -> bool {
        self.has_own_dev() && !self.bound.is_empty()
    }
}

#[derive(Debug)]
pub(crate) struct MountPlan {
    pub(crate) destination: String,
    /// It is a file system of a namespace of the guest, which the container's user namespace has no power over.
    pub(crate) is_the_guest_s: bool,
    pub(crate) what: MountKind,
    pub(crate) options: MountOptions,
    pub(crate) id_map: Option<IdMapPlan>,
}

impl MountPlan {
    /// What is mounted comes from the guest.
    pub(crate) fn has_source(&self) -> bool {
        self.is_the_guest_s || !matches!(self.what, MountKind::FileSystem { .. })
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum MountKind {
    /// A directory or file of the guest.
    Bind {
        source: CString,
        recursive: bool,
    },
    FileSystem {
        kind: CString,
        parameters: Vec<(CString, Option<CString>)>,
    },
    /// The pod's shared memory, of that size if it is not there yet.
    Shm {
        size: u64,
    },
    /// A directory of the guest, of which the container has a copy at `copy`.
    Live {
        source: CString,
        copy: CString,
    },
}

impl ContainerPlan {
    pub(crate) fn new(spec: ContainerSpec) -> Result<Self, AgentError> {
        if !validate_id(&spec.id) {
            return Err(invalid(format_args!("id: {:?} cannot name a container", spec.id)));
        }
        let user_namespace = spec.user_namespace.map(|namespace| user_namespace::checked(*namespace));
        let user_namespace = user_namespace.transpose()?;
        let namespaces = namespaces(&spec.namespaces, user_namespace.is_some());
        spec.hostname.as_deref().map_or(Ok(()), check_hostname)?;
        spec.domainname.as_deref().map_or(Ok(()), |name| check_name("domainname", name))?;
        let lists = [
            (spec.mounts.len(), MAX_MOUNTS, "mounts"),
            (spec.masked_paths.len(), MAX_PATHS, "masked_paths"),
            (spec.readonly_paths.len(), MAX_PATHS, "readonly_paths"),
            (spec.devices.len(), MAX_PATHS, "devices"),
        ];
        if let Some((length, most, field)) = lists.into_iter().find(|(length, most, _)| length > most) {
            return Err(invalid(format_args!("{field}: {length} are too many, at most {most} are allowed")));
        }
        check_absolute("rootfs", &spec.rootfs)?;
        for path in &spec.masked_paths {
            check_absolute("masked_paths", path)?;
        }
        for path in &spec.readonly_paths {
            check_absolute("readonly_paths", path)?;
        }
        let devices = devices(spec.devices)?;
        let bound = user_namespace.as_ref().map(|namespace| user_namespace::nodes(&devices, namespace));
        Ok(Self {
            namespaces,
            hostname: spec.hostname,
            domainname: spec.domainname,
            time_offsets: time_offsets(&spec.time_offsets, namespaces)?,
            root: RootPlan {
                path: c_string("rootfs", spec.rootfs)?,
                disk: None,
                readonly: spec.root_readonly,
                mounts: mounts(&spec.id, spec.mounts, namespaces)?,
                masked: spec.masked_paths,
                readonly_paths: spec.readonly_paths,
                devices,
                bound: bound.transpose()?.unwrap_or_default(),
            },
            sysctls: sysctls(spec.sysctls)?,
            limits: Limits::new(spec.resources)?,
            device_filter: DeviceFilter::new(&spec.device_rules)?,
            hooks: spec.hooks.map_or_else(|| Ok(HooksPlan::default()), |hooks| HooksPlan::new(*hooks))?,
            process: ProcessPlan::new(spec.process, user_namespace.as_ref())?,
            user_namespace,
        })
    }
}

fn namespaces(wanted: &[Namespace], user: bool) -> CloneFlags {
    let flag = |namespace: &Namespace| match namespace {
        Namespace::Pid => CloneFlags::CLONE_NEWPID,
        Namespace::Ipc => CloneFlags::CLONE_NEWIPC,
        Namespace::Uts => CloneFlags::CLONE_NEWUTS,
        Namespace::Network => CloneFlags::CLONE_NEWNET,
        Namespace::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        Namespace::Time => NEW_TIME,
    };
    let always = if user { CloneFlags::CLONE_NEWUSER } else { CloneFlags::empty() };
    wanted.iter().map(flag).fold(CloneFlags::CLONE_NEWNS | always, CloneFlags::union)
}

fn time_offsets(wanted: &[TimeOffset], namespaces: CloneFlags) -> Result<String, AgentError> {
    if !wanted.is_empty() && !namespaces.contains(NEW_TIME) {
        return Err(invalid("time_offsets: the container has no time namespace"));
    }
    let line = |offset: &TimeOffset| format!("{} {} {}\n", offset.clock, offset.seconds, offset.nanoseconds);
    Ok(wanted.iter().map(line).collect())
}

pub(crate) fn check_hostname(hostname: &str) -> Result<(), AgentError> {
    check_name("hostname", hostname)
}

fn check_name(field: &str, name: &str) -> Result<(), AgentError> {
    if name.is_empty() || name.len() > MAX_HOSTNAME || name.contains(['\0', '\n', '/']) {
        return Err(invalid(format_args!("{field}: {name:?} is not one of 1 to {MAX_HOSTNAME} bytes")));
    }
    Ok(())
}

fn check_absolute(field: &str, path: &str) -> Result<(), AgentError> {
    if path.starts_with('/') && !path.contains('\0') {
        return Ok(());
    }
    Err(invalid(format_args!("{field}: {path:?} is not an absolute path")))
}

/// The container's own nodes. Outside its `/dev` they would be nodes of the share, which are no devices there.
fn devices(wanted: Vec<Device>) -> Result<Vec<Device>, AgentError> {
    for Device { path, .. } in &wanted {
        let below = path.strip_prefix("/dev/").filter(|_| !path.contains('\0'));
        if !below.is_some_and(|below| below.split('/').all(|name| !matches!(name, "" | "." | ".."))) {
            return Err(invalid(format_args!("devices: {path:?} is not a path below /dev")));
        }
    }
    Ok(wanted)
}

/// The spec's mounts in their order; a container that brings no `/dev` gets one, for its device nodes must not be
/// made in its image.
fn mounts(id: &str, wanted: Vec<Mount>, namespaces: CloneFlags) -> Result<Vec<MountPlan>, AgentError> {
    let is_dev = |mount: &Mount| mount.destination.trim_end_matches('/') == "/dev";
    let dev = Mount {
        destination: "/dev".into(),
        kind: "tmpfs".into(),
        source: "tmpfs".into(),
        options: ["nosuid", "strictatime", "mode=755", "size=65536k"].map(String::from).into(),
        id_map: None,
    };
    let missing = if wanted.iter().any(is_dev) { None } else { Some(dev) };
    let mut mounts = missing.into_iter().chain(wanted).enumerate();
    mounts.try_fold(Vec::new(), |mut plans, (index, wanted)| {
        let mut plan = mount(wanted, || live::place(id, index))?;
        plan.is_the_guest_s = is_the_guest_s(&plan.what, namespaces);
        plans.push(plan);
        Ok(plans)
    })
}

/// `place` is where a copy goes, if it is a live volume.
fn mount(wanted: Mount, place: impl FnOnce() -> String) -> Result<MountPlan, AgentError> {
    let Mount { destination, kind, source, options, id_map } = wanted;
    check_absolute("mounts: destination", &destination)?;
    let mut options = MountOptions::parse(&options);
    let parameters = std::mem::take(&mut options.parameters);
    let bind = if kind == "bind" { options.bind.or(Some(Bind { recursive: false })) } else { options.bind };
    let is_live = kind == MOUNT_LIVE;
    let what = if kind == MOUNT_SHM {
        MountKind::Shm { size: shm::size(&parameters)? }
    } else if is_live || bind.is_some() {
        check_absolute("mounts: source", &source)?;
        if let Some((name, _)) = parameters.first() {
            return Err(invalid(format_args!(
                "mounts: a bind mount has no option {name:?} (destination {destination})"
            )));
        }
        let source = c_string("mounts: source", source)?;
        if is_live {
            // What is written into a copy would be lost at the next change of the volume.
            options.attributes.set |= libc::MOUNT_ATTR_RDONLY;
            options.attributes.clear &= !libc::MOUNT_ATTR_RDONLY;
            MountKind::Live { source, copy: c_string("id", place())? }
        } else {
            MountKind::Bind { source, recursive: bind.is_some_and(|bind| bind.recursive) }
        }
    } else {
        file_system(&kind, source, parameters)?
    };
    let is_tmpfs = matches!(&what, MountKind::FileSystem { kind, .. } if kind.as_c_str() == c"tmpfs");
    if options.copy_up && !is_tmpfs {
        return Err(invalid(format_args!(
            "mounts: {destination} is no tmpfs, which tmpcopyup is an option of"
        )));
    }
    let id_map = id_map.map(|map| IdMapPlan::new(*map, &what, &destination)).transpose()?;
    Ok(MountPlan { destination, is_the_guest_s: false, what, options, id_map })
}

fn file_system(
    kind: &str,
    source: String,
    parameters: Vec<(String, Option<String>)>,
) -> Result<MountKind, AgentError> {
    // OCI's name for whichever version the system has; a guest has version 2.
    let kind = if kind == "cgroup" { "cgroup2" } else { kind };
    let source = (!source.is_empty()).then(|| ("source".to_string(), Some(source)));
    let parameters = source.into_iter().chain(parameters).map(|(name, value)| {
        let value = value.map(|value| c_string("mounts: options", value)).transpose()?;
        Ok((c_string("mounts: options", name)?, value))
    });
    Ok(MountKind::FileSystem {
        kind: c_string("mounts: type", kind.into())?,
        parameters: parameters.collect::<Result<_, AgentError>>()?,
    })
}

/// Kernel parameters as paths below `/proc/sys`, and their values.
pub(crate) fn sysctls(wanted: Vec<(String, String)>) -> Result<Vec<(String, String)>, AgentError> {
    if wanted.len() > MAX_PATHS {
        let length = wanted.len();
        return Err(invalid(format_args!("sysctls: {length} are too many, at most {MAX_PATHS} are allowed")));
    }
    wanted.into_iter().map(sysctl).collect()
}

/// `net.ipv4.ip_forward` names `net/ipv4/ip_forward`; a name with slashes is taken as it is, since names of interfaces
/// may have dots.
fn sysctl((name, value): (String, String)) -> Result<(String, String), AgentError> {
    let path = if name.contains('/') { name.clone() } else { name.replace('.', "/") };
    let steps = path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if !steps || path.contains('\0') {
        return Err(invalid(format_args!("sysctls: {name:?} is not the name of a kernel parameter")));
    }
    Ok((path, value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use krx_proto::{ErrorKind, ProcessSpec};

    fn spec() -> ContainerSpec {
        ContainerSpec {
            id: "web".into(),
            rootfs: "/run/krx/share/web".into(),
            process: ProcessSpec { args: vec!["true".into()], cwd: "/".into(), ..Default::default() },
            ..Default::default()
        }
    }

    fn refused(spec: ContainerSpec, field: &str) {
        let error = ContainerPlan::new(spec).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid);
        assert!(error.message.starts_with(field), "{}", error.message);
    }

    fn mounted(kind: &str, source: &str, options: &[&str]) -> ContainerSpec {
        let mount = Mount {
            destination: "/m".into(),
            kind: kind.into(),
            source: source.into(),
            options: options.iter().map(ToString::to_string).collect(),
            id_map: None,
        };
        ContainerSpec { mounts: vec![mount], ..spec() }
    }

    #[test]
    fn a_container_always_has_a_dev_of_its_own() {
        let plan = ContainerPlan::new(spec()).unwrap();
        assert_eq!(plan.root.mounts[0].destination, "/dev");
        let mut own = mounted("tmpfs", "tmpfs", &[]);
        own.mounts[0].destination = "/dev/".into();
        assert_eq!(ContainerPlan::new(own).unwrap().root.mounts.len(), 1);
    }

    #[test]
    fn every_bad_field_is_named() {
        refused(ContainerSpec { id: "../x".into(), ..spec() }, "id:");
        refused(ContainerSpec { rootfs: "rel".into(), ..spec() }, "rootfs:");
        refused(ContainerSpec { rootfs: "/a\0b".into(), ..spec() }, "rootfs:");
        refused(ContainerSpec { masked_paths: vec!["x".into()], ..spec() }, "masked_paths:");
        refused(ContainerSpec { readonly_paths: vec!["x".into()], ..spec() }, "readonly_paths:");
        refused(ContainerSpec { sysctls: vec![("a/../b".into(), "1".into())], ..spec() }, "sysctls:");
        refused(ContainerSpec { process: ProcessSpec::default(), ..spec() }, "process.args:");
        for path in ["/etc/null", "/dev/", "/dev/../x", "dev/null", "/dev/a\0b"] {
            let (kind, path) = (krx_proto::DeviceKind::Char, path.into());
            let device = Device { path, kind, major: 1, minor: 3, mode: 0o666, uid: 0, gid: 0 };
            refused(ContainerSpec { devices: vec![device], ..spec() }, "devices:");
        }
        let offset = TimeOffset { clock: 1, seconds: 1, nanoseconds: 0 };
        refused(ContainerSpec { time_offsets: vec![offset], ..spec() }, "time_offsets:");
        refused(mounted("bind", "rel", &[]), "mounts: source:");
        refused(mounted("bind", "/s", &["size=1"]), "mounts:");
        refused(mounted("tm\0pfs", "", &[]), "mounts: type:");
        refused(mounted("bind", "/s", &["tmpcopyup"]), "mounts:");
        for kind in ["bind", "tmpfs"] {
            let mut mapped = mounted(kind, "/s", &[]);
            mapped.mounts[0].id_map = Some(Box::default());
            refused(mapped, "mounts: ");
        }
    }

    #[test]
    fn a_hostname_is_bounded() {
        let with = |name: &str| ContainerSpec {
            hostname: Some(name.into()),
            namespaces: vec![Namespace::Uts],
            ..spec()
        };
        refused(with(&"h".repeat(65)), "hostname:");
        refused(with(""), "hostname:");
        assert!(ContainerPlan::new(with("web-1")).is_ok());
    }

    #[test]
    fn lists_are_bounded() {
        let paths = vec!["/x".to_string(); MAX_PATHS + 1];
        refused(ContainerSpec { masked_paths: paths, ..spec() }, "masked_paths:");
    }

    #[test]
    fn bind_is_known_by_type_or_by_option() {
        for (kind, options, recursive) in
            [("bind", &[] as &[&str], false), ("none", &["rbind"], true), ("bind", &["rbind"], true)]
        {
            let plan = ContainerPlan::new(mounted(kind, "/s", options)).unwrap();
            let expected = MountKind::Bind { source: c"/s".into(), recursive };
            assert_eq!(plan.root.mounts[1].what, expected);
        }
    }

    #[test]
    fn the_two_kinds_of_krx_are_bounded() {
        let plan = ContainerPlan::new(mounted("shm", "shm", &["rbind", "rprivate", "size=4096"])).unwrap();
        assert_eq!(plan.root.mounts[1].what, MountKind::Shm { size: 4096 });
        refused(mounted("shm", "shm", &["size=x"]), "mounts:");
        refused(mounted("shm", "shm", &["mode=777"]), "mounts:");
        let plan = ContainerPlan::new(mounted("live", "/s", &["rbind", "rw"])).unwrap();
        let copy = CString::new(format!("/run/krx/live/{}-1", spec().id)).unwrap();
        assert_eq!(plan.root.mounts[1].what, MountKind::Live { source: c"/s".into(), copy });
        let attributes = plan.root.mounts[1].options.attributes;
        assert_eq!((attributes.set, attributes.clear), (libc::MOUNT_ATTR_RDONLY, 0));
        refused(mounted("live", "rel", &[]), "mounts: source:");
        refused(mounted("live", "/s", &["size=1"]), "mounts:");
    }

    #[test]
    fn cgroup_means_version_2() {
        let plan = ContainerPlan::new(mounted("cgroup", "cgroup", &["ro"])).unwrap();
        let MountKind::FileSystem { kind, parameters } = &plan.root.mounts[1].what else { panic!() };
        assert_eq!(kind.as_c_str(), c"cgroup2");
        assert_eq!(parameters[..], [(c"source".into(), Some(c"cgroup".into()))]);
    }

    #[test]
    fn sysctl_names_become_paths() {
        let named = |name: &str| sysctl((name.into(), "1".into())).map(|(path, _)| path);
        assert_eq!(named("net.ipv4.ip_forward").unwrap(), "net/ipv4/ip_forward");
        assert_eq!(named("net/ipv4/conf/eth0.1/mtu").unwrap(), "net/ipv4/conf/eth0.1/mtu");
        assert!(named("").is_err());
        assert!(named("net..x").is_err());
    }
}
