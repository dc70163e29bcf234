//! Copies of live volumes: what fills and renews them. Runs in a child, for the host's file system may hang.
//!
//! The kubelet replaces the files of a volume all at once (its *atomic writer*): they lie in a directory of a name not
//! used before, the link `..data` leads there and is replaced by a rename, and each top name is a link through
//! `..data`. A copy is renewed in the same way, so that its readers never see half of a change, and watchers
//! (inotify(7)) in the container see what they would on the host; through the share they would see nothing.
//!
//! The share's content may change meanwhile, to anything: nothing in it is followed out of the volume, and there is a limit
//! to what is taken of it. The copy itself may be changed by a privileged container; it is touched by ways that follow
//! no link at the end of a path, and the path up to it is the agent's own.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::Path;
use std::thread;
use std::time::Duration;

use krx_proto::validate_live_target;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::sys::stat::fstat;

use crate::copying::{Budget, copy_directory, errno, open_inside, set_owner};
use crate::error::{Doing, StepError};

/// Most that a copy may hold; Kubernetes' own limit of a volume's source is 1 MiB.
pub(crate) const MAX_BYTES: u64 = 8 << 20;
/// Most files, directories and links of a copy.
pub(crate) const MAX_ENTRIES: u64 = 4096;
/// Deepest directory: a key of a volume can be a path.
const MAX_DEPTH: u32 = 32;

/// The link to the current directory, and its name before it replaces the former one.
const DATA: &str = "..data";
const NEXT_DATA: &str = "..data_tmp";

/// Names in the share are believed for a second: so often, and after so long, the link is read again if the directory
/// that it leads to is gone.
const FILL_ATTEMPTS: u32 = 4;
const FILL_PAUSE: Duration = Duration::from_millis(400);

/// Where `..data` of the copy at `path` leads; `None` where no copy was made.
pub(crate) fn current(path: &Path) -> Option<OsString> {
    fs::read_link(path.join(DATA)).ok().map(std::path::PathBuf::into_os_string)
}

/// Makes the first copy of the volume `source` in the empty directory `copy`. Where it fails, there is no `..data` in it.
pub(crate) fn fill(source: &Path, copy: &Path) -> Result<(), StepError> {
    let doing = || format!("Cannot copy the volume {}", source.display());
    let volume = open_volume(source).doing(doing)?;
    let mut result = Err(Errno::ENOENT);
    for attempt in 0..FILL_ATTEMPTS {
        if attempt > 0 {
            thread::sleep(FILL_PAUSE);
        }
        let target = readlinkat(&volume, DATA).doing(doing)?.into_string().ok();
        let target =
            target.filter(|target| validate_live_target(target)).ok_or(Errno::EINVAL).doing(doing)?;
        result = renew(&volume, copy, &target);
        if result != Err(Errno::ENOENT) {
            break;
        }
    }
    result.doing(doing)
}

/// Brings a copy up to date with the volume, whose `..data` leads to `target` now.
pub(crate) fn refresh(source: &Path, copy: &Path, target: &str) -> Result<(), StepError> {
    let doing = || format!("Cannot renew the copy of the volume {}", source.display());
    // Not by the volume's own link, which the guest's kernel may believe for a second longer than it is true. The name
    // that the host tells is one the kernel has not met before.
    renew(&open_volume(source).doing(doing)?, copy, target).doing(doing)
}

fn open_volume(path: &Path) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    openat2(AT_FDCWD, path, OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS))
}

/// The atomic writer's own order: the new directory, the link, new names, then what is no longer needed.
fn renew(volume: &OwnedFd, copy: &Path, target: &str) -> nix::Result<()> {
    let from = open_inside(volume.as_fd(), target.as_bytes(), OFlag::O_DIRECTORY)?;
    let to = copy.join(target);
    // Left of an attempt that was broken off.
    let _ = fs::remove_dir_all(&to);
    copy_all(volume, &from, copy, target).inspect_err(|_| drop(fs::remove_dir_all(&to)))?;
    let _ = fs::remove_file(copy.join(NEXT_DATA));
    symlink(target, copy.join(NEXT_DATA)).map_err(errno)?;
    fs::rename(copy.join(NEXT_DATA), copy.join(DATA)).map_err(errno)?;
    let wanted = names(&to)?;
    let present = names(copy)?;
    let is_visible = |name: &&OsString| !name.as_bytes().starts_with(b"..");
    for name in wanted.difference(&present).filter(is_visible) {
        symlink(Path::new(DATA).join(name), copy.join(name)).map_err(errno)?;
    }
    for name in present.difference(&wanted).filter(is_visible) {
        fs::remove_file(copy.join(name)).map_err(errno)?;
    }
    for name in present.iter().filter(|name| !is_visible(name) && *name != DATA && *name != target) {
        fs::remove_dir_all(copy.join(name)).map_err(errno)?;
    }
    Ok(())
}

/// Copies the volume's directory `from` as `target`, and what the volume itself belongs to.
fn copy_all(volume: &OwnedFd, from: &OwnedFd, copy: &Path, target: &str) -> nix::Result<()> {
    let root = open_volume(copy)?;
    set_owner(root.as_fd(), &fstat(volume)?)?;
    DirBuilder::new().mode(0o700).create(copy.join(target)).map_err(errno)?;
    let to = open_inside(root.as_fd(), target.as_bytes(), OFlag::O_DIRECTORY)?;
    copy_directory(from, &to, &mut Budget { bytes: MAX_BYTES, entries: MAX_ENTRIES, depth: MAX_DEPTH })
}

