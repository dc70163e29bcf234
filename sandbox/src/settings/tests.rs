//! Files as administrators write them, and as they should not.

use super::*;
use crate::testing::Scratch;

const SHIPPED: &str = include_str!("../../../dist/config.toml");

fn parsed(text: &str) -> Result<Settings, SettingsError> {
    let mut settings = Settings::default();
    settings.apply(Path::new("krx.toml"), text.as_bytes())?;
    settings.check(Path::new("krx.toml")).map(|()| settings)
}

/// The keys of a table, as the parser itself tells them.
fn keys(table: &str) -> Vec<String> {
    let error = parsed(&format!("{table}\nno_such_key = 1")).unwrap_err().to_string();
    assert!(error.contains("no_such_key"), "{error}");
    error.split('`').skip(3).step_by(2).map(str::to_owned).collect()
}

#[test]
fn shipped_file_is_the_defaults_and_names_every_key() {
    assert_eq!(parsed(SHIPPED).unwrap(), Settings::default());
    let is_key = |line: &&str| line.starts_with('#') && !line.starts_with("# ") && *line != "#";
    let keys_of_file: Vec<_> = SHIPPED.lines().filter(is_key).collect();
    let uncommented: Vec<_> =
        SHIPPED.lines().map(|line| if is_key(&line) { &line[1..] } else { line }).collect();
    assert_eq!(parsed(&uncommented.join("\n")).unwrap(), Settings::default());
    let mut known = 0;
    for table in keys("") {
        assert!(SHIPPED.contains(&format!("\n[{table}]\n")), "{table}");
        for key in keys(&format!("[{table}]")) {
            assert!(keys_of_file.iter().any(|line| line.starts_with(&format!("#{key} = "))), "{key}");
            known += 1;
        }
    }
    assert_eq!((keys_of_file.len(), known), (14, 14));
}

#[test]
fn every_key_has_its_effect() {
    let settings = parsed(
        "[guest]\nkernel = '/k'\ninitramfs = '/i'\nkernel_args = 'quiet'\n[vm]\nmemory_mib = 512\noverhead_mib = 32\ncpus = 2\n\
         max_memory_mib = 1024\nmax_cpus = 4\nboot_timeout_s = 5\nconsole = true\nvhost_net = false\n[vmm]\npath = '/v'\n\
         [annotations]\nallow = ['io.krx.kernel-args']\n[log]\nlevel = 'debug'\n",
    );
    let expected = Settings {
        guest: GuestSettings {
            kernel: Place::At("/k".into()),
            initramfs: Place::At("/i".into()),
            kernel_args: KernelArgs::new("quiet").unwrap(),
        },
        vm: VmSettings {
            memory: MemorySize::clamped(512),
            overhead: OverheadMib(32),
            cpus: VcpuCount::clamped(2),
            max_memory: MemorySize::clamped(1024),
            max_cpus: VcpuCount::clamped(4),
            boot_timeout: Duration::from_secs(5),
            console: true,
            vhost_net: false,
        },
        vmm: Place::At("/v".into()),
        annotations: [Annotation::KernelArgs].into(),
        log_level: LogLevel::Debug,
    };
    assert_eq!(settings.unwrap(), expected);
    assert_eq!(parsed("annotations.allow = []").unwrap().annotations.len(), 0);
}

