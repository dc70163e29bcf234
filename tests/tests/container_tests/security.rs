//! Who a container's processes are, and what they may do: what containerd writes into the specification of a default, a
//! restricted and a privileged container is so in its guest.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use tests::containerd::Engine;
use tests::cri::container::{Container, MASKED, READ_ONLY};
use tests::cri::messages::{Capabilities, Resources};
use tests::cri::pod::PodPlan;
use tests::scratch::Scratch;

/// A kernel parameter that each kernel has, and its own value written to it.
const WRITE_SYSCTL: &str = "f=/proc/sys/vm/overcommit_memory; read value <$f; echo $value >$f";
/// Of all capabilities that a guest's kernel knows; runc's host may know others.
const ALL_CAPABILITIES: &str = "000001ffffffffff";

pub(crate) fn identity(engine: &Engine) {
    let pod = PodPlan::new(engine, "identity").run();
    let plan =
        pod.shell("main", "id -u; id -g; id -G; echo $A-$B; pwd; cat /proc/self/status | grep NoNewPrivs");
    let mut plan = plan.user(1000, 1000, &[2000, 3000]).env("A", "one").env("B", "two words");
    plan.config.working_dir = "/usr/lib".into();
    plan.security().no_new_privs = true;
    let ended = plan.run().ok();
    assert_eq!(ended.out, "1000\n1000\n1000 2000 3000\none-two words\n/usr/lib\nNoNewPrivs:\t1\n");
}

pub(crate) fn capabilities(engine: &Engine) {
    let pod = PodPlan::new(engine, "capabilities").run();
    let show = "grep CapEff /proc/self/status; mount -t tmpfs none /tmp 2>/dev/null && echo mounts; true";
    let plain = pod.shell("plain", show).run().ok().out;
    assert_eq!(plain, "CapEff:\t00000000a80425fb\n");
    let mut plan = pod.shell("none", show);
    plan.security().capabilities = Some(Capabilities { add: Vec::new(), drop: vec!["ALL".into()] });
    assert_eq!(plan.run().ok().out, "CapEff:\t0000000000000000\n");
    let mut plan = pod.shell("admin", show);
    plan.security().capabilities = Some(Capabilities { add: vec!["SYS_ADMIN".into()], drop: Vec::new() });
    assert_eq!(plan.run().ok().out, "CapEff:\t00000000a82425fb\nmounts\n");
}

pub(crate) fn read_only_root(engine: &Engine) {
    let pod = PodPlan::new(engine, "read-only").run();
    let volume = Scratch::under(&engine.scratch().join("logs"));
    let mut plan = pod.shell("main", "touch /new && echo root; touch /data/new && echo volume");
    plan.security().readonly_rootfs = true;
    let ended = plan.mount(volume.path(), "/data", false).run();
    assert_eq!(ended.out, "volume\n", "{ended:?}");
}

/// The fields of its own status that a process of the container sees.
fn status(container: &Container<'_, '_>) -> HashMap<String, String> {
    let pair = |line: &str| line.split_once(":\t").map(|(name, value)| (name.into(), value.trim().into()));
    container.sh("cat /proc/self/status").lines().filter_map(pair).collect()
}

/// What a script that is to fail says.
fn refused(container: &Container<'_, '_>, script: &str) -> String {
    let ended = container.exec(&["sh", "-c", script]);
    assert_ne!(ended.code, 0, "{script}: {ended:?}");
    ended.err
}

