//! Containers that nobody stays with: what is known of them, their output, and what is left.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tests::pod::{Ended, Place, finish, until};
use tests::terminal::Terminal;

/// A place whose containers end with the test.
struct Yard(Place);

impl Yard {
    fn new() -> Option<Self> {
        Place::new().map(Self)
    }

    fn krx(&self, arguments: &[&str]) -> Ended {
        finish(&mut self.0.krx(arguments), b"")
    }

    /// `krx run -d OPTIONS -- sh -c SCRIPT`.
    fn start(&self, options: &[&str], script: &str) -> Ended {
        self.0.sh(&[&["-d"], options].concat(), script)
    }

    fn inspect(&self, name: &str) -> Value {
        serde_json::from_str(&self.krx(&["inspect", name]).ok().out).expect("JSON")
    }

    fn owner(&self, name: &str) -> Pid {
        let owner = self.inspect(name)["owner_pid"].as_i64().expect("owner");
        Pid::from_raw(i32::try_from(owner).expect("pid"))
    }

    fn spawn(&self, arguments: &[&str]) -> Child {
        let mut command = self.0.krx(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("krx")
    }
}

impl Drop for Yard {
    fn drop(&mut self) {
        let names = self.0.krx(&["ps", "-aq"]).output().map(|output| output.stdout).unwrap_or_default();
        let names = String::from_utf8_lossy(&names).into_owned();
        let _ = self.0.krx(&["rm", "-f"]).args(names.lines()).output();
    }
}

/// Waits until a `krx` has taken over its signals: before, they would end it.
fn takes_signals(child: &Child) {
    let blocked = || {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:"))?;
        u64::from_str_radix(mask.trim(), 16).ok().filter(|mask| mask >> (Signal::SIGHUP as u32 - 1) & 1 == 1)
    };
    assert!(until(Duration::from_secs(20), blocked).is_some(), "it does not look at signals");
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("pid"))
}

fn read_until(child: &mut Child, word: &str) -> String {
    let stdout = child.stdout.as_mut().expect("piped");
    let mut seen = String::new();
    while !seen.contains(word) {
        let mut byte = [0; 1];
        assert_eq!(stdout.read(&mut byte).expect("output"), 1, "`{word}` did not come: {seen}");
        seen.push(byte[0].into());
    }
    seen
}

#[test]
fn a_life_from_run_to_rm() {
    let Some(yard) = Yard::new() else { return };
    let script = "echo out; echo err >&2; printf half; read word; echo got $word; exit 3";
    // Its descriptors are let go of, or this would wait for its end.
    assert_eq!(yard.start(&["-i", "--name", "web", "-l", "app=web"], script).ok().out, "web\n");
    let state = yard.inspect("web");
    assert_eq!((&state["status"], &state["detached"]), (&"running".into(), &true.into()));
    assert_eq!(state["labels"]["app"], "web");
    let owner = format!("/proc/{}", yard.owner("web"));
    assert_eq!(fs::read_link(format!("{owner}/cwd")).expect("cwd").to_str(), Some("/"));
    let open = fs::read_dir(format!("{owner}/fd"))
        .expect("fd")
        .flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok());
    let standard: Vec<_> = open.filter(|file| file.to_str() == Some("/dev/null")).collect();
    assert!(standard.len() >= 3, "{standard:?}");
    assert_eq!(yard.krx(&["exec", "web", "echo", "inside"]).ok().out, "inside\n");
    assert!(yard.krx(&["stats", "web"]).ok().out.contains("web"));
    let logs = until(Duration::from_secs(20), || {
        Some(yard.krx(&["logs", "web"])).filter(|l| l.out.contains("half"))
    });
    let logs = logs.expect("the output");
    assert_eq!((logs.out.as_str(), logs.err.as_str()), ("out\nhalf", "err\n"));
    let mut follow = yard.spawn(&["logs", "-f", "web"]);
    read_until(&mut follow, "half");
    let refused = yard.krx(&["rm", "web"]);
    assert!(refused.code == 125 && refused.err.contains("rm -f web"), "{refused:?}");
    let waiting = yard.spawn(&["wait", "web"]);
    let mut attached = yard.spawn(&["attach", "web"]);
    attached.stdin.take().expect("piped").write_all(b"bread\n").expect("input");
    let attached = Ended::from(attached.wait_with_output().expect("output"));
    assert_eq!((attached.code, attached.out.as_str()), (3, "got bread\n"));
    assert_eq!(Ended::from(waiting.wait_with_output().expect("output")).ok().out, "3\n");
    assert_eq!(Ended::from(follow.wait_with_output().expect("output")).ok().out, "got bread\n");
    assert!(!yard.krx(&["ps"]).ok().out.contains("web"));
    assert!(yard.krx(&["ps", "-a"]).ok().out.contains("exited (3)"));
    let state = yard.inspect("web");
    assert_eq!((&state["status"], &state["exit_code"]), (&"exited".into(), &3.into()));
    assert_eq!(yard.krx(&["wait", "web"]).ok().out, "3\n");
    assert_eq!(yard.krx(&["logs", "--tail", "1", "web"]).ok().out, "halfgot bread\n");
    let stamped = yard.krx(&["logs", "-t", "web"]).ok();
    assert!(stamped.err.starts_with("20") && stamped.err.ends_with("Z err\n"), "{stamped:?}");
    let kept = yard.0.state().join(".kept/web");
    for (file, mode) in [("", 0o700), ("record.json", 0o600), ("log", 0o600), ("lock", 0o600)] {
        let found = fs::metadata(kept.join(file)).expect(file).permissions().mode() & 0o777;
        assert_eq!(found, mode, "{file}");
    }
    for options in [&["--name", "web"][..], &["-d", "--name", "web"]] {
        let taken = yard.0.sh(options, "true");
        assert!(taken.code == 125 && taken.err.contains("krx rm web"), "{taken:?}");
    }
    assert_eq!(yard.krx(&["rm", "web"]).ok().out, "web\n");
    assert_eq!(yard.krx(&["rm", "web"]).code, 125);
    yard.0.assert_clean();
}

