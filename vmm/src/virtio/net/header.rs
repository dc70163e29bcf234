//! The header before each frame (`struct virtio_net_hdr`, virtio 1.2, 5.1.6) and who may ask whom to finish a frame.
//! A pure judgement: the guest's header is copied once, and what the host's kernel gets to see is written anew from the
//! copy, so that it parses nothing but what was agreed on.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// Always with `num_buffers`, as virtio 1 has it.
pub(super) const SIZE: usize = 12;
/// Largest frame with segmentation offload that the specification has buffers for (5.1.6.3.1): 65,535 bytes of a packet
/// and its Ethernet header, with room for a VLAN tag. Stops a guest from having the VMM handle more for one chain.
pub(super) const MAX_FRAME: usize = 65_562;
/// Addresses, type, and a VLAN tag: what a frame may have beyond the MTU.
pub(super) const ETHERNET: usize = 18;

/// Where fields lie that the device writes, or reads back, in a receive buffer.
pub(super) const FLAGS_AT: usize = 0;
pub(super) const GSO_TYPE_AT: usize = 1;
pub(super) const NUM_BUFFERS_AT: usize = 10;

#[expect(clippy::cast_possible_truncation, reason = "bits of a byte")]
const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
#[expect(clippy::cast_possible_truncation, reason = "fits a byte")]
pub(super) const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
#[expect(clippy::cast_possible_truncation, reason = "fits a byte")]
const GSO_TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
#[expect(clippy::cast_possible_truncation, reason = "fits a byte")]
const GSO_TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;

/// What one side leaves to the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Offloads {
    /// Checksums of TCP and UDP.
    pub(super) checksum: bool,
    /// Cutting TCP over IPv4 into segments.
    pub(super) tso4: bool,
    /// The same over IPv6.
    pub(super) tso6: bool,
}

impl Offloads {
    /// What the guest leaves to the host, in frames that it sends.
    pub(super) fn of_host(features: u64) -> Self {
        Self::of(features, [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6])
    }

    /// What the host may leave to the guest, in frames that it receives.
    pub(super) fn of_guest(features: u64) -> Self {
        Self::of(features, [VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6])
    }

    /// Segmentation needs checksums (5.1.3.1); a driver that accepts the one without the other gets neither.
    fn of(features: u64, bits: [u32; 3]) -> Self {
        let [checksum, tso4, tso6] = bits.map(|bit| features >> bit & 1 == 1);
        Self { checksum, tso4: checksum && tso4, tso6: checksum && tso6 }
    }

    pub(super) fn segments(self) -> bool {
        self.tso4 || self.tso6
    }
}

/// A header, in host byte order, without `num_buffers`: that is the device's to write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) flags: u8,
    pub(super) gso_type: u8,
    /// A hint (5.1.6.2.2); never relied on.
    pub(super) header_len: u16,
    pub(super) gso_size: u16,
    pub(super) checksum_start: u16,
    pub(super) checksum_offset: u16,
}