pub(crate) fn default(engine: &Engine) {
    let pod = PodPlan::new(engine, "default").run();
    let resources = Resources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit: 64 << 20,
        oom_score_adj: 500,
        unified: HashMap::from([("pids.max".into(), "50".into())]),
        ..Resources::default()
    };
    let container = pod.container("main", &["sleep", "600"]).resources(resources).start();
    let masked = MASKED.join(" ");
    let readable = "[ -d $p ] && ls -A $p || head -c 1 $p";
    let seen = container.sh(&format!("for p in {masked}; do [ ! -e $p ] || {{ {readable}; }}; done"));
    assert_eq!(seen, "", "of what is masked");
    let read_only = READ_ONLY.join(" ");
    let writable = "[ ! -e $p ] || grep -q \" $p ro\" /proc/self/mountinfo || echo $p";
    assert_eq!(container.sh(&format!("for p in {read_only} /sys; do {writable}; done")), "");
    let (sealed, forbidden) = ("Read-only file system", "Operation not permitted");
    assert!(refused(&container, WRITE_SYSCTL).contains(sealed));

    assert_eq!(status(&container)["Seccomp"], "2");
    assert!(refused(&container, "unshare -U true").contains(forbidden));
    assert!(!refused(&container, "mount -t tmpfs none /tmp").is_empty());
    let mut open = pod.shell("unconfined", "unshare -U true && grep Seccomp: /proc/self/status");
    open.security().seccomp.get_or_insert_default().profile_type = 1;
    assert_eq!(open.run().ok().out, "Seccomp:\t0\n", "it is the profile that refuses");

    let devices = "for d in null zero full random urandom tty; do [ -c /dev/$d ] || echo $d; done";
    assert_eq!(container.sh(devices), "");
    assert_eq!(container.sh("echo x >/dev/null; head -c 3 /dev/zero; ls /dev/pts"), "\0\0\0ptmx\n");
    for device in ["b 8 0", "b 7 0", "c 1 1", "c 10 229"] {
        let open =
            format!("mknod /dev/made {device} && {{ head -c 1 /dev/made; c=$?; rm /dev/made; exit $c; }}");
        let error = refused(&container, &open);
        assert!(error.contains("head:") && error.contains(forbidden), "{device}: {error}");
    }

    let limits = "cd /sys/fs/cgroup; cat /proc/1/oom_score_adj memory.max cpu.max cpu.weight pids.max";
    assert_eq!(container.sh(limits), format!("500\n{}\n50000 100000\n20\n50\n", 64 << 20));
}

/// As the pod security standard `restricted` wants it, with a volume of the pod's `fsGroup`.
pub(crate) fn restricted(engine: &Engine) {
    let pod = PodPlan::new(engine, "restricted").run();
    let volume = Scratch::under(&engine.scratch().join("logs"));
    chown(volume.path(), Some(0), Some(2000)).expect("owner");
    fs::set_permissions(volume.path(), fs::Permissions::from_mode(0o2770)).expect("mode");
    let plan = pod.container("main", &["sleep", "600"]).user(1000, 3000, &[2000]);
    let mut plan = plan.mount(volume.path(), "/data", false);
    let security = plan.security();
    (security.no_new_privs, security.readonly_rootfs) = (true, true);
    security.capabilities = Some(Capabilities { add: Vec::new(), drop: vec!["ALL".into()] });
    let container = plan.start();
    let status = status(&container);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!((status["NoNewPrivs"].as_str(), status["Seccomp"].as_str()), ("1", "2"));
    assert_eq!(
        (status["Uid"].as_str(), status["Gid"].as_str()),
        ("1000\t1000\t1000\t1000", "3000\t3000\t3000\t3000")
    );
    assert_eq!(container.sh("id -G; cat /proc/1/status | grep NoNewPrivs"), "3000 2000\nNoNewPrivs:\t1\n");
    assert!(refused(&container, "touch /tmp/new").contains("Read-only file system"));
    assert!(refused(&container, "chmod 0 /data").contains("Operation not permitted"));
    container.sh("echo mine >/data/new");
    let written = fs::metadata(volume.join("new")).expect("the file");
    assert_eq!((written.uid(), written.gid()), (1000, 2000), "the volume's group");
    let other =
        pod.shell("other", "cat /data/new").user(1001, 3000, &[]).mount(volume.path(), "/data", false);
    let ended = other.run();
    assert!(ended.code != 0 && ended.err.contains("Permission denied"), "{ended:?}");
}

pub(crate) fn privileged(engine: &Engine) {
    let mut plan = PodPlan::new(engine, "privileged");
    let security = plan.security();
    (security.privileged, security.seccomp) = (true, None);
    let pod = plan.run();
    let mut plan = pod.container("main", &["sleep", "600"]);
    let security = plan.security();
    (security.privileged, security.seccomp) = (true, None);
    let container = plan.start();
    let status = status(&container);
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert!(!engine.is_krx() || status[set] == ALL_CAPABILITIES, "{set}: {status:?}");
    }
    assert_eq!((status["Seccomp"].as_str(), status["NoNewPrivs"].as_str()), ("0", "0"));
    let covered =
        "grep -E ' /proc/[a-z]| /sys/firmware| /(proc|sys|sys/fs/cgroup) ro' /proc/self/mountinfo || true";
    assert_eq!(container.sh(covered), "");
    container.sh(WRITE_SYSCTL);
    container.sh("mount -t tmpfs none /tmp && unshare -U true && head -c 1 /proc/keys >/dev/null");
    container.sh("mknod /dev/memory c 1 3 && echo x >/dev/memory");
}
