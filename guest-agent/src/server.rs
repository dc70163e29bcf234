//! The agent's one loop: waits for everything at once, and gives each event to whom it concerns. Nothing in it blocks.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use krx_proto::{AgentError, Answer, Call, ErrorKind, ExitStatus, Message, Request};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::containers::Containers;
use crate::control::{Control, ControlError};
use crate::error::{Doing, StepError};
use crate::forward::{Forward, Progress};
use crate::greeting::{Greeting, Said};
use crate::guest;
use crate::lifecycle::Caller;
use crate::relay::{CHUNK, Relay};
use crate::sys;
use crate::vsock::{self, Listeners};

/// Control connections at a time; a host gone wild must not use up the guest's descriptors. Further ones wait in the
/// listener's backlog.
const MAX_CONTROLS: usize = 64;
/// Stream connections and their directions at a time, for the same reason.
const MAX_STREAMS: usize = 1024;
/// How long killed processes may take to end before the power goes off without them.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// The first connection is the owner's.
const OWNER: u32 = 0;

/// Everything the agent serves.
#[derive(Debug)]
pub(crate) struct Server {
    listeners: Listeners,
    controls: BTreeMap<u32, Control>,
    next_control: u32,
    /// Emptied when they have said their hello or nonsense; swept after each round of events.
    greetings: Vec<Option<Greeting>>,
    relays: Vec<Relay>,
    /// Emptied and swept as greetings are.
    forwards: Vec<Option<Forward>>,
    containers: Containers,
    children: SignalFd,
    /// When the power goes off at the latest, once that is decided.
    stopping: Option<Instant>,
    buffer: Vec<u8>,
}

/// What an event belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Children,
    Power,
    Control,
    Stream,
    Forward,
    Connection(u32),
    Greeting(usize),
    Forwarding(usize),
    Relay(usize),
    /// The receiver of an idle relay is gone.
    Broken(usize),
    Report(i32),
    /// The kernel has killed for want of memory, or a container is frozen.
    Cgroups,
}

