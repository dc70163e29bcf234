//! Rules for devices as the program that the kernel asks about each access from a cgroup. Pure.
//!
//! cgroup v2 has no files for this; its device controller is a BPF program (`BPF_PROG_TYPE_CGROUP_DEVICE`).

use krx_proto::{AgentError, DeviceAccess, DeviceKind, DeviceRule};

use crate::error::invalid;

/// More rules than a bundle of sense has.
const MAX_RULES: usize = 1024;
/// Greatest numbers that Linux has.
const MAX_MAJOR: u32 = (1 << 12) - 1;
const MAX_MINOR: u32 = (1 << 20) - 1;

/// `BPF_DEVCG_*` of `linux/bpf.h`.
const BLOCK: i32 = 1;
const CHAR: i32 = 2;
const MAKE: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;

/// Character devices that every container may use, by major and minor number: null, zero, full, random, urandom, tty,
/// console, ptmx and all terminals.
const USUAL: [(u32, Option<u32>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

/// Operations of BPF (`linux/bpf.h`), with their operand where they differ by it.
const LOAD_WORD: u8 = 0x61;
const COPY: u8 = 0xbf;
const SET: u8 = 0xb7;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const IF_EQUAL: u8 = 0x15;
const IF_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

/// Registers: the result, the context, and what the program keeps.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const ACCESS: u8 = 2;
const KIND: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// Instructions as the kernel reads them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct DeviceFilter(pub(crate) Vec<u64>);

impl DeviceFilter {
    /// The program for rules. `None`: they allow everything.
    pub(crate) fn new(rules: &[DeviceRule]) -> Result<Option<Self>, AgentError> {
        if rules.len() > MAX_RULES {
            return Err(invalid(format_args!("device_rules: at most {MAX_RULES} are allowed")));
        }
        let beyond = |number: Option<u32>, most| number.is_some_and(|number| number > most);
        if rules.iter().any(|rule| beyond(rule.major, MAX_MAJOR) || beyond(rule.minor, MAX_MINOR)) {
            return Err(invalid("device_rules: a number is greater than any device's"));
        }
        let allows_all = rules.iter().rposition(|rule| {
            let numbers = rule.kind.is_none() && rule.major.is_none() && rule.minor.is_none();
            rule.allow && numbers && rule.access == DeviceAccess::ALL
        });
        if allows_all.is_some_and(|at| rules[at..].iter().all(|rule| rule.allow)) {
            return Ok(None);
        }
        let mut program = vec![
            instruction(LOAD_WORD, ACCESS, CONTEXT, 0, 0),
            instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
            instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
            // The kind in the lower half, the access in the upper.
            instruction(COPY, KIND, ACCESS, 0, 0),
            instruction(AND, KIND, 0, 0, 0xffff),
            instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        ];
        // The last rule decides, so it is asked first; what it allows is taken off what is asked for.
        for rule in usual().iter().rev().chain(rules.iter().rev()) {
            program.extend(judge(rule));
        }
        program.extend(answer(0));
        Ok(Some(Self(program)))
    }
}

/// What is allowed behind all rules, as runc does: to make any node, and to use those that every container has.
fn usual() -> Vec<DeviceRule> {
    let make = DeviceAccess { read: false, write: false, make: true };
    let any = DeviceRule { allow: true, kind: None, major: None, minor: None, access: make };
    let usual = USUAL.iter().map(|(major, minor)| DeviceRule {
        allow: true,
        kind: Some(DeviceKind::Char),
        major: Some(*major),
        minor: *minor,
        access: DeviceAccess::ALL,
    });
    usual.chain([any]).collect()
}

/// Answers if the rule decides; else goes on behind.
fn judge(rule: &DeviceRule) -> Vec<u64> {
    let access = mask(rule.access);
    let mut verdict = if rule.allow {
        vec![instruction(AND, ACCESS, 0, 0, !access), instruction(IF_NOT_EQUAL, ACCESS, 0, 2, 0)]
    } else {
        vec![
            instruction(COPY, RESULT, ACCESS, 0, 0),
            instruction(AND, RESULT, 0, 0, access),
            instruction(IF_EQUAL, RESULT, 0, 2, 0),
        ]
    };
    verdict.extend(answer(rule.allow.into()));
    let kind = rule.kind.map(|kind| match kind {
        DeviceKind::Char => CHAR,
        DeviceKind::Block => BLOCK,
    });
    let number = |number: Option<u32>| number.and_then(|number| i32::try_from(number).ok());
    // From the last, as each has to know how much is left out when it does not match.
    for (register, wanted) in [(MINOR, number(rule.minor)), (MAJOR, number(rule.major)), (KIND, kind)] {
        if let (Some(wanted), Ok(rest)) = (wanted, i16::try_from(verdict.len())) {
            verdict.insert(0, instruction(IF_NOT_EQUAL, register, 0, rest, wanted));
        }
    }
    verdict
}

fn answer(allow: i32) -> [u64; 2] {
    [instruction(SET, RESULT, 0, 0, allow), instruction(EXIT, 0, 0, 0, 0)]
}

fn mask(access: DeviceAccess) -> i32 {
    let bit = |asked: bool, bit: i32| if asked { bit } else { 0 };
    bit(access.make, MAKE) | bit(access.read, READ) | bit(access.write, WRITE)
}

/// `struct bpf_insn`: operation, registers, offset, value.
fn instruction(operation: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = value.to_le_bytes();
    u64::from_le_bytes([operation, from << 4 | to, low, high, a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;

    const READ_ONLY: DeviceAccess = DeviceAccess { read: true, write: false, make: false };

    fn rule(allow: bool, kind: Option<DeviceKind>, major: Option<u32>, minor: Option<u32>) -> DeviceRule {
        DeviceRule { allow, kind, major, minor, access: DeviceAccess::ALL }
    }

    fn deny_all() -> DeviceRule {
        rule(false, None, None, None)
    }

    /// What the kernel does with the program; true is an allowed access.
    fn run(filter: &DeviceFilter, kind: i32, access: i32, major: u32, minor: u32) -> bool {
        let context = [i64::from(access << 16 | kind), major.into(), minor.into()];
        let mut registers = [0_i64; 6];
        let mut at = 0;
        loop {
            let [operation, pair, low, high, a, b, c, d] = filter.0[at].to_le_bytes();
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            let offset = usize::try_from(i16::from_le_bytes([low, high])).unwrap();
            let value = i64::from(i32::from_le_bytes([a, b, c, d]));
            at += 1;
            match operation {
                LOAD_WORD => registers[to] = context[offset / 4],
                COPY => registers[to] = registers[from],
                SET => registers[to] = value,
                AND => registers[to] &= value,
                SHIFT_RIGHT => registers[to] >>= value,
                IF_EQUAL => at += if registers[to] == value { offset } else { 0 },
                IF_NOT_EQUAL => at += if registers[to] != value { offset } else { 0 },
                EXIT => return registers[0] == 1,
                _ => panic!("operation {operation:#x}"),
            }
        }
    }

    #[test]
    fn without_rules_the_usual_devices_are_allowed_and_no_others() {
        let filter = DeviceFilter::new(&[]).unwrap().unwrap();
        for (major, minor) in [(1, 3), (1, 9), (5, 0), (5, 2), (136, 0), (136, 77)] {
            assert!(run(&filter, CHAR, READ | WRITE, major, minor), "{major}:{minor}");
            assert!(!run(&filter, BLOCK, READ, major, minor), "{major}:{minor}");
        }
        for (major, minor) in [(1, 1), (1, 4), (1, 11), (10, 229), (253, 0)] {
            assert!(!run(&filter, CHAR, READ, major, minor), "{major}:{minor}");
            assert!(run(&filter, CHAR, MAKE, major, minor) && run(&filter, BLOCK, MAKE, major, minor));
            assert!(!run(&filter, CHAR, MAKE | READ, major, minor));
        }
    }

    #[test]
    fn the_last_rule_that_matches_decides() {
        let fuse = |allow: bool| rule(allow, Some(DeviceKind::Char), Some(10), Some(229));
        let filter = DeviceFilter::new(&[deny_all(), fuse(true)]).unwrap().unwrap();
        assert!(run(&filter, CHAR, READ | WRITE, 10, 229) && !run(&filter, CHAR, READ, 10, 228));
        let filter = DeviceFilter::new(&[fuse(true), deny_all()]).unwrap().unwrap();
        assert!(!run(&filter, CHAR, READ, 10, 229));
        let all = rule(true, None, None, None);
        let filter =
            DeviceFilter::new(&[all, rule(false, Some(DeviceKind::Block), None, None)]).unwrap().unwrap();
        assert!(run(&filter, CHAR, READ, 10, 1) && !run(&filter, BLOCK, READ, 253, 0));
        // Reading and writing may be allowed one by one, and denied so.
        let part = |allow: bool, access: DeviceAccess| DeviceRule { access, ..fuse(allow) };
        let write = DeviceAccess { write: true, ..DeviceAccess::default() };
        let both = [part(true, READ_ONLY), part(true, write)];
        assert!(run(&DeviceFilter::new(&both).unwrap().unwrap(), CHAR, READ | WRITE, 10, 229));
        let one = DeviceFilter::new(&[fuse(true), part(false, write)]).unwrap().unwrap();
        assert!(run(&one, CHAR, READ, 10, 229) && !run(&one, CHAR, READ | WRITE, 10, 229));
    }

    #[test]
    fn rules_that_allow_all_need_no_program() {
        let all = rule(true, None, None, None);
        assert_eq!(DeviceFilter::new(&[deny_all(), all]).unwrap(), None);
        assert_eq!(DeviceFilter::new(&[all, rule(true, None, Some(1), None)]).unwrap(), None);
        assert!(DeviceFilter::new(&[all, deny_all()]).unwrap().is_some());
        assert!(DeviceFilter::new(&[DeviceRule { access: READ_ONLY, ..all }]).unwrap().is_some());
    }

    #[test]
    fn hostile_lists_are_refused() {
        assert!(DeviceFilter::new(&vec![deny_all(); MAX_RULES + 1]).is_err());
        assert!(DeviceFilter::new(&[rule(true, None, Some(MAX_MAJOR + 1), None)]).is_err());
        assert!(DeviceFilter::new(&[rule(true, None, None, Some(u32::MAX))]).is_err());
    }

    /// Where the test may load programs at all.
    #[test]
    fn the_kernel_takes_the_program() {
        let longest = vec![rule(false, Some(DeviceKind::Block), Some(MAX_MAJOR), Some(MAX_MINOR)); MAX_RULES];
        for rules in [&[][..], &longest] {
            let filter = DeviceFilter::new(rules).unwrap().unwrap();
            match sys::bpf::load_device_filter(&filter.0) {
                Ok(_) | Err(nix::errno::Errno::EPERM | nix::errno::Errno::ENOSYS) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
}
