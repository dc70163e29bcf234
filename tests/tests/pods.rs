//! What containers of a pod need of its guest: what they have in common, what the host changes while they run, and that
//! nothing is left of those that come and go.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use krx_proto::{
    Answer, Capabilities, ErrorKind, ExitStatus, Mount, ProcessSpec, ProcessState, Request, Stream,
};
use krx_sandbox::bundle::{self, PodNamespaces};
use krx_sandbox::live_volumes::LiveVolumes;
use tests::agent::{Guest, kind, output, shell};
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

#[test]
fn containers_of_a_pod_have_shared_memory_in_common() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    let shared = |options: &[&str]| Mount {
        destination: "/dev/shm".into(),
        kind: "shm".into(),
        source: "shm".into(),
        options: options.iter().map(ToString::to_string).collect(),
        id_map: None,
    };
    let run = |id: &str, script: &str, options: &[&str]| {
        guest.run(id, script, |spec| {
            spec.mounts.retain(|mount| mount.destination != "/dev/shm");
            spec.mounts.push(shared(options));
        })
    };
    let script = "echo hello >/dev/shm/word; stat -c %a /dev/shm; df -k /dev/shm | awk 'END {print $2}'; \
        awk '$2 == \"/dev/shm\" {print $3, $4}' /proc/mounts";
    let (text, _) = run("first", script, &["rbind", "rprivate", "rw", "size=8m"]);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..2], ["1777", "8192"], "{text}");
    assert!(lines[2].starts_with("tmpfs rw,nosuid,nodev,noexec"), "{text}");
    // The size is the first one's.
    let script =
        "cat /dev/shm/word; df -k /dev/shm | awk 'END {print $2}'; (: >/dev/shm/x) 2>/dev/null || echo ro";
    assert_eq!(run("second", script, &["ro", "size=64m"]).0, "hello\n8192\nro\n");
    let mut bad = shell("bad", "true");
    bad.mounts.push(shared(&["size=all"]));
    assert_eq!(kind(guest.create(bad)), ErrorKind::Invalid);
}

#[test]
fn the_cri_s_shared_memory_becomes_the_pod_s() {
    let Some(place) = Place::new() else { return };
    let shm = place.scratch.join("sandboxes/1/shm");
    fs::create_dir_all(&shm).expect("directory");
    fs::create_dir_all(place.scratch.join("bundle/rootfs")).expect("directory");
    let config = serde_json::json!({
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "mounts": [{"destination": "/dev/shm", "type": "bind", "source": shm, "options": ["rbind", "rprivate", "rw"]}],
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "network", "path": "/proc/1/ns/net"},
            {"type": "ipc", "path": "/proc/1/ns/ipc"}]}
    });
    place.scratch.write("bundle/config.json", config.to_string());
    let paths = ["/proc/1/ns/net", "/proc/1/ns/ipc"].map(PathBuf::from).into();
    let pod = PodNamespaces { paths, ..PodNamespaces::default() };
    let mounts = || {
        let container = bundle::read_in_pod("c", &place.scratch.join("bundle"), &pod).expect("bundle");
        (container.spec.mounts[0].clone(), container.shared().len())
    };
    // A directory of that name is only a directory.
    assert_eq!((mounts().0.kind.as_str(), mounts().1), ("bind", 2));
    let run = |program: &str, arguments: &[&str]| {
        let status = Command::new(program).args(arguments).arg(&shm).status().expect(program);
        assert!(status.success(), "{program}: {status}");
    };
    run("mount", &["-t", "tmpfs", "-o", "size=3m", "shm"]);
    let (mount, shared) = mounts();
    run("umount", &[]);
    assert_eq!((mount.kind.as_str(), mount.destination.as_str(), shared), ("shm", "/dev/shm", 1));
    assert_eq!(mount.options, ["rbind", "rprivate", "rw", "size=3145728"]);
}

/// Replaces a volume's files as the kubelet does.
fn write_volume(volume: &Path, target: &str, files: &[(&str, &str)]) {
    fs::create_dir_all(volume.join(target)).expect("directory");
    for (name, text) in files {
        fs::write(volume.join(target).join(name), text).expect("file");
    }
    symlink(target, volume.join("..data_tmp")).expect("link");
    let old = fs::read_link(volume.join("..data"));
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).expect("rename");
    for (name, _) in files {
        let _ = symlink(format!("..data/{name}"), volume.join(name));
    }
    if let Ok(old) = old {
        fs::remove_dir_all(volume.join(old)).expect("old directory");
    }
}

/// Waits for the link `..data` of its volume to be replaced, as programs do that read their configuration anew.
const WATCHER: &str = r"
import ctypes, os
libc = ctypes.CDLL(None)
watch = libc.inotify_init()
assert libc.inotify_add_watch(watch, b'/config', 0x80) == 1
print(open('/config/key').read() + open('/config/gone').read())
try:
    open('/config/x', 'w')
except OSError:
    print('read-only')
print('ready', flush=True)
event = os.read(watch, 16 + 256)
print(event[16:].rstrip(b'\0').decode())
while os.path.lexists('/config/gone') or os.path.lexists('/config/..2026_1'):
    pass
print(*sorted(os.listdir('/config')), open('/config/key').read())
";

