//! What the guest as a whole is told to be: its host name and kernel parameters, as its pod has them. Containers that have
//! no namespaces of their own for these find them so.

use std::fs;

use krx_proto::AgentError;
use nix::unistd::sethostname;

use crate::container::{check_hostname, sysctls};
use crate::error::Doing;

/// Sets them. What it was given is checked before anything is done.
pub(crate) fn apply(name: Option<&str>, parameters: Vec<(String, String)>) -> Result<(), AgentError> {
    name.map_or(Ok(()), check_hostname)?;
    let parameters = sysctls(parameters)?;
    if let Some(name) = name {
        sethostname(name).doing(|| format!("Cannot set the hostname {name}"))?;
    }
    for (path, value) in parameters {
        let doing = || format!("Cannot set the kernel parameter {path} to {value}");
        fs::write(format!("/proc/sys/{path}"), &value).doing(doing)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_parameter_is_refused_before_anything_is_done() {
        let refused = |name: &str| apply(None, vec![(name.into(), "1".into())]).unwrap_err().message;
        assert!(refused("../etc/passwd").contains("kernel parameter"));
        assert!(refused("net..x").contains("kernel parameter"));
        assert!(apply(Some(&"x".repeat(65)), Vec::new()).is_err());
        assert!(apply(None, vec![("net.core.somaxconn".into(), "1".into()); 5000]).is_err());
    }
}
