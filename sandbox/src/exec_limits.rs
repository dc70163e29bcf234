//! What Linux lets a process begin with (execve(2), "Limits on size of arguments and environment"): looked at before there
//! is a VM for it, as the guest's kernel says of it no more than that a list is too long. Pure.

use krx_proto::ProcessSpec;

/// `MAX_ARG_STRLEN` of Linux, without the final NUL.
const MAX_STRING: usize = (128 << 10) - 1;
/// What arguments and environment may have however small or large the stack is: `ARG_MAX`, and three quarters of `_STK_LIM`.
const LEAST: u64 = 128 << 10;
const MOST: u64 = 6 << 20;
/// The stack of a guest's processes, unless a limit says otherwise; they may have a quarter of it.
const STACK: u64 = 8 << 20;
/// `RLIMIT_STACK`.
const RLIMIT_STACK: u32 = 3;
/// A pointer to each text.
const POINTER: u64 = 8;

/// A process that no kernel would run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExecLimitError {
    #[error("{0} has a NUL in it, where Linux would cut it off. Leave it out")]
    Nul(String),
    #[error(
        "{field} has {length} bytes, Linux takes {MAX_STRING} at most. Put it in a file that the program reads"
    )]
    Long { field: String, length: usize },
    #[error(
        "args and env have {bytes} bytes together, Linux takes {limit} at most, a quarter of the limit on the stack. Shorten them, or raise that limit"
    )]
    Together { bytes: u64, limit: u64 },
}

/// Checks arguments, environment and directory of a process.
///
/// # Errors
/// The kernel would refuse them, or understand them otherwise.
pub fn check(process: &ProcessSpec) -> Result<(), ExecLimitError> {
    let named = |name: &'static str, texts: &'_ [String]| {
        (0..texts.len()).map(move |index| format!("{name}[{index}]")).collect::<Vec<_>>()
    };
    let names = named("args", &process.args).into_iter().chain(named("env", &process.env));
    let mut bytes = 0_u64;
    for (field, text) in names.zip(process.args.iter().chain(&process.env)) {
        if text.contains('\0') {
            return Err(ExecLimitError::Nul(field));
        }
        if text.len() > MAX_STRING {
            return Err(ExecLimitError::Long { field, length: text.len() });
        }
        bytes += text.len() as u64 + 1 + POINTER;
    }
    if process.cwd.contains('\0') {
        return Err(ExecLimitError::Nul("cwd".into()));
    }
    let stack = process.rlimits.iter().find(|limit| limit.resource == RLIMIT_STACK);
    let limit = (stack.map_or(STACK, |limit| limit.soft) / 4).clamp(LEAST, MOST);
    if bytes > limit { Err(ExecLimitError::Together { bytes, limit }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use krx_proto::Rlimit;

    use super::*;

    fn of(args: Vec<String>, env: Vec<String>) -> ProcessSpec {
        ProcessSpec { args, env, cwd: "/".into(), ..ProcessSpec::default() }
    }

    #[test]
    fn one_text_may_have_as_much_as_the_kernel_takes() {
        check(&of(vec!["x".repeat(131_071)], vec!["y".repeat(131_071)])).unwrap();
        let error = check(&of(vec!["sh".into(), "x".repeat(131_072)], vec![])).unwrap_err();
        assert_eq!(error, ExecLimitError::Long { field: "args[1]".into(), length: 131_072 });
        assert!(matches!(check(&of(vec![], vec!["x".repeat(131_072)])), Err(ExecLimitError::Long { .. })));
        let error = check(&of(vec!["sh".into()], vec!["A=\0".into()])).unwrap_err();
        assert_eq!(error, ExecLimitError::Nul("env[0]".into()));
    }

    #[test]
    fn all_together_are_a_quarter_of_the_stack() {
        let megabyte = vec!["x".repeat(1015); 1024];
        let mut process = of(megabyte.clone(), megabyte);
        check(&process).unwrap();
        process.args.push(String::new());
        assert_eq!(
            check(&process).unwrap_err(),
            ExecLimitError::Together { bytes: (2 << 20) + 9, limit: 2 << 20 }
        );
        process.rlimits = vec![Rlimit { resource: 3, soft: u64::MAX, hard: u64::MAX }];
        check(&process).unwrap();
        process.rlimits[0].soft = 0;
        assert!(check(&process).is_err());
    }
}
