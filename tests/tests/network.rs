//! The network of a pod, from a network namespace as plugins make them to sockets in the guest.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tests::lan::{Lan, Netns};
use tests::pod::{DEADLINE, Living, Place, finish, until};

/// Larger than all queues and windows on the way.
const BULK: usize = 16 << 20;

/// Settings with which the VMM moves the frames itself.
const USER_SPACE: &str = "[vm]\nvhost_net = false\n";

/// Takes connections on a port: reads to the end, answers with the digest of what came.
const SERVER: &str = "\
import hashlib, socket
server = socket.create_server(('::', 7000), family=socket.AF_INET6, dualstack_ipv6=True)
print('listens', flush=True)
while True:
    connection, _ = server.accept()
    digest = hashlib.sha256()
    while data := connection.recv(1 << 18):
        digest.update(data)
    connection.sendall(digest.hexdigest().encode())
    connection.close()
";
/// Sends as many bytes as it is told to an address, and prints the digest of them and that which comes back.
const CLIENT: &str = "\
import hashlib, socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), 60)
data = bytes(range(251)) * (int(sys.argv[3]) // 251)
connection.sendall(data)
connection.shutdown(socket.SHUT_WR)
print(hashlib.sha256(data).hexdigest(), connection.makefile().read())
";

/// A living pod on a namespace.
fn on<'a>(place: &'a Place, name: &str, netns: &Netns) -> Living<'a> {
    place.living_with(name, &["--netns", &netns.path()])
}

/// Starts the server in a pod and waits until it listens.
fn serve(pod: &Living<'_>) -> std::process::Child {
    let arguments = ["exec", &pod.name, "--", "python3", "-c", SERVER];
    let mut server = pod.place.krx(&arguments).stdout(Stdio::piped()).spawn().expect("krx exec");
    let mut line = [0; 8];
    server.stdout.as_mut().expect("piped").read_exact(&mut line).expect("the server's word");
    assert_eq!(&line, b"listens\n");
    server
}

fn client(pod: &Living<'_>, address: &str, port: u16, bytes: usize) {
    let (port, bytes) = (port.to_string(), bytes.to_string());
    let ended = pod.exec(&["python3", "-c", CLIENT, address, &port, &bytes]).ok();
    let (sent, came) = ended.out.trim().split_once(' ').expect("two digests");
    assert_eq!(sent, came, "{address}");
}

/// From the host to the server in a pod.
fn send_to(address: &str, bytes: usize) {
    let data: Vec<u8> = (0..=u8::MAX).cycle().take(bytes).collect();
    let mut socket = TcpStream::connect((address, 7000)).expect("connect to the pod");
    socket.set_read_timeout(Some(DEADLINE)).expect("timeout");
    socket.write_all(&data).expect("send");
    socket.shutdown(std::net::Shutdown::Write).expect("shutdown");
    let mut digest = String::new();
    socket.read_to_string(&mut digest).expect("digest");
    assert_eq!(digest, hex(&data), "{address}");
}

fn hex(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Takes one connection on the host, and answers with the digest of what came.
fn digest_one(address: &str) -> u16 {
    let listener = TcpListener::bind((address, 0)).expect("bind");
    let port = listener.local_addr().expect("address").port();
    thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("accept");
        let mut data = Vec::new();
        socket.read_to_end(&mut data).expect("receive");
        socket.write_all(hex(&data).as_bytes()).expect("answer");
    });
    port
}

fn ping(address: &str, size: &str) {
    let mut ping = Command::new("busybox");
    finish(ping.args(["ping", "-c", "1", "-W", "10", "-s", size, address]), b"").ok();
}

/// Columns of each line that have `interface` in them, in order.
fn table(text: &str, interface: &str, columns: &[usize]) -> BTreeSet<Vec<String>> {
    let words = |line: &str| line.split_whitespace().map(str::to_string).collect::<Vec<_>>();
    let lines = text.lines().map(words).filter(|words| words.iter().any(|word| word == interface));
    lines.map(|words| columns.iter().map(|column| words[*column].clone()).collect()).collect()
}

