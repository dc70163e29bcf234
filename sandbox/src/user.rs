//! Users by name: `USER[:GROUP]`, looked up in the image's own `/etc/passwd` and `/etc/group`.
//!
//! The image is not trusted: see [`image_file`](crate::image_file). Lines that make no sense are passed over, as the C
//! library does.

use std::io;
use std::path::Path;

use krx_proto::User;

use crate::image_file::read_in_root;

/// Largest of these files that is read: an image could bring one that fills memory.
const MAX_FILE: u64 = 4 << 20;

/// Why a user cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    #[error("{0} is not of the form USER[:GROUP]")]
    Form(String),
    #[error("{what} {name} is not known: {file} of the root file system does not have it")]
    Unknown { what: &'static str, name: String, file: &'static str },
    #[error("{file} of the root file system cannot be read")]
    Read {
        file: &'static str,
        #[source]
        source: io::Error,
    },
}

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// Finds `USER[:GROUP]`, each a name or a number. A user without a group has that of `passwd` and all that `group`
/// puts him in; a number that `passwd` does not have gets group 0.
///
/// # Errors
/// A name that the image does not know, or its files cannot be read.
pub fn resolve(rootfs: &Path, text: &str) -> Result<User, UserError> {
    let (user, group) = match text.split_once(':') {
        Some((_, group)) if group.is_empty() || group.contains(':') => {
            return Err(UserError::Form(text.into()));
        }
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    if user.is_empty() {
        return Err(UserError::Form(text.into()));
    }
    // Plain numbers need no file, which the image may not have.
    if let (Some(uid), Some(gid)) = (number(user), group.and_then(number)) {
        return Ok(User { uid, gid, ..User::default() });
    }
    let passwd = table(rootfs, PASSWD)?;
    let entry = find(&passwd, user, 3);
    let (uid, own_gid, name) = match (entry.as_deref(), number(user)) {
        (Some([name, _, uid, gid, ..]), _) => (number(uid), number(gid), Some(*name)),
        (_, uid) => (uid, Some(0), None),
    };
    let unknown = |what, name: &str, file| UserError::Unknown { what, name: name.into(), file };
    let (Some(uid), Some(own_gid)) = (uid, own_gid) else {
        return Err(unknown("User", user, PASSWD));
    };
    let groups = table(rootfs, GROUP)?;
    if let Some(group) = group {
        let gid = match find(&groups, group, 3).as_deref() {
            Some([_, _, gid, ..]) => number(gid),
            _ => number(group),
        };
        let gid = gid.ok_or_else(|| unknown("Group", group, GROUP))?;
        return Ok(User { uid, gid, ..User::default() });
    }
    let additional_gids = name.map(|name| memberships(&groups, name, own_gid)).unwrap_or_default();
    Ok(User { uid, gid: own_gid, additional_gids, umask: None })
}

/// Home directory of a user, where the image knows him.
#[must_use]
pub fn home(rootfs: &Path, uid: u32) -> Option<String> {
    let passwd = table(rootfs, PASSWD).ok()?;
    rows(&passwd).find_map(|row| match row[..] {
        [_, _, id, _, _, home, ..] if number(id) == Some(uid) && home.starts_with('/') => Some(home.into()),
        _ => None,
    })
}

/// One of the files; an image without it has no names.
fn table(rootfs: &Path, file: &'static str) -> Result<String, UserError> {
    match read_in_root(rootfs, file, MAX_FILE) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(UserError::Read { file, source }),
    }
}

fn rows(table: &str) -> impl Iterator<Item = Vec<&str>> {
    table.lines().map(|line| line.split(':').collect())
}

/// The row whose name or whose number (third field) is `wanted`; names win.
fn find<'a>(table: &'a str, wanted: &str, least: usize) -> Option<Vec<&'a str>> {
    let is_row = |row: &Vec<&str>| row.len() >= least && number(row[2]).is_some();
    let by_name = rows(table).filter(is_row).find(|row| row[0] == wanted);
    by_name.or_else(|| {
        let id = number(wanted)?;
        rows(table).filter(is_row).find(|row| number(row[2]) == Some(id))
    })
}

fn memberships(groups: &str, name: &str, own_gid: u32) -> Vec<u32> {
    let gid_of = |row: Vec<&str>| match row[..] {
        [_, _, gid, members, ..] if members.split(',').any(|member| member == name) => number(gid),
        _ => None,
    };
    let mut gids: Vec<_> = rows(groups).filter_map(gid_of).filter(|gid| *gid != own_gid).collect();
    gids.sort_unstable();
    gids.dedup();
    gids
}

fn number(text: &str) -> Option<u32> {
    // No sign: `+5` is a name. The last number means "none" to the kernel.
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?.filter(|id| *id != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scratch;

    fn image() -> Scratch {
        let scratch = Scratch::new("user");
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\n:x:y\nweb:x:33:34:Web:/srv/web:/bin/false\n7:x:70:71::/:\n";
        scratch.write("etc/passwd", passwd.as_bytes());
        scratch.write("etc/group", b"root:x:0:\nweb:x:34:\nssl:x:90:other,web\nlog:x:91:web\nbad:x:z:web\n");
        scratch
    }

    fn user(uid: u32, gid: u32, additional: &[u32]) -> User {
        User { uid, gid, additional_gids: additional.into(), umask: None }
    }

    #[test]
    fn names_and_numbers_are_found() {
        let image = image();
        let found = |text| resolve(image.path(), text).unwrap();
        assert_eq!(found("web"), user(33, 34, &[90, 91]));
        assert_eq!(found("33"), user(33, 34, &[90, 91]));
        assert_eq!(found("web:ssl"), user(33, 90, &[]));
        assert_eq!(found("web:5"), user(33, 5, &[]));
        assert_eq!(found("1234:5678"), user(1234, 5678, &[]));
        assert_eq!(found("1234"), user(1234, 0, &[]));
        assert_eq!(found("1234:log"), user(1234, 91, &[]));
        // A name of digits is a name first.
        assert_eq!(found("7"), user(70, 71, &[]));
    }

    #[test]
    fn unknown_and_malformed_users_are_refused() {
        let image = image();
        for bad in ["", ":", "web:", ":5", "a:b:c"] {
            assert!(matches!(resolve(image.path(), bad), Err(UserError::Form(_))), "{bad}");
        }
        for bad in ["nobody", "-1", "+5", "4294967295", "99999999999", "broken", "web:nogroup"] {
            assert!(matches!(resolve(image.path(), bad), Err(UserError::Unknown { .. })), "{bad}");
        }
    }

    #[test]
    fn image_without_files_knows_numbers() {
        let scratch = Scratch::new("user");
        assert_eq!(resolve(scratch.path(), "5").unwrap(), user(5, 0, &[]));
        assert!(resolve(scratch.path(), "web").is_err());
        assert_eq!(home(scratch.path(), 0), None);
    }

    #[test]
    fn home_is_the_image_s() {
        let image = image();
        assert_eq!(home(image.path(), 33).as_deref(), Some("/srv/web"));
        assert_eq!(home(image.path(), 34), None);
    }
}
