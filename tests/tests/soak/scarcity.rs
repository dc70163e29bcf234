//! Containers that harm their pod, and hosts that are short of something.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;
use tests::containerd::Engine;
use tests::containerd::remains::Remains;
use tests::cri::container::{Container, END};
use tests::cri::messages::{CONTAINER_EXITED, CONTAINER_RUNNING, NODE, Namespaces, POD, SANDBOX_READY};
use tests::cri::pod::{Pod, PodPlan};
use tests::pod::until;
use tests::scratch::Scratch;

use crate::assert_clean;

/// A container that may do all that root may.
fn privileged<'p, 'e>(pod: &'p Pod<'e>, name: &str) -> Container<'p, 'e> {
    let mut plan = pod.container(name, &["sleep", "600"]);
    plan.security().privileged = true;
    plan.security().seccomp = None;
    plan.start()
}

fn privileged_pod<'a>(engine: &'a Engine, name: &str, pid: i32) -> Pod<'a> {
    let mut plan = PodPlan::new(engine, name).namespaces(Namespaces { pid, ..Default::default() });
    plan.security().privileged = true;
    plan.run()
}

/// The kernel keeps signals of its namespaces from PID 1, of the guest as of the pod.
pub(crate) fn first_process(engine: &Engine) {
    let before = Remains::now();
    for pid in [POD, NODE] {
        // On runc, `NODE` would be the host's own.
        if pid == NODE && !engine.is_krx() {
            continue;
        }
        let pod = privileged_pod(engine, "first-process", pid);
        let other = pod.container("other", &["sleep", "600"]).start();
        let container = privileged(&pod, "main");
        container.sh("for signal in KILL STOP TERM SEGV; do kill -s $signal 1; done; sleep 1");
        assert_eq!(container.sh("echo lives"), "lives\n");
        assert_eq!(other.sh("echo lives"), "lives\n");
        assert_eq!(pod.status().state, SANDBOX_READY);
        // All that it may signal: itself is among it, and the other container where it sees its processes.
        let _ = container.try_exec(&["sh", "-c", "kill -s KILL -- -1"], 20);
        assert_eq!(until(END, || (other.status().state == CONTAINER_EXITED).then_some(())), Some(()));
        assert_eq!(container.wait().exit_code, 137);
        if engine.is_krx() {
            assert_eq!(pod.status().state, SANDBOX_READY, "the pod is its VM");
            assert_eq!(pod.shell("next", "echo lives").run().ok().out, "lives\n");
        }
    }
    assert_clean(&before);
}

/// A privileged container can end its own kernel, and nobody else's.
pub(crate) fn panic(engine: &Engine) {
    if !engine.is_krx() {
        return;
    }
    let before = Remains::now();
    let neighbour = PodPlan::new(engine, "neighbour").run();
    let beside = neighbour.container("main", &["sleep", "600"]).start();
    let pod = privileged_pod(engine, "panics", NODE);
    let container = privileged(&pod, "main");
    let begin = Instant::now();
    let script = "echo 2 > /proc/sys/vm/panic_on_oom && workload allocate 100000";
    let ended = container.try_exec(&["sh", "-c", script], 60);
    assert!(ended.as_ref().map_or(true, |ended| ended.code == 137), "{ended:?}");
    assert_eq!(container.wait().exit_code, 137);
    assert_eq!(until(END, || (pod.status().state != SANDBOX_READY).then_some(())), Some(()));
    assert!(begin.elapsed() < Duration::from_secs(45), "noticed after {:?}", begin.elapsed());
    assert!(engine.last_words().contains("panic"), "the log does not say why{}", engine.last_words());
    let refused = pod.shell("late", "true").try_create().expect_err("the pod has ended");
    assert!(!refused.message().is_empty(), "{refused}");
    assert_eq!(beside.sh("echo well"), "well\n");
    drop((pod, neighbour));
    assert_clean(&before);
}

pub(crate) fn stubborn(engine: &Engine) {
    let before = Remains::now();
    let pod = PodPlan::new(engine, "stubborn").run();
    let script = "trap '' TERM INT HUP; echo up; while :; do sleep 1; done";
    let first = pod.shell("first", script).start();
    let second = pod.shell("second", script).start();
    first.wait_for("up");
    second.wait_for("up");
    first.stop(1).expect("stop");
    assert_eq!(first.status().exit_code, 137);
    assert_eq!(second.status().state, CONTAINER_RUNNING);
    pod.stop().expect("stop");
    assert_eq!(second.status().exit_code, 137);
    drop(pod);
    assert_clean(&before);
}

/// A file system of its own for a test, gone with it.
struct Small(PathBuf);

