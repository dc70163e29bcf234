//! What is left to the VMM while its guest runs, seen from the host; and that what it has to do still works.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal;
use tests::pod::{Living, Place};

/// CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID and SETFCAP, as bits of `capabilities(7)`.
const KEPT: u64 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 31;

/// Status of each of the VMM's threads. One that KVM has in the process runs nothing of it.
fn threads(vmm: i32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{vmm}/task")).expect("threads").flatten();
    let status = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    status.filter(|status| !field(status, "Name").starts_with("kvm-")).collect()
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.unwrap_or_else(|| panic!("no {name} in {status}")).trim()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("directory").flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn namespace(pid: &str, kind: &str) -> String {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("namespace").to_string_lossy().into_owned()
}

fn assert_jailed(pod: &Living<'_>) {
    let vmm = pod.place.vmm_pid("web");
    let threads = threads(vmm);
    assert!(threads.len() >= 4, "event loop, janitor, files, a vCPU: {}", threads.len());
    for status in &threads {
        assert_eq!((field(status, "Seccomp"), field(status, "NoNewPrivs")), ("2", "1"), "{status}");
        for (set, kept) in
            [("CapEff", KEPT), ("CapPrm", KEPT), ("CapBnd", KEPT), ("CapInh", 0), ("CapAmb", 0)]
        {
            assert_eq!(u64::from_str_radix(field(status, set), 16), Ok(kept), "{set}: {status}");
        }
    }
    let root = Path::new("/proc").join(vmm.to_string()).join("root");
    assert_eq!(names(&root), ["proc", "share", "vsock"]);
    assert_eq!(names(&root.join("proc")), ["self"]);
    assert_eq!(names(&root.join("proc/self")), ["fd", "mountinfo"]);
    assert_eq!(names(&root.join("share")), ["rootfs"]);
    // The lock and the state, by which others judge the pod, are not there, and the lock that is inherited cannot be written.
    assert_eq!(names(&root.join("vsock")), ["control", "vsock", "vsock_1024"]);
    let flags = fs::read_dir(format!("/proc/{vmm}/fd")).expect("descriptors").flatten().filter_map(|fd| {
        let number = fd.file_name().into_string().ok()?;
        fs::read_link(fd.path()).ok().filter(|target| target.ends_with("web/lock"))?;
        let info = fs::read_to_string(format!("/proc/{vmm}/fdinfo/{number}")).expect("fdinfo");
        u32::from_str_radix(info.lines().find_map(|line| line.strip_prefix("flags:"))?.trim(), 8).ok()
    });
    let modes: Vec<_> = flags.map(|flags| flags & 0o3).collect();
    assert_eq!(modes, [0], "one lock, O_RDONLY");
    for kind in ["mnt", "ipc", "uts", "net"] {
        assert_ne!(namespace(&vmm.to_string(), kind), namespace("self", kind), "{kind}");
    }
    // No descriptor leads to a directory of the host; the share's lie below its places.
    for fd in fs::read_dir(format!("/proc/{vmm}/fd")).expect("descriptors").flatten() {
        let target = fs::read_link(fd.path()).unwrap_or_default();
        let outside =
            target.is_dir() && !["/share", "/vsock", "/proc"].iter().any(|inside| target.starts_with(inside));
        assert!(!outside, "{}", target.display());
    }
    let limits = fs::read_to_string(format!("/proc/{vmm}/limits")).expect("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("core");
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
}

#[test]
fn vmm_is_left_with_its_share_and_its_sockets() {
    let Some(place) = Place::new() else { return };
    let pod = place.living("web");
    assert_jailed(&pod);
    // New connections, after the guest is up; and a look once more, at threads that came later.
    assert_eq!(pod.exec(&["echo", "again"]).ok().out, "again\n");
    assert_jailed(&pod);
    drop(pod);
    place.assert_clean();
}

#[test]
fn files_of_all_owners_are_served_as_before() {
    let Some(place) = Place::new() else { return };
    let volume = place.scratch.join("volume");
    fs::create_dir(&volume).expect("volume");
    let volume = format!("{}:/v", volume.display());
    let script = "set -e; cd /v; echo a >a; chown 1234:2345 a; chmod 0600 a; ln a b; mv b c; mkdir d; mv c d/c; cat d/c; \
        stat -c '%u %g %a %h' a; mkfifo f; ln -s a s; readlink s; cp a t; truncate -s 5 t; rm t; \
        mknod n c 1 3 2>/dev/null && echo node || echo none; \
        python3 -c 'import os
os.chmod(\"/v\", 0o777)
os.setgid(7); os.setuid(77)
open(\"/v/own\", \"w\").write(\"x\"); print(os.stat(\"/v/own\").st_uid)
os.setxattr(\"/v/own\", \"user.k\", b\"v\"); print(os.getxattr(\"/v/own\", \"user.k\").decode())
try: open(\"/v/a\")
except PermissionError: print(\"denied\")'";
    let ended = place.sh(&["-v", &volume], script);
    assert_eq!(ended.code, 0, "{ended:?}");
    let out = "a\n1234 2345 600 2\na\nnone\n77\nv\ndenied\n";
    assert_eq!(ended.out, out, "{ended:?}");
}

#[test]
fn without_a_jail_it_is_said_and_works() {
    let Some(place) = Place::new() else { return };
    let ended = place.sh(&["--no-jail"], "echo free").ok();
    assert_eq!(ended.out, "free\n");
    assert!(ended.err.contains("--no-jail"), "{ended:?}");
    place.assert_clean();
    // What the VMM does for an owner that died is another way then.
    let mut pod = place.living_with("web", &["--no-jail"]);
    let status = fs::read_to_string(format!("/proc/{}/status", place.vmm_pid("web"))).expect("status");
    assert_eq!(field(&status, "Seccomp"), "0");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pod.child.id()).expect("pid"));
    nix::sys::signal::kill(pid, Signal::SIGKILL).expect("kill");
    pod.child.wait().expect("wait");
    place.assert_clean();
}
