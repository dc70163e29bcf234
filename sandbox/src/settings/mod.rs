//! What a node's administrator decides: `/etc/krx/config.toml`, and the files `*.toml` of the directory `config.d` beside it, in the
//! order of their names. `dist/config.toml` documents each key.
//!
//! A file is typed text ([`file`]), [`Settings`] are valid. [`annotations`] reads what a pod asks for within them, and
//! [`size`] makes a VM's size of both. Without a file the defaults hold. Nothing is looked up here that a setting names:
//! [`crate::artifacts`] does.

pub mod annotations;
mod file;
pub mod size;
pub mod units;

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use krx_vmm::config::{MemorySize, VcpuCount};
use nix::fcntl::OFlag;

use self::annotations::Annotation;
use self::file::{Fault, File};
use self::units::KernelArgs;
use crate::plain_file::read_capped;

/// Where the settings are.
pub const PATH: &str = "/etc/krx/config.toml";
/// Names another file.
pub const VARIABLE: &str = "KRX_CONFIG";
/// The longest file: each start reads it.
const MAX_FILE: u64 = 64 << 10;
/// The most drop-ins, for the same reason.
const MAX_DROP_INS: usize = 64;

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("{path} cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path}:{line}: {what}. Mend this line, or leave it out for the default")]
    Invalid { path: PathBuf, line: usize, what: String },
    #[error("{0} has over {MAX_DROP_INS} files: put their settings together")]
    DropIns(PathBuf),
    #[error("{path}: {key} is {value}, over {limit_key}, which is {limit}: lower the one or raise the other")]
    OverLimit { path: PathBuf, key: &'static str, value: u64, limit_key: &'static str, limit: u64 },
}

/// All settings of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub guest: GuestSettings,
    pub vm: VmSettings,
    /// The VMM's program.
    pub vmm: Place,
    /// What pods may ask for.
    pub annotations: BTreeSet<Annotation>,
    /// How much the shim logs.
    pub log_level: LogLevel,
}

/// What is booted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestSettings {
    pub kernel: Place,
    pub initramfs: Place,
    /// Appended to the guest kernel's command line.
    pub kernel_args: KernelArgs,
}

/// What a VM has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSettings {
    /// Without a limit of the pod, or an option of `krx run`.
    pub memory: MemorySize,
    /// Added to a pod's limits, for the guest's kernel and agent.
    pub overhead: OverheadMib,
    pub cpus: VcpuCount,
    /// The most that a pod gets, whatever it asks for.
    pub max_memory: MemorySize,
    pub max_cpus: VcpuCount,
    /// See [`crate::pod::PodConfig::boot_timeout`].
    pub boot_timeout: Duration,
    /// Shows the guest kernel's console.
    pub console: bool,
    /// The host's kernel moves the pods' frames, where it has vhost-net.
    pub vhost_net: bool,
}

/// Where a file is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Place {
    /// Where krx's own is, beside the program.
    #[default]
    Installed,
    At(PathBuf),
}

impl Place {
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Installed => None,
            Self::At(path) => Some(path),
        }
    }
}

/// What the guest's kernel and agent take of a VM's memory, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OverheadMib(u64);

/// A number of MiB that no VM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Overhead of {0} MiB is out of range: give 0 to {max}", max = MemorySize::MAX_MIB)]
pub struct OverheadError(u64);

impl OverheadMib {
    /// # Errors
    /// More than the largest VM has.
    pub fn new(mib: u64) -> Result<Self, OverheadError> {
        if mib <= MemorySize::MAX_MIB { Ok(Self(mib)) } else { Err(OverheadError(mib)) }
    }

    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }
}

/// A time that no boot should get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Boot timeout of {0} seconds is out of range: give 1 to {MAX_BOOT_TIMEOUT_S}")]
pub struct BootTimeoutError(u64);

const MAX_BOOT_TIMEOUT_S: u64 = 86_400;

