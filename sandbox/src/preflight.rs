//! Whether this host can run a pod: what is wrong, what it means, what to do.
//!
//! [`check_start`] is the short form before every start: whether KVM runs Linux is asked of a probe guest once a boot and
//! kept in the state directory. [`check_host`] asks everything anew, for `krx doctor`, [`installation`] adds what containerd
//! needs. Facts are read in one place and judged by functions that are given text.

pub mod installation;

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use krx_vmm::kvm::probe::{self, ProbeError, Verdict};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use crate::plain_file::read_capped;
use crate::state_dir::StateRoot;

/// A pod's VMM and its page tables, beside the guest's memory.
const OVERHEAD_MIB: u64 = 16;
/// Largest cached verdict that is read: whoever could write the file could make it large.
const MAX_CACHE: u64 = 4096;
/// mount_setattr(2), which makes the share's read-only mounts.
const OLDEST_KERNEL: (u32, u32) = (5, 12);

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Ok,
    /// It costs time or memory.
    Note,
    /// Something will not work.
    Warning,
    /// No pod can run.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub check: &'static str,
    pub level: Level,
    /// What was found.
    pub what: String,
    /// What it means for pods.
    pub meaning: &'static str,
    /// What to do about it; empty if nothing.
    pub remedy: &'static str,
}

/// The first thing that keeps a pod from running.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {meaning}. {remedy}")]
pub struct PreflightError {
    what: String,
    meaning: &'static str,
    remedy: &'static str,
}

impl From<Finding> for PreflightError {
    fn from(Finding { what, meaning, remedy, .. }: Finding) -> Self {
        Self { what, meaning, remedy }
    }
}

/// Checks what every start needs, in a few system calls. The first start after a boot of the host also hears, in
/// return, what will not work.
///
/// # Errors
/// The first thing that is missing, with what to do.
pub fn check_start(root: &StateRoot, memory_mib: u64) -> Result<Vec<Finding>, PreflightError> {
    // What can be mended by other words on the command line first.
    let asked = [privilege(geteuid().is_root()), memory(&read("/proc/meminfo"), memory_mib)];
    if let Some(finding) = asked.into_iter().find(|finding| finding.level == Level::Error) {
        return Err(finding.into());
    }
    let (kvm, first) = kvm_of_this_boot(root);
    if kvm.level == Level::Error {
        return Err(kvm.into());
    }
    if !first {
        return Ok(Vec::new());
    }
    let mounts = read("/proc/self/mounts");
    let tun = tun(Path::new("/dev/net/tun").exists());
    Ok([cgroup(&mounts), tun].into_iter().filter(|finding| finding.level == Level::Warning).collect())
}

/// Looks at everything.
#[must_use]
pub fn check_host() -> Vec<Finding> {
    let dev_net_tun = Path::new("/dev/net/tun").exists();
    vec![
        kvm(&ask()),
        privilege(geteuid().is_root()),
        memory(&read("/proc/meminfo"), 128),
        kernel(&read("/proc/sys/kernel/osrelease")),
        cgroup(&read("/proc/self/mounts")),
        tun(dev_net_tun),
        vhost_net(Path::new("/dev/vhost-net").exists()),
        huge_pages(&read("/sys/kernel/mm/transparent_hugepage/enabled")),
        nx_recovery(&read("/sys/module/kvm/parameters/nx_huge_pages")),
        dynmods(&read("/proc/self/mounts")),
    ]
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn finding(
    check: &'static str,
    level: Level,
    what: impl Into<String>,
    meaning: &'static str,
    remedy: &'static str,
) -> Finding {
    Finding { check, level, what: what.into(), meaning, remedy }
}

/// What became of the probe, as it is kept for the rest of a boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Answer {
    /// Boot and device that gave it.
    key: String,
    runs: bool,
    what: String,
}

/// Either what the probe found, or why it could not look.
type Asked = Result<Verdict, ProbeError>;

fn ask() -> Asked {
    probe::open().and_then(probe::examine).map(|facts| probe::judge(&facts))
}

