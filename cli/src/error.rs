//! What krx says when it fails, and the exit code that goes with it.

use std::error::Error;
use std::fmt::Write as _;

use krx_image::ImageError;
use krx_proto::{AgentError, ErrorKind};
use krx_sandbox::agent::CallError;
use krx_sandbox::artifacts::ArtifactError;
use krx_sandbox::bundle::BundleError;
use krx_sandbox::container::ContainerError;
use krx_sandbox::detached::attachment::AttachError;
use krx_sandbox::exec_limits::ExecLimitError;
use krx_sandbox::pod::PodError;
use krx_sandbox::pod_containers::MemberError;
use krx_sandbox::preflight::PreflightError;
use krx_sandbox::settings::SettingsError;
use krx_sandbox::state_dir::StateError;
use krx_sandbox::user::UserError;
use krx_sandbox::vmm_process::VmmError;

/// krx failed, not what it runs.
pub(crate) const FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Why a command of krx failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(transparent)]
    Container(#[from] ContainerError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("Terminal or signals cannot be set up")]
    Host(#[from] std::io::Error),
    /// A signal ended the start, before there was a process to send it to.
    #[error("Interrupted by signal {0} before the container ran")]
    Interrupted(u8),
    #[error(transparent)]
    Lookup(#[from] LookupError),
}

/// Why a container cannot be had from where it was said to be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    #[error("Bundle cannot be run")]
    Bundle(#[from] BundleError),
    #[error("Image cannot be run")]
    Image(#[from] ImageError),
    #[error("Image cannot be mounted: krx wants to be root for that")]
    Mounts(#[source] std::io::Error),
}

/// Why this node runs no pod.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    #[error("Settings of this node cannot be used")]
    Settings(#[from] SettingsError),
    #[error("This host cannot run the pod")]
    Preflight(#[from] PreflightError),
}

/// Why a pod of somebody else cannot be looked into.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LookupError {
    #[error(transparent)]
    Member(#[from] MemberError),
    #[error("The log of the guest's kernel cannot be had")]
    Log(#[source] VmmError),
    #[error("Standard output cannot be written")]
    Output(#[source] std::io::Error),
    #[error(transparent)]
    Detached(#[from] DetachedError),
}

/// Why a detached container is not to be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DetachedError {
    #[error("The process that was to own the container was killed")]
    OwnerKilled,
    #[error(
        "Container {name} is {status}: `krx logs {name}` shows what it has written, `krx rm {name}` removes it"
    )]
    Over { name: String, status: String },
    #[error("Container {0} runs: end it first with `krx stop {0}`, or remove it with `krx rm -f {0}`")]
    Runs(String),
    #[error(
        "Pod {0} was not started by `krx run -d`: whoever started it has its output, and nothing stays of it"
    )]
    NotDetached(String),
    #[error("Pod {0} does not end. Look at process {1}, which owns it")]
    Stays(String, u32),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error("The log of container {0} cannot be read")]
    Log(String, #[source] std::io::Error),
}

impl From<BundleError> for CliError {
    fn from(error: BundleError) -> Self {
        Self::Source(error.into())
    }
}

impl From<ExecLimitError> for CliError {
    fn from(error: ExecLimitError) -> Self {
        Self::Usage(format!("Process cannot be run: {error}"))
    }
}

impl From<SettingsError> for CliError {
    fn from(error: SettingsError) -> Self {
        Self::Node(error.into())
    }
}

impl From<PreflightError> for CliError {
    fn from(error: PreflightError) -> Self {
        Self::Node(error.into())
    }
}

impl From<MemberError> for CliError {
    fn from(error: MemberError) -> Self {
        Self::Lookup(error.into())
    }
}

impl From<DetachedError> for CliError {
    fn from(error: DetachedError) -> Self {
        Self::Lookup(error.into())
    }
}

impl CliError {
    /// The agent's own words: the guest is there and works.
    pub(crate) fn is_answer(&self) -> bool {
        matches!(self, Self::Call(CallError::Agent(_)))
    }

    pub(crate) fn exit_code(&self) -> u8 {
        let agent = match self {
            Self::Call(CallError::Agent(error)) => Some(error),
            Self::Pod(
                PodError::Create(CallError::Agent(error)) | PodError::Start(CallError::Agent(error)),
            ) => Some(error),
            Self::Interrupted(signal) => return 128 + signal,
            _ => None,
        };
        match agent {
            Some(AgentError { kind: ErrorKind::CommandNotFound, .. }) => NOT_FOUND,
            Some(AgentError { kind: ErrorKind::NotExecutable, .. }) => NOT_EXECUTABLE,
            _ => FAILED,
        }
    }
}

/// The error and all its causes, each on a line of its own and said once. Some have words of strangers' in them, a bundle's or
/// a guest's: without characters that mean something to a terminal, and not too many.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = shown(&error.to_string());
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        // A transparent error repeats its source's words.
        if words != said {
            let _ = write!(text, "\n  because: {}", shown(&words));
        }
        said = words;
        cause = error.source();
    }
    text
}

fn shown(words: &str) -> String {
    /// More than is kept of a VMM's last words, of which the last ones matter most.
    const MOST: usize = 72 << 10;
    const LINE: usize = 1024;
    let mut shown = String::new();
    let mut line = 0;
    for character in words.chars() {
        line = if character == '\n' { 0 } else { line + 1 };
        match character {
            _ if shown.len() > MOST => return shown + "...",
            _ if line == LINE => shown.push_str("..."),
            _ if line > LINE => {}
            '\n' | '\t' => shown.push(character),
            _ if character.is_control() => shown.extend(character.escape_default()),
            _ => shown.push(character),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_errors_choose_the_exit_code() {
        let code = |kind| CliError::from(CallError::Agent(AgentError::new(kind, "x"))).exit_code();
        assert_eq!(code(ErrorKind::CommandNotFound), 127);
        assert_eq!(code(ErrorKind::NotExecutable), 126);
        assert_eq!(code(ErrorKind::Failed), 125);
        assert_eq!(CliError::Interrupted(2).exit_code(), 130);
    }

    #[test]
    fn words_of_strangers_do_nothing_to_a_terminal() {
        let text = chain(&CliError::Usage(format!("\x1b[2J\u{9b}H{}\n\tend", "x".repeat(1 << 20))));
        assert!(text.starts_with("\\u{1b}[2J\\u{9b}Hxxx") && text.ends_with("xxx...\n\tend"), "{text}");
        assert!(text.len() < 1100 && shown(&"x\n".repeat(1 << 20)).len() < 73 << 10);
    }

    #[test]
    fn causes_are_said_once() {
        let error = CliError::from(StateError::NotFound("web".into()));
        assert_eq!(chain(&error), StateError::NotFound("web".into()).to_string());
    }
}
