//! What is left after every kind of end, and guests that do not play along.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::guest::{self, Mode};
use tests::image;
use tests::pod::{Living, Place, finish, until};
use tests::scratch::Scratch;

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).expect("pid")), signal).expect("kill");
}

#[test]
fn nothing_is_left_when_the_owner_is_killed() {
    let Some(place) = Place::new() else { return };
    let mut pod = place.living("web");
    signal(pod.child.id(), Signal::SIGKILL);
    pod.child.wait().expect("wait");
    place.assert_clean();
}

#[test]
fn nothing_is_left_when_the_vmm_is_killed() {
    let Some(place) = Place::new() else { return };
    let mut pod = place.living("web");
    kill(Pid::from_raw(place.vmm_pid("web")), Signal::SIGKILL).expect("kill");
    assert_eq!(pod.child.wait().expect("wait").code(), Some(125));
    let mut err = String::new();
    std::io::Read::read_to_string(pod.child.stderr.as_mut().expect("piped"), &mut err).expect("stderr");
    assert!(err.contains("killed by signal 9"), "{err}");
    place.assert_clean();
}

#[test]
fn nothing_is_left_when_both_are_killed_and_the_next_command_comes() {
    let Some(place) = Place::new() else { return };
    let mut pod = place.living("web");
    let vmm = place.vmm_pid("web");
    kill(Pid::from_raw(vmm), Signal::SIGSTOP).expect("stop");
    signal(pod.child.id(), Signal::SIGKILL);
    kill(Pid::from_raw(vmm), Signal::SIGKILL).expect("kill");
    pod.child.wait().expect("wait");
    until(Duration::from_secs(10), || kill(Pid::from_raw(vmm), None).err()).expect("the VMM ends");
    finish(&mut place.krx(&["ps"]), b"").ok();
    place.assert_clean();
}

#[test]
fn terminated_start_ends_cleanly() {
    let Some(place) = Place::new() else { return };
    let mut krx = place.run(&[], &["sleep", "60"]).stderr(Stdio::null()).spawn().expect("krx");
    std::thread::sleep(Duration::from_millis(200));
    signal(krx.id(), Signal::SIGTERM);
    let status = until(Duration::from_secs(30), || krx.try_wait().expect("wait")).expect("krx ends");
    // By its own exit, or by the signal where that came before krx could listen for it.
    assert_eq!(status.code().or_else(|| Some(128 + status.signal()?)), Some(143), "{status:?}");
    place.assert_clean();
}

/// Sends one request to the VMM's control socket.
fn control(pod: &Living<'_>, request: &str) -> String {
    let socket = pod.place.state().join(&pod.name).join("vmm/control");
    let mut stream = UnixStream::connect(socket).expect("control socket");
    stream.write_all(format!("{request}\n").as_bytes()).expect("request");
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).expect("answer");
    answer
}

