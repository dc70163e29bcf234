//! `krx run -d`: the container's owner is a process of its own, which this one starts and waits for until the container runs.
//!
//! The owner is `krx run` once more, in a session of its own. Until the container runs it is bound to who started it: its
//! errors go to the same standard error, its exit code is taken over, and it ends when the starter does. Then it writes the
//! name to its standard output, a pipe, and lets go.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::SystemTime;

use krx_proto::ExitStatus;
use krx_sandbox::detached::log::{self, LogWriter};
use krx_sandbox::detached::relay::Relay;
use krx_sandbox::detached::{self, Ended, Keeping, OutputStream, Record};
use krx_sandbox::pod::PodError;
use krx_sandbox::state_dir::StateRoot;
use krx_sandbox::streams::{Copies, Ends};
use krx_sandbox::timings::Timings;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{chdir, setsid};

use crate::args::Run;
use crate::error::{CliError, DetachedError, FAILED, chain};
use crate::pods;
use crate::run::{self, Made};
use crate::signals::Signals;

/// Names that are made up have so many digits: no PID has, and so no container that is not detached.
const DIGITS: usize = 8;

/// Starts the owner, and says the container's name once it runs.
pub(crate) fn start() -> Result<u8, CliError> {
    let mut words = std::env::args_os();
    let (name, subcommand) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let program = std::env::current_exe()?;
    let mut owner = Command::new(program);
    owner.arg0(name).arg(subcommand).arg("--owner").args(words);
    // With the standard input, which may be the file of an option.
    owner.stdout(Stdio::piped());
    let mut owner = detached::isolate(&mut owner)?.spawn()?;
    let mut said = String::new();
    if let Some(output) = owner.stdout.take() {
        // Its end without a word is that of the owner.
        output.take(1024).read_to_string(&mut said)?;
    }
    if !said.is_empty() {
        return pods::print(&said);
    }
    let status = owner.wait()?;
    // It has said why, unless it was killed.
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(code) => Ok(if code == 0 { FAILED } else { code }),
        None => Err(DetachedError::OwnerKilled.into()),
    }
}

/// What the owner does.
pub(crate) fn own(arguments: &Run) -> Result<u8, CliError> {
    setsid().map_err(io::Error::from)?;
    // It does not outlive who waits for it. Once there are signals to be watched, this is one of them.
    set_pdeathsig(Signal::SIGTERM).map_err(io::Error::from)?;
    let timings = Arc::new(Timings::default());
    let root = StateRoot::from_env().absolute()?;
    let name = arguments.name.clone().map_or_else(made_up, Ok)?;
    let mut keeping = root.records().take(&name)?;
    let plan = run::plan(arguments, &name)?;
    run::check_host(&root, &plan)?;
    let signals = Signals::watch()?;
    let spec = &plan.container.spec.process;
    let mut record = Record {
        name: name.clone(),
        args: spec.args.clone(),
        labels: plan.labels.clone(),
        created: now(),
        rm: arguments.rm,
        ..Record::default()
    };
    keeping.publish(&record)?;
    let log = LogWriter::create(keeping.directory())?;
    let (relay, input) = Relay::listen(&keeping.socket(), log, spec.terminal.is_some(), spec.stdin)?;
    let made = run::make(&root, plan, &signals, &timings)?;
    let ends = Ends {
        input: input.map(|input| Box::new(input) as _),
        output: relay.output(OutputStream::Stdout),
        error: made.spec.terminal.is_none().then(|| relay.output(OutputStream::Stderr)),
    };
    let status = attend(&made, ends, &signals, &timings, || begun(&mut keeping, &mut record));
    let left = match (status, signals.interrupted()) {
        // It ran, or nobody would have let go.
        (status, _) if record.started.is_some() => status,
        (Err(_), Some(signal)) => return Err(CliError::Interrupted(signal)),
        (status, _) => return status.map(ExitStatus::shell_code),
    };
    made.end(matches!(left, Err(CliError::Pod(PodError::Lost(_) | PodError::Broken(_)))));
    let error = left.as_ref().err().map(|error| chain(error));
    if let Some(error) = &error {
        let _ = relay.output(OutputStream::Stderr).write_all(format!("krx: {error}\n").as_bytes());
    }
    let code = left.map_or_else(|error| error.exit_code(), ExitStatus::shell_code);
    record.ended = Some(Ended { at: now(), code, error });
    // Nobody is there to hear that it cannot be written; then it is as if this process had been killed.
    if keeping.publish(&record).is_err() {
        // That a container has ended, and how, is worth more than what it wrote first.
        log::make_room(keeping.directory());
        let _ = keeping.publish(&record);
    }
    keeping.stay(!arguments.rm);
    // Before the others hear of the end: then its name is free, or `krx rm` can free it.
    drop(keeping);
    relay.end(code);
    Ok(code)
}

/// Starts the process and stays with it to its end. `started` is called in between.
fn attend(
    made: &Made,
    ends: Ends,
    signals: &Signals,
    timings: &Arc<Timings>,
    started: impl FnOnce() -> Result<(), CliError>,
) -> Result<ExitStatus, CliError> {
    let explain = |error| CliError::from(made.pod.explain(error, PodError::Start));
    let copies = Copies::start(&made.process, ends, timings).map_err(explain)?;
    signals.running(&made.process, Some(made.pod.vmm()));
    made.process.start().map_err(explain)?;
    started()?;
    let status = made.process.wait().map_err(explain)?;
    // What ends the waiting for the rest of its output is to leave a record, too.
    signals.booting(&made.pod.vmm());
    copies.finish();
    Ok(status)
}

/// Makes the record one that stays, and lets go of who started this process.
fn begun(keeping: &mut Keeping, record: &mut Record) -> Result<(), CliError> {
    let begin = Record { started: Some(now()), ..record.clone() };
    keeping.publish(&begin)?;
    chdir("/").map_err(io::Error::from)?;
    set_pdeathsig(None).map_err(io::Error::from)?;
    // Who does not take the name any more does not know of the container, and nobody else does.
    io::stdout().write_all(format!("{}\n", record.name).as_bytes()).and_then(|()| io::stdout().flush())?;
    keeping.stay(true);
    *record = begin;
    detached::let_go()?;
    Ok(())
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A name for a container that was given none.
fn made_up() -> Result<String, CliError> {
    let mut bytes = [0; DIGITS / 2];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("krx-{:08x}", u32::from_ne_bytes(bytes)))
}