impl Server {
    /// A server whose owner is at the other end of `owner`.
    pub(crate) fn new(listeners: Listeners, owner: Control) -> Result<Self, StepError> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGCHLD);
        signals.thread_block().doing(|| "Cannot block SIGCHLD")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self {
            listeners,
            controls: BTreeMap::from([(OWNER, owner)]),
            next_control: OWNER + 1,
            greetings: Vec::new(),
            relays: Vec::new(),
            forwards: Vec::new(),
            containers: Containers::new()?,
            children: SignalFd::with_flags(&signals, flags).doing(|| "Cannot make a signalfd")?,
            stopping: None,
            buffer: vec![0; CHUNK],
        })
    }

    /// Serves until the power is to go off.
    pub(crate) fn run(mut self) -> Result<(), StepError> {
        loop {
            if let Some(deadline) = self.stopping
                && (self.containers.kill_all() || Instant::now() >= deadline)
            {
                return Ok(());
            }
            for source in self.wait()? {
                self.handle(source);
                self.deliver_replies();
            }
            self.sweep();
        }
    }

    /// Waits for events; their sources, in the order of being asked.
    fn wait(&self) -> Result<Vec<Source>, StepError> {
        let (mut fds, sources): (Vec<_>, Vec<_>) =
            self.waits_for().into_iter().map(|(fd, flags, source)| (PollFd::new(fd, flags), source)).unzip();
        let deadlines = self.relays.iter().filter_map(Relay::deadline).chain(self.stopping);
        let timeout = deadlines.min().map_or(PollTimeout::NONE, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => return Ok(Vec::new()),
            result => result.doing(|| "Cannot wait for events")?,
        };
        Ok(fds
            .iter()
            .zip(sources)
            .filter(|(fd, _)| fd.any() == Some(true))
            .map(|(_, source)| source)
            .collect())
    }

    fn waits_for(&self) -> Vec<(BorrowedFd<'_>, PollFlags, Source)> {
        let readable = PollFlags::POLLIN;
        // Reports come before deaths: what a child says is taken before its end is.
        let mut all: Vec<_> =
            self.containers.waits_for().map(|(pid, sync)| (sync, readable, Source::Report(pid))).collect();
        let events = self.containers.cgroup_events();
        all.extend(events.map(|events| (events, PollFlags::POLLPRI, Source::Cgroups)));
        all.push((self.children.as_fd(), readable, Source::Children));
        all.push((self.listeners.power.as_fd(), readable, Source::Power));
        if self.controls.len() < MAX_CONTROLS {
            all.push((self.listeners.control.as_fd(), readable, Source::Control));
        }
        if self.greetings.len() + self.relays.len() + self.forwards.len() < MAX_STREAMS {
            all.push((self.listeners.stream.as_fd(), readable, Source::Stream));
            all.push((self.listeners.forward.as_fd(), readable, Source::Forward));
        }
        for (id, control) in &self.controls {
            let (socket, flags) = control.waits_for();
            all.push((socket, flags, Source::Connection(*id)));
        }
        for (index, greeting) in self.greetings.iter().enumerate() {
            all.extend(
                greeting.as_ref().map(|greeting| (greeting.socket(), readable, Source::Greeting(index))),
            );
        }
        for (index, forward) in self.forwards.iter().enumerate() {
            let waits_for = forward.as_ref().and_then(Forward::waits_for);
            all.extend(waits_for.map(|(fd, flags)| (fd, flags, Source::Forwarding(index))));
        }
        for (index, relay) in self.relays.iter().enumerate() {
            let source = |flags: PollFlags| match flags.is_empty() {
                true => Source::Broken(index),
                false => Source::Relay(index),
            };
            all.extend(relay.waits_for().into_iter().map(|(fd, flags)| (fd, flags, source(flags))));
        }
        all
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Children => self.reap(),
            Source::Power => {
                if vsock::accept(self.listeners.power.as_fd()).is_some() {
                    self.stop();
                }
            }
            Source::Control => self.accept_control(),
            Source::Stream => {
                let accepted = vsock::accept(self.listeners.stream.as_fd());
                self.greetings.extend(accepted.map(|socket| Some(Greeting::new(socket))));
            }
            Source::Forward => {
                let accepted = vsock::accept(self.listeners.forward.as_fd());
                self.forwards.extend(accepted.map(|socket| Some(Forward::new(socket))));
            }
            Source::Forwarding(index) => self.forward(index),
            Source::Connection(id) => {
                let ended = self.serve(id).err();
                ended.into_iter().for_each(|error| self.hang_up(id, &error));
            }
            Source::Greeting(index) => self.greet(index),
            Source::Relay(index) => self.relays[index].advance(&mut self.buffer),
            Source::Broken(index) => self.relays[index].abandon(),
            Source::Cgroups => self.containers.check_cgroups(),
            Source::Report(pid) => self.containers.take_reports(pid),
        }
    }

    fn accept_control(&mut self) {
        let Some(socket) = vsock::accept(self.listeners.control.as_fd()) else { return };
        // One that does not take even the hello is no loss.
        let Ok(control) = Control::new(socket) else { return };
        self.controls.insert(self.next_control, control);
        // Numbers are not used twice: a reply for a connection that is gone must not meet another.
        self.next_control += 1;
    }

    /// Reads a control connection and carries out its calls.
    fn serve(&mut self, id: u32) -> Result<(), ControlError> {
        let Some(control) = self.controls.get_mut(&id) else { return Ok(()) };
        control.advance(&mut self.buffer)?;
        while let Some(control) = self.controls.get_mut(&id)
            && let Some(Call { number, request }) = control.next_call()?
        {
            let caller = Caller { connection: id, number };
            if self.stopping.is_some() {
                let error = AgentError::new(ErrorKind::WrongState, "The guest is shutting down");
                control.send(&Message::Reply { number, result: Err(error) })?;
            } else if request == Request::Shutdown {
                control.send(&Message::Reply { number, result: Ok(Answer::Done) })?;
                self.stop();
            } else {
                self.containers.call(caller, request);
                self.deliver_replies();
            }
        }
        Ok(())
    }

    fn hang_up(&mut self, id: u32, error: &ControlError) {
        if !matches!(error, ControlError::Closed) {
            guest::log(format_args!("control connection {id} ends: {}", chain(error)));
        }
        self.controls.remove(&id);
        self.containers.forget_connection(id);
        if id == OWNER {
            self.stop();
        }
    }

    /// Sends the replies that have become due. Those of a connection that is gone are dropped.
    fn deliver_replies(&mut self) {
        for (Caller { connection, number }, result) in self.containers.replies() {
            let Some(control) = self.controls.get_mut(&connection) else { continue };
            if let Err(error) = control.send(&Message::Reply { number, result }) {
                self.hang_up(connection, &error);
            }
        }
    }

    fn greet(&mut self, index: usize) {
        let Some(greeting) = &mut self.greetings[index] else { return };
        match greeting.advance() {
            Said::More => {}
            Said::Nonsense => self.greetings[index] = None,
            Said::Hello(hello) => {
                let Some(greeting) = self.greetings[index].take() else { return };
                let relays = self.containers.attach(&hello, greeting.into_socket());
                self.relays.extend(relays.into_iter().flatten());
            }
        }
    }

    fn forward(&mut self, index: usize) {
        match self.forwards[index].as_mut().map_or(Progress::Over, Forward::advance) {
            Progress::More => return,
            Progress::Over => {}
            Progress::Connected(relays) => self.relays.extend(relays),
        }
        self.forwards[index] = None;
    }

    /// As PID 1 the agent inherits every orphan of the guest; most of those reaped are of no concern to anyone.
    fn reap(&mut self) {
        while let Ok(Some(_)) = self.children.read_signal() {}
        while let Some((pid, status)) = sys::process::reap_one() {
            if let Some(status) = exit_status(status) {
                self.containers.reaped(pid, status);
            }
        }
    }

    fn stop(&mut self) {
        self.stopping.get_or_insert_with(|| Instant::now() + STOP_TIMEOUT);
    }

    fn sweep(&mut self) {
        let now = Instant::now();
        let due = self.relays.iter_mut().filter(|relay| relay.deadline().is_some_and(|end| now >= end));
        due.for_each(|relay| relay.advance(&mut self.buffer));
        self.greetings.retain(Option::is_some);
        self.forwards.retain(Option::is_some);
        self.relays.retain(|relay| !relay.has_ended());
    }
}

/// How a process ended, out of its wait status. `None`: it has not.
fn exit_status(status: i32) -> Option<ExitStatus> {
    let byte = |value: i32| u8::try_from(value).ok();
    if libc::WIFEXITED(status) {
        byte(libc::WEXITSTATUS(status)).map(ExitStatus::Code)
    } else if libc::WIFSIGNALED(status) {
        byte(libc::WTERMSIG(status)).map(ExitStatus::Signal)
    } else {
        None
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_statuses_are_codes_or_signals() {
        assert_eq!(exit_status(7 << 8), Some(ExitStatus::Code(7)));
        assert_eq!(exit_status(9), Some(ExitStatus::Signal(9)));
        assert_eq!(exit_status(libc::SIGSEGV | 0x80), Some(ExitStatus::Signal(11)));
        // SIGRTMAX; and a process that is only stopped.
        assert_eq!(exit_status(64), Some(ExitStatus::Signal(64)));
        assert_eq!(exit_status(0x137f), None);
    }
}
