//! `ctr`, containerd's plain client: containers without pods.

use std::process::Command;

use super::Engine;
use super::image::SMALL;
use crate::pod::{Ended, finish};

impl Engine {
    /// `ctr ARGUMENTS`, in a namespace of ctr's own.
    #[must_use]
    pub fn ctr(&self, arguments: &[&str]) -> Command {
        let mut command = self.tools().command("ctr");
        command.arg("--address").arg(self.socket()).args(arguments);
        command
    }

    /// Runs `ctr ARGUMENTS` to its end.
    pub fn ctr_end(&self, arguments: &[&str]) -> Ended {
        finish(&mut self.ctr(arguments), b"")
    }

    /// Arguments of `ctr run` of the small image under the tested runtime.
    #[must_use]
    pub fn ctr_run<'a>(&'a self, options: &[&'a str], id: &'a str, command: &[&'a str]) -> Vec<&'a str> {
        let mut arguments = vec!["run", "--runtime", self.runtime().kind];
        arguments.extend(options);
        arguments.extend([SMALL, id]);
        arguments.extend(command);
        arguments
    }
}
