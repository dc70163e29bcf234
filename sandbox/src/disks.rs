//! Disks of a container: files and block devices of the host that its guest gets as block devices, and reads by itself.
//!
//! They come when the container does, to a VM that may run already, and go with it. The host looks at nothing that is on them: a
//! file system is for the guest's kernel to mount, which has nothing to lose but its own pod.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use krx_proto::{Disk, DiskUse, ErrorKind, MAX_DISKS, Request};
use nix::sys::stat::{major, minor};

use crate::agent::{AgentClient, CallError, Pending};
use crate::vmm_process::{VmmError, VmmProcess};

/// How long a guest may take to let go of a disk: to write what it has not written yet.
const RELEASE: Duration = Duration::from_secs(10);
/// How long the next question waits after one that found it in use.
const ASK_AGAIN: Duration = Duration::from_millis(5);

/// Why a container cannot have a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("Container has more than {MAX_DISKS} disks")]
    TooMany,
    #[error("linux.devices: {node} is to be block device {major}:{minor}, which this host does not have")]
    NoDevice { node: String, major: u64, minor: u64 },
    #[error("{path} cannot be opened to be a disk of the guest{}", in_use(.source))]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{0} cannot be a disk of the guest: it is neither a block device nor a file")]
    Kind(PathBuf),
    #[error("{path} does not become a disk of the guest")]
    Attach {
        path: PathBuf,
        #[source]
        source: VmmError,
    },
}

fn in_use(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ResourceBusy => " (the host has it mounted, or another pod has it)",
        _ => "",
    }
}

/// What a disk's content is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A block device, or an image in a file.
    Path(PathBuf),
    /// A block device by its numbers.
    Numbers(u64, u64),
}

/// A disk that a container is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDisk {
    pub source: Source,
    pub read_only: bool,
    pub is: DiskUse,
}

/// Disks of a container that its VM has: by their slots.
#[derive(Debug, Clone, Default)]
pub struct Attached(Vec<u32>);

impl HostDisk {
    fn path(&self) -> Result<PathBuf, DiskError> {
        match &self.source {
            Source::Path(path) => Ok(path.clone()),
            Source::Numbers(major, minor) => find(*major, *minor).ok_or_else(|| DiskError::NoDevice {
                node: self.is.node().unwrap_or_default().into(),
                major: *major,
                minor: *minor,
            }),
        }
    }

    fn open(&self, path: &Path) -> Result<File, DiskError> {
        let failed = |source| DiskError::Open { path: path.into(), source };
        let kind = path.metadata().map_err(failed)?.file_type();
        if !kind.is_block_device() && !kind.is_file() {
            return Err(DiskError::Kind(path.into()));
        }
        // A file system has one kernel that writes it: with O_EXCL another's claim to the device is an error, and so is a later one.
        let is_root = matches!(self.is, DiskUse::Root { .. });
        let claim = if kind.is_block_device() && is_root && !self.read_only { libc::O_EXCL } else { 0 };
        let mut options = File::options();
        options.read(true).write(!self.read_only).custom_flags(claim | libc::O_NONBLOCK);
        let file = options.open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let is_same = match self.source {
            Source::Path(_) => metadata.file_type() == kind,
            Source::Numbers(wanted, number) => {
                (major(metadata.rdev()), minor(metadata.rdev())) == (wanted, number)
            }
        };
        if is_same { Ok(file) } else { Err(DiskError::Kind(path.into())) }
    }
}

/// The node of a block device, as the host's kernel names it.
fn find(major: u64, minor: u64) -> Option<PathBuf> {
    let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(Path::new("/dev").join(name))
}

impl Attached {
    /// Gives `disks` to the VM, and says to `spec` where they are. What fails leaves none.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn attach(disks: &[HostDisk], vmm: &VmmProcess) -> Result<(Self, Vec<Disk>), DiskError> {
        if disks.len() > MAX_DISKS {
            return Err(DiskError::TooMany);
        }
        let (mut attached, mut found) = (Self::default(), Vec::new());
        for disk in disks {
            let one = || -> Result<Disk, DiskError> {
                let path = disk.path()?;
                let file = disk.open(&path)?;
                let place = vmm.attach_disk(&file, disk.read_only);
                let place = place.map_err(|source| DiskError::Attach { path, source })?;
                Ok(Disk { slot: place.slot, address: place.address, irq: place.irq, is: disk.is.clone() })
            };
            match one() {
                Ok(disk) => {
                    attached.0.push(disk.slot);
                    found.push(disk);
                }
                Err(error) => {
                    attached.detach(None, vmm);
                    return Err(error);
                }
            }
        }
        Ok((attached, found))
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes the disks away, after the guest has let go of them if there is somebody to ask. One that does not within
    /// [`RELEASE`] loses what it has not written, as by a cable that is pulled.
    pub fn detach(&self, agent: Option<&AgentClient>, vmm: &VmmProcess) {
        for slot in &self.0 {
            if let Some(agent) = agent {
                release(agent, *slot);
            }
            // A VMM that has ended has closed them all.
            let _ = vmm.detach_disk(*slot);
        }
    }
}

/// Waits until the guest has let go of a disk, or until it is clear that it does not.
fn release(agent: &AgentClient, slot: u32) {
    let deadline = Instant::now() + RELEASE;
    loop {
        let released = agent.send(Request::ReleaseDisk { slot }).and_then(Pending::done);
        let in_use = matches!(&released, Err(CallError::Agent(error)) if error.kind == ErrorKind::WrongState);
        if !in_use || Instant::now() >= deadline {
            return;
        }
        thread::sleep(ASK_AGAIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scratch;

    fn disk(source: Source, read_only: bool) -> HostDisk {
        let is = DiskUse::Root { kind: "ext4".into(), options: Vec::new() };
        HostDisk { source, read_only, is }
    }

    #[test]
    fn only_files_and_block_devices_are_opened() {
        let scratch = Scratch::new("disks");
        let image = scratch.write("image", b"x");
        let fifo = scratch.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        let open = |path: &Path| disk(Source::Path(path.into()), false).open(path);
        assert!(open(&image).is_ok());
        for path in [scratch.path(), &fifo, Path::new("/dev/null")] {
            assert!(matches!(open(path), Err(DiskError::Kind(_))), "{}", path.display());
        }
        let missing = open(&scratch.path().join("missing")).unwrap_err();
        assert!(missing.to_string().contains("missing"), "{missing}");
    }

    #[test]
    fn what_is_read_only_is_opened_so() {
        use std::io::Write;

        let scratch = Scratch::new("disks");
        let image = scratch.write("image", b"x");
        let mut file = disk(Source::Path(image.clone()), true).open(&image).unwrap();
        assert!(file.write_all(b"y").is_err());
    }

    #[test]
    fn numbers_without_a_device_are_named() {
        let error = disk(Source::Numbers(4095, 7), false).path().unwrap_err().to_string();
        assert!(error.starts_with("linux.devices: ") && error.contains("block device 4095:7"), "{error}");
        // Another device has come to have the name.
        let scratch = Scratch::new("disks");
        let image = scratch.write("image", b"x");
        assert!(matches!(disk(Source::Numbers(4095, 7), true).open(&image), Err(DiskError::Kind(_))));
    }
}
