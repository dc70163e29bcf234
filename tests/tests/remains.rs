//! Nothing is left of `krx run`, however it ends: processes, mounts, sockets, files, links, cgroups, files in memory and loop
//! devices are counted before and after. `KRX_SOAK=1` does some of it many times, `KRX_SEED=N` repeats a run's moments.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tests::dice::Dice;
use tests::lan::Netns;
use tests::pod::{DEADLINE, Place, finish, until};
use tests::remains::Remains;

/// Small guests: several at once are to fit into an emulated host.
const SMALL: [&str; 2] = ["--memory", "64M"];
/// krx itself failed.
const FAILED: i32 = 125;

fn at_length() -> bool {
    std::env::var_os("KRX_SOAK").is_some()
}

/// A place, and what is there before anything has run in it: the directory of all pods stays.
fn new_place() -> Option<(Place, Remains)> {
    let place = Place::new()?;
    fs::create_dir(place.state()).expect("state directory");
    let before = Remains::now(&[place.scratch.path()]);
    Some((place, before))
}

#[test]
fn runs_one_after_the_other_leave_nothing() {
    let Some((place, before)) = new_place() else { return };
    for number in 0..if at_length() { 200 } else { 25 } {
        let options = [&SMALL[..], &["--name", "again"]].concat();
        let ended = place.sh(&options, &format!("echo {number}; exit {}", number % 3));
        assert_eq!((ended.code, ended.out), (number % 3, format!("{number}\n")));
    }
    before.assert_all("after the last");
}

#[test]
fn runs_at_once_leave_nothing() {
    let Some((place, before)) = new_place() else { return };
    for _ in 0..if at_length() { 5 } else { 1 } {
        let begin = |number: u32| {
            let mut krx = place.run(&SMALL, &["echo", &number.to_string()]);
            krx.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("krx")
        };
        let children: Vec<_> = (0..8).map(begin).collect();
        for (number, child) in children.into_iter().enumerate() {
            let output = child.wait_with_output().expect("output");
            assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{number}\n"), "{output:?}");
        }
    }
    before.assert_all("after eight");
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Owner,
    Vmm,
    Both,
}

/// The VMM that a run of krx has started, if it has.
fn vmm_of(krx: &Child) -> Option<Pid> {
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", krx.id())).ok()?;
    let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    pids.map(Pid::from_raw).next()
}

#[test]
fn whoever_is_killed_at_whatever_moment_nothing_is_left() {
    let Some((place, before)) = new_place() else { return };
    let netns = Netns::new();
    netns.ip("link add eth0 type dummy");
    netns.ip("address add 10.78.0.2/24 dev eth0");
    netns.ip("link set eth0 up");
    let path = netns.path();
    let options = [&SMALL[..], &["--netns", &path, "--name", "victim"]].concat();
    let begin = || {
        let mut krx = place.run(&options, &["sh", "-c", "echo up; sleep 0.3"]);
        krx.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("krx")
    };
    let whole = Instant::now();
    assert!(begin().wait().expect("wait").success());
    let whole = whole.elapsed();
    let (mut dice, mut killed) = (Dice::new(), 0);
    for round in 0..if at_length() { 50 } else { 12 } {
        let victim = [Victim::Owner, Victim::Vmm, Victim::Both][round % 3];
        let moment = dice.moment(whole);
        let mut krx = begin();
        thread::sleep(moment);
        let vmm = vmm_of(&krx).filter(|_| victim != Victim::Owner);
        if victim != Victim::Vmm {
            krx.kill().expect("kill");
        }
        killed += usize::from(vmm.is_some_and(|vmm| kill(vmm, Signal::SIGKILL).is_ok()));
        let status = until(DEADLINE, || krx.try_wait().expect("wait")).expect("krx ends");
        let what = format!("round {round}, {victim:?} killed after {moment:?} of {whole:?}, {status}");
        if victim == Victim::Vmm {
            assert!([Some(0), Some(FAILED)].contains(&status.code()), "{what}");
        }
        // What neither of them could remove is the next command's to remove.
        finish(&mut place.krx(&["ps"]), b"").ok();
        before.assert_all(&what);
    }
    assert!(killed > 0, "no VMM was ever met");
    // The namespace is its maker's: what is left in it is the next pod's to take away, if it lives.
    assert!(begin().wait().expect("wait").success());
    assert_eq!(netns.remains(), Vec::<String>::new());
    before.assert_all("at the end");
}

#[test]
fn a_guest_that_powers_off_leaves_nothing() {
    let Some((place, before)) = new_place() else { return };
    let script = "import ctypes; ctypes.CDLL(None).syscall(169, 0xfee1dead, 672274793, 0x4321fedc, 0)";
    let boot = json!(["CAP_SYS_BOOT"]);
    // Without a PID namespace: in one of its own, it would be that which ends.
    let config = json!({
        "ociVersion": "1.2.0",
        "root": {"path": place.host.rootfs()},
        "process": {
            "args": ["python3", "-c", script], "cwd": "/", "env": ["PATH=/usr/bin:/bin"], "user": {"uid": 0, "gid": 0},
            "capabilities": {"bounding": boot, "effective": boot, "permitted": boot}
        },
        "linux": {"namespaces": [{"type": "mount"}]}
    });
    place.scratch.write("bundle/config.json", config.to_string());
    let bundle = place.scratch.join("bundle").display().to_string();
    let ended = finish(&mut place.krx(&["run", "--bundle", &bundle]), b"");
    assert!(ended.code == FAILED && ended.err.contains("powered off"), "{ended:?}");
    fs::remove_dir_all(bundle).expect("bundle");
    before.assert_all("after the power-off");
}

