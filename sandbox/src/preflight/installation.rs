//! Whether krx is installed as a runtime of containerd, as far as files tell: the shim, containerd's configuration, CNI's,
//! and krx's own settings. Nothing is said on a machine that has none of it. containerd itself is not asked.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Finding, Level, finding};
use crate::plain_file::read_capped;
use crate::settings::{Settings, SettingsError};

/// By this name containerd finds the shim.
pub const RUNTIME_TYPE: &str = "io.containerd.krx.v2";
const SHIM: &str = "containerd-shim-krx-v2";
/// Where services look for programs (systemd's own default): the doctor's PATH is that of a login.
const SERVICE_PATH: [&str; 6] = ["usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin", "sbin", "bin"];
/// Largest file of containerd that is read, and how many.
const MAX_FILE: u64 = 1 << 20;
const MAX_FILES: usize = 64;

/// Looks at this machine.
#[must_use]
pub fn check() -> Vec<Finding> {
    check_in(Path::new("/"), Settings::load())
}

fn check_in(root: &Path, settings: Result<Settings, SettingsError>) -> Vec<Finding> {
    let shim = on_service_path(root, SHIM);
    let containerd = on_service_path(root, "containerd").is_some() || root.join("etc/containerd").is_dir();
    let mut found = Vec::new();
    if settings.is_err() || shim.is_some() || root.join("etc/krx").is_dir() {
        found.push(judge_settings(settings));
    }
    let runtime = runtime(root);
    match (containerd, shim) {
        (false, None) => {}
        (true, None) if matches!(runtime, Runtime::Nowhere) => found.push(finding(
            "containerd",
            Level::Note,
            "containerd is installed, krx is not set up as a runtime of it",
            "`krx run` is not concerned; pods of Kubernetes do not run in micro-VMs",
            "To change that: docs/kubernetes.md",
        )),
        (_, shim) => found.extend([judge_shim(shim), judge_runtime(&runtime), judge_cni(root)]),
    }
    found
}

fn on_service_path(root: &Path, program: &str) -> Option<PathBuf> {
    SERVICE_PATH.iter().map(|directory| root.join(directory).join(program)).find(|path| path.is_file())
}

fn judge_settings(settings: Result<Settings, SettingsError>) -> Finding {
    const CHECK: &str = "settings";
    match settings {
        Ok(_) => finding(CHECK, Level::Ok, "krx's settings can be used", "", ""),
        Err(error) => {
            let cause =
                std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
            finding(
                CHECK,
                Level::Error,
                format!("{error}{cause}"),
                "krx does not guess what was meant: no pod is started",
                "Correct the file; dist/config.toml and docs/kubernetes.md tell each key",
            )
        }
    }
}

fn judge_shim(shim: Option<PathBuf>) -> Finding {
    match shim {
        Some(path) => finding("shim", Level::Ok, format!("{} is there", path.display()), "", ""),
        None => finding(
            "shim",
            Level::Warning,
            format!("{SHIM} is in none of the directories where services look for programs"),
            "containerd refuses a pod of krx: runtime \"io.containerd.krx.v2\" binary not installed",
            "make install, or install the package; or add its directory to PATH in containerd's unit",
        ),
    }
}

/// Where containerd's configuration has a runtime of krx's type.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Runtime {
    Configured(PathBuf),
    /// Only in a file of `conf.d` that the main file does not import.
    DropIn(PathBuf),
    Unreadable(PathBuf),
    Nowhere,
}

fn runtime(root: &Path) -> Runtime {
    let directory = root.join("etc/containerd");
    let main = directory.join("config.toml");
    let mut files = vec![main.clone()];
    match table(&main) {
        Some(table) => files.extend(imports(&table, root)),
        None if main.exists() => return Runtime::Unreadable(main),
        None => {}
    }
    let mentions = |path: &PathBuf| table(path).is_some_and(|table| has_runtime(&toml::Value::Table(table)));
    if let Some(path) = files.into_iter().take(MAX_FILES).find(mentions) {
        return Runtime::Configured(path);
    }
    let drop_in = matching(&directory.join("conf.d/*.toml")).into_iter().find(mentions);
    drop_in.map_or(Runtime::Nowhere, Runtime::DropIn)
}

