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

/// A pod with its sandbox, and a container in it with a process that waits for its start.
fn pod(player: &Player) -> (Shim, Shim) {
    let id = player.id("still");
    let pod = player.shim(&id, &bundle::sandbox(&player.host, &id));
    let pid = pod.create(&id).expect("create");
    pod.start(&id, "").expect("start");
    let inside = player.id("inside");
    let member = player.shim(&inside, &bundle::member(&player.host, &SLEEP, &id, pid));
    member.create(&inside).expect("create");
    member.start(&inside, "").expect("start");
    member.exec(&inside, "created", &["true"]).expect("exec");
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
        assert_refused(member.kill(inside, "", 9), wrong, paused);
        assert_refused(member.task.update(limit(), &update(inside)), wrong, paused);
        assert_refused(member.task.pids(limit(), of!(PidsRequest, inside)), wrong, paused);
        assert_refused(member.task.resize_pty(limit(), of!(ResizePtyRequest, inside)), wrong, paused);
        assert_refused(member.task.pause(limit(), of!(PauseRequest, inside)), wrong, paused);
        for id in [id, inside] {
            assert_refused(pod.task.stats(limit(), of!(StatsRequest, id)), wrong, paused);
            pod.state(id, "").expect("state");
        }
        // The one process of a sandbox is the host's.
        pod.task.pids(limit(), of!(PidsRequest, id)).expect("pids");
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
