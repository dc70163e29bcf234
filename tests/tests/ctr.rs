//! `ctr run` under the tested runtime: a container without a pod, as a person tries a runtime out.

use std::process::{Command, ExitCode};
use std::time::Duration;

use tests::Host;
use tests::containerd::Engine;
use tests::containerd::image::SMALL;
use tests::containerd::suite;
use tests::pod::{finish, until};
use tests::scratch::Scratch;

fn main() -> ExitCode {
    suite::run(&[
        ("run_prints_and_ends_with_the_commands_status", prints),
        ("run_of_a_missing_command_says_so", missing),
        ("run_gives_its_standard_input", input),
        ("run_has_environment_and_directory", environment),
        ("run_has_the_limits_of_descriptors", descriptors),
        ("run_gives_its_output_to_a_log_uri", log_uri),
        ("exec_in_a_running_container", exec),
        ("a_container_is_killed_and_deleted", killed),
        ("metrics_of_a_running_container", metrics),
    ])
}

fn prints(engine: &Engine) {
    let run = engine.ctr_run(&["--rm"], "prints", &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    let ended = engine.ctr_end(&run);
    assert_eq!((ended.code, ended.out.as_str()), (7, "out\n"), "{ended:?}");
    assert!(ended.err.contains("err\n"), "{ended:?}");
}

fn missing(engine: &Engine) {
    let ended = engine.ctr_end(&engine.ctr_run(&["--rm"], "missing", &["no-such-program"]));
    assert_ne!(ended.code, 0);
    assert!(ended.err.contains("no-such-program"), "{ended:?}");
}

fn input(engine: &Engine) {
    // Not to the input's end: ctr 1.6 loses an end that comes before its task is there.
    let run = engine.ctr_run(&["--rm"], "input", &["head", "-n", "1"]);
    assert_eq!(finish(&mut engine.ctr(&run), b"in and out\n").ok().out, "in and out\n");
}

fn environment(engine: &Engine) {
    let run = engine.ctr_run(
        &["--rm", "--env", "COLOUR=red", "--cwd", "/usr"],
        "env",
        &["sh", "-c", "echo $COLOUR $PWD"],
    );
    assert_eq!(engine.ctr_end(&run).ok().out, "red /usr\n");
}

/// Pods have those of the guest, as the CRI plugin gives them none.
fn descriptors(engine: &Engine) {
    let limits = engine.ctr_run(&["--rm"], "limits", &["sh", "-c", "ulimit -Sn; ulimit -Hn"]);
    assert_eq!(engine.ctr_end(&limits).ok().out, "1024\n1024\n");
}

fn log_uri(engine: &Engine) {
    let scratch = Scratch::under(&std::env::temp_dir());
    let log = scratch.join("logs/log");
    let uri = format!("file://{}", log.display());
    let run = engine.ctr_run(&["--rm", "--log-uri", &uri], "logged", &["sh", "-c", "echo out; echo err >&2"]);
    engine.ctr_end(&run).ok();
    let written = std::fs::read_to_string(&log).expect("the log");
    assert!(written == "out\nerr\n" || written == "err\nout\n", "{written}");

    // Its program takes the standard output alone, and is waited for before the task is deleted.
    let out = scratch.join("out");
    let script = format!("exec 5>&-; sleep 1; cat <&3 >{}", out.display());
    let encoded: String = script.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let uri = format!("binary:///bin/sh?-c={encoded}");
    let run = engine.ctr_run(&["--rm", "--log-uri", &uri], "piped", &["echo", "by a program"]);
    engine.ctr_end(&run).ok();
    assert_eq!(std::fs::read_to_string(&out).expect("the log"), "by a program\n");
}

fn exec(engine: &Engine) {
    engine.ctr_end(&engine.ctr_run(&["-d"], "exec", &["sleep", "600"])).ok();
    let ended = engine.ctr_end(&["tasks", "exec", "--exec-id", "e1", "exec", "sh", "-c", "echo $$; exit 5"]);
    assert_eq!(ended.code, 5, "{ended:?}");
    assert_ne!(ended.out.trim(), "1");
    let listed = engine.ctr_end(&["tasks", "ls"]).ok().out;
    assert!(listed.lines().any(|line| line.starts_with("exec ") && line.contains("RUNNING")), "{listed}");
    if engine.is_krx() {
        let krx = |arguments: &[&str]| finish(Command::new(host().krx()).args(arguments), b"");
        let pods = krx(&["ps"]).ok().out;
        assert!(
            pods.lines().any(|line| line.contains(".exec ") && line.contains("(of containerd)")),
            "{pods}"
        );
        let name = pods.split_whitespace().find(|word| word.ends_with(".exec")).expect("its name");
        assert_eq!(krx(&["exec", name, "--", "cat", "/proc/1/comm"]).ok().out, "sleep\n");
        assert!(krx(&["kill", name]).err.contains("crictl"), "containerd's own");
    }
    delete(engine, "exec");
}

fn host() -> Host {
    tests::host().expect("a host")
}

fn killed(engine: &Engine) {
    engine
        .ctr_end(&engine.ctr_run(
            &["-d"],
            "killed",
            &["sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.1; done"],
        ))
        .ok();
    let stopped = until(Duration::from_secs(30), || {
        // Until its shell is there to take it: PID 1 of a namespace is not ended by what it does not handle.
        engine.ctr_end(&["tasks", "kill", "--signal", "TERM", "killed"]);
        let listed = engine.ctr_end(&["tasks", "ls"]).ok().out;
        listed.lines().any(|line| line.starts_with("killed ") && line.contains("STOPPED")).then_some(())
    });
    assert!(stopped.is_some(), "it does not stop");
    let ended = engine.ctr_end(&["tasks", "delete", "killed"]);
    assert!(ended.err.contains("exit code 9"), "{ended:?}");
    engine.ctr_end(&["containers", "delete", "killed"]).ok();
}

fn metrics(engine: &Engine) {
    engine.ctr_end(&engine.ctr_run(&["-d"], "metrics", &["sleep", "600"])).ok();
    let shown = engine.ctr_end(&["tasks", "metrics", "--format", "json", "metrics"]).ok().out;
    assert!(shown.contains("usage"), "{shown}");
    let images = engine.ctr_end(&["images", "ls", "-q"]).ok().out;
    assert!(images.contains(SMALL), "{images}");
    delete(engine, "metrics");
}

fn delete(engine: &Engine, id: &str) {
    engine.ctr_end(&["tasks", "delete", "--force", id]);
    engine.ctr_end(&["containers", "delete", id]).ok();
}
