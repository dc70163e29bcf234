//! `krx run` and its companions, as a person uses them.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::process::Stdio;

use tests::pod::{Place, finish};

#[test]
fn python_computes() {
    let Some(place) = Place::new() else { return };
    let ended = finish(&mut place.run(&[], &["python3", "-c", "print(6*7)"]), b"").ok();
    assert_eq!((ended.out.as_str(), ended.err.as_str()), ("42\n", ""));
    place.assert_clean();
}

#[test]
fn exit_status_is_the_process_own() {
    let Some(place) = Place::new() else { return };
    assert_eq!(place.sh(&[], "exit 7").code, 7);
    // The first process of a PID namespace is spared by its own kind's signals; its children are not.
    assert_eq!(place.sh(&[], "sh -c 'kill -KILL $$'").code, 128 + 9);
    let missing = finish(&mut place.run(&[], &["no-such-program"]), b"");
    assert_eq!(missing.code, 127, "{missing:?}");
    assert!(missing.err.contains("no-such-program"), "{missing:?}");
    let plain = finish(&mut place.run(&[], &["/etc/passwd"]), b"");
    assert_eq!(plain.code, 126, "{plain:?}");
    assert!(plain.err.contains("/etc/passwd"), "{plain:?}");
    place.assert_clean();
}

#[test]
fn output_streams_are_separate() {
    let Some(place) = Place::new() else { return };
    let ended = place.sh(&[], "echo out; echo err >&2").ok();
    assert_eq!((ended.out.as_str(), ended.err.as_str()), ("out\n", "err\n"));
}

#[test]
fn environment_directory_user_and_hostname_are_given() {
    let Some(place) = Place::new() else { return };
    let options = [
        "-e",
        "COLOUR=blue and green",
        "-w",
        "/var/tmp",
        "-u",
        "1234:5678",
        "--hostname",
        "ship",
        "--cpus",
        "2",
    ];
    let ended = place.sh(&options, "echo $COLOUR; pwd; id -u; id -g; hostname; nproc").ok();
    assert_eq!(ended.out, "blue and green\n/var/tmp\n1234\n5678\nship\n2\n");
}

#[test]
fn options_that_docker_has_mean_what_they_do_there() {
    let Some(place) = Place::new() else { return };
    let file = place.scratch.join("variables");
    std::fs::write(&file, "# of the test\nCOLOUR=green\n\n  SHAPE=round\n").expect("file");
    let file = file.to_str().expect("path");
    let options =
        ["--cap-drop", "ALL", "--cap-add", "net_bind_service", "--pids-limit", "20", "--cpus", "1.5"];
    let further = ["--ulimit", "nofile=77:88", "--tmpfs", "/scratch:size=1m,mode=1777", "--env-file", file];
    let script = "grep CapEff /proc/self/status; cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max; nproc; \
        ulimit -n; ulimit -Hn; stat -f -c '%T %b %S' /scratch; stat -c %a /scratch; echo $COLOUR $SHAPE";
    let options = [&options[..], &further, &["-e", "SHAPE=square"]].concat();
    let ended = place.sh(&options, script).ok();
    assert_eq!(
        ended.out,
        "CapEff:\t0000000000000400\n20\n150000 100000\n2\n77\n88\ntmpfs 256 4096\n1777\ngreen square\n"
    );
    let profile = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28, "excludes": {"caps": ["CAP_SYS_ADMIN"]}}]}"#;
    let profile = format!("seccomp={}", place.scratch.write("profile.json", profile).display());
    let script = "mkdir /tmp/x 2>/dev/null; echo $?";
    assert_eq!(place.sh(&["--security-opt", &profile], script).ok().out, "1\n");
    let other = ["--security-opt", &profile, "--cap-add", "sys_admin", "--tmpfs", "/tmp"];
    assert_eq!(place.sh(&other, script).ok().out, "0\n");
    place.assert_clean();
}

/// MiB of `MemTotal`, of `MemFree` and of the pages that are taken into use, for each time that they were looked at.
fn memory_told(text: &str) -> Vec<u64> {
    let number = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
    let told = text.lines().filter(|line| !line.ends_with(" 0"));
    told.filter_map(|line| Some(number(line)? >> if line.contains("kB") { 10 } else { 8 })).collect()
}

