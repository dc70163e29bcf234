//! A container's hooks: programs of the container that are run before its own. The container's first process runs them,
//! as its children, in its namespaces and its cgroup, one after the other.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use krx_proto::{AgentError, ErrorKind, HOOKS_SECONDS, Hook, Hooks, MAX_HOOKS};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{execve, getpid};

use crate::error::{Doing, StepError, invalid};
use crate::process::{c_string, c_strings};
use crate::sys;

/// What a failed hook has said is shown up to here.
const MAX_SAID: u64 = 512;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Point {
    Create,
    Start,
}

/// Hooks ready to be run.
#[derive(Debug, Default)]
pub(crate) struct HooksPlan {
    create: Vec<HookPlan>,
    start: Vec<HookPlan>,
    /// Without the closing brace.
    state: String,
}

#[derive(Debug)]
struct HookPlan {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    /// Seconds.
    timeout: u32,
}

impl HooksPlan {
    pub(crate) fn new(hooks: Hooks) -> Result<Self, AgentError> {
        if hooks.create.len() + hooks.start.len() > MAX_HOOKS {
            return Err(invalid(format_args!("hooks: there may be {MAX_HOOKS} at most")));
        }
        let plans = |hooks: Vec<Hook>| hooks.into_iter().map(HookPlan::new).collect::<Result<_, _>>();
        Ok(Self { create: plans(hooks.create)?, start: plans(hooks.start)?, state: hooks.state })
    }

    /// Runs those of one point. The calling process is the container's first, alone with its hooks.
    pub(crate) fn run(&self, point: Point) -> Result<(), AgentError> {
        let (hooks, status) = match point {
            Point::Create => (&self.create, "creating"),
            Point::Start => (&self.start, "created"),
        };
        let last = Instant::now() + Duration::from_secs(HOOKS_SECONDS.into());
        let state = format!("{},\"status\":\"{status}\",\"pid\":{}}}", self.state, getpid());
        hooks.iter().try_for_each(|hook| hook.run(&state, last))
    }
}

impl HookPlan {
    fn new(hook: Hook) -> Result<Self, AgentError> {
        if !hook.path.starts_with('/') {
            return Err(invalid(format_args!("hooks: {:?} is not an absolute path", hook.path)));
        }
        let args = if hook.args.is_empty() { vec![hook.path.clone()] } else { hook.args };
        Ok(Self {
            path: c_string("hooks.path", hook.path)?,
            args: c_strings("hooks.args", args)?,
            env: c_strings("hooks.env", hook.env)?,
            timeout: hook.timeout.map_or(HOOKS_SECONDS, |seconds| seconds.min(HOOKS_SECONDS)),
        })
    }

    fn run(&self, state: &str, last: Instant) -> Result<(), AgentError> {
        let doing = || "Cannot run a hook";
        let mut input = memory_file()?;
        input.write_all(state.as_bytes()).and_then(|()| input.rewind()).doing(doing)?;
        let mut said = memory_file()?;
        let Some(child) = sys::process::fork_into(CloneFlags::empty(), None).doing(doing)? else {
            self.become_it(&input, &said)
        };
        let until = last.min(Instant::now() + Duration::from_secs(self.timeout.into()));
        let problem = match wait_until(child.pidfd.as_fd(), until).doing(doing)? {
            true => reap(child.pid),
            false => {
                // Not reaped, so the PID is still its own.
                let _ = sys::process::kill(child.pid, libc::SIGKILL);
                reap(child.pid);
                Some(format!("has not ended in time ({} s), and was killed", self.timeout))
            }
        };
        problem.map_or(Ok(()), |problem| Err(self.failed(&problem, &mut said)))
    }

    /// In the new process.
    fn become_it(&self, input: &File, said: &File) -> ! {
        umask(Mode::from_bits_truncate(0o022));
        let connected = [(input, 0), (said, 1), (said, 2)]
            .iter()
            .try_for_each(|(file, number)| sys::process::duplicate_onto(file.as_fd(), *number))
            .and_then(|()| sys::process::close_range(3, u32::MAX));
        let Err(error) = connected.and_then(|()| execve(&self.path, &self.args, &self.env));
        let mut said = std::io::stderr();
        let _ = match error {
            Errno::ENOENT => said.write_all(b"there is no such program in the container"),
            error => said.write_all(error.desc().as_bytes()),
        };
        sys::process::exit(127)
    }

    fn failed(&self, problem: &str, said: &mut File) -> AgentError {
        let mut text = Vec::new();
        let _ = said.rewind().and_then(|()| said.take(MAX_SAID).read_to_end(&mut text));
        let text = String::from_utf8_lossy(&text);
        let (path, text) = (self.path.to_string_lossy(), text.trim());
        let colon = if text.is_empty() { "" } else { ": " };
        AgentError::new(ErrorKind::Failed, format_args!("The hook {path} {problem}{colon}{text}"))
    }
}

fn memory_file() -> Result<File, StepError> {
    memfd_create("hook", MFdFlags::MFD_CLOEXEC).map(File::from).doing(|| "Cannot make a file in memory")
}

/// Whether the process has ended by then.
fn wait_until(process: BorrowedFd<'_>, until: Instant) -> nix::Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        // One more, as the time is cut to milliseconds.
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(process, PollFlags::POLLIN)], timeout) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error),
        }
    }
}

/// Reaps an ended or killed child, and what else has ended: what is wrong with its end.
fn reap(pid: i32) -> Option<String> {
    let status = loop {
        match sys::process::reap_one() {
            Some((ended, status)) if ended == pid => break status,
            Some(_) => {}
            // Killed, and on its way.
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    if libc::WIFSIGNALED(status) {
        return Some(format!("was ended by signal {}", libc::WTERMSIG(status)));
    }
    let code = libc::WEXITSTATUS(status);
    (code != 0).then(|| format!("has failed (exit status {code})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(path: &str, args: &[&str]) -> Hook {
        Hook { path: path.into(), args: args.iter().map(ToString::to_string).collect(), ..Hook::default() }
    }

    fn plan(start: Vec<Hook>) -> HooksPlan {
        let state = "{\"id\":\"web\"".into();
        HooksPlan::new(Hooks { start, state, ..Hooks::default() }).unwrap()
    }

    #[test]
    fn bad_hooks_are_refused() {
        let refused = |start: Vec<Hook>| HooksPlan::new(Hooks { start, ..Hooks::default() }).unwrap_err();
        assert!(refused(vec![hook("rel", &[])]).message.contains("absolute"));
        assert!(refused(vec![hook("/a\0b", &[])]).message.contains("NUL"));
        assert!(
            refused(vec![Hook { env: vec!["\0".into()], ..hook("/a", &[]) }]).message.contains("hooks.env")
        );
        assert!(refused(vec![hook("/a", &[]); MAX_HOOKS + 1]).message.contains("at most"));
    }

    #[test]
    fn the_name_of_the_program_is_its_path_where_there_are_no_arguments() {
        assert_eq!(plan(vec![hook("/bin/true", &[])]).start[0].args, [c"/bin/true".into()] as [CString; 1]);
    }

    #[test]
    fn a_timeout_is_bounded() {
        let with = |timeout| plan(vec![Hook { timeout, ..hook("/a", &[]) }]).start[0].timeout;
        assert_eq!([with(None), with(Some(3)), with(Some(u32::MAX))], [HOOKS_SECONDS, 3, HOOKS_SECONDS]);
    }
}