/// A boot timeout in seconds.
///
/// # Errors
/// None, or more than a day.
pub fn boot_timeout(seconds: u64) -> Result<Duration, BootTimeoutError> {
    if (1..=MAX_BOOT_TIMEOUT_S).contains(&seconds) {
        Ok(Duration::from_secs(seconds))
    } else {
        Err(BootTimeoutError(seconds))
    }
}

/// How much is logged, by the names that containerd uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            guest: GuestSettings::default(),
            vm: VmSettings::default(),
            vmm: Place::default(),
            annotations: BTreeSet::from([Annotation::Cpus, Annotation::Memory]),
            log_level: LogLevel::default(),
        }
    }
}

impl Default for VmSettings {
    fn default() -> Self {
        Self {
            memory: MemorySize::clamped(256),
            overhead: OverheadMib(64),
            cpus: VcpuCount::clamped(1),
            max_memory: MemorySize::clamped(u64::MAX),
            max_cpus: VcpuCount::clamped(u64::MAX),
            boot_timeout: Duration::from_secs(60),
            console: false,
            vhost_net: true,
        }
    }
}

impl Settings {
    /// Reads the settings of this node.
    ///
    /// # Errors
    /// The first file that cannot be read, or the first value in it that cannot be, with its line. A missing file is
    /// none, unless `KRX_CONFIG` names it.
    pub fn load() -> Result<Self, SettingsError> {
        match env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
            Some(path) => Self::load_from(Path::new(&path), true),
            None => Self::load_from(Path::new(PATH), false),
        }
    }

    /// Reads the settings from `main` and its drop-ins.
    ///
    /// # Errors
    /// As [`Self::load`]; `must_exist` decides on a missing file.
    pub fn load_from(main: &Path, must_exist: bool) -> Result<Self, SettingsError> {
        let mut settings = Self::default();
        match read(main) {
            Err(SettingsError::Read { source, .. })
                if !must_exist && source.kind() == io::ErrorKind::NotFound => {}
            content => settings.apply(main, &content?)?,
        }
        for path in drop_ins(&main.with_extension("d"))? {
            settings.apply(&path, &read(&path)?)?;
        }
        settings.check(main)?;
        Ok(settings)
    }

    /// Changes what one file sets.
    ///
    /// # Errors
    /// [`SettingsError::Invalid`]; `path` is named in it.
    pub fn apply(&mut self, path: &Path, content: &[u8]) -> Result<(), SettingsError> {
        let invalid = |Fault { line, what }| SettingsError::Invalid { path: path.into(), line, what };
        File::parse(content).map_err(invalid)?.apply(self);
        Ok(())
    }

    /// What can be judged only when all files have been read.
    fn check(&self, path: &Path) -> Result<(), SettingsError> {
        let VmSettings { memory, cpus, max_memory, max_cpus, .. } = &self.vm;
        let pairs = [
            ("[vm] memory_mib", memory.mib(), "[vm] max_memory_mib", max_memory.mib()),
            ("[vm] cpus", cpus.get().into(), "[vm] max_cpus", max_cpus.get().into()),
        ];
        match pairs.into_iter().find(|(_, value, _, limit)| value > limit) {
            None => Ok(()),
            Some((key, value, limit_key, limit)) => {
                Err(SettingsError::OverLimit { path: path.into(), key, value, limit_key, limit })
            }
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, SettingsError> {
    // Not blocking: the name may be a pipe's.
    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
    file.and_then(|file| read_capped(file, MAX_FILE))
        .map_err(|source| SettingsError::Read { path: path.into(), source })
}

/// The drop-ins in the order of their names. Hidden files are what editors leave behind.
fn drop_ins(directory: &Path) -> Result<Vec<PathBuf>, SettingsError> {
    let failed = |source| SettingsError::Read { path: directory.into(), source };
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden || path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        if paths.len() == MAX_DROP_INS {
            return Err(SettingsError::DropIns(directory.into()));
        }
        paths.push(path);
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests;