#[test]
fn paused_guest_stands_still_until_it_is_resumed() {
    let Some(place) = Place::new() else { return };
    let pod = place.living("web");
    assert!(control(&pod, r#"{"request":"pause"}"#).contains("ok"));
    let mut exec =
        place.krx(&["exec", "web", "--", "echo", "awake"]).stdout(Stdio::piped()).spawn().expect("krx");
    std::thread::sleep(Duration::from_secs(2));
    assert!(exec.try_wait().expect("wait").is_none(), "exec ended in a paused guest");
    assert!(control(&pod, r#"{"request":"resume"}"#).contains("ok"));
    let output = exec.wait_with_output().expect("output");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "awake\n");
    for bad in ["", "pause", r#"{"request":"explode"}"#, r#"{"request":"pause","now":true}"#, "[[[["] {
        assert!(control(&pod, bad).contains("error"), "{bad}");
    }
    assert_eq!(pod.exec(&["true"]).code, 0);
}

#[test]
fn shutdown_request_is_orderly() {
    let Some(place) = Place::new() else { return };
    let mut pod = place.living("web");
    assert!(control(&pod, r#"{"request":"shutdown"}"#).contains("ok"));
    let status = until(Duration::from_secs(30), || pod.child.try_wait().expect("wait")).expect("krx ends");
    assert!(status.code().is_some_and(|code| code >= 125), "{status:?}");
    place.assert_clean();
}

#[test]
fn guests_that_do_not_play_along_cost_a_clear_error() {
    let Some(place) = Place::new() else { return };
    // The next one, which krx does not know.
    let version = format!("version {} of the protocol", krx_proto::VERSION + 1);
    let cases: [(Mode, &[&str]); 8] = [
        (Mode::Exit, &["panicked", "kill init"]),
        (Mode::Silent, &["did not say hello", "kernel log ends with"]),
        (Mode::Version, &[&version]),
        (Mode::Huge, &["hello"]),
        (Mode::Garbage, &["hello"]),
        (Mode::Liar, &["onnection to the agent was lost"]),
        (Mode::Mute, &["did not answer within"]),
        (Mode::Redial, &["onnection to the agent was lost"]),
    ];
    for (mode, words) in cases {
        let initramfs = guest::initramfs(&place.host, &place.scratch, mode);
        let mut command = place.run(&[], &["true"]);
        let ended = finish(command.env("KRX_INITRAMFS", initramfs).env("KRX_BOOT_TIMEOUT", "8"), b"");
        assert_eq!(ended.code, 125, "{mode:?}: {ended:?}");
        for word in words {
            assert!(ended.err.contains(word), "{mode:?}: no `{word}` in {}", ended.err);
        }
        assert!(!ended.err.contains("panicked at"), "{mode:?}: {}", ended.err);
        place.assert_clean();
    }
}

/// Runs itself: the test that is killed is this one.
#[test]
fn a_killed_test_leaves_no_scratch_directory() {
    const VICTIM: &str = "KRX_TEST_VICTIM";
    const NAME: &str = "a_killed_test_leaves_no_scratch_directory";
    if std::env::var_os(VICTIM).is_some() {
        let scratch = Scratch::new();
        scratch.write("deep/file", "content");
        println!("\nscratch {}", scratch.path().display());
        std::thread::sleep(Duration::from_secs(600));
    }
    let mut victim = Command::new(std::env::current_exe().expect("own program"));
    victim.args(["--exact", NAME, "--nocapture"]).env(VICTIM, "1").stdout(Stdio::piped());
    let mut victim = victim.spawn().expect("victim");
    let lines = BufReader::new(victim.stdout.take().expect("piped")).lines();
    let found = lines.map_while(Result::ok).find_map(|line| line.strip_prefix("scratch ").map(PathBuf::from));
    let path = found.expect("its directory");
    assert!(path.join("deep/file").exists());
    victim.kill().expect("kill");
    victim.wait().expect("end");
    let gone = until(Duration::from_secs(20), || Some(()).filter(|()| !path.exists()));
    assert!(gone.is_some(), "{} is left", path.display());
}

#[test]
fn kernels_that_hang_or_crash_cost_a_clear_error() {
    let Some(place) = Place::new() else { return };
    let cases = [
        ("spin", image::SPIN, "did not boot in time"),
        ("halt", image::HALT, "did not boot in time"),
        ("crash", image::TRIPLE_FAULT, "guest crashed"),
        ("reset", image::RESET, "guest reset itself"),
    ];
    for (name, code, word) in cases {
        let kernel = place.scratch.write(name, image::elf(2, code, 4096));
        let mut command = place.run(&["--kernel", &kernel.to_string_lossy()], &["true"]);
        let ended = finish(command.env("KRX_BOOT_TIMEOUT", "2"), b"");
        assert_eq!(ended.code, 125, "{name}: {ended:?}");
        assert!(ended.err.contains(word), "{name}: no `{word}` in {}", ended.err);
        place.assert_clean();
    }
}

#[test]
fn pod_whose_guest_stands_still_can_be_killed() {
    let Some(place) = Place::new() else { return };
    let mut pod = place.living("web");
    assert!(control(&pod, r#"{"request":"pause"}"#).contains("ok"));
    let ended = finish(&mut place.krx(&["kill", "-s", "KILL", "web"]), b"");
    assert_eq!(ended.code, 0, "{ended:?}");
    let status = until(Duration::from_secs(30), || pod.child.try_wait().expect("wait")).expect("krx ends");
    assert_eq!(status.code(), Some(125), "{status:?}");
    place.assert_clean();
}

#[test]
fn one_of_two_starts_gets_the_name() {
    let Some(place) = Place::new() else { return };
    let start = || {
        let mut command = place.run(&["--name", "one"], &["sh", "-c", "sleep 2; echo ran"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("krx")
    };
    let ends: Vec<_> = [start(), start()].map(|krx| krx.wait_with_output().expect("output")).into();
    let mut codes: Vec<_> = ends.iter().map(|end| end.status.code().expect("code")).collect();
    codes.sort_unstable();
    assert_eq!(codes, [0, 125], "{ends:?}");
    let loser = ends.iter().find(|end| !end.status.success()).expect("one");
    assert!(String::from_utf8_lossy(&loser.stderr).contains("is in use"), "{loser:?}");
    place.assert_clean();
}
