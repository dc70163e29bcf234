//! Volumes whose files the kubelet replaces while the pod runs: ConfigMaps, Secrets, projected and downward API ones.
//!
//! The kubelet's *atomic writer* puts the files into a directory of a new name and lets the link `..data` lead there by a
//! rename. A guest sees that through its share, but nobody who watches the files there (inotify(7)) is told. So the guest
//! has a copy, and [`LiveVolumes`] watches on the host and says when which copy is to be renewed, for who owns the
//! pod to ask the agent. It makes no calls itself, has no thread and never waits.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use krx_proto::{MOUNT_LIVE, Request, SHARE_PATH, validate_live_target};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};

use crate::container::Container;

/// The link of the atomic writer.
const DATA: &str = "..data";
/// Most names a volume may have for it to be looked at; a copy of more is refused anyway.
const MAX_NAMES: usize = 4096;
/// From a change to its copy: older kubelets set owners and modes only after the rename.
const SETTLE: Duration = Duration::from_millis(100);
/// Between two attempts when the agent cannot do it, as while the container is being made.
const RETRY: Duration = Duration::from_secs(1);

/// Whether the directory is kept by an atomic writer: `..data` leads to a directory beside it, and every name that
/// readers see is a link.
pub(crate) fn is_live(source: &Path) -> bool {
    if target(source).is_none() {
        return false;
    }
    let Ok(entries) = fs::read_dir(source) else { return false };
    let is_kept = |entry: io::Result<fs::DirEntry>| {
        let Ok(entry) = entry else { return false };
        let is_hidden = entry.file_name().as_encoded_bytes().starts_with(b"..");
        is_hidden || entry.file_type().is_ok_and(|kind| kind.is_symlink())
    };
    let mut seen = 0;
    entries.inspect(|_| seen += 1).take(MAX_NAMES + 1).all(is_kept) && seen <= MAX_NAMES
}

/// Where `..data` of a volume leads.
fn target(source: &Path) -> Option<String> {
    let link = fs::read_link(source.join(DATA)).ok()?;
    link.into_os_string().into_string().ok().filter(|target| validate_live_target(target))
}

/// The live volumes among a container's mounts: directories of the host, and their paths in the guest.
pub fn of(container: &Container) -> impl Iterator<Item = (&Path, &str)> {
    let live = container.spec.mounts.iter().filter(|mount| mount.kind == MOUNT_LIVE);
    live.filter_map(|mount| {
        let name = mount.source.strip_prefix(SHARE_PATH)?.strip_prefix('/')?;
        let entry = container.shared().iter().find(|entry| entry.name == name)?;
        Some((entry.source.as_path(), mount.source.as_str()))
    })
}

/// The live volumes of a pod.
#[derive(Debug)]
pub struct LiveVolumes {
    inotify: Inotify,
    volumes: Vec<Volume>,
}

#[derive(Debug)]
struct Volume {
    source: PathBuf,
    /// In the guest, where it names the volume.
    path: String,
    /// Shared by all volumes of the same directory.
    watch: WatchDescriptor,
    containers: BTreeSet<String>,
    schedule: Schedule,
}

/// When to ask for a copy of what. Pure.
#[derive(Debug, Default)]
struct Schedule {
    /// What the copies are of, as far as is known.
    copied: Option<String>,
    /// What the agent was asked for and has not answered.
    asked: Option<String>,
    due: Option<Instant>,
}

impl LiveVolumes {
    /// Watches nothing yet.
    ///
    /// # Errors
    /// The user has no inotify instance left (`fs.inotify.max_user_instances`).
    pub fn new() -> io::Result<Self> {
        let flags = InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC;
        Ok(Self { inotify: Inotify::init(flags)?, volumes: Vec::new() })
    }

    /// Watches a volume of a container, best before the container is made: a copy of it is asked for once, lest a change
    /// be missed that happened in the meantime.
    ///
    /// # Errors
    /// The directory is gone, or the user has no watch left (`fs.inotify.max_user_watches`). The container runs all the
    /// same; only its copy is not renewed.
    pub fn add(&mut self, container: &str, source: &Path, path: &str, now: Instant) -> io::Result<()> {
        let known = self.volumes.iter_mut().find(|volume| volume.path == path);
        let volume = if let Some(volume) = known {
            volume
        } else {
            let events = AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ONLYDIR;
            let watch = self.inotify.add_watch(source, events)?;
            self.volumes.push(Volume {
                source: source.into(),
                path: path.into(),
                watch,
                containers: BTreeSet::new(),
                schedule: Schedule::default(),
            });
            let Some(volume) = self.volumes.last_mut() else { return Ok(()) };
            volume
        };
        volume.containers.insert(container.into());
        // Also where it is known: the copy of this container may be older than what was last asked for.
        volume.schedule.copied = None;
        volume.schedule.changed(now);
        Ok(())
    }