/// The probe's answer, from the cache if it is of this boot; and whether it had to be asked.
fn kvm_of_this_boot(root: &StateRoot) -> (Finding, bool) {
    let path = root.cache();
    let key = key();
    if let Some(key) = &key
        && let Some(answer) = cached(&path, key)
    {
        let found = if answer.runs { runs(answer.what) } else { runs_not(answer.what) };
        return (found, false);
    }
    let asked = ask();
    let found = kvm(&asked);
    // Only a verdict that lasts is kept: a missing device or permission may be mended at any time.
    if let (Some(key), Ok(verdict)) = (key, &asked)
        && verdict.is_lasting()
    {
        keep(&path, &Answer { key, runs: found.level != Level::Error, what: found.what.clone() });
    }
    (found, true)
}

/// Another boot has another id, a module that was loaded again another device node.
fn key() -> Option<String> {
    let device = fs::metadata("/dev/kvm").ok()?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(format!("{} {} {}", boot.trim(), device.ino(), device.ctime()))
}

fn cached(path: &Path, key: &str) -> Option<Answer> {
    let file = fs::File::open(path).ok()?;
    // A file of somebody else says nothing.
    let trusted = file.metadata().is_ok_and(|metadata| metadata.uid() == geteuid().as_raw());
    let json = read_capped(file, MAX_CACHE).ok().filter(|_| trusted)?;
    serde_json::from_slice::<Answer>(&json).ok().filter(|answer| answer.key == key)
}

/// Writes the answer whole or not at all. Without it the next start asks again.
fn keep(path: &PathBuf, answer: &Answer) {
    let new = path.with_extension(std::process::id().to_string());
    let written = || -> std::io::Result<()> {
        if let Some(directory) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec(answer)?)?;
        fs::rename(&new, path)
    };
    if written().is_err() {
        let _ = fs::remove_file(&new);
    }
}

const KVM: &str = "kvm";
const NO_POD: &str = "no pod can run here";
const USE_RUNNER: &str = "Run krx under `tests/kvm-host -- krx ...`, which emulates a host that can (docs/kvm-host.md), or use a machine with hardware virtualization";

fn runs(what: String) -> Finding {
    finding(KVM, Level::Ok, what, "pods can run", "")
}

fn runs_not(what: String) -> Finding {
    finding(KVM, Level::Error, what, "it cannot boot Linux, so no pod can run here", USE_RUNNER)
}

fn not_in_time(what: String) -> Finding {
    let meaning =
        "a guest of a few instructions was not done in 10 s: the host stands still, or its KVM hangs";
    finding(
        KVM,
        Level::Error,
        what,
        meaning,
        "Try again when the host has time. If it stays so, use a machine with hardware virtualization",
    )
}

fn kvm(asked: &Asked) -> Finding {
    match asked {
        Ok(Verdict::RunsLinux { loop_ns }) => {
            runs(format!("/dev/kvm runs Linux ({loop_ns} ns for an iteration of two instructions)"))
        }
        Ok(Verdict::Slow { loop_ns }) => finding(
            KVM,
            Level::Warning,
            format!(
                "/dev/kvm gives right answers slowly ({loop_ns} ns for an iteration of two instructions)"
            ),
            "supervisor mode is probably emulated: pods may run, a hundred times slower than they should",
            "Use a machine with hardware virtualization",
        ),
        Ok(Verdict::CannotRunLinux { emulated, loop_ns, defects }) => {
            let defects: Vec<_> = defects.iter().map(ToString::to_string).collect();
            let time = loop_ns
                .map_or_else(String::new, |ns| format!("; {ns} ns for an iteration of two instructions"));
            let how = if *emulated {
                "emulates supervisor mode"
            } else {
                "does not run supervisor code as Linux needs it"
            };
            let found = format!("/dev/kvm {how}: {}{time}", defects.join(", "));
            if asked.as_ref().is_ok_and(Verdict::is_lasting) { runs_not(found) } else { not_in_time(found) }
        }
        Err(error) => {
            let (meaning, remedy) = match error {
                ProbeError::Missing | ProbeError::NoDriver => (
                    NO_POD,
                    "Load kvm_intel or kvm_amd (`modprobe kvm_amd`), switch virtualization on in the firmware, pass /dev/kvm into a container that krx runs in; or use `tests/kvm-host` (docs/kvm-host.md)",
                ),
                ProbeError::Denied => (
                    NO_POD,
                    "Run as root, or as a member of the group that owns /dev/kvm (`usermod -aG kvm USER`)",
                ),
                ProbeError::ApiVersion(_) | ProbeError::Capabilities(_) => {
                    (NO_POD, "Use a newer kernel, or one whose KVM is complete")
                }
                _ => (
                    NO_POD,
                    "See the kernel's log (`dmesg`); another hypervisor may hold the processor's virtualization",
                ),
            };
            finding(KVM, Level::Error, krx_vmm::report::chain(error), meaning, remedy)
        }
    }
}

