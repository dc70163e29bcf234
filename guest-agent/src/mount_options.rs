//! Mount options by name, as in an OCI configuration, taken apart: attributes of the mount, propagation, and what is
//! left for the file system itself. Pure.

use crate::sys::mount::AttributeChange;

/// Options of one mount, taken apart.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct MountOptions {
    pub(crate) attributes: AttributeChange,
    /// Attributes for everything mounted below as well (`rro` and its like).
    pub(crate) recursive: AttributeChange,
    pub(crate) propagation: Propagation,
    /// `bind` or `rbind`, the latter with what is mounted below.
    pub(crate) bind: Option<Bind>,
    /// What is at its place, in a tmpfs (`tmpcopyup`).
    pub(crate) copy_up: bool,
    /// Not an option of the mount, so one of the file system: name and value.
    pub(crate) parameters: Vec<(String, Option<String>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bind {
    pub(crate) recursive: bool,
}

/// The propagation type, `MS_*` of mount(2); 0 keeps what is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Propagation {
    pub(crate) kind: u64,
    pub(crate) recursive: bool,
}

/// What one option name does to the attributes.
enum Change {
    Set(u64),
    Clear(u64),
    /// The access time modes exclude each other: the field is cleared, then one of them set.
    AccessTime(u64),
}

impl MountOptions {
    pub(crate) fn parse(options: &[String]) -> Self {
        options.iter().fold(Self::default(), |parsed, option| parsed.with(option))
    }

    fn with(mut self, option: &str) -> Self {
        if let Some(change) = change(option) {
            apply(&mut self.attributes, &change);
        } else if let Some(change) = option.strip_prefix('r').and_then(change) {
            apply(&mut self.recursive, &change);
        } else if let Some(propagation) = propagation(option) {
            self.propagation = propagation;
        } else {
            match option {
                "bind" => self.bind = Some(Bind { recursive: false }),
                "rbind" => self.bind = Some(Bind { recursive: true }),
                "tmpcopyup" => self.copy_up = true,
                // What every mount is anyway.
                "" | "defaults" | "async" | "noiversion" | "nolazytime" | "nomand" => {}
                _ => self.parameters.push(match option.split_once('=') {
                    Some((name, value)) => (name.into(), Some(value.into())),
                    None => (option.into(), None),
                }),
            }
        }
        self
    }
}

fn change(option: &str) -> Option<Change> {
    Some(match option {
        "ro" => Change::Set(libc::MOUNT_ATTR_RDONLY),
        "rw" => Change::Clear(libc::MOUNT_ATTR_RDONLY),
        "nosuid" => Change::Set(libc::MOUNT_ATTR_NOSUID),
        "suid" => Change::Clear(libc::MOUNT_ATTR_NOSUID),
        "nodev" => Change::Set(libc::MOUNT_ATTR_NODEV),
        "dev" => Change::Clear(libc::MOUNT_ATTR_NODEV),
        "noexec" => Change::Set(libc::MOUNT_ATTR_NOEXEC),
        "exec" => Change::Clear(libc::MOUNT_ATTR_NOEXEC),
        "nosymfollow" => Change::Set(libc::MOUNT_ATTR_NOSYMFOLLOW),
        "symfollow" => Change::Clear(libc::MOUNT_ATTR_NOSYMFOLLOW),
        "nodiratime" => Change::Set(libc::MOUNT_ATTR_NODIRATIME),
        "diratime" => Change::Clear(libc::MOUNT_ATTR_NODIRATIME),
        "noatime" => Change::AccessTime(libc::MOUNT_ATTR_NOATIME),
        "strictatime" => Change::AccessTime(libc::MOUNT_ATTR_STRICTATIME),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => {
            Change::AccessTime(libc::MOUNT_ATTR_RELATIME)
        }
        _ => return None,
    })
}

fn apply(to: &mut AttributeChange, change: &Change) {
    match *change {
        Change::Set(bit) => {
            to.set |= bit;
            to.clear &= !bit;
        }
        Change::Clear(bit) => {
            to.set &= !bit;
            to.clear |= bit;
        }
        Change::AccessTime(mode) => {
            to.set = to.set & !libc::MOUNT_ATTR__ATIME | mode;
            to.clear |= libc::MOUNT_ATTR__ATIME;
        }
    }
}

fn propagation(option: &str) -> Option<Propagation> {
    let (name, recursive) = match option {
        "private" | "shared" | "slave" | "unbindable" => (option, false),
        _ => (option.strip_prefix('r')?, true),
    };
    let kind = match name {
        "private" => libc::MS_PRIVATE,
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some(Propagation { kind, recursive })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> MountOptions {
        MountOptions::parse(&options.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn flags_and_parameters_are_told_apart() {
        let parsed = parse(&["nosuid", "strictatime", "mode=755", "size=65536k", "newinstance"]);
        let parameter = |name: &str, value: Option<&str>| (name.to_string(), value.map(str::to_string));
        assert_eq!(parsed.attributes.set, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_STRICTATIME);
        assert_eq!(
            parsed.parameters,
            [
                parameter("mode", Some("755")),
                parameter("size", Some("65536k")),
                parameter("newinstance", None)
            ]
        );
    }

    #[test]
    fn the_last_of_opposites_wins() {
        assert_eq!(parse(&["ro", "rw"]).attributes.set, 0);
        assert_eq!(parse(&["ro", "rw"]).attributes.clear, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(parse(&["rw", "ro"]).attributes.set, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(parse(&["noatime", "strictatime"]).attributes.set, libc::MOUNT_ATTR_STRICTATIME);
    }

    #[test]
    fn names_that_begin_with_r_are_not_all_recursive() {
        let parsed = parse(&["relatime", "rbind", "rro", "rprivate"]);
        assert_eq!(parsed.attributes.clear, libc::MOUNT_ATTR__ATIME);
        assert_eq!(parsed.bind, Some(Bind { recursive: true }));
        assert_eq!(parsed.recursive.set, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(parsed.propagation, Propagation { kind: libc::MS_PRIVATE, recursive: true });
        assert!(parsed.parameters.is_empty());
    }
}