fn table(path: &Path) -> Option<toml::Table> {
    let content = read_capped(fs::File::open(path).ok()?, MAX_FILE).ok()?;
    toml::from_str(str::from_utf8(&content).ok()?).ok()
}

fn imports(table: &toml::Table, root: &Path) -> Vec<PathBuf> {
    let patterns = table.get("imports").and_then(toml::Value::as_array).into_iter().flatten();
    // A relative one counts from the file's own directory, an absolute one from the root.
    let absolute = |pattern: &str| match pattern.strip_prefix('/') {
        Some(rest) => root.join(rest),
        None => root.join("etc/containerd").join(pattern),
    };
    patterns.filter_map(toml::Value::as_str).flat_map(|pattern| matching(&absolute(pattern))).collect()
}

/// Files that a pattern with at most one `*`, in the file's name, means.
fn matching(pattern: &Path) -> Vec<PathBuf> {
    let name = pattern.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let Some((before, behind)) = name.split_once('*') else { return vec![pattern.into()] };
    let entries = pattern.parent().and_then(|directory| fs::read_dir(directory).ok());
    let mut paths: Vec<_> = entries.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| {
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        name.len() >= before.len() + behind.len() && name.starts_with(before) && name.ends_with(behind)
    });
    paths.sort();
    paths.truncate(MAX_FILES);
    paths
}

/// Names of plugins differ among containerd's versions: the key and its value are what counts. The parser bounds the depth.
fn has_runtime(value: &toml::Value) -> bool {
    match value {
        toml::Value::Table(table) => table.iter().any(|(key, value)| {
            (key == "runtime_type" && value.as_str() == Some(RUNTIME_TYPE)) || has_runtime(value)
        }),
        _ => false,
    }
}

fn judge_runtime(runtime: &Runtime) -> Finding {
    const CHECK: &str = "containerd";
    match runtime {
        Runtime::Configured(path) => {
            finding(CHECK, Level::Ok, format!("{} has krx's runtime", path.display()), "", "")
        }
        Runtime::DropIn(path) => finding(
            CHECK,
            Level::Note,
            format!("{} has krx's runtime, and no line `imports` names that file", path.display()),
            "containerd 2.2 and later read it by themselves, earlier ones do not",
            "Before containerd 2.2: imports = [\"/etc/containerd/conf.d/*.toml\"] in /etc/containerd/config.toml",
        ),
        Runtime::Unreadable(path) => finding(
            CHECK,
            Level::Warning,
            format!("{} cannot be read, or is not TOML", path.display()),
            "containerd may not start, and whether it knows krx is not known",
            "Correct it: `containerd config dump` tells what is wrong",
        ),
        Runtime::Nowhere => finding(
            CHECK,
            Level::Warning,
            "No file of containerd's configuration has a runtime of type io.containerd.krx.v2",
            "pods with krx's RuntimeClass fail: no runtime for \"krx\" is configured",
            "Add dist/containerd-1.x.toml or containerd-2.x.toml and restart containerd: docs/kubernetes.md",
        ),
    }
}