#[test]
fn failed_starts_say_why_and_leave_nothing() {
    let Some(yard) = Yard::new() else { return };
    let start = |command: &[&str]| finish(&mut yard.0.run(&["-d", "--name", "web"], command), b"");
    for (command, code) in [(&["/no/such"][..], 127), (&["/etc/passwd"], 126)] {
        let ended = start(command);
        assert_eq!((ended.code, ended.out.as_str()), (code, ""), "{ended:?}");
        assert!(ended.err.starts_with("krx: "), "{ended:?}");
        let here = finish(&mut yard.0.run(&[], command), b"");
        assert_eq!((here.code, here.err), (ended.code, ended.err));
    }
    let bundle = yard.krx(&["run", "-d", "--bundle", "/nonexistent"]);
    assert!(bundle.code == 125 && bundle.err.contains("/nonexistent"), "{bundle:?}");
    assert_eq!(yard.start(&["--console"], "true").code, 125);
    assert_eq!(yard.start(&["--label", "=x"], "true").code, 125);
    assert_eq!(yard.krx(&["logs", "web"]).code, 125);
    yard.0.assert_clean();
}

#[test]
fn start_ends_with_who_waits_for_it() {
    let Some(yard) = Yard::new() else { return };
    for step in [0, 200, 800] {
        let mut command = yard.0.run(&["-d", "--name", "web"], &["sleep", "60"]);
        let mut starter = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("krx");
        thread::sleep(Duration::from_millis(step));
        kill(pid(&starter), Signal::SIGKILL).expect("kill");
        let mut said = String::new();
        starter.stdout.take().expect("piped").read_to_string(&mut said).expect("output");
        starter.wait().expect("wait");
        // Started, or not: nothing in between.
        let settled = until(Duration::from_secs(20), || {
            let all = yard.krx(&["ps", "-a"]).ok().out;
            Some(all.clone()).filter(|all| !all.contains("web") || all.contains("running"))
        });
        assert!(settled.is_some(), "{step}: {}", yard.krx(&["ps", "-a"]).out);
        yard.krx(&["rm", "-f", "web"]);
    }
    yard.0.assert_clean();
}

#[test]
fn killed_owner_leaves_its_record_alone() {
    let Some(yard) = Yard::new() else { return };
    let flood = "while :; do echo line; done";
    for wait in [0, 400] {
        yard.start(&["--name", "web"], flood).ok();
        let (owner, mut attached) = (yard.owner("web"), yard.spawn(&["attach", "web"]));
        read_until(&mut attached, "line");
        thread::sleep(Duration::from_millis(wait));
        kill(owner, Signal::SIGKILL).expect("kill");
        // Nobody reads it: the rest is in the pipe.
        drop(attached.stdout.take());
        let attached = Ended::from(attached.wait_with_output().expect("output"));
        assert!(attached.code == 125 || attached.code == 141, "{attached:?}");
        let gone =
            until(Duration::from_secs(20), || Some(()).filter(|()| !yard.0.state().join("web").exists()));
        assert!(gone.is_some(), "the pod is left");
        assert!(yard.krx(&["ps", "-a"]).ok().out.contains(" dead "), "{wait}");
        assert_eq!(yard.inspect("web")["status"], "dead");
        assert!(yard.krx(&["logs", "-f", "--tail", "3", "web"]).ok().out.starts_with("line\n"));
        assert_eq!(yard.krx(&["wait", "web"]).code, 125);
        yard.krx(&["rm", "web"]).ok();
        yard.0.assert_clean();
    }
}

