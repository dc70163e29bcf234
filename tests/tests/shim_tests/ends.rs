//! How shims begin and end.

use std::fs;
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::{PauseRequest, PidsRequest, StateRequest, StatsRequest};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::Code;
use containerd_shim_protos::ttrpc::proto::Request;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::cri::pod::CGROUPS;
use tests::pod::{finish, until};
use tests::shim::{Player, Way, assert_refused, bundle, limit, refusal};

use super::SLEEP;
use super::observed::socket as timings;

pub(crate) fn both_ways(player: &Player) {
    for way in [Way::Flags, Way::Bootstrap] {
        let id = player.id("way");
        let shim = player.shim_by(&id, Some(&bundle::config(&player.host, &SLEEP)), way);
        assert_eq!(fs::read_to_string(shim.bundle.join("address")).expect("address"), shim.address);
        // Another for the same id, while this one is there.
        assert_ne!(player.start(&id, &shim.bundle, way).code, 0);
        shim.create(&id).expect("create");
        // The service's name up to containerd 1.7.
        let state = StateRequest { id: id.clone(), ..StateRequest::default() };
        let request = Request {
            service: "containerd.task.v2.Task".into(),
            method: "State".into(),
            payload: state.write_to_bytes().expect("message"),
            timeout_nano: 10_000_000_000,
            ..Request::default()
        };
        let client = containerd_shim_protos::Client::connect(&shim.address).expect("connect");
        client.request(request).expect("version 2");
        shim.delete(&id, "").expect("delete");
        shim.shut_down();
        assert!(until(Duration::from_secs(20), || shim.state(&id, "").is_err().then_some(())).is_some());
    }
    let id = player.id("orphan");
    let bundle = player.bundle(&id, Some(&bundle::member(&player.host, &SLEEP, "no-such-pod", 1)));
    let refused = player.start(&id, &bundle, Way::Flags);
    assert!(refused.code != 0 && refused.err.contains("no-such-pod"), "{refused:?}");
    let mut without = player.call(&id, &bundle, &["start"]);
    let refused = finish(without.env_remove("TTRPC_ADDRESS"), b"");
    assert!(refused.code != 0 && refused.err.contains("TTRPC_ADDRESS"), "{refused:?}");
    // Its bundle goes while it is started: nobody would know of the shim.
    let id = player.id("nowhere");
    let bundle = player.bundle(&id, None);
    fs::create_dir(bundle.join("address")).expect("in the way");
    assert_ne!(player.start(&id, &bundle, Way::Flags).code, 0);
}

pub(crate) fn vm_killed(player: &Player) {
    let shim = player.running("killed", &SLEEP);
    let id = shim.id.as_str();
    shim.exec(id, "runs", &SLEEP).expect("exec");
    shim.start(id, "runs").expect("start");
    shim.exec(id, "created", &SLEEP).expect("exec");
    let vmm = shim.state(id, "").expect("state").pid;
    kill(Pid::from_raw(i32::try_from(vmm).expect("pid")), Signal::SIGKILL).expect("kill");
    let of = |id: &str| PidsRequest { id: id.into(), ..Default::default() };
    let stats = StatsRequest { id: id.into(), ..Default::default() };
    let pause = PauseRequest { id: id.into(), ..Default::default() };
    for (code, message) in [
        refusal(shim.task.pids(limit(), &of(id))),
        refusal(shim.task.stats(limit(), &stats)),
        refusal(shim.exec(id, "late", &["true"])),
        refusal(shim.task.pause(limit(), &pause)),
        refusal(shim.start(id, "created")),
    ] {
        assert!([Code::UNAVAILABLE, Code::FAILED_PRECONDITION].contains(&code), "{code:?} {message}");
    }
    for exec in ["runs", "created", ""] {
        assert_ne!(shim.wait(id, exec).expect("wait"), 0);
    }
    assert_refused(shim.kill(id, "", 9), Code::NOT_FOUND, "ended");
    for exec in ["runs", "created", ""] {
        shim.delete(id, exec).expect("delete");
    }
    shim.shut_down();
    player.events.wait_for(id, "delete 137");
    let told = player.events.of(id);
    for line in ["exit runs 137", "exit 137"] {
        assert_eq!(told.iter().filter(|told| *told == line).count(), 1, "{told:?}");
    }
}