fn judge_cni(root: &Path) -> Finding {
    const CHECK: &str = "cni";
    let has = |directory: &str, wanted: fn(&Path) -> bool| {
        let entries = fs::read_dir(root.join(directory)).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).any(|path| wanted(&path))
    };
    let network = |path: &Path| {
        let extension = path.extension().and_then(OsStr::to_str);
        matches!(extension, Some("conf" | "conflist" | "json"))
    };
    if !has("etc/cni/net.d", network) {
        return finding(
            CHECK,
            Level::Warning,
            "/etc/cni/net.d has no network",
            "the node is not ready, and no pod starts: cni plugin not initialized",
            "Install a network of Kubernetes, or put a .conflist there",
        );
    }
    if !has("opt/cni/bin", |_| true) && !has("usr/lib/cni", |_| true) {
        return finding(
            CHECK,
            Level::Warning,
            "Neither /opt/cni/bin nor /usr/lib/cni has plugins",
            "networks of pods cannot be made",
            "Install them (containernetworking-plugins), and set bin_dir in containerd's configuration to where they are",
        );
    }
    finding(CHECK, Level::Ok, "CNI has a network and plugins", "", "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scratch;

    const V1: &[u8] = include_bytes!("../../../dist/containerd-1.x.toml");
    const V2: &[u8] = include_bytes!("../../../dist/containerd-2.x.toml");

    fn levels(scratch: &Scratch) -> Vec<(&'static str, Level)> {
        let settings = Settings::load_from(&scratch.path().join("etc/krx/config.toml"), false);
        let found = check_in(scratch.path(), settings);
        for Finding { level, what, meaning, remedy, .. } in &found {
            assert!(
                *level == Level::Ok || !(what.is_empty() || meaning.is_empty() || remedy.is_empty()),
                "{what}"
            );
        }
        found.into_iter().map(|finding| (finding.check, finding.level)).collect()
    }

    #[test]
    fn bare_machine_is_told_nothing() {
        assert!(levels(&Scratch::new("installation")).is_empty());
    }

    #[test]
    fn node_with_all_of_it_is_well() {
        for config in [V1, V2] {
            let scratch = Scratch::new("installation");
            scratch.write("etc/containerd/config.toml", config);
            scratch.write("usr/local/bin/containerd-shim-krx-v2", b"");
            scratch.write("etc/cni/net.d/10-net.conflist", b"{}");
            scratch.write("opt/cni/bin/bridge", b"");
            scratch.write("etc/krx/config.toml", b"");
            let all = ["settings", "shim", "containerd", "cni"].map(|check| (check, Level::Ok));
            assert_eq!(levels(&scratch), all);
        }
    }

    #[test]
    fn each_missing_part_is_told() {
        let scratch = Scratch::new("installation");
        scratch.write("usr/bin/containerd", b"");
        assert_eq!(levels(&scratch), [("containerd", Level::Note)]);
        scratch.write("usr/bin/containerd-shim-krx-v2", b"");
        let cni = ("cni", Level::Warning);
        let ok = |check| (check, Level::Ok);
        assert_eq!(levels(&scratch), [ok("settings"), ok("shim"), ("containerd", Level::Warning), cni]);
        scratch.write("etc/containerd/config.toml", b"# runtime_type = \"io.containerd.krx.v2\"\n[a\n");
        assert_eq!(levels(&scratch)[2], ("containerd", Level::Warning));
        scratch.write("etc/containerd/config.toml", b"version = 2\n");
        scratch.write("etc/containerd/conf.d/krx.toml", V1);
        assert_eq!(levels(&scratch)[2], ("containerd", Level::Note));
        for imports in ["/etc/containerd/conf.d/*.toml", "conf.d/krx.toml"] {
            scratch.write(
                "etc/containerd/config.toml",
                format!("imports = [\"/x/*\", 7, \"{imports}\"]").as_bytes(),
            );
            assert_eq!(levels(&scratch)[2], ok("containerd"));
        }
        scratch.write("etc/cni/net.d/net.conf", b"");
        assert_eq!(levels(&scratch)[3], cni);
        scratch.write("etc/krx/config.toml", b"[vm]\ncpus = 'all'\n");
        let settings = Settings::load_from(&scratch.path().join("etc/krx/config.toml"), false);
        let found = check_in(scratch.path(), settings).remove(0);
        assert!(found.level == Level::Error && found.what.contains("config.toml:2: "), "{found:?}");
    }

    #[test]
    fn runtime_of_the_configuration_without_a_shim_is_told() {
        let scratch = Scratch::new("installation");
        scratch.write("etc/containerd/config.toml", V2);
        assert_eq!(levels(&scratch)[0], ("shim", Level::Warning));
    }

    #[test]
    fn hostile_configuration_is_no_more_than_unreadable() {
        let scratch = Scratch::new("installation");
        let deep = format!("a = {}", "{a = ".repeat(100_000));
        for content in [deep.as_bytes(), b"\xff", &[b' '; (1 << 20) + 1]] {
            scratch.write("etc/containerd/config.toml", content);
            assert!(matches!(runtime(scratch.path()), Runtime::Unreadable(_)));
        }
    }
}
