//! The program that gives connections to the loopback to one listener, and its attachment to a network namespace.
//!
//! Written in BPF's instructions, as there are twenty of them and no compiler for it among what a build needs.

use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::sys;

/// Operations of BPF (`linux/bpf.h`).
const LOAD_CONSTANT: u8 = 0x18;
const LOAD_WORD: u8 = 0x61;
const STORE_WORD: u8 = 0x63;
const COPY: u8 = 0xbf;
const SET: u8 = 0xb7;
const ADD: u8 = 0x07;
const AND: u8 = 0x57;
const IF_EQUAL: u8 = 0x15;
const IF_NOT_EQUAL: u8 = 0x55;
const JUMP: u8 = 0x05;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// In the place of a register: the constant is a map, by its descriptor.
const MAP_DESCRIPTOR: u8 = 1;

/// The kernel's functions for such programs.
const MAP_LOOKUP: i32 = 1;
const SOCKET_RELEASE: i32 = 86;
const SOCKET_ASSIGN: i32 = 124;

/// Offsets in `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_V4: i16 = 40;
const LOCAL_V6: i16 = 44;

/// The last word of ::1, as it lies in memory.
const ONE: i32 = 1_i32.to_be();
/// The kernel goes on with what the program has assigned, or on its own.
const PASS: i32 = 1;

/// Gives connections to the loopback to these listeners, the first for IPv4 and the second for IPv6, as long as the returned
/// descriptor is open.
pub(super) fn attach(netns: BorrowedFd<'_>, listeners: &[TcpListener]) -> nix::Result<OwnedFd> {
    let map = sys::socket_map(2)?;
    for (key, listener) in (0..).zip(listeners) {
        sys::put_socket(&map, key, listener.as_fd())?;
    }
    let program = sys::load_socket_lookup(&program(map.as_raw_fd()))?;
    sys::attach_socket_lookup(netns, program.as_fd())
}

/// The program, over a map of listeners.
fn program(map: i32) -> Vec<u64> {
    let find = [
        // The key lies on the stack.
        instruction(STORE_WORD, 10, 7, -4, 0),
        instruction(COPY, 2, 10, 0, 0),
        instruction(ADD, 2, 0, 0, -4),
        instruction(LOAD_CONSTANT, 1, MAP_DESCRIPTOR, 0, map),
        instruction(0, 0, 0, 0, 0),
        instruction(CALL, 0, 0, 0, MAP_LOOKUP),
        instruction(IF_EQUAL, 0, 0, 7, 0),
        instruction(COPY, 7, 0, 0, 0),
        instruction(COPY, 1, 6, 0, 0),
        instruction(COPY, 2, 7, 0, 0),
        instruction(SET, 3, 0, 0, 0),
        instruction(CALL, 0, 0, 0, SOCKET_ASSIGN),
        instruction(COPY, 1, 7, 0, 0),
        instruction(CALL, 0, 0, 0, SOCKET_RELEASE),
        instruction(SET, 0, 0, 0, PASS),
        instruction(EXIT, 0, 0, 0, 0),
    ];
    let pass = [instruction(SET, 0, 0, 0, PASS), instruction(EXIT, 0, 0, 0, 0)];
    // Each test leaves out one instruction where the packet is meant, else goes to `pass` behind it.
    let is = |offset: i16, value: i32| {
        [instruction(LOAD_WORD, 3, 6, offset, 0), instruction(IF_EQUAL, 3, 0, 2, value), pass[0], pass[1]]
    };
    let v6 = [is(LOCAL_V6, 0), is(LOCAL_V6 + 4, 0), is(LOCAL_V6 + 8, 0), is(LOCAL_V6 + 12, ONE)].concat();
    let v4 = [
        instruction(LOAD_WORD, 3, 6, LOCAL_V4, 0),
        // The first byte of the address, which the network's order has lowest here.
        instruction(AND, 3, 0, 0, 0xff),
        instruction(IF_EQUAL, 3, 0, 2, 127),
        pass[0],
        pass[1],
        instruction(SET, 7, 0, 0, 0),
        // Over the part for IPv6.
        instruction(JUMP, 0, 0, distance(v6.len() + 1), 0),
    ];
    let mut all = vec![instruction(COPY, 6, 1, 0, 0)];
    all.extend(is(PROTOCOL, libc::IPPROTO_TCP));
    all.push(instruction(LOAD_WORD, 2, 6, FAMILY, 0));
    all.push(instruction(IF_NOT_EQUAL, 2, 0, distance(v4.len()), libc::AF_INET));
    all.extend(v4);
    all.extend(v6);
    all.push(instruction(SET, 7, 0, 0, 1));
    all.extend(find);
    all
}

