//! The agent, called as krx calls it, in ways that `krx` itself does not yet: several containers in one VM, whole
//! bundles of settings, requests that make no sense.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

#[path = "agent_tests/clock.rs"]
mod clock;
#[path = "agent_tests/user_namespaces.rs"]
mod user_namespaces;

use std::thread;
use std::time::Duration;

use krx_proto::{
    Answer, Capabilities, ContainerSpec, CpuMax, Device, DeviceAccess, DeviceKind, DeviceRule, ErrorKind,
    ExitStatus, Limit, Namespace, ProcessSpec, Request, Resources, Rlimit, Scheduling, SchedulingPolicy,
    SeccompFilter,
};
use krx_sandbox::bundle;
use tests::agent::{Guest, kind, output, shell};
use tests::pod::{Place, until};

#[test]
fn several_containers_live_in_one_vm() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    let long: Vec<_> = ["a", "b", "c"]
        .into_iter()
        .map(|id| {
            let process =
                guest.create(shell(id, "echo $HOSTNAME; hostname; exec sleep 1000")).expect("create");
            process.start().expect("start");
            process
        })
        .collect();
    // Each has its own processes and its own name; the kernel is one.
    let script = "hostname; ls -d /proc/[0-9]* | wc -l; cat /proc/sys/kernel/random/boot_id";
    let outputs: Vec<_> = ["d", "e"].into_iter().map(|id| guest.run(id, script, |_| ()).0).collect();
    let lines: Vec<Vec<&str>> = outputs.iter().map(|text| text.lines().collect()).collect();
    assert_eq!((lines[0][0], lines[1][0]), ("d", "e"));
    // The shell and its `ls`, at most `wc` beside them.
    assert!(lines[0][1].parse::<u32>().expect("count") <= 3, "{lines:?}");
    assert_eq!(lines[0][2], lines[1][2]);
    // One that ends leaves the others alone, and its name is free once it is deleted.
    long[0].kill(9).expect("kill");
    assert_eq!(long[0].wait().expect("wait"), ExitStatus::Signal(9));
    assert_eq!(kind(guest.create(shell("a", "true"))), ErrorKind::Exists);
    long[0].delete().expect("delete");
    assert_eq!(guest.run("a", "echo again", |_| ()).0, "again\n");
    assert_eq!(kind(long[1].delete()), ErrorKind::WrongState);
    for process in &long[1..] {
        process.kill(15).ok();
        process.kill(9).expect("kill");
        process.wait().expect("wait");
        process.delete().expect("delete");
    }
    assert_eq!(guest.pod.exec(&["echo", "alive"]).ok().out, "alive\n");
}

#[test]
fn orphans_are_reaped() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    // Without a PID namespace of its own an orphan becomes the agent's child.
    let script = "for i in 1 2 3 4 5; do (sh -c 'exit 3' &); done; (sleep 0.3 &); sleep 1; \
        grep -l '^State:.Z' /proc/[0-9]*/status | wc -l";
    let in_the_guest = |spec: &mut ContainerSpec| spec.namespaces.clear();
    let hostname = |spec: &mut ContainerSpec| {
        in_the_guest(spec);
        spec.hostname = None;
    };
    assert_eq!(guest.run("orphans", script, hostname), ("0\n".into(), ExitStatus::Code(0)));
}

