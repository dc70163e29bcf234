//! Other processes of a check: this program again, with a part to play.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};

use super::locks::{self, Kind};
use super::mapping::Mapping;
use super::{Outcome, check};

/// Longest that a child's word is waited for.
const WORD: Duration = Duration::from_secs(60);
/// How long a child that should wait is given to show that it does not.
const SILENCE: Duration = Duration::from_millis(400);

/// A child that says a line when it has done its part, and ends when it is told to.
pub(super) struct Other {
    child: Child,
    stdin: Option<ChildStdin>,
    said: Receiver<String>,
}

impl Other {
    pub(super) fn start(part: &[&str], path: &Path) -> Outcome<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("child").args(part).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().ok_or("no pipe")?;
        let (sender, said) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, stdin, said })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn word(&self) -> Outcome<String> {
        Ok(self.said.recv_timeout(WORD)?)
    }

    pub(super) fn is_silent(&self) -> bool {
        self.said.recv_timeout(SILENCE).is_err()
    }

    /// Waits for the end, which comes after this at the latest.
    pub(super) fn end(mut self) -> Outcome {
        drop(self.stdin.take());
        let status = self.child.wait()?;
        check!(status.success(), "the other process: {status}");
        Ok(())
    }

    /// Ends it as a crash would.
    pub(super) fn kill(mut self) -> Outcome {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

/// What another user meets who tries something: 0 or an error's number.
pub(super) fn attempt(user: &str, group: &str, also: &str, what: &str, path: &Path) -> Outcome<i32> {
    let other = Other::start(&["attempt", user, group, also, what], path)?;
    let number = other.word()?.parse()?;
    other.end()?;
    Ok(number)
}

/// Plays a part.
pub(crate) fn child(words: &[&str]) -> Outcome {
    match *words {
        ["hold", kind, path] => {
            let file = OpenOptions::new().read(true).write(true).open(path)?;
            locks::wait_for(&file, Kind::named(kind)?)?;
            say("held")?;
            until_end()
        }
        ["attempt", user, group, also, what, path] => {
            setgroups(&[Gid::from_raw(also.parse()?)])?;
            setgid(Gid::from_raw(group.parse()?))?;
            setuid(Uid::from_raw(user.parse()?))?;
            let number =
                try_it(what, Path::new(path)).err().map_or(0, |error| error.raw_os_error().unwrap_or(-1));
            say(&number.to_string())
        }
        ["append", letter, lines, path] => {
            let mut file = OpenOptions::new().append(true).open(path)?;
            for number in 0..lines.parse::<usize>()? {
                file.write_all(format!("{letter} {number:08}\n").as_bytes())?;
            }
            say("done")
        }
        ["create", name_count, path] => {
            let mut made = 0;
            for number in 0..name_count.parse::<usize>()? {
                made += usize::from(File::create_new(Path::new(path).join(number.to_string())).is_ok());
            }
            say(&made.to_string())
        }
        // Answers in the second half of the page what is asked in the first.
        ["map", path] => {
            let file = OpenOptions::new().read(true).write(true).open(path)?;
            let mut mapping = Mapping::shared(&file, 0, 4096)?;
            say("mapped")?;
            while mapping.bytes()[0] == 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
            let asked = mapping.bytes()[0];
            mapping.bytes_mut()[2048] = asked + 1;
            say("answered")?;
            let mut byte = [0];
            file.read_at(&mut byte, 2048)?;
            check!(byte[0] == asked + 1, "read gives {}, not what was mapped", byte[0]);
            until_end()
        }
        _ => Err(format!("no such part: {words:?}").into()),
    }
}

fn try_it(what: &str, path: &Path) -> std::io::Result<()> {
    match what {
        "read" => File::open(path).map(drop),
        "write" => OpenOptions::new().append(true).open(path).map(drop),
        "create" => File::create_new(path).map(drop),
        "directory" => fs::create_dir(path),
        "list" => fs::read_dir(path).map(drop),
        "remove" => fs::remove_file(path),
        "chmod" => fs::set_permissions(path, PermissionsExt::from_mode(0o777)),
        "chown" => std::os::unix::fs::chown(path, Some(1), Some(1)),
        "touch" => File::options().write(true).open(path)?.set_modified(std::time::SystemTime::now()),
        "truncate" => OpenOptions::new().write(true).truncate(true).open(path).map(drop),
        _ => Err(std::io::ErrorKind::InvalidInput.into()),
    }
}

fn say(text: &str) -> Outcome {
    println!("{text}");
    Ok(std::io::stdout().flush()?)
}

fn until_end() -> Outcome {
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