#[test]
fn changes_of_a_live_volume_reach_its_watchers() {
    let Some(place) = Place::new() else { return };
    let volume = place.scratch.join("volume");
    write_volume(&volume, "..2026_1", &[("key", "one"), ("gone", "x")]);
    let guest = Guest::with(&place, &["-v", &format!("{}:/plain:ro", volume.display())]);
    let path = format!("{}/volume-1", krx_proto::SHARE_PATH);
    let mut live = LiveVolumes::new().expect("inotify");
    live.add("watcher", &volume, &path, Instant::now()).expect("watch");
    // The names of the share are known to the guest's kernel, so that it may believe them for a while.
    assert_eq!(guest.pod.exec(&["cat", "/plain/key", "/plain/..data/gone"]).ok().out, "onex");
    let mut spec = shell("watcher", "");
    spec.process.args = ["python3", "-c", WATCHER].map(String::from).into();
    spec.mounts.push(Mount {
        destination: "/config".into(),
        kind: "live".into(),
        source: path.clone(),
        options: vec!["rbind".into(), "rprivate".into(), "ro".into()],
        id_map: None,
    });
    let process = guest.create(spec).expect("create");
    let mut stdout = process.connect(Stream::Stdout).expect("stdout");
    process.start().expect("start");
    let mut text = String::new();
    let mut buffer = [0; 256];
    while !text.contains("ready\n") {
        let read = stdout.read(&mut buffer).expect("output");
        assert!(read > 0, "{text}");
        text.push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
    // Nothing has changed: the copy is up to date.
    let ask = |live: &mut LiveVolumes| {
        until(Duration::from_secs(10), || {
            live.take_events(Instant::now()).expect("events");
            let (path, request) = live.due(Instant::now()).pop()?;
            let result = guest.call(request);
            live.answered(&path, result.is_ok(), Instant::now());
            Some(result.expect("refresh"))
        })
        .expect("something is due")
    };
    assert_eq!(ask(&mut live), Answer::Done);
    write_volume(&volume, "..2026_2", &[("key", "two"), ("new", "y")]);
    fs::remove_file(volume.join("gone")).expect("remove");
    assert_eq!(ask(&mut live), Answer::Done);
    stdout.read_to_string(&mut text).expect("output");
    assert_eq!(text, "onex\nread-only\nready\n..data\n..2026_2 ..data key new two\n");
    let refresh =
        |path: &str, target: &str| guest.call(Request::Refresh { path: path.into(), target: target.into() });
    assert_eq!(kind(refresh(&path, "../x")), ErrorKind::Invalid);
    assert_eq!(kind(refresh(&path, "..2026_3")), ErrorKind::Failed);
    assert_eq!(kind(refresh("/run/krx/share/rootfs", "..2026_2")), ErrorKind::NotFound);
    process.wait().expect("wait");
    process.delete().expect("delete");
    assert_eq!(kind(refresh(&path, "..2026_2")), ErrorKind::NotFound);
}

#[test]
fn a_volume_that_is_too_large_for_a_copy_is_bound() {
    let Some(place) = Place::new() else { return };
    let volume = place.scratch.join("volume");
    write_volume(&volume, "..1", &[("large", &"x".repeat(9 << 20))]);
    let guest = Guest::with(&place, &["-v", &format!("{}:/plain:ro", volume.display())]);
    let path = format!("{}/volume-1", krx_proto::SHARE_PATH);
    let live = Mount {
        destination: "/config".into(),
        kind: "live".into(),
        source: path.clone(),
        options: vec!["ro".into()],
        id_map: None,
    };
    let mut spec =
        shell("large", "stat -c %s -L /config/large; awk '$2 == \"/config\" {print $3}' /proc/mounts");
    spec.mounts.push(live);
    let process = guest.create(spec).expect("create");
    assert_eq!(output(&process).0, "9437184\nvirtiofs\n");
    // There is no copy to be renewed.
    let refresh = guest.call(Request::Refresh { path, target: "..2".into() });
    assert_eq!(refresh.expect("refresh"), Answer::Done);
}

#[test]
fn containers_that_are_gone_leave_nothing() {
    /// Enough for a leak of one of anything to be told from what varies.
    const CYCLES: u32 = 200;
    let Some(place) = Place::new() else { return };
    let volume = place.scratch.join("volume");
    write_volume(&volume, "..1", &[("key", "one")]);
    let guest = Guest::with(&place, &["-v", &format!("{}:/plain:ro", volume.display())]);
    let all = Capabilities { bounding: !0, effective: !0, permitted: !0, ..Capabilities::default() };
    // The agent's descriptors, mounts and children, and all cgroups, as a container without namespaces of its own sees
    // them.
    let script = "ls /proc/1/fd | wc -l; wc -l </proc/1/mounts; ls -d /sys/fs/cgroup/krx/*/ | wc -l; \
        grep -l '^PPid:.1$' /proc/[0-9]*/status | wc -l";
    let count = || {
        let (text, status) = guest.run("counter", script, |spec| {
            spec.namespaces.clear();
            spec.hostname = None;
            spec.masked_paths.clear();
            spec.process.capabilities = Some(all);
        });
        assert_eq!(status, ExitStatus::Code(0), "{text}");
        guest.process("counter", "").delete().expect("delete");
        text
    };
    let before = count();
    assert_eq!(before.lines().count(), 4, "{before}");
    for cycle in 0..CYCLES {
        let mut spec = shell("again", "exit 7");
        spec.mounts.push(Mount {
            destination: "/config".into(),
            kind: "live".into(),
            source: format!("{}/volume-1", krx_proto::SHARE_PATH),
            options: Vec::new(),
            id_map: None,
        });
        let process = guest.create(spec).expect("create");
        if cycle % 2 == 0 {
            process.start().expect("start");
        } else {
            process.kill(9).expect("kill");
        }
        process.wait().expect("wait");
        process.delete().expect("delete");
    }
    let mut after = String::new();
    let same = until(Duration::from_secs(10), || {
        after = count();
        Some(()).filter(|()| after == before)
    });
    assert!(same.is_some(), "before:\n{before}after:\n{after}");
}