#[test]
fn wrong_values_are_refused_with_their_line() {
    let wrong = [
        ("[vm]\ncolour = 1", 2, "unknown field `colour`"),
        ("\n\n[vim]\n", 3, "unknown field `vim`"),
        ("[vm]\n\nmemory_mib = '256'", 3, "invalid type"),
        ("[vm]\nmemory_mib = 256.0", 2, "invalid type"),
        ("[vm]\nmemory_mib = -1", 2, "invalid value"),
        ("[vm]\nmemory_mib = 9223372036854775808", 2, ""),
        ("[vm]\nmemory_mib = 31", 2, "Guest memory of 31 MiB is out of range: give 32 to 1048576 MiB"),
        ("[vm]\ncpus = 1\nmax_memory_mib = 1048577", 3, "out of range"),
        ("[vm]\ncpus = 0", 2, "give 1 to 8"),
        ("[vm]\nmax_cpus = 9", 2, "give 1 to 8"),
        ("[vm]\ncpus = 4294967297", 2, "invalid value"),
        ("[vm]\noverhead_mib = 1048577", 2, "give 0 to 1048576"),
        ("[vm]\nboot_timeout_s = 0", 2, "give 1 to 86400"),
        ("[vm]\nboot_timeout_s = 86401", 2, "give 1 to 86400"),
        ("[vm]\nconsole = 'yes'", 2, "invalid type"),
        ("[guest]\nkernel = 'vmlinux'", 2, "not absolute"),
        ("[guest]\nkernel = \"/k\\u0000\"", 2, "not absolute"),
        ("[guest]\nkernel_args = \"a\\nb\"", 2, "printable ASCII"),
        (
            "[annotations]\nallow = [\n'io.krx.memory',\n'io.krx.colour']",
            2,
            "`io.krx.colour` is not one of krx's",
        ),
        ("[annotations]\nallow = 'io.krx.memory'", 2, "invalid type"),
        ("[log]\nlevel = 'loud'", 2, "unknown variant `loud`"),
        ("vm = 1", 1, "invalid type"),
        ("[vm]\ncpus = 1\ncpus = 2", 3, "duplicate key"),
        ("[vm\n", 1, ""),
        ("[vm]\ncpus = ", 2, ""),
        ("\n\0", 2, ""),
    ];
    for (text, expected, words) in wrong {
        match parsed(text).unwrap_err() {
            SettingsError::Invalid { line, what, .. } => {
                assert!(
                    line == expected && what.contains(words) && !what.contains('\n'),
                    "{text:?}: {line}: {what}"
                );
            }
            other => panic!("{text:?}: {other}"),
        }
    }
    let mut settings = Settings::default();
    let error = settings.apply(Path::new("krx.toml"), b"[vm]\ncpus = 1 # \xff").unwrap_err().to_string();
    assert!(error.starts_with("krx.toml:2: File is not UTF-8"), "{error}");
    let deep = format!("a = {}", "[".repeat(60_000));
    assert!(matches!(parsed(&deep), Err(SettingsError::Invalid { line: 1, .. })));
}

#[test]
fn defaults_over_their_limit_are_refused() {
    let error = parsed("[vm]\nmax_memory_mib = 128").unwrap_err().to_string();
    assert!(error.contains("memory_mib is 256, over [vm] max_memory_mib, which is 128"), "{error}");
    assert!(matches!(parsed("[vm]\ncpus = 4\nmax_cpus = 2"), Err(SettingsError::OverLimit { value: 4, .. })));
}

#[test]
fn later_files_win_and_only_toml_counts() {
    let scratch = Scratch::new("settings");
    let main = scratch.write("config.toml", b"[vm]\ncpus = 2\nmemory_mib = 512\n");
    scratch.write("config.d/20-b.toml", b"vm.cpus = 4\n");
    scratch.write("config.d/10-a.toml", b"vm.cpus = 3\nvm.console = true\n");
    for ignored in ["config.d/30-c.toml.dpkg-old", "config.d/.30-c.toml", "config.d/README"] {
        scratch.write(ignored, b"what = ever");
    }
    let vm = Settings::load_from(&main, true).unwrap().vm;
    assert_eq!((vm.cpus.get(), vm.memory.mib(), vm.console), (4, 512, true));
    scratch.write("config.d/15.toml", b"\nvm.cpus = 'many'\n");
    let error = Settings::load_from(&main, true).unwrap_err().to_string();
    assert!(error.contains("config.d/15.toml:2: "), "{error}");
}

#[test]
fn missing_file_is_the_defaults_unless_it_was_named() {
    let scratch = Scratch::new("settings");
    let main = scratch.path().join("config.toml");
    assert_eq!(Settings::load_from(&main, false).unwrap(), Settings::default());
    assert!(matches!(Settings::load_from(&main, true), Err(SettingsError::Read { .. })));
    scratch.write("config.d/a.toml", b"vm.cpus = 3");
    assert_eq!(Settings::load_from(&main, false).unwrap().vm.cpus.get(), 3);
}

#[test]
fn size_and_number_of_files_are_capped() {
    let scratch = Scratch::new("settings");
    let main = scratch.write("config.toml", &[b'\n'; 64 << 10]);
    assert!(Settings::load_from(&main, true).is_ok());
    scratch.write("config.toml", &[b'\n'; (64 << 10) + 1]);
    let error = Settings::load_from(&main, true).unwrap_err();
    assert!(
        matches!(&error, SettingsError::Read { source, .. } if source.kind() == io::ErrorKind::FileTooLarge),
        "{error}"
    );
    scratch.write("config.toml", b"");
    for number in 0..64 {
        scratch.write(&format!("config.d/{number}.toml"), b"");
    }
    assert!(Settings::load_from(&main, true).is_ok());
    scratch.write("config.d/a.toml", b"");
    assert!(matches!(Settings::load_from(&main, true), Err(SettingsError::DropIns(_))));
    assert!(Settings::load_from(Path::new("/dev/zero"), true).is_err());
    assert!(Settings::load_from(scratch.path(), true).is_err());
}