fn distance(instructions: usize) -> i16 {
    i16::try_from(instructions).unwrap_or(i16::MAX)
}

/// `struct bpf_insn`: operation, registers, offset, value.
fn instruction(operation: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = value.to_le_bytes();
    u64::from_le_bytes([operation, from << 4 | to, low, high, a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which key the program asks the map for; `None` where it leaves the connection alone.
    fn key(family: i32, protocol: i32, v4: [u8; 4], v6: [u8; 16]) -> Option<i64> {
        let program = program(9);
        let word = |offset: i16| {
            let at = |base: i16| usize::try_from(offset - base).unwrap();
            match offset {
                FAMILY => i64::from(family),
                PROTOCOL => i64::from(protocol),
                LOCAL_V4 => i64::from(u32::from_ne_bytes(v4)),
                _ => i64::from(u32::from_ne_bytes(v6[at(LOCAL_V6)..at(LOCAL_V6) + 4].try_into().unwrap())),
            }
        };
        let (mut registers, mut stack, mut at) = ([0_i64; 11], 0, 0_i64);
        loop {
            let [operation, pair, low, high, a, b, c, d] =
                program[usize::try_from(at).unwrap()].to_le_bytes();
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            let offset = i16::from_le_bytes([low, high]);
            let value = i64::from(i32::from_le_bytes([a, b, c, d]));
            at += 1;
            match operation {
                LOAD_WORD => registers[to] = word(offset),
                STORE_WORD => stack = registers[from],
                COPY => registers[to] = registers[from],
                SET => registers[to] = value,
                ADD => registers[to] += value,
                AND => registers[to] &= value,
                LOAD_CONSTANT => at += 1,
                IF_EQUAL if registers[to] == value => at += i64::from(offset),
                IF_NOT_EQUAL if registers[to] != value => at += i64::from(offset),
                IF_EQUAL | IF_NOT_EQUAL => {}
                JUMP => at += i64::from(offset),
                CALL => return Some(stack),
                EXIT => return None,
                _ => panic!("operation {operation:#x}"),
            }
        }
    }

    #[test]
    fn tcp_to_the_loopback_is_taken_and_nothing_else() {
        let (v4, v6, tcp) = (libc::AF_INET, libc::AF_INET6, libc::IPPROTO_TCP);
        let mut one = [0; 16];
        one[15] = 1;
        assert_eq!(key(v4, tcp, [127, 0, 0, 1], [0; 16]), Some(0));
        assert_eq!(key(v4, tcp, [127, 9, 9, 9], [0; 16]), Some(0));
        assert_eq!(key(v6, tcp, [0; 4], one), Some(1));
        assert_eq!(key(v4, tcp, [10, 0, 0, 127], [0; 16]), None);
        assert_eq!(key(v4, libc::IPPROTO_UDP, [127, 0, 0, 1], [0; 16]), None);
        assert_eq!(key(v6, tcp, [127, 0, 0, 1], [0; 16]), None);
        for at in 0..15 {
            let mut other = one;
            other[at] = 1;
            assert_eq!(key(v6, tcp, [0; 4], other), None);
        }
        assert_eq!(key(libc::AF_UNIX, tcp, [127, 0, 0, 1], [0; 16]), None);
    }
}
