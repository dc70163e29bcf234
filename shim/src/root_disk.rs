//! Which root file systems go to the guest as a disk, by virtio-blk: those that the snapshotter gives as a block device or an image.
//! The guest's kernel mounts them, so that the host's never reads what an image's maker has written.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use containerd_shim_protos::api::Mount;
use krx_proto::DiskUse;
use krx_sandbox::disks::{HostDisk, Source};

use crate::error::{Result, ShimError};

/// File systems of block devices that the guest's kernel has (`kernel-config/`). Others are mounted on the host.
const KINDS: [&str; 4] = ["ext4", "ext3", "ext2", "erofs"];
/// Has no way to be written.
const READ_ONLY: &str = "erofs";

/// The disk that a container's root is, if the snapshotter's mounts say so.
///
/// # Errors
/// An image that neither the guest nor the host can mount.
pub(crate) fn of(mounts: &[Mount]) -> Result<Option<HostDisk>> {
    let is_image = |mount: &Mount| mount.options.iter().any(|option| option == "loop");
    let [mount] = mounts else {
        return mounts.iter().find(|mount| is_image(mount)).map_or(Ok(None), |mount| Err(refused(mount)));
    };
    let metadata = Path::new(&mount.source).metadata().ok();
    let kind = metadata.map(|metadata| metadata.file_type());
    let holds_a_file_system = kind.is_some_and(|kind| kind.is_block_device() || kind.is_file());
    let is_root = mount.target.trim_matches('/').is_empty();
    if !(is_root && holds_a_file_system && KINDS.contains(&mount.type_.as_str())) {
        return if is_image(mount) { Err(refused(mount)) } else { Ok(None) };
    }
    let mut options: Vec<_> = mount.options.iter().filter(|option| *option != "loop").cloned().collect();
    let access = options.iter().rev().find(|option| matches!(option.as_str(), "ro" | "rw"));
    let read_only = mount.type_ == READ_ONLY || access.is_some_and(|access| access == "ro");
    if read_only {
        options.push("ro".into());
    }
    let is = DiskUse::Root { kind: mount.type_.clone(), options };
    Ok(Some(HostDisk { source: Source::Path(mount.source.clone().into()), read_only, is }))
}

/// What is in a file has to be mounted whole and by the guest: the library that mounts on the host closes its loop device before.
fn refused(mount: &Mount) -> ShimError {
    ShimError::invalid(format!(
        "{:.100} is the image of a file system in a file (option loop), of type {:.20}: a guest mounts one alone, there, and \
         of type {}",
        mount.source,
        mount.type_,
        KINDS.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
        let options = options.iter().map(ToString::to_string).collect();
        let source = source.to_string_lossy().into_owned();
        Mount { type_: kind.into(), source, options, ..Mount::default() }
    }

    fn image() -> std::path::PathBuf {
        std::env::current_exe().unwrap()
    }

    #[test]
    fn an_image_is_a_disk_of_the_guest() {
        let disk = of(&[mount("ext4", &image(), &["loop", "discard"])]).unwrap().unwrap();
        let is = DiskUse::Root { kind: "ext4".into(), options: vec!["discard".into()] };
        assert_eq!(disk, HostDisk { source: Source::Path(image()), read_only: false, is });
        for (kind, options) in [("erofs", &[] as &[&str]), ("ext4", &["ro"]), ("ext4", &["rw", "ro"])] {
            let disk = of(&[mount(kind, &image(), options)]).unwrap().unwrap();
            let DiskUse::Root { options, .. } = disk.is else { panic!("is the root") };
            assert!(disk.read_only && options.ends_with(&["ro".into()]), "{kind}");
        }
    }

    #[test]
    fn directories_and_other_file_systems_are_mounted_on_the_host() {
        assert_eq!(of(&[]).unwrap(), None);
        assert_eq!(of(&[mount("overlay", Path::new("overlay"), &["lowerdir=/a:/b"])]).unwrap(), None);
        assert_eq!(of(&[mount("ext4", Path::new("/"), &[])]).unwrap(), None);
        assert_eq!(of(&[mount("xfs", &image(), &[])]).unwrap(), None);
        let below = Mount { target: "/lower".into(), ..mount("ext4", &image(), &[]) };
        assert_eq!(of(&[below]).unwrap(), None);
    }

    #[test]
    fn images_that_nobody_could_mount_are_refused_by_name() {
        let loops = |kind| mount(kind, &image(), &["loop"]);
        for mounts in [vec![loops("xfs")], vec![loops("erofs"), loops("erofs")]] {
            let error = of(&mounts).unwrap_err().to_string();
            assert!(error.contains("option loop") && error.contains("erofs"), "{error}");
        }
    }
}
