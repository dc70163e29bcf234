//! Bundles, and a checker that runs in each and compares what it sees with the bundle (`conformance/checker.py`): by hand,
//! one for each chapter of the runtime specification, and by chance. `KRX_SEED` repeats the choices.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use serde_json::{Value, json};
use tests::dice::Dice;
use tests::pod::{Ended, Place, finish};
use tests::terminal::Terminal;

#[path = "conformance/mounts.rs"]
mod mounts;
#[path = "conformance/resources.rs"]
mod resources;

const CHECKER: &str = include_str!("conformance/checker.py");

/// What `runc spec` writes, but for its terminal.
fn usual(place: &Place) -> Value {
    let few = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["python3", "/mnt/checker.py"],
            "env": ["PATH=/usr/bin:/bin", "PYTHONCOERCECLOCALE=0"],
            "cwd": "/",
            "capabilities": {"bounding": few, "effective": few, "permitted": few},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": place.host.rootfs(), "readonly": true},
        "hostname": "conformance",
        "mounts": [
            mount("/proc", "proc", &[]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
            {"destination": "/mnt", "type": "bind", "source": "checker", "options": ["rbind", "ro"]},
            mount("/tmp", "tmpfs", &["nosuid", "nodev", "mode=1777", "size=1024k"])
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}],
            "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// Runs the checker in a container of `bundle`; `told` is what it is told that the bundle were.
fn check(place: &Place, name: &str, bundle: &Value, told: &Value) -> Ended {
    let directory = write(place, name, bundle, told);
    finish(&mut place.krx(&["run", "--cpus", "2", "--bundle", &directory]), b"")
}

/// The directory with the bundle, and the checker in it.
fn write(place: &Place, name: &str, bundle: &Value, told: &Value) -> String {
    place.scratch.write(&format!("{name}/config.json"), bundle.to_string());
    place.scratch.write(&format!("{name}/checker/checker.py"), CHECKER);
    place.scratch.write(&format!("{name}/checker/config.json"), told.to_string());
    place.scratch.join(name).to_string_lossy().into_owned()
}

/// The usual bundle with changes, by JSON pointers; `-` appends to an array.
fn conforms(place: &Place, name: &str, changes: &[(&str, Value)]) {
    let mut bundle = usual(place);
    changes.iter().for_each(|(pointer, value)| set(&mut bundle, pointer, value.clone()));
    let ended = check(place, name, &bundle, &bundle);
    let last = ended.out.lines().last().and_then(|line| line.strip_suffix(" comparisons"));
    let comparisons = last.and_then(|count| count.parse::<u32>().ok());
    assert!(!ended.out.contains("not ok") && comparisons > Some(80), "{name}: {ended:?}\n{bundle}");
}

fn set(bundle: &mut Value, pointer: &str, value: Value) {
    let mut place = bundle;
    for name in pointer[1..].split('/') {
        place = match (name.parse::<usize>(), name) {
            (Ok(index), _) => &mut place[index],
            (_, "-") => {
                let list = place.as_array_mut().expect("an array");
                list.push(Value::Null);
                list.last_mut().expect("just pushed")
            }
            _ => &mut place[name],
        };
    }
    *place = value;
}

fn all_capabilities() -> Vec<&'static str> {
    vec![
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_SETUID",
        "CAP_SYS_CHROOT",
        "CAP_MKNOD",
        "CAP_SYS_NICE",
        "CAP_SYS_ADMIN",
    ]
}

#[test]
fn the_usual_bundle_conforms() {
    let Some(place) = Place::new() else { return };
    conforms(&place, "usual", &[]);
    place.assert_clean();
}