fn privilege(root: bool) -> Finding {
    if root {
        finding("privilege", Level::Ok, "Running as root", "pods can have their share", "")
    } else {
        finding(
            "privilege",
            Level::Error,
            "Not running as root",
            "the pod's share is made of mounts, which need CAP_SYS_ADMIN",
            "Run krx with sudo",
        )
    }
}

fn memory(meminfo: &str, wanted_mib: u64) -> Finding {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|kib| kib.parse::<u64>().ok());
    let Some(mib) = kib.map(|kib| kib >> 10) else {
        return finding(
            "memory",
            Level::Note,
            "Available memory is not known",
            "a start may fail for want of memory",
            "",
        );
    };
    if mib >= wanted_mib + OVERHEAD_MIB {
        return finding(
            "memory",
            Level::Ok,
            format!("{mib} MiB of memory are available"),
            "pods have room",
            "",
        );
    }
    finding(
        "memory",
        Level::Error,
        format!(
            "{mib} MiB of memory are available, a guest of {wanted_mib} MiB needs {} MiB",
            wanted_mib + OVERHEAD_MIB
        ),
        "the host would run out of memory",
        "Give the pod less memory (--memory), or free some",
    )
}

fn kernel(release: &str) -> Finding {
    let release = release.trim();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) if (major, minor) < OLDEST_KERNEL => finding(
            "kernel",
            Level::Error,
            format!("Linux {release} is older than 5.12"),
            "read-only shares cannot be made",
            "Use a newer kernel",
        ),
        _ => finding("kernel", Level::Ok, format!("Linux {release}"), "new enough", ""),
    }
}

fn cgroup(mounts: &str) -> Finding {
    if mount(mounts, "cgroup2").is_some() {
        return finding(
            "cgroup",
            Level::Ok,
            "cgroup v2 is mounted",
            "a pod's host processes can be limited",
            "",
        );
    }
    finding(
        "cgroup",
        Level::Warning,
        "cgroup v2 is not mounted",
        "limits of a pod's host processes have no effect; limits inside the guest work",
        "Boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2",
    )
}

fn tun(exists: bool) -> Finding {
    if exists {
        return finding("tun", Level::Ok, "/dev/net/tun exists", "pods can have a network", "");
    }
    finding(
        "tun",
        Level::Warning,
        "/dev/net/tun does not exist",
        "pods run without a network",
        "Load it: modprobe tun",
    )
}

fn vhost_net(exists: bool) -> Finding {
    const CHECK: &str = "vhost-net";
    if exists {
        return finding(CHECK, Level::Ok, "/dev/vhost-net exists", "the kernel moves pods' frames", "");
    }
    finding(
        CHECK,
        Level::Note,
        "/dev/vhost-net does not exist",
        "krx-vmm moves pods' frames itself, which adds to the time of each round trip",
        "Load it: modprobe vhost_net",
    )
}

fn huge_pages(enabled: &str) -> Finding {
    const CHECK: &str = "huge pages";
    if enabled.contains("[never]") || enabled.is_empty() {
        return finding(
            CHECK,
            Level::Note,
            "Transparent huge pages are off",
            "each page that a guest touches first costs an exit",
            "echo madvise >/sys/kernel/mm/transparent_hugepage/enabled",
        );
    }
    finding(CHECK, Level::Ok, "Transparent huge pages are available", "guests can have them", "")
}