#[test]
fn flood_is_bounded_and_its_end_is_kept() {
    let Some(yard) = Yard::new() else { return };
    yard.start(
        &["--name", "web"],
        "yes 0123456789012345678901234567890123456789 | head -c 10000000; echo; echo over",
    )
    .ok();
    // It does not read, so it must not hold up the container for ever.
    let mut stuck = yard.spawn(&["attach", "web"]);
    assert_eq!(yard.krx(&["wait", "web"]).ok().out, "0\n");
    let files = fs::read_dir(yard.0.state().join(".kept/web")).expect("kept").flatten();
    let total: u64 = files.map(|file| file.metadata().expect("metadata").len()).sum();
    assert!((4 << 20..9 << 20).contains(&total), "{total}");
    assert_eq!(yard.krx(&["logs", "--tail", "1", "web"]).ok().out, "over\n");
    let _ = stuck.kill();
    let _ = stuck.wait();
    yard.krx(&["rm", "web"]).ok();
    yard.0.assert_clean();
}

#[test]
fn terminal_is_left_and_taken_again() {
    let Some(yard) = Yard::new() else { return };
    yard.start(&["-it", "--name", "shell"], "exec sh").ok();
    let attach = || Terminal::of(&yard.0, &yard.0.krx(&["attach", "shell"]));
    let (mut one, mut two) = (attach(), attach());
    thread::sleep(Duration::from_millis(300));
    one.type_in("stty size; echo both-$((40+2))\n");
    assert!(one.expect("both-42").contains("33 99"));
    two.expect("both-42");
    // Ctrl-C is the shell's.
    one.type_in("sleep 1000\n");
    one.expect("sleep 1000");
    thread::sleep(Duration::from_secs(1));
    one.type_in("\x03echo still-$((40+2))\n");
    one.expect("still-42");
    one.type_in("\x10\x11");
    one.expect("detached from shell");
    assert_eq!(one.end(), 0);
    two.resize(50, 120);
    thread::sleep(Duration::from_millis(500));
    two.type_in("stty size\n");
    two.expect("50 120");
    two.type_in("exit 9\n");
    assert_eq!(two.end(), 9);
    assert!(yard.krx(&["logs", "shell"]).ok().out.contains("both-42"));
    let over = yard.krx(&["attach", "shell"]);
    assert!(over.code == 125 && over.err.contains("exited (9)"), "{over:?}");
}

#[test]
fn many_at_once_are_told_apart_by_labels() {
    let Some(yard) = Yard::new() else { return };
    let starts: Vec<_> = (0..8)
        .map(|number| {
            let label = format!("half={}", number % 2);
            let mut command = yard.0.run(
                &["-d", "-m", "64M", "-l", &label, "-l", "all"],
                &["sh", "-c", "echo up; exec sleep 1000"],
            );
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("krx")
        })
        .collect();
    let mut names: Vec<_> = starts
        .into_iter()
        .map(|start| Ended::from(start.wait_with_output().expect("output")).ok().out)
        .collect();
    names.sort_unstable();
    let shown = |filters: &[&str]| yard.krx(&[&["ps", "-q"], filters].concat()).ok().out;
    assert_eq!(shown(&["-f", "label=all"]), names.concat());
    assert_eq!(shown(&["-f", "label=half=1"]).lines().count(), 4);
    assert_eq!(shown(&["-f", "label=half=1", "-f", "label=half=0"]), "");
    let json = yard.krx(&["ps", "--json", "-f", "label=half=0"]).ok().out;
    assert_eq!(serde_json::from_str::<Value>(&json).expect("JSON").as_array().expect("array").len(), 4);
    let half: Vec<_> = names.iter().map(|name| name.trim_end()).take(2).collect();
    kill(yard.owner(half[0]), Signal::SIGTERM).expect("kill");
    let begin = Instant::now();
    // The first process has no handler for it.
    yard.krx(&[&["stop", "-t", "1"][..], &half].concat()).ok();
    assert!(begin.elapsed() >= Duration::from_secs(1));
    assert_eq!(shown(&["-f", "status=exited"]).lines().count(), 2);
    assert!(yard.krx(&["ps", "-a"]).ok().out.contains("exited (137)"));
    let all: Vec<_> = names.iter().map(|name| name.trim_end()).collect();
    assert_eq!(yard.krx(&[&["rm", "-f"][..], &all].concat()).ok().out, names.concat());
    yard.0.assert_clean();
}

