//! What is noted of files: times, modes, owners, who may do what, extended attributes.

use std::ffi::CString;
use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::stat::{Mode, UtimensatFlags, umask, utimensat};
use nix::sys::time::TimeSpec;

use super::children::attempt;
use super::mapping::Mapping;
use super::{Ground, Outcome, check, refused, same};

/// Clocks of a guest and its host may differ by so much.
const APART: Duration = Duration::from_secs(2);

fn mode(path: &Path) -> Outcome<u32> {
    Ok(path.symlink_metadata()?.mode() & 0o7777)
}

fn changed(path: &Path) -> Outcome<(i64, i64)> {
    let status = path.symlink_metadata()?;
    Ok((status.ctime(), status.ctime_nsec()))
}

/// More than a tick of the clock that times of files are taken from.
fn tick() {
    std::thread::sleep(Duration::from_millis(25));
}

pub(super) fn times(ground: &Ground) -> Outcome {
    let path = ground.file("file", b"x")?;
    let now = SystemTime::now();
    let made = path.metadata()?.modified()?;
    check!(made > now - APART && made < now + APART, "made at {made:?}, now it is {now:?}");
    let file = File::options().read(true).write(true).open(&path)?;
    let wanted = (UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789), UNIX_EPOCH + Duration::new(5, 1));
    let before = changed(&path)?;
    tick();
    file.set_times(FileTimes::new().set_accessed(wanted.0).set_modified(wanted.1))?;
    let status = path.metadata()?;
    same("times that were set", (status.accessed()?, status.modified()?), wanted)?;
    check!(changed(&path)? > before, "no new time of change");
    // One of them alone; and of a link, not of what it leads to.
    let (omit, some) = (TimeSpec::UTIME_OMIT, TimeSpec::new(77, 7));
    utimensat(nix::fcntl::AT_FDCWD, &path, &omit, &some, UtimensatFlags::FollowSymlink)?;
    let status = path.metadata()?;
    same("one time", (status.accessed()?, status.mtime(), status.mtime_nsec()), (wanted.0, 77, 7))?;
    let link = ground.path("link");
    symlink("file", &link)?;
    let beyond = TimeSpec::new(5_000_000_000, 999_999_999);
    utimensat(nix::fcntl::AT_FDCWD, &link, &beyond, &beyond, UtimensatFlags::NoFollowSymlink)?;
    let status = link.symlink_metadata()?;
    same("a link's time, after 2106", (status.mtime(), status.mtime_nsec()), (5_000_000_000, 999_999_999))?;
    same("what it leads to", path.metadata()?.mtime(), 77)?;
    utimensat(nix::fcntl::AT_FDCWD, &path, &omit, &TimeSpec::new(-5, 0), UtimensatFlags::FollowSymlink)?;
    same("a time before 1970", path.metadata()?.mtime(), -5)?;

    let newer = |what: &str, act: &dyn Fn() -> Outcome, path: &Path| -> Outcome {
        utimensat(nix::fcntl::AT_FDCWD, path, &some, &some, UtimensatFlags::FollowSymlink)?;
        act()?;
        let modified = path.metadata()?.modified()?;
        check!(modified > now - APART && modified < SystemTime::now() + APART, "{what}: {modified:?}");
        Ok(())
    };
    newer("written", &|| Ok(file.write_all_at(b"y", 0)?), &path)?;
    newer("made longer", &|| Ok(file.set_len(5000)?), &path)?;
    newer("written by a mapping", &|| map_and_write(&file), &path)?;
    newer("a name more", &|| Ok(fs::write(ground.path("more"), "")?), &ground.directory)?;
    newer("a name less", &|| Ok(fs::remove_file(ground.path("more"))?), &ground.directory)?;
    let birth = path.metadata()?.created();
    check!(birth.is_ok() != ground.is_share, "the time it was made: {birth:?}");
    Ok(())
}

fn map_and_write(file: &File) -> Outcome {
    let mut mapping = Mapping::shared(file, 0, 4096)?;
    mapping.bytes_mut()[9] = 9;
    mapping.sync()
}