impl Header {
    pub(super) fn from_bytes(bytes: &[u8; SIZE]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[FLAGS_AT],
            gso_type: bytes[GSO_TYPE_AT],
            header_len: word(2),
            gso_size: word(4),
            checksum_start: word(6),
            checksum_offset: word(8),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        bytes[FLAGS_AT] = self.flags;
        bytes[GSO_TYPE_AT] = self.gso_type;
        let words = [self.header_len, self.gso_size, self.checksum_start, self.checksum_offset];
        for (place, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The header with which a frame of `frame_len` bytes may go to the host; `None` if it asks for what was not
    /// agreed on, or points out of the frame. Bits that mean nothing here are cleared, as 5.1.6.2.2 has it.
    pub(super) fn judge(self, frame_len: usize, offloads: Offloads) -> Option<Self> {
        let mut judged = Self::default();
        if offloads.checksum && self.flags & NEEDS_CSUM != 0 {
            let end = usize::from(self.checksum_start) + usize::from(self.checksum_offset) + 2;
            if end > frame_len {
                return None;
            }
            judged.flags = NEEDS_CSUM;
            judged.checksum_start = self.checksum_start;
            judged.checksum_offset = self.checksum_offset;
        }
        match self.gso_type {
            GSO_NONE => return Some(judged),
            GSO_TCPV4 if offloads.tso4 => {}
            GSO_TCPV6 if offloads.tso6 => {}
            _ => return None,
        }
        // 5.1.6.2.1: a frame to be segmented is one to be summed.
        if judged.flags != NEEDS_CSUM || self.gso_size == 0 {
            return None;
        }
        judged.gso_type = self.gso_type;
        judged.gso_size = self.gso_size;
        judged.header_len = self.header_len.min(u16::try_from(frame_len).unwrap_or(u16::MAX));
        Some(judged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Offloads = Offloads { checksum: true, tso4: true, tso6: true };
    const TSO: Header = Header {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        header_len: 54,
        gso_size: 1448,
        checksum_start: 34,
        checksum_offset: 16,
    };

    #[test]
    fn header_survives_the_wire_and_lies_where_the_specification_says() {
        let bytes = TSO.to_bytes();
        assert_eq!(bytes, [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]);
        assert_eq!(Header::from_bytes(&bytes), TSO);
    }

    #[test]
    fn only_what_was_agreed_on_passes() {
        assert_eq!(TSO.judge(3000, ALL), Some(TSO));
        for offloads in [
            Offloads::default(),
            Offloads { tso4: false, ..ALL },
            Offloads { checksum: true, ..Offloads::default() },
        ] {
            assert_eq!(TSO.judge(3000, offloads), None, "{offloads:?}");
        }
        // UFO, UDP segments, ECN, and what nobody has heard of.
        for gso_type in [2, 3, 5, 0x80, 0x81, 0x84, 0xff] {
            assert_eq!(Header { gso_type, ..TSO }.judge(3000, ALL), None, "{gso_type:#x}");
        }
        assert_eq!(Header { gso_size: 0, ..TSO }.judge(3000, ALL), None);
        assert_eq!(Header { flags: 0, ..TSO }.judge(3000, ALL), None);
    }

    #[test]
    fn checksums_out_of_the_frame_do_not_pass() {
        let sum = Header { gso_type: GSO_NONE, ..TSO };
        assert!(sum.judge(52, ALL).is_some());
        assert_eq!(sum.judge(51, ALL), None);
        let far = Header { checksum_start: u16::MAX, checksum_offset: u16::MAX, ..sum };
        assert_eq!(far.judge(MAX_FRAME, ALL), None);
    }

    #[test]
    fn what_means_nothing_is_cleared() {
        let noise = Header { flags: 0xfe, gso_type: GSO_NONE, ..TSO };
        assert_eq!(noise.judge(60, ALL), Some(Header::default()));
        // Without the feature, the bit is none that the device knows.
        let sum = Header { gso_type: GSO_NONE, ..TSO };
        assert_eq!(sum.judge(10, Offloads::default()), Some(Header::default()));
        assert_eq!(Header { header_len: 9000, ..TSO }.judge(100, ALL).unwrap().header_len, 100);
    }

    #[test]
    fn segmentation_without_checksums_is_not_agreed_on() {
        let bit = |bit: u32| 1_u64 << bit;
        let tso = bit(VIRTIO_NET_F_GUEST_TSO4) | bit(VIRTIO_NET_F_GUEST_TSO6);
        assert_eq!(Offloads::of_guest(tso), Offloads::default());
        assert_eq!(Offloads::of_guest(tso | bit(VIRTIO_NET_F_GUEST_CSUM)), ALL);
        assert_eq!(Offloads::of_host(tso | bit(VIRTIO_NET_F_GUEST_CSUM)), Offloads::default());
        let host = bit(VIRTIO_NET_F_CSUM) | bit(VIRTIO_NET_F_HOST_TSO6);
        assert_eq!(Offloads::of_host(host), Offloads { tso4: false, ..ALL });
    }
}
