//! What a VM is: the one description that every front door (a file, an inherited descriptor, the CLI, the shim)
//! fills in, and its validated form.
//!
//! [`Config`] is what was typed: plain values, unknown keys refused. [`Config::validate`] turns it into
//! [`ValidConfig`], whose newtypes cannot hold a value the machine could not be built with.

pub mod interface;

use std::os::fd::RawFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use self::interface::{Interface, InterfaceError, ValidInterface};

const MIB: u64 = 1 << 20;

/// A VM as described by a user or a caller. JSON, see `docs/vmm.md`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Kernel image: an x86-64 ELF `vmlinux`, or a bzImage.
    pub kernel: PathBuf,
    /// Initial RAM file system, an uncompressed cpio archive.
    #[serde(default)]
    pub initramfs: Option<PathBuf>,
    /// Appended to the kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Shows the guest's serial console on standard error.
    #[serde(default)]
    pub console: bool,
    /// The pod's virtio-fs share; none without it.
    #[serde(default)]
    pub share: Option<Share>,
    /// The vsock device's socket on the host; no device without it.
    #[serde(default)]
    pub vsock: Option<PathBuf>,
    /// Network interfaces, each over a tap.
    #[serde(default)]
    pub net: Vec<Interface>,
    /// The host's kernel moves the interfaces' frames, where it has vhost-net.
    #[serde(default = "default_vhost_net")]
    pub vhost_net: bool,
    /// Control socket of the VMM; none without it.
    #[serde(default)]
    pub control: Option<PathBuf>,
    /// Read end of a pipe whose other end the owner holds: its closing means that the owner is gone.
    #[serde(default)]
    pub lifeline_fd: Option<RawFd>,
    /// Directory that belongs to the pod alone. When the owner dies it is removed, with the files and empty
    /// directories in it: nobody else is left to do that.
    #[serde(default)]
    pub state_dir: Option<PathBuf>,
    /// Milliseconds from the VMM's start until the guest must have reached PID 1; 0 waits for ever.
    #[serde(default = "default_boot_timeout_ms")]
    pub boot_timeout_ms: u64,
    /// The VMM gives up all that its guest does not need, before the guest runs. Off is for debugging.
    #[serde(default = "default_jail")]
    pub jail: bool,
}

fn default_boot_timeout_ms() -> u64 {
    60_000
}

fn default_vhost_net() -> bool {
    true
}

fn default_jail() -> bool {
    true
}

/// Directory tree shown to the guest over virtio-fs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// Empty directory of the host on which the tree is built, in the VMM's own mount namespace.
    pub root: PathBuf,
    pub entries: Vec<ShareEntry>,
}

/// One directory or file of the host that appears as `name` at the top of the share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareEntry {
    pub name: String,
    pub source: PathBuf,
    #[serde(default)]
    pub read_only: bool,
}

/// A [`Config`] that a machine can be built from.
#[derive(Debug, Clone)]
pub struct ValidConfig {
    pub kernel: PathBuf,
    pub initramfs: Option<PathBuf>,
    pub cmdline: String,
    pub memory: MemorySize,
    pub vcpus: VcpuCount,
    pub console: bool,
    pub share: Option<Share>,
    pub vsock: Option<PathBuf>,
    pub net: Vec<ValidInterface>,
    pub vhost_net: bool,
    pub control: Option<PathBuf>,
    pub lifeline_fd: Option<RawFd>,
    pub state_dir: Option<PathBuf>,
    pub boot_timeout_ms: u64,
    pub jail: bool,
}

