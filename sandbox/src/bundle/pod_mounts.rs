//! Bind mounts of a pod that have to be more than directories of the host: its shared memory, and volumes whose files
//! the kubelet replaces.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use krx_proto::{MOUNT_LIVE, MOUNT_SHM, Mount};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::container::Container;
use crate::live_volumes;

/// The mount that stands for a bind of `source`, if one is due.
pub(super) fn replacement(container: &mut Container, mount: &Mount, source: &Path) -> Option<Mount> {
    if mount.destination == "/dev/shm" && is_shared_memory(source) {
        return Some(shared_memory(mount, source));
    }
    if super::is_read_only(&mount.options) && live_volumes::is_live(source) {
        let source = container.share(source.into(), true);
        return Some(Mount { kind: MOUNT_LIVE.into(), source, ..mount.clone() });
    }
    None
}

/// Whether it is what the CRI has mounted as the pod's `/dev/shm`: containerd on `.../sandboxes/ID/shm`, CRI-O on
/// `.../userdata/shm`. Memory of the host is not memory that processes of a guest can share. A volume that a user mounts
/// there has another name, and the host's own `/dev/shm` is none of the CRI's.
fn is_shared_memory(source: &Path) -> bool {
    let device = |path: &Path| path.metadata().ok().map(|metadata| metadata.dev());
    source.file_name().is_some_and(|name| name == "shm")
        && source != Path::new("/dev/shm")
        && statfs(source).is_ok_and(|status| status.filesystem_type() == TMPFS_MAGIC)
        && source.parent().is_some_and(|parent| device(parent) != device(source))
}

/// As large as the host's; one without a limit has no size to tell.
fn shared_memory(mount: &Mount, source: &Path) -> Mount {
    let size = statfs(source)
        .map_or(0, |status| u64::try_from(status.block_size()).unwrap_or(0).saturating_mul(status.blocks()));
    let mut options = mount.options.clone();
    options.extend((size > 0).then(|| format!("size={size}")));
    Mount { kind: MOUNT_SHM.into(), source: MOUNT_SHM.into(), options, ..mount.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scratch;

    fn bind(destination: &str, options: &[&str]) -> Mount {
        Mount {
            destination: destination.into(),
            kind: "bind".into(),
            source: String::new(),
            options: options.iter().map(ToString::to_string).collect(),
            id_map: None,
        }
    }

    #[test]
    fn only_the_cri_s_tmpfs_is_the_pod_s_shared_memory() {
        let scratch = Scratch::new("shm");
        scratch.write("shm/file", b"");
        assert!(!is_shared_memory(&scratch.path().join("shm")));
        assert!(!is_shared_memory(&scratch.path().join("missing/shm")));
        assert!(!is_shared_memory(Path::new("/dev/shm")) && !is_shared_memory(Path::new("/")));
    }

    #[test]
    fn the_size_is_the_host_s() {
        let mount = shared_memory(&bind("/dev/shm", &["rbind", "rprivate", "rw"]), Path::new("/"));
        assert_eq!((mount.kind.as_str(), mount.destination.as_str()), ("shm", "/dev/shm"));
        let size = mount.options[3].strip_prefix("size=").unwrap();
        assert!(size.parse::<u64>().unwrap() > 0);
        assert_eq!(shared_memory(&bind("/dev/shm", &[]), Path::new("/proc")).options.len(), 0);
    }

    #[test]
    fn live_volumes_are_those_that_cannot_be_written() {
        let scratch = Scratch::new("live");
        scratch.write("volume/..1/key", b"x");
        std::os::unix::fs::symlink("..1", scratch.path().join("volume/..data")).unwrap();
        let mut container = Container::on_rootfs("c", scratch.path()).unwrap();
        let source = scratch.path().join("volume");
        assert_eq!(replacement(&mut container, &bind("/config", &["rbind", "rw"]), &source), None);
        let mount = replacement(&mut container, &bind("/config", &["rbind", "ro"]), &source).unwrap();
        assert_eq!((mount.kind.as_str(), mount.options.len()), ("live", 2));
        let entry = &container.shared()[1];
        assert!(entry.read_only && mount.source.ends_with(&entry.name));
    }
}
