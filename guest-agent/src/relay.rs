//! Moves the bytes of one direction of one stream, and no more of them than fit: what the receiver does not take stays
//! with the sender, so a slow reader stops its writer and nobody else.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::unistd::{read, write};

/// Most bytes read at once, and the most a relay ever holds.
pub(crate) const CHUNK: usize = 64 << 10;
/// Chunks moved in one go before others have their turn.
const TURNS: u32 = 4;
/// What the terminal's line discipline takes for the end of input (`VEOF`, control-D).
const END_OF_FILE: u8 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AtEnd {
    /// Closing the descriptors says all there is to say.
    Close,
    /// The other direction goes on.
    HalfClose,
    /// A terminal knows no end of its input: the character that means it is typed.
    TypeEndOfFile,
}

/// How far a relay is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Going,
    /// Nothing more comes after what is pending.
    Draining,
    Ended,
}

/// When a source that is silent is at its end, once that is known. A terminal has no end as long as any process holds
/// it: this one is set when the process whose terminal it is has ended.
pub(crate) type LastWords = Rc<Cell<Option<Instant>>>;

/// One direction of a stream.
#[derive(Debug)]
pub(crate) struct Relay {
    from: Rc<OwnedFd>,
    to: Rc<OwnedFd>,
    at_end: AtEnd,
    /// Read and not written yet.
    pending: Vec<u8>,
    stage: Stage,
    last_words: LastWords,
}

impl Relay {
    /// From a connection to a process's standard input.
    pub(crate) fn input(connection: Rc<OwnedFd>, pipe: Rc<OwnedFd>) -> Self {
        Self::new(connection, pipe, AtEnd::Close)
    }

    /// From a connection to a process's terminal.
    pub(crate) fn terminal_input(connection: Rc<OwnedFd>, terminal: Rc<OwnedFd>) -> Self {
        Self::new(connection, terminal, AtEnd::TypeEndOfFile)
    }

    /// From a process's output to a connection.
    pub(crate) fn output(from: Rc<OwnedFd>, connection: Rc<OwnedFd>) -> Self {
        Self::new(from, connection, AtEnd::Close)
    }

    /// From a process's terminal to a connection.
    pub(crate) fn terminal_output(
        terminal: Rc<OwnedFd>,
        connection: Rc<OwnedFd>,
        last_words: LastWords,
    ) -> Self {
        let mut relay = Self::output(terminal, connection);
        relay.last_words = last_words;
        relay
    }

    /// One of the two directions between sockets, each of which ends by itself.
    pub(crate) fn half(from: Rc<OwnedFd>, to: Rc<OwnedFd>) -> Self {
        Self::new(from, to, AtEnd::HalfClose)
    }

    fn new(from: Rc<OwnedFd>, to: Rc<OwnedFd>, at_end: AtEnd) -> Self {
        let last_words = LastWords::default();
        Self { from, to, at_end, pending: Vec::new(), stage: Stage::Going, last_words }
    }

    /// What to wait for: to take more, and meanwhile whether the receiver is gone; or to give what is pending.
    pub(crate) fn waits_for(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        if self.pending.is_empty() {
            vec![(self.from.as_fd(), PollFlags::POLLIN), (self.to.as_fd(), PollFlags::empty())]
        } else {
            vec![(self.to.as_fd(), PollFlags::POLLOUT)]
        }
    }

    /// When to look again though nothing has come.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.last_words.get().filter(|_| self.stage == Stage::Going && self.pending.is_empty())
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.stage == Stage::Ended
    }

    /// The receiver is gone.
    pub(crate) fn abandon(&mut self) {
        self.stage = Stage::Ended;
    }

    /// Moves what can be moved now. `buffer` is scratch space, of [`CHUNK`] bytes.
    pub(crate) fn advance(&mut self, buffer: &mut [u8]) {
        for _ in 0..TURNS {
            match self.flush() {
                Ok(()) if self.stage == Stage::Going => {}
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                Ok(()) | Err(_) => return self.abandon(),
            }
            match read(&self.from, buffer) {
                Err(Errno::EAGAIN) if self.deadline().is_some_and(|end| Instant::now() >= end) => {
                    self.drain()
                }
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                // A terminal whose last user is gone reports EIO, a connection that was reset its own error.
                Ok(0) | Err(_) => self.drain(),
                Ok(length) => self.give(&buffer[..length]),
            }
        }
    }

    /// Writes straight out of the buffer and keeps only the rest.
    fn give(&mut self, bytes: &[u8]) {
        match write(&self.to, bytes) {
            Ok(written) => self.pending.extend_from_slice(&bytes[written..]),
            Err(Errno::EAGAIN | Errno::EINTR) => self.pending.extend_from_slice(bytes),
            // Nobody is there to take them.
            Err(_) => self.abandon(),
        }
    }

    fn flush(&mut self) -> nix::Result<()> {
        while !self.pending.is_empty() {
            let written = write(&self.to, &self.pending)?;
            self.pending.drain(..written);
        }
        // An idle stream holds no memory.
        self.pending = Vec::new();
        Ok(())
    }

    fn drain(&mut self) {
        self.stage = Stage::Draining;
        if self.at_end == AtEnd::TypeEndOfFile {
            self.pending.push(END_OF_FILE);
        }
    }
}