/// The kernel knows all of it at once, and has taken none of it into use before it is needed (kernel-config/edit-source.sh).
#[test]
fn memory_is_what_was_asked_for() {
    let Some(place) = Place::new() else { return };
    for (asked, mib, used) in [("192M", 192, 100), ("512M", 512, 360)] {
        // Two at once, each with a content of its own.
        let script = format!(
            "m() {{ grep -E '^Mem(Total|Free):' /proc/meminfo; grep managed /proc/zoneinfo; }}
             f() {{ yes $1 | head -c {half}M >/tmp/$1; }}
             c() {{ yes $1 | head -c {half}M | cksum; cksum </tmp/$1; }}
             m; f one & f two; wait; m; c one >&2; c two >&2; rm /tmp/one /tmp/two; m",
            half = used / 2
        );
        let options = ["--memory", asked, "--cpus", "2", "--tmpfs", "/tmp:size=100%"];
        let ended = place.sh(&options, &script).ok();
        let told = memory_told(&ended.out);
        let &[total, free, in_use, total_full, free_full, _, total_again, free_again, _] = &told[..] else {
            panic!("{ended:?}")
        };
        assert!((mib * 7 / 8 - 16..mib).contains(&total), "{told:?}");
        assert_eq!((total_full, total_again), (total, total));
        assert!(free > total - 48 && free_full < total - used && free_again > total - 64, "{told:?}");
        assert!(mib < 512 || in_use < mib / 2, "{told:?}");
        let sums: Vec<_> = ended.err.lines().collect();
        assert!(
            sums.len() == 4 && sums[0] == sums[1] && sums[2] == sums[3] && sums[0] != sums[2],
            "{ended:?}"
        );
    }
}

/// Less has no room for the kernel's own image.
#[test]
fn the_smallest_memory_runs_a_container() {
    let Some(place) = Place::new() else { return };
    let script =
        "head -c 3M /dev/zero >/tmp/zeros && cksum </tmp/zeros && cat /etc/hostname >/dev/null && echo done";
    let ended = place.sh(&["--memory", "32M", "--tmpfs", "/tmp"], script).ok();
    assert!(ended.out.ends_with(" 3145728\ndone\n"), "{ended:?}");
    let refused = place.sh(&["--memory", "31M"], "true");
    assert!(refused.code == 125 && refused.err.contains("give 32 to"), "{refused:?}");
    place.assert_clean();
}

#[test]
fn container_is_confined_in_its_own_namespaces() {
    let Some(place) = Place::new() else { return };
    let script =
        "echo $$; cat /proc/self/attr/current 2>/dev/null; mount | grep -c krx; ls /proc | grep -c '^1$'";
    assert!(place.sh(&[], script).out.starts_with("1\n"));
    // Not even root in the container may load, mount or reboot.
    let refused = place
        .sh(&[], "mount -t tmpfs none /mnt || echo refused; echo 1 >/proc/sys/kernel/panic || echo refused");
    assert_eq!(refused.out, "refused\nrefused\n");
    let capabilities = place.sh(&[], "grep CapEff /proc/self/status").ok();
    assert!(capabilities.out.contains("00000000a80425fb"), "{capabilities:?}");
}

#[test]
fn read_only_root_refuses_writes() {
    let Some(place) = Place::new() else { return };
    let ended =
        place.sh(&["--read-only"], "touch /x || echo refused; echo data >/dev/shm/y && cat /dev/shm/y");
    assert_eq!(ended.out, "refused\ndata\n");
}

#[test]
fn timings_name_every_phase_in_order() {
    let Some(place) = Place::new() else { return };
    let ended = finish(&mut place.run(&["--timings=json"], &["echo", "x"]), b"").ok();
    let line = ended.err.lines().last().expect("timings");
    let json: serde_json::Value = serde_json::from_str(line).expect("JSON");
    let phases = json["phases"].as_array().expect("phases");
    assert!(phases.len() >= 10, "{line}");
    let times: Vec<_> = phases.iter().filter_map(|phase| phase["monotonic_ns"].as_u64()).collect();
    assert_eq!(times.len(), phases.len());
    assert!(times.is_sorted(), "{line}");
    let table = finish(&mut place.run(&["--timings"], &["echo", "x"]), b"").ok();
    assert!(table.err.lines().count() >= 10, "{table:?}");
}

