//! Errors as containerd understands them: a gRPC code, and a sentence.

use std::error::Error;

use containerd_shim_protos::ttrpc::{self, Code};
use krx_proto::{ErrorKind, FrameError};
use krx_sandbox::agent::CallError;
use krx_sandbox::bundle::BundleError;
use krx_sandbox::container::ContainerError;
use krx_sandbox::disks::DiskError;
use krx_sandbox::pod::PodError;
use krx_sandbox::share::ShareError;
use krx_sandbox::vmm_process::VmmError;

use crate::config_json::ConfigJsonError;

/// Longest sentence, in bytes.
const MAX_MESSAGE: usize = 4096;

/// Why a request failed.
#[derive(Debug)]
pub struct ShimError {
    code: Code,
    message: String,
}

/// What a request has for containerd.
pub(crate) type Result<T> = std::result::Result<T, ShimError>;

impl ShimError {
    fn new(code: Code, message: impl Into<String>) -> Self {
        let mut message = message.into();
        // Ids and paths may be as long as a message; what is read of them is the beginning.
        if let Some(end) = (0..=MAX_MESSAGE).rev().find(|at| message.is_char_boundary(*at))
            && message.len() > MAX_MESSAGE
        {
            message.truncate(end);
            message.push_str(" ...");
        }
        Self { code, message }
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NOT_FOUND, message)
    }

    pub(crate) fn exists(message: impl Into<String>) -> Self {
        Self::new(Code::ALREADY_EXISTS, message)
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::INVALID_ARGUMENT, message)
    }

    pub(crate) fn wrong_state(message: impl Into<String>) -> Self {
        Self::new(Code::FAILED_PRECONDITION, message)
    }

    pub(crate) fn unimplemented(message: impl Into<String>) -> Self {
        Self::new(Code::UNIMPLEMENTED, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::INTERNAL, message)
    }

    pub(crate) fn is_not_found(&self) -> bool {
        self.code == Code::NOT_FOUND
    }

    fn of(code: Code, error: &dyn Error) -> Self {
        Self::new(code, chain(error))
    }
}

impl std::fmt::Display for ShimError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// An error and its causes on one line, each text once.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

impl From<ShimError> for ttrpc::Error {
    fn from(error: ShimError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code, error.message))
    }
}

fn code_of_call(error: &CallError) -> Code {
    match error {
        CallError::Agent(error) => match error.kind {
            ErrorKind::NotFound => Code::NOT_FOUND,
            ErrorKind::Exists => Code::ALREADY_EXISTS,
            ErrorKind::Invalid => Code::INVALID_ARGUMENT,
            ErrorKind::WrongState => Code::FAILED_PRECONDITION,
            // What runc's shim answers to a program that cannot be executed.
            ErrorKind::CommandNotFound | ErrorKind::NotExecutable | ErrorKind::Failed => Code::UNKNOWN,
        },
        CallError::Send(FrameError::TooLarge(_)) => Code::INVALID_ARGUMENT,
        CallError::NoAnswer(_) | CallError::Silent(_) => Code::DEADLINE_EXCEEDED,
        _ => Code::UNAVAILABLE,
    }
}

impl From<CallError> for ShimError {
    fn from(error: CallError) -> Self {
        Self::of(code_of_call(&error), &error)
    }
}

impl From<PodError> for ShimError {
    fn from(error: PodError) -> Self {
        let code = match &error {
            PodError::Create(call) | PodError::Start(call) | PodError::Guest(call) => code_of_call(call),
            PodError::Config(_) => Code::INVALID_ARGUMENT,
            PodError::State(_) => Code::FAILED_PRECONDITION,
            _ => Code::UNAVAILABLE,
        };
        Self::of(code, &error)
    }
}

impl From<ContainerError> for ShimError {
    fn from(error: ContainerError) -> Self {
        let code = match &error {
            ContainerError::Disk(DiskError::Attach { source: VmmError::Control(_), .. }) => Code::UNAVAILABLE,
            ContainerError::Disk(
                DiskError::Open { .. } | DiskError::NoDevice { .. } | DiskError::Attach { .. },
            ) => Code::FAILED_PRECONDITION,
            _ => Code::INVALID_ARGUMENT,
        };
        Self::of(code, &error)
    }
}

impl From<BundleError> for ShimError {
    fn from(error: BundleError) -> Self {
        let code = match &error {
            BundleError::Unsupported { .. } => Code::UNIMPLEMENTED,
            BundleError::Source { .. } => Code::NOT_FOUND,
            _ => Code::INVALID_ARGUMENT,
        };
        Self::of(code, &error)
    }
}

impl From<ConfigJsonError> for ShimError {
    fn from(error: ConfigJsonError) -> Self {
        Self::of(Code::INVALID_ARGUMENT, &error)
    }
}

impl From<ShareError> for ShimError {
    fn from(error: ShareError) -> Self {
        let code = match &error {
            ShareError::Container(_) | ShareError::Rootfs(_) => Code::INVALID_ARGUMENT,
            ShareError::VmmEnded(_) => Code::UNAVAILABLE,
            _ => Code::INTERNAL,
        };
        Self::of(code, &error)
    }
}

#[cfg(test)]
mod tests {
    use krx_proto::AgentError;

    use super::*;

    #[test]
    fn the_agent_s_kinds_have_codes() {
        let code = |kind| ShimError::from(CallError::Agent(AgentError::new(kind, "x"))).code;
        assert_eq!(code(ErrorKind::NotFound), Code::NOT_FOUND);
        assert_eq!(code(ErrorKind::Exists), Code::ALREADY_EXISTS);
        assert_eq!(code(ErrorKind::WrongState), Code::FAILED_PRECONDITION);
        assert_eq!(code(ErrorKind::Invalid), Code::INVALID_ARGUMENT);
        assert_eq!(ShimError::from(CallError::Lost).code, Code::UNAVAILABLE);
    }

    #[test]
    fn a_message_is_cut_between_characters() {
        let error = ShimError::invalid("é".repeat(MAX_MESSAGE));
        assert_eq!(error.message.len(), MAX_MESSAGE + 4);
        assert_eq!(ShimError::invalid("short").message, "short");
    }

    #[test]
    fn a_chain_has_each_text_once() {
        let error = ShimError::from(PodError::Create(CallError::Agent(AgentError::new(
            ErrorKind::Exists,
            "Container a exists already",
        ))));
        assert_eq!(error.message, "Agent does not make the container: Container a exists already");
        assert_eq!(error.code, Code::ALREADY_EXISTS);
    }
}
