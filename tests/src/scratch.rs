//! A directory of a test's own, removed when dropped. A process of its own removes it when the test's is killed, and in an
//! emulated host, which may be killed as a whole, it lies in that host's memory.

use std::fs::{self, DirBuilder};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex};

use benches::host;

/// Names of all of them begin so.
pub(crate) const PREFIX: &str = "krx-test-";

/// Is told of each directory, by a line, and removes them all when nobody is left who could tell of more.
const KEEPER: &str = "trap '' HUP INT TERM; while IFS= read -r directory; do set -- \"$@\" \"$directory\"; done; rm -rf -- \"$@\"";
static KEPT: LazyLock<Mutex<Child>> = LazyLock::new(|| {
    let mut keeper = Command::new("sh");
    keeper.args(["-c", KEEPER, "sh"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    // Not of the group that a terminal, or a runner, ends as a whole.
    Mutex::new(keeper.process_group(0).spawn().expect("keeper of the scratch directories"))
});

/// With a short path, for the sockets in it.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        Self::under(Path::new(if host::is_emulated() { "/run" } else { "/tmp" }))
    }

    /// In a directory of the caller's choice.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn under(directory: &Path) -> Self {
        // Not named by PID: those of an emulated host are those of the one before. Short, as paths of sockets are.
        let named = |_| {
            let chance = RandomState::new().build_hasher().finish() & 0xff_ffff;
            directory.join(format!("{PREFIX}{chance:06x}"))
        };
        let path = (0..9).map(named).find(|path| !path.exists()).expect("a name that is free");
        // The keeper before there is something to be removed.
        let mut keeper = KEPT.lock().expect("lock");
        let told = keeper.stdin.as_mut().expect("piped");
        told.write_all(&[path.as_os_str().as_bytes(), b"\n"].concat()).expect("keeper");
        DirBuilder::new().mode(0o700).create(&path).expect("scratch directory");
        Self(path)
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file and returns its path.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        fs::create_dir_all(path.parent().unwrap_or(&self.0)).expect("directory");
        fs::write(&path, content).expect("scratch file");
        path
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