#[test]
fn exec_ps_and_kill_reach_a_running_pod() {
    let Some(place) = Place::new() else { return };
    let mut pod = place.living("web");
    assert_eq!(pod.exec(&["echo", "inside"]).ok().out, "inside\n");
    assert_eq!(pod.exec(&["sh", "-c", "exit 3"]).code, 3);
    assert_eq!(pod.exec(&["no-such-program"]).code, 127);
    let ps = finish(&mut place.krx(&["ps"]), b"").ok();
    assert!(ps.out.contains("web"), "{ps:?}");
    let json = |arguments: &[&str]| -> serde_json::Value {
        let ended = finish(&mut place.krx(arguments), b"").ok();
        serde_json::from_str(&ended.out).expect("JSON")
    };
    let stats = json(&["stats", "--json"]);
    assert_eq!((stats[0]["name"].as_str(), stats[0]["pids"].as_u64()), (Some("web"), Some(1)), "{stats}");
    assert!(stats[0]["memory_bytes"].as_u64() > Some(4096), "{stats}");
    let table = finish(&mut place.krx(&["stats", "web"]), b"").ok();
    assert!(table.out.contains("web") && table.out.contains("CPU TIME"), "{table:?}");
    let inspected = json(&["inspect", "web"]);
    assert_eq!(inspected["container"]["cwd"], "/", "{inspected}");
    assert_eq!(inspected["stats"]["pids"], 1, "{inspected}");
    assert!(!inspected.to_string().contains("PATH="), "{inspected}");
    assert_eq!(finish(&mut place.krx(&["stats", "none"]), b"").code, 125);
    let taken = finish(&mut place.run(&["--name", "web"], &["true"]), b"");
    assert_eq!(taken.code, 125);
    assert!(taken.err.contains("web") && taken.err.contains("in use"), "{taken:?}");
    finish(&mut place.krx(&["kill", "-s", "KILL", "web"]), b"").ok();
    assert_eq!(pod.child.wait().expect("wait").code(), Some(137));
    let gone = finish(&mut place.krx(&["exec", "web", "--", "true"]), b"");
    assert_eq!(gone.code, 125, "{gone:?}");
    place.assert_clean();
}

#[test]
fn two_pods_run_at_once() {
    let Some(place) = Place::new() else { return };
    let children: Vec<_> = ["a", "b"]
        .into_iter()
        .map(|name| {
            let script = "sleep 2; hostname; cat /proc/sys/kernel/random/boot_id";
            let mut command = place.run(&["--name", name, "--hostname", name], &["sh", "-c", script]);
            command.stdout(Stdio::piped()).spawn().expect("krx")
        })
        .collect();
    let outputs: Vec<_> =
        children.into_iter().map(|child| child.wait_with_output().expect("output")).collect();
    let lines: Vec<Vec<_>> =
        outputs.iter().map(|o| std::str::from_utf8(&o.stdout).expect("text").lines().collect()).collect();
    assert_eq!((lines[0][0], lines[1][0]), ("a", "b"));
    assert_ne!(lines[0][1], lines[1][1], "two VMs have two boots");
    place.assert_clean();
}

#[test]
fn bundle_runs() {
    let Some(place) = Place::new() else { return };
    let rootfs = place.host.rootfs();
    let config = serde_json::json!({
        "ociVersion": "1.2.0",
        "root": {"path": rootfs, "readonly": true},
        "hostname": "bundled",
        "process": {
            "args": ["sh", "-c", "hostname; echo $GREETING; id -u; umask; touch /x 2>/dev/null || echo read-only"],
            "cwd": "/", "env": ["PATH=/usr/bin:/bin", "GREETING=hello"], "user": {"uid": 65534, "gid": 65534, "umask": 63},
            "noNewPrivileges": true
        },
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "uts"}, {"type": "mount"}, {"type": "ipc"}]}
    });
    place.scratch.write("bundle/config.json", config.to_string());
    let bundle = place.scratch.join("bundle");
    let ended = finish(&mut place.krx(&["run", "--bundle", &bundle.to_string_lossy()]), b"").ok();
    assert_eq!(ended.out, "bundled\nhello\n65534\n0077\nread-only\n");
}

#[test]
fn processes_of_a_container_talk_over_loopback() {
    let Some(place) = Place::new() else { return };
    let script = "\
import socket
for family, address in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET6, '::1')):
    server = socket.create_server((address, 0), family=family)
    client = socket.create_connection(server.getsockname()[:2])
    client.sendall(b'hello')
    print(server.accept()[0].recv(5).decode())
";
    let ended = finish(&mut place.run(&[], &["python3", "-c", script]), b"").ok();
    assert_eq!(ended.out, "hello\nhello\n");
}

