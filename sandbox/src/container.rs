//! A container as the host describes it: what the agent is told, and the host's files that have to be shared for it.
//!
//! The two belong together: a mount in the specification names a path in the guest, which exists because an entry
//! of the share has that name. Whether a path exists is checked here, before anything is started.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use krx_proto::{ContainerSpec, DiskUse, Mount, SHARE_PATH};
use krx_vmm::config::ShareEntry;

use crate::disks::{DiskError, HostDisk};
use crate::volume::{Volume, VolumeError};
use crate::{default_spec, mount_points};

/// Name in the share of the container's root.
const ROOTFS: &str = "rootfs";

/// Why a container cannot be made of what was given.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    #[error(transparent)]
    Volume(VolumeError),
    #[error("Root file system {path} cannot be used: give the directory that has the container's files")]
    Rootfs {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Root file system {0} is not a directory: give the one that has the container's files")]
    NotDirectory(PathBuf),
    #[error("Container cannot have its disks")]
    Disk(#[source] DiskError),
    #[error("{0} is mounted on twice: leave one of them out")]
    Twice(String),
    #[error(
        "{path} is missing in the root file system {rootfs}, which is to be read-only, and cannot be made"
    )]
    MountPoint {
        path: String,
        rootfs: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A container and what it needs of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// `rootfs` and the sources of bind mounts are paths in the guest.
    pub spec: ContainerSpec,
    /// The root file system, then volumes.
    shared: Vec<ShareEntry>,
    /// What its names in the share begin with: those of several containers must differ.
    prefix: String,
    disks: Vec<HostDisk>,
}

impl Container {
    /// A container with the defaults of krx on a root file system.
    ///
    /// # Errors
    /// `rootfs` is not a directory that can be used.
    pub fn on_rootfs(name: &str, rootfs: &Path) -> Result<Self, ContainerError> {
        Self::new(default_spec::container(name), rootfs, "")
    }

    /// A container as `spec` says, whose `rootfs` is still to be shared. Its names in the share begin with `prefix`.
    ///
    /// # Errors
    /// As [`Self::on_rootfs`].
    pub fn new(mut spec: ContainerSpec, rootfs: &Path, prefix: &str) -> Result<Self, ContainerError> {
        let failed = |source| ContainerError::Rootfs { path: rootfs.into(), source };
        let source = rootfs.canonicalize().map_err(failed)?;
        if !fs::metadata(&source).map_err(failed)?.is_dir() {
            return Err(ContainerError::NotDirectory(rootfs.into()));
        }
        let name = format!("{prefix}{ROOTFS}");
        spec.rootfs = format!("{SHARE_PATH}/{name}");
        let shared = vec![ShareEntry { name, source, read_only: false }];
        Ok(Self { spec, shared, prefix: prefix.into(), disks: Vec::new() })
    }

    /// Shares a directory or file of the host and returns where the guest finds it.
    pub fn share(&mut self, source: PathBuf, read_only: bool) -> String {
        let name = format!("{}volume-{}", self.prefix, self.shared.len());
        let path = format!("{SHARE_PATH}/{name}");
        self.shared.push(ShareEntry { name, source, read_only });
        path
    }

    /// Gives it a disk. With one that is its root, what is in the root's directory on the host is no concern of it.
    pub fn add_disk(&mut self, disk: HostDisk) {
        self.disks.push(disk);
    }

    #[must_use]
    pub fn disks(&self) -> &[HostDisk] {
        &self.disks
    }

    fn has_root_on_disk(&self) -> bool {
        self.disks.iter().any(|disk| matches!(disk.is, DiskUse::Root { .. }))
    }

    /// Mounts volumes over all other mounts, those nearer to the root first.
    ///
    /// # Errors
    /// Two of them have the same destination.
    pub fn add_volumes(&mut self, mut volumes: Vec<Volume>) -> Result<(), ContainerError> {
        volumes.sort_by_key(|volume| volume.destination.split('/').count());
        for (index, volume) in volumes.iter().enumerate() {
            if volumes[..index].iter().any(|other| other.destination == volume.destination) {
                return Err(ContainerError::Twice(volume.destination.clone()));
            }
        }
        for Volume { source, destination, read_only } in volumes {
            let source = self.share(source, read_only);
            let access = if read_only { "ro" } else { "rw" };
            let options = vec!["rbind".into(), access.into()];
            self.spec.mounts.push(Mount { destination, kind: "bind".into(), source, options, id_map: None });
        }
        Ok(())
    }

    /// To be called when all mounts are known. A root that the container may not write is shared so that its guest
    /// cannot either; then the guest can make no mount points in it, and those that are missing are made here.
    ///
    /// # Errors
    /// A mount point cannot be made.
    pub fn finish(&mut self) -> Result<(), ContainerError> {
        if !self.spec.root_readonly || self.has_root_on_disk() {
            return Ok(());
        }
        let mounts = &self.spec.mounts;
        let covered = |path: &str| mounts.iter().any(|mount| is_below(path, &mount.destination));
        let places = mounts.iter().map(|mount| (&mount.destination, self.is_directory(mount)));
        for (path, directory) in
            places.chain([(&self.spec.process.cwd, true)]).filter(|(path, _)| !covered(path))
        {
            mount_points::make(self.rootfs(), path, directory).map_err(|source| {
                ContainerError::MountPoint { path: path.clone(), rootfs: self.rootfs().into(), source }
            })?;
        }
        if let Some(rootfs) = self.shared.first_mut() {
            rootfs.read_only = true;
        }
        Ok(())
    }