fn nx_recovery(parameter: &str) -> Finding {
    const CHECK: &str = "nx huge pages";
    if matches!(parameter.trim(), "Y" | "force") {
        return finding(
            CHECK,
            Level::Note,
            "KVM splits huge pages that are executed (iTLB multihit)",
            "each VM starts with a recovery thread, which can cost 20 to 40 ms",
            "On a processor without the erratum: kvm.nx_huge_pages=never",
        );
    }
    finding(CHECK, Level::Ok, "KVM does not split huge pages", "VMs start without a recovery thread", "")
}

fn dynmods(mounts: &str) -> Finding {
    const CHECK: &str = "cgroup moves";
    match mount(mounts, "cgroup2") {
        Some(options) if !options.contains("favordynmods") => finding(
            CHECK,
            Level::Note,
            "cgroup v2 is mounted without favordynmods",
            "making a VM moves a thread between cgroups, which can wait 10 to 40 ms",
            "mount -o remount,favordynmods /sys/fs/cgroup",
        ),
        _ => finding(CHECK, Level::Ok, "Moves between cgroups are quick", "", ""),
    }
}

/// Options of the first mount of a file system type.
fn mount<'a>(mounts: &'a str, kind: &str) -> Option<&'a str> {
    let fields = |line: &'a str| line.split(' ').skip(2).take(2).collect::<Vec<_>>();
    mounts.lines().map(fields).find_map(|fields| match fields[..] {
        [found, options] if found == kind => Some(options),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use krx_vmm::kvm::probe::Defect;

    use super::*;
    use crate::testing::Scratch;

    #[test]
    fn emulated_supervisor_mode_is_named_and_the_runner_pointed_to() {
        let defects = vec![Defect::Cmpxchg16bStoresNothing];
        let found = kvm(&Ok(Verdict::CannotRunLinux { emulated: true, loop_ns: Some(900), defects }));
        assert_eq!(found.level, Level::Error);
        assert!(found.what.contains("emulates supervisor mode"), "{}", found.what);
        assert!(found.remedy.contains("tests/kvm-host"));
    }

    #[test]
    fn each_failure_of_the_device_has_a_remedy() {
        for error in [ProbeError::Missing, ProbeError::Denied, ProbeError::ApiVersion(11), ProbeError::Memory]
        {
            let found = kvm(&Err(error));
            assert!(found.level == Level::Error && !found.remedy.is_empty(), "{found:?}");
        }
    }

    #[test]
    fn memory_is_compared_with_what_the_pod_needs() {
        let meminfo = "MemTotal: 999999 kB\nMemAvailable:     204800 kB\n";
        assert_eq!(memory(meminfo, 128).level, Level::Ok);
        assert_eq!(memory(meminfo, 190).level, Level::Error);
        for odd in ["", "MemAvailable:", "MemAvailable: lots kB", "MemAvailable: -1 kB"] {
            assert_eq!(memory(odd, 128).level, Level::Note, "{odd}");
        }
    }

    #[test]
    fn old_kernels_are_told() {
        assert_eq!(kernel("5.11.0-1-amd64\n").level, Level::Error);
        for good in ["5.12.0", "6.1.0-9-cloud", "10.0", "strange"] {
            assert_eq!(kernel(good).level, Level::Ok, "{good}");
        }
    }

    #[test]
    fn mounts_are_found_by_type() {
        let v1 = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n";
        let v2 = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
        assert_eq!((cgroup(v1).level, cgroup(v2).level), (Level::Warning, Level::Ok));
        assert_eq!(dynmods(v2).level, Level::Note);
        assert_eq!(dynmods("c /c cgroup2 rw,favordynmods 0 0").level, Level::Ok);
        assert_eq!(cgroup("garbage").level, Level::Warning);
    }

    #[test]
    fn cache_is_of_one_boot_and_survives_garbage() {
        let scratch = Scratch::new("preflight");
        let path = scratch.path().join(".host.json");
        let answer = Answer { key: "boot".into(), runs: true, what: "runs".into() };
        keep(&path, &answer);
        assert_eq!(cached(&path, "boot"), Some(answer));
        assert_eq!(cached(&path, "another boot"), None);
        for garbage in [&b""[..], b"{", b"[1,2]", &[b' '; 10_000]] {
            fs::write(&path, garbage).unwrap();
            assert_eq!(cached(&path, "boot"), None);
        }
    }
}
