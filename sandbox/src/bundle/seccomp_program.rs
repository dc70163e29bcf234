//! Compiles a seccomp policy to the classic BPF that the kernel runs at each system call. Pure; knows nothing of OCI.
//!
//! The number of the call is found by halving: a few comparisons for any of the 450, where a list would need hundreds.

use std::collections::BTreeMap;

use krx_proto::{MAX_SECCOMP, SeccompInstruction};

/// What a filter decides, by return values of the kernel's (`SECCOMP_RET_*`).
#[derive(Debug)]
pub(super) struct Policy {
    pub(super) default: u32,
    /// By number.
    pub(super) calls: BTreeMap<u32, Call>,
    /// Calls of this number and above, and what is said to them.
    pub(super) unknown_from: Option<u32>,
    /// Said as well to numbers that are no calls of a 64-bit program.
    pub(super) unknown: u32,
}

/// What is said to one system call.
#[derive(Debug, Default)]
pub(super) struct Call {
    /// Goes before the rules.
    pub(super) always: Option<u32>,
    /// The first whose conditions hold decides; if none does, the default.
    pub(super) rules: Vec<Rule>,
}

#[derive(Debug)]
pub(super) struct Rule {
    /// All have to hold.
    pub(super) conditions: Vec<Condition>,
    pub(super) action: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Condition {
    /// Which argument of the call, 0 to 5.
    pub(super) argument: u32,
    pub(super) comparison: Comparison,
}

/// Of the argument with a value, both 64 bits without sign.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal(u64),
    NotEqual(u64),
    Less(u64),
    LessOrEqual(u64),
    Greater(u64),
    GreaterOrEqual(u64),
    Masked { mask: u64, value: u64 },
}

/// Instructions of classic BPF (`linux/bpf_common.h`): class, size or operation, and source together.
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_GREATER: u16 = 0x25;
const IF_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

/// `struct seccomp_data`: the number, the machine, the instruction pointer, then six arguments.
const NUMBER: u32 = 0;
const MACHINE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// `AUDIT_ARCH_X86_64`.
const X86_64: u32 = 0xc000_003e;
/// `SECCOMP_RET_KILL_PROCESS`: what a program of another machine gets. The guest's kernel runs none.
const KILL_PROCESS: u32 = 0x8000_0000;
/// From here on numbers are those of x32, which the guest's kernel does not have, or negative, which none has.
const NO_CALLS: u32 = 0x4000_0000;

type Program = Vec<SeccompInstruction>;

/// A stretch of numbers with the same answer; it reaches to the next.
#[derive(Debug, Clone, Copy)]
struct Stretch<'a> {
    from: u32,
    answer: Answer<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Answer<'a> {
    Return(u32),
    Rules(&'a [Rule]),
}

/// Where a comparison goes on to.
#[derive(Debug, Clone, Copy)]
enum To {
    /// To the instruction after it.
    Next,
    /// Behind the condition.
    Holds,
    /// Behind the rule.
    Fails,
}

/// The program for a policy. `None`: it would be longer than the kernel takes.
pub(super) fn compile(policy: &Policy) -> Option<Program> {
    let mut program = vec![
        plain(LOAD, MACHINE),
        SeccompInstruction { code: IF_EQUAL, if_true: 1, if_false: 0, value: X86_64 },
        plain(RETURN, KILL_PROCESS),
        plain(LOAD, NUMBER),
    ];
    program.extend(find(&stretches(policy), policy.default)?);
    (program.len() <= MAX_SECCOMP).then_some(program)
}

fn plain(code: u16, value: u32) -> SeccompInstruction {
    SeccompInstruction { code, if_true: 0, if_false: 0, value }
}