#[test]
fn settings_of_a_process_are_honoured() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    let script = "id -u; id -g; id -G; umask; ulimit -n; pwd; grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status; \
        cat /proc/self/oom_score_adj; cat /proc/sys/net/ipv4/ip_forward";
    let (text, status) = guest.run("settings", script, |spec| {
        let process = &mut spec.process;
        process.user.uid = 7;
        process.user.gid = 8;
        process.user.additional_gids = vec![9, 10];
        process.user.umask = Some(0o27);
        process.rlimits = vec![Rlimit { resource: 7, soft: 123, hard: 456 }];
        process.cwd = "/var/lib".into();
        process.no_new_privileges = true;
        process.oom_score_adj = Some(500);
        process.capabilities = Some(Capabilities { bounding: 1 << 10, ..Capabilities::default() });
        spec.sysctls = vec![("net.ipv4.ip_forward".into(), "1".into())];
    });
    assert_eq!(status, ExitStatus::Code(0), "{text}");
    let lines: Vec<_> = text.lines().map(|line| line.split_whitespace().last().unwrap_or_default()).collect();
    assert_eq!(
        lines,
        ["7", "8", "10", "0027", "123", "/var/lib", "0000000000000000", "0000000000000400", "1", "500", "1"]
    );
    assert!(text.contains("8 9 10"), "{text}");
}

#[test]
fn a_process_is_scheduled_as_it_asks() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::with(&place, &["--cpus", "2"]);
    let script = "import ctypes, os
io = ctypes.CDLL(None).syscall(252, 1, 0)
print(os.sched_getscheduler(0), os.sched_getparam(0).sched_priority, io, os.uname().machine,
      open('/proc/sys/kernel/domainname').read().strip(), len(os.sched_getaffinity(0)))";
    let program = |spec: &mut ProcessSpec| {
        spec.args = ["python3", "-c", script].map(String::from).into();
        spec.scheduling.personality = Some(8);
    };
    let (text, status) = guest.run("scheduled", "", |spec| {
        program(&mut spec.process);
        spec.domainname = Some("ship.test".into());
        // Round robin, and the best effort's priority 6.
        let policy = SchedulingPolicy { policy: 2, priority: 7, ..SchedulingPolicy::default() };
        spec.process.scheduling.policy = Some(policy);
        spec.process.scheduling.io_priority = Some(2 << 13 | 6);
    });
    assert_eq!((text.as_str(), status), ("2 7 16390 i686 ship.test 2\n", ExitStatus::Code(0)));
    let living = guest.create(shell("living", "sleep 600")).expect("create");
    living.start().expect("start");
    let further = guest.process("living", "further");
    let mut spec = shell("living", "").process;
    program(&mut spec);
    spec.scheduling.cpus = Some(0b10);
    further.exec(spec).expect("exec");
    let (text, status) = output(&further);
    assert_eq!((text.as_str(), status), ("0 0 0 i686 (none) 1\n", ExitStatus::Code(0)));
    let impossible = |scheduling: Scheduling| {
        let mut spec = shell("impossible", "true");
        spec.process.scheduling = scheduling;
        kind(guest.create(spec))
    };
    assert_eq!(impossible(Scheduling { cpus: Some(1 << 40), ..Scheduling::default() }), ErrorKind::Failed);
    let policy = Some(SchedulingPolicy { policy: 99, ..SchedulingPolicy::default() });
    assert_eq!(impossible(Scheduling { policy, ..Scheduling::default() }), ErrorKind::Failed);
}

#[test]
fn ends_are_told_as_they_are() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    assert_eq!(guest.run("exit", "exit 255", |_| ()).1, ExitStatus::Code(255));
    let process = guest.create(shell("signals", "exec sleep 1000")).expect("create");
    process.start().expect("start");
    // A process of the container other than the first ends by any signal.
    let further = guest.process("signals", "further");
    let spec = ProcessSpec { args: vec!["sleep".into(), "1000".into()], ..shell("x", "").process };
    further.exec(spec).expect("exec");
    further.start().expect("start");
    let waiting = further.clone();
    let waiter = thread::spawn(move || waiting.wait().expect("wait"));
    thread::sleep(Duration::from_millis(100));
    further.kill(15).expect("kill");
    assert_eq!(waiter.join().expect("waiter"), ExitStatus::Signal(15));
    // And with the first all others end.
    let other = guest.process("signals", "other");
    other
        .exec(ProcessSpec { args: vec!["sleep".into(), "1000".into()], ..shell("x", "").process })
        .expect("exec");
    other.start().expect("start");
    process.kill(9).expect("kill");
    assert_eq!(other.wait().expect("wait"), ExitStatus::Signal(9));
}

