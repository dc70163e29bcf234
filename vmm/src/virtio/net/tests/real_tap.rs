//! The device on a tap of its own network namespace: what the host's network stack sends and takes. Needs root and
//! `/dev/net/tun`; prints SKIP and why without.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use virtio_bindings::virtio_net::VIRTIO_NET_F_CSUM;

use super::super::header::SIZE;
use super::super::{Net, NetError, TapError};
use super::driver::{Guest, MERGEABLE, PLAIN, Received, TSO, mac};
use crate::config::interface::{Mtu, ValidInterface};
use crate::sys;
use crate::virtio::device::DeviceError;

const HOST: [u8; 4] = [10, 0, 0, 1];
const GUEST: [u8; 4] = [10, 0, 0, 2];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);
const RIGHT_FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Runs `test` in a network namespace of its own, where there can be one.
pub(super) fn in_namespace(test: impl FnOnce() + Send) {
    let skip = |why: &str| println!("SKIP: {why}");
    let tun = File::options().read(true).write(true).open("/dev/net/tun");
    if let Err(error) = tun {
        return skip(&format!("/dev/net/tun cannot be opened: {error}"));
    }
    if Command::new("ip").arg("-V").output().is_err() {
        return skip("no ip command (iproute2) to set up the tap with");
    }
    // The namespace is the thread's, and ends with it.
    let in_it = move || {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            return println!("SKIP: no network namespace, which takes root: {error}");
        }
        test();
    };
    thread::scope(|scope| scope.spawn(in_it).join()).unwrap();
}

fn tap(flags: i32) -> File {
    let tun = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    sys::attach_tap(&tun, "krx0", flags).unwrap();
    tun
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A guest with `features` at 10.0.0.2, and the host, which knows it, at 10.0.0.1.
fn guest(features: u64) -> Guest {
    lending(Guest::with(device(), features))
}

/// The guest's device, and the host at the other end of its wire.
pub(super) fn device() -> Net {
    let device = Net::over_tap(tap(RIGHT_FLAGS).into(), mac(), Mtu::new(1500).unwrap()).unwrap();
    ip("link set krx0 address 02:00:00:00:00:01 up");
    ip("addr add 10.0.0.1/24 dev krx0");
    ip(&format!("neigh replace 10.0.0.2 lladdr {} dev krx0", mac()));
    device
}

pub(super) fn lending(mut guest: Guest) -> Guest {
    for index in 0..128 {
        guest.lend(index, 1536);
    }
    guest
}

/// The sum that RFC 1071 speaks of, not yet inverted.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| (*b).into()));
    let total: u32 = words.sum();
    let folded = (total & 0xffff) + (total >> 16);
    u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap()
}

/// What TCP and UDP add to their sums.
fn pseudo_header(protocol: u8, from: [u8; 4], to: [u8; 4], len: usize) -> Vec<u8> {
    let len = u16::try_from(len).unwrap().to_be_bytes();
    [&from[..], &to, &[0, protocol], &len].concat()
}

/// An Ethernet frame with a packet from the guest whose checksum, at `sum_at` of the payload, is left to the host.
pub(super) fn frame(protocol: u8, sum_at: usize, payload: &[u8]) -> Vec<u8> {
    let mut payload = payload.to_vec();
    let pseudo = sum(&pseudo_header(protocol, GUEST, HOST, payload.len()));
    payload[sum_at..sum_at + 2].copy_from_slice(&pseudo.to_be_bytes());
    let total = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut header = [&[0x45, 0], &total[..], &[0, 0, 0x40, 0, 64, protocol, 0, 0], &GUEST, &HOST].concat();
    let inverted = (!sum(&header)).to_be_bytes();
    header[10..12].copy_from_slice(&inverted);
    [&HOST_MAC[..], &mac().bytes(), &[8, 0], &header, &payload].concat()
}

/// The virtio header of such a frame.
pub(super) fn to_sum(sum_at: u8) -> [u8; SIZE] {
    [1, 0, 0, 0, 0, 0, 34, 0, sum_at, 0, 0, 0]
}

