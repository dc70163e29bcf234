//! The pod's shared memory: one tmpfs that every container of the pod may have as its `/dev/shm`.

use std::fs;

use krx_proto::AgentError;
use nix::mount::{MsFlags, mount};

use crate::error::{Doing, StepError, invalid};

/// Where it is mounted in the guest, for containers to have it bound.
pub(crate) const PATH: &std::ffi::CStr = c"/run/krx/shm";

/// What it is mounted for.
const MOUNT_POINT: &str = "/run/krx/shm";
/// Its size unless asked otherwise: what containerd and Docker give.
const DEFAULT_SIZE: u64 = 64 << 20;

/// Whether the pod has it yet: it is made for the first container that asks for it.
#[derive(Debug, Default)]
pub(crate) struct SharedMemory {
    is_mounted: bool,
}

impl SharedMemory {
    /// Mounts it, unless that is done: its size is the first one's.
    pub(crate) fn provide(&mut self, size: u64) -> Result<(), StepError> {
        if self.is_mounted {
            return Ok(());
        }
        let doing = || format!("Cannot mount the pod's shared memory on {MOUNT_POINT}");
        fs::create_dir_all(MOUNT_POINT).doing(doing)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let options = format!("mode=1777,size={size}");
        mount(Some("shm"), MOUNT_POINT, Some("tmpfs"), flags, Some(options.as_str())).doing(doing)?;
        self.is_mounted = true;
        Ok(())
    }
}

/// The size that a mount of it asks for by its options.
pub(crate) fn size(parameters: &[(String, Option<String>)]) -> Result<u64, AgentError> {
    parameters.iter().try_fold(DEFAULT_SIZE, |_, (name, value)| {
        let value = value.as_deref().unwrap_or_default();
        let bytes = if name == "size" { bytes(value) } else { None };
        bytes.ok_or_else(|| invalid(format_args!("mounts: shared memory has no option {name}={value}")))
    })
}

/// A number of bytes as tmpfs reads it: digits, and perhaps one of `k`, `m` and `g`. Not zero, which would be no limit.
fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.to_ascii_lowercase().chars().last()? {
        'k' => (&text[..text.len() - 1], 10),
        'm' => (&text[..text.len() - 1], 20),
        'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number = digits.parse::<u64>().ok().filter(|_| is_number)?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, value: Option<&str>) -> Result<u64, AgentError> {
        size(&[(name.into(), value.map(str::to_string))])
    }

    #[test]
    fn sizes_are_read_as_tmpfs_does() {
        assert_eq!(size(&[]).unwrap(), 64 << 20);
        let sizes =
            [("4096", 4096), ("64k", 64 << 10), ("65536K", 64 << 20), ("3m", 3 << 20), ("2G", 2 << 30)];
        for (text, bytes) in sizes {
            assert_eq!(of("size", Some(text)).unwrap(), bytes, "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        let bad = [
            "",
            "0",
            "0k",
            "k",
            "-1",
            "+1",
            "1.5m",
            "1kk",
            "50%",
            "1 m",
            "1,mode=0777",
            "99999999999999999999",
            "18446744073709551615g",
            "\u{e4}",
            "1\u{212a}",
        ];
        for text in bad {
            assert!(of("size", Some(text)).is_err(), "{text:?}");
        }
        assert!(of("size", None).is_err());
        assert!(of("mode", Some("777")).is_err() && of("nr_inodes", Some("1")).is_err());
    }
}
