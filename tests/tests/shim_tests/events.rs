//! Events.

use std::thread;
use std::time::Duration;

use containerd_shim_protos::api::{PauseRequest, ResumeRequest};
use containerd_shim_protos::protobuf::EnumOrUnknown;
use containerd_shim_protos::ttrpc::Code;
use serde_json::json;
use tests::pod::until;
use tests::shim::{Player, assert_refused, bundle, limit};

use super::SLEEP;

pub(crate) fn life(player: &Player) {
    let shim = player.running("life", &SLEEP);
    let id = shim.id.as_str();
    shim.exec(id, "a", &["sh", "-c", "exit 3"]).expect("exec");
    shim.start(id, "a").expect("start");
    assert_eq!(shim.wait(id, "a").expect("wait"), 3);
    shim.delete(id, "a").expect("delete");
    let request = PauseRequest { id: id.into(), ..PauseRequest::default() };
    shim.task.pause(limit(), &request).expect("pause");
    let request = ResumeRequest { id: id.into(), ..ResumeRequest::default() };
    shim.task.resume(limit(), &request).expect("resume");
    shim.end();
    let events = [
        "create",
        "start",
        "added a",
        "started a",
        "exit a 3",
        "paused",
        "resumed",
        "exit 137",
        "delete 137",
    ];
    player.events.expect(id, &events);

    let short = player.running("short", &["true"]);
    assert_eq!(short.wait(&short.id, "").expect("wait"), 0);
    short.delete(&short.id, "").expect("delete");
    short.shut_down();
    player.events.expect(&short.id, &["create", "start", "exit 0", "delete 0"]);
}

pub(crate) fn fast(player: &Player) {
    const THREADS: usize = 4;
    const EACH: usize = 50;
    let shim = player.running("fast", &SLEEP);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let shim = shim.again();
            scope.spawn(move || {
                for number in 0..EACH {
                    let exec = format!("{thread}-{number}");
                    shim.exec(&shim.id, &exec, &["true"]).expect("exec");
                    shim.start(&shim.id, &exec).expect("start");
                    assert_eq!(shim.wait(&shim.id, &exec).expect("wait"), 0);
                    shim.delete(&shim.id, &exec).expect("delete");
                }
            });
        }
    });
    shim.end();
    player.events.wait_for(&shim.id, "delete 137");
    let told = player.events.of(&shim.id);
    for thread in 0..THREADS {
        for number in 0..EACH {
            let exec = format!("{thread}-{number}");
            let its: Vec<_> = told.iter().filter(|line| line.split(' ').nth(1) == Some(&exec)).collect();
            let wanted = [format!("added {exec}"), format!("started {exec}"), format!("exit {exec} 0")];
            assert_eq!(its, wanted.iter().collect::<Vec<_>>());
        }
    }
    assert_eq!(told.len(), 4 + 3 * THREADS * EACH);
}

pub(crate) fn oom(player: &Player) {
    let id = player.id("oom");
    let mut config = bundle::config(&player.host, &["sh", "-c", "exec tail /dev/zero"]);
    config["linux"]["resources"] = json!({"memory": {"limit": 24 << 20}});
    let shim = player.shim(&id, &config);
    shim.create(&id).expect("create");
    shim.start(&id, "").expect("start");
    assert_eq!(shim.wait(&id, "").expect("wait"), 137);
    shim.delete(&id, "").expect("delete");
    shim.shut_down();
    player.events.expect(&id, &["create", "start", "oom", "exit 137", "delete 137"]);
}

pub(crate) fn away(player: &Player) {
    let shim = player.running("away", &SLEEP);
    let id = shim.id.as_str();
    player.events.expect(id, &["create", "start"]);
    player.events.close();
    for exec in ["a", "b"] {
        shim.exec(id, exec, &["true"]).expect("exec");
        shim.start(id, exec).expect("start");
        shim.wait(id, exec).expect("wait");
    }
    thread::sleep(Duration::from_secs(4));
    player.events.open();
    shim.end();
    let events = [
        "create",
        "start",
        "added a",
        "started a",
        "exit a 0",
        "added b",
        "started b",
        "exit b 0",
        "exit 137",
        "delete 137",
    ];
    player.events.expect(id, &events);
}

/// A container that shares the pod's PID namespace: what is added to it outlives its first process.
pub(crate) fn added_outlive_the_first(player: &Player) {
    let id = player.id("pod");
    let pod = player.shim(&id, &bundle::sandbox(&player.host, &id));
    let pid = pod.create(&id).expect("create");
    pod.start(&id, "").expect("start");
    let inside = player.id("inside");
    let mut config = bundle::member(&player.host, &SLEEP, &id, pid);
    config["linux"]["namespaces"][0]["path"] = json!(format!("/proc/{pid}/ns/pid"));
    let member = player.shim(&inside, &config);
    // Each time under the same ids: a late word of one that is deleted is not to reach the next.
    let mut wanted = Vec::new();
    for _ in 0..5 {
        member.create(&inside).expect("create");
        member.start(&inside, "").expect("start");
        for exec in ["a", "b", "created"] {
            member.exec(&inside, exec, &SLEEP).expect("exec");
        }
        for exec in ["a", "b"] {
            member.start(&inside, exec).expect("start");
        }
        thread::sleep(Duration::from_millis(200));
        for (exec, status) in [("", 2), ("a", 2), ("b", 2), ("created", 1)] {
            let state = member.state(&inside, exec).expect("state");
            assert_eq!(state.status, EnumOrUnknown::from_i32(status), "{exec:?}: {state:?}");
        }
        member.kill(&inside, "", 9).expect("kill");
        assert_eq!(member.wait(&inside, "").expect("wait"), 137);
        member.delete(&inside, "").expect("delete");
        assert_refused(member.state(&inside, "a"), Code::NOT_FOUND, &inside);
        wanted.extend(["create", "start", "added a", "added b", "added created", "started a", "started b"]);
        // Their order is that of their ends.
        wanted.extend(["exit 137", "exit a 137", "exit b 137", "exit created 137", "delete 137"]);
    }
    player.events.wait_for(&inside, "delete 137");
    let _ =
        until(Duration::from_secs(20), || (player.events.of(&inside).len() >= wanted.len()).then_some(()));
    let mut told = player.events.of(&inside);
    told.chunks_mut(12).for_each(|life| {
        if let Some(ends) = life.get_mut(7..11) {
            ends.sort();
        }
    });
    assert_eq!(told, wanted);
    pod.end();
}
