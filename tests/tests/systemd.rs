//! Pods under a systemd that has the cgroups, as on the nodes of most clusters: their cgroups are its scopes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::containerd::{Engine, suite};
use tests::cri::container::END;
use tests::cri::pod::{CGROUPS, Pod, PodPlan};
use tests::pod::until;
use tests::systemd::{properties, run_under, systemctl};

fn main() -> ExitCode {
    run_under(|| {
        suite::run(&[
            ("a_pods_cgroup_is_a_scope", scope),
            ("a_reload_leaves_a_pods_limits", reload),
            ("the_scope_of_a_killed_pod_ends", killed),
        ])
    })
}

fn plan<'a>(engine: &'a Engine, name: &str) -> PodPlan<'a> {
    let mut plan = PodPlan::new(engine, name);
    plan.linux().cgroup_parent = format!("/krx{name}.slice/krx{name}-pod1.slice");
    plan
}

/// Removes the slices that systemd has made for a pod.
fn end(pod: Pod<'_>, name: &str) {
    drop(pod);
    let slice = format!("krx{name}.slice");
    let stopped = systemctl(&["stop", &slice]);
    assert!(stopped.status.success(), "{stopped:?}");
    // Of one with a property of its own, systemd keeps the cgroup.
    let _ = fs::remove_dir(Path::new(CGROUPS).join(slice));
}

fn unit(pod: &Pod<'_>) -> String {
    format!("cri-containerd-{}.scope", pod.id)
}

fn directory(pod: &Pod<'_>) -> PathBuf {
    pod.cgroup().join(unit(pod))
}

/// Waits until systemd knows the unit: no start waits for that.
fn until_active(pod: &Pod<'_>) {
    let active = || properties(&unit(pod), "ActiveState").contains("=active").then_some(());
    assert!(until(END, active).is_some(), "{}", properties(&unit(pod), "LoadState,ActiveState,SubState"));
}

fn until_gone(unit: &str) {
    let gone = || properties(unit, "LoadState").contains("=not-found").then_some(());
    assert!(until(END, gone).is_some(), "{}", properties(unit, "LoadState,ActiveState,SubState,Result"));
}

fn inside(pod: &Pod<'_>) -> Vec<(i32, String)> {
    let pids = fs::read_to_string(directory(pod).join("cgroup.procs")).expect("the pod's scope");
    let comm =
        |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).expect("process").trim().to_string();
    let mut inside: Vec<_> = pids.lines().map(|pid| (pid.parse().expect("a PID"), comm(pid))).collect();
    inside.sort_by(|a, b| a.1.cmp(&b.1));
    inside
}

fn scope(engine: &Engine) {
    let pod = plan(engine, "scope").run();
    pod.shell("main", "echo up; exec sleep 600").start().wait_for("up");
    until_active(&pod);
    let slice = "krxscope.slice/krxscope-pod1.slice";
    let known = properties(&unit(&pod), "Slice,Delegate,ControlGroup");
    for line in
        ["Slice=krxscope-pod1.slice", "Delegate=yes", &format!("ControlGroup=/{slice}/{}", unit(&pod))]
    {
        assert!(known.lines().any(|known| known == line), "{line} is not among\n{known}");
    }
    let names: Vec<_> = inside(&pod).into_iter().map(|(_, name)| name).collect();
    if engine.is_krx() {
        assert_eq!(names, ["containerd-shim", "krx-vmm"]);
    }
    pod.stop().expect("stop");
    until_gone(&unit(&pod));
    assert!(!directory(&pod).exists(), "{} is left", directory(&pod).display());
    end(pod, "scope");
}

/// What systemd does not know, it cuts off the limits of the slice above it at a reload.
fn reload(engine: &Engine) {
    let pod = plan(engine, "reload").run();
    let container = pod.shell("main", "echo up; exec sleep 600").start();
    container.wait_for("up");
    until_active(&pod);
    let limited =
        systemctl(&["set-property", "--runtime", "krxreload-pod1.slice", "MemoryMax=700M", "TasksMax=500"]);
    assert!(limited.status.success(), "{limited:?}");
    let before = controllers(&pod);
    assert!(["cpu", "memory", "pids"].iter().all(|wanted| before.contains(wanted)), "{before}");
    assert!(systemctl(&["daemon-reload"]).status.success());
    assert_eq!(controllers(&pod), before);
    assert_eq!(fs::read_to_string(pod.cgroup().join("memory.max")).expect("limit").trim(), "734003200");
    assert_eq!(container.sh("echo on"), "on\n");
    if engine.is_krx() {
        assert_eq!(inside(&pod).len(), 2);
    }
    drop(container);
    end(pod, "reload");
}

/// Those whose files the pod's cgroup has.
fn controllers(pod: &Pod<'_>) -> String {
    fs::read_to_string(directory(pod).join("cgroup.controllers")).expect("controllers")
}

fn killed(engine: &Engine) {
    let pod = plan(engine, "killed").run();
    pod.shell("main", "echo up; exec sleep 600").start().wait_for("up");
    until_active(&pod);
    let directory = directory(&pod);
    for (pid, _) in inside(&pod) {
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill");
    }
    until_gone(&unit(&pod));
    assert!(!directory.exists(), "{} is left", directory.display());
    end(pod, "killed");
}
