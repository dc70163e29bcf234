//! Many clients at once, and clients that leave.

use std::thread;
use std::time::Duration;

use containerd_shim_protos::shim::shim::StartRequest;
use containerd_shim_protos::ttrpc::Code;
use containerd_shim_protos::ttrpc::context::with_duration;
use tests::pod::until;
use tests::shim::{Player, Shim, bundle, refusal};

use super::SLEEP;

fn at_once<T: Send>(shim: &Shim, work: impl Fn(&Shim) -> T + Sync) -> Vec<T> {
    let shims: Vec<_> = (0..8).map(|_| shim.again()).collect();
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = shims.into_iter().map(|shim| scope.spawn(move || work(&shim))).collect();
        threads.into_iter().map(|thread| thread.join().expect("thread")).collect()
    })
}

fn one_of(results: Vec<Result<(), containerd_shim_protos::ttrpc::Error>>, codes: &[Code]) {
    let (won, lost): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert_eq!((won.len(), lost.len()), (1, 7));
    for refused in lost {
        let (code, message) = refusal(refused);
        assert!(codes.contains(&code), "{code:?} {message}");
    }
}

pub(crate) fn create_and_delete(player: &Player) {
    let id = player.id("race");
    let shim = player.shim(&id, &bundle::config(&player.host, &SLEEP));
    one_of(at_once(&shim, |shim| shim.create(&shim.id).map(drop)), &[Code::ALREADY_EXISTS]);
    one_of(at_once(&shim, |shim| shim.start(&shim.id, "").map(drop)), &[Code::FAILED_PRECONDITION]);
    let exec = |shim: &Shim| shim.exec(&shim.id, "x", &SLEEP).map(drop);
    one_of(at_once(&shim, exec), &[Code::ALREADY_EXISTS]);
    shim.kill(&id, "", 9).expect("kill");
    shim.wait(&id, "").expect("wait");
    one_of(at_once(&shim, |shim| shim.delete(&shim.id, "").map(drop)), &[Code::NOT_FOUND]);
    shim.shut_down();
    player.events.wait_for(&id, "delete 137");
    let told = player.events.of(&id);
    for line in ["create", "start", "added x", "exit 137", "delete 137"] {
        assert_eq!(told.iter().filter(|told| *told == line).count(), 1, "{line}: {told:?}");
    }
}

pub(crate) fn clients_that_leave(player: &Player) {
    let id = player.id("leave");
    let shim = player.shim(&id, &bundle::config(&player.host, &["sh", "-c", "exit 6"]));
    // Its time is up while the VM boots.
    let leaving = shim.again();
    let gone = leaving.task.create(with_duration(Duration::from_millis(30)), &leaving.creation(&id));
    assert!(gone.is_err(), "a VM boots in no time");
    drop(leaving);
    let made = until(Duration::from_secs(60), || shim.state(&id, "").ok());
    assert!(made.is_some(), "the task is not there");
    let leaving = shim.again();
    let request = StartRequest { id: id.clone(), ..StartRequest::default() };
    let _ = leaving.task.start(with_duration(Duration::from_millis(1)), &request);
    drop(leaving);
    assert_eq!(shim.wait(&id, "").expect("wait"), 6);
    let leaving = shim.again();
    let request = containerd_shim_protos::api::DeleteRequest { id: id.clone(), ..Default::default() };
    let _ = leaving.task.delete(with_duration(Duration::from_millis(1)), &request);
    drop(leaving);
    player.events.expect(&id, &["create", "start", "exit 6", "delete 6"]);
    shim.shut_down();
}
