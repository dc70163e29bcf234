//! The filter of system calls of a process about to exec, as the host has compiled it.

use krx_proto::{AgentError, MAX_SECCOMP, SeccompFilter};

use crate::error::{Doing, StepError, invalid};
use crate::sys;

/// `SECCOMP_FILTER_FLAG_LOG` and `SECCOMP_FILTER_FLAG_SPEC_ALLOW`: those with which the call returns no descriptor.
const FLAGS: u32 = 1 << 1 | 1 << 2;

/// A filter ready to be installed.
#[derive(Debug)]
pub(crate) struct Filter {
    flags: u32,
    program: Vec<libc::sock_filter>,
}

impl Filter {
    pub(crate) fn new(wanted: &SeccompFilter) -> Result<Self, AgentError> {
        let length = wanted.program.len();
        if !(1..=MAX_SECCOMP).contains(&length) {
            let problem = format_args!("process.seccomp: {length} instructions are not 1 to {MAX_SECCOMP}");
            return Err(invalid(problem));
        }
        if wanted.flags & !FLAGS != 0 {
            return Err(invalid(format_args!("process.seccomp: flags {:#x} are not known", wanted.flags)));
        }
        let instruction = |one: &krx_proto::SeccompInstruction| libc::sock_filter {
            code: one.code,
            jt: one.if_true,
            jf: one.if_false,
            k: one.value,
        };
        Ok(Self { flags: wanted.flags, program: wanted.program.iter().map(instruction).collect() })
    }

    /// Puts the calling process under the filter.
    pub(crate) fn install(&self) -> Result<(), StepError> {
        sys::seccomp::install(self.flags, &self.program).doing(|| "Cannot install the seccomp filter")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use krx_proto::SeccompInstruction;
    use nix::errno::Errno;
    use nix::sys::prctl;

    fn filter(program: &[(u16, u8, u8, u32)]) -> SeccompFilter {
        let instruction =
            |&(code, if_true, if_false, value): &_| SeccompInstruction { code, if_true, if_false, value };
        SeccompFilter { flags: 0, program: program.iter().map(instruction).collect() }
    }

    #[test]
    fn sizes_and_flags_are_bounded() {
        let allow = (0x06, 0, 0, 0x7fff_0000);
        assert!(Filter::new(&filter(&[])).is_err());
        assert!(Filter::new(&filter(&[allow; MAX_SECCOMP])).is_ok());
        assert!(Filter::new(&filter(&[allow; MAX_SECCOMP + 1])).is_err());
        // All threads; and a listener, which would be a descriptor.
        for flags in [1 << 0, 1 << 3, 1 << 31] {
            assert!(Filter::new(&SeccompFilter { flags, ..filter(&[allow]) }).is_err());
        }
    }

    /// On a thread of its own: a filter is for good.
    #[test]
    fn the_kernel_takes_a_filter_and_no_nonsense() {
        std::thread::spawn(|| {
            prctl::set_no_new_privs().unwrap();
            // An instruction that is none, a jump to nowhere, an end without an answer.
            for nonsense in [(0xffff, 0, 0, 0), (0x05, 0, 0, 100), (0x20, 0, 0, 0)] {
                assert!(Filter::new(&filter(&[nonsense])).unwrap().install().is_err());
            }
            let number = u32::try_from(libc::SYS_sethostname).unwrap();
            let deny = [
                (0x20, 0, 0, 0),
                (0x15, 0, 1, number),
                (0x06, 0, 0, 0x0005_0000 | 61),
                (0x06, 0, 0, 0x7fff_0000),
            ];
            Filter::new(&filter(&deny)).unwrap().install().unwrap();
            assert_eq!(nix::unistd::sethostname("x".repeat(100)).unwrap_err(), Errno::from_raw(61));
        })
        .join()
        .unwrap();
    }
}
