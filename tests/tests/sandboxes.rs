//! Pods through the CRI: what their containers share, their network, and what is left of them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use tests::containerd::{Engine, GATEWAY, suite};
use tests::cri::container::END;
use tests::cri::messages::{NODE, Namespaces, POD, SANDBOX_READY};
use tests::cri::pod::{CGROUPS, PodPlan};
use tests::cri::stream::STDOUT;
use tests::pod::{patience, until};
use tests::scratch::Scratch;

fn main() -> ExitCode {
    suite::run(&[
        ("containers_share_localhost_and_hostname", share),
        ("a_container_is_started_again_in_a_living_pod", restart),
        ("files_of_the_pod_and_shared_memory", files),
        ("sysctls_of_the_pod", sysctls),
        ("one_pid_namespace_for_all", shared_pids),
        ("pods_talk_to_each_other", pod_to_pod),
        ("a_pod_talks_to_the_host_and_back", pod_and_host),
        ("a_port_of_the_host", host_port),
        ("a_forwarded_port", forward),
        ("status_and_lists", status),
        ("stop_of_a_pod_ends_its_containers", stop),
        ("an_exec_that_is_idle_lives_on", idle),
        ("a_pod_in_a_slice_of_systemd", slice),
        ("a_paused_pod_is_stopped_and_removed", stop_paused),
        ("the_guests_console_is_logged_where_a_pod_asks", console_log),
        ("a_pod_on_the_hosts_network", host_network),
    ])
}

fn dial(address: &str) -> Option<String> {
    let stream = TcpStream::connect(address).and_then(|mut stream| {
        stream.set_read_timeout(Some(patience(Duration::from_secs(20))))?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map(|_| text)
    });
    stream.ok().filter(|text| !text.is_empty())
}

fn share(engine: &Engine) {
    let pod = PodPlan::new(engine, "shared").run();
    let server = pod.container("server", &["workload", "serve", "8080", "hello"]).start();
    server.wait_for("listening");
    let client = pod.shell("client", "workload dial 127.0.0.1:8080; hostname").run().ok();
    assert_eq!(client.out, "hello\nshared\n");
    assert_eq!(server.sh("hostname"), "shared\n");
    let network = |container: &tests::cri::container::Container<'_, '_>| {
        container.sh("cat /proc/net/dev | grep -c eth0")
    };
    assert_eq!(network(&server), "1\n");
}

fn restart(engine: &Engine) {
    let pod = PodPlan::new(engine, "restart").run();
    for attempt in 0..3 {
        let container = pod.shell("main", "echo attempt; touch /mark && exit 1").attempt(attempt).start();
        let status = container.wait();
        assert_eq!((status.exit_code, status.reason.as_str()), (1, "Error"));
        assert_eq!(container.logs().0, "attempt\n");
        container.remove().expect("remove");
    }
    assert_eq!(pod.status().state, SANDBOX_READY);
}

fn files(engine: &Engine) {
    let volume = Scratch::under(&engine.scratch().join("logs"));
    let hosts = volume.write("hosts", "127.0.0.1 localhost\n10.1.2.3 database\n");
    let pod = PodPlan::new(engine, "files").run();
    let container = pod.container("main", &["sleep", "600"]).mount(&hosts, "/etc/hosts", false).start();
    assert!(container.sh("cat /etc/hosts").contains("10.1.2.3 database"));
    assert!(container.sh("cat /etc/resolv.conf").contains("nameserver 10.96.0.10"));
    assert_eq!(container.sh("cat /etc/hostname"), "files\n");
    let shm = container.sh("df -k /dev/shm | tail -n 1");
    assert_eq!(shm.split_whitespace().nth(1), Some("65536"), "{shm}");
    container.sh("echo here > /dev/shm/mark");
    let second = pod.shell("second", "cat /dev/shm/mark").run().ok();
    assert_eq!(second.out, "here\n", "shared memory is the pod's");
}