#[test]
fn a_process_is_what_its_bundle_says() {
    let Some(place) = Place::new() else { return };
    let two = json!(["CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    let user = [
        (
            "/process/user",
            json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 1002, 70_000], "umask": 0o027}),
        ),
        ("/process/env/-", json!("EMPTY=")),
        ("/process/env/-", json!("ODD=a b\"\n=c\u{e4}")),
        ("/process/args/-", json!("an argument with  spaces, \"quotes\" and \u{1f980}")),
        ("/process/args/-", json!("")),
        ("/process/cwd", json!("/usr/lib")),
        ("/process/noNewPrivileges", json!(false)),
        (
            "/process/capabilities",
            json!({"bounding": two, "effective": two, "permitted": two, "inheritable": two, "ambient": ["CAP_KILL"]}),
        ),
        (
            "/process/rlimits",
            json!([
                {"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
                {"type": "RLIMIT_AS", "soft": 1_u64 << 34, "hard": u64::MAX}, {"type": "RLIMIT_NPROC", "soft": 50, "hard": 60},
                {"type": "RLIMIT_STACK", "soft": 4 << 20, "hard": 8 << 20}, {"type": "RLIMIT_MEMLOCK", "soft": 0, "hard": 4096}
            ]),
        ),
        ("/process/oomScoreAdj", json!(300)),
    ];
    conforms(&place, "user", &user);
    let none = [
        ("/process/capabilities", Value::Null),
        ("/process/oomScoreAdj", json!(-500)),
        ("/process/scheduler", json!({"policy": "SCHED_BATCH", "nice": 7})),
        ("/process/ioPriority", json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0})),
        ("/linux/personality", json!({"domain": "LINUX32"})),
    ];
    // A field of null is none.
    conforms(&place, "none", &[&none[1..], &[("/process/capabilities", json!({}))]].concat());
    let scheduled = [
        ("/process/scheduler", json!({"policy": "SCHED_FIFO", "priority": 3})),
        ("/process/ioPriority", json!({"class": "IOPRIO_CLASS_RT", "priority": 2})),
    ];
    conforms(&place, "scheduled", &scheduled);
}

#[test]
fn mounts_and_what_is_hidden_are_as_the_bundle_says() {
    let Some(place) = Place::new() else { return };
    place.scratch.write("mounts/data/inner/file", "x");
    let tmpfs = |at: &str, options: &[&str]| json!({"destination": at, "type": "tmpfs", "source": "tmpfs", "options": options});
    let bind = |at: &str, options: &[&str]| json!({"destination": at, "type": "bind", "source": "data", "options": options});
    let changes = [
        ("/root/readonly", json!(false)),
        (
            "/mounts/-",
            tmpfs(
                "/opt",
                &["noexec", "exec", "ro", "rw", "noatime", "size=128k", "nr_inodes=64", "mode=0711"],
            ),
        ),
        ("/mounts/-", tmpfs("/opt/a/b", &["ro", "nosymfollow", "nodiratime"])),
        ("/mounts/-", bind("/srv", &["bind", "ro", "nosuid", "nodev", "noexec"])),
        ("/mounts/-", bind("/media", &["rbind", "rprivate", "rw"])),
        ("/mounts/-", bind("/home", &["rbind", "shared"])),
        ("/mounts/-", bind("/var/tmp", &["rbind", "unbindable"])),
        ("/linux/maskedPaths", json!(["/proc/cpuinfo", "/usr/share", "/etc/passwd", "/nowhere"])),
        ("/linux/readonlyPaths", json!(["/tmp", "/proc/sys/kernel", "/etc", "/nowhere"])),
    ];
    conforms(&place, "mounts", &changes);
}

#[test]
fn namespaces_limits_and_devices_are_as_the_bundle_says() {
    let Some(place) = Place::new() else { return };
    let changes = [
        ("/domainname", json!("example.test")),
        ("/linux/namespaces/-", json!({"type": "time"})),
        (
            "/linux/timeOffsets",
            json!({"monotonic": {"secs": 1000, "nanosecs": 5}, "boottime": {"secs": 100_000}}),
        ),
        (
            "/linux/sysctl",
            json!({"kernel.shmmax": "4096000", "net.ipv4.ip_forward": "1", "fs.mqueue.msg_max": "20"}),
        ),
        (
            "/linux/resources",
            json!({
                "memory": {"limit": 100 << 20, "reservation": 10 << 20}, "pids": {"limit": 77},
                "cpu": {"shares": 512, "quota": 50_000, "period": 200_000, "cpus": "0"},
                "unified": {"memory.high": "83886080", "cgroup.max.depth": "3"}
            }),
        ),
        (
            "/linux/devices",
            json!([
                {"path": "/dev/my/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7, "gid": 8},
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}
            ]),
        ),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": [
                {"names": ["acct", "syslog"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99},
                {"names": ["mkdirat"], "action": "SCMP_ACT_ERRNO"}
            ]}),
        ),
    ];
    conforms(&place, "limits", &changes);
    conforms(&place, "few", &[("/linux/namespaces", json!([{"type": "mount"}, {"type": "uts"}]))]);
}

