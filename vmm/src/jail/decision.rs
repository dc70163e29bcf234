//! A seccomp filter that finds a system call by halving the numbers that are left.
//!
//! `seccompiler` compares a call's number with each one that is listed. The kernel, which decides for each of 450 numbers
//! once when a filter is installed, spent two thirds of a millisecond on that for each thread. Rules on arguments stay
//! `seccompiler`'s: its program for that one call follows behind.
//!
//! Instructions are those of classic BPF, data those of `struct seccomp_data` (`linux/filter.h`, `linux/seccomp.h`).

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch, sock_filter,
};

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const IF_AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const GO: u32 = libc::BPF_JMP | libc::BPF_JA;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// `AUDIT_ARCH_X86_64` (`linux/audit.h`).
const X86_64: u32 = 0xc000_003e;

/// What becomes of the numbers from one on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Otherwise,
    Listed,
    /// The rules of the call with this place.
    Rules(usize),
}

/// A filter with the action `listed` for calls in `rules` that one of their rules fits, or that have none, and `otherwise`
/// for all others, and for those of another architecture.
///
/// # Errors
/// Rules that do not compile, or more calls than a jump can leave out.
pub(super) fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let mut ranges = vec![(0, Outcome::Otherwise)];
    let mut details: Vec<BpfProgram> = Vec::new();
    for (number, rules) in rules {
        let place = u32::try_from(number).map_err(|_| BackendError::InvalidArgumentNumber)?;
        let outcome = if rules.is_empty() { Outcome::Listed } else { Outcome::Rules(details.len()) };
        if !rules.is_empty() {
            let one = BTreeMap::from([(number, rules)]);
            let filter = SeccompFilter::new(one, otherwise.clone(), listed.clone(), TargetArch::x86_64)?;
            details.push(filter.try_into()?);
        }
        ranges.retain(|(start, _)| *start != place);
        ranges.extend([(place, outcome), (place.saturating_add(1), Outcome::Otherwise)]);
    }
    ranges.dedup_by_key(|(_, outcome)| *outcome);
    let (otherwise, listed) = (u32::from(otherwise), u32::from(listed));
    let mut program = vec![
        instruction(LOAD, ARCHITECTURE, (0, 0)),
        instruction(IF_EQUAL, X86_64, (1, 0)),
        // Numbers of another architecture mean other calls.
        instruction(RETURN, libc::SECCOMP_RET_KILL_PROCESS, (0, 0)),
        instruction(LOAD, NUMBER, (0, 0)),
    ];
    let mut jumps = Vec::new();
    halve(&ranges, (otherwise, listed), &mut program, &mut jumps)?;
    let starts: Vec<_> = details
        .iter()
        .scan(program.len(), |start, detail| Some(std::mem::replace(start, *start + detail.len())))
        .collect();
    for (at, detail) in jumps {
        // Counted from the instruction behind the jump.
        program[at].k =
            u32::try_from(starts[detail] - at - 1).map_err(|_| BackendError::FilterTooLarge(at))?;
    }
    program.extend(details.into_iter().flatten());
    if program.len() > MAX { Err(BackendError::FilterTooLarge(program.len())) } else { Ok(program) }
}

/// `BPF_MAXINSNS`.
const MAX: usize = 4096;

fn instruction(code: u32, k: u32, (jt, jf): (u8, u8)) -> sock_filter {
    // All codes are below 256.
    sock_filter { code: u16::try_from(code).unwrap_or_default(), jt, jf, k }
}

/// Adds the decision between ranges, of which each begins where it says and ends where the next begins. `jumps` are those to rules, by
/// place.
fn halve(
    ranges: &[(u32, Outcome)],
    actions: (u32, u32),
    program: &mut BpfProgram,
    jumps: &mut Vec<(usize, usize)>,
) -> Result<(), BackendError> {
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let Some((middle, outcome)) = high.first() else { return Ok(()) };
    if low.is_empty() {
        program.push(match outcome {
            Outcome::Otherwise => instruction(RETURN, actions.0, (0, 0)),
            Outcome::Listed => instruction(RETURN, actions.1, (0, 0)),
            Outcome::Rules(detail) => {
                jumps.push((program.len(), *detail));
                instruction(GO, 0, (0, 0))
            }
        });
        return Ok(());
    }
    let at = program.len();
    program.push(instruction(IF_AT_LEAST, *middle, (0, 0)));
    halve(low, actions, program, jumps)?;
    let left_out = program.len() - at - 1;
    program[at].jt = u8::try_from(left_out).map_err(|_| BackendError::FilterTooLarge(left_out))?;
    halve(high, actions, program, jumps)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What a program says of a call, and how many instructions that took, as the kernel's interpreter would find it.
    pub(in crate::jail) fn judge(
        program: &BpfProgram,
        architecture: u32,
        number: u32,
        arguments: [u64; 6],
    ) -> (u32, usize) {
        let mut data = [number.to_le_bytes(), architecture.to_le_bytes(), [0; 4], [0; 4]].concat();
        data.extend(arguments.iter().flat_map(|argument| argument.to_le_bytes()));
        let (mut at, mut value, mut steps) = (0, 0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at].clone();
            (at, steps) = (at + 1, steps + 1);
            let branch = |condition: bool| usize::from(if condition { jt } else { jf });
            match u32::from(code) {
                LOAD => {
                    let place = usize::try_from(k).unwrap();
                    value = u32::from_le_bytes(data[place..place + 4].try_into().unwrap());
                }
                RETURN => return (k, steps),
                GO => at += usize::try_from(k).unwrap(),
                IF_EQUAL => at += branch(value == k),
                IF_AT_LEAST => at += branch(value >= k),
                // The two that `seccompiler` uses besides: `JGT` and `AND`.
                0x25 => at += branch(value > k),
                0x54 => value &= k,
                other => panic!("{other:#x}"),
            }
        }
    }

    #[test]
    fn other_architectures_are_refused() {
        let rules = BTreeMap::from([(0, Vec::new()), (59, Vec::new())]);
        let program = compile(rules, SeccompAction::KillProcess, SeccompAction::Allow).unwrap();
        let (allow, kill) = (u32::from(SeccompAction::Allow), u32::from(SeccompAction::KillProcess));
        for (architecture, number, said) in [
            (X86_64, 0, allow),
            (X86_64, 59, allow),
            (X86_64, 58, kill),
            (X86_64, 60, kill),
            (X86_64, u32::MAX, kill),
            // x32's numbers have a bit more; i386 has another architecture.
            (X86_64, 0x4000_0000, kill),
            (0x4000_0003, 0, kill),
        ] {
            assert_eq!(judge(&program, architecture, number, [0; 6]).0, said, "{architecture:#x} {number}");
        }
        // Whatever becomes of calls that are not listed.
        let rules = BTreeMap::from([(0, Vec::new())]);
        let program = compile(rules, SeccompAction::Allow, SeccompAction::Errno(1)).unwrap();
        assert_eq!(judge(&program, X86_64, 7, [0; 6]).0, allow);
        assert_eq!(judge(&program, 0x4000_0003, 7, [0; 6]).0, kill);
    }

    #[test]
    fn calls_that_cannot_be_are_refused() {
        let rules = |number: i64| BTreeMap::from([(number, Vec::new())]);
        for number in [-1, 1 << 32] {
            assert!(compile(rules(number), SeccompAction::KillProcess, SeccompAction::Allow).is_err());
        }
        let many = (0..2000).map(|number| (number * 2, Vec::new())).collect();
        assert!(compile(many, SeccompAction::KillProcess, SeccompAction::Allow).is_err());
    }
}
