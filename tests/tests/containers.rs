//! Containers of pods through the CRI: what they print, how they end, what they see, what they may use and do.

mod container_tests;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use tests::containerd::{Engine, suite};
use tests::cri::container::END;
use tests::cri::messages::{CONTAINER_EXITED, CONTAINER_RUNNING, Resources};
use tests::cri::pod::PodPlan;
use tests::cri::stream::{STDERR, STDOUT};
use tests::pod::until;
use tests::scratch::Scratch;

use crate::container_tests::security;

const MIB: i64 = 1 << 20;

fn main() -> ExitCode {
    suite::run(&[
        ("logs_and_exit_code", logs),
        ("stop_asks_first_and_kills_then", stop),
        ("a_missing_command_does_not_start", missing),
        ("exec_sync", exec_sync),
        ("exec_streams_and_status", exec_streams),
        ("exec_on_a_terminal_that_is_resized", exec_tty),
        ("attach_to_a_terminal", attach_tty),
        ("attach_without_a_terminal", attach_plain),
        ("stats_are_there_and_grow", stats),
        ("a_container_over_its_memory_is_oom_killed", oom),
        ("resources_are_updated", update),
        ("a_full_pod_stays_within_its_limit_and_overhead", full),
        ("volumes_of_files_that_change", config_map),
        ("host_paths_and_empty_directories", host_paths),
        ("environment_user_and_groups", security::identity),
        ("capabilities_and_privileges", security::capabilities),
        ("a_read_only_root", security::read_only_root),
        ("a_default_container_is_confined", security::default),
        ("a_restricted_container_has_nothing_it_does_not_need", security::restricted),
        ("a_privileged_container_has_all_of_its_vm", security::privileged),
    ])
}

fn logs(engine: &Engine) {
    let pod = PodPlan::new(engine, "logs").run();
    let ended = pod.shell("main", "echo out; echo err >&2; printf unfinished; exit 3").run();
    assert_eq!((ended.code, ended.out.as_str(), ended.err.as_str()), (3, "out\nunfinished", "err\n"));
    let container = pod.shell("second", "exit 0").start();
    let status = container.wait();
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    assert!(status.finished_at >= status.started_at && status.started_at > 0, "{status:?}");
    let long = pod.shell("long", "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i + 1)); done").run();
    assert_eq!(long.out.lines().count(), 2000);
    assert!(long.out.ends_with("line 1999\n"));
    container.remove().expect("remove");
}

fn stop(engine: &Engine) {
    let pod = PodPlan::new(engine, "stop").run();
    let polite =
        pod.shell("polite", "trap 'echo bye; exit 4' TERM; echo up; while :; do sleep 0.1; done").start();
    polite.wait_for("up");
    polite.stop(60).expect("stop");
    assert_eq!(polite.status().exit_code, 4);
    assert!(polite.logs().0.contains("bye"));
    let stubborn = pod.shell("stubborn", "trap '' TERM; echo up; while :; do sleep 0.1; done").start();
    stubborn.wait_for("up");
    let begin = Instant::now();
    stubborn.stop(2).expect("stop");
    assert!(begin.elapsed() >= Duration::from_secs(2), "it was not asked first");
    assert_eq!((stubborn.status().state, stubborn.status().exit_code), (CONTAINER_EXITED, 137));
    stubborn.stop(2).expect("a stopped container is stopped");
}

fn missing(engine: &Engine) {
    let pod = PodPlan::new(engine, "missing").run();
    let container = pod.container("main", &["/no/such/program"]).create();
    let status = container.start().expect_err("it cannot start");
    assert!(status.message().contains("/no/such/program"), "{status}");
    assert_eq!(container.status().state, CONTAINER_EXITED);
    let good = pod.shell("good", "echo fine").run();
    assert_eq!(good.out, "fine\n", "the pod lives on");
}