impl Small {
    fn mounted(at: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&at).expect("directory");
        mount(Some("tmpfs"), &at, Some("tmpfs"), MsFlags::empty(), Some(options)).expect("tmpfs");
        Self(at)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

pub(crate) fn full_volume(engine: &Engine) {
    let before = Remains::now();
    let scratch = Scratch::under(&engine.scratch().join("logs"));
    let volume = Small::mounted(scratch.join("volume"), "size=1m");
    let pod = PodPlan::new(engine, "full-volume").run();
    let container = pod.container("main", &["sleep", "600"]).mount(&volume.0, "/data", false).start();
    let full = container.exec(&["sh", "-c", "head -c 4000000 /dev/zero > /data/big"]);
    assert!(full.code != 0 && full.err.contains("No space left on device"), "{full:?}");
    assert_eq!(
        fs::metadata(volume.0.join("big")).expect("file").len(),
        1 << 20,
        "as much as there was room for"
    );
    // A file whose pages the guest maps or caches must not look written when it is not.
    let append = container.exec(&["sh", "-c", "echo more >> /data/big"]);
    assert!(append.code != 0, "{append:?}");
    container.sh("rm /data/big && echo fits > /data/small");
    assert_eq!(fs::read_to_string(volume.0.join("small")).expect("file"), "fits\n");
    drop(pod);
    drop(volume);
    assert_clean(&before);
}

/// Sets the size of the tmpfs that everything of containerd's lies on.
fn resize(at: &Path, bytes: u64) {
    let options = format!("size={bytes}");
    let none = None::<&str>;
    mount(none, at, none, MsFlags::MS_REMOUNT, Some(options.as_str())).expect("remount");
}

/// The size is given back, however the test ends.
struct Full<'a>(&'a Path, u64);

impl<'a> Full<'a> {
    fn new(at: &'a Path) -> Self {
        let now = statvfs(at).expect("statvfs");
        let unit = now.fragment_size();
        resize(at, (now.blocks() - now.blocks_free()) * unit);
        Self(at, now.blocks() * unit)
    }
}

impl Drop for Full<'_> {
    fn drop(&mut self) {
        resize(self.0, self.1);
    }
}

pub(crate) fn full_disk(engine: &Engine) {
    let before = Remains::now();
    let at = Path::new("/run");
    let lives = PodPlan::new(engine, "lives").run();
    let container = lives.container("main", &["sleep", "600"]).start();
    let full = Full::new(at);
    let refused = PodPlan::new(engine, "no-room").try_run();
    assert!(refused.is_err(), "there is no room for it");
    drop(refused);
    let made = lives.shell("late", "echo late").try_create();
    assert!(made.is_err(), "there is no room for it");
    assert_eq!(container.status().state, CONTAINER_RUNNING);
    // The pod's own: nothing of it lies on that disk.
    println!("    exec: {:?}", container.try_exec(&["echo", "well"], 20));
    println!("    stop: {:?}", container.stop(1));
    drop(full);
    // Whatever the full disk has kept from being done, can be done now.
    assert_eq!(until(END, || container.stop(1).ok()), Some(()));
    let again = lives.container("again", &["echo", "well"]).run().ok();
    assert_eq!(again.out, "well\n");
    drop(lives);
    crate::storm::sweep(engine);
    assert_clean(&before);
}

const PLUGIN: &str = "#!/bin/sh
cat >/dev/null
case $CNI_COMMAND in
VERSION) echo '{\"cniVersion\":\"0.4.0\",\"supportedVersions\":[\"0.3.1\",\"0.4.0\"]}' ;;
ADD) echo '{\"cniVersion\":\"0.4.0\",\"code\":100,\"msg\":\"krx-broken fails\"}'; exit 1 ;;
esac
";

/// The second of two plugins fails, when the first has made an interface already.
pub(crate) fn half_a_network(engine: &Engine) {
    let before = Remains::now();
    let plugin = engine.scratch().write("cni-bin/krx-broken", PLUGIN);
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).expect("permissions");
    let whole = engine.scratch().join("cni/10-krx-test.conflist");
    let mut network: serde_json::Value =
        serde_json::from_slice(&fs::read(whole).expect("network")).expect("JSON");
    network["plugins"].as_array_mut().expect("plugins").push(serde_json::json!({ "type": "krx-broken" }));
    // The first by name is the one that counts.
    let broken = engine.scratch().write("cni/00-broken.conflist", network.to_string());
    let refused = until(END, || PodPlan::new(engine, "half").try_run().err());
    assert!(
        refused.as_ref().is_some_and(|status| status.message().contains("krx-broken fails")),
        "{refused:?}"
    );
    assert!(PodPlan::new(engine, "half").try_run().is_err());
    fs::remove_file(broken).expect("network");
    crate::storm::sweep(engine);
    let pod =
        until(END, || PodPlan::new(engine, "whole").try_run().ok()).expect("the network is whole again");
    assert!(!pod.ip().is_empty());
    drop(pod);
    crate::storm::sweep(engine);
    assert_clean(&before);
}