/// Why a [`Config`] cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("Configuration cannot be read")]
    Read(#[source] std::io::Error),
    #[error("Configuration is not valid JSON of the documented form")]
    Parse(#[source] serde_json::Error),
    #[error("Guest memory of {0} MiB is out of range: give {min} to {max} MiB", min = MemorySize::MIN_MIB, max = MemorySize::MAX_MIB)]
    Memory(u64),
    #[error("{0} virtual CPUs are out of range: give 1 to {max}", max = VcpuCount::MAX)]
    Vcpus(u32),
    #[error("Kernel command line addition is not printable ASCII, or over {MAX_CMDLINE} bytes")]
    Cmdline,
    #[error("Share entry name {0:?} is not a single file name")]
    ShareName(String),
    #[error("Share entry name {0:?} is used twice")]
    ShareNameTwice(String),
    #[error("Network interfaces cannot be used")]
    Net(#[source] InterfaceError),
}

/// Longest addition to the kernel command line: the kernel's own limit is 2,048 bytes in all, krx needs some.
pub const MAX_CMDLINE: usize = 1024;

/// Guest memory, a whole number of MiB in a range that boots and that KVM can map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize(u64);

impl MemorySize {
    /// The kernel's image lies from 16 to 29 MiB. Of 32 MiB some 5 are left for containers.
    pub const MIN_MIB: u64 = 32;
    /// 1 TiB: above, the memory map's single high region would leave the smallest physical address width (40 bits).
    pub const MAX_MIB: u64 = 1 << 20;

    /// # Errors
    /// [`ConfigError::Memory`] out of the range.
    pub fn from_mib(mib: u64) -> Result<Self, ConfigError> {
        if (Self::MIN_MIB..=Self::MAX_MIB).contains(&mib) {
            Ok(Self(mib))
        } else {
            Err(ConfigError::Memory(mib))
        }
    }

    /// The nearest size to so many MiB.
    #[must_use]
    pub const fn clamped(mib: u64) -> Self {
        match mib {
            0..Self::MIN_MIB => Self(Self::MIN_MIB),
            Self::MIN_MIB..=Self::MAX_MIB => Self(mib),
            _ => Self(Self::MAX_MIB),
        }
    }

    #[must_use]
    pub fn bytes(self) -> u64 {
        self.0 * MIB
    }

    #[must_use]
    pub fn mib(self) -> u64 {
        self.0
    }
}

/// Number of virtual CPUs, 1 to [`VcpuCount::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct VcpuCount(u8);

impl VcpuCount {
    /// The guest kernel is built for so many (`CONFIG_NR_CPUS`).
    pub const MAX: u32 = 8;

    /// # Errors
    /// [`ConfigError::Vcpus`] out of the range.
    pub fn new(count: u32) -> Result<Self, ConfigError> {
        match u8::try_from(count) {
            Ok(small) if (1..=Self::MAX).contains(&count) => Ok(Self(small)),
            _ => Err(ConfigError::Vcpus(count)),
        }
    }

    /// The nearest number to `count`.
    #[must_use]
    pub fn clamped(count: u64) -> Self {
        let most = u64::from(Self::MAX);
        Self(u8::try_from(count.clamp(1, most)).unwrap_or(u8::MAX))
    }

    #[must_use]
    pub fn get(self) -> u8 {
        self.0
    }
}

impl Config {
    /// Reads a configuration from JSON.
    ///
    /// # Errors
    /// [`ConfigError::Parse`], with line and column in its source.
    pub fn from_json(json: &[u8]) -> Result<Self, ConfigError> {
        serde_json::from_slice(json).map_err(ConfigError::Parse)
    }

    /// Checks every value; touches nothing outside.
    ///
    /// # Errors
    /// The first value that is out of its range.
    pub fn validate(self) -> Result<ValidConfig, ConfigError> {
        let printable = self.cmdline.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if !printable || self.cmdline.len() > MAX_CMDLINE {
            return Err(ConfigError::Cmdline);
        }
        if let Some(share) = &self.share {
            validate_entries(&share.entries)?;
        }
        Ok(ValidConfig {
            memory: MemorySize::from_mib(self.memory_mib)?,
            vcpus: VcpuCount::new(self.vcpus)?,
            kernel: self.kernel,
            initramfs: self.initramfs,
            cmdline: self.cmdline,
            console: self.console,
            share: self.share,
            vsock: self.vsock,
            net: interface::validate(&self.net, self.lifeline_fd).map_err(ConfigError::Net)?,
            vhost_net: self.vhost_net,
            control: self.control,
            lifeline_fd: self.lifeline_fd,
            state_dir: self.state_dir,
            boot_timeout_ms: self.boot_timeout_ms,
            jail: self.jail,
        })
    }
}

fn validate_entries(entries: &[ShareEntry]) -> Result<(), ConfigError> {
    let mut seen = std::collections::HashSet::new();
    for ShareEntry { name, .. } in entries {
        let single =
            !matches!(name.as_str(), "" | "." | "..") && !name.contains(['/', '\0']) && name.len() <= 255;
        if !single {
            return Err(ConfigError::ShareName(name.clone()));
        }
        if !seen.insert(name) {
            return Err(ConfigError::ShareNameTwice(name.clone()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config::from_json(br#"{"kernel":"/k","memory_mib":128,"vcpus":1}"#).unwrap()
    }

    #[test]
    fn memory_out_of_range_is_refused() {
        for mib in [0, 1, 31, (1 << 20) + 1, 1 << 30, u64::MAX] {
            let result = Config { memory_mib: mib, ..config() }.validate();
            assert!(matches!(result, Err(ConfigError::Memory(m)) if m == mib));
        }
    }

    #[test]
    fn vcpus_out_of_range_are_refused() {
        for vcpus in [0, 9, 256, 257, 1000, u32::MAX] {
            let result = Config { vcpus, ..config() }.validate();
            assert!(matches!(result, Err(ConfigError::Vcpus(v)) if v == vcpus));
        }
    }

    #[test]
    fn clamped_values_are_valid() {
        for mib in [0, 1, 31, 32, 256, 1 << 20, (1 << 20) + 1, u64::MAX] {
            assert_eq!(
                MemorySize::from_mib(MemorySize::clamped(mib).mib()).unwrap(),
                MemorySize::clamped(mib)
            );
        }
        for (count, vcpus) in [(0, 1), (1, 1), (8, 8), (9, 8), (256, 8), (u64::MAX, 8)] {
            assert_eq!(VcpuCount::clamped(count).get(), vcpus);
        }
    }

    #[test]
    fn negative_and_unknown_values_do_not_parse() {
        assert!(Config::from_json(br#"{"kernel":"/k","memory_mib":-1,"vcpus":1}"#).is_err());
        assert!(Config::from_json(br#"{"kernel":"/k","memory_mib":128,"vcpus":1,"colour":"red"}"#).is_err());
    }

    #[test]
    fn share_names_must_be_single_and_unique() {
        let entry = |name: &str| ShareEntry { name: name.into(), source: "/".into(), read_only: false };
        let with = |entries| Config { share: Some(Share { root: "/r".into(), entries }), ..config() };
        for bad in ["", ".", "..", "a/b", "a\0"] {
            assert!(matches!(with(vec![entry(bad)]).validate(), Err(ConfigError::ShareName(_))), "{bad:?}");
        }
        assert!(matches!(with(vec![entry("a"), entry("a")]).validate(), Err(ConfigError::ShareNameTwice(_))));
    }

    #[test]
    fn command_line_additions_are_printable_and_short() {
        assert!(Config { cmdline: "a\nb".into(), ..config() }.validate().is_err());
        assert!(Config { cmdline: "a".repeat(MAX_CMDLINE + 1), ..config() }.validate().is_err());
    }

    #[test]
    fn interfaces_are_read_and_checked() {
        let with = |net: &str| {
            let json = format!(r#"{{"kernel":"/k","memory_mib":128,"vcpus":1,"lifeline_fd":4,"net":{net}}}"#);
            Config::from_json(json.as_bytes())
        };
        let valid = with(r#"[{"tap_fd":5,"mac":"02:00:00:00:00:01"}]"#).unwrap().validate().unwrap();
        assert_eq!((valid.net[0].tap_fd, valid.net[0].mtu.get()), (5, 1500));
        assert!(with(r#"[{"tap_fd":5,"mac":"02:00:00:00:00:01","speed":10}]"#).is_err());
        assert!(with(r#"[{"mac":"02:00:00:00:00:01"}]"#).is_err());
        let lifeline = with(r#"[{"tap_fd":4,"mac":"02:00:00:00:00:01"}]"#).unwrap();
        assert!(matches!(lifeline.validate(), Err(ConfigError::Net(InterfaceError::DescriptorTwice(4)))));
    }
}
