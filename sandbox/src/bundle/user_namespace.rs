//! `linux.uidMappings` and `linux.gidMappings` of a configuration: the user namespace that a container gets in the guest. The
//! "host" of the mappings is the guest, whose IDs are those of the shared files' owners. Pure.

use krx_proto::{BadMap, IdMapping, User, UserNamespace, guest_id, validate_container_map};
use oci_spec::runtime::LinuxIdMapping;

use super::{BundleError, invalid};

const UIDS: &str = "linux.uidMappings";
const GIDS: &str = "linux.gidMappings";

/// `is_wanted` is whether the container has a namespace of type `user`; `user` is the one of its first process.
pub(super) fn read(
    is_wanted: bool,
    uids: &[LinuxIdMapping],
    gids: &[LinuxIdMapping],
    user: &User,
) -> Result<Option<UserNamespace>, BundleError> {
    if !is_wanted {
        let mapped = [(UIDS, uids), (GIDS, gids)].into_iter().find(|(_, mappings)| !mappings.is_empty());
        return match mapped {
            Some((field, _)) => Err(invalid(field, "needs a namespace of type user")),
            None => Ok(None),
        };
    }
    let namespace = UserNamespace {
        uids: map(UIDS, uids, "a namespace of type user", validate_container_map)?,
        gids: map(GIDS, gids, "a namespace of type user", validate_container_map)?,
    };
    let unmapped = |field: &str, id: u32, of: &str| {
        Err(invalid(format!("process.user.{field}"), format!("{id} is none of the IDs in {of}")))
    };
    if guest_id(&namespace.uids, user.uid).is_none() {
        return unmapped("uid", user.uid, UIDS);
    }
    if guest_id(&namespace.gids, user.gid).is_none() {
        return unmapped("gid", user.gid, GIDS);
    }
    match user.additional_gids.iter().find(|id| guest_id(&namespace.gids, **id).is_none()) {
        Some(id) => unmapped("additionalGids", *id, GIDS),
        None => Ok(Some(namespace)),
    }
}

/// Refuses an owner of a file system that nobody in the container can be: the guest's kernel would not say which option it is.
pub(super) fn check_owners(
    field: &str,
    options: &[String],
    namespace: Option<&UserNamespace>,
) -> Result<(), BundleError> {
    let Some(UserNamespace { uids, gids }) = namespace else { return Ok(()) };
    for option in options {
        let (map, of, id) = match option.split_once('=') {
            Some(("uid", id)) => (uids, UIDS, id),
            Some(("gid", id)) => (gids, GIDS, id),
            _ => continue,
        };
        if id.parse().is_ok_and(|id| guest_id(map, id).is_none()) {
            return Err(invalid(format!("{field}.options"), format!("{option} is none of the IDs in {of}")));
        }
    }
    Ok(())
}