fn user_namespace() -> Vec<(&'static str, Value)> {
    vec![
        ("/linux/namespaces/-", json!({"type": "user"})),
        (
            "/linux/uidMappings",
            json!([{"containerID": 0, "hostID": 100_000, "size": 1000}, {"containerID": 1000, "hostID": 70_000, "size": 2}]),
        ),
        ("/linux/gidMappings", json!([{"containerID": 0, "hostID": 200_000, "size": 2000}])),
    ]
}

#[test]
fn a_user_namespace_owns_what_its_container_has() {
    let Some(place) = Place::new() else { return };
    let volume = place.scratch.join("mapped/data/mapped");
    place.scratch.write("mapped/data/mapped/foreign", "of root");
    std::os::unix::fs::chown(&volume, Some(100_000), Some(200_000)).expect("chown");
    let volume_mount =
        json!({"destination": "/media", "type": "bind", "source": "data", "options": ["rbind", "nosuid"]});
    let all = json!(all_capabilities());
    let changes = [
        ("/mounts/-", volume_mount),
        ("/process/capabilities", json!({"bounding": all, "effective": all, "permitted": all})),
        ("/process/noNewPrivileges", json!(false)),
        ("/process/oomScoreAdj", json!(-500)),
        ("/process/scheduler", json!({"policy": "SCHED_FIFO", "priority": 3})),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_MEMLOCK", "soft": 1 << 30, "hard": 1 << 30}, {"type": "RLIMIT_NOFILE", "soft": 40, "hard": 50}]),
        ),
        ("/domainname", json!("example.test")),
        ("/linux/namespaces/-", json!({"type": "time"})),
        ("/linux/timeOffsets", json!({"boottime": {"secs": 100_000}})),
        (
            "/linux/sysctl",
            json!({"kernel.shmmax": "4096000", "net.ipv4.ip_forward": "1", "fs.mqueue.msg_max": "20"}),
        ),
        (
            "/linux/devices",
            json!([{"path": "/dev/my/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 0, "gid": 8}]),
        ),
        ("/linux/resources/pids", json!({"limit": 7})),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["acct"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99}]}),
        ),
        ("/hooks/createContainer", json!([hook("createContainer", 0)])),
        ("/hooks/startContainer", json!([hook("startContainer", 0)])),
    ];
    conforms(&place, "mapped", &[user_namespace(), changes.into()].concat());
    let made = std::fs::metadata(volume.join("made")).expect("file of the container");
    use std::os::unix::fs::MetadataExt;
    assert_eq!((made.uid(), made.gid()), (100_000, 200_000));
    // Another user, and namespaces that are the guest's.
    let few = [
        (
            "/process/user",
            json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 1002, 1999], "umask": 0o027}),
        ),
        ("/linux/namespaces", json!([{"type": "mount"}, {"type": "uts"}, {"type": "user"}])),
    ];
    conforms(&place, "mapped-few", &[user_namespace(), few.into()].concat());
    place.assert_clean();
}

#[test]
fn a_terminal_is_of_the_user_namespace() {
    let Some(place) = Place::new() else { return };
    let mut bundle = usual(&place);
    // Which krx would add.
    let own = vec![("/process/terminal", json!(true)), ("/process/env/-", json!("TERM=xterm"))];
    let changes = [user_namespace(), own].concat();
    changes.iter().for_each(|(pointer, value)| set(&mut bundle, pointer, value.clone()));
    let directory = write(&place, "terminal", &bundle, &bundle);
    let mut terminal = Terminal::of(&place, &place.krx(&["run", "--cpus", "2", "--bundle", &directory]));
    let shown = terminal.expect(" comparisons");
    assert!(!shown.contains("not ok"), "{shown}");
}

/// One that writes down what it reads, as the checker expects it.
fn hook(point: &str, index: usize) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", format!("exec /bin/cat >/tmp/{point}-{index}")], "timeout": 20})
}