#[test]
fn signals_go_through_attach_and_rm_leaves_nothing() {
    let Some(yard) = Yard::new() else { return };
    let script = "trap 'echo caught; exit 6' TERM; echo up; while :; do sleep 0.1; done";
    yard.start(&["--rm", "--name", "web"], script).ok();
    let waiting = yard.spawn(&["wait", "web"]);
    let mut bare = yard.spawn(&["attach", "--sig-proxy=false", "web"]);
    let attached = yard.spawn(&["attach", "--no-stdin", "web"]);
    until(Duration::from_secs(20), || Some(()).filter(|()| yard.krx(&["logs", "web"]).out.contains("up")));
    // A terminal that was closed is not the container's.
    let mut hung_up = yard.spawn(&["attach", "web"]);
    [&hung_up, &bare, &attached].into_iter().for_each(takes_signals);
    thread::sleep(Duration::from_millis(500));
    kill(pid(&hung_up), Signal::SIGHUP).expect("kill");
    assert_eq!(hung_up.wait().expect("wait").code(), Some(129));
    kill(pid(&bare), Signal::SIGTERM).expect("kill");
    assert_eq!(bare.wait().expect("wait").code(), Some(143));
    kill(pid(&attached), Signal::SIGTERM).expect("kill");
    let attached = Ended::from(attached.wait_with_output().expect("output"));
    assert_eq!((attached.code, attached.out.as_str()), (6, "caught\n"));
    assert_eq!(Ended::from(waiting.wait_with_output().expect("output")).ok().out, "6\n");
    assert_eq!(yard.krx(&["ps", "-aq"]).ok().out, "");
    // Nor does one whose owner is killed.
    for _ in 0..2 {
        yard.start(&["--rm", "--name", "web"], "sleep 1000").ok();
        kill(yard.owner("web"), Signal::SIGKILL).expect("kill");
        until(Duration::from_secs(20), || Some(()).filter(|()| yard.krx(&["ps", "-aq"]).ok().out.is_empty()));
    }
    yard.0.assert_clean();
}

#[test]
fn options_may_be_read_from_the_standard_input() {
    let Some(yard) = Yard::new() else { return };
    let options = ["-d", "--name", "fed", "--env-file", "/dev/stdin"];
    let mut run = yard.0.run(&options, &["sh", "-c", "echo $FED"]);
    finish(&mut run, b"FED=by-stdin\nREST=\n").ok();
    let logs = || yard.krx(&["logs", "fed"]).ok().out;
    until(Duration::from_secs(20), || Some(()).filter(|()| logs().contains("by-stdin")));
    yard.krx(&["rm", "-f", "fed"]).ok();
    yard.0.assert_clean();
}

#[test]
fn lost_vm_is_told_in_the_record_and_in_the_log() {
    let Some(yard) = Yard::new() else { return };
    yard.start(&["--name", "web"], "echo up; exec sleep 1000").ok();
    kill(Pid::from_raw(yard.0.vmm_pid("web")), Signal::SIGKILL).expect("kill");
    assert_eq!(yard.krx(&["wait", "web"]).ok().out, "125\n");
    let state = yard.inspect("web");
    assert!(state["error"].as_str().is_some_and(|error| error.contains("killed by signal 9")), "{state}");
    assert!(yard.krx(&["logs", "web"]).ok().err.contains("killed by signal 9"));
    // A pod that is not detached has none of this.
    let _pod = yard.0.living("plain");
    for command in ["logs", "attach", "wait", "rm"] {
        let refused = yard.krx(&[command, "plain"]);
        assert!(refused.code == 125 && refused.err.contains("was not started by"), "{refused:?}");
    }
}

#[test]
fn descriptors_of_the_caller_are_not_kept() {
    let Some(yard) = Yard::new() else { return };
    let run = yard.0.run(&["-d", "--name", "web"], &["sleep", "1000"]);
    // The shell hands its descriptor 7 on, the end of a pipe that is read until all have closed theirs.
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "{ \"$@\" 7>&1 >/dev/null 2>&1; } | cat", "sh"])
        .arg(run.get_program())
        .args(run.get_args());
    shell.env("KRX_STATE_DIR", yard.0.state());
    assert_eq!(finish(&mut shell, b"").ok().out, "");
    assert!(yard.krx(&["ps"]).ok().out.contains("web"));
}
