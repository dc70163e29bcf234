//! Any header for any frame: what passes is what was agreed on, and lies within the frame.

use proptest::prelude::*;
use proptest::sample::select;

use super::super::header::{Header, MAX_FRAME, Offloads, SIZE};
use crate::testing::properties::hold;

const HEADERS: u32 = 5000;

#[test]
fn headers_that_pass_are_within_their_frames() {
    let edges = |more: [u16; 3]| {
        prop_oneof![0..100_u16, select([&more[..], &[0, 1, 34, 54, 1500, u16::MAX]].concat()), any::<u16>()]
    };
    let kind = prop_oneof![4 => select(vec![0_u8, 1, 4]), 1 => any::<u8>()];
    let flags = prop_oneof![3 => 0..2_u8, 1 => any::<u8>()];
    let numbers = (edges([12, 14, 60]), edges([0, 536, 1448]), edges([14, 58, 60]), edges([6, 16, 2]));
    let frame = prop_oneof![0..100_usize, 0..=MAX_FRAME, Just(MAX_FRAME)];
    let inputs = (flags, kind, numbers, frame, any::<[bool; 3]>());
    hold(HEADERS, &inputs, |(flags, gso_type, numbers, frame, [checksum, tso4, tso6])| {
        let (header_len, gso_size, checksum_start, checksum_offset) = numbers;
        let header = Header { flags, gso_type, header_len, gso_size, checksum_start, checksum_offset };
        assert_eq!(Header::from_bytes(&header.to_bytes()), header);
        // Neither is ever there without checksums.
        let offloads = Offloads { checksum, tso4: checksum && tso4, tso6: checksum && tso6 };
        let judged = header.judge(frame, offloads);
        let summed = checksum && flags & 1 == 1;
        let within = u64::from(checksum_start) + u64::from(checksum_offset) + 2 <= frame as u64;
        let cut = match gso_type {
            0 => Some(false),
            1 => offloads.tso4.then_some(true),
            4 => offloads.tso6.then_some(true),
            _ => None,
        };
        let passes = (!summed || within) && cut.is_some_and(|cut| !cut || (summed && gso_size > 0));
        assert_eq!(judged.is_some(), passes, "{header:?} before {frame} bytes, {offloads:?}");
        let Some(judged) = judged else { return };
        assert_eq!(judged.judge(frame, offloads), Some(judged), "it passes again, as it is");
        let bytes = judged.to_bytes();
        assert_eq!((bytes[0], bytes[1]), (u8::from(summed), if cut == Some(true) { gso_type } else { 0 }));
        assert_eq!(bytes[SIZE - 2..], [0, 0], "the number of buffers is the device's");
        assert!(usize::from(judged.header_len) <= frame);
        assert!(summed || (judged.checksum_start, judged.checksum_offset) == (0, 0));
    });
}