fn exec_sync(engine: &Engine) {
    let pod = PodPlan::new(engine, "exec").run();
    let container = pod.container("main", &["sleep", "600"]).env("COLOUR", "red").start();
    let ended = container.exec(&["sh", "-c", "echo $COLOUR; echo err >&2; exit 6"]);
    assert_eq!((ended.code, ended.out.as_str(), ended.err.as_str()), (6, "red\n", "err\n"));
    let begin = Instant::now();
    let late = container.try_exec(&["sleep", "300"], 2).expect_err("a timeout");
    assert!(begin.elapsed() < Duration::from_secs(60), "{late}");
    assert!(late.message().contains("timeout") || late.code() == tonic::Code::DeadlineExceeded, "{late:?}");
    let none = container.try_exec(&["no-such-program"], 0).expect_err("no such program");
    assert!(none.message().contains("no-such-program"), "{none}");
    assert_eq!(container.status().state, CONTAINER_RUNNING);
    let gone = until(END, || {
        let seen =
            container.sh("cat /proc/[0-9]*/cmdline | sed 's/\\x00/ /g' | grep -c '[s]leep 300' || true");
        (seen.trim() == "0").then_some(())
    });
    assert!(gone.is_some(), "the command that was late runs on");
}

fn exec_streams(engine: &Engine) {
    let pod = PodPlan::new(engine, "streams").run();
    let container = pod.container("main", &["sleep", "600"]).start();
    let mut stream =
        container.exec_stream(&["sh", "-c", "read line; echo got $line; echo err >&2; exit 5"], false);
    stream.send("words\n");
    assert_eq!(stream.exit_code(), 5);
    assert_eq!((stream.text(STDOUT).as_str(), stream.text(STDERR).as_str()), ("got words\n", "err\n"));
}

fn exec_tty(engine: &Engine) {
    let pod = PodPlan::new(engine, "terminal").run();
    let container = pod.container("main", &["sleep", "600"]).start();
    let mut stream = container.exec_stream(&["sh"], true);
    stream.resize(101, 37);
    // The size comes on a channel of its own, the commands on another: ask until it is there.
    stream.send("tty; until [ \"$(stty size)\" = '37 101' ]; do sleep 0.1; done; echo re''sized\n");
    stream.wait_for(STDOUT, "resized");
    assert!(stream.text(STDOUT).contains("/dev/pts/"), "{}", stream.text(STDOUT));
    stream.send("exit 8\n");
    assert_eq!(stream.exit_code(), 8);
}

fn attach_tty(engine: &Engine) {
    let pod = PodPlan::new(engine, "attach").run();
    let container = pod.container("main", &["sh"]).tty().start();
    let mut stream = container.attach(true);
    stream.resize(90, 30);
    stream.send("until [ \"$(stty size)\" = '30 90' ]; do sleep 0.1; done; echo re''sized\n");
    stream.wait_for(STDOUT, "resized");
    stream.send("exit 2\n");
    assert_eq!(container.wait().exit_code, 2);
    assert!(container.logs().0.contains("resized"), "the log has it too");
}

fn attach_plain(engine: &Engine) {
    let pod = PodPlan::new(engine, "attach-plain").run();
    let script = "while read line; do echo got $line; [ $line = end ] && exit 0; done";
    let container = pod.shell("main", script).stdin().start();
    let mut stream = container.attach(false);
    stream.send("one\n");
    stream.wait_for(STDOUT, "got one");
    stream.send("end\n");
    assert_eq!(container.wait().exit_code, 0);
    assert_eq!(container.logs().0, "got one\ngot end\n");
}

fn stats(engine: &Engine) {
    let pod = PodPlan::new(engine, "stats").run();
    let container = pod.shell("main", "while :; do :; done").start();
    let cpu = || {
        let cpu = container.stats().cpu.unwrap_or_default();
        cpu.usage_core_nano_seconds.unwrap_or_default().value
    };
    let first = until(END, || Some(cpu()).filter(|cpu| *cpu > 0)).expect("CPU time");
    until(END, || (cpu() > first).then_some(())).expect("CPU time grows");
    let memory = container.stats().memory.unwrap_or_default().working_set_bytes.unwrap_or_default();
    assert!(memory.value > 4096, "{memory:?}");
    let of_pod = pod.stats().stats.unwrap_or_default().linux.unwrap_or_default();
    let cpu = of_pod.cpu.unwrap_or_default().usage_core_nano_seconds.unwrap_or_default();
    let memory = of_pod.memory.unwrap_or_default().working_set_bytes.unwrap_or_default();
    assert!(cpu.value > 0 && memory.value > 4096, "{cpu:?} {memory:?}");
}

fn oom(engine: &Engine) {
    let pod = PodPlan::new(engine, "oom").run();
    let container = pod.container("main", &["workload", "allocate", "256"]).memory(64 * MIB).start();
    let status = container.wait();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    let fine = pod.container("fine", &["workload", "allocate", "16"]).memory(64 * MIB).start();
    fine.wait_for("allocated");
    assert_eq!(fine.status().state, CONTAINER_RUNNING);
}

