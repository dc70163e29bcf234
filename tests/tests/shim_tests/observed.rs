//! Timings of starts, for Prometheus.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tests::pod::until;
use tests::shim::{NAMESPACE, Player, bundle};

use super::SLEEP;

const REQUEST: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// Where a pod's timings are served.
pub(crate) fn socket(pod: &str) -> PathBuf {
    let root = std::env::var_os("KRX_STATE_DIR").map_or_else(|| "/run/krx".into(), PathBuf::from);
    root.join(format!("{NAMESPACE}.{pod}/metrics.sock"))
}

fn ask(path: &Path, request: &[u8]) -> String {
    let mut client = UnixStream::connect(path).expect("connect");
    client.set_read_timeout(Some(Duration::from_secs(60))).expect("limit");
    // One that says too much may be left before it has said all.
    let _ = client.write_all(request);
    let mut answer = Vec::new();
    let _ = client.read_to_end(&mut answer);
    String::from_utf8(answer).expect("text")
}

/// As the documentation tells people to ask. `None` where there is no curl.
fn curl(path: &Path) -> Option<String> {
    let arguments = ["--silent", "--show-error", "--fail", "--max-time", "120", "--unix-socket"];
    let output =
        Command::new("curl").args(arguments).arg(path).arg("http://localhost/metrics").output().ok()?;
    assert!(output.status.success(), "curl: {}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).expect("text"))
}

/// Seconds until a phase of the start of `id`.
fn phase(answer: &str, pod: &str, id: &str, phase: &str) -> Option<f64> {
    let sample = format!(
        "krx_start_phase_seconds{{namespace=\"{NAMESPACE}\",pod=\"{pod}\",id=\"{id}\",phase=\"{phase}\"}} "
    );
    answer.lines().find_map(|line| line.strip_prefix(&sample)?.parse().ok())
}

pub(crate) fn starts(player: &Player) {
    let id = player.id("watched");
    let path = socket(&id);
    let pod = player.shim(&id, &bundle::sandbox(&player.host, &id));
    let pid = pod.create(&id).expect("create");
    assert!(!path.exists(), "before the first start");
    pod.start(&id, "").expect("start");
    let _ = until(Duration::from_secs(20), || path.exists().then_some(()));
    let answer = ask(&path, REQUEST);
    assert!(
        answer.starts_with("HTTP/1.0 200 OK\r\n")
            && answer.contains("# TYPE krx_start_phase_seconds gauge\n")
    );
    let at = |name: &str| phase(&answer, &id, &id, name).unwrap_or_else(|| panic!("{name}: {answer}"));
    let names = ["create asked", "vmm spawned", "agent ready", "created", "start asked", "started"];
    assert!(names.windows(2).all(|pair| at(pair[0]) <= at(pair[1])), "{answer}");
    assert!(
        at("vmm spawned") < at("kernel to PID 1") && at("kernel to PID 1") < at("agent ready"),
        "{answer}"
    );

    let inside = player.id("inside");
    let member = player.shim(&inside, &bundle::member(&player.host, &SLEEP, &id, pid));
    member.create(&inside).expect("create");
    member.start(&inside, "").expect("start");
    let answer = ask(&path, REQUEST);
    assert_eq!(phase(&answer, &id, &inside, "create asked"), Some(0.0), "{answer}");
    assert!(phase(&answer, &id, &inside, "started").is_some_and(|at| at > 0.0), "{answer}");

    match curl(&path) {
        Some(shown) => assert_eq!(phase(&shown, &id, &inside, "create asked"), Some(0.0), "{shown}"),
        None => println!("there is no curl here"),
    }

    for (request, status) in [
        (&b"GET / HTTP/1.0\r\n\r\n"[..], "404"),
        (b"PUT /metrics HTTP/1.0\r\n\r\n", "405"),
        (b"\xff\0\r\n\r\n", "400"),
    ] {
        assert!(ask(&path, request).starts_with(&format!("HTTP/1.0 {status} ")), "{status}");
    }
    assert!(!ask(&path, &[b'x'; 64 << 10]).contains("200 OK"));
    // Who says nothing is left after a while, and those who wait meanwhile have their answer.
    let begun = Instant::now();
    let _silent = UnixStream::connect(&path).expect("connect");
    assert!(ask(&path, REQUEST).contains("200 OK") && begun.elapsed() < Duration::from_secs(30));

    member.kill(&inside, "", 9).expect("kill");
    member.wait(&inside, "").expect("wait");
    member.delete(&inside, "").expect("delete");
    assert!(!ask(&path, REQUEST).contains(&inside), "it is deleted");
    pod.end();
    assert!(
        until(Duration::from_secs(20), || (!path.exists()).then_some(())).is_some(),
        "it outlives its pod"
    );
}

/// `krx ARGUMENTS` beside the shim: exit code, what it printed, and what it complained of.
fn krx(player: &Player, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(player.host.krx()).args(arguments).output().expect("krx");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// What a person on the node can do with a pod of containerd's.
pub(crate) fn by_hand(player: &Player) {
    let id = player.id("handy");
    let name = format!("{NAMESPACE}.{id}");
    let pod = player.shim(&id, &bundle::sandbox(&player.host, &id));
    let pid = pod.create(&id).expect("create");
    pod.start(&id, "").expect("start");
    let served = || until(Duration::from_secs(20), || socket(&id).exists().then_some(()));
    served().expect("the pod's socket");
    assert!(krx(player, &["ps"]).1.contains(&name));
    let (code, _, complaint) = krx(player, &["exec", &name, "true"]);
    assert!(code == Some(125) && complaint.contains("no container yet"), "{complaint}");

    let members: Vec<_> = ["one", "two"]
        .map(|name| {
            let member_id = player.id(name);
            let mut config = bundle::member(&player.host, &SLEEP, &id, pid);
            config["process"]["env"] = serde_json::json!(["PATH=/usr/bin:/bin", format!("WHO={name}")]);
            let member = player.shim(&member_id, &config);
            member.create(&member_id).expect("create");
            member.start(&member_id, "").expect("start");
            (member_id, member)
        })
        .into_iter()
        .collect();
    let (code, _, complaint) = krx(player, &["exec", &name, "true"]);
    assert!(code == Some(125) && complaint.contains("choose one by -c"), "{complaint}");
    for ((member_id, _), who) in members.iter().zip(["one", "two"]) {
        let shown = krx(player, &["exec", "-c", member_id, &name, "sh", "-c", "echo $WHO; exit 7"]);
        assert_eq!(shown, (Some(7), format!("{who}\n"), String::new()));
    }
    let first = &members[0].0;
    let shown = krx(player, &["exec", "-u", "1234:77", "-c", first, &name, "id"]);
    assert!(shown.1.contains("uid=1234") && shown.1.contains("gid=77"), "{shown:?}");
    let (code, _, complaint) = krx(player, &["exec", "-u", "root", "-c", first, &name, "true"]);
    assert!(code == Some(125) && complaint.contains("by number"), "{complaint}");
    let (code, _, complaint) = krx(player, &["exec", "-c", "nobody", &name, "true"]);
    assert!(code == Some(125) && complaint.contains(first), "{complaint}");
    // The shim knows nothing of these processes, and its tasks end as ever.
    let (code, log, complaint) = krx(player, &["console", &name]);
    assert!(code == Some(0) && log.contains("Linux version "), "{log}{complaint}");
    // A reader that leaves is no error.
    let script = r#"{ sleep 1; "$0" console "$1"; "$0" ps; } | true"#;
    let left =
        Command::new("sh").args(["-c", script]).arg(player.host.krx()).arg(&name).output().expect("sh");
    assert!(left.stderr.is_empty(), "{}", String::from_utf8_lossy(&left.stderr));

    for (member_id, member) in &members {
        member.kill(member_id, "", 9).expect("kill");
        member.wait(member_id, "").expect("wait");
        member.delete(member_id, "").expect("delete");
    }
    pod.end();
    let (code, _, complaint) = krx(player, &["console", &name]);
    assert!(code == Some(125) && complaint.contains("No pod named"), "{complaint}");
}
