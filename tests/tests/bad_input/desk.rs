//! Where bad input is handed in: a `krx` whose VMM does no more than tell that it was started.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tests::pod::{Ended, finish};
use tests::scratch::Scratch;

/// krx itself failed (`docs/cli.md`).
const FAILED: i32 = 125;
/// More is no sentence any more. The usage of a command is among it.
const SENTENCES: usize = 2048;

pub(crate) struct Desk {
    /// On a file system on which layers can be stacked.
    scratch: Scratch,
}

impl Desk {
    /// With what shows that a start is refused for nothing but what is wrong with it.
    pub(crate) fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "krx run wants root, and so does its test");
        let desk = Self { scratch: Scratch::under(Path::new("/run")) };
        let started = desk.scratch.join("started");
        let vmm = desk.scratch.write("vmm", format!("#!/bin/sh\necho >>{}\nexit 1\n", started.display()));
        fs::set_permissions(vmm, Permissions::from_mode(0o755)).expect("permissions");
        for name in ["kernel", "initramfs", "config.toml", "root/bin/sh"] {
            desk.scratch.write(name, "");
        }
        desk.goes_on("a good start", &mut desk.run(&["--", "true"]));
        desk
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        self.scratch.write(name, content)
    }

    /// `krx` with these arguments.
    pub(crate) fn krx(&self, arguments: &[&str]) -> Command {
        let krx = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/krx");
        let mut command = Command::new(krx);
        command.args(arguments).current_dir(self.scratch.path());
        for (variable, name) in [
            ("KRX_STATE_DIR", "state"),
            ("KRX_IMAGE_DIR", "store"),
            ("KRX_CONFIG", "config.toml"),
            ("KRX_KERNEL", "kernel"),
            ("KRX_INITRAMFS", "initramfs"),
            ("KRX_VMM", "vmm"),
        ] {
            command.env(variable, self.scratch.join(name));
        }
        command
    }

    /// `krx run` of an empty root file system.
    pub(crate) fn run(&self, arguments: &[&str]) -> Command {
        let mut krx = self.krx(&["run", "--rootfs", "root"]);
        krx.args(arguments);
        krx
    }

    /// `command` gets as far as to its VMM, or to a host that cannot run one.
    pub(crate) fn goes_on(&self, what: &str, command: &mut Command) {
        let ended = finish(command, b"");
        let started = fs::remove_file(self.scratch.join("started")).is_ok();
        assert!(started || ended.err.contains("This host cannot run the pod"), "{what}: {ended:?}");
    }

    /// `command` is refused with these `words`.
    pub(crate) fn refused(&self, what: &str, command: &mut Command, words: &[&str]) {
        let before = self.everything();
        let ended = finish(command, b"");
        let Ended { code, out, err } = &ended;
        assert_eq!((*code, out.as_str()), (FAILED, ""), "{what}: {ended:?}");
        assert!(err.starts_with("krx: ") || err.starts_with("error: "), "{what}: {err:?}");
        assert!(err.len() < SENTENCES, "{what}: {} bytes, {}", err.len(), &err[..200]);
        assert!(!err.contains("panicked at"), "{what}: {err}");
        let odd = err.chars().find(|character| character.is_control() && *character != '\n');
        assert_eq!(odd, None, "{what}: {err:?}");
        for word in words {
            assert!(err.contains(word), "{what}: no `{word}` in {err}");
        }
        let left: Vec<_> = self.everything().difference(&before).cloned().collect();
        assert!(left.is_empty(), "{what}: left behind: {left:?}");
        // For who reads along: --nocapture.
        println!("{what}:\n    {}", err.trim_end().replace('\n', "\n    "));
    }

    /// Files, mounts, and processes that were started from here.
    fn everything(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        walk(self.scratch.path(), &mut found);
        let own = self.scratch.path().to_string_lossy();
        let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
        found.extend(mounts.lines().filter(|line| line.contains(&*own)).map(str::to_string));
        for process in fs::read_dir("/proc").expect("/proc").flatten() {
            let environment = fs::read(process.path().join("environ")).unwrap_or_default();
            if String::from_utf8_lossy(&environment).contains(&*own) {
                found.insert(process.path().display().to_string());
            }
        }
        found
    }
}

fn walk(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), found);
        }
        found.insert(entry.path().display().to_string());
    }
}