    /// The container is deleted.
    pub fn remove(&mut self, container: &str) {
        let gone = self
            .volumes
            .extract_if(.., |volume| volume.containers.remove(container) && volume.containers.is_empty());
        for Volume { watch, .. } in gone.collect::<Vec<_>>() {
            if !self.volumes.iter().any(|volume| volume.watch == watch) {
                // The kernel has removed it already where the directory is gone.
                let _ = self.inotify.rm_watch(watch);
            }
        }
    }

    /// Takes what the kernel has to tell; to be called when [`Self::as_fd`] is readable.
    ///
    /// # Errors
    /// The kernel's own.
    pub fn take_events(&mut self, now: Instant) -> io::Result<()> {
        loop {
            match self.inotify.read_events() {
                Ok(events) => events.iter().for_each(|event| self.take(event, now)),
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn take(&mut self, event: &InotifyEvent, now: Instant) {
        // Events were lost: any volume may have changed.
        let any = event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
        let is_data = event.name.as_ref().is_some_and(|name| name == DATA);
        for volume in &mut self.volumes {
            if any || is_data && volume.watch == event.wd {
                volume.schedule.changed(now);
            }
        }
    }

    /// When [`Self::due`] has something to say next, if nothing happens before.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.volumes.iter().filter_map(|volume| volume.schedule.deadline()).min()
    }

    /// What the agent is to be asked for now, by the volumes' paths. Nothing more is said of a volume until
    /// [`Self::answered`].
    pub fn due(&mut self, now: Instant) -> Vec<(String, Request)> {
        let due = self.volumes.iter_mut().filter_map(|volume| {
            let target = volume.schedule.take(now, || target(&volume.source))?;
            Some((volume.path.clone(), Request::Refresh { path: volume.path.clone(), target }))
        });
        due.collect()
    }

    /// The agent has answered for the volume at `path`; what went wrong is tried again.
    pub fn answered(&mut self, path: &str, done: bool, now: Instant) {
        let volume = self.volumes.iter_mut().find(|volume| volume.path == path);
        volume.into_iter().for_each(|volume| volume.schedule.answered(done, now));
    }
}

impl AsFd for LiveVolumes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

impl Schedule {
    fn changed(&mut self, now: Instant) {
        // Not put off by further changes: one that changes all the time is copied, too.
        self.due.get_or_insert(now + SETTLE);
    }

    fn deadline(&self) -> Option<Instant> {
        self.due.filter(|_| self.asked.is_none())
    }

    fn take(&mut self, now: Instant, target: impl FnOnce() -> Option<String>) -> Option<String> {
        self.deadline().filter(|due| *due <= now)?;
        self.due = None;
        // Without a target the volume is being taken down.
        self.asked = target().filter(|target| self.copied.as_ref() != Some(target));
        self.asked.clone()
    }

    fn answered(&mut self, done: bool, now: Instant) {
        let Some(asked) = self.asked.take() else { return };
        if done {
            self.copied = Some(asked);
        } else {
            self.due.get_or_insert(now + RETRY);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::testing::Scratch;

    /// Replaces the files of a volume as the kubelet does.
    fn write(scratch: &Scratch, target: &str, text: &[u8]) {
        let volume = scratch.path().join("volume");
        scratch.write(&format!("volume/{target}/key"), text);
        symlink(target, volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join(DATA)).unwrap();
        let _ = symlink("..data/key", volume.join("key"));
    }

    #[test]
    fn a_volume_of_the_kubelet_is_known_by_its_links() {
        let scratch = Scratch::new("live");
        let volume = scratch.path().join("volume");
        write(&scratch, "..1", b"x");
        assert!(is_live(&volume));
        scratch.write("volume/plain", b"");
        assert!(!is_live(&volume));
        fs::remove_file(volume.join("plain")).unwrap();
        for bad in ["/etc", "plain", "../volume", ".."] {
            fs::remove_file(volume.join(DATA)).unwrap();
            symlink(bad, volume.join(DATA)).unwrap();
            assert!(!is_live(&volume), "{bad}");
        }
        assert!(!is_live(scratch.path()) && !is_live(&volume.join("..1/key")));
        write(&scratch, "..2", b"x");
        for number in 0..MAX_NAMES {
            symlink("..data/key", volume.join(number.to_string())).unwrap();
        }
        assert!(!is_live(&volume));
    }

    #[test]
    fn a_change_is_asked_for_once_and_again_after_a_failure() {
        let begin = Instant::now();
        let at = |millis: u64| begin + Duration::from_millis(millis);
        let mut schedule = Schedule::default();
        let of = |target: &str| Some(target.to_string());
        assert_eq!(schedule.take(begin, || of("..1")), None);
        schedule.changed(at(0));
        schedule.changed(at(50));
        assert_eq!(schedule.deadline(), Some(at(100)));
        assert_eq!(schedule.take(at(99), || of("..1")), None);
        assert_eq!(schedule.take(at(100), || of("..1")), of("..1"));
        // While the agent works, changes are kept in mind.
        schedule.changed(at(110));
        assert_eq!((schedule.deadline(), schedule.take(at(500), || of("..2"))), (None, None));
        schedule.answered(true, at(600));
        assert_eq!(schedule.take(at(600), || of("..2")), of("..2"));
        schedule.answered(false, at(700));
        assert_eq!(schedule.deadline(), Some(at(1700)));
        assert_eq!(schedule.take(at(1700), || of("..2")), of("..2"));
        schedule.answered(true, at(1800));
        // An event without news, and a volume that is being taken down.
        schedule.changed(at(1900));
        assert_eq!(schedule.take(at(2000), || of("..2")), None);
        schedule.changed(at(2000));
        assert_eq!(schedule.take(at(2100), || None), None);
        assert_eq!(schedule.deadline(), None);
    }

    #[test]
    fn changes_on_the_host_are_noticed() {
        let scratch = Scratch::new("live");
        let volume = scratch.path().join("volume");
        write(&scratch, "..1", b"x");
        let mut live = LiveVolumes::new().unwrap();
        let begin = Instant::now();
        let late = begin + Duration::from_secs(60);
        let refresh = |path: &str, target: &str| {
            (path.to_string(), Request::Refresh { path: path.into(), target: target.into() })
        };
        live.add("a", &volume, "/run/krx/share/1", begin).unwrap();
        live.add("b", &volume, "/run/krx/share/2", begin).unwrap();
        assert!(live.add("c", &scratch.path().join("missing"), "/x", begin).is_err());
        assert_eq!(live.due(begin), []);
        assert_eq!(live.due(late), [refresh("/run/krx/share/1", "..1"), refresh("/run/krx/share/2", "..1")]);
        live.answered("/run/krx/share/1", true, late);
        live.answered("/run/krx/share/2", true, late);
        // Names other than the link are no change yet.
        scratch.write("volume/..2/key", b"y");
        live.take_events(late).unwrap();
        assert_eq!(live.deadline(), None);
        live.remove("a");
        write(&scratch, "..2", b"y");
        live.take_events(late).unwrap();
        assert_eq!(live.deadline(), Some(late + SETTLE));
        assert_eq!(live.due(late + SETTLE), [refresh("/run/krx/share/2", "..2")]);
        live.remove("b");
        live.answered("/run/krx/share/2", true, late);
        write(&scratch, "..3", b"z");
        live.take_events(late).unwrap();
        assert_eq!(live.deadline(), None);
    }

    #[test]
    fn live_mounts_of_a_container_are_found_in_its_share() {
        let scratch = Scratch::new("live");
        let mut container = Container::on_rootfs("c", scratch.path()).unwrap();
        assert_eq!(of(&container).count(), 0);
        let path = container.share("/tmp".into(), true);
        let mount = krx_proto::Mount { kind: MOUNT_LIVE.into(), source: path.clone(), ..Default::default() };
        container.spec.mounts.push(mount);
        assert_eq!(of(&container).collect::<Vec<_>>(), [(Path::new("/tmp"), path.as_str())]);
    }
}
