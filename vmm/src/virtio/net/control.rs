//! The control queue (virtio 1.2, 5.1.6.5), with the one command that there is: how many pairs of queues are used
//! (`VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`). All others are refused, as none of their features is offered.

use std::io;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::virtio::device::DeviceError;
use crate::virtio::queue::{Chain, LiveQueue, MAX_PARTS};

/// Class, command, and the number of pairs, which is all of the longest command.
const COMMAND: usize = 4;
/// Commands carried out before others of the device's work are looked at. Linux gives one at a time.
const BUDGET: usize = 16;

/// A command, and where the answer goes.
#[derive(Debug, PartialEq, Eq)]
struct Command {
    bytes: [u8; COMMAND],
    length: usize,
    answer: Option<GuestAddress>,
}

impl Command {
    /// The readable parts of a chain, as far as a command can be long, and the first writable byte.
    fn read(memory: &GuestMemoryMmap, chain: Chain<'_>) -> Result<Self, DeviceError> {
        let mut command = Self { bytes: [0; COMMAND], length: 0, answer: None };
        for (part, descriptor) in chain.enumerate() {
            if part == MAX_PARTS {
                return Err(DeviceError::BadChain("a command has too many parts"));
            }
            if descriptor.len() == 0 {
                continue;
            }
            if descriptor.is_write_only() {
                command.answer = Some(descriptor.addr());
                break;
            }
            let length = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            let from = command.length.min(COMMAND);
            let to = from.saturating_add(length).min(COMMAND);
            let read = memory.read_slice(&mut command.bytes[from..to], descriptor.addr());
            read.map_err(DeviceError::Memory)?;
            command.length = command.length.saturating_add(length);
        }
        Ok(command)
    }

    /// The number of pairs that it asks for, up to `most`; `None` is to be refused.
    fn pairs(&self, most: usize) -> Option<usize> {
        let [class, command, low, high] = self.bytes;
        let is_it =
            (u32::from(class), u32::from(command)) == (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
        let pairs = usize::from(u16::from_le_bytes([low, high]));
        (is_it && self.length == COMMAND && (1..=most).contains(&pairs)).then_some(pairs)
    }
}

/// Carries out what is in the queue, up to the budget; what may be left makes the kick readable. `set` has a number of pairs
/// used, of at most `most`.
///
/// # Errors
/// A chain or a queue that does not lie in guest memory.
pub fn serve(
    queue: &mut LiveQueue,
    most: usize,
    mut set: impl FnMut(usize) -> io::Result<()>,
) -> Result<(), DeviceError> {
    queue.clear_kick();
    let memory = queue.memory().clone();
    for _ in 0..BUDGET {
        let Some(chain) = queue.pop()? else {
            if queue.enable_kicks()? {
                continue;
            }
            return Ok(());
        };
        let head = chain.head_index();
        let command = Command::read(&memory, chain)?;
        let done = command.pairs(most).is_some_and(|pairs| set(pairs).is_ok());
        let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        let written = match command.answer {
            Some(at) => {
                let answer = u8::try_from(answer).unwrap_or(u8::MAX);
                memory.write_obj(answer, at).map_err(DeviceError::Memory)?;
                1
            }
            None => 0,
        };
        queue.add_used(head, written)?;
        queue.notify()?;
    }
    queue.kick_again();
    Ok(())
}

#[cfg(test)]
mod tests {
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::mock::MockSplitQueue;

    use super::*;
    use crate::testing::{self, NEXT, WRITE};

    const TEXT: u64 = 0x1_0000;
    const ANSWER: u64 = 0x1_1000;
    const UNTOUCHED: u8 = 0x55;

    /// What is set by a chain of these parts, each an address, a length and flags, over `bytes`; and the answer.
    fn command(bytes: &[u8], parts: &[(u64, u32, u16)]) -> (Result<(), DeviceError>, Vec<usize>, u8) {
        let memory = testing::memory(1);
        memory.write_slice(bytes, GuestAddress(TEXT)).unwrap();
        memory.write_obj(UNTOUCHED, GuestAddress(ANSWER)).unwrap();
        let mock = MockSplitQueue::new(&memory, 16);
        let chain: Vec<RawDescriptor> = parts
            .iter()
            .zip(1..)
            .map(|((at, length, flags), next)| {
                let flags = if usize::from(next) < parts.len() { flags | NEXT } else { *flags };
                Descriptor::new(*at, *length, flags, next).into()
            })
            .collect();
        mock.add_desc_chains(&chain, 0).unwrap();
        let (mut queue, _kick) = testing::live_queue(&memory, &mock, &testing::interrupt().0);
        let mut set = Vec::new();
        let served = serve(&mut queue, 4, |pairs| {
            set.push(pairs);
            if pairs == 3 { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
        });
        (served, set, memory.read_obj(GuestAddress(ANSWER)).unwrap())
    }

    #[test]
    fn pairs_are_set() {
        for parts in [
            &[(TEXT, 2, 0), (TEXT + 2, 2, 0), (ANSWER, 1, WRITE)][..],
            &[(TEXT, 4, 0), (ANSWER, 1, WRITE)],
            &[(TEXT, 1, 0), (TEXT + 1, 0, 0), (TEXT + 1, 3, 0), (ANSWER, 9, WRITE)],
        ] {
            let (served, set, answer) = command(&[4, 0, 2, 0], parts);
            assert!(served.is_ok());
            assert_eq!((set, answer), (vec![2], 0));
        }
    }

    #[test]
    fn what_is_no_such_command_is_refused() {
        let whole = [(TEXT, 4, 0), (ANSWER, 1, WRITE)];
        for bytes in
            [[4, 0, 0, 0], [4, 0, 5, 0], [4, 0, 2, 1], [4, 1, 2, 0], [3, 0, 2, 0], [0, 0, 0, 0], [255; 4]]
        {
            let (served, set, answer) = command(&bytes, &whole);
            assert!(served.is_ok());
            assert_eq!((set, answer), (vec![], 1), "{bytes:?}");
        }
        for parts in [
            &[(TEXT, 3, 0), (ANSWER, 1, WRITE)][..],
            &[(TEXT, 5, 0), (ANSWER, 1, WRITE)],
            &[(ANSWER, 1, WRITE)],
        ] {
            let (served, set, answer) = command(&[4, 0, 2, 0], parts);
            assert!(served.is_ok());
            assert_eq!((set, answer), (vec![], 1), "{parts:?}");
        }
        // The host's refusal.
        let (served, set, answer) = command(&[4, 0, 3, 0], &whole);
        assert!(served.is_ok());
        assert_eq!((set, answer), (vec![3], 1));
    }

    #[test]
    fn chains_without_an_answer_or_outside_of_memory_are_harmless() {
        let (served, set, answer) = command(&[4, 0, 2, 0], &[(TEXT, 4, 0)]);
        assert!(served.is_ok());
        assert_eq!((set, answer), (vec![2], UNTOUCHED));
        for parts in [
            &[(1 << 40, 4, 0), (ANSWER, 1, WRITE)][..],
            &[(u64::MAX, 4, 0), (ANSWER, 1, WRITE)],
            &[(TEXT, u32::MAX - 1, 0), (1 << 40, 1, WRITE)],
        ] {
            assert!(matches!(command(&[4, 0, 2, 0], parts).0, Err(DeviceError::Memory(_))), "{parts:?}");
        }
    }
}
