//! Options of `run` that say what a container may do and how much it may use: docker's, with docker's meaning. Pure, but for
//! the reading of a profile.

use std::path::Path;

use clap::Args;
use krx_proto::{ContainerSpec, Limit, Mount, ProcessSpec, Rlimit};
use krx_sandbox::{bundle, capability};

use crate::error::CliError;
use crate::parse;

/// Every capability.
const ALL: &str = "ALL";
/// Resources of setrlimit(2) by the names that docker has for them: the place is the number of `RLIMIT_*`.
const RESOURCES: [&str; 16] = [
    "cpu",
    "fsize",
    "data",
    "stack",
    "core",
    "rss",
    "nproc",
    "nofile",
    "memlock",
    "as",
    "locks",
    "sigpending",
    "msgqueue",
    "nice",
    "rtprio",
    "rttime",
];
/// What a tmpfs is unless its options say otherwise.
const TMPFS: [&str; 3] = ["nosuid", "nodev", "noexec"];
const TMPFS_FLAGS: [&str; 8] = ["rw", "ro", "exec", "noexec", "suid", "nosuid", "dev", "nodev"];
const TMPFS_VALUES: [&str; 5] = ["size", "mode", "uid", "gid", "nr_inodes"];

#[derive(Debug, Default, Args)]
pub(crate) struct Confinement {
    /// Capability the container has besides, or ALL
    #[arg(long, value_name = "CAPABILITY")]
    pub(crate) cap_add: Vec<String>,
    /// Capability the container does not have, or ALL
    #[arg(long, value_name = "CAPABILITY")]
    pub(crate) cap_drop: Vec<String>,
    /// Most processes in the container; -1 for no limit
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) pids_limit: Option<String>,
    /// Limit of a resource by its name in setrlimit(2), such as nofile=1024:4096; -1 for none
    #[arg(long = "ulimit", value_name = "NAME=SOFT[:HARD]")]
    pub(crate) ulimits: Vec<String>,
    /// no-new-privileges[=false]: whether programs may change their user; seccomp=FILE: filter of system calls
    #[arg(long = "security-opt", value_name = "OPTION")]
    pub(crate) security: Vec<String>,
    /// Empty file system in the VM's memory
    #[arg(long, value_name = "DIR[:OPTIONS]")]
    pub(crate) tmpfs: Vec<String>,
}

impl Confinement {
    /// Changes `spec` as the options say. To be called before volumes and the user are added.
    pub(crate) fn apply(&self, spec: &mut ContainerSpec) -> Result<(), CliError> {
        if let Some(sets) = &mut spec.process.capabilities {
            let (add, drop) = (masks(&self.cap_add)?, masks(&self.cap_drop)?);
            let change = |set: u64| match (add == capability::all(), drop == capability::all()) {
                (false, false) => set & !drop | add,
                (true, _) => add & !drop,
                (false, true) => add,
            };
            for set in [&mut sets.bounding, &mut sets.effective, &mut sets.permitted] {
                *set = change(*set);
            }
            sets.inheritable &= sets.bounding;
            sets.ambient &= sets.bounding;
        }
        if let Some(text) = &self.pids_limit {
            spec.resources.pids_max = Some(pids(text)?);
        }
        for text in &self.ulimits {
            let limit = ulimit(text)?;
            spec.process.rlimits.retain(|earlier| earlier.resource != limit.resource);
            spec.process.rlimits.push(limit);
        }
        for text in &self.security {
            security(text, &mut spec.process)?;
        }
        for text in &self.tmpfs {
            let mount = tmpfs(text)?;
            // In its place: what is mounted below it comes after it.
            match spec.mounts.iter_mut().find(|earlier| earlier.destination == mount.destination) {
                Some(earlier) => *earlier = mount,
                None => spec.mounts.push(mount),
            }
        }
        Ok(())
    }

    /// Whether one of the file systems in memory is to be mounted there.
    pub(crate) fn has_tmpfs(&self, destination: &str) -> bool {
        self.tmpfs.iter().any(|text| tmpfs(text).is_ok_and(|mount| mount.destination == destination))
    }
}