pub(super) fn map(
    field: &str,
    wanted: &[LinuxIdMapping],
    needed_by: &str,
    validate: impl Fn(&[IdMapping]) -> Result<(), BadMap>,
) -> Result<Vec<IdMapping>, BundleError> {
    if wanted.is_empty() {
        return Err(invalid(field, format!("is missing, which {needed_by} needs")));
    }
    let one = |one: &LinuxIdMapping| IdMapping {
        container: one.container_id(),
        guest: one.host_id(),
        size: one.size(),
    };
    let map: Vec<_> = wanted.iter().map(one).collect();
    validate(&map).map_err(|bad| {
        let index = bad.index.map(|index| format!("[{index}]")).unwrap_or_default();
        invalid(format!("{field}{index}"), bad.what)
    })?;
    Ok(map)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn mapping(container: u32, host: u32, size: u32) -> Value {
        json!({"containerID": container, "hostID": host, "size": size})
    }

    fn read_json(uids: &Value, gids: &Value, user: &User) -> Result<Option<UserNamespace>, BundleError> {
        let list = |value: &Value| serde_json::from_value::<Vec<LinuxIdMapping>>(value.clone()).unwrap();
        read(true, &list(uids), &list(gids), user)
    }

    #[test]
    fn ids_are_mapped_as_asked() {
        let (uids, gids) =
            (json!([mapping(0, 100_000, 1000), mapping(2000, 5, 1)]), json!([mapping(0, 7, 9)]));
        let user = User { uid: 2000, gid: 8, additional_gids: vec![0], umask: None };
        let found = read_json(&uids, &gids, &user).unwrap().unwrap();
        assert_eq!(found.uids[1], IdMapping { container: 2000, guest: 5, size: 1 });
        assert_eq!(found.gids, [IdMapping { container: 0, guest: 7, size: 9 }]);
        assert_eq!(read(false, &[], &[], &user).unwrap(), None);
    }

    #[test]
    fn what_is_no_map_is_refused_by_its_field() {
        let good = json!([mapping(0, 100_000, 1000)]);
        let many: Vec<_> = (0..341).map(|id| mapping(id, id, 1)).collect();
        let long: Vec<_> = (0..340).map(|id| mapping(id, 1_000_000_000 + id, 1)).collect();
        for (bad, field, word) in [
            (json!([]), "", "missing"),
            (json!([mapping(0, 1, 0)]), "[0]", "size is 0"),
            (json!([mapping(0, 1, 5), mapping(4, 100, 1)]), "[1]", "container"),
            (json!([mapping(0, 1, 5), mapping(5, 5, 1)]), "[1]", "host"),
            (json!([mapping(0, u32::MAX, 1)]), "[0]", "greatest"),
            (json!([mapping(u32::MAX, 0, 1)]), "[0]", "greatest"),
            (json!([mapping(7, 0, u32::MAX)]), "[0]", "greatest"),
            (json!([mapping(1, 100, 5)]), "", "ID 0"),
            (json!(many), "", "340"),
            (json!(long), "", "4095 bytes"),
        ] {
            for (uids, gids, name) in [(&bad, &good, UIDS), (&good, &bad, GIDS)] {
                let error = read_json(uids, gids, &User::default()).unwrap_err();
                let BundleError::Invalid { field: named, what } = &error else { panic!("{error}") };
                assert_eq!(*named, format!("{name}{field}"), "{error}");
                assert!(what.contains(word), "{error}");
            }
        }
    }

    #[test]
    fn mappings_and_their_namespace_need_each_other() {
        let list: Vec<LinuxIdMapping> = serde_json::from_value(json!([mapping(0, 1, 1)])).unwrap();
        for (uids, gids, field) in [(&list[..], &[][..], UIDS), (&[][..], &list[..], GIDS)] {
            let error = read(false, uids, gids, &User::default()).unwrap_err().to_string();
            assert!(error.contains(field) && error.contains("type user"), "{error}");
        }
    }

    #[test]
    fn owners_of_file_systems_have_to_be_mapped() {
        let map = vec![IdMapping { container: 0, guest: 100_000, size: 5 }];
        let namespace = UserNamespace { uids: map.clone(), gids: map };
        let check = |options: &[&str], namespace| {
            let options: Vec<_> = options.iter().map(ToString::to_string).collect();
            check_owners("mounts[2]", &options, namespace)
        };
        assert!(check(&["gid=4", "uid=0", "mode=0620", "gid=x"], Some(&namespace)).is_ok());
        assert!(check(&["gid=5"], None).is_ok());
        for option in ["gid=5", "uid=5"] {
            let error = check(&["nosuid", option], Some(&namespace)).unwrap_err().to_string();
            assert!(error.contains("mounts[2].options") && error.contains(option), "{error}");
        }
    }

    #[test]
    fn the_process_s_ids_have_to_be_mapped() {
        let map = json!([mapping(0, 100_000, 10)]);
        for (user, field) in [
            (User { uid: 10, ..User::default() }, "process.user.uid"),
            (User { gid: 10, ..User::default() }, "process.user.gid"),
            (User { additional_gids: vec![1, 10], ..User::default() }, "process.user.additionalGids"),
        ] {
            let error = read_json(&map, &map, &user).unwrap_err().to_string();
            assert!(error.contains(field) && error.contains("10 "), "{error}");
        }
    }
}