impl Drop for Relay {
    /// The other direction of a terminal's connection may still hold the socket; its peer has to learn of the end.
    fn drop(&mut self) {
        use nix::sys::socket::{Shutdown, shutdown};
        use std::os::fd::AsRawFd;
        let which = if self.at_end == AtEnd::HalfClose { Shutdown::Write } else { Shutdown::Both };
        // On a pipe or a terminal this fails and does nothing.
        let _ = shutdown(self.to.as_raw_fd(), which);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;

    fn pipe() -> (Rc<OwnedFd>, Rc<OwnedFd>) {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        (Rc::new(reader), Rc::new(writer))
    }

    #[test]
    fn a_reader_that_stops_stops_the_writer_and_nothing_is_lost() {
        let (from, mut source) = pipe();
        let (mut sink, to) = pipe();
        let mut relay = Relay::output(from, to);
        let mut buffer = vec![0; CHUNK];
        let (mut sent, mut received) = (Vec::new(), Vec::new());
        let pattern: Vec<u8> = (0..8191).map(|i| u8::try_from(i % 251).unwrap()).collect();
        // Nobody reads: both pipes and one chunk fill up, and no more is taken.
        while let Ok(written) = write(&mut source, &pattern) {
            sent.extend_from_slice(&pattern[..written]);
            relay.advance(&mut buffer);
            assert!(!relay.has_ended());
            assert!(relay.pending.len() <= CHUNK);
        }
        assert!(sent.len() <= 4 * CHUNK + pattern.len());
        drop(source);
        let mut chunk = [0; 1000];
        loop {
            relay.advance(&mut buffer);
            while let Ok(length @ 1..) = read(&mut sink, &mut chunk) {
                received.extend_from_slice(&chunk[..length]);
            }
            if relay.has_ended() {
                break;
            }
        }
        assert!(sent == received);
        assert_eq!(relay.pending.capacity(), 0);
    }

    #[test]
    fn a_receiver_that_is_gone_ends_the_stream() {
        let (from, source) = pipe();
        let (sink, to) = pipe();
        let mut relay = Relay::output(from, to);
        drop(sink);
        write(&source, b"x").unwrap();
        relay.advance(&mut vec![0; CHUNK]);
        assert!(relay.has_ended());
    }

    #[test]
    fn a_silent_source_ends_when_its_last_words_are_due() {
        let (from, source) = pipe();
        let (sink, to) = pipe();
        let last_words = LastWords::default();
        let mut relay = Relay::terminal_output(from, to, last_words.clone());
        write(&source, b"last").unwrap();
        relay.advance(&mut vec![0; CHUNK]);
        assert!(!relay.has_ended() && relay.deadline().is_none());
        last_words.set(Some(Instant::now() + std::time::Duration::from_secs(3600)));
        relay.advance(&mut vec![0; CHUNK]);
        assert!(!relay.has_ended() && relay.deadline().is_some());
        last_words.set(Some(Instant::now()));
        write(&source, b" words").unwrap();
        relay.advance(&mut vec![0; CHUNK]);
        relay.advance(&mut vec![0; CHUNK]);
        assert!(relay.has_ended());
        let mut said = [0; 16];
        let length = read(&sink, &mut said).unwrap();
        assert_eq!(&said[..length], b"last words");
    }

    #[test]
    fn the_end_of_a_terminals_input_is_typed() {
        let (from, source) = pipe();
        let (sink, to) = pipe();
        let mut relay = Relay::terminal_input(from, to);
        write(&source, b"exit").unwrap();
        drop(source);
        relay.advance(&mut vec![0; CHUNK]);
        assert!(relay.has_ended());
        let mut typed = [0; 8];
        let length = read(&sink, &mut typed).unwrap();
        assert_eq!(&typed[..length], b"exit\x04");
    }
}
