//! The command line of a shim, as containerd calls it: flags in Go's style, then an action.

/// What the shim was called with.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    pub(crate) debug: bool,
    pub(crate) version: bool,
    /// Says what the runtime can do (`-info`).
    pub(crate) info: bool,
    pub(crate) namespace: String,
    /// Id of the task, which is that of the container.
    pub(crate) id: String,
    /// Bundle directory, where it is not the working directory.
    pub(crate) bundle: String,
    /// containerd's socket.
    pub(crate) address: String,
    pub(crate) publish_binary: String,
    /// `start`, `delete`, or `serve`, with which the shim calls itself.
    pub(crate) action: String,
}

impl Flags {
    /// Reads `-name value`, `-name=value`, with one dash or two.
    pub(crate) fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut flags = Self::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let Some(name) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
                flags.action = argument;
                break;
            };
            let (name, given) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_string())),
                None => (name, None),
            };
            if let Some(switch) = flags.switch(name) {
                *switch = given.as_deref().unwrap_or("true") == "true";
                continue;
            }
            let Some(value) = flags.value(name) else { return Err(format!("There is no flag -{name}")) };
            *value =
                given.or_else(|| arguments.next()).ok_or_else(|| format!("Flag -{name} needs a value"))?;
        }
        Ok(flags)
    }

    fn switch(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "debug" => Some(&mut self.debug),
            "v" | "version" => Some(&mut self.version),
            "info" => Some(&mut self.info),
            _ => None,
        }
    }

    fn value(&mut self, name: &str) -> Option<&mut String> {
        match name {
            "namespace" => Some(&mut self.namespace),
            "id" => Some(&mut self.id),
            "bundle" => Some(&mut self.bundle),
            "address" => Some(&mut self.address),
            "publish-binary" => Some(&mut self.publish_binary),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, String> {
        Flags::parse(line.split_whitespace().map(String::from))
    }

    #[test]
    fn what_containerd_calls_is_understood() {
        let flags = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id abc -debug start",
        )
        .unwrap();
        assert_eq!((flags.namespace.as_str(), flags.id.as_str()), ("k8s.io", "abc"));
        assert_eq!((flags.action.as_str(), flags.debug), ("start", true));
        assert_eq!(flags.address, "/run/containerd/containerd.sock");
        let flags = parse("--id=x -debug=false -bundle /b delete").unwrap();
        assert_eq!((flags.id.as_str(), flags.bundle.as_str(), flags.debug), ("x", "/b", false));
        assert!(parse("-info").unwrap().info && parse("-v").unwrap().version);
    }

    #[test]
    fn what_is_unknown_or_cut_off_is_refused() {
        assert_eq!(parse("-colour red start").unwrap_err(), "There is no flag -colour");
        assert_eq!(parse("-id").unwrap_err(), "Flag -id needs a value");
    }
}
