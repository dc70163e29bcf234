//! The life of one process as the host sees it, from its fork to its end: which reports and calls have a place in which
//! state, and who is answered when. Pure: the descriptors and the kernel's part are `containers`'.
//!
//! ```text
//!  Creating ── ready ──▶ Created ── start ──▶ Starting ── exec ──▶ Running ── reaped ──▶ Exited
//!     │ report of failure                       │ report of failure
//!     ▼                                         ▼
//!  Failing ── reaped ──▶ gone                Failing ── reaped ──▶ Exited
//! ```

use krx_proto::{AgentError, Answer, ErrorKind, ExitStatus, ProcessState};

/// Callers that may wait for one process; a wait has no cost to who sends it, but stays here until the process ends.
const MAX_WAITERS: usize = 64;

/// Who made a call: a control connection and its number for the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) connection: u32,
    pub(crate) number: u32,
}

pub(crate) type Reply = (Caller, Result<Answer, AgentError>);

#[derive(Debug)]
enum State {
    /// Forked, on its way to its container. A start may have been asked for already.
    Creating {
        creator: Caller,
        starter: Option<Caller>,
    },
    Created,
    /// Let go; its exec has neither succeeded nor failed yet.
    Starting {
        starter: Caller,
    },
    Running,
    /// It has reported a failure and is about to end. Told to the caller when it has ended, so that it is gone then.
    Failing {
        caller: Caller,
        starter: Option<Caller>,
        error: AgentError,
        was_created: bool,
    },
    Exited(ExitStatus),
}

/// One process's state, and who waits for its end.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    state: State,
    waiters: Vec<Caller>,
}

/// What is to be done with a process after an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    Nothing,
    /// Let it exec.
    Release,
    /// It never became a process of the container: forget it.
    Forget,
}

impl Lifecycle {
    pub(crate) fn new(creator: Caller) -> Self {
        Self { state: State::Creating { creator, starter: None }, waiters: Vec::new() }
    }

    pub(crate) fn public(&self) -> ProcessState {
        match self.state {
            State::Creating { .. } | State::Created => ProcessState::Created,
            State::Starting { .. } | State::Running => ProcessState::Running,
            State::Failing { was_created: false, .. } => ProcessState::Created,
            State::Failing { .. } => ProcessState::Running,
            State::Exited(status) => ProcessState::Exited(status),
        }
    }

    pub(crate) fn has_exited(&self) -> bool {
        matches!(self.state, State::Exited(_))
    }

    /// It has not been let go yet.
    pub(crate) fn is_waiting(&self) -> bool {
        matches!(self.state, State::Creating { .. } | State::Created)
    }

    /// The process is in its container, and alive as far as is known.
    pub(crate) fn is_in_place(&self) -> bool {
        matches!(self.state, State::Created | State::Starting { .. } | State::Running)
    }

    /// The child is ready to exec.
    pub(crate) fn ready(&mut self, pid: u32, replies: &mut Vec<Reply>) -> Next {
        let State::Creating { creator, starter } = self.state else { return Next::Nothing };
        replies.push((creator, Ok(Answer::Created { pid })));
        match starter {
            Some(starter) => {
                self.state = State::Starting { starter };
                Next::Release
            }
            None => {
                self.state = State::Created;
                Next::Nothing
            }
        }
    }

    /// The host asks for the exec.
    pub(crate) fn start(&mut self, caller: Caller) -> Result<Next, AgentError> {
        match &mut self.state {
            State::Creating { starter: starter @ None, .. } => {
                *starter = Some(caller);
                Ok(Next::Nothing)
            }
            State::Created => {
                self.state = State::Starting { starter: caller };
                Ok(Next::Release)
            }
            State::Exited(_) => Err(wrong_state("The process has ended before it was started")),
            _ => Err(wrong_state("The process has been started already")),
        }
    }

    /// The child reports that it cannot go on, and ends.
    pub(crate) fn failed(&mut self, error: AgentError) {
        let (caller, starter, was_created) = match self.state {
            State::Creating { creator, starter } => (creator, starter, false),
            State::Starting { starter } => (starter, None, true),
            _ => return,
        };
        self.state = State::Failing { caller, starter, error, was_created };
    }

    /// The child's side of the connection to the agent is closed: by its exec, or by its death.
    pub(crate) fn disconnected(&mut self, replies: &mut Vec<Reply>) {
        if let State::Starting { starter } = self.state {
            replies.push((starter, Ok(Answer::Done)));
            self.state = State::Running;
        }
    }

    /// The process has ended and is reaped. All its reports were taken before.
    pub(crate) fn exited(&mut self, status: ExitStatus, replies: &mut Vec<Reply>) -> Next {
        // Let go and dead before or after its exec, who could tell: to its starter it ran.
        self.disconnected(replies);
        if let State::Creating { creator, starter } = self.state {
            let code = status.shell_code();
            let error = failed(format_args!("The process ended while it was set up (exit code {code})"));
            self.state = State::Failing { caller: creator, starter, error, was_created: false };
        }
        let previous = std::mem::replace(&mut self.state, State::Exited(status));
        let mut next = Next::Nothing;
        if let State::Failing { caller, starter, error, was_created } = previous {
            replies.extend(starter.map(|starter| (starter, Err(error.clone()))));
            replies.push((caller, Err(error)));
            if !was_created {
                next = Next::Forget;
            }
        }
        replies.extend(self.waiters.drain(..).map(|waiter| (waiter, Ok(Answer::Exited(status)))));
        next
    }

