//! What `run` and `exec` have in common: a process made of options, brought to its end with its streams.

use std::io;
use std::path::Path;
use std::sync::Arc;

use krx_proto::{Capabilities, ExitStatus, ProcessSpec};
use krx_sandbox::agent::CallError;
use krx_sandbox::process::Process;
use krx_sandbox::state_dir::ExecBase;
use krx_sandbox::streams::{Copies, Ends};
use krx_sandbox::timings::Timings;
use krx_sandbox::user;
use krx_sandbox::vmm_process::VmmProcess;

use crate::args::ProcessOptions;
use crate::error::CliError;
use crate::signals::Signals;
use crate::{parse, terminal};

impl ProcessOptions {
    /// What can be said to be wrong before anything is looked at. `here`: the process is to have the caller's streams.
    pub(crate) fn check(&self, here: bool) -> Result<(), CliError> {
        if here && self.tty && self.interactive && !terminal::is_terminal() {
            let text = "Standard input is not a terminal: leave out -t, or -i";
            return Err(CliError::Usage(text.into()));
        }
        if self.workdir.as_ref().is_some_and(|directory| !directory.starts_with('/')) {
            return Err(CliError::Usage(
                "Working directory is not an absolute path in the container: begin it with /".into(),
            ));
        }
        Ok(())
    }

    /// Changes `spec` as the options say; names of users are looked up in `rootfs`. Returns what a later process of
    /// another user starts from.
    pub(crate) fn apply(&self, spec: &mut ProcessSpec, rootfs: &Path) -> Result<ExecBase, CliError> {
        let mut variables = Vec::new();
        for file in &self.env_file {
            variables.extend(env_file(file)?);
        }
        for text in variables.iter().chain(&self.env) {
            if let Some(variable) = parse::variable(text, |name| std::env::var(name).ok())? {
                parse::set_variable(&mut spec.env, variable);
            }
        }
        if let Some(directory) = &self.workdir {
            spec.cwd.clone_from(directory);
        }
        let capabilities = spec.capabilities;
        if let Some(text) = &self.user {
            spec.user = user::resolve(rootfs, text)?;
            if spec.user.uid != 0 {
                // What Linux leaves of them when root becomes another user.
                spec.capabilities = capabilities
                    .map(|all| Capabilities { bounding: all.bounding, ..Capabilities::default() });
            }
        }
        let default_home = !spec.env.iter().any(|variable| variable.starts_with("HOME="));
        if default_home {
            let home = user::home(rootfs, spec.user.uid).unwrap_or_else(|| "/".into());
            spec.env.push(format!("HOME={home}"));
        }
        if self.tty && !spec.env.iter().any(|variable| variable.starts_with("TERM=")) {
            spec.env.push("TERM=xterm".into());
        }
        spec.stdin = self.interactive;
        spec.terminal = self.tty.then(terminal::size);
        Ok(ExecBase { capabilities, default_home })
    }
}

/// The lines of a file of variables, without those that are empty or begin with `#`.
fn env_file(path: &Path) -> Result<Vec<String>, CliError> {
    let text = String::from_utf8(parse::small_file("File of variables", path)?).map_err(|_| {
        CliError::Usage(format!("File of variables {} cannot be used: it is not UTF-8", path.display()))
    })?;
    let lines = text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#'));
    Ok(lines.map(String::from).collect())
}

/// Starts a created process and stays with it until it has ended and all its output is written.
pub(crate) fn attend(
    process: &Process,
    vmm: Option<Arc<VmmProcess>>,
    spec: &ProcessSpec,
    signals: &Signals,
    timings: &Arc<Timings>,
) -> Result<ExitStatus, CallError> {
    let ends = Ends {
        input: spec.stdin.then(|| Box::new(io::stdin()) as _),
        output: Box::new(io::stdout()),
        error: spec.terminal.is_none().then(|| Box::new(io::stderr()) as _),
    };
    let copies = Copies::start(process, ends, timings)?;
    signals.running(process, vmm);
    let raw = (spec.terminal.is_some() && spec.stdin).then(terminal::Raw::enter).transpose();
    // A terminal that cannot be set raw is used as it is.
    let raw = raw.ok().flatten();
    let run = || -> Result<ExitStatus, CallError> {
        process.start()?;
        timings.mark("exec");
        if spec.terminal.is_some() {
            process.resize(terminal::size());
        }
        process.wait()
    };
    let status = run();
    drop(raw);
    signals.own();
    if status.is_ok() {
        copies.finish();
    }
    status
}
