//! Bytes of the guest that a unix socket would not take yet. Has no bound of its own: the connection's credit is one,
//! and it is checked before. Memory comes in chunks as it is needed and goes back as it is not, so a connection whose
//! reader keeps up has none.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Write};

use vm_memory::{VolatileSlice, WriteVolatile};

/// Size of a chunk. A guest that sends single bytes costs what it sends, not an allocation for each.
const CHUNK: usize = 16 << 10;
/// Chunks given to the kernel in one call.
const VECTORS: usize = 8;

/// A queue of bytes.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    chunks: VecDeque<Vec<u8>>,
    /// Bytes of the first chunk that are gone already.
    start: usize,
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Appends what lies in guest memory.
    pub(super) fn push(&mut self, mut data: VolatileSlice<'_>) -> Result<(), vm_memory::VolatileMemoryError> {
        while !data.is_empty() {
            if self.chunks.back().is_none_or(|last| last.len() == CHUNK) {
                self.chunks.push_back(Vec::with_capacity(CHUNK));
            }
            // Just made sure of; there is no other way to a mutable reference.
            let Some(last) = self.chunks.back_mut() else { break };
            let part = data.subslice(0, data.len().min(CHUNK - last.len()))?;
            last.write_all_volatile(&part)?;
            data = data.offset(part.len())?;
        }
        Ok(())
    }

    /// Writes to `out` until it would block; gives the bytes written. A fatal error is reported only by a call
    /// that wrote nothing.
    pub(super) fn flush(&mut self, out: &mut impl Write) -> io::Result<usize> {
        let mut total = 0;
        while !self.is_empty() {
            let mut vectors = [IoSlice::new(&[]); VECTORS];
            let mut skip = self.start;
            let mut count = 0;
            for (vector, chunk) in vectors.iter_mut().zip(&self.chunks) {
                *vector = IoSlice::new(&chunk[skip..]);
                skip = 0;
                count += 1;
            }
            match out.write_vectored(&vectors[..count]) {
                Ok(0) => break,
                Ok(written) => {
                    self.consume(written);
                    total += written;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if total == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(total)
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.chunks.iter().map(Vec::len).sum::<usize>() - self.start
    }

    fn consume(&mut self, mut bytes: usize) {
        while let Some(first) = self.chunks.front() {
            let left = first.len() - self.start;
            if bytes < left {
                self.start += bytes;
                return;
            }
            bytes -= left;
            self.start = 0;
            self.chunks.pop_front();
        }
        // Nothing left: the queue's own memory goes as well.
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::VolatileSlice;

    use super::*;

    /// Takes `step` bytes a call and `room` in all.
    struct Trickle {
        taken: Vec<u8>,
        step: usize,
        room: usize,
    }

    impl Write for Trickle {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            if self.room == 0 {
                return Err(ErrorKind::WouldBlock.into());
            }
            let n = data.len().min(self.step).min(self.room);
            self.room -= n;
            self.taken.extend_from_slice(&data[..n]);
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn push(backlog: &mut Backlog, mut data: Vec<u8>) {
        backlog.push(VolatileSlice::from(data.as_mut_slice())).unwrap();
    }

    #[test]
    fn bytes_come_out_in_order_whatever_the_chunks() {
        let mut backlog = Backlog::default();
        let all: Vec<u8> = (0..100_000u32).map(|i| (i * 7 % 251) as u8).collect();
        for part in all.chunks(333) {
            push(&mut backlog, part.to_vec());
        }
        let mut out = Trickle { taken: Vec::new(), step: 1009, room: 0 };
        while !backlog.is_empty() {
            out.room = 5000;
            assert!(backlog.flush(&mut out).unwrap() > 0);
        }
        assert_eq!(out.taken, all);
    }

    #[test]
    fn single_bytes_share_a_chunk_and_an_empty_backlog_holds_no_memory() {
        let mut backlog = Backlog::default();
        for byte in 0..=255 {
            push(&mut backlog, vec![byte]);
        }
        assert_eq!(backlog.chunks.len(), 1);
        let mut out = Trickle { taken: Vec::new(), step: usize::MAX, room: usize::MAX };
        assert_eq!(backlog.flush(&mut out).unwrap(), 256);
        assert_eq!(backlog.chunks.capacity(), 0);
    }
}