fn sysctls(engine: &Engine) {
    let pod = PodPlan::new(engine, "sysctls").sysctl("net.ipv4.ip_unprivileged_port_start", "80");
    let pod = pod.sysctl("kernel.shm_rmid_forced", "1").run();
    let seen = pod
        .shell("main", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced");
    assert_eq!(seen.run().ok().out, "80\n1\n");
}

fn shared_pids(engine: &Engine) {
    let namespaces = Namespaces { pid: POD, ..Default::default() };
    let pod = PodPlan::new(engine, "pids").namespaces(namespaces).run();
    let _first = pod.container("first", &["sleep", "612"]).start();
    let seen = pod
        .shell("second", "cat /proc/[0-9]*/cmdline | sed 's/\\x00/ /g' | grep -c '[s]leep 612'; echo $$")
        .run()
        .ok();
    let mut lines = seen.out.lines();
    assert_eq!(lines.next(), Some("1"), "{seen:?}");
    assert_ne!(lines.next(), Some("1"), "{seen:?}");
}

fn pod_to_pod(engine: &Engine) {
    let first = PodPlan::new(engine, "first").run();
    let server = first.container("server", &["workload", "serve", "80", "from first"]).start();
    server.wait_for("listening");
    let second = PodPlan::new(engine, "second").run();
    let address = format!("{}:80", first.ip());
    assert_ne!(first.ip(), second.ip());
    assert_eq!(second.container("client", &["workload", "dial", &address]).run().ok().out, "from first\n");
}

fn pod_and_host(engine: &Engine) {
    let listener = TcpListener::bind("0.0.0.0:0").expect("listener");
    let port = listener.local_addr().expect("address").port();
    let host = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().expect("accept");
        stream.write_all(b"from host").expect("write");
        peer.ip().to_string()
    });
    let pod = PodPlan::new(engine, "host-talk").run();
    let client = pod.container("client", &["workload", "dial", &format!("{GATEWAY}:{port}")]).run().ok();
    assert_eq!(client.out, "from host\n");
    assert_eq!(host.join().expect("host"), pod.ip());
    let server = pod.container("server", &["workload", "serve", "81", "from pod"]).start();
    server.wait_for("listening");
    assert_eq!(dial(&format!("{}:81", pod.ip())).as_deref(), Some("from pod"));
}

fn host_port(engine: &Engine) {
    let pod = PodPlan::new(engine, "host-port").host_port(18080, 80).run();
    let server = pod.container("server", &["workload", "serve", "80", "mapped"]).start();
    server.wait_for("listening");
    let heard = until(END, || dial("127.0.0.1:18080").or_else(|| dial(&format!("{GATEWAY}:18080"))));
    assert_eq!(heard.as_deref(), Some("mapped"));
    drop(pod);
    assert_eq!(dial("127.0.0.1:18080"), None, "the port went with the pod");
}

fn forward(engine: &Engine) {
    let pod = PodPlan::new(engine, "forward").run();
    let server = pod.container("server", &["workload", "echo", "7000"]).start();
    server.wait_for("listening");
    let mut stream = pod.forward(7000);
    stream.send("there and back");
    assert_eq!(stream.forwarded(14), b"there and back");
    drop(stream);
    let mut refused = pod.forward(7001);
    // What dials in the namespace of a VM's pod is answered there before the guest is asked.
    let word = if engine.is_krx() { "reset" } else { "refused" };
    let failure = refused.failure();
    assert!(failure.contains(word), "nobody listens there: {failure:?}");
}

fn status(engine: &Engine) {
    let mut plan = PodPlan::new(engine, "listed").annotation("example.org/note", "kept");
    plan.config.labels.insert("app".into(), "listed".into());
    let pod = plan.run();
    let status = pod.status();
    assert_eq!(status.state, SANDBOX_READY);
    assert_eq!(status.labels.get("app").map(String::as_str), Some("listed"));
    assert_eq!(status.annotations.get("example.org/note").map(String::as_str), Some("kept"));
    assert_eq!(status.runtime_handler, engine.runtime().handler);
    assert!(engine.client().pods().iter().any(|item| item.id == pod.id));
    pod.stop().expect("stop");
    assert_ne!(pod.status().state, SANDBOX_READY);
    pod.stop().expect("a stopped pod is stopped");
    pod.remove().expect("remove");
    pod.remove().expect("a removed pod is removed");
    assert!(engine.client().pods().iter().all(|item| item.id != pod.id));
}

fn stop(engine: &Engine) {
    let pod = PodPlan::new(engine, "stopped").run();
    let container = pod.container("main", &["sleep", "600"]).start();
    pod.stop().expect("stop");
    assert_eq!(container.wait().exit_code, 137);
    let cgroup = pod.cgroup();
    drop(pod);
    assert!(!cgroup.exists(), "something is left in {}", cgroup.display());
}

