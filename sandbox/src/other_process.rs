//! Processes that are none of ours, by a descriptor: a number may be another's by the time it is used.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A process that exists, or has existed.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    descriptor: OwnedFd,
}

impl Process {
    /// # Errors
    /// `ESRCH`: there is none; what else pidfd_open(2) says.
    pub(crate) fn open(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        Ok(Self { pid, descriptor: pidfd_open(pid, PidfdFlags::empty())? })
    }

    /// The process that made it, or that it was left to; `None` once it is gone.
    pub(crate) fn parent(&self) -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid.as_raw_nonzero())).ok()?;
        parent(&stat)
    }

    /// # Errors
    /// The kernel refuses. One that has ended is none.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.descriptor, Signal::KILL) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            sent => Ok(sent?),
        }
    }
}

/// `7 (name) S 1 ...` (proc_pid_stat(5)), where the name may have anything in it.
fn parent(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::{self, Command};

    use super::*;

    #[test]
    fn parents_are_told_whatever_the_name() {
        assert_eq!(parent("7 (a) S 9) b) R 12 7 7 0"), Some(12));
        assert_eq!(parent("7 a R 12"), None);
        assert_eq!(parent("7 (a)"), None);
    }

    #[test]
    fn a_process_is_the_one_that_was_opened() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        assert_eq!(process.parent(), Some(process::id()));
        process.kill().unwrap();
        child.wait().unwrap();
        assert!(process.kill().is_ok() && process.parent().is_none());
        for none in [0, u32::MAX] {
            assert_eq!(Process::open(none).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        }
    }
}