    /// Somebody wants to know its end.
    pub(crate) fn wait(&mut self, caller: Caller, replies: &mut Vec<Reply>) -> Result<(), AgentError> {
        if let State::Exited(status) = self.state {
            replies.push((caller, Ok(Answer::Exited(status))));
        } else if self.waiters.len() >= MAX_WAITERS {
            return Err(failed(format_args!("{MAX_WAITERS} callers wait for the process already")));
        } else {
            self.waiters.push(caller);
        }
        Ok(())
    }

    /// The process is deleted while some wait for it.
    pub(crate) fn abandon(self) -> impl Iterator<Item = Reply> {
        let error = AgentError::new(ErrorKind::NotFound, "The container was deleted");
        self.waiters.into_iter().map(move |waiter| (waiter, Err(error.clone())))
    }

    /// A connection is gone: its waits are over.
    pub(crate) fn forget_connection(&mut self, connection: u32) {
        self.waiters.retain(|waiter| waiter.connection != connection);
    }
}

pub(crate) fn wrong_state(message: &str) -> AgentError {
    AgentError::new(ErrorKind::WrongState, message)
}

fn failed(message: std::fmt::Arguments<'_>) -> AgentError {
    AgentError::new(ErrorKind::Failed, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CREATOR: Caller = Caller { connection: 1, number: 1 };
    const STARTER: Caller = Caller { connection: 1, number: 2 };
    const WAITER: Caller = Caller { connection: 2, number: 1 };

    fn not_found() -> AgentError {
        AgentError::new(ErrorKind::CommandNotFound, "no")
    }

    fn ready() -> Lifecycle {
        let mut life = Lifecycle::new(CREATOR);
        assert_eq!(life.ready(7, &mut Vec::new()), Next::Nothing);
        life
    }

    #[test]
    fn create_start_wait_in_order() {
        let (mut life, mut replies) = (Lifecycle::new(CREATOR), Vec::new());
        assert_eq!(life.ready(7, &mut replies), Next::Nothing);
        assert_eq!(life.start(STARTER), Ok(Next::Release));
        life.wait(WAITER, &mut replies).unwrap();
        life.disconnected(&mut replies);
        assert_eq!(life.public(), ProcessState::Running);
        assert_eq!(life.exited(ExitStatus::Code(3), &mut replies), Next::Nothing);
        let expected = [
            (CREATOR, Ok(Answer::Created { pid: 7 })),
            (STARTER, Ok(Answer::Done)),
            (WAITER, Ok(Answer::Exited(ExitStatus::Code(3)))),
        ];
        assert_eq!(replies, expected);
    }

    #[test]
    fn a_start_sent_along_with_the_create_is_remembered() {
        let (mut life, mut replies) = (Lifecycle::new(CREATOR), Vec::new());
        assert_eq!(life.start(STARTER), Ok(Next::Nothing));
        assert!(life.start(WAITER).is_err());
        assert_eq!(life.ready(7, &mut replies), Next::Release);
    }

    #[test]
    fn a_failed_creation_is_told_to_all_and_leaves_nothing() {
        let (mut life, mut replies) = (Lifecycle::new(CREATOR), Vec::new());
        life.start(STARTER).unwrap();
        life.failed(not_found());
        assert_eq!(replies, []);
        assert_eq!(life.exited(ExitStatus::Code(1), &mut replies), Next::Forget);
        assert_eq!(replies, [(STARTER, Err(not_found())), (CREATOR, Err(not_found()))]);
    }

    #[test]
    fn a_failed_exec_is_the_starters_and_the_process_has_exited() {
        let (mut life, mut replies) = (ready(), Vec::new());
        life.start(STARTER).unwrap();
        life.failed(not_found());
        life.disconnected(&mut replies);
        assert_eq!(life.exited(ExitStatus::Code(127), &mut replies), Next::Nothing);
        assert_eq!(replies, [(STARTER, Err(not_found()))]);
        assert_eq!(life.public(), ProcessState::Exited(ExitStatus::Code(127)));
    }

    #[test]
    fn a_child_killed_in_set_up_fails_the_creation() {
        let (mut life, mut replies) = (Lifecycle::new(CREATOR), Vec::new());
        assert_eq!(life.exited(ExitStatus::Signal(9), &mut replies), Next::Forget);
        let [(CREATOR, Err(error))] = &replies[..] else { panic!() };
        assert!(error.message.contains("137"));
    }

    #[test]
    fn a_created_process_may_be_killed_and_waited_for() {
        let (mut life, mut replies) = (ready(), Vec::new());
        assert_eq!(life.exited(ExitStatus::Signal(9), &mut replies), Next::Nothing);
        life.wait(WAITER, &mut replies).unwrap();
        assert_eq!(replies, [(WAITER, Ok(Answer::Exited(ExitStatus::Signal(9))))]);
        assert_eq!(life.start(STARTER).unwrap_err().kind, ErrorKind::WrongState);
    }

    #[test]
    fn waiters_are_bounded_and_go_with_their_connection() {
        let (mut life, mut replies) = (ready(), Vec::new());
        for _ in 0..MAX_WAITERS {
            life.wait(WAITER, &mut replies).unwrap();
        }
        assert!(life.wait(WAITER, &mut replies).is_err());
        life.forget_connection(WAITER.connection);
        assert!(life.wait(WAITER, &mut replies).is_ok());
        assert_eq!(life.abandon().count(), 1);
    }
}