#[test]
fn network_of_the_namespace_is_the_pods() {
    let Some(place) = Place::new() else { return };
    let (lan, netns) = (Lan::new(9000), Netns::new());
    lan.join(&netns, "eth0", 2);
    netns.ip(&format!("route add default via {} metric 50", lan.v4(1)));
    netns.ip(&format!("-6 route add default via {}", lan.v6(1)));
    netns.ip("route add 192.0.2.0/24 via 169.254.7.7 dev eth0 onlink");
    netns.ip("route add 198.51.100.0/24 dev eth0 scope link mtu 1400");
    netns.ip("route add blackhole 203.0.113.0/24");
    netns.ip("neighbour add 169.254.7.7 lladdr 02:00:00:00:07:07 dev eth0 nud permanent");
    let pod = on(&place, "net", &netns);
    let both = |file: &str| (netns.exec(&["cat", file]).ok().out, pod.exec(&["cat", file]).ok().out);
    // Network, gateway, flags, metric, mask, MTU.
    let (host, guest) = both("/proc/net/route");
    assert_eq!(table(&host, "eth0", &[1, 2, 3, 6, 7, 8]), table(&guest, "eth0", &[1, 2, 3, 6, 7, 8]));
    assert!(table(&guest, "eth0", &[1]).len() == 4 && guest.contains("007100CB"), "{guest}");
    // Destination, prefix, gateway, metric; multicast and link-local ones are each kernel's own.
    let (host, guest) = both("/proc/net/ipv6_route");
    let global = |text: &str| {
        let mut all = table(text, "eth0", &[0, 1, 4, 5]);
        all.retain(|route| !route[0].starts_with('f') || route[0].starts_with("fd"));
        all
    };
    assert_eq!(global(&host), global(&guest));
    assert!(global(&guest).len() >= 3, "{guest}");
    let (host, guest) = both("/proc/net/if_inet6");
    assert_eq!(table(&host, "eth0", &[0, 2, 3]), table(&guest, "eth0", &[0, 2, 3]));
    let (host, guest) = both("/proc/net/arp");
    let permanent = |text: &str| {
        let mut all = table(text, "eth0", &[0, 2, 3]);
        all.retain(|neighbour| neighbour[1] == "0x6");
        all
    };
    assert_eq!(permanent(&host), permanent(&guest));
    assert_eq!(permanent(&guest).len(), 1, "{guest}");
    for file in ["address", "mtu"] {
        let (host, guest) = both(&format!("/sys/class/net/eth0/{file}"));
        assert_eq!(host, guest, "{file}");
    }
    // Only by frames of 9000 bytes; the smaller ones are in pieces.
    ping(&lan.v4(2), "8900");
    drop(pod);
    place.assert_clean();
}

/// The threads of the host's kernel that move the frames of a VMM, by their directories. Of the VMM's own since Linux 6.4;
/// before, they are processes. Each has the name of the thread that asked for it.
fn vhost_threads(vmm: i32) -> Vec<PathBuf> {
    let entries = |path: String| fs::read_dir(path).into_iter().flatten().flatten();
    let tasks: Vec<_> = entries(format!("/proc/{vmm}/task")).collect();
    let names: Vec<_> =
        tasks.iter().map(|task| format!("vhost-{}\n", task.file_name().to_string_lossy())).collect();
    let all = tasks.iter().map(fs::DirEntry::path).chain(entries("/proc".into()).map(|entry| entry.path()));
    all.filter(|path| fs::read_to_string(path.join("comm")).is_ok_and(|comm| names.contains(&comm))).collect()
}

/// Whether pods get vhost-net on this host.
fn has_vhost() -> bool {
    fs::exists("/dev/vhost-net").expect("look for vhost-net")
}