    /// Whether `mount` shows a directory; all but files of the host do.
    fn is_directory(&self, mount: &Mount) -> bool {
        let name = mount.source.strip_prefix(SHARE_PATH).map(|name| name.trim_start_matches('/'));
        let shared =
            self.shared.iter().find(|entry| mount.kind == "bind" && Some(entry.name.as_str()) == name);
        shared.is_none_or(|entry| entry.source.is_dir())
    }

    /// The root file system on the host.
    #[must_use]
    pub fn rootfs(&self) -> &Path {
        self.shared.first().map_or_else(|| Path::new("/"), |entry| &entry.source)
    }

    /// Entries of the pod's share.
    #[must_use]
    pub fn shared(&self) -> &[ShareEntry] {
        let without_root = usize::from(self.has_root_on_disk()).min(self.shared.len());
        &self.shared[without_root..]
    }
}

/// Whether `path` lies in the directory `above`.
fn is_below(path: &str, above: &str) -> bool {
    path.strip_prefix(above.trim_end_matches('/')).is_some_and(|rest| rest.len() > 1 && rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scratch;

    fn volume(destination: &str, read_only: bool) -> Volume {
        Volume { source: "/tmp".into(), destination: destination.into(), read_only }
    }

    #[test]
    fn rootfs_has_to_be_a_directory() {
        let scratch = Scratch::new("container");
        let file = scratch.write("file", b"");
        assert!(matches!(Container::on_rootfs("c", &file), Err(ContainerError::NotDirectory(_))));
        let missing = scratch.path().join("missing");
        let error = Container::on_rootfs("c", &missing).unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
    }

    #[test]
    fn volumes_become_share_entries_and_mounts() {
        let scratch = Scratch::new("container");
        let mut container = Container::on_rootfs("c", scratch.path()).unwrap();
        container.add_volumes(vec![volume("/a/b", true), volume("/a", false)]).unwrap();
        let mounts: Vec<_> =
            container.spec.mounts.iter().filter(|mount| mount.kind == "bind").cloned().collect();
        assert_eq!(mounts[0].destination, "/a");
        assert_eq!(mounts[1].source, "/run/krx/share/volume-2");
        assert!(mounts[1].options.contains(&"ro".into()));
        let names: Vec<_> = container.shared().iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["rootfs", "volume-1", "volume-2"]);
        assert!(container.shared()[2].read_only);
    }

    #[test]
    fn read_only_root_is_shared_read_only_with_its_mount_points() {
        let scratch = Scratch::new("container");
        let mut container = Container::on_rootfs("c", scratch.path()).unwrap();
        let file = scratch.write("file", b"");
        let of =
            |destination: &str, source: &Path| Volume { source: source.into(), ..volume(destination, false) };
        container.add_volumes(vec![of("/data/in", Path::new("/tmp")), of("/etc/one", &file)]).unwrap();
        container.finish().unwrap();
        assert!(!container.shared()[0].read_only && !scratch.path().join("data").exists());
        container.spec.root_readonly = true;
        container.finish().unwrap();
        assert!(container.shared()[0].read_only && !container.shared()[1].read_only);
        assert!(scratch.path().join("data/in").is_dir() && scratch.path().join("etc/one").is_file());
        // Covered by the file system on /dev.
        assert!(scratch.path().join("dev").is_dir() && !scratch.path().join("dev/pts").exists());
    }

    #[test]
    fn a_root_on_a_disk_is_not_shared_and_not_touched() {
        let scratch = Scratch::new("container");
        let mut container = Container::on_rootfs("c", scratch.path()).unwrap();
        container.add_volumes(vec![volume("/data", true)]).unwrap();
        container.spec.root_readonly = true;
        let source = crate::disks::Source::Path("/image".into());
        let is = DiskUse::Root { kind: "erofs".into(), options: Vec::new() };
        container.add_disk(HostDisk { source, read_only: true, is });
        container.finish().unwrap();
        let names: Vec<_> = container.shared().iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["volume-1"]);
        assert_eq!(container.share("/tmp".into(), true), "/run/krx/share/volume-2");
        assert!(std::fs::read_dir(scratch.path()).unwrap().next().is_none());
    }

    #[test]
    fn destinations_are_used_once() {
        let scratch = Scratch::new("container");
        let mut container = Container::on_rootfs("c", scratch.path()).unwrap();
        let twice = vec![volume("/a", true), volume("/a", false)];
        assert!(matches!(container.add_volumes(twice), Err(ContainerError::Twice(_))));
    }
}
