//! Output that goes to a file, or to a logging program.

use std::fs;
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::CreateTaskRequest;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::pod::until;
use tests::shim::{Player, Shim, bundle, limit};

use super::SLEEP;

const SOON: Duration = Duration::from_secs(20);
/// Says what it was started with and takes both streams. It has not read all when they end.
const LOGGER: &str = "echo $CONTAINER_NAMESPACE/$CONTAINER_ID $1 $$ >DIR/who; echo >&5; exec 5>&-; \
    sed s/^/err:/ <&4 >DIR/err & sed s/^/out:/ <&3 >DIR/out; wait; sleep 1; echo >DIR/ended";

/// The URI of a logger that writes to this directory.
fn logger(directory: &Path, script: &str) -> String {
    fs::create_dir_all(directory).expect("a directory");
    let script = script.replace("DIR", &directory.to_string_lossy());
    let encoded: String = script.bytes().map(|byte| format!("%{byte:02x}")).collect();
    format!("binary:///bin/sh?-c={encoded}&logger=own+one")
}

fn logged(player: &Player, name: &str, command: &[&str], uri: &str) -> Shim {
    let id = player.id(name);
    let shim = player.shim(&id, &bundle::config(&player.host, command));
    let request = CreateTaskRequest { stdout: uri.into(), stderr: uri.into(), ..shim.creation(&id) };
    shim.task.create(limit(), &request).expect("create");
    shim.start(&id, "").expect("start");
    shim
}

fn read(directory: &Path, name: &str) -> String {
    fs::read_to_string(directory.join(name)).unwrap_or_default()
}

/// The PID of the logger, once it has said so.
fn pid(directory: &Path) -> String {
    let who = until(SOON, || Some(read(directory, "who")).filter(|who| who.ends_with('\n')));
    who.expect("a logger").trim().rsplit(' ').next().expect("its PID").into()
}

/// Whether it is gone and was waited for.
fn is_gone(pid: &str) -> bool {
    !Path::new("/proc").join(pid).exists()
}

pub(crate) fn file(player: &Player) {
    let directory = player.scratch.join("logs/of/a-file");
    let uri = format!("file://{}/log?ignored=1", directory.display());
    let shim = logged(player, "to-file", &["sh", "-c", "echo one; echo two >&2"], &uri);
    let id = shim.id.as_str();
    assert_eq!(shim.wait(id, "").expect("wait"), 0);
    shim.delete(id, "").expect("delete");
    shim.shut_down();
    let log = read(&directory, "log");
    let mut lines: Vec<_> = log.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["one", "two"]);
}

pub(crate) fn program(player: &Player) {
    let directory = player.scratch.join("logger");
    let uri = logger(&directory, LOGGER);
    let shim = logged(player, "to-program", &["sh", "-c", "seq 20000; echo bad >&2"], &uri);
    let id = shim.id.as_str();
    let pid = pid(&directory);
    assert!(read(&directory, "who").contains(&format!("/{id} own one ")), "{}", read(&directory, "who"));
    assert_eq!(shim.wait(id, "").expect("wait"), 0);
    shim.delete(id, "").expect("delete");
    assert!(is_gone(&pid), "deleted before its logger has ended");
    assert!(directory.join("ended").exists(), "the logger was not waited for");
    let out = read(&directory, "out");
    assert_eq!((out.lines().count(), out.lines().last()), (20000, Some("out:20000")));
    assert_eq!(read(&directory, "err"), "err:bad\n");
    shim.shut_down();
}

pub(crate) fn program_that_stays(player: &Player) {
    let directory = player.scratch.join("stays");
    let stays = "trap '' TERM; echo x x $$ >DIR/who; exec 5>&-; while :; do sleep 1; done";
    let uri = logger(&directory, stays);
    let shim = logged(player, "stays", &["true"], &uri);
    let id = shim.id.as_str();
    let own = pid(&directory);
    assert_eq!(shim.wait(id, "").expect("wait"), 0);
    shim.delete(id, "").expect("delete");
    assert!(is_gone(&own), "it goes on");
    shim.shut_down();
    // With a shim that is killed, it goes as well.
    fs::remove_file(directory.join("who")).expect("remove");
    let shim = logged(player, "killed-with-logger", &SLEEP, &uri);
    let own = pid(&directory);
    let pid = shim.pid();
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill");
    // Who waits for it now is the host's affair; what has ended has no program.
    let program = Path::new("/proc").join(own).join("exe");
    assert!(until(SOON, || (!program.exists()).then_some(())).is_some(), "it outlives the shim");
    player.delete(&shim.id, &shim.bundle);
}
