//! `uidMappings` and `gidMappings` of a mount, and its options `idmap` and `ridmap`. Pure.

use krx_proto::{MountIdMap, UserNamespace, validate_id_mappings};

use super::user_namespace::map;
use super::{BundleError, invalid, unsupported};

/// The options without those that are read here, and the map of the mount. With an option alone it is that of the container.
pub(super) fn read(
    field: &str,
    mount: &oci_spec::runtime::Mount,
    options: Vec<String>,
    container: Option<&UserNamespace>,
) -> Result<(Vec<String>, Option<Box<MountIdMap>>), BundleError> {
    // runc took maps in the option once, in an order of its own.
    if let Some(option) =
        options.iter().find(|option| option.starts_with("idmap=") || option.starts_with("ridmap="))
    {
        return Err(unsupported(
            format!("{field}.options"),
            format!("{option}: use uidMappings and gidMappings"),
        ));
    }
    let asks = |option: &&String| matches!(option.as_str(), "idmap" | "ridmap");
    let asked = options.iter().rfind(asks).map(|option| option == "ridmap");
    let ids = match (mount.uid_mappings(), mount.gid_mappings()) {
        (None, None) if asked.is_none() => return Ok((options, None)),
        (None, None) => {
            let missing =
                "asks for an ID-mapped mount without uidMappings, in a container without a user namespace";
            container.cloned().ok_or_else(|| invalid(format!("{field}.options"), missing))?
        }
        (uids, gids) => {
            let map = |name: &str, mappings: &Option<Vec<_>>| {
                let field = format!("{field}.{name}");
                map(
                    &field,
                    mappings.as_deref().unwrap_or_default(),
                    "an ID-mapped mount",
                    validate_id_mappings,
                )
            };
            UserNamespace { uids: map("uidMappings", uids)?, gids: map("gidMappings", gids)? }
        }
    };
    let map = MountIdMap { ids, recursive: asked.unwrap_or(false) };
    let options = options.into_iter().filter(|option| !asks(&option)).collect();
    Ok((options, Some(Box::new(map))))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read_json(
        mount: &Value,
        container: Option<&UserNamespace>,
    ) -> Result<(Vec<String>, Option<Box<MountIdMap>>), BundleError> {
        let mount: oci_spec::runtime::Mount = serde_json::from_value(mount.clone()).unwrap();
        let options = mount.options().clone().unwrap_or_default();
        read("mounts[3]", &mount, options, container)
    }

    fn with(options: &[&str], uids: Option<Value>, gids: Option<Value>) -> Value {
        let mut mount = json!({"destination": "/m", "type": "bind", "source": "/s", "options": options});
        for (name, mappings) in [("uidMappings", uids), ("gidMappings", gids)] {
            if let Some(mappings) = mappings {
                mount[name] = mappings;
            }
        }
        mount
    }

    #[test]
    fn owners_are_mapped_as_asked() {
        let ids = |first: u32| Some(json!([{"containerID": 5, "hostID": first, "size": 10}]));
        for (option, recursive) in [("nosuid", false), ("idmap", false), ("ridmap", true)] {
            let (options, map) = read_json(&with(&["rbind", option], ids(1000), ids(2000)), None).unwrap();
            let map = map.unwrap();
            assert_eq!(map.recursive, recursive);
            assert_eq!(
                (map.ids.uids[0].guest, map.ids.gids[0].guest, map.ids.gids[0].container),
                (1000, 2000, 5)
            );
            assert_eq!(options.len(), if option == "nosuid" { 2 } else { 1 });
        }
        assert_eq!(read_json(&with(&["rbind"], None, None), None).unwrap(), (vec!["rbind".into()], None));
    }

    #[test]
    fn an_option_alone_means_the_container_s_map() {
        let container = UserNamespace { uids: Vec::new(), gids: Vec::new() };
        let (_, map) = read_json(&with(&["idmap"], None, None), Some(&container)).unwrap();
        assert_eq!(map.unwrap().ids, container);
        let error = read_json(&with(&["ridmap"], None, None), None).unwrap_err().to_string();
        assert!(error.contains("mounts[3].options") && error.contains("user namespace"), "{error}");
    }

    #[test]
    fn what_is_no_map_is_refused_by_its_field() {
        let good = || Some(json!([{"containerID": 0, "hostID": 1, "size": 1}]));
        for (uids, gids, field) in [
            (good(), None, "mounts[3].gidMappings"),
            (None, good(), "mounts[3].uidMappings"),
            (Some(json!([])), good(), "mounts[3].uidMappings"),
            (good(), Some(json!([{"containerID": 0, "hostID": 1, "size": 0}])), "mounts[3].gidMappings[0]"),
        ] {
            let error = read_json(&with(&[], uids, gids), None).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
        let error = read_json(&with(&["idmap=0-1-2"], good(), good()), None).unwrap_err().to_string();
        assert!(error.contains("uidMappings"), "{error}");
    }
}
