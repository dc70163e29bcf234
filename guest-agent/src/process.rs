//! A process as the host describes it, judged and made ready for exec; and the exec, with its search of `PATH`.

use std::ffi::{CStr, CString};
use std::os::fd::BorrowedFd;

use krx_proto::{
    AgentError, ErrorKind, ProcessSpec, Rlimit, Scheduling, TerminalSize, User, UserNamespace, guest_id,
};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{Gid, Pid, Uid, execve};

use crate::credentials::Credentials;
use crate::error::{Doing, StepError, invalid};
use crate::seccomp::Filter;
use crate::{guest, sys};

/// Where programs are looked for when the container's environment has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Linux has 16 resources; a longer list only repeats some.
const MAX_RLIMITS: usize = 64;
/// Linux' `NGROUPS_MAX`.
const MAX_GROUPS: usize = 65_536;

/// Soft limit of descriptors a process starts with: what Linux gives, programs with select(2) rely on it.
const USUAL_DESCRIPTORS: u64 = 1024;

/// To setresuid(2) and its like -1 means "keep what is", which would be root.
const NO_CHANGE: u32 = u32::MAX;

/// A process ready to be made.
#[derive(Debug)]
pub(crate) struct ProcessPlan {
    args: Vec<CString>,
    env: Vec<CString>,
    /// The paths to try, in order.
    candidates: Vec<CString>,
    pub(crate) cwd: String,
    pub(crate) credentials: Credentials,
    /// Its user and group as the guest numbers them.
    pub(crate) owner: (Uid, Gid),
    pub(crate) umask: u32,
    rlimits: Vec<Rlimit>,
    oom_score_adj: Option<i32>,
    pub(crate) terminal: Option<TerminalSize>,
    pub(crate) stdin: bool,
    seccomp: Option<Filter>,
    scheduling: Scheduling,
}

impl ProcessPlan {
    /// `namespace` is the user namespace that it is to be in, unless that is the guest's.
    pub(crate) fn new(spec: ProcessSpec, namespace: Option<&UserNamespace>) -> Result<Self, AgentError> {
        /// What a process has unless told otherwise.
        const USUAL_UMASK: u32 = 0o022;
        let program = spec.args.first().filter(|program| !program.is_empty());
        let program = program.ok_or_else(|| invalid("process.args: names no program"))?;
        if !spec.cwd.is_empty() && (!spec.cwd.starts_with('/') || spec.cwd.contains('\0')) {
            return Err(invalid(format_args!("process.cwd: {:?} is not an absolute path", spec.cwd)));
        }
        if spec.rlimits.len() > MAX_RLIMITS || spec.user.additional_gids.len() > MAX_GROUPS {
            return Err(invalid("process: too many rlimits or additional groups"));
        }
        let ids = spec.user.additional_gids.iter().chain([&spec.user.uid, &spec.user.gid]);
        if ids.into_iter().any(|id| *id == NO_CHANGE) {
            return Err(invalid(format_args!("process.user: {NO_CHANGE} is nobody's id")));
        }
        let path = spec.env.iter().rev().find_map(|variable| variable.strip_prefix("PATH="));
        let candidates = candidates(program, path.unwrap_or(DEFAULT_PATH));
        Ok(Self {
            candidates: c_strings("process.args", candidates)?,
            args: c_strings("process.args", spec.args)?,
            env: c_strings("process.env", spec.env)?,
            cwd: if spec.cwd.is_empty() { "/".into() } else { spec.cwd },
            umask: spec.user.umask.unwrap_or(USUAL_UMASK) & 0o777,
            owner: owner(&spec.user, namespace)?,
            credentials: Credentials {
                user: spec.user,
                capabilities: spec.capabilities,
                no_new_privileges: spec.no_new_privileges,
                filtered: spec.seccomp.is_some(),
            },
            rlimits: spec.rlimits,
            oom_score_adj: spec.oom_score_adj,
            terminal: spec.terminal,
            stdin: spec.stdin,
            seccomp: spec.seccomp.as_ref().map(Filter::new).transpose()?,
            scheduling: spec.scheduling,
        })
    }

    /// What comes last before the exec: the filter has to let through no more than the exec, where nothing is left to
    /// be given up.
    pub(crate) fn confine(&self) -> Result<(), StepError> {
        self.seccomp.iter().try_for_each(Filter::install)?;
        self.credentials.settle()
    }