/// The policy as stretches from number 0 on, in ascending order, equal neighbours joined.
fn stretches<'a>(policy: &'a Policy) -> Vec<Stretch<'a>> {
    let mut all: Vec<Stretch<'a>> = Vec::new();
    let mut add = |from: u32, answer: Answer<'a>| {
        // A stretch of no length.
        all.pop_if(|last| last.from == from);
        let same = |last: &Stretch<'_>| matches!((last.answer, answer), (Answer::Return(one), Answer::Return(other)) if one == other);
        if !all.last().is_some_and(same) {
            all.push(Stretch { from, answer });
        }
    };
    add(0, Answer::Return(policy.default));
    for (number, call) in policy.calls.range(..NO_CALLS) {
        add(*number, call.always.map_or(Answer::Rules(&call.rules), Answer::Return));
        add(number + 1, Answer::Return(policy.default));
    }
    let known = policy.calls.last_key_value().map_or(0, |(last, _)| last + 1);
    add(policy.unknown_from.unwrap_or(NO_CALLS).max(known), Answer::Return(policy.unknown));
    all
}

/// Finds the stretch that the number in the accumulator is in, and answers.
fn find(stretches: &[Stretch<'_>], default: u32) -> Option<Program> {
    let (lower, upper) = stretches.split_at(stretches.len() / 2);
    let ([_, ..], [first, ..]) = (lower, upper) else { return answer(upper.first()?.answer, default) };
    let (from, lower, upper) = (first.from, find(lower, default)?, find(upper, default)?);
    let mut program = Program::new();
    match u8::try_from(lower.len()) {
        Ok(skip) => program.push(SeccompInstruction {
            code: IF_GREATER_OR_EQUAL,
            if_true: skip,
            if_false: 0,
            value: from,
        }),
        // Farther than a comparison can reach.
        Err(_) => program.extend([
            SeccompInstruction { code: IF_GREATER_OR_EQUAL, if_true: 0, if_false: 1, value: from },
            plain(JUMP, u32::try_from(lower.len()).ok()?),
        ]),
    }
    program.extend(lower);
    program.extend(upper);
    (program.len() <= MAX_SECCOMP).then_some(program)
}

fn answer(answer: Answer<'_>, default: u32) -> Option<Program> {
    let rules = match answer {
        Answer::Return(value) => return Some(vec![plain(RETURN, value)]),
        Answer::Rules(rules) => rules,
    };
    let mut program = Program::new();
    for one in rules {
        program.extend(rule(one)?);
        if program.len() > MAX_SECCOMP {
            return None;
        }
    }
    program.push(plain(RETURN, default));
    Some(program)
}

/// Returns the action if all conditions hold; else goes on behind.
fn rule(rule: &Rule) -> Option<Program> {
    // From the end, as each condition has to know how much comes behind it.
    let mut program = vec![plain(RETURN, rule.action)];
    for Condition { argument, comparison } in rule.conditions.iter().rev() {
        let steps = steps(ARGUMENTS + 8 * argument, comparison);
        let behind = program.len();
        let count = steps.len();
        let step = |(index, (code, value, if_true, if_false)): (usize, (u16, u32, To, To))| {
            let distance = |to: To| match to {
                To::Next => Some(0),
                To::Holds => u8::try_from(count - index - 1).ok(),
                To::Fails => u8::try_from(count - index - 1 + behind).ok(),
            };
            Some(SeccompInstruction {
                code,
                if_true: distance(if_true)?,
                if_false: distance(if_false)?,
                value,
            })
        };
        let mut steps = steps.into_iter().enumerate().map(step).collect::<Option<Program>>()?;
        steps.append(&mut program);
        program = steps;
    }
    Some(program)
}

/// The lower half.
fn half(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or(0)
}

/// A comparison of 64 bits in two halves, of which the lower is at `place`.
fn steps(place: u32, comparison: &Comparison) -> Vec<(u16, u32, To, To)> {
    use To::{Fails, Holds, Next};
    let (low, high) = ((LOAD, place, Next, Next), (LOAD, place + 4, Next, Next));
    let halves = |value: u64| (half(value), half(value >> 32));
    // Greater decides in the upper half, unless that is equal.
    let ordered = |value: u64, code: u16, yes: To, no: To| {
        let (lower, upper) = halves(value);
        vec![high, (IF_GREATER, upper, yes, Next), (IF_EQUAL, upper, Next, no), low, (code, lower, yes, no)]
    };
    match *comparison {
        Comparison::Equal(value) => {
            let (lower, upper) = halves(value);
            vec![high, (IF_EQUAL, upper, Next, Fails), low, (IF_EQUAL, lower, Next, Fails)]
        }
        Comparison::NotEqual(value) => {
            let (lower, upper) = halves(value);
            vec![high, (IF_EQUAL, upper, Next, Holds), low, (IF_EQUAL, lower, Fails, Next)]
        }
        Comparison::Greater(value) => ordered(value, IF_GREATER, Holds, Fails),
        Comparison::GreaterOrEqual(value) => ordered(value, IF_GREATER_OR_EQUAL, Holds, Fails),
        Comparison::LessOrEqual(value) => ordered(value, IF_GREATER, Fails, Holds),
        Comparison::Less(value) => ordered(value, IF_GREATER_OR_EQUAL, Fails, Holds),
        Comparison::Masked { mask, value } => {
            let ((mask_low, mask_high), (lower, upper)) = (halves(mask), halves(value));
            vec![
                high,
                (AND, mask_high, Next, Next),
                (IF_EQUAL, upper, Next, Fails),
                low,
                (AND, mask_low, Next, Next),
                (IF_EQUAL, lower, Next, Fails),
            ]
        }
    }
}

/// What the kernel does with a program.
#[cfg(test)]
pub(super) mod interpreter {
    use super::*;

    pub(in super::super) fn run(program: &[SeccompInstruction], number: u32, arguments: [u64; 6]) -> u32 {
        run_on(program, X86_64, number, arguments)
    }

    pub(super) fn run_on(
        program: &[SeccompInstruction],
        machine: u32,
        number: u32,
        arguments: [u64; 6],
    ) -> u32 {
        let load = |place: u32| match place {
            NUMBER => number,
            MACHINE => machine,
            _ => {
                let place = usize::try_from(place - ARGUMENTS).unwrap();
                let argument = arguments[place / 8];
                u32::try_from(argument >> (8 * (place % 8)) & 0xffff_ffff).unwrap()
            }
        };
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let SeccompInstruction { code, if_true, if_false, value } = program[at];
            at += 1;
            let holds = match code {
                LOAD => {
                    accumulator = load(value);
                    continue;
                }
                AND => {
                    accumulator &= value;
                    continue;
                }
                JUMP => {
                    at += usize::try_from(value).unwrap();
                    continue;
                }
                RETURN => return value,
                IF_EQUAL => accumulator == value,
                IF_GREATER => accumulator > value,
                IF_GREATER_OR_EQUAL => accumulator >= value,
                _ => panic!("instruction {code:#x}"),
            };
            at += usize::from(if holds { if_true } else { if_false });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::interpreter::{run, run_on};
    use super::*;

    const DEFAULT: u32 = 1;
    const UNKNOWN: u32 = 2;

    /// Numbers that look random and are the same at each run.
    struct Numbers(u64);

    impl Numbers {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            self.0 >> 20
        }

        /// Few values, so that comparisons meet their ends; in both halves.
        fn value(&mut self) -> u64 {
            const ENDS: [u64; 5] = [0, 1, 0x7fff_ffff, 0xffff_fffe, 0xffff_ffff];
            let end = |number: u64| ENDS[usize::try_from(number % 5).unwrap()];
            end(self.next()) << 32 | end(self.next())
        }

        fn condition(&mut self) -> Condition {
            let (value, mask) = (self.value(), self.value());
            let comparison = match self.next() % 7 {
                0 => Comparison::Equal(value),
                1 => Comparison::NotEqual(value),
                2 => Comparison::Less(value),
                3 => Comparison::LessOrEqual(value),
                4 => Comparison::Greater(value),
                5 => Comparison::GreaterOrEqual(value),
                _ => Comparison::Masked { mask, value: value & mask },
            };
            Condition { argument: u32::try_from(self.next() % 6).unwrap(), comparison }
        }
    }

    fn holds(condition: &Condition, arguments: [u64; 6]) -> bool {
        let argument = arguments[usize::try_from(condition.argument).unwrap()];
        match condition.comparison {
            Comparison::Equal(value) => argument == value,
            Comparison::NotEqual(value) => argument != value,
            Comparison::Less(value) => argument < value,
            Comparison::LessOrEqual(value) => argument <= value,
            Comparison::Greater(value) => argument > value,
            Comparison::GreaterOrEqual(value) => argument >= value,
            Comparison::Masked { mask, value } => argument & mask == value,
        }
    }

    /// The policy, read straight.
    fn expected(policy: &Policy, number: u32, arguments: [u64; 6]) -> u32 {
        if let Some(call) = policy.calls.get(&number) {
            let matching = |rule: &&Rule| rule.conditions.iter().all(|condition| holds(condition, arguments));
            return call.always.unwrap_or_else(|| {
                call.rules.iter().find(matching).map_or(policy.default, |rule| rule.action)
            });
        }
        let unknown = number >= policy.unknown_from.unwrap_or(NO_CALLS);
        if unknown { policy.unknown } else { policy.default }
    }

    #[test]
    fn programs_decide_as_their_policies_do() {
        let mut numbers = Numbers(7);
        for round in 0..200 {
            let mut calls = BTreeMap::new();
            for _ in 0..numbers.next() % 60 {
                let action = |number: u64| 100 + u32::try_from(number % 3).unwrap();
                let rules = (0..numbers.next() % 4).map(|_| {
                    let count = 1 + numbers.next() % 6;
                    Rule {
                        conditions: (0..count).map(|_| numbers.condition()).collect(),
                        action: action(numbers.next()),
                    }
                });
                let rules = rules.collect();
                let always = numbers.next().is_multiple_of(2).then(|| action(numbers.next()));
                calls.insert(u32::try_from(numbers.next() % 500).unwrap(), Call { always, rules });
            }
            let last = calls.last_key_value().map_or(0, |(last, _)| *last);
            let unknown_from = (round % 2 == 0).then_some(last + 1);
            let policy = Policy { default: DEFAULT, calls, unknown_from, unknown: UNKNOWN };
            let program = compile(&policy).unwrap();
            for number in (0..510).chain([NO_CALLS - 1, NO_CALLS, u32::MAX]) {
                for _ in 0..8 {
                    let arguments = std::array::from_fn(|_| numbers.value());
                    assert_eq!(run(&program, number, arguments), expected(&policy, number, arguments));
                }
            }
        }
    }

    #[test]
    fn other_machines_are_killed() {
        let policy =
            Policy { default: DEFAULT, calls: BTreeMap::new(), unknown_from: None, unknown: UNKNOWN };
        let program = compile(&policy).unwrap();
        assert_eq!(run_on(&program, 0x4000_0003, 0, [0; 6]), KILL_PROCESS);
        assert_eq!((run(&program, 0, [0; 6]), run(&program, u32::MAX, [0; 6])), (DEFAULT, UNKNOWN));
    }

    #[test]
    fn long_programs_reach_all_of_themselves_and_endless_ones_are_refused() {
        let policy = |rules: u64| {
            let rule = |value| Rule {
                conditions: vec![Condition { argument: 0, comparison: Comparison::Equal(value) }],
                action: 100 + u32::try_from(value).unwrap(),
            };
            let call = |_| Call { always: None, rules: (0..rules).map(rule).collect() };
            let calls = [1, 3, 5, 7].map(|number| (number, call(number))).into();
            Policy { default: DEFAULT, calls, unknown_from: None, unknown: UNKNOWN }
        };
        let program = compile(&policy(190)).unwrap();
        assert!(program.len() > 3800);
        for number in 0..9 {
            let last = if number % 2 == 1 && number < 8 { 289 } else { DEFAULT };
            assert_eq!(run(&program, number, [189, 0, 0, 0, 0, 0]), last);
        }
        assert_eq!(compile(&policy(210)), None);
        assert_eq!(compile(&policy(100_000)), None);
    }
}
