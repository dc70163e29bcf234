//! A child process that is in another cgroup from its first instruction on (`CLONE_INTO_CGROUP`, clone(2)).
//!
//! To move a process that runs, Linux waits for a grace period of RCU: 10 ms and more, in which nothing on the host can
//! fork.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, exit};

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::sys;

/// Of a child that could not become the program.
const NOT_EXECUTED: i32 = 127;

/// Starts `command` in the cgroup whose directory is open as `cgroup`.
///
/// # Errors
/// This process has more than one thread, the cgroup takes no processes, or the program cannot be executed.
pub fn spawn(command: &mut Command, cgroup: BorrowedFd<'_>) -> io::Result<Pid> {
    // What another thread had locked, or left half done, would be so in the child for ever.
    if fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, "There is more than one thread"));
    }
    let Some(child) = sys::fork_into(cgroup)? else {
        let error = command.exec();
        eprintln!("{}: {error}", command.get_program().display());
        exit(NOT_EXECUTED);
    };
    match waitpid(child, Some(WaitPidFlag::WNOHANG))? {
        WaitStatus::StillAlive => Ok(child),
        ended => Err(io::Error::other(format!("It has ended at once: {ended:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_process_with_threads_is_not_forked() {
        let anything = fs::File::open("/").unwrap();
        let refused = std::thread::spawn(move || spawn(&mut Command::new("/bin/true"), anything.as_fd()));
        assert_eq!(refused.join().unwrap().unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    }
}
