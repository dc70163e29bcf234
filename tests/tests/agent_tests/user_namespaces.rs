//! Containers in user namespaces of their own.

use krx_proto::{ContainerSpec, ErrorKind, ExitStatus, IdMapping, Limit, ProcessSpec, Rlimit, UserNamespace};
use tests::agent::{Guest, kind, output, shell};
use tests::pod::Place;

/// A container whose IDs are 5,000 of the guest's.
fn mapped(id: &str, script: &str) -> ContainerSpec {
    let map = vec![IdMapping { container: 0, guest: 100_000, size: 5000 }];
    let namespace = UserNamespace { uids: map.clone(), gids: map };
    ContainerSpec { user_namespace: Some(Box::new(namespace)), ..shell(id, script) }
}

#[test]
fn a_further_process_joins_the_user_namespace() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    guest.create(mapped("living", "exec sleep 1000")).expect("create").start().expect("start");
    let script = "cat /proc/self/uid_map /proc/self/gid_map; id -u; id -g; id -G; ulimit -H -l; cat /proc/self/oom_score_adj
        [ $(readlink /proc/self/ns/user) = $(readlink /proc/1/ns/user) ] && echo joined
        stat -c '%u %g %F' /dev/null /etc/shadow; cat /etc/shadow >/dev/zero || echo refused; tty; echo >/proc/self/fd/1";
    let further = |id: &str, change: fn(&mut ProcessSpec)| {
        let process = guest.process("living", id);
        let mut spec = shell("x", script).process;
        change(&mut spec);
        process.exec(spec).map(|_| process)
    };
    let root = further("root", |spec| {
        spec.rlimits = vec![Rlimit { resource: 8, soft: 1 << 30, hard: 1 << 30 }];
        spec.oom_score_adj = Some(-300);
    });
    let (text, _) = output(&root.expect("exec"));
    let map = "0 100000 5000";
    let lines: Vec<_> =
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let expected = [
        map,
        map,
        "0",
        "0",
        "0",
        "1048576",
        "-300",
        "joined",
        "0 0 character special file",
        "65534 65534 regular file",
        "refused",
        "not a tty",
        "",
    ];
    assert_eq!(lines, expected, "{text}");
    let other = further("other", |spec| {
        (spec.user.uid, spec.user.gid) = (7, 8);
        spec.user.additional_gids = vec![9, 4999];
        spec.terminal = Some(krx_proto::TerminalSize { columns: 80, rows: 24 });
    });
    let other = other.expect("exec");
    let mut terminal = other.connect(krx_proto::Stream::Terminal).expect("terminal");
    other.start().expect("start");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut terminal, &mut text).expect("output");
    for line in ["7\r\n8\r\n8 9 4999\r\n", "refused\r\n/dev/pts/"] {
        assert!(text.contains(line), "{text}");
    }
    assert_eq!(kind(further("unmapped", |spec| spec.user.uid = 5000)), ErrorKind::Invalid);
}

#[test]
fn a_user_namespace_leaves_nothing_of_the_guest_in_reach() {
    let Some(place) = Place::new() else { return };
    let guest = Guest::new(&place);
    let script = "import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    print(name, libc[name](*arguments) and ctypes.get_errno())
call('umount2', b'/', 2)
call('umount2', b'/proc', 2)
call('mount', b'x', b'/tmp', b'tmpfs', 0, None)
call('mknod', b'/tmp/node', 0o20666, 0x103)
call('sethostname', b'inner', 5)
call('setresuid', 0, 5000, 0)
print(os.path.exists('/run/krx'), sum('virtiofs' in line for line in open('/proc/self/mountinfo')) if os.path.exists('/proc/self') else 'gone')
os.chroot('..'); os.chdir('..')
print(os.path.exists('/run/krx/share'))";
    // All capabilities, and one process.
    let all = |spec: &mut ContainerSpec| {
        spec.process.args = ["python3", "-c", script].map(String::from).into();
        spec.process.capabilities = None;
        spec.resources.pids_max = Some(Limit::At(1));
    };
    let mut spec = mapped("all", "");
    all(&mut spec);
    let (text, status) = output(&guest.create(spec).expect("create"));
    let expected =
        "umount2 22\numount2 0\nmount 0\nmknod 1\nsethostname 0\nsetresuid 22\nFalse gone\nFalse\n";
    assert_eq!((text.as_str(), status), (expected, ExitStatus::Code(0)));
    assert_eq!(guest.pod.exec(&["hostname"]).ok().out, "pod\n");
    // What cannot be made is said by who is outside, or inside, and leaves nothing behind.
    let fails = |change: fn(&mut ContainerSpec)| {
        let mut spec = mapped("fails", "true");
        change(&mut spec);
        let error = guest.create(spec).expect_err("created").to_string();
        assert_eq!(guest.run("fails", "echo again", |_| ()).0, "again\n");
        guest.process("fails", "").delete().expect("delete");
        error
    };
    let error = fails(|spec| spec.rootfs = "/nowhere".into());
    assert!(error.contains("/nowhere as root file system"), "{error}");
    let error = fails(|spec| spec.sysctls = vec![("no.such".into(), "1".into())]);
    assert!(error.contains("kernel parameter no/such"), "{error}");
    let error = fails(|spec| {
        let gids = &mut spec.user_namespace.as_mut().expect("mapped").gids;
        gids[0].size = 3;
    });
    // Group 5, which terminals are to have, is nobody.
    assert!(error.contains("Cannot mount devpts on /dev/pts: Invalid argument"), "{error}");
    let error = fails(|spec| spec.user_namespace.as_mut().expect("mapped").uids[0].container = 1);
    assert!(error.contains("user_namespace.uids: "), "{error}");
}
