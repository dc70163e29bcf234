//! A connection and its unix socket: does the I/O that the state machine of `connection` asks for, between guest memory
//! and the socket, with nothing in between but the backlog of a slow reader.
//!
//! Sockets are watched edge-triggered, so every read and write goes on until it would block; interest is never changed,
//! and a socket that cannot be served (no credit, no receive buffers) wakes nobody.

use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};
use vmm_sys_util::epoll::EventSet;

use super::backlog::Backlog;
use super::connection::{Connection, Output};
use super::handshake;
use super::packet::Header;
use crate::virtio::device::DeviceError;

/// The events a channel wants to know of.
pub(super) fn interest() -> EventSet {
    EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED
}

#[derive(Debug)]
pub(super) struct Channel {
    pub(super) connection: Connection,
    /// Gone when nothing is left to do on it, while the guest has yet to confirm the end.
    socket: Option<UnixStream>,
    backlog: Backlog,
    shut_read: bool,
    shut_write: bool,
}

impl Channel {
    pub(super) fn new(connection: Connection, socket: UnixStream) -> Self {
        let backlog = Backlog::default();
        Self { connection, socket: Some(socket), backlog, shut_read: false, shut_write: false }
    }

    /// Tells the host client that the guest accepted.
    pub(super) fn open(&mut self) {
        let line = handshake::accepted(self.connection.ports().host);
        // Nothing was written before, so it fits; whatever else happens, the client is not there to read it.
        if self.socket.as_mut().is_none_or(|socket| socket.write_all(line.as_bytes()).is_err()) {
            self.reader_left();
        }
    }

    /// Passes on what the guest sent; what the socket does not take at once waits in the backlog.
    pub(super) fn deliver(&mut self, payload: &[VolatileSlice<'_>]) -> Result<(), DeviceError> {
        for slice in payload {
            let mut rest = *slice;
            if self.backlog.is_empty() {
                match self.write_from_guest(rest) {
                    Ok(left) => rest = left,
                    Err(_) => {
                        self.reader_left();
                        return Ok(());
                    }
                }
            }
            self.backlog.push(rest).map_err(|error| DeviceError::Memory(error.into()))?;
        }
        Ok(())
    }

    /// The socket is ready for something.
    pub(super) fn on_events(&mut self, events: EventSet) {
        if events.contains(EventSet::OUT) {
            self.flush();
        }
        let gone = EventSet::HANG_UP | EventSet::ERROR;
        if events.intersects(gone | EventSet::IN | EventSet::READ_HANG_UP) {
            self.connection.on_readable();
        }
        if events.intersects(gone) {
            self.reader_left();
        }
    }

    /// Carries out `output`: gives the packet's header, or nothing when the socket had no data after all.
    pub(super) fn produce(
        &mut self,
        output: Output,
        buffer: &VolatileSlice<'_>,
        guest_cid: u64,
    ) -> Option<Header> {
        let len = match output {
            Output::Control { .. } => 0,
            Output::Data { max } => self.read_into_guest(buffer, max)?,
        };
        Some(self.connection.packet(output, len, guest_cid))
    }

    /// Brings the socket in line with the connection's state after an event.
    pub(super) fn settle(&mut self) {
        let ends = self.connection.socket_ends();
        if let Some(socket) = &self.socket {
            // Fails only if the peer is gone, which shows on the next event.
            if ends.read && !self.shut_read {
                let _ = socket.shutdown(Shutdown::Read);
                self.shut_read = true;
            }
            if ends.write && !self.shut_write {
                let _ = socket.shutdown(Shutdown::Write);
                self.shut_write = true;
            }
        }
        if self.connection.is_closing() {
            self.socket = None;
        }
    }

    /// Whether neither the guest nor the host has any more to do with this channel.
    pub(super) fn is_over(&self) -> bool {
        self.connection.is_draining() && (self.backlog.is_empty() || self.socket.is_none())
    }

    #[cfg(test)]
    pub(super) fn backlog_bytes(&self) -> usize {
        self.backlog.len()
    }

    fn flush(&mut self) {
        let Some(socket) = &mut self.socket else { return };
        match self.backlog.flush(socket) {
            Ok(bytes) => self.connection.on_forwarded(count(bytes)),
            Err(_) => self.reader_left(),
        }
    }

    fn reader_left(&mut self) {
        self.connection.on_reader_gone();
        self.backlog.clear();
    }

    /// Writes `data` as far as the socket takes it; gives what is left.
    fn write_from_guest<'m>(&mut self, mut data: VolatileSlice<'m>) -> io::Result<VolatileSlice<'m>> {
        let Some(socket) = &mut self.socket else { return Err(ErrorKind::NotConnected.into()) };
        while !data.is_empty() {
            match socket.write_volatile(&data).map_err(host_error) {
                Ok(0) => break,
                Ok(written) => {
                    self.connection.on_forwarded(count(written));
                    data = data.offset(written).map_err(host_error)?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(data)
    }

    /// Reads up to `max` bytes into `buffer`; nothing if there are none, or no more ever.
    fn read_into_guest(&mut self, buffer: &VolatileSlice<'_>, max: u32) -> Option<u32> {
        let mut part = buffer.subslice(0, buffer.len().min(max as usize)).ok()?;
        loop {
            let Some(socket) = &mut self.socket else {
                self.connection.on_end_of_file();
                return None;
            };
            match socket.read_volatile(&mut part).map_err(host_error) {
                Ok(0) => self.connection.on_end_of_file(),
                Ok(bytes) => return Some(count(bytes)),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.connection.on_drained(),
                Err(_) => {
                    self.connection.on_end_of_file();
                    self.reader_left();
                }
            }
            return None;
        }
    }
}

/// Bytes of one read or write, which a credit bounds far below 4 GiB.
fn count(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

fn host_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}