#[test]
fn hooks_run_in_the_container() {
    let Some(place) = Place::new() else { return };
    let changes = [
        ("/annotations", json!({"org.example.quoted": "a \"b\" }\n"})),
        ("/hooks/createContainer", json!([hook("createContainer", 0), hook("createContainer", 1)])),
        ("/hooks/startContainer", json!([hook("startContainer", 0)])),
    ];
    conforms(&place, "hooks", &changes);
    let fails = |point: &str, hook: Value, words: &[&str]| {
        let mut bundle = usual(&place);
        set(&mut bundle, &format!("/hooks/{point}"), json!([hook]));
        let ended = check(&place, "failing", &bundle, &bundle);
        assert!(ended.code != 0 && ended.out.is_empty(), "{ended:?}");
        assert!(words.iter().all(|word| ended.err.contains(word)), "{words:?}: {ended:?}");
    };
    let shell = |script: &str, timeout: u32| json!({"path": "/bin/sh", "args": ["sh", "-c", script], "timeout": timeout});
    fails(
        "createContainer",
        shell("echo out of order >&2; exit 7", 9),
        &["/bin/sh", "exit status 7", "out of order"],
    );
    fails("startContainer", shell("kill -9 $$", 9), &["/bin/sh", "signal 9"]);
    fails("startContainer", shell("while :; do :; done", 1), &["/bin/sh", "1 s", "killed"]);
    fails(
        "createContainer",
        json!({"path": "/usr/bin/nvidia-ctk"}),
        &["/usr/bin/nvidia-ctk", "no such program in the container"],
    );
    place.assert_clean();
}