/// A file system of its own, gone with the test.
struct Small(PathBuf);

impl Small {
    fn mounted(at: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&at).expect("directory");
        mount(Some("krx-test"), &at, Some("tmpfs"), MsFlags::empty(), Some(options)).expect("tmpfs");
        Self(at)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}

/// A disk that is full, one file or one page later each time, until there is enough of both.
#[test]
fn a_full_disk_is_told_at_each_step_and_left_empty() {
    let Some((place, before)) = new_place() else { return };
    let at = place.scratch.join("full");
    let run = |options: &[&str]| {
        let mut krx = place.run(&[&SMALL[..], options].concat(), &["echo", "ran"]);
        finish(krx.env("KRX_STATE_DIR", &at), b"")
    };
    let mut refused = [0, 0];
    for (kind, limit) in ["nr_inodes=", "size="].into_iter().enumerate() {
        let mut ran = false;
        for room in 1..20 {
            let small =
                Small::mounted(at.clone(), &format!("{limit}{}", if kind == 0 { room } else { room * 4096 }));
            let ended = run(&[]);
            if ended.code == 0 {
                assert_eq!(ended.out, "ran\n");
                ran = true;
            } else {
                assert_eq!(ended.code, FAILED, "{limit}{room}: {ended:?}");
                assert!(ended.err.contains("No space left"), "{limit}{room}: {ended:?}");
                assert!(!ended.err.contains("panicked at"), "{limit}{room}: {ended:?}");
                refused[kind] += 1;
            }
            let left: Vec<_> =
                fs::read_dir(&at).expect("directory").flatten().map(|entry| entry.file_name()).collect();
            assert!(left.iter().all(|name| name == ".host.json"), "{limit}{room}: {left:?} of {ended:?}");
            drop(small);
            before.assert_all(&format!("{limit}{room}"));
            if ran {
                break;
            }
        }
        assert!(ran, "{limit}: never enough");
    }
    assert!(refused.iter().all(|count| *count > 0), "{refused:?}: the disk was not full");
}

/// Nothing of krx lies in `/tmp`.
#[test]
fn a_full_tmp_is_no_hindrance() {
    let Some((place, before)) = new_place() else { return };
    // Where all of krx is found, wherever it was built.
    let target = place.scratch.join("target");
    fs::create_dir(&target).expect("directory");
    let script = "mount --bind \"$1\" \"$2\" && mount -t tmpfs -o size=4k,nr_inodes=2 none /tmp && echo >/tmp/full && \
        \"$2/release/krx\" run --memory 64M --rootfs \"$2/guest/python-rootfs\" -- echo ran && ls /tmp";
    let mut hidden = Command::new("unshare");
    hidden.args(["--mount", "sh", "-c", script, "sh"]);
    hidden.arg(place.host.krx().ancestors().nth(2).expect("target")).arg(&target);
    let ended = finish(hidden.env("KRX_STATE_DIR", place.state()), b"").ok();
    assert_eq!(ended.out, "ran\nfull\n");
    fs::remove_dir(target).expect("directory");
    before.assert_all("with a full /tmp");
}

#[test]
fn what_is_stale_is_recognised_and_removed_by_the_next_command() {
    let Some((place, before)) = new_place() else { return };
    // As they are when both are killed, from one moment of a start to the next.
    let stale = |name: &str| {
        for count in 0..5 {
            let pod = place.state().join(format!("{name}{count}"));
            fs::create_dir_all(&pod).expect("directory");
            for file in &["lock", "share", "vmm", "vmm/vsock_1024"][..count] {
                match *file {
                    "share" | "vmm" => fs::create_dir(pod.join(file)).expect("directory"),
                    file => fs::write(pod.join(file), "4000000000").expect("file"),
                }
            }
        }
    };
    stale("ps");
    finish(&mut place.krx(&["ps"]), b"").ok();
    before.assert_all("after ps");
    stale("stats");
    finish(&mut place.krx(&["stats"]), b"").ok();
    before.assert_all("after stats");
    stale("run");
    for count in [0, 3] {
        let name = format!("run{count}");
        let ended =
            finish(&mut place.run(&[&SMALL[..], &["--name", &name]].concat(), &["echo", &name]), b"").ok();
        assert_eq!(ended.out.trim(), name);
    }
    finish(&mut place.krx(&["ps"]), b"").ok();
    before.assert_all("after runs by their names");
    // Somebody else's directory is nobody's to remove.
    let others = place.state().join("others");
    fs::create_dir_all(others.join("share")).expect("directory");
    fs::write(others.join("share/precious"), "x").expect("file");
    finish(&mut place.krx(&["ps"]), b"").ok();
    assert!(Path::new(&others).join("share/precious").exists());
    fs::remove_dir_all(others).expect("remove");
    before.assert_all("at the end");
}
