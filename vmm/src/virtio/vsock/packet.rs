//! Vsock packets in guest memory: the 44-byte header, what the guest sends, and the buffers it lends for our own.
//!
//! A header is copied out of guest memory once, and only the copy is looked at. Receive buffers are opened by the
//! `virtio-vsock` crate. Transmit chains are walked here, because the crate knows one payload descriptor and Linux
//! sends one per page where it does not copy (`MSG_ZEROCOPY` since 6.7, every large packet since 6.17).

use virtio_vsock::packet::{PKT_HEADER_SIZE, VsockPacket};
use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap, VolatileSlice};

use crate::virtio::device::DeviceError;
use crate::virtio::queue::{Chain, MAX_PARTS};

/// CID by which the guest calls the host (virtio 1.2, 5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`, the only socket type offered.
pub(super) const TYPE_STREAM: u16 = 1;
/// Largest payload of one packet: what Linux sends at most. Stops a guest that claims 4 GiB from making the VMM
/// handle, or buffer, more than this for one descriptor chain.
pub(super) const MAX_PAYLOAD: u32 = 64 << 10;

/// `VIRTIO_VSOCK_SHUTDOWN_RCV`: the sender of the packet will receive no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_SEND`: the sender of the packet will send no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both directions: the peer answers with a reset (virtio 1.2, 5.10.6.5).
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// Operations of virtio 1.2, 5.10.6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    pub(super) fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr`, in host byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) socket_type: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) const SIZE: usize = PKT_HEADER_SIZE;

    pub(super) fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let mut fields = Fields { bytes, at: 0 };
        Self {
            src_cid: u64::from_le_bytes(fields.take()),
            dst_cid: u64::from_le_bytes(fields.take()),
            src_port: u32::from_le_bytes(fields.take()),
            dst_port: u32::from_le_bytes(fields.take()),
            len: u32::from_le_bytes(fields.take()),
            socket_type: u16::from_le_bytes(fields.take()),
            op: u16::from_le_bytes(fields.take()),
            flags: u32::from_le_bytes(fields.take()),
            buf_alloc: u32::from_le_bytes(fields.take()),
            fwd_cnt: u32::from_le_bytes(fields.take()),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet, whatever it was: addresses swapped, socket type kept so that the
    /// guest finds the socket it is for.
    pub(super) fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            socket_type: self.socket_type,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

/// Reads the fields of a header one after the other.
struct Fields<'b> {
    bytes: &'b [u8; Header::SIZE],
    at: usize,
}

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        field.copy_from_slice(&self.bytes[self.at..self.at + N]);
        self.at += N;
        field
    }
}

/// A packet from the guest: the copy of its header, and its payload where it lies in guest memory.
#[derive(Debug)]
pub(super) struct GuestPacket<'m> {
    pub(super) header: Header,
    /// Exactly `header.len` bytes in all.
    pub(super) payload: Vec<VolatileSlice<'m>>,
}

impl<'m> GuestPacket<'m> {
    /// Takes a chain of the transmit queue apart.
    pub(super) fn parse(memory: &'m GuestMemoryMmap, mut chain: Chain<'_>) -> Result<Self, DeviceError> {
        let first = chain.next().ok_or(DeviceError::BadChain("packet has no descriptor"))?;
        if first.is_write_only() || (first.len() as usize) < Header::SIZE {
            return Err(DeviceError::BadChain("packet does not begin with a readable header"));
        }
        let mut bytes = [0; Header::SIZE];
        memory.read_slice(&mut bytes, first.addr()).map_err(DeviceError::Memory)?;
        let header = Header::from_bytes(&bytes);
        if header.len > MAX_PAYLOAD {
            return Err(DeviceError::BadChain("packet announces over 64 KiB of payload"));
        }
        let mut payload = Vec::new();
        let mut missing = header.len as usize;
        // Since Linux 6.2 header and payload may share one descriptor. The sum cannot wrap: the header was read there.
        let rest = (first.addr().0.saturating_add(Header::SIZE as u64), first.len() as usize - Header::SIZE);
        let others = chain.map(|d| (d.is_write_only(), (d.addr().0, d.len() as usize)));
        let parts = std::iter::once((false, rest)).chain(others);
        for (part, (write_only, (address, len))) in parts.enumerate() {
            if missing == 0 {
                break;
            }
            if part == MAX_PARTS {
                return Err(DeviceError::BadChain("packet has too many parts"));
            }
            if write_only {
                return Err(DeviceError::BadChain("packet payload is not readable"));
            }
            let len = len.min(missing);
            if len > 0 {
                let slice = memory.get_slice(vm_memory::GuestAddress(address), len);
                payload.push(slice.map_err(DeviceError::Memory)?);
                missing -= len;
            }
        }
        if missing > 0 {
            return Err(DeviceError::BadChain("packet is shorter than its header says"));
        }
        Ok(Self { header, payload })
    }
}

/// A buffer the guest lent for one packet to it.
#[derive(Debug)]
pub(super) struct ReceiveBuffer<'m> {
    packet: VsockPacket<'m, ()>,
    data: VolatileSlice<'m>,
}

impl<'m> ReceiveBuffer<'m> {
    /// Opens a chain of the receive queue.
    pub(super) fn open(memory: &'m GuestMemoryMmap, mut chain: Chain<'_>) -> Result<Self, DeviceError> {
        let packet = VsockPacket::from_rx_virtq_chain(memory, &mut chain, MAX_PAYLOAD).map_err(|error| {
            use virtio_vsock::packet::Error;
            match error {
                Error::InvalidMemoryAccess(source) => DeviceError::Memory(source),
                Error::UnexpectedReadOnlyDescriptor => {
                    DeviceError::BadChain("receive buffer is not writable")
                }
                _ => DeviceError::BadChain("receive buffer cannot hold a packet"),
            }
        })?;
        match packet.data_slice().copied() {
            // A read of 0 bytes would be taken for the end of the host's stream.
            Some(data) if !data.is_empty() => Ok(Self { packet, data }),
            _ => Err(DeviceError::BadChain("receive buffer has no room for data")),
        }
    }

    /// Where the payload goes.
    pub(super) fn data(&self) -> &VolatileSlice<'m> {
        &self.data
    }

    /// Completes the packet; gives the bytes used in all.
    pub(super) fn finish(&mut self, header: &Header) -> Result<u32, DeviceError> {
        self.packet
            .set_header_from_raw(&header.to_bytes())
            .map_err(|_| DeviceError::BadChain("receive buffer cannot hold a header"))?;
        #[expect(clippy::cast_possible_truncation, reason = "44")]
        let size = Header::SIZE as u32;
        Ok(size + header.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_survives_the_wire_and_lies_where_the_specification_says() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x0102_0304,
            dst_port: 1024,
            len: 77,
            socket_type: TYPE_STREAM,
            op: Op::Data as u16,
            flags: 3,
            buf_alloc: 0x4_0000,
            fwd_cnt: u32::MAX,
        };
        let bytes = header.to_bytes();
        assert_eq!(Header::from_bytes(&bytes), header);
        assert_eq!(bytes[16..20], [4, 3, 2, 1]);
        assert_eq!(bytes[30..32], [5, 0]);
        assert_eq!(bytes[40..44], [0xff; 4]);
    }

    #[test]
    fn operations_beyond_the_specification_are_unknown() {
        for op in 1..=7 {
            assert_eq!(Op::from_wire(op).unwrap() as u16, op);
        }
        assert_eq!(Op::from_wire(0), None);
        assert_eq!(Op::from_wire(8), None);
        assert_eq!(Op::from_wire(u16::MAX), None);
    }
}
