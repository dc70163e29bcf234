//! A systemd of its own for a suite: process 1 of new PID, mount, UTS and cgroup namespaces, which runs the suite as a service.
//!
//! It is Debian's systemd with no units but the suite's and the message bus's; what it would write to `/etc` and `/run` is gone with it.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Output};

use crate::cri::pod::CGROUPS;
use crate::scratch::Scratch;

/// Set for the suite that runs as a service.
const INSIDE: &str = "KRX_TEST_SYSTEMD";
const SYSTEMD: &str = "/lib/systemd/systemd";
const CONTROLLERS: [&str; 5] = ["+cpu", "+memory", "+pids", "+io", "+cpuset"];
/// The system's message bus, which its users find when they ask for it.
const BUS_SOCKET: &str =
    "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=/run/dbus/system_bus_socket\n";
const BUS: &str = "[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\n[Service]\nType=notify\n\
    ExecStart=/usr/bin/dbus-daemon --system --address=systemd: --nofork --nopidfile --systemd-activation\n";
/// Makes the host that systemd finds, in its namespaces: the first argument is a directory for what is changed in `/etc`.
const BEGIN: &str = r#"
set -eu
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work"
mount -t overlay -o "lowerdir=/etc,upperdir=$1/upper,workdir=$1/work" overlay /etc
umount /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/netns /run/units
cp "${1%/*}"/*.service "${1%/*}"/*.socket /run/units/
export SYSTEMD_UNIT_PATH=/run/systemd/system.control:/run/systemd/transient:/run/units
export SYSTEMD_GENERATOR_PATH=/none SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/none container=krx
exec /lib/systemd/systemd --unit=suite.service --log-target=console --show-status=no
"#;

/// Runs `suite` under a systemd, by having this program run once more.
///
/// # Panics
/// When there is no such systemd.
#[must_use]
pub fn run_under(suite: fn() -> ExitCode) -> ExitCode {
    if std::env::var_os(INSIDE).is_some() || crate::host().is_none() {
        return suite();
    }
    assert!(Path::new(SYSTEMD).exists(), "{SYSTEMD} is missing: apt-get install systemd");
    let scratch = Scratch::under(Path::new("/dev/shm"));
    let cgroup = Path::new(CGROUPS).join("krx-systemd");
    fs::create_dir_all(&cgroup).expect("cgroup of systemd");
    for controller in CONTROLLERS {
        // Those that the host has.
        let _ = fs::write(Path::new(CGROUPS).join("cgroup.subtree_control"), controller);
    }
    let output = scratch.join("output");
    fs::create_dir(scratch.join("etc")).expect("directory");
    scratch.write("suite.service", unit(&output));
    scratch.write("dbus.service", BUS);
    scratch.write("dbus.socket", BUS_SOCKET);
    // Alone in its cgroup, which could have no controllers for those below it otherwise.
    let enter = format!("echo 0 >{}/cgroup.procs && exec unshare --cgroup \"$@\"", cgroup.display());
    let mut command = Command::new("unshare");
    command.args(["--fork", "--pid", "--mount-proc", "--uts", "sh", "-c", &enter, "sh"]);
    command.args(["sh", "-c", BEGIN, "sh"]).arg(scratch.join("etc"));
    let ended = command.status().expect("unshare");
    print!("{}", fs::read_to_string(&output).unwrap_or_default());
    remove(&cgroup);
    u8::try_from(ended.code().unwrap_or(1)).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// The suite: the manager ends with it, and with its exit code.
fn unit(output: &Path) -> String {
    let program = std::env::current_exe().expect("own program");
    let quote = |text: &str| format!("\"{}\"", text.replace('%', "%%"));
    let arguments: Vec<_> = std::env::args().skip(1).map(|argument| quote(&argument)).collect();
    let environment: Vec<_> = std::env::vars()
        .filter(|(name, _)| name.starts_with("KRX_") || name == "PATH" || name == "RUST_BACKTRACE")
        .map(|(name, value)| format!("Environment={}\n", quote(&format!("{name}={value}"))))
        .collect();
    format!(
        "[Unit]\nDescription=Suite\nDefaultDependencies=no\nRequires=dbus.service\nAfter=dbus.service\nSuccessAction=exit-force\nFailureAction=exit-force\n\
         [Service]\nType=oneshot\nWorkingDirectory={here}\nExecStart={program} {arguments}\n\
         Environment={INSIDE}=1\n{environment}StandardOutput=append:{output}\nStandardError=append:{output}\n\
         Delegate=yes\nKillMode=process\nLimitNOFILE=524288\n",
        here = std::env::current_dir().expect("directory").display(),
        program = program.display(),
        arguments = arguments.join(" "),
        environment = environment.concat(),
        output = output.display(),
    )
}

/// Removes a cgroup with those below it.
fn remove(cgroup: &Path) {
    for below in fs::read_dir(cgroup).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
        remove(&below.path());
    }
    let _ = fs::remove_dir(cgroup);
}

/// `systemctl` with these arguments.
///
/// # Panics
/// When it cannot be run.
#[must_use]
pub fn systemctl(arguments: &[&str]) -> Output {
    Command::new("systemctl").args(arguments).output().expect("systemctl")
}

/// Properties of a unit, each a line as `systemctl show` has them.
///
/// # Panics
/// As [`systemctl`].
#[must_use]
pub fn properties(unit: &str, names: &str) -> String {
    String::from_utf8_lossy(&systemctl(&["show", "-p", names, unit]).stdout).into_owned()
}