fn usage<T>(text: String) -> Result<T, CliError> {
    Err(CliError::Usage(text))
}

fn masks(names: &[String]) -> Result<u64, CliError> {
    names.iter().try_fold(0, |mask, name| {
        if name.eq_ignore_ascii_case(ALL) {
            return Ok(capability::all());
        }
        match capability::named(name) {
            Some(one) => Ok(mask | one),
            None => {
                usage(format!("Capability `{name}` is not known: give a name of capabilities(7), or ALL"))
            }
        }
    })
}

fn pids(text: &str) -> Result<Limit, CliError> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(Limit::Max),
        Ok(count @ 1..) => Ok(Limit::At(count.cast_unsigned())),
        _ => usage(format!("Limit of processes `{text}` cannot be: give a number from 1 on, or -1 for none")),
    }
}

fn ulimit(text: &str) -> Result<Rlimit, CliError> {
    let number = |text: &str| if text == "-1" { Some(u64::MAX) } else { text.parse::<u64>().ok() };
    let parsed = text.split_once('=').and_then(|(name, values)| {
        let resource = RESOURCES.iter().zip(0..).find(|(known, _)| **known == name)?.1;
        let (soft, hard) = values.split_once(':').unwrap_or((values, values));
        Some(Rlimit { resource, soft: number(soft)?, hard: number(hard)? })
    });
    match parsed {
        Some(limit) if limit.soft <= limit.hard => Ok(limit),
        Some(_) => usage(format!("Limit `{text}` cannot be: its soft part is above its hard one")),
        None => usage(format!(
            "Limit `{text}` cannot be: give NAME=SOFT[:HARD], NAME being one of {}",
            RESOURCES.join(" ")
        )),
    }
}

fn security(text: &str, process: &mut ProcessSpec) -> Result<(), CliError> {
    match text {
        "no-new-privileges" | "no-new-privileges=true" | "no-new-privileges:true" => {
            process.no_new_privileges = true;
        }
        "no-new-privileges=false" | "no-new-privileges:false" => process.no_new_privileges = false,
        "seccomp=unconfined" | "seccomp:unconfined" => process.seccomp = None,
        _ => {
            let Some(path) = text.strip_prefix("seccomp=").or_else(|| text.strip_prefix("seccomp:")) else {
                return usage(format!(
                    "Security option `{text}` is not known: there are no-new-privileges[=false] and seccomp=FILE"
                ));
            };
            let profile = parse::small_file("Seccomp profile", Path::new(path))?;
            let bounding = process.capabilities.map_or_else(capability::all, |sets| sets.bounding);
            process.seccomp = bundle::seccomp_profile(&profile, bounding).map_err(|error| {
                CliError::Usage(format!("Seccomp profile {path} cannot be used: {error}"))
            })?;
        }
    }
    Ok(())
}

fn tmpfs(text: &str) -> Result<Mount, CliError> {
    let (destination, given) = text.split_once(':').unwrap_or((text, ""));
    let odd = |part: &str| part.is_empty() || part == "." || part == "..";
    let Some(path) = destination.strip_prefix('/').map(|path| path.trim_end_matches('/')) else {
        return usage(format!(
            "Directory `{destination}` of --tmpfs is not an absolute path in the container"
        ));
    };
    if path.split('/').any(odd) || path.contains('\0') {
        return usage(format!(
            "Directory `{destination}` of --tmpfs has to be below /, without `.` and `..`"
        ));
    }
    let known = |option: &str| match option.split_once('=') {
        Some((name, value)) => {
            TMPFS_VALUES.contains(&name) && value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'%')
        }
        None => TMPFS_FLAGS.contains(&option),
    };
    let given: Vec<_> = given.split(',').filter(|option| !option.is_empty()).collect();
    if let Some(option) = given.iter().find(|option| !known(option)) {
        return usage(format!(
            "Option `{option}` of --tmpfs is not known: there are {}, and {} with a value",
            TMPFS_FLAGS.join(" "),
            TMPFS_VALUES.join(" ")
        ));
    }
    let options = TMPFS.iter().chain(&given).map(ToString::to_string).collect();
    Ok(Mount {
        destination: format!("/{path}"),
        kind: "tmpfs".into(),
        source: "tmpfs".into(),
        options,
        id_map: None,
    })
}

