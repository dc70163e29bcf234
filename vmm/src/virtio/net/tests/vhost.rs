//! The device over vhost-net, on a real tap. Needs `/dev/vhost-net` besides what `real_tap` needs; prints SKIP and why without.

use std::thread;
use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::super::vhost::{Vhost, VhostError};
use super::driver::{FREE_MEMORY, Guest, HEADER, MEMORY_MIB, MERGEABLE, PLAIN, TSO};
use super::real_tap::{UDP, device, exchange_datagrams, in_namespace, lending, next_packet, stream_into};
use crate::jail::seccomp::Kind;
use crate::testing::{self, NEXT, WRITE};
use crate::virtio::device::{Device, DeviceError, Placement};

/// As the transport has it accepted by every driver.
const MODERN: u64 = 1 << VIRTIO_F_VERSION_1;

/// A guest with these features, unless there is no vhost-net.
fn guest(features: u64) -> Option<Guest> {
    let memory = testing::memory(MEMORY_MIB);
    match Vhost::open(&memory, 1) {
        Err(error) => {
            println!("SKIP: {error}");
            None
        }
        Ok(vhost) => {
            let mut device = device();
            device.set_vhost(vhost);
            assert_eq!(device.placement(), Placement::OwnThread(Kind::VhostNetwork));
            Some(lending(Guest::in_memory(memory, device, features | MODERN)))
        }
    }
}

/// The error that the device ends with.
fn error_of(guest: &mut Guest) -> Option<DeviceError> {
    (0..1000).find_map(|_| {
        thread::sleep(Duration::from_millis(1));
        guest.settle().err()
    })
}

#[test]
fn hosts_without_vhost_net_say_so() {
    match Vhost::open(&testing::memory(1), 2) {
        Ok(vhost) => assert_eq!(vhost.len(), 2),
        Err(error) => assert!(matches!(error, VhostError::Open(_)), "{error:?}"),
    }
    assert_eq!(Vhost::open(&testing::memory(1), 0).unwrap().len(), 0, "nothing to open for no interface");
}

#[test]
fn kernel_moves_frames_both_ways_and_interrupts() {
    in_namespace(|| {
        let Some(mut guest) = guest(MERGEABLE | TSO) else { return };
        exchange_datagrams(&mut guest);
        assert_eq!(guest.sent(), 1);
        assert!(guest.irq.read().unwrap() >= 2, "for what was sent, and for what was received");
        assert!(stream_into(&mut guest).iter().any(|received| received.frame.len() > 2 * 1460));
    });
}

#[test]
fn kernel_makes_segments_and_checksums_for_a_guest_that_takes_none() {
    in_namespace(|| {
        let Some(mut guest) = guest(PLAIN | MERGEABLE) else { return };
        let socket = std::net::UdpSocket::bind("10.0.0.1:7").unwrap();
        guest.settle().unwrap();
        socket.send_to(b"whole", "10.0.0.2:7").unwrap();
        assert_eq!(next_packet(&mut guest, UDP).header[..10], [0; 10]);
    });
}

#[test]
fn device_comes_back_after_a_reset() {
    in_namespace(|| {
        let Some(mut guest) = guest(MERGEABLE | TSO) else { return };
        exchange_datagrams(&mut guest);
        for features in [MERGEABLE | TSO, TSO, MERGEABLE | TSO] {
            guest = guest.restart_in_place(features | MODERN);
            guest.settle().unwrap();
            guest = lending(guest);
            if features & MERGEABLE != 0 {
                exchange_datagrams(&mut guest);
            }
        }
    });
}

#[test]
fn reset_takes_the_guests_memory_back() {
    in_namespace(|| {
        let Some(mut guest) = guest(MERGEABLE | TSO) else { return };
        exchange_datagrams(&mut guest);
        while guest.rx.take_used(&guest.memory).is_some() {}
        let Guest { worker, memory, mut rx, device, .. } = guest;
        drop(worker);
        let socket = std::net::UdpSocket::bind("10.0.0.1:7").unwrap();
        socket.send_to(b"to nobody", "10.0.0.2:7").unwrap();
        thread::sleep(Duration::from_millis(50));
        assert_eq!(rx.take_used(&memory), None);
        drop(device);
    });
}

#[test]
fn chains_that_the_kernel_refuses_cost_the_device() {
    const OUTSIDE: u64 = 1 << 40;
    let end = (MEMORY_MIB as u64) << 20;
    let cases: [(&str, &[_]); 6] = [
        ("outside of memory", &[(OUTSIDE, HEADER + 60, 0, 0)]),
        ("across the end of memory", &[(end - 6, HEADER + 60, 0, 0)]),
        ("that wraps", &[(u64::MAX - 5, HEADER + 60, 0, 0)]),
        ("for the device to write", &[(FREE_MEMORY, HEADER + 60, WRITE, 0)]),
        ("loop", &[(FREE_MEMORY, HEADER, NEXT, 0)]),
        ("next outside of the table", &[(FREE_MEMORY, HEADER, NEXT, 60_000)]),
    ];
    for (what, chain) in cases {
        let test = || {
            let Some(mut guest) = guest(MERGEABLE | TSO) else { return };
            guest.settle().unwrap();
            guest.send_chain(chain);
            assert!(matches!(error_of(&mut guest), Some(DeviceError::BadChain(_))), "{what}");
            let mut guest = lending(guest.restart_in_place(MERGEABLE | TSO | MODERN));
            exchange_datagrams(&mut guest);
        };
        in_namespace(test);
    }
}

#[test]
fn available_index_beyond_the_queue_costs_the_device() {
    in_namespace(|| {
        let Some(mut guest) = guest(MERGEABLE) else { return };
        guest.settle().unwrap();
        guest.tx.available = 1000;
        guest.tx.offer(&guest.memory.clone(), 0);
        assert!(matches!(error_of(&mut guest), Some(DeviceError::BadChain(_))));
    });
}