#[test]
fn kernel_moves_the_frames_where_it_may() {
    let Some(place) = Place::new() else { return };
    let (one, other, netns) = (Lan::new(1500), Lan::new(1500), Netns::new());
    one.join(&netns, "eth0", 2);
    other.join(&netns, "eth1", 2);
    let pod = on(&place, "net", &netns);
    let vmm = place.vmm_pid("net");
    let threads = vhost_threads(vmm);
    assert_eq!(threads.len(), if has_vhost() { 2 } else { 0 }, "one for each interface");
    let cgroup = fs::read_to_string(format!("/proc/{vmm}/cgroup")).expect("cgroup");
    for thread in &threads {
        assert_eq!(fs::read_to_string(thread.join("cgroup")).expect("cgroup"), cgroup, "the pod's to pay");
        // It runs nothing of the VMM, but has no more rights than the thread that asked for it.
        let status = fs::read_to_string(thread.join("status")).expect("status");
        let of_vmm = status.contains(&format!("Tgid:\t{vmm}\n"));
        assert!(!of_vmm || status.contains("Seccomp:\t2\n"), "{status}");
    }
    drop(pod);
    place.assert_clean();
    assert!(threads.iter().all(|thread| !thread.exists()));
}

/// Nanoseconds that a thread has run (`Documentation/scheduler/sched-stats.rst`).
fn ran(thread: &Path) -> u64 {
    let text = fs::read_to_string(thread.join("schedstat")).expect("schedstat");
    text.split(' ').next().and_then(|nanoseconds| nanoseconds.parse().ok()).expect("a time")
}

#[test]
fn interface_has_a_pair_of_queues_for_each_cpu() {
    for settings in ["", USER_SPACE] {
        let Some(place) = Place::with_settings(settings) else { return };
        let in_kernel = has_vhost() && settings.is_empty();
        let (lan, netns) = (Lan::new(1500), Netns::new());
        lan.join(&netns, "eth0", 2);
        let pod = place.living_with("wide", &["--cpus", "2", "--netns", &netns.path()]);
        let queues = pod.exec(&["ls", "/sys/class/net/eth0/queues"]).ok().out;
        let expected = if in_kernel { "rx-0\nrx-1\ntx-0\ntx-1\n" } else { "rx-0\ntx-0\n" };
        assert_eq!(queues, expected);
        let threads = vhost_threads(place.vmm_pid("wide"));
        assert_eq!(threads.len(), if in_kernel { 2 } else { 0 });
        let before: Vec<_> = threads.iter().map(|thread| ran(thread)).collect();
        let mut server = serve(&pod);
        // Each connection is one of a queue's by its addresses and ports.
        for _ in 0..6 {
            send_to(&lan.v4(2), 1 << 20);
            client(&pod, &lan.v4(1), digest_one(&lan.v4(1)), 1 << 20);
        }
        let _ = server.kill();
        let _ = server.wait();
        for (thread, before) in threads.iter().zip(before) {
            assert!(ran(thread) > before, "a queue carries nothing");
        }
        drop(pod);
        place.assert_clean();
    }
}

#[test]
fn bytes_are_carried_both_ways() {
    let Some(place) = Place::new() else { return };
    carry_both_ways(&place);
}

#[test]
fn bytes_are_carried_both_ways_in_user_space() {
    let Some(place) = Place::with_settings(USER_SPACE) else { return };
    carry_both_ways(&place);
}

fn carry_both_ways(place: &Place) {
    let (lan, netns) = (Lan::new(1500), Netns::new());
    lan.join(&netns, "eth0", 2);
    let pod = on(place, "net", &netns);
    let in_kernel = has_vhost() && place.settings.is_none();
    assert_eq!(vhost_threads(place.vmm_pid("net")).len(), usize::from(in_kernel));
    ping(&lan.v4(2), "56");
    ping(&lan.v6(2), "56");
    let mut server = serve(&pod);
    for (of_pod, of_host) in [(lan.v4(2), lan.v4(1)), (lan.v6(2), lan.v6(1))] {
        send_to(&of_pod, BULK);
        client(&pod, &of_host, digest_one(&of_host), BULK);
    }
    let refused = TcpStream::connect((lan.v4(2), 7001)).expect_err("nobody listens there");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    let _ = server.kill();
    let _ = server.wait();
}

#[test]
fn pods_reach_each_other() {
    let Some(place) = Place::new() else { return };
    reach_each_other(&place);
}

#[test]
fn pods_reach_each_other_in_user_space() {
    let Some(place) = Place::with_settings(USER_SPACE) else { return };
    reach_each_other(&place);
}

