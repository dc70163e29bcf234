//! How a step of the set-up failed, and how that is told to the host.

use std::fmt;

use krx_proto::{AgentError, ErrorKind};
use nix::errno::Errno;

/// A system call that failed, with what it was for.
#[derive(Debug, thiserror::Error)]
#[error("{doing}")]
pub(crate) struct StepError {
    doing: String,
    #[source]
    cause: Errno,
}

impl StepError {
    pub(crate) fn new(doing: impl fmt::Display, cause: Errno) -> Self {
        Self { doing: doing.to_string(), cause }
    }
}

impl From<StepError> for AgentError {
    /// One sentence with its cause, as people read it: `Cannot mount tmpfs on /run: Operation not permitted`.
    fn from(StepError { doing, cause }: StepError) -> Self {
        Self::new(ErrorKind::Failed, format_args!("{doing}: {}", cause.desc()))
    }
}

/// Says what a failing call was for.
pub(crate) trait Doing<T> {
    fn doing<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T, StepError>;
}

impl<T> Doing<T> for nix::Result<T> {
    fn doing<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T, StepError> {
        self.map_err(|cause| StepError::new(what(), cause))
    }
}

impl<T> Doing<T> for std::io::Result<T> {
    fn doing<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T, StepError> {
        let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        self.map_err(|error| StepError::new(what(), errno(error)))
    }
}

/// An [`ErrorKind::Invalid`] error.
pub(crate) fn invalid(message: impl fmt::Display) -> AgentError {
    AgentError::new(ErrorKind::Invalid, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_reads_as_one_sentence() {
        let failed: nix::Result<()> = Err(Errno::EPERM);
        let error = AgentError::from(failed.doing(|| "Cannot mount tmpfs on /run").unwrap_err());
        assert_eq!(error.message, "Cannot mount tmpfs on /run: Operation not permitted");
        assert_eq!(error.kind, ErrorKind::Failed);
    }
}
