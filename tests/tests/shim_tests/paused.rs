//! Pods and containers that are paused: what nothing in them would answer is refused at once.

use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    PauseRequest, PidsRequest, ResizePtyRequest, ResumeRequest, StatsRequest, UpdateTaskRequest,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::Code;
use tests::shim::{Player, Shim, assert_refused, bundle, limit};

use super::SLEEP;

/// Far less than a guest is given for an answer, also on an emulated host.
const AT_ONCE: Duration = Duration::from_secs(10);

/// A request that says no more than the task's id.
macro_rules! of {
    ($request:ident, $id:expr) => {
        &$request { id: $id.to_string(), ..$request::default() }
    };
}

fn update(id: &str) -> UpdateTaskRequest {
    let resources = Any { value: br#"{"pids": {"limit": 50}}"#.to_vec(), ..Any::default() };
    UpdateTaskRequest { id: id.into(), resources: Some(resources).into(), ..UpdateTaskRequest::default() }
}

#[track_caller]
fn at_once<T>(work: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let done = work();
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    done
}

/// A pod with its sandbox.
fn sandbox(player: &Player) -> Shim {
    let id = player.id("still");
    let pod = player.shim(&id, &bundle::sandbox(&player.host, &id));
    pod.create(&id).expect("create");
    pod.start(&id, "").expect("start");
    pod
}

/// A container in a pod.
fn member(player: &Player, pod: &Shim, command: &[&str]) -> Shim {
    let (inside, pid) = (player.id("inside"), pod.state(&pod.id, "").expect("state").pid);
    let member = player.shim(&inside, &bundle::member(&player.host, command, &pod.id, pid));
    member.create(&inside).expect("create");
    member.start(&inside, "").expect("start");
    member
}

/// A pod with its sandbox, and a container in it with a process that waits for its start.
fn pod(player: &Player) -> (Shim, Shim) {
    let pod = sandbox(player);
    let member = member(player, &pod, &SLEEP);
    member.exec(&member.id, "created", &["true"]).expect("exec");
    (pod, member)
}

pub(crate) fn whole_pod(player: &Player) {
    let (pod, member) = pod(player);
    let (id, inside) = (pod.id.as_str(), member.id.as_str());
    let vmm = pod.state(id, "").expect("state").pid;
    pod.task.pause(limit(), of!(PauseRequest, id)).expect("pause");
    let late = player.id("late");
    let late = player.shim(&late, &bundle::member(&player.host, &SLEEP, id, vmm));
    let (wrong, paused) = (Code::FAILED_PRECONDITION, "is paused");
    at_once(|| {
        assert_refused(late.create(&late.id), wrong, paused);
        assert_refused(member.exec(inside, "late", &["true"]), wrong, paused);
        assert_refused(member.start(inside, "created"), wrong, paused);
        assert_refused(member.delete(inside, "created"), wrong, paused);
        assert_refused(member.kill(inside, "created", 9), wrong, paused);
        assert_refused(member.task.update(limit(), &update(inside)), wrong, paused);
        assert_refused(member.task.resize_pty(limit(), of!(ResizePtyRequest, inside)), wrong, paused);
        assert_refused(member.task.pause(limit(), of!(PauseRequest, inside)), wrong, paused);
        for id in [id, inside] {
            assert_refused(pod.task.stats(limit(), of!(StatsRequest, id)), wrong, paused);
            pod.state(id, "").expect("state");
        }
        // The one process of a sandbox is the host's; a container that cannot be asked is there, too, for who looks whether it is.
        for id in [id, inside] {
            assert_eq!(pod.task.pids(limit(), of!(PidsRequest, id)).expect("pids").processes[0].pid, vmm);
        }
    });
    pod.task.resume(limit(), of!(ResumeRequest, id)).expect("resume");
    member.start(inside, "created").expect("start");
    assert_eq!(member.wait(inside, "created").expect("wait"), 0);
    pod.task.stats(limit(), of!(StatsRequest, id)).expect("stats");
    member.task.update(limit(), &update(inside)).expect("update");
    pod.task.pause(limit(), of!(PauseRequest, id)).expect("pause again");
    at_once(|| {
        pod.kill(id, "", 9).expect("kill");
        assert_eq!(member.wait(inside, "").expect("wait"), 137);
        assert_eq!(pod.wait(id, "").expect("wait"), 137);
    });
    member.delete(inside, "").expect("delete");
    pod.delete(id, "").expect("delete");
    pod.shut_down();
    player.events.expect(id, &["create", "start", "paused", "resumed", "paused", "exit 137", "delete 137"]);
}

/// containerd stops a pod's containers before the pod: one that is paused, too, is to be removed by that.
pub(crate) fn stopped_in_order(player: &Player) {
    let pod = sandbox(player);
    let id = pod.id.as_str();
    let script = "trap 'exit 4' TERM; touch /tmp/up; while :; do sleep 0.1; done";
    let (polite, stubborn) =
        (member(player, &pod, &["sh", "-c", script]), member(player, &pod, &["sh", "-c", "sleep 3600"]));
    let ended = member(player, &pod, &["true"]);
    assert_eq!(ended.wait(&ended.id, "").expect("wait"), 0);
    polite.exec(&polite.id, "up", &["sh", "-c", "until [ -e /tmp/up ]; do sleep 0.1; done"]).expect("exec");
    polite.start(&polite.id, "up").expect("start");
    assert_eq!(polite.wait(&polite.id, "up").expect("wait"), 0);
    pod.task.pause(limit(), of!(PauseRequest, id)).expect("pause");
    at_once(|| {
        // It waits for the pod, as for a container's processes that are frozen.
        polite.kill(&polite.id, "", 15).expect("SIGTERM");
        assert_refused(ended.delete(&ended.id, ""), Code::FAILED_PRECONDITION, "is paused");
        pod.task.pids(limit(), of!(PidsRequest, id)).expect("pids");
    });
    std::thread::sleep(Duration::from_secs(1));
    assert!(player.events.of(&polite.id).iter().all(|line| !line.starts_with("exit 4")), "it stands still");
    at_once(|| {
        stubborn.kill(&stubborn.id, "", 9).expect("SIGKILL");
        assert_eq!(stubborn.wait(&stubborn.id, "").expect("wait"), 137);
        assert_eq!(polite.wait(&polite.id, "").expect("wait"), 4, "SIGTERM has waited for it");
    });
    for member in [&polite, &stubborn] {
        member.delete(&member.id, "").expect("delete");
    }
    // With one that has ended before, too: it is not found, and can be deleted from then on.
    pod.task.pause(limit(), of!(PauseRequest, id)).expect("pause again");
    at_once(|| assert_refused(ended.kill(&ended.id, "", 9), Code::NOT_FOUND, "has ended"));
    ended.delete(&ended.id, "").expect("delete");
    pod.end();
    let (first, second) = (["create", "start", "paused", "resumed"], ["paused", "resumed"]);
    player.events.expect(id, &[&first[..], &second, &["exit 137", "delete 137"]].concat());
}

pub(crate) fn container(player: &Player) {
    let shim = player.running("frozen", &SLEEP);
    let id = shim.id.as_str();
    shim.exec(id, "created", &["true"]).expect("exec");
    shim.task.pause(limit(), of!(PauseRequest, id)).expect("pause");
    let (wrong, paused) = (Code::FAILED_PRECONDITION, "is paused");
    at_once(|| {
        assert_refused(shim.exec(id, "late", &["true"]), wrong, paused);
        assert_refused(shim.start(id, "created"), wrong, paused);
        // The VM goes on.
        shim.task.stats(limit(), of!(StatsRequest, id)).expect("stats");
        shim.task.update(limit(), &update(id)).expect("update");
        let pids = shim.task.pids(limit(), of!(PidsRequest, id)).expect("pids");
        assert_eq!(pids.processes.len(), 2);
    });
    shim.task.resume(limit(), of!(ResumeRequest, id)).expect("resume");
    shim.start(id, "created").expect("start");
    assert_eq!(shim.wait(id, "created").expect("wait"), 0);
    shim.task.pause(limit(), of!(PauseRequest, id)).expect("pause again");
    at_once(|| {
        shim.kill(id, "", 9).expect("kill");
        assert_eq!(shim.wait(id, "").expect("wait"), 137);
    });
    shim.delete(id, "").expect("delete");
    shim.shut_down();
}