fn reach_each_other(place: &Place) {
    let lan = Lan::new(1500);
    let (first, second) = (Netns::new(), Netns::new());
    lan.join(&first, "eth0", 2);
    lan.join(&second, "eth0", 3);
    let (server, dialer) = (on(place, "server", &first), on(place, "dialer", &second));
    let mut serving = serve(&server);
    client(&dialer, &lan.v4(2), 7000, BULK);
    client(&dialer, &lan.v6(2), 7000, 1 << 20);
    let _ = serving.kill();
    let _ = serving.wait();
}

#[test]
fn interfaces_keep_their_names_and_are_told_apart() {
    let Some(place) = Place::new() else { return };
    let (one, other, netns) = (Lan::new(1500), Lan::new(1400), Netns::new());
    // In the other order than the guest would name them.
    one.join(&netns, "eth1", 2);
    other.join(&netns, "eth0", 2);
    let pod = on(&place, "net", &netns);
    for name in ["eth0", "eth1"] {
        for file in ["address", "mtu"] {
            let path = format!("/sys/class/net/{name}/{file}");
            assert_eq!(netns.exec(&["cat", &path]).ok().out, pod.exec(&["cat", &path]).ok().out);
        }
    }
    for lan in [&one, &other] {
        ping(&lan.v4(2), "56");
        client(&pod, &lan.v4(1), digest_one(&lan.v4(1)), 1 << 20);
    }
}

#[test]
fn namespaces_without_interfaces_are_pods_without_network() {
    let Some(place) = Place::new() else { return };
    let netns = Netns::new();
    let ended = place.sh(&["--netns", &netns.path()], "ls /sys/class/net").ok();
    assert_eq!(ended.out, "lo\n");
    assert!(ended.err.contains("no network"), "{ended:?}");
    for path in ["/no/such/netns", "/etc/passwd"] {
        let refused = place.sh(&["--netns", path], "true");
        assert_eq!(refused.code, 125, "{refused:?}");
        assert!(refused.err.contains(path), "{refused:?}");
    }
    netns.ip("tuntap add dev wg0 mode tun");
    netns.ip("link set wg0 up");
    let refused = place.sh(&["--netns", &netns.path()], "true");
    assert!(refused.code == 125 && refused.err.contains("wg0"), "{refused:?}");
    place.assert_clean();
}

#[test]
fn nothing_is_left_in_the_namespace() {
    let Some(place) = Place::new() else { return };
    let (lan, netns) = (Lan::new(1500), Netns::new());
    lan.join(&netns, "eth0", 2);
    let mut pod = on(&place, "net", &netns);
    assert_eq!(netns.remains().len(), 3, "a tap, and a qdisc at each end: {:?}", netns.remains());
    let taken = place.sh(&["--netns", &netns.path()], "true");
    assert!(taken.code == 125 && taken.err.contains("another pod's"), "{taken:?}");
    pod.child.kill().expect("kill krx");
    let _ = pod.child.wait();
    // What is on the plugin's interface stays until the next pod, or the end of the namespace.
    let is_tapless = || netns.remains().iter().all(|line| !line.contains("krx-tap"));
    let tapless = until(Duration::from_secs(10), || is_tapless().then_some(()));
    assert!(tapless.is_some(), "{:?}", netns.remains());
    place.assert_clean();
    let next = place.sh(&["--netns", &netns.path()], "cat /sys/class/net/eth0/address").ok();
    assert_eq!(next.out, netns.exec(&["cat", "/sys/class/net/eth0/address"]).ok().out);
    assert_eq!(netns.remains(), [""; 0]);
}

#[test]
fn ports_of_the_pod_are_reached_at_localhost_of_its_namespace() {
    let Some(place) = Place::new() else { return };
    let netns = Netns::new();
    let mut pod = on(&place, "net", &netns);
    let mut server = serve(&pod);
    netns.inside(|| {
        send_to("127.0.0.1", BULK);
        send_to("::1", 1 << 20);
        let mut nobody = TcpStream::connect("127.0.0.1:7001").expect("taken before it is known");
        let error = nobody.read(&mut [0]).expect_err("nobody listens there");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
    pod.child.kill().expect("kill krx");
    let _ = pod.child.wait();
    let _ = server.kill();
    let _ = server.wait();
    let refused = netns.inside(|| TcpStream::connect("127.0.0.1:7000")).expect_err("no pod");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    place.assert_clean();
}
