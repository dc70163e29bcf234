//! What is left when shims, containerd and pods end in ways that nobody asked for. One test at a time.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::containerd::remains::Remains;
use tests::containerd::{Engine, suite};
use tests::cri::container::END;
use tests::cri::messages::{CONTAINER_EXITED, CONTAINER_RUNNING, SANDBOX_READY};
use tests::cri::pod::PodPlan;
use tests::pod::until;

fn main() -> ExitCode {
    suite::run_in_turn(&[
        ("nothing_is_left_of_a_pod", nothing_left),
        ("nothing_is_left_of_a_pod_that_does_not_start", failed_start),
        ("nothing_is_left_when_the_shim_is_killed", shim_killed),
        ("containerd_is_killed_and_finds_its_pods_again", containerd_killed),
        ("containers_that_end_while_containerd_is_away", ended_meanwhile),
        ("a_pods_main_process_is_killed", pause_killed),
    ])
}

fn assert_clean(before: &Remains) {
    let left = Remains::left_since(before);
    assert!(left.is_empty(), "left behind:\n    {}", left.join("\n    "));
}

/// PIDs of the shims that serve a pod or a container.
fn shims(id: &str) -> Vec<i32> {
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_its = |pid: &i32| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split('\0').next().is_some_and(|name| name.contains("containerd-shim")) && line.contains(id)
    };
    pids.filter(is_its).collect()
}

fn nothing_left(engine: &Engine) {
    let before = Remains::now();
    let pod = PodPlan::new(engine, "clean").host_port(18090, 80).run();
    let container = pod.container("main", &["sleep", "600"]).memory(64 << 20).start();
    container.sh("echo hello");
    assert!(!Remains::now().since(&before).is_empty(), "the count sees nothing");
    drop(pod);
    assert_clean(&before);
}

fn failed_start(engine: &Engine) {
    let before = Remains::now();
    let pod = PodPlan::new(engine, "odd").run();
    for attempt in 0..2 {
        let container = pod.container("main", &["/no/such/program"]).attempt(attempt).create();
        container.start().expect_err("it cannot start");
        container.remove().expect("remove");
    }
    drop(pod);
    let refused = PodPlan::new(engine, "refused").sysctl("kernel.no_such_setting", "1").try_run();
    assert!(refused.is_err(), "there is no such setting");
    drop(refused);
    assert_clean(&before);
}

fn shim_killed(engine: &Engine) {
    let before = Remains::now();
    let pod = PodPlan::new(engine, "shim").run();
    let container = pod.container("main", &["sleep", "600"]).start();
    let pids = shims(&pod.id);
    assert!(!pids.is_empty(), "no shim of the pod");
    for pid in pids {
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill");
    }
    let noticed = until(END, || (container.status().state == CONTAINER_EXITED).then_some(()));
    assert!(noticed.is_some(), "containerd does not notice: {:?}", container.status());
    assert_ne!(until(END, || (pod.status().state != SANDBOX_READY).then_some(())), None);
    drop(pod);
    if engine.is_krx() {
        assert_clean(&before);
    } else {
        // runc's shim leaves its socket.
        let left = Remains::left_since(&before);
        for line in &left {
            let socket = line.strip_prefix("file ").filter(|file| file.starts_with("/run/containerd/s/"));
            let socket = socket.unwrap_or_else(|| panic!("left behind: {left:?}"));
            fs::remove_file(socket).expect("socket");
        }
    }
}

fn containerd_killed(engine: &Engine) {
    let before = Remains::now();
    let pod = PodPlan::new(engine, "found").run();
    let container = pod.shell("main", "while :; do echo tick; sleep 1; done").start();
    container.wait_for("tick");
    engine.end(Signal::SIGKILL);
    engine.start_again();
    assert_eq!(pod.status().state, SANDBOX_READY);
    assert_eq!(container.status().state, CONTAINER_RUNNING);
    assert_eq!(container.sh("echo still here"), "still here\n");
    let length = container.logs().0.len();
    until(END, || (container.logs().0.len() > length).then_some(())).expect("its log goes on");
    let second = pod.shell("second", "echo after").run();
    assert_eq!(second.out, "after\n", "a pod that was found again takes containers");
    drop(pod);
    assert_clean(&before);
}

fn ended_meanwhile(engine: &Engine) {
    let before = Remains::now();
    let pod = PodPlan::new(engine, "meanwhile").run();
    let container = pod.shell("main", "sleep 3; exit 11").start();
    engine.end(Signal::SIGKILL);
    std::thread::sleep(Duration::from_secs(6));
    engine.start_again();
    assert_eq!(container.wait().exit_code, 11);
    drop(pod);
    assert_clean(&before);
}

/// Of runc the pause process of the pod; of krx the VMM, which is the pod.
fn pause_killed(engine: &Engine) {
    let before = Remains::now();
    let pod = PodPlan::new(engine, "pause").run();
    let container = pod.container("main", &["sleep", "600"]).start();
    let name = if engine.is_krx() { "krx-vmm" } else { "workload" };
    let started = Remains::now().since(&before);
    let pid = started.iter().find_map(|line| line.strip_prefix(&format!("process {name} "))?.parse().ok());
    kill(Pid::from_raw(pid.expect("process of the pod")), Signal::SIGKILL).expect("kill");
    assert_ne!(until(END, || (pod.status().state != SANDBOX_READY).then_some(())), None, "not noticed");
    if engine.is_krx() {
        assert_eq!(container.wait().exit_code, 137);
    }
    drop(pod);
    assert_clean(&before);
}
