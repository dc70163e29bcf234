//! `krx stop` and `krx rm`.

use std::thread;
use std::time::{Duration, Instant};

use krx_sandbox::agent::CallError;
use krx_sandbox::state_dir::{StateError, StateRoot};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::args::{Rm, Stop};
use crate::error::{CliError, DetachedError, FAILED, chain};
use crate::pods::{print, signal};

/// For an owner to see to the end of a container that was killed: the guest is asked to power off first.
const AFTER_KILL: Duration = Duration::from_secs(10);
const STEP: Duration = Duration::from_millis(20);

pub(crate) fn stop(arguments: &Stop) -> Result<u8, CliError> {
    let root = StateRoot::from_env();
    each(&arguments.names, |name| {
        if is_over(&root, name)? {
            return Ok(());
        }
        if send(&root, name, Signal::SIGTERM)?
            && wait(&root, name, Duration::from_secs(arguments.time.into()))?
        {
            return Ok(());
        }
        end(&root, name)
    })
}

pub(crate) fn rm(arguments: &Rm) -> Result<u8, CliError> {
    let root = StateRoot::from_env();
    each(&arguments.names, |name| {
        let kept = match root.records().open(name) {
            Err(StateError::NoRecord(_)) if root.open(name).is_ok() => {
                return Err(DetachedError::NotDetached(name.into()).into());
            }
            // It cannot be read, but it can be removed.
            Err(StateError::Unreadable(..)) => return Ok(root.records().remove(name)?),
            kept => kept?,
        };
        match kept.owner {
            Some(_) if !kept.is_over() && !arguments.force => {
                return Err(DetachedError::Runs(name.into()).into());
            }
            Some(_) => end(&root, name)?,
            None => {}
        }
        match root.records().remove(name) {
            // By its owner, as `--rm` told it to.
            Err(StateError::NoRecord(_)) if kept.owner.is_some() => Ok(()),
            removed => Ok(removed?),
        }
    })
}

/// Does it with each, and prints the names of those where it was done.
fn each(names: &[String], what: impl Fn(&str) -> Result<(), CliError>) -> Result<u8, CliError> {
    let mut code = 0;
    for name in names {
        match what(name) {
            Ok(()) => drop(print(&format!("{name}\n"))?),
            Err(error) => {
                eprintln!("krx: {}", chain(&error));
                code = FAILED;
            }
        }
    }
    Ok(code)
}

/// Whether there is no pod of that name, and no owner of a detached container.
fn is_over(root: &StateRoot, name: &str) -> Result<bool, CliError> {
    let kept = match root.records().open(name) {
        Err(StateError::NoRecord(_)) => None,
        kept => Some(kept?),
    };
    match root.open(name) {
        Err(StateError::NotFound(_)) => match kept {
            Some(kept) => Ok(kept.owner.is_none()),
            None => Err(StateError::NotFound(name.into()).into()),
        },
        Err(StateError::Starting(_)) => Ok(false),
        opened => Ok(opened.map(|_| false)?),
    }
}

/// As [`is_over`], within a time. What is gone is over.
fn wait(root: &StateRoot, name: &str, limit: Duration) -> Result<bool, CliError> {
    let begin = Instant::now();
    loop {
        match is_over(root, name) {
            Err(CliError::State(StateError::NotFound(_))) => return Ok(true),
            Ok(false) if begin.elapsed() < limit => thread::sleep(STEP),
            over => return over,
        }
    }
}

/// Whether a detached container has an owner, and no VM yet: its image is being unpacked.
fn is_prepared(root: &StateRoot, name: &str) -> bool {
    root.records().open(name).is_ok_and(|kept| kept.owner.is_some() && kept.record.started.is_none())
}

/// Sends a signal to the first process; `false` if it does not have to be waited for, as nobody got it.
fn send(root: &StateRoot, name: &str, number: Signal) -> Result<bool, CliError> {
    match signal(root, name, number as i32) {
        Err(CliError::State(StateError::NotFound(_))) => Ok(!is_prepared(root, name)),
        Err(CliError::State(StateError::Starting(_))) => Ok(false),
        // It has ended, and its last output is on the way.
        Err(CliError::Call(CallError::Agent(_))) => Ok(true),
        // The guest does not answer: it will not do so when it is asked more nicely.
        Err(CliError::Call(_)) => Ok(false),
        sent => sent.map(|()| true),
    }
}

/// Ends a pod with all means there are, one after another.
fn end(root: &StateRoot, name: &str) -> Result<(), CliError> {
    if send(root, name, Signal::SIGKILL)? && wait(root, name, AFTER_KILL)? {
        return Ok(());
    }
    let killed = match root.kill_vmm(name) {
        Err(StateError::NotFound(_)) => Ok(()),
        killed => killed,
    };
    if killed.is_ok() && !is_prepared(root, name) && wait(root, name, AFTER_KILL)? {
        return Ok(());
    }
    // One that is still starting has nothing to lose, and one that hangs is not to be asked.
    let Ok(Some(owner)) = root.records().open(name).map(|kept| kept.owner) else {
        killed?;
        return match root.open(name) {
            Err(StateError::NotFound(_)) => Ok(()),
            opened => Err(DetachedError::Stays(name.into(), opened?.1.owner_pid).into()),
        };
    };
    for number in [Signal::SIGTERM, Signal::SIGKILL] {
        let _ = i32::try_from(owner).map(|pid| kill(Pid::from_raw(pid), number));
        if wait(root, name, AFTER_KILL)? {
            return Ok(());
        }
    }
    Err(DetachedError::Stays(name.into(), owner).into())
}
