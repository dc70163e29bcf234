//! Maps of IDs: the user namespace of a container (`user_namespaces(7)`), and mounts whose files' owners are mapped
//! (`mount_setattr(2)`, *ID-mapped mounts*).

use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// Most lines of a map that Linux takes (`UID_GID_MAP_MAX_EXTENTS`).
pub const MAX_ID_MAPPINGS: usize = 340;
/// A map is taken in one write of less than a page.
const MAX_MAP: usize = 4095;

/// A new user namespace, which then owns the container's other new ones.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNamespace {
    pub uids: Vec<IdMapping>,
    pub gids: Vec<IdMapping>,
}

/// Other owners for the files of a mount: what belongs to an ID of `container` on disk belongs to the one of `guest` in
/// the guest, and the other way around what is made there. What is not mapped belongs to nobody.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountIdMap {
    pub ids: UserNamespace,
    /// For what is mounted below, too.
    pub recursive: bool,
}

/// A range of IDs: those of the container from `container` on are those of the guest from `guest` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    pub container: u32,
    pub guest: u32,
    pub size: u32,
}

/// What is wrong with a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadMap {
    /// The mapping, where it is one alone.
    pub index: Option<usize>,
    /// The end of a sentence that begins with the map's name.
    pub what: String,
}

/// Judges a map of a container's user namespace: its root has to be in it, by whom its file systems are made.
///
/// # Errors
/// The map is none, or without the container's root.
pub fn validate_container_map(map: &[IdMapping]) -> Result<(), BadMap> {
    validate_id_mappings(map)?;
    if guest_id(map, 0).is_none() {
        let what = "maps the container's ID 0 to nothing: it is needed to make the container".into();
        return Err(BadMap { index: None, what });
    }
    Ok(())
}

/// Judges a map as the kernel would, and says why.
///
/// # Errors
/// The map is none.
pub fn validate_id_mappings(map: &[IdMapping]) -> Result<(), BadMap> {
    let all = |what: String| Err(BadMap { index: None, what });
    if map.is_empty() {
        return all("is empty, which maps no ID at all".into());
    }
    if map.len() > MAX_ID_MAPPINGS {
        return all(format!("has {} mappings, Linux takes {MAX_ID_MAPPINGS} at most", map.len()));
    }
    for (index, one) in map.iter().enumerate() {
        let bad = |what: String| Err(BadMap { index: Some(index), what });
        if one.size == 0 {
            return bad("is of no IDs: its size is 0".into());
        }
        // The last number is nobody's ID.
        if one.container.checked_add(one.size).is_none() || one.guest.checked_add(one.size).is_none() {
            return bad("leads beyond the greatest ID, 4294967294".into());
        }
        let before = &map[..index];
        if before.iter().any(|other| overlap((other.container, other.size), (one.container, one.size))) {
            return bad("has IDs of the container that another mapping has, too".into());
        }
        if before.iter().any(|other| overlap((other.guest, other.size), (one.guest, one.size))) {
            return bad("has IDs of the host's side that another mapping has, too".into());
        }
    }
    if id_map(map).len() > MAX_MAP {
        return all(format!("is longer than the {MAX_MAP} bytes that Linux takes: use fewer mappings"));
    }
    Ok(())
}

fn overlap(one: (u32, u32), other: (u32, u32)) -> bool {
    let end = |(first, size): (u32, u32)| u64::from(first) + u64::from(size);
    u64::from(one.0) < end(other) && u64::from(other.0) < end(one)
}

/// The guest's ID for one of the container's.
#[must_use]
pub fn guest_id(map: &[IdMapping], id: u32) -> Option<u32> {
    map.iter().find_map(|one| {
        let offset = id.checked_sub(one.container).filter(|offset| *offset < one.size)?;
        one.guest.checked_add(offset)
    })
}

/// A map as it is written to `/proc/PID/uid_map`.
#[must_use]
pub fn id_map(map: &[IdMapping]) -> String {
    map.iter().fold(String::new(), |mut text, IdMapping { container, guest, size }| {
        let _ = writeln!(text, "{container} {guest} {size}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(ranges: &[(u32, u32, u32)]) -> Vec<IdMapping> {
        ranges.iter().map(|&(container, guest, size)| IdMapping { container, guest, size }).collect()
    }

    #[test]
    fn ids_are_those_of_their_range() {
        let map = map(&[(0, 100_000, 1000), (2000, 7, 2)]);
        let found = [0, 999, 1000, 1999, 2000, 2001, 2002, u32::MAX].map(|id| guest_id(&map, id));
        assert_eq!(found, [Some(100_000), Some(100_999), None, None, Some(7), Some(8), None, None]);
        assert_eq!(id_map(&map), "0 100000 1000\n2000 7 2\n");
        assert_eq!(validate_id_mappings(&map), Ok(()));
    }

    #[test]
    fn what_the_kernel_would_refuse_is_refused_with_a_reason() {
        let refused = |ranges: &[(u32, u32, u32)], index: Option<usize>, word: &str| {
            let bad = validate_container_map(&map(ranges)).unwrap_err();
            assert_eq!(bad.index, index, "{}", bad.what);
            assert!(bad.what.contains(word), "{}", bad.what);
        };
        refused(&[], None, "empty");
        refused(&[(0, 1, 1), (5, 6, 0)], Some(1), "size is 0");
        refused(&[(0, u32::MAX, 1)], Some(0), "greatest ID");
        refused(&[(2, 0, u32::MAX - 1)], Some(0), "greatest ID");
        refused(&[(0, 100, 10), (9, 200, 1)], Some(1), "of the container");
        refused(&[(0, 100, 10), (10, 109, 1)], Some(1), "host's side");
        refused(&[(1, 100, 10)], None, "ID 0");
        let many = |count: u32, from: u32| (0..count).map(|id| (id, from + id, 1)).collect::<Vec<_>>();
        refused(&many(341, 0), None, "340");
        refused(&many(340, 1_000_000_000), None, "4095 bytes");
        assert_eq!(validate_id_mappings(&map(&[(1, 100, 10)])), Ok(()));
        assert_eq!(validate_container_map(&map(&many(340, 0))), Ok(()));
        assert_eq!(validate_id_mappings(&map(&[(0, 0, u32::MAX)])), Ok(()));
    }
}