    /// Becomes the program. Returns only with why it could not.
    pub(crate) fn exec(&self) -> AgentError {
        let mut worst = Errno::ENOENT;
        for candidate in &self.candidates {
            match execve(candidate, &self.args, &self.env) {
                Ok(never) => match never {},
                // Another directory of the path may have it.
                Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                // So may one after this, but if none has, this is what to tell (as execvp(3) does).
                Err(Errno::EACCES) => worst = Errno::EACCES,
                Err(error) => return exec_error(candidate, error),
            }
        }
        exec_error(&self.args[0], worst)
    }

    /// Sets what it takes privileges in the guest to set: resource limits, when the process runs, and how much it is
    /// worth to the OOM killer. `pid` is a process of one thread, 0 the calling one; `proc` is the guest's `/proc`.
    pub(crate) fn govern(&self, pid: i32, proc: BorrowedFd<'_>) -> Result<(), StepError> {
        let hard = getrlimit(Resource::RLIMIT_NOFILE).doing(|| "Cannot read the limit of descriptors")?.1;
        sys::process::set_rlimit(pid, libc::RLIMIT_NOFILE, USUAL_DESCRIPTORS.min(hard), hard)
            .doing(|| "Cannot set the limit of descriptors")?;
        for Rlimit { resource, soft, hard } in &self.rlimits {
            let doing = || format!("Cannot set resource limit {resource} to {soft} (hard limit {hard})");
            sys::process::set_rlimit(pid, *resource, *soft, *hard).doing(doing)?;
        }
        self.schedule(pid)?;
        if let Some(score) = self.oom_score_adj {
            let of = if pid == 0 { "self".to_string() } else { pid.to_string() };
            guest::write_file(proc, &format!("{of}/oom_score_adj"), &score.to_string())
                .doing(|| format!("Cannot set oom_score_adj to {score}"))?;
        }
        Ok(())
    }

    /// Sets when a process runs, which its exec keeps.
    fn schedule(&self, pid: i32) -> Result<(), StepError> {
        let Scheduling { policy, io_priority, cpus, .. } = &self.scheduling;
        if let Some(policy) = policy {
            sys::process::set_scheduler(pid, policy)
                .doing(|| format!("Cannot set the scheduler to {policy:?}"))?;
        }
        if let Some(priority) = io_priority {
            sys::process::set_io_priority(pid, *priority)
                .doing(|| format!("Cannot set the I/O priority to {priority:#x}"))?;
        }
        if let Some(mask) = cpus {
            let mut set = CpuSet::new();
            let wanted = (0..64_usize).filter(|cpu| mask >> cpu & 1 == 1);
            let all = wanted.into_iter().try_for_each(|cpu| set.set(cpu));
            all.and_then(|()| sched_setaffinity(Pid::from_raw(pid), &set))
                .doing(|| format!("Cannot run on the CPUs {mask:#x} of the guest"))?;
        }
        Ok(())
    }

    /// Sets as what the calling process runs, which its exec keeps.
    pub(crate) fn take_personality(&self) -> Result<(), StepError> {
        self.scheduling.personality.map_or(Ok(()), |domain| {
            sys::process::set_personality(domain)
                .doing(|| format!("Cannot set the personality to {domain:#x}"))
        })
    }
}

/// The user and group in the guest. In a user namespace nobody can have an ID that is not mapped.
fn owner(user: &User, namespace: Option<&UserNamespace>) -> Result<(Uid, Gid), AgentError> {
    let Some(UserNamespace { uids, gids }) = namespace else {
        return Ok((Uid::from_raw(user.uid), Gid::from_raw(user.gid)));
    };
    let missing = |field: &str, id: u32| {
        invalid(format_args!("process.user.{field}: {id} is not mapped in the container's user namespace"))
    };
    if let Some(id) = user.additional_gids.iter().find(|id| guest_id(gids, **id).is_none()) {
        return Err(missing("additional_gids", *id));
    }
    let uid = guest_id(uids, user.uid).ok_or_else(|| missing("uid", user.uid))?;
    let gid = guest_id(gids, user.gid).ok_or_else(|| missing("gid", user.gid))?;
    Ok((Uid::from_raw(uid), Gid::from_raw(gid)))
}

fn exec_error(program: &CStr, error: Errno) -> AgentError {
    let program = program.to_string_lossy();
    match error {
        Errno::ENOENT | Errno::ENOTDIR => AgentError::new(
            ErrorKind::CommandNotFound,
            format_args!("{program}: no such program in the container, or its interpreter is missing"),
        ),
        Errno::ENOEXEC => AgentError::new(
            ErrorKind::NotExecutable,
            format_args!("{program}: neither a program for this machine nor a script that begins with #!"),
        ),
        _ => AgentError::new(
            ErrorKind::NotExecutable,
            format_args!("{program}: cannot be executed: {}", error.desc()),
        ),
    }
}