/// What the RuntimeClass says that a pod takes beside its limits.
fn overhead() -> i64 {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist/runtimeclass.yaml");
    let manifest = fs::read_to_string(manifest).expect("RuntimeClass");
    let memory = manifest.lines().find_map(|line| line.trim().strip_prefix("memory: ")?.strip_suffix("Mi"));
    memory.and_then(|mib| mib.parse().ok()).expect("overhead.podFixed.memory")
}

/// The kubelet limits a pod's cgroup to the sum of both.
fn full(engine: &Engine) {
    let limit = Resources { memory_limit: 256 * MIB, ..Resources::default() };
    let mut plan = PodPlan::new(engine, "full");
    plan.linux().resources = Some(limit.clone());
    let pod = plan.run();
    let allowed = if engine.is_krx() { 256 + overhead() } else { 256 };
    fs::write(pod.cgroup().join("memory.max"), (allowed * MIB).to_string()).expect("memory.max");
    // The rest is the kernel's, for the container.
    let container = pod.container("main", &["workload", "allocate", "240"]).resources(limit).start();
    container.wait_for("allocated 240 MiB");
    let events = fs::read_to_string(pod.cgroup().join("memory.events")).expect("memory.events");
    assert!(events.lines().any(|line| line == "oom_kill 0"), "{events}");
    assert_eq!(container.status().state, CONTAINER_RUNNING);
}

fn update(engine: &Engine) {
    let pod = PodPlan::new(engine, "update").run();
    let limits =
        Resources { cpu_period: 100_000, cpu_quota: 50_000, memory_limit: 64 * MIB, ..Default::default() };
    let container = pod.container("main", &["sleep", "600"]).resources(limits).start();
    let seen = || container.sh("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max");
    assert_eq!(seen(), format!("{}\n50000 100000\n", 64 * MIB));
    let more =
        Resources { cpu_period: 100_000, cpu_quota: 80_000, memory_limit: 96 * MIB, ..Default::default() };
    container.update(more).expect("update");
    assert_eq!(seen(), format!("{}\n80000 100000\n", 96 * MIB));
}

/// As the kubelet writes a ConfigMap: `..data` is a link to a directory, exchanged at once by a rename.
fn config_map(engine: &Engine) {
    let volume = Scratch::under(&engine.scratch().join("logs"));
    let write = |version: &str| {
        volume.write(&format!("..{version}/colour"), version);
        symlink(format!("..{version}"), volume.join("..data_tmp")).expect("link");
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).expect("rename");
    };
    write("red");
    symlink("..data/colour", volume.join("colour")).expect("link");
    let pod = PodPlan::new(engine, "config").run();
    let container =
        pod.container("main", &["sleep", "600"]).mount(volume.path(), "/etc/config", true).start();
    assert_eq!(container.sh("cat /etc/config/colour"), "red");
    write("green");
    let changed = until(END, || (container.sh("cat /etc/config/colour") == "green").then_some(()));
    assert!(changed.is_some(), "the container does not see the change");
    assert_ne!(container.exec(&["touch", "/etc/config/new"]).code, 0, "it is read-only");
}

fn host_paths(engine: &Engine) {
    let volume = Scratch::under(&engine.scratch().join("logs"));
    volume.write("from-host", "host");
    fs::set_permissions(volume.path(), fs::Permissions::from_mode(0o777)).expect("mode");
    let file = volume.write("file", "old");
    let pod = PodPlan::new(engine, "volumes").run();
    let writer = pod.container("writer", &["sleep", "600"]).mount(volume.path(), "/data", false);
    let writer = writer.mount(&file, "/etc/single", false).start();
    let reader = pod.container("reader", &["sleep", "600"]).mount(volume.path(), "/data", true).start();
    assert_eq!(
        writer.sh("cat /data/from-host; echo container > /data/from-container; echo new > /etc/single"),
        "host"
    );
    assert_eq!(fs::read_to_string(volume.join("from-container")).expect("file"), "container\n");
    assert_eq!(fs::read_to_string(&file).expect("file"), "new\n");
    assert_eq!(reader.sh("cat /data/from-container"), "container\n");
    assert_ne!(reader.exec(&["touch", "/data/new"]).code, 0, "it is read-only");
    volume.write("later", "later");
    assert_eq!(reader.sh("cat /data/later"), "later");
}