pub(super) fn modes(ground: &Ground) -> Outcome {
    let usual = umask(Mode::from_bits_truncate(0o027));
    let path = ground.file("file", b"x")?;
    let directory = ground.path("directory");
    fs::create_dir(&directory)?;
    umask(usual);
    same("a new file's mode", mode(&path)?, 0o640)?;
    same("a new directory's mode", mode(&directory)?, 0o750)?;
    for bits in [0, 0o7777, 0o1000, 0o644] {
        fs::set_permissions(&path, Permissions::from_mode(bits))?;
        same("a mode that was set", mode(&path)?, bits)?;
    }
    // Who writes a file or gives it away takes its rights from it; who may set them keeps them.
    fs::set_permissions(&path, Permissions::from_mode(0o6777))?;
    chown(&path, Some(1000), Some(1000))?;
    same("after a new owner", mode(&path)?, 0o777)?;
    fs::set_permissions(&path, Permissions::from_mode(0o6777))?;
    same("by its owner", attempt("1000", "1000", "1000", "truncate", &path)?, 0)?;
    same("after its owner wrote it", mode(&path)?, 0o777)?;
    let status = path.metadata()?;
    same("owners", (status.uid(), status.gid()), (1000, 1000))?;
    chown(&path, None, Some(77))?;
    same("a group alone", (path.metadata()?.uid(), path.metadata()?.gid()), (1000, 77))?;
    let link = ground.path("link");
    symlink("file", &link)?;
    lchown(&link, Some(5), Some(6))?;
    same("a link's owners", (link.symlink_metadata()?.uid(), path.metadata()?.uid()), (5, 1000))?;
    // The group of a setgid directory is that of what is made in it.
    chown(&directory, None, Some(88))?;
    fs::set_permissions(&directory, Permissions::from_mode(0o2777))?;
    fs::write(directory.join("file"), "")?;
    fs::create_dir(directory.join("below"))?;
    same("its group", directory.join("file").metadata()?.gid(), 88)?;
    same(
        "its group, and its bit",
        (directory.join("below").metadata()?.gid(), mode(&directory.join("below"))?),
        (88, 0o2755),
    )
}

pub(super) fn permissions(ground: &Ground) -> Outcome {
    let tried = |user, also, what, path: &Path, wanted| -> Outcome {
        let got = attempt(user, "1000", also, what, path)?;
        check!(
            got == wanted,
            "{what} {} as user {user} of group {also}: error {got}, not {wanted}",
            path.display()
        );
        Ok(())
    };
    let set = |path: &Path, bits| fs::set_permissions(path, Permissions::from_mode(bits));
    let (no, denied, fine) = (libc::EPERM, libc::EACCES, 0);
    let path = ground.file("file", b"x")?;
    chown(&path, Some(500), Some(600))?;
    set(&path, 0o640)?;
    tried("500", "1", "write", &path, fine)?;
    tried("501", "600", "read", &path, fine)?;
    tried("501", "600", "write", &path, denied)?;
    tried("501", "1", "read", &path, denied)?;
    tried("501", "600", "chmod", &path, no)?;
    tried("500", "1", "chmod", &path, fine)?;
    tried("500", "1", "chown", &path, no)?;
    set(&path, 0o406)?;
    tried("500", "1", "write", &path, denied)?;
    tried("501", "600", "write", &path, denied)?;
    tried("501", "1", "write", &path, fine)?;

    // A directory that a group may write, which the user has as a further one.
    let shared = ground.path("shared");
    fs::create_dir(&shared)?;
    chown(&shared, Some(0), Some(600))?;
    set(&shared, 0o770)?;
    tried("501", "600", "create", &shared.join("new"), fine)?;
    tried("501", "600", "directory", &shared.join("directory"), fine)?;
    let status = shared.join("new").metadata()?;
    same("owners of what is made", (status.uid(), status.gid()), (501, 1000))?;
    tried("501", "1", "create", &shared.join("other"), denied)?;
    tried("501", "1", "read", &shared.join("new"), denied)?;
    tried("501", "1", "list", &shared, denied)?;
    tried("502", "600", "remove", &shared.join("new"), fine)?;

    let sticky = ground.path("sticky");
    fs::create_dir(&sticky)?;
    set(&sticky, 0o1777)?;
    tried("501", "1", "create", &sticky.join("mine"), fine)?;
    tried("502", "1", "remove", &sticky.join("mine"), no)?;
    tried("501", "1", "remove", &sticky.join("mine"), fine)?;
    set(&shared, 0o701)?;
    fs::write(shared.join("known"), "x")?;
    tried("501", "1", "read", &shared.join("known"), fine)?;
    tried("501", "1", "list", &shared, denied)?;
    tried("501", "1", "touch", &shared.join("known"), denied)?;
    // A file is made unwritable by who goes on writing it.
    let mut file = OpenOptions::new().write(true).create_new(true).open(ground.path("sealed"))?;
    set(&ground.path("sealed"), 0o000)?;
    file.write_all(b"still")?;
    Ok(())
}