#[test]
fn limits_are_the_cgroup_s_and_can_be_changed() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    let mut spec = shell("limits", "exec sleep 1000");
    spec.resources = Resources {
        memory_max: Some(Limit::At(32 << 20)),
        swap_max: Some(Limit::At(0)),
        cpu_weight: Some(39),
        cpu_max: Some(CpuMax { quota: Limit::At(50_000), period: 100_000 }),
        cpuset_cpus: Some("0".into()),
        pids_max: Some(Limit::At(20)),
        ..Resources::default()
    };
    let process = guest.create(spec).expect("create");
    process.start().expect("start");
    let read = |id: &str| {
        let script = "cd /sys/fs/cgroup && cat memory.max cpu.weight cpu.max cpuset.cpus pids.max";
        let further = guest.process("limits", id);
        further
            .exec(ProcessSpec { args: shell("x", script).process.args, ..shell("x", "").process })
            .expect("exec");
        output(&further).0
    };
    assert_eq!(read("before"), "33554432\n39\n50000 100000\n0\n20\n");
    let update = |resources: Resources| {
        guest.call(Request::Update { container: "limits".into(), resources: Box::new(resources) })
    };
    let more =
        Resources { memory_max: Some(Limit::Max), pids_max: Some(Limit::At(30)), ..Resources::default() };
    update(more).expect("update");
    assert_eq!(read("after"), "max\n39\n50000 100000\n0\n30\n");
    let none_such = Resources { cpuset_cpus: Some("63".into()), ..Resources::default() };
    assert_eq!(kind(update(none_such)), ErrorKind::Failed);
    assert_eq!(kind(update(Resources { cpu_weight: Some(0), ..Resources::default() })), ErrorKind::Invalid);
    // A fork bomb of twenty.
    let mut bomb = shell("bomb", "for i in $(seq 40); do sleep 5 & done 2>/dev/null; echo survived");
    bomb.resources.pids_max = Some(Limit::At(20));
    let (text, _) = output(&guest.create(bomb).expect("create"));
    assert!(!text.contains("survived"), "{text}");
}

#[test]
fn what_is_used_is_counted() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    let mut spec = shell("busy", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exec sleep 1000");
    spec.resources.pids_max = Some(Limit::At(50));
    guest.create(spec).expect("create").start().expect("start");
    let stats = |id: &str| {
        let Ok(Answer::Stats(stats)) = guest.call(Request::Stats { container: id.into() }) else {
            panic!("no stats")
        };
        stats
    };
    let counted = until(Duration::from_secs(30), || {
        let stats = stats("busy");
        (stats.cpu.usage_usec > 1000 && stats.cpu.user_usec > 0).then_some(stats)
    });
    let busy = counted.expect("CPU time");
    assert!(
        busy.memory.current > 0 && busy.memory.of("anon") > 0 && busy.memory.of("pgfault") > 0,
        "{busy:?}"
    );
    assert!(busy.memory.working_set() <= busy.memory.current);
    assert_eq!((busy.memory.max, busy.pids.max), (Some(Limit::Max), Some(Limit::At(50))));
    assert!(busy.pids.current >= 1 && busy.guest.is_none());
    let all = stats("");
    let whole = all.guest.expect("guest");
    assert!(
        all.cpu.usage_usec >= busy.cpu.usage_usec
            && whole.memory.total > whole.memory.available
            && whole.memory.available > 0
    );
    assert!(whole.interfaces.iter().all(|interface| interface.name != "lo"), "{whole:?}");
    assert_eq!(kind(guest.call(Request::Stats { container: "nobody".into() })), ErrorKind::NotFound);
}