/// That the checker says so where a container is not what its bundle says.
#[test]
fn the_checker_sees_each_difference() {
    let Some(place) = Place::new() else { return };
    let bundle = usual(&place);
    let differences = [
        ("/process/args/-", json!("more"), "process.args"),
        ("/process/env/0", json!("PATH=/bin"), "process.env"),
        ("/process/cwd", json!("/tmp"), "process.cwd"),
        (
            "/process/user",
            json!({"uid": 1, "gid": 1, "additionalGids": [3], "umask": 0}),
            "process.user.umask",
        ),
        ("/process/capabilities/bounding", json!(["CAP_KILL"]), "capabilities.bounding"),
        ("/process/rlimits/0/soft", json!(1023), "process.rlimits"),
        ("/process/noNewPrivileges", json!(false), "process.noNewPrivileges"),
        ("/process/oomScoreAdj", json!(1), "process.oomScoreAdj"),
        ("/process/scheduler", json!({"policy": "SCHED_BATCH"}), "process.scheduler.policy"),
        ("/process/ioPriority", json!({"class": "IOPRIO_CLASS_IDLE"}), "process.ioPriority"),
        ("/root/readonly", json!(false), "root.readonly"),
        ("/hostname", json!("other"), "hostname"),
        ("/domainname", json!("other"), "domainname"),
        ("/mounts/1/options/3", json!("size=1k"), "mounts /dev size=1k"),
        ("/mounts/5/options/3", json!("rw"), "mounts /sys rw"),
        ("/mounts/-", json!({"destination": "/none", "type": "tmpfs"}), "mounts /none"),
        ("/linux/maskedPaths", json!(["/etc/passwd", "/etc"]), "linux.maskedPaths /etc/passwd"),
        ("/linux/readonlyPaths", json!(["/tmp"]), "linux.readonlyPaths /tmp"),
        (
            "/linux/devices",
            json!([{"path": "/dev/null", "type": "c", "major": 1, "minor": 5}]),
            "linux.devices",
        ),
        ("/linux/namespaces/5/type", json!("time"), "namespace cgroup"),
        ("/linux/uidMappings", json!([{"containerID": 0, "hostID": 5, "size": 10}]), "linux.uidMappings"),
        ("/linux/gidMappings", json!([]), "linux.gidMappings"),
        ("/linux/timeOffsets", json!({"boottime": {"secs": 5}}), "linux.timeOffsets.boottime"),
        ("/linux/sysctl", json!({"kernel.shmmax": "1"}), "linux.sysctl"),
        ("/linux/personality", json!({"domain": "LINUX32"}), "linux.personality"),
        (
            "/linux/resources",
            json!({"pids": {"limit": 1}, "cpu": {"shares": 2}}),
            "linux.resources cpu.weight",
        ),
        (
            "/linux/seccomp",
            json!({"syscalls": [{"names": ["acct"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99}]}),
            "linux.seccomp acct",
        ),
        ("/hooks", json!({"startContainer": [{"path": "/bin/true"}]}), "hooks.startContainer[0]"),
    ];
    let mut told = bundle.clone();
    differences.iter().for_each(|(pointer, value, _)| set(&mut told, pointer, value.clone()));
    let ended = check(&place, "told", &bundle, &told);
    for (_, _, word) in &differences {
        let seen = ended.out.lines().any(|line| line.starts_with("not ok ") && line.contains(word));
        assert!(seen, "{word} was not seen: {ended:?}");
    }
}

/// Some of many changes, each as likely as not.
fn by_chance(dice: &mut Dice) -> Vec<(&'static str, Value)> {
    let some = |dice: &mut Dice, all: &[&str]| -> Vec<String> {
        all.iter().filter(|_| dice.below(2) == 0).map(ToString::to_string).collect()
    };
    let uid = dice.below(3) * 500;
    let bounding = some(dice, &all_capabilities());
    let flags = some(dice, &["nosuid", "nodev", "noexec", "noatime", "ro", "nosymfollow"]);
    let limit = dice.below(1000) + 100;
    let namespaces: Vec<_> = some(dice, &["pid", "ipc", "cgroup", "time", "network"]);
    let namespaces: Vec<_> = namespaces
        .iter()
        .map(String::as_str)
        .chain(["mount", "uts"])
        .map(|kind| json!({"type": kind}))
        .collect();
    let all = [
        (
            "/process/user",
            json!({"uid": uid, "gid": dice.below(2) * 7, "additionalGids": [dice.below(9) + 1, 4000], "umask": dice.below(0o777)}),
        ),
        (
            "/process/capabilities",
            json!({"bounding": bounding, "permitted": bounding, "effective": bounding}),
        ),
        ("/process/noNewPrivileges", json!(dice.below(2) == 0)),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_NOFILE", "soft": limit, "hard": limit + dice.below(1000)}]),
        ),
        ("/process/oomScoreAdj", json!(dice.below(1000))),
        ("/process/scheduler", json!({"policy": "SCHED_OTHER", "nice": dice.below(19)})),
        ("/process/ioPriority", json!({"class": "IOPRIO_CLASS_BE", "priority": dice.below(8)})),
        ("/root/readonly", json!(dice.below(2) == 0)),
        ("/hostname", json!(format!("host-{limit}"))),
        (
            "/mounts/-",
            json!({"destination": "/opt/chance", "type": "tmpfs", "source": "tmpfs", "options": flags}),
        ),
        ("/linux/namespaces", json!(namespaces)),
        (
            "/linux/resources",
            json!({"pids": {"limit": limit}, "memory": {"limit": (limit + 64) << 20}, "cpu": {"shares": limit * 2}}),
        ),
        (
            "/linux/maskedPaths",
            json!(some(dice, &["/proc/kcore", "/proc/cpuinfo", "/usr/share", "/etc/hosts"])),
        ),
        ("/linux/readonlyPaths", json!(some(dice, &["/proc/sys", "/etc", "/usr", "/tmp"]))),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["acct"], "action": "SCMP_ACT_ERRNO", "errnoRet": limit}]}),
        ),
        ("/hooks/createContainer", json!([hook("createContainer", 0)])),
        ("/hooks/startContainer", json!([hook("startContainer", 0)])),
    ];
    let chosen: Vec<_> = all.into_iter().filter(|_| dice.below(2) == 0).collect();
    let unmapped = ["/process/user", "/linux/namespaces"];
    // Its groups are beyond those that the namespace maps.
    if chosen.iter().any(|(pointer, _)| unmapped.contains(pointer)) || dice.below(2) == 0 {
        return chosen;
    }
    [chosen, user_namespace()].concat()
}

#[test]
fn bundles_made_by_chance_conform() {
    let Some(place) = Place::new() else { return };
    let mut dice = Dice::new();
    let bundles = if std::env::var_os("KRX_SOAK").is_some() { 60 } else { 4 };
    for number in 0..bundles {
        let changes = by_chance(&mut dice);
        conforms(&place, &format!("chance-{number}"), &changes);
    }
    place.assert_clean();
}