/// `KRX_IDLE=SECONDS` for longer; where time is counted an hour takes a minute.
fn idle(engine: &Engine) {
    let seconds = std::env::var("KRX_IDLE").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    let pod = PodPlan::new(engine, "idle").run();
    let container = pod.container("main", &["sleep", "infinity"]).start();
    let mut stream =
        container.exec_stream(&["sh", "-c", "echo up; read line; echo got $line; exit 3"], false);
    stream.wait_for(STDOUT, "up");
    thread::sleep(Duration::from_secs(seconds));
    stream.send("words\n");
    assert_eq!(stream.exit_code(), 3);
    assert!(stream.text(STDOUT).ends_with("got words\n"), "{}", stream.text(STDOUT));
}

/// A kubelet with the systemd driver names slices, and containerd then says `slice:prefix:name` (systemd.slice(5)).
fn slice(engine: &Engine) {
    let above = Path::new(CGROUPS).join("krxslice.slice");
    let mut plan = PodPlan::new(engine, "slice");
    plan.linux().cgroup_parent = "/krxslice.slice/krxslice-pod1.slice".into();
    let pod = plan.run();
    let container = pod.shell("main", "echo up; exec sleep 600").start();
    container.wait_for("up");
    let scope = pod.cgroup().join(format!("cri-containerd-{}.scope", pod.id));
    let inside = std::fs::read_to_string(scope.join("cgroup.procs")).expect("the pod's scope");
    let comm = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/comm")).expect("process");
    let mut inside: Vec<_> = inside.lines().map(|pid| comm(pid).trim().to_string()).collect();
    inside.sort();
    if engine.is_krx() {
        assert_eq!(inside, ["containerd-shim", "krx-vmm"]);
    }
    pod.stop().expect("stop");
    assert!(!scope.exists(), "{} is left", scope.display());
    drop(pod);
    std::fs::remove_dir(&above).expect("nothing else is left in the slice");
}

/// With what it has in it, as a kubelet does that knows nothing of the pause.
fn stop_paused(engine: &Engine) {
    let pod = PodPlan::new(engine, "paused").run();
    let first = pod.container("first", &["sleep", "600"]).start();
    let second = pod.container("second", &["sleep", "600"]).start();
    let pause = || engine.ctr_end(&["-n", "k8s.io", "tasks", "pause", &pod.id]).ok();
    pause();
    first.stop(2).expect("stop of a container");
    assert_eq!(first.status().exit_code, 137);
    first.remove().expect("remove of a container");
    if engine.is_krx() {
        assert_eq!(second.sh("echo on"), "on\n", "the pod goes on");
        pause();
    }
    pod.stop().expect("stop");
    assert_eq!(second.wait().exit_code, 137);
    assert_ne!(pod.status().state, SANDBOX_READY);
    pod.remove().expect("remove");
    let cgroup = pod.cgroup();
    drop(pod);
    assert!(!cgroup.exists(), "something is left in {}", cgroup.display());
}

/// In containerd's log, by its shim's.
fn console_log(engine: &Engine) {
    if !engine.is_krx() {
        return;
    }
    let logged = || std::fs::read_to_string(engine.log()).expect("log").contains("Linux version");
    let silent = PodPlan::new(engine, "silent").run();
    assert_eq!(silent.shell("main", "echo up").run().out, "up\n");
    assert!(!logged(), "nobody has asked for it");
    let told = PodPlan::new(engine, "told").annotation("io.krx.console-log", "true").run();
    assert_eq!(told.shell("main", "echo up").run().out, "up\n");
    assert!(until(END, || logged().then_some(())).is_some(), "{}", engine.last_words());
    let refused = PodPlan::new(engine, "odd").annotation("io.krx.console-log", "yes").try_run();
    let refused = refused.expect_err("it is neither true nor false");
    assert!(refused.message().contains("io.krx.console-log"), "{refused}");
}

/// Of a VM the host's network is not to be had: krx refuses such a pod.
fn host_network(engine: &Engine) {
    let namespaces = Namespaces { network: NODE, ..Default::default() };
    let mut plan = PodPlan::new(engine, "host-network").namespaces(namespaces);
    // The kubelet names no host in this case.
    plan.config.hostname.clear();
    let pod = plan.try_run();
    if engine.is_krx() {
        let status = pod.expect_err("a VM is not on the host's network");
        assert!(status.message().contains("network"), "{status}");
    } else {
        let pod = pod.expect("runc");
        let host = std::fs::metadata("/proc/self/ns/net").expect("namespace").ino();
        let seen = pod.container("main", &["stat", "-L", "-c", "%i", "/proc/self/ns/net"]).run();
        assert_eq!(seen.out, format!("{host}\n"));
    }
}