#[cfg(test)]
mod tests {
    use krx_sandbox::default_spec;

    use super::*;

    fn applied(options: &Confinement) -> Result<ContainerSpec, CliError> {
        let mut spec = default_spec::container("c");
        options.apply(&mut spec).map(|()| spec)
    }

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    fn capabilities(add: &[&str], drop: &[&str]) -> u64 {
        let options =
            Confinement { cap_add: strings(add), cap_drop: strings(drop), ..Confinement::default() };
        let sets = applied(&options).unwrap().process.capabilities.unwrap();
        assert_eq!((sets.effective, sets.permitted), (sets.bounding, sets.bounding));
        sets.bounding
    }

    #[test]
    fn capabilities_are_added_and_dropped_as_docker_does() {
        let usual = capability::mask(&capability::DEFAULT);
        assert_eq!(capabilities(&[], &[]), usual);
        assert_eq!(capabilities(&["sys_admin"], &["CAP_CHOWN"]), (usual | 1 << 21) & !1);
        assert_eq!(capabilities(&["net_bind_service"], &["all"]), 1 << 10);
        assert_eq!(capabilities(&["ALL"], &[]), capability::all());
        assert_eq!(capabilities(&["ALL"], &["SYS_ADMIN"]), capability::all() & !(1 << 21));
        assert_eq!(capabilities(&[], &["ALL"]), 0);
        let odd = Confinement { cap_add: strings(&["nonsense"]), ..Confinement::default() };
        assert!(applied(&odd).is_err());
    }

    #[test]
    fn limits_have_names_and_an_order() {
        let of = |text: &str| ulimit(text).map(|limit| (limit.resource, limit.soft, limit.hard));
        assert_eq!(of("nofile=10:20").unwrap(), (7, 10, 20));
        assert_eq!(of("core=-1").unwrap(), (4, u64::MAX, u64::MAX));
        for bad in ["", "nofile", "nofile=", "nofile=2:1", "nofile=1:2:3", "files=1", "=1", "cpu=-2"] {
            assert!(ulimit(bad).is_err(), "{bad}");
        }
        let options = Confinement { ulimits: strings(&["nofile=5", "nofile=6"]), ..Confinement::default() };
        let limits = applied(&options).unwrap().process.rlimits;
        assert_eq!(limits, [Rlimit { resource: 7, soft: 6, hard: 6 }]);
        assert!(pids("0").is_err() && pids("-2").is_err() && pids("x").is_err());
        assert_eq!((pids("-1").unwrap(), pids("7").unwrap()), (Limit::Max, Limit::At(7)));
    }

    #[test]
    fn a_tmpfs_takes_the_place_of_a_default_one() {
        let options = Confinement { tmpfs: strings(&["/dev/shm/:size=1g,exec"]), ..Confinement::default() };
        let mounts = applied(&options).unwrap().mounts;
        let shm: Vec<_> = mounts.iter().filter(|mount| mount.destination == "/dev/shm").collect();
        assert_eq!(shm.len(), 1);
        assert_eq!(shm[0].options, ["nosuid", "nodev", "noexec", "size=1g", "exec"]);
        for bad in ["", "x", "/", "/a/../b", "/a:bind", "/a:size=1,source=/x", "/a:size=1 2", "/a\0"] {
            assert!(tmpfs(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn privileges_are_gained_only_where_that_is_asked_for() {
        let of = |options: &[&str]| {
            let options = Confinement { security: strings(options), ..Confinement::default() };
            applied(&options).map(|spec| spec.process.no_new_privileges)
        };
        assert!(of(&[]).unwrap() && of(&["no-new-privileges"]).unwrap());
        assert!(!of(&["no-new-privileges=false"]).unwrap());
        assert!(of(&["seccomp=unconfined"]).unwrap());
        assert!(of(&["apparmor=x"]).is_err());
        let missing = of(&["seccomp=/no/such/file"]).unwrap_err().to_string();
        assert!(missing.contains("/no/such/file"), "{missing}");
    }
}
