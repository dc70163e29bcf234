//! `hooks` of a configuration: those that run in the container. Those that OCI wants to be run outside are refused by
//! [`super::REFUSED`]: the host has no namespace of the container, and the guest no programs of the host. Pure.

use std::path::Path;

use krx_proto::{HOOKS_SECONDS, Hook, Hooks, MAX_HOOKS};
use oci_spec::runtime::{self, Spec};

use super::{BundleError, invalid};

/// Version of the specification whose state the hooks are told.
const STATE_VERSION: &str = "1.2.0";

/// `bundle` is told to the hooks; to them it is a name, as it is a directory of the host.
pub(super) fn read(name: &str, bundle: &Path, spec: &Spec) -> Result<Option<Box<Hooks>>, BundleError> {
    let Some(wanted) = spec.hooks() else { return Ok(None) };
    let create = hooks("hooks.createContainer", wanted.create_container().as_deref())?;
    let start = hooks("hooks.startContainer", wanted.start_container().as_deref())?;
    if create.is_empty() && start.is_empty() {
        return Ok(None);
    }
    if create.len() + start.len() > MAX_HOOKS {
        return Err(invalid("hooks", format!("has more than {MAX_HOOKS}")));
    }
    let state = serde_json::json!({
        "ociVersion": STATE_VERSION,
        "id": name,
        "bundle": bundle.to_string_lossy(),
        "annotations": spec.annotations().clone().unwrap_or_default(),
    });
    let mut state = state.to_string();
    // The agent goes on from here.
    state.pop();
    Ok(Some(Box::new(Hooks { create, start, state })))
}

fn hooks(field: &str, wanted: Option<&[runtime::Hook]>) -> Result<Vec<Hook>, BundleError> {
    let one = |(index, hook)| read_one(&format!("{field}[{index}]"), hook);
    wanted.unwrap_or_default().iter().enumerate().map(one).collect()
}

fn read_one(field: &str, wanted: &runtime::Hook) -> Result<Hook, BundleError> {
    let path = wanted.path().to_str().filter(|path| path.starts_with('/') && !path.contains('\0'));
    let path = path.ok_or_else(|| invalid(format!("{field}.path"), "is not an absolute path"))?;
    let timeout = wanted.timeout().map(|seconds| u32::try_from(seconds).ok().filter(|seconds| *seconds > 0));
    if timeout == Some(None) {
        return Err(invalid(format!("{field}.timeout"), "has to be a number of seconds greater than zero"));
    }
    let timeout = timeout.flatten();
    if let Some(seconds) = timeout.filter(|seconds| *seconds > HOOKS_SECONDS) {
        let what = format!("{seconds} s are too long: krx gives the hooks of a container {HOOKS_SECONDS} s");
        return Err(invalid(format!("{field}.timeout"), what));
    }
    Ok(Hook {
        path: path.into(),
        args: wanted.args().clone().unwrap_or_default(),
        env: wanted.env().clone().unwrap_or_default(),
        timeout,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read_json(hooks: Value) -> Result<Option<Box<Hooks>>, BundleError> {
        let spec = json!({"ociVersion": "1.2.0", "annotations": {"a\"b": "}"}, "root": {"path": "r"}, "hooks": hooks});
        read("web", Path::new("/b"), &serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn hooks_of_the_container_are_read() {
        let hook = json!({"path": "/h", "args": ["h", "x"], "env": ["A=1"], "timeout": 3});
        let read = read_json(json!({"createContainer": [hook], "startContainer": [{"path": "/s"}]}));
        let hooks = read.unwrap().unwrap();
        let expected = Hook {
            path: "/h".into(),
            args: vec!["h".into(), "x".into()],
            env: vec!["A=1".into()],
            timeout: Some(3),
        };
        assert_eq!(hooks.create, [expected]);
        assert_eq!(hooks.start, [Hook { path: "/s".into(), ..Hook::default() }]);
        let state: Value = serde_json::from_str(&format!("{},\"pid\":1}}", hooks.state)).unwrap();
        assert_eq!((&state["id"], &state["bundle"], &state["pid"]), (&json!("web"), &json!("/b"), &json!(1)));
        assert_eq!(state["annotations"]["a\"b"], "}");
    }

    #[test]
    fn none_are_none() {
        for none in [Value::Null, json!({}), json!({"startContainer": []})] {
            assert_eq!(read_json(none).unwrap(), None);
        }
    }

    #[test]
    fn bad_ones_are_named() {
        for (hook, word) in [
            (json!({"path": "h"}), "hooks.startContainer[0].path"),
            (json!({"path": "/h\0"}), "hooks.startContainer[0].path"),
            (json!({"path": "/h", "timeout": 0}), "hooks.startContainer[0].timeout"),
            (json!({"path": "/h", "timeout": -1}), "hooks.startContainer[0].timeout"),
            (json!({"path": "/h", "timeout": 51}), "50 s"),
        ] {
            let error = read_json(json!({"startContainer": [hook]})).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let many = vec![json!({"path": "/h"}); MAX_HOOKS + 1];
        assert!(read_json(json!({"createContainer": many})).unwrap_err().to_string().contains("64"));
    }
}