#[test]
fn want_of_memory_is_told_before_the_end() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    let mut spec = shell("hog", "exec dd if=/dev/zero of=/dev/null bs=64M count=1");
    spec.resources.memory_max = Some(Limit::At(16 << 20));
    let process = guest.create(spec).expect("create");
    let wait = |seen| guest.agent.send(Request::WaitOom { container: "hog".into(), seen }).expect("sent");
    let (first, second) = (wait(0), wait(100));
    process.start().expect("start");
    assert_eq!(process.wait().expect("wait"), ExitStatus::Signal(9));
    assert!(first.is_over());
    let known = wait(0).answer().expect("answer");
    let Answer::OomKills(kills @ 1..) = known else { panic!("{known:?}") };
    let Ok(Answer::Stats(stats)) = guest.call(Request::Stats { container: "hog".into() }) else {
        panic!("no stats")
    };
    assert_eq!(stats.memory.events.oom_kill, kills);
    process.delete().expect("delete");
    assert_eq!(kind(second.answer()), ErrorKind::NotFound);
}

/// The filter that a bundle's profile stands for.
fn filter(place: &Place, profile: &serde_json::Value) -> Option<SeccompFilter> {
    let config = serde_json::json!({
        "ociVersion": "1.0.2",
        "root": {"path": "."},
        "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "linux": {"seccomp": profile}
    });
    place.scratch.write("bundle/config.json", config.to_string());
    bundle::read("b", &place.scratch.join("bundle")).expect("bundle").spec.process.seccomp
}

#[test]
fn a_profile_holds_the_first_process_and_those_that_follow() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    let filter = filter(
        &place,
        &serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 122},
                {"names": ["sethostname"], "action": "SCMP_ACT_KILL_PROCESS"},
                {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28,
                    "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]}
            ]
        }),
    );
    assert!(filter.is_some());
    let script = "mkdir /tmp/x 2>&1; kill -10 1 2>&1; kill -0 1 && echo may; hostname x 2>/dev/null; echo $?; \
        grep -E '^(Seccomp:|CapPrm|NoNewPrivs)' /proc/self/status";
    for no_new_privileges in [false, true] {
        let id = format!("filtered-{no_new_privileges}");
        let mut first = shell(&id, "exec sleep 1000");
        first.process.seccomp = filter.clone();
        first.process.no_new_privileges = no_new_privileges;
        // A user without any capability: the one that the filter took to install is gone.
        first.process.user.uid = 1000;
        first.process.capabilities = Some(Capabilities::default());
        let further_spec = ProcessSpec { args: shell("x", script).process.args, ..first.process.clone() };
        let (text, _) = guest.run(&format!("{id}-first"), script, |spec| spec.process = further_spec.clone());
        let process = guest.create(first).expect("create");
        process.start().expect("start");
        let further = guest.process(&id, "further");
        further.exec(further_spec).expect("exec");
        for text in [text, output(&further).0] {
            // The shell writes an empty line for what ended by a signal.
            let lines: Vec<_> = text.lines().filter(|line| !line.is_empty()).collect();
            assert!(lines[0].contains("Disk quota exceeded"), "{text}");
            assert!(lines[1].contains("No space left"), "{text}");
            // 159: by SIGSYS.
            assert_eq!(&lines[2..4], ["may", "159"], "{text}");
            let values: Vec<_> = lines[4..].iter().map(|line| line.split_whitespace().last()).collect();
            let privileges = if no_new_privileges { "1" } else { "0" };
            assert_eq!(values, [Some("0000000000000000"), Some(privileges), Some("2")], "{text}");
        }
    }
    let mut broken = shell("broken", "true");
    broken.process.seccomp = Some(SeccompFilter::default());
    assert_eq!(kind(guest.create(broken)), ErrorKind::Invalid);
}