/// Names in a directory of the copy.
fn names(path: &Path) -> nix::Result<BTreeSet<OsString>> {
    let directory = open_volume(path)?;
    let mut names = BTreeSet::new();
    for entry in Dir::from_fd(directory)?.iter() {
        let name = entry?.file_name().to_bytes().to_vec();
        if !matches!(&name[..], b"." | b"..") {
            names.insert(OsString::from_vec(name));
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    /// A volume as the kubelet makes it, and a place for its copy.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("krx-agent-replica-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(path.join("copy")).unwrap();
            fs::create_dir_all(path.join("volume")).unwrap();
            Self(path)
        }

        fn at(&self, path: &str) -> PathBuf {
            self.0.join(path)
        }

        /// Makes `target` with files, and has `..data` lead there.
        fn write(&self, target: &str, files: &[(&str, &str)]) {
            for (name, text) in files {
                let path = self.at("volume").join(target).join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            let _ = fs::remove_file(self.at("volume/..data"));
            symlink(target, self.at("volume/..data")).unwrap();
        }

        fn fill(&self) -> Result<(), StepError> {
            fill(&self.at("volume"), &self.at("copy"))
        }

        fn refresh(&self, target: &str) -> Result<(), StepError> {
            refresh(&self.at("volume"), &self.at("copy"), target)
        }

        fn read(&self, path: &str) -> Option<String> {
            fs::read_to_string(self.at("copy").join(path)).ok()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_copy_is_renewed_as_the_kubelet_renews_a_volume() {
        let scratch = Scratch::new("renew");
        scratch.write("..1", &[("key", "one"), ("gone", "x"), ("deep/er/key", "two")]);
        symlink("key", scratch.at("volume/..1/link")).unwrap();
        fs::set_permissions(scratch.at("volume/..1/key"), fs::Permissions::from_mode(0o640)).unwrap();
        scratch.fill().unwrap();
        assert_eq!(scratch.read("key").as_deref(), Some("one"));
        assert_eq!(scratch.read("link").as_deref(), Some("one"));
        assert_eq!(scratch.read("deep/er/key").as_deref(), Some("two"));
        assert_eq!(fs::read_link(scratch.at("copy/key")).unwrap(), Path::new("..data/key"));
        assert_eq!(fs::metadata(scratch.at("copy/key")).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(current(&scratch.at("copy")).unwrap(), "..1");
        scratch.write("..2", &[("key", "three"), ("new", "y")]);
        // Whatever the volume's own link says.
        fs::remove_file(scratch.at("volume/..data")).unwrap();
        scratch.refresh("..2").unwrap();
        assert_eq!(scratch.read("key").as_deref(), Some("three"));
        let left = names(&scratch.at("copy")).unwrap();
        assert_eq!(left.into_iter().collect::<Vec<_>>(), ["..2", "..data", "key", "new"]);
        scratch.refresh("..2").unwrap();
        assert_eq!(scratch.read("new").as_deref(), Some("y"));
    }

    #[test]
    fn what_fails_leaves_the_copy_as_it_was() {
        let scratch = Scratch::new("fails");
        scratch.write("..1", &[("key", "one")]);
        scratch.fill().unwrap();
        assert!(scratch.refresh("..2").is_err());
        let large = "x".repeat(usize::try_from(MAX_BYTES).unwrap() + 1);
        scratch.write("..2", &[("key", &large)]);
        assert!(scratch.refresh("..2").is_err());
        let nested = format!("{}key", "d/".repeat(40));
        scratch.write("..3", &[(&nested, "x")]);
        assert!(scratch.refresh("..3").is_err());
        fs::create_dir(scratch.at("volume/..4")).unwrap();
        for number in 0..=MAX_ENTRIES {
            symlink("x", scratch.at(&format!("volume/..4/{number}"))).unwrap();
        }
        assert!(scratch.refresh("..4").is_err());
        assert_eq!(scratch.read("key").as_deref(), Some("one"));
        let left = names(&scratch.at("copy")).unwrap();
        assert_eq!(left.into_iter().collect::<Vec<_>>(), ["..1", "..data", "key"]);
    }

    #[test]
    fn no_link_leads_out_of_a_volume() {
        let scratch = Scratch::new("links");
        fs::create_dir(scratch.at("outside")).unwrap();
        fs::write(scratch.at("outside/secret"), "s").unwrap();
        symlink(scratch.at("outside"), scratch.at("volume/..1")).unwrap();
        symlink("..1", scratch.at("volume/..data")).unwrap();
        assert!(scratch.fill().is_err() && current(&scratch.at("copy")).is_none());
        for target in ["../outside", "..data", "plain", ".."] {
            fs::remove_file(scratch.at("volume/..data")).unwrap();
            symlink(target, scratch.at("volume/..data")).unwrap();
            assert!(scratch.fill().is_err(), "{target}");
        }
        // Links to files stay links, and a FIFO is not waited for.
        scratch.write("..2", &[("key", "x")]);
        symlink(scratch.at("outside/secret"), scratch.at("volume/..2/link")).unwrap();
        nix::unistd::mkfifo(&scratch.at("volume/..2/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        scratch.fill().unwrap();
        let left = names(&scratch.at("copy/..2")).unwrap();
        assert_eq!(left.into_iter().collect::<Vec<_>>(), ["key", "link"]);
        assert!(fs::symlink_metadata(scratch.at("copy/..2/link")).unwrap().is_symlink());
    }
}