#[test]
fn read_only_root_is_read_only_for_the_whole_guest() {
    let Some(place) = Place::new() else { return };
    let data = place.scratch.join("data");
    std::fs::create_dir(&data).expect("data");
    let volume = format!("{}:/mnt", data.display());
    let mut command = place.run(
        &["--read-only", "--name", "fixed", "-v", &volume],
        &["sh", "-c", "touch /x 2>/dev/null || echo refused; touch /mnt/x && echo written; exec sleep 60"],
    );
    let mut krx = command.stdout(Stdio::piped()).spawn().expect("krx");
    let mut said = [0; 16];
    std::io::Read::read_exact(krx.stdout.as_mut().expect("piped"), &mut said).expect("output");
    assert_eq!(&said, b"refused\nwritten\n");
    // Not by the guest's good will: the host's own mount of it is.
    let mounts =
        std::fs::read_to_string(format!("/proc/{}/mountinfo", place.vmm_pid("fixed"))).expect("mounts");
    let root = mounts.lines().find(|line| line.contains("/share/rootfs ")).expect("root file system");
    assert!(root.split(' ').nth(5).is_some_and(|options| options.starts_with("ro,")), "{root}");
    krx.kill().expect("kill");
    krx.wait().expect("wait");
    place.assert_clean();
}

#[test]
fn exec_has_options_of_its_own() {
    let Some(place) = Place::new() else { return };
    let mut command = place.run(
        &["--name", "web", "-u", "1234", "-e", "COLOUR=blue", "-w", "/tmp"],
        &["sh", "-c", "echo up; exec sleep 3600"],
    );
    let mut krx = command.stdout(Stdio::piped()).spawn().expect("krx");
    std::io::Read::read_exact(krx.stdout.as_mut().expect("piped"), &mut [0; 3]).expect("up");
    let exec = |options: &[&str], script: &str, input: &[u8]| {
        let arguments = [&["exec"], options, &["web", "sh", "-c", script]].concat();
        finish(&mut place.krx(&arguments), input).ok().out
    };
    let facts = "id -u; pwd; echo $COLOUR $HOME; grep CapEff /proc/self/status";
    assert_eq!(exec(&[], facts, b""), "1234\n/tmp\nblue /\nCapEff:\t0000000000000000\n");
    let as_root = exec(&["-u", "0", "-w", "/etc", "-e", "COLOUR=red"], facts, b"");
    assert_eq!(as_root, "0\n/etc\nred /root\nCapEff:\t00000000a80425fb\n");
    assert_eq!(exec(&["-u", "daemon"], "id -u; id -g; echo $HOME", b""), "1\n1\n/usr/sbin\n");
    assert_eq!(exec(&["-i"], "wc -c", b"12345"), "5\n");
    let missing = finish(&mut place.krx(&["exec", "web", "no-such-program"]), b"");
    assert_eq!(missing.code, 127, "{missing:?}");
    let listed = finish(&mut place.krx(&["ps", "--json"]), b"").ok();
    let listed: serde_json::Value = serde_json::from_str(&listed.out).expect("JSON");
    assert_eq!(listed[0]["name"], "web");
    assert_eq!(listed[0]["memory_mib"], 256);
    krx.kill().expect("kill");
    krx.wait().expect("wait");
    place.assert_clean();
}

#[test]
fn longest_name_is_a_host_name_as_far_as_it_fits() {
    let Some(place) = Place::new() else { return };
    // As long as the socket paths allow below a short directory.
    let name = "n".repeat(68);
    let mut command = place.run(&["--name", &name], &["hostname"]);
    let ended = finish(command.env("KRX_STATE_DIR", place.scratch.join("s")), b"").ok();
    assert_eq!(ended.out.trim(), &name[..64]);
}

#[test]
fn kernel_of_ones_own_is_booted() {
    let Some(place) = Place::new() else { return };
    let kernel = place.host.bzimage();
    let ended = place.sh(&["--kernel", &kernel.to_string_lossy(), "--console"], "uname -r").ok();
    assert!(ended.out.ends_with("-krx\n"), "{ended:?}");
    assert!(ended.err.contains("Linux version"), "{ended:?}");
}

#[test]
fn first_start_says_what_will_not_work() {
    let Some(place) = Place::new() else { return };
    let krx = place.run(&[], &["true"]);
    let script = "mount -t tmpfs none /dev/net && \"$@\" && echo again >&2 && exec \"$@\"";
    let mut hidden = std::process::Command::new("unshare");
    hidden.args(["--mount", "sh", "-c", script, "sh"]).arg(krx.get_program()).args(krx.get_args());
    let ended = finish(hidden.env("KRX_STATE_DIR", place.state()), b"").ok();
    let (first, second) = ended.err.split_once("again\n").expect("two starts");
    assert!(first.contains("warning: /dev/net/tun does not exist"), "{first}");
    assert_eq!(second, "");
}