#[test]
fn devices_are_those_that_are_allowed() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    // Memory and the kernel's log can be made as nodes, and not be opened; the usual ones can.
    let script = "cd /dev; mknod kmsg2 c 1 11 && echo made; (: <kmsg2) 2>/dev/null || echo denied; \
        head -c 1 zero >null && echo usual; ls -l my/full | cut -c1-10";
    let full = Device {
        path: "/dev/my/full".into(),
        kind: DeviceKind::Char,
        major: 1,
        minor: 7,
        mode: 0o640,
        uid: 5,
        gid: 6,
    };
    let all = Capabilities { bounding: !0, effective: !0, permitted: !0, ..Capabilities::default() };
    let (text, _) = guest.run("devices", script, |spec| {
        spec.process.capabilities = Some(all);
        spec.devices = vec![full.clone()];
    });
    assert_eq!(text, "made\ndenied\nusual\ncrw-r-----\n");
    let everything =
        DeviceRule { allow: true, kind: None, major: None, minor: None, access: DeviceAccess::ALL };
    let (text, _) = guest.run("privileged", script, |spec| {
        spec.process.capabilities = Some(all);
        spec.device_rules = vec![everything];
    });
    assert!(text.starts_with("made\nusual\n"), "{text}");
    let mut outside = shell("outside", "true");
    outside.devices = vec![Device { path: "/etc/full".into(), ..full }];
    assert_eq!(kind(guest.create(outside)), ErrorKind::Invalid);
}

#[test]
fn containers_of_a_pod_share_its_name_and_ipc() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    let script = "hostname; readlink /proc/self/ns/ipc /proc/self/ns/uts /proc/self/ns/net";
    let shared = |spec: &mut ContainerSpec| spec.namespaces = vec![Namespace::Pid];
    let sandbox = guest.run("sandbox", script, |spec| {
        shared(spec);
        spec.hostname = Some("pod-1".into());
    });
    let container = guest.run("container", script, |spec| {
        shared(spec);
        spec.hostname = None;
    });
    assert!(sandbox.0.starts_with("pod-1\n"), "{}", sandbox.0);
    assert_eq!(sandbox, container);
    let alone = guest.run("alone", script, |_| ());
    assert!(
        alone.0.starts_with("alone\n") && alone.0.lines().nth(1) != container.0.lines().nth(1),
        "{}",
        alone.0
    );
}

#[test]
fn requests_that_make_no_sense_are_refused_by_name() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    assert_eq!(kind(guest.process("nobody", "").start()), ErrorKind::NotFound);
    assert_eq!(kind(guest.process("pod", "nobody").wait()), ErrorKind::NotFound);
    assert_eq!(kind(guest.process("pod", "").start()), ErrorKind::WrongState);
    assert_eq!(kind(guest.process("pod", "").kill(4711)), ErrorKind::Invalid);
    let refused = |change: &dyn Fn(&mut ContainerSpec)| {
        let mut spec = shell("refused", "true");
        change(&mut spec);
        kind(guest.create(spec))
    };
    assert_eq!(refused(&|spec| spec.id = "../x".into()), ErrorKind::Invalid);
    assert_eq!(refused(&|spec| spec.process.args.clear()), ErrorKind::Invalid);
    assert_eq!(refused(&|spec| spec.process.cwd = "relative".into()), ErrorKind::Invalid);
    assert_eq!(refused(&|spec| spec.process.env = vec!["no equals sign\0".into()]), ErrorKind::Invalid);
    assert_eq!(refused(&|spec| spec.mounts[0].kind = "nonsense".into()), ErrorKind::Failed);
    assert_eq!(refused(&|spec| spec.rootfs = "/nowhere".into()), ErrorKind::Failed);
    assert_eq!(refused(&|spec| spec.sysctls = vec![("../../x".into(), "1".into())]), ErrorKind::Invalid);
    // Nothing of them is left.
    let Ok(Answer::Processes(left)) = guest.call(Request::List) else { panic!("no list") };
    assert!(left.iter().all(|process| process.container == "pod"), "{left:?}");
    let gone = until(Duration::from_secs(5), || Some(()).filter(|()| guest.pod.exec(&["true"]).code == 0));
    assert!(gone.is_some());
}