/// Extended attributes of a file, or of a link itself.
pub(super) struct Attributes(CString);

impl Attributes {
    pub(super) fn of(path: &Path) -> Outcome<Self> {
        Ok(Self(CString::new(path.as_os_str().as_bytes())?))
    }

    pub(super) fn set(&self, name: &str, value: &[u8], flags: i32) -> std::io::Result<()> {
        let name = CString::new(name)?;
        // SAFETY: two C strings and a slice that live until after the call.
        let done = unsafe {
            libc::lsetxattr(self.0.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags)
        };
        if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }

    pub(super) fn get(&self, name: &str, room: usize) -> std::io::Result<Vec<u8>> {
        let (name, mut value) = (CString::new(name)?, vec![0; room]);
        // SAFETY: two C strings, and room for as many bytes as is said.
        let size =
            unsafe { libc::lgetxattr(self.0.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), room) };
        self.sized(size, value)
    }

    pub(super) fn list(&self) -> std::io::Result<Vec<u8>> {
        let mut names = vec![0; 64 << 10];
        // SAFETY: a C string, and room for as many bytes as is said.
        let size = unsafe { libc::llistxattr(self.0.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
        self.sized(size, names)
    }

    fn remove(&self, name: &str) -> std::io::Result<()> {
        let name = CString::new(name)?;
        // SAFETY: two C strings that live until after the call.
        let done = unsafe { libc::lremovexattr(self.0.as_ptr(), name.as_ptr()) };
        if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }

    fn sized(&self, size: isize, mut bytes: Vec<u8>) -> std::io::Result<Vec<u8>> {
        let size = usize::try_from(size).map_err(|_| std::io::Error::last_os_error())?;
        bytes.truncate(size);
        Ok(bytes)
    }
}

pub(super) fn extended(ground: &Ground) -> Outcome {
    let path = ground.file("file", b"x")?;
    let of = Attributes::of;
    let file = of(&path)?;
    let large = vec![b'v'; 60 << 10];
    file.set("user.small", b"\0\xff", 0)?;
    file.set("user.large", &large, 0)?;
    file.set("user.empty", b"", 0)?;
    same("a value", file.get("user.small", 10)?, b"\0\xff".to_vec())?;
    check!(file.get("user.large", 64 << 10)? == large, "another large value");
    same("an empty value", file.get("user.empty", 10)?, Vec::new())?;
    refused("one that does not fit", file.get("user.large", 100), libc::ERANGE)?;
    refused("one that is not there", file.get("user.none", 100), libc::ENODATA)?;
    refused("a second one", file.set("user.small", b"x", libc::XATTR_CREATE), libc::EEXIST)?;
    refused("replacing none", file.set("user.none", b"x", libc::XATTR_REPLACE), libc::ENODATA)?;
    refused("one of 65 KiB", file.set("user.huge", &vec![0; 65 << 10], 0), libc::E2BIG)?;
    let names = file.list()?;
    let mut names: Vec<_> =
        names.split(|byte| *byte == 0).filter(|name| name.starts_with(b"user.")).collect();
    names.sort_unstable();
    same("names", names, vec![&b"user.empty"[..], b"user.large", b"user.small"])?;
    file.remove("user.large")?;
    refused("removing it again", file.remove("user.large"), libc::ENODATA)?;
    fs::rename(&path, ground.path("moved"))?;
    same("after a rename", of(&ground.path("moved"))?.get("user.small", 10)?, b"\0\xff".to_vec())?;
    let directory = ground.path("directory");
    fs::create_dir(&directory)?;
    of(&directory)?.set("user.d", b"d", 0)?;
    same("a directory's", of(&directory)?.get("user.d", 10)?, b"d".to_vec())?;
    symlink("moved", ground.path("link"))?;
    refused("a link's", of(&ground.path("link"))?.set("user.x", b"x", 0), libc::EPERM)?;
    if ground.is_share {
        refused("trusted ones", of(&directory)?.set("trusted.x", b"x", 0), libc::EPERM)?;
    }
    Ok(())
}
