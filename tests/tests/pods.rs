//! What containers of a pod need of its guest.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::thread;
use std::time::Duration;

use krx_proto::{Answer, ErrorKind, ExitStatus, ProcessSpec, ProcessState, Request};
use tests::agent::{Guest, kind, shell};
use tests::pod::{Place, until};

#[test]
fn every_process_of_a_container_is_known_by_its_pid() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    let pids = |id: &str| match guest.call(Request::Pids { container: id.into() }) {
        Ok(Answer::Pids(pids)) => pids,
        other => panic!("no PIDs: {other:?}"),
    };
    let process = guest.create(shell("many", "sleep 1000 & sleep 1000 & exec sleep 1000")).expect("create");
    assert_eq!(pids("many").len(), 1);
    process.start().expect("start");
    let three = until(Duration::from_secs(10), || Some(pids("many")).filter(|pids| pids.len() == 3));
    let three = three.expect("three processes");
    let Ok(Answer::Processes(known)) = guest.call(Request::List) else { panic!("no list") };
    let first = known.iter().find(|process| process.container == "many").expect("listed");
    assert!(three.contains(&first.pid), "{three:?} {first:?}");
    // As the guest numbers them, not the container.
    assert!(!three.contains(&1), "{three:?}");
    process.kill(9).expect("kill");
    process.wait().expect("wait");
    let none = until(Duration::from_secs(10), || Some(()).filter(|()| pids("many").is_empty()));
    assert!(none.is_some());
    assert_eq!(kind(guest.call(Request::Pids { container: "nobody".into() })), ErrorKind::NotFound);
}

#[test]
fn a_frozen_container_stands_still_and_can_be_killed() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    let freeze = |frozen: bool| guest.call(Request::Freeze { container: "ice".into(), frozen }).map(|_| ());
    let state = || {
        let Ok(Answer::Processes(known)) = guest.call(Request::List) else { panic!("no list") };
        known.iter().find(|process| process.container == "ice").expect("listed").state
    };
    let used = || match guest.call(Request::Stats { container: "ice".into() }) {
        Ok(Answer::Stats(stats)) => stats.cpu.usage_usec,
        other => panic!("no stats: {other:?}"),
    };
    let sleep = || ProcessSpec { args: vec!["sleep".into(), "1000".into()], ..shell("x", "").process };
    let process = guest.create(shell("ice", "while :; do :; done")).expect("create");
    process.start().expect("start");
    freeze(false).expect("thawed already");
    freeze(true).expect("freeze");
    freeze(true).expect("frozen already");
    assert_eq!(state(), ProcessState::Frozen);
    let before = used();
    thread::sleep(Duration::from_millis(500));
    assert_eq!(used(), before);
    assert_eq!(kind(guest.process("ice", "further").exec(sleep())), ErrorKind::WrongState);
    freeze(false).expect("thaw");
    assert_eq!(state(), ProcessState::Running);
    let goes_on = until(Duration::from_secs(10), || Some(()).filter(|()| used() > before));
    assert!(goes_on.is_some());
    guest.process("ice", "further").exec(sleep()).expect("exec");
    freeze(true).expect("freeze");
    process.kill(9).expect("kill");
    assert_eq!(process.wait().expect("wait"), ExitStatus::Signal(9));
    assert_eq!(kind(freeze(false)), ErrorKind::WrongState);
    process.delete().expect("delete");
    assert_eq!(kind(freeze(true)), ErrorKind::NotFound);
}