/// The paths a program name stands for.
fn candidates(program: &str, path: &str) -> Vec<String> {
    if program.contains('/') {
        return vec![program.into()];
    }
    let directory = |directory: &str| match directory {
        // An empty entry is the working directory, by POSIX.
        "" => format!("./{program}"),
        _ => format!("{}/{program}", directory.trim_end_matches('/')),
    };
    path.split(':').map(directory).collect()
}

/// A string for the kernel, which ends it at the first NUL.
pub(crate) fn c_string(field: &str, text: String) -> Result<CString, AgentError> {
    CString::new(text).map_err(|_| invalid(format_args!("{field}: a NUL byte is not allowed")))
}

pub(crate) fn c_strings(field: &str, texts: Vec<String>) -> Result<Vec<CString>, AgentError> {
    texts.into_iter().map(|text| c_string(field, text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use krx_proto::IdMapping;

    fn spec(program: &str) -> ProcessSpec {
        ProcessSpec { args: vec![program.into()], cwd: "/".into(), ..Default::default() }
    }

    fn refused(spec: ProcessSpec, field: &str) {
        let error = ProcessPlan::new(spec, None).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid);
        assert!(error.message.starts_with(field), "{}", error.message);
    }

    #[test]
    fn a_bare_name_is_looked_for_in_the_path() {
        assert_eq!(candidates("ls", "/bin:/usr/bin/::rel"), ["/bin/ls", "/usr/bin/ls", "./ls", "rel/ls"]);
        assert_eq!(candidates("./ls", "/bin"), ["./ls"]);
        assert_eq!(candidates("/bin/ls", ""), ["/bin/ls"]);
    }

    #[test]
    fn the_last_path_of_the_environment_counts() {
        let env = vec!["PATH=/a".into(), "XPATH=/c".into(), "PATH=/b".into()];
        let plan = ProcessPlan::new(ProcessSpec { env, ..spec("x") }, None).unwrap();
        assert_eq!(plan.candidates, [c"/b/x".into()] as [CString; 1]);
    }

    #[test]
    fn bad_fields_are_named() {
        refused(ProcessSpec::default(), "process.args:");
        refused(spec(""), "process.args:");
        refused(spec("a\0b"), "process.args:");
        refused(ProcessSpec { env: vec!["A=\0".into()], ..spec("x") }, "process.env:");
        refused(ProcessSpec { cwd: "rel".into(), ..spec("x") }, "process.cwd:");
        let user = User { additional_gids: vec![0; MAX_GROUPS + 1], ..User::default() };
        refused(ProcessSpec { user, ..spec("x") }, "process:");
        for user in [
            User { uid: u32::MAX, ..User::default() },
            User { gid: u32::MAX, ..User::default() },
            User { additional_gids: vec![u32::MAX], ..User::default() },
        ] {
            refused(ProcessSpec { user, ..spec("x") }, "process.user:");
        }
    }

    #[test]
    fn a_user_has_to_be_mapped() {
        let map = vec![IdMapping { container: 0, guest: 100_000, size: 10 }];
        let namespace = UserNamespace { uids: map.clone(), gids: map };
        let with = |uid: u32, gid: u32, more: &[u32]| {
            let user = User { uid, gid, additional_gids: more.into(), umask: None };
            ProcessPlan::new(ProcessSpec { user, ..spec("x") }, Some(&namespace))
        };
        let owner = with(1, 2, &[9]).unwrap().owner;
        assert_eq!((owner.0.as_raw(), owner.1.as_raw()), (100_001, 100_002));
        for (refused, field) in [
            (with(10, 0, &[]), "process.user.uid: 10 "),
            (with(0, 10, &[]), "process.user.gid: 10 "),
            (with(0, 0, &[1, 100_000]), "process.user.additional_gids: 100000 "),
        ] {
            let message = refused.unwrap_err().message;
            assert!(message.starts_with(field), "{message}");
        }
    }

    #[test]
    fn a_missing_program_and_one_that_cannot_run_differ() {
        let kind = |program: &str| ProcessPlan::new(spec(program), None).unwrap().exec().kind;
        assert_eq!(kind("/no/such/program"), ErrorKind::CommandNotFound);
        assert_eq!(kind("no-such-program"), ErrorKind::CommandNotFound);
        assert_eq!(kind("/etc/passwd/x"), ErrorKind::CommandNotFound);
        // A directory and a file without the permission: both exist.
        assert_eq!(kind("/etc"), ErrorKind::NotExecutable);
        assert_eq!(kind("/etc/passwd"), ErrorKind::NotExecutable);
    }
}