pub(crate) fn shim_killed(player: &Player) {
    // Of a shim without a task; with one that is created, that runs, that is paused, that has ended; without its bundle.
    for state in ["none", "created", "running", "paused", "ended", "bundle", "config"] {
        let id = player.id(state);
        let command: &[&str] = if state == "ended" { &["true"] } else { &SLEEP };
        let shim = player.shim(&id, &bundle::config(&player.host, command));
        let mut pid = socket_owner(&shim.address);
        if state != "none" {
            shim.create(&id).expect("create");
            pid = shim.pid();
        }
        if !["none", "created"].contains(&state) {
            shim.start(&id, "").expect("start");
        }
        match state {
            "paused" => {
                let pause = PauseRequest { id: id.clone(), ..Default::default() };
                shim.task.pause(limit(), &pause).expect("pause");
            }
            "ended" => assert_eq!(shim.wait(&id, "").expect("wait"), 0),
            "running" => {
                let served = until(Duration::from_secs(20), || timings(&id).exists().then_some(()));
                served.expect("timings are served");
            }
            _ => {}
        }
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill");
        let _ = until(Duration::from_secs(20), || {
            (!Path::new(&format!("/proc/{pid}/exe")).exists()).then_some(())
        });
        match state {
            "bundle" => fs::remove_dir_all(&shim.bundle).expect("bundle"),
            "config" => fs::remove_file(shim.bundle.join("config.json")).expect("config.json"),
            _ => {}
        }
        assert_eq!(player.delete(&id, &shim.bundle), 137, "{state}");
        assert_eq!(player.delete(&id, &shim.bundle), 137, "{state}, once more");
        assert!(!timings(&id).exists(), "{state}: the socket of the timings is left");
    }
    // A member's bundle that has lost its configuration leads to the pod's socket.
    let id = player.id("pod");
    let pod = player.shim(&id, &bundle::sandbox(&player.host, &id));
    let pid = pod.create(&id).expect("create");
    pod.start(&id, "").expect("start");
    let inside = player.id("inside");
    let member = player.shim(&inside, &bundle::member(&player.host, &SLEEP, &id, pid));
    fs::remove_file(member.bundle.join("config.json")).expect("config.json");
    player.delete(&inside, &member.bundle);
    assert!(pod.again().state(&id, "").is_ok(), "the pod's socket is gone");
    pod.end();
}

/// A host that shuts down tells all processes to end, and waits for them.
pub(crate) fn host_shut_down(player: &Player) {
    let shim = player.running("told", &SLEEP);
    let (id, process) = (shim.id.as_str(), Pid::from_raw(shim.pid()));
    kill(process, Signal::SIGTERM).expect("kill");
    std::thread::sleep(Duration::from_secs(1));
    let vmm = shim.state(id, "").expect("it serves its pod").pid;
    kill(Pid::from_raw(i32::try_from(vmm).expect("pid")), Signal::SIGTERM).expect("kill");
    let gone = || (!Path::new(&format!("/proc/{process}/exe")).exists()).then_some(());
    until(Duration::from_secs(20), gone).expect("it has ended with its VM");
    player.delete(id, &shim.bundle);
}

/// containerd gives up one that still serves, or is just about to end.
pub(crate) fn deleted_while_it_serves(player: &Player) {
    for round in 0..20 {
        let id = player.id("serves");
        let shim = player.shim(&id, &bundle::config(&player.host, &SLEEP));
        if round % 2 == 1 {
            shim.shut_down();
        }
        assert_eq!(player.delete(&id, &shim.bundle), 137);
        assert!(!Path::new(shim.address.trim_start_matches("unix://")).exists(), "round {round}");
    }
}

/// The shim begins in its pod's cgroup, and leaves nothing of it: without a task, with one, killed.
pub(crate) fn cgroup(player: &Player) {
    let above = Path::new(CGROUPS).join("of-shims");
    fs::create_dir(&above).expect("cgroup");
    for end in ["early", "run", "killed"] {
        let id = player.id("cgroup");
        let name = format!("/of-shims/{id}");
        let mut config = bundle::config(&player.host, &["true"]);
        config["linux"]["cgroupsPath"] = name.as_str().into();
        let shim = player.shim(&id, &config);
        let pid = socket_owner(&shim.address);
        let cgroup_of = |pid: i32| fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("cgroup");
        assert!(cgroup_of(pid).trim_end().ends_with(&name), "{}", cgroup_of(pid));
        if end != "early" {
            shim.create(&id).expect("create");
            let vmm = i32::try_from(shim.state(&id, "").expect("state").pid).expect("pid");
            assert!(cgroup_of(vmm).trim_end().ends_with(&name), "{}", cgroup_of(vmm));
        }
        match end {
            "run" => shim.end(),
            "killed" => {
                kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill");
                assert_eq!(player.delete(&id, &shim.bundle), 137);
            }
            _ => shim.shut_down(),
        }
        let path = above.join(&id);
        assert!(until(Duration::from_secs(10), || (!path.exists()).then_some(())).is_some(), "{end}");
    }
    fs::remove_dir(&above).expect("empty");
}

pub(crate) fn same_id_again(player: &Player) {
    let id = player.id("again");
    for _ in 0..3 {
        let shim = player.shim(&id, &bundle::config(&player.host, &["true"]));
        shim.create(&id).expect("create");
        shim.start(&id, "").expect("start");
        assert_eq!(shim.wait(&id, "").expect("wait"), 0);
        shim.delete(&id, "").expect("delete");
        // By its answer, the address is free.
        shim.shut_down();
    }
    for _ in 0..20 {
        player.shim(&id, &bundle::config(&player.host, &["true"])).shut_down();
    }
}

/// PID of a shim that has no task yet, by the command line with its id.
fn socket_owner(address: &str) -> i32 {
    let path = address.trim_start_matches("unix://");
    let sockets = fs::read_to_string("/proc/net/unix").expect("sockets");
    // Connections bear the path, too, but only what listens has this flag.
    let listens = |line: &&str| line.split_whitespace().nth(3) == Some("00010000");
    let line = sockets.lines().filter(listens).find(|line| line.ends_with(path)).expect("the socket");
    let inode = format!("socket:[{}]", line.split_whitespace().nth(6).expect("inode"));
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let holds = |pid: &i32| {
        let fd = fs::read_link(format!("/proc/{pid}/fd/0"));
        fd.is_ok_and(|target| target.to_string_lossy() == inode)
    };
    pids.into_iter().find(holds).expect("the shim")
}