/// The next IPv4 packet of `protocol` that reaches the guest; the host sends others of its own.
pub(super) fn next_packet(guest: &mut Guest, protocol: u8) -> Received {
    let end = std::time::Instant::now() + TIMEOUT;
    while std::time::Instant::now() < end {
        guest.settle().unwrap();
        while let Some(received) = guest.receive() {
            if received.frame[12..14] == [8, 0] && received.frame[23] == protocol {
                return received;
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("no packet of protocol {protocol}");
}

fn checksum_is_right(protocol: u8, frame: &[u8]) -> bool {
    let payload = &frame[34..];
    sum(&[&pseudo_header(protocol, HOST, GUEST, payload.len())[..], payload].concat()) == 0xffff
}

#[test]
fn other_descriptors_than_taps_as_they_have_to_be_are_refused() {
    in_namespace(|| {
        let mtu = Mtu::new(1500).unwrap();
        let over = |file: File| Net::over_tap(file.into(), mac(), mtu);
        assert!(matches!(over(File::open("/dev/null").unwrap()), Err(TapError::NotATap(_))));
        let unattached = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        assert!(matches!(over(unattached), Err(TapError::NotATap(_))));
        let (tap_only, no_header) = (libc::IFF_TAP, libc::IFF_TAP | libc::IFF_NO_PI);
        let tun = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        for flags in [tap_only, no_header, tun] {
            assert!(matches!(over(tap(flags)), Err(TapError::Flags)), "{flags:#x}");
        }
        assert!(over(tap(RIGHT_FLAGS)).is_ok());
    });
}

#[test]
fn numbers_that_were_not_inherited_are_refused() {
    let interface =
        ValidInterface { tap_fd: 100_000, queue_fds: Vec::new(), mac: mac(), mtu: Mtu::new(1500).unwrap() };
    assert!(matches!(Net::inherit(&[interface]), Err(NetError::NotInherited(100_000, _))));
    assert_eq!(Net::inherit(&[]).unwrap().len(), 0);
}

/// A datagram of the guest, whose checksum is left to the host, and one back, whose is left to the guest.
pub(super) fn exchange_datagrams(guest: &mut Guest) {
    let socket = UdpSocket::bind("10.0.0.1:7").unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut datagram = vec![0x30, 0x39, 0, 7, 0, 13, 0, 0];
    datagram.extend(b"hello");
    guest.send(&to_sum(6), &frame(UDP, 6, &datagram), &[]);
    guest.settle().unwrap();
    let mut heard = [0; 64];
    let (len, from) = socket.recv_from(&mut heard).unwrap();
    assert_eq!((&heard[..len], from.to_string().as_str()), (&b"hello"[..], "10.0.0.2:12345"));
    socket.send_to(b"and back", from).unwrap();
    let received = next_packet(guest, UDP);
    assert_eq!(&received.frame[42..], b"and back");
    assert_eq!(received.header[0] & 1, 1, "a checksum is left to the guest");
}

#[test]
fn datagrams_go_both_ways_and_the_host_completes_checksums() {
    in_namespace(|| exchange_datagrams(&mut guest(MERGEABLE | TSO)));
}

#[test]
fn guest_without_offloads_gets_whole_checksums() {
    in_namespace(|| {
        let mut guest = guest(PLAIN);
        let socket = UdpSocket::bind("10.0.0.1:7").unwrap();
        socket.send_to(b"whole", "10.0.0.2:7").unwrap();
        let received = next_packet(&mut guest, UDP);
        assert_eq!(received.header[..10], [0; 10]);
        assert!(checksum_is_right(UDP, &received.frame));
    });
}

/// A segment of TCP from the guest's port 5001: to port, sequence and acknowledged numbers, flags.
fn segment(to: u16, sequence: u32, acknowledged: u32, flags: u8, options: &[u8]) -> Vec<u8> {
    let words = u8::try_from(5 + options.len() / 4).unwrap();
    let mut bytes = [5001_u16.to_be_bytes(), to.to_be_bytes()].concat();
    bytes.extend(sequence.to_be_bytes());
    bytes.extend(acknowledged.to_be_bytes());
    bytes.extend([words << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.extend(options);
    bytes
}

fn number(frame: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(frame[at..at + 4].try_into().unwrap())
}

const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;
/// Option: segments of 1,460 bytes.
const MSS: [u8; 4] = [2, 4, 5, 0xb4];

/// A stream of the host into the guest: gives the frames that carry its first 8,760 bytes.
pub(super) fn stream_into(guest: &mut Guest) -> Vec<Received> {
    let sender = thread::spawn(|| {
        let mut stream = TcpStream::connect("10.0.0.2:5001").unwrap();
        stream.write_all(&[b'x'; 8760]).unwrap();
        stream
    });
    let syn = next_packet(guest, TCP).frame;
    let (port, first) = (u16::from_be_bytes([syn[34], syn[35]]), number(&syn, 38).wrapping_add(1));
    guest.send(&to_sum(16), &frame(TCP, 16, &segment(port, 1000, first, SYN_ACK, &MSS)), &[]);
    let (mut frames, mut bytes) = (Vec::new(), 0);
    while bytes < 8760 {
        let received = next_packet(guest, TCP);
        let data = 14 + 20 + usize::from(received.frame[46] >> 4) * 4;
        let len = received.frame.len() - data;
        if len > 0 && number(&received.frame, 38) == first.wrapping_add(bytes) {
            assert!(received.frame[data..].iter().all(|byte| *byte == b'x'));
            bytes += u32::try_from(len).unwrap();
            let acknowledged = first.wrapping_add(bytes);
            guest.send(&to_sum(16), &frame(TCP, 16, &segment(port, 1001, acknowledged, ACK, &[])), &[]);
            frames.push(received);
        }
    }
    drop(sender.join().unwrap());
    frames
}

#[test]
fn stream_of_the_host_arrives_unsegmented_where_the_guest_takes_it() {
    in_namespace(|| {
        let mut guest = guest(MERGEABLE | TSO);
        let frames = stream_into(&mut guest);
        let large = frames.iter().max_by_key(|received| received.frame.len()).unwrap();
        assert!(large.frame.len() > 2 * 1460 && large.buffers > 1, "{} bytes", large.frame.len());
        // NEEDS_CSUM, TCP over IPv4, segments of 1,460 bytes.
        assert_eq!(
            (large.header[0] & 1, large.header[1], large.header[4..6].to_vec()),
            (1, 1, vec![0xb4, 5])
        );
    });
}

#[test]
fn stream_of_the_host_arrives_in_segments_where_the_guest_does_not() {
    in_namespace(|| {
        let mut guest = guest(MERGEABLE | 1 << VIRTIO_NET_F_CSUM);
        for received in stream_into(&mut guest) {
            assert!(received.frame.len() <= 1514);
            assert_eq!(received.header[..10], [0; 10]);
            assert!(checksum_is_right(TCP, &received.frame));
        }
    });
}

#[test]
fn segments_of_the_guest_are_left_to_the_host() {
    use std::io::Read;

    in_namespace(|| {
        let mut guest = guest(MERGEABLE | TSO);
        let listener = TcpListener::bind("10.0.0.1:80").unwrap();
        guest.send(&to_sum(16), &frame(TCP, 16, &segment(80, 1000, 0, 2, &MSS)), &[]);
        let first = number(&next_packet(&mut guest, TCP).frame, 38).wrapping_add(1);
        guest.send(&to_sum(16), &frame(TCP, 16, &segment(80, 1001, first, ACK, &[])), &[]);
        guest.settle().unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let data: Vec<u8> = (0..40_000_u32).map(|number| number.to_le_bytes()[0]).collect();
        let mut bytes = segment(80, 1001, first, ACK, &[]);
        bytes.extend(&data);
        let header = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
        guest.send(&header, &frame(TCP, 16, &bytes), &[54, 20_000]);
        guest.settle().unwrap();
        let mut read = vec![0; data.len()];
        stream.read_exact(&mut read).unwrap();
        assert_eq!(read, data);
    });
}

#[test]
fn interface_that_is_down_loses_frames_and_one_that_is_removed_costs_the_device() {
    in_namespace(|| {
        let mut guest = guest(MERGEABLE);
        ip("link set krx0 down");
        guest.send(&[0; SIZE], &[0xff; 60], &[]);
        guest.settle().unwrap();
        assert_eq!(guest.sent(), 1);
        ip("link set krx0 up");
        let socket = UdpSocket::bind("10.0.0.1:7").unwrap();
        ip(&format!("neigh replace 10.0.0.2 lladdr {} dev krx0", mac()));
        socket.send_to(b"again", "10.0.0.2:7").unwrap();
        assert_eq!(&next_packet(&mut guest, UDP).frame[42..], b"again");
        ip("link del krx0");
        let lost = (0..100).find_map(|_| {
            thread::sleep(Duration::from_millis(1));
            guest.settle().err()
        });
        assert!(matches!(lost, Some(DeviceError::Host(error)) if error.kind() != ErrorKind::WouldBlock));
        assert!(guest.worker.fd() >= 0);
    });
}
