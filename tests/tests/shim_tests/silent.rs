//! A pod whose guest does not answer, as that of a hostile kernel: it can be ended by what containerd does, and holds up nobody else.

use std::fs;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{PidsRequest, StatsRequest};
use containerd_shim_protos::ttrpc::Code;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tests::pod::patience;
use tests::shim::{Player, assert_refused, bundle, limit};

use super::SLEEP;

pub(crate) fn ended(player: &Player) {
    let id = player.id("silent");
    let pod = player.shim(&id, &bundle::sandbox(&player.host, &id));
    pod.create(&id).expect("create");
    pod.start(&id, "").expect("start");
    let vmm = pod.state(&id, "").expect("state").pid;
    let inside = player.id("inside");
    let mut config = bundle::member(&player.host, &SLEEP, &id, vmm);
    config["process"]["oomScoreAdj"] = json!(700);
    let member = player.shim(&inside, &config);
    member.create(&inside).expect("create");
    member.start(&inside, "").expect("start");
    let score = fs::read_to_string(format!("/proc/{vmm}/oom_score_adj")).expect("score");
    assert_eq!(score.trim(), "700", "it is worth as much as its container, not as containerd");

    let process = Pid::from_raw(vmm.try_into().expect("PID"));
    kill(process, Signal::SIGSTOP).expect("stop");
    let begun = Instant::now();
    let request = StatsRequest { id: inside.clone(), ..StatsRequest::default() };
    assert_refused(pod.task.stats(limit(), &request), Code::DEADLINE_EXCEEDED, "did not answer");
    let request = PidsRequest { id: inside.clone(), ..PidsRequest::default() };
    assert_eq!(pod.task.pids(limit(), &request).expect("pids").processes[0].pid, vmm);
    assert!(begun.elapsed() < patience(Duration::from_secs(15)), "{:?}", begun.elapsed());
    // As the CRI does: one after the other, the next only where the last was no error.
    member.kill(&inside, "", 15).expect("SIGTERM");
    member.kill(&inside, "", 9).expect("SIGKILL");
    assert_eq!(member.wait(&inside, "").expect("wait"), 137);
    assert_eq!(pod.wait(&id, "").expect("wait"), 137);
    member.delete(&inside, "").expect("delete");
    pod.delete(&id, "").expect("delete");
    pod.shut_down();
}
