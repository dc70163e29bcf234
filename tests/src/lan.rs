//! A network on the host as a plugin would make it: a bridge with addresses of the host, and network namespaces that are
//! joined to it by veth pairs. By `ip` and `tc`, so that nothing of what is tested makes what it is tested with.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use nix::sched::{CloneFlags, setns};

use crate::pod::{Ended, finish};

/// Networks of one test run are numbered, in their names and addresses.
static NEXT: AtomicU8 = AtomicU8::new(1);

/// A bridge. Its network is 10.77.N.0/24 and fd77:N::/64, in which the host is number 1.
#[derive(Debug)]
pub struct Lan {
    number: u8,
    mtu: u32,
}

/// A network namespace, of a pod to be.
#[derive(Debug)]
pub struct Netns {
    pub name: String,
}

impl Lan {
    /// # Panics
    /// When `ip` fails.
    #[must_use]
    pub fn new(mtu: u32) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let lan = Self { number, mtu };
        let bridge = lan.bridge();
        // Else a bridge forgets its MTU with its first port.
        ip(&format!("link add {bridge} mtu {mtu} type bridge"));
        ip(&format!("address add {}/24 dev {bridge}", lan.v4(1)));
        ip(&format!("address add {}/64 dev {bridge} nodad", lan.v6(1)));
        ip(&format!("link set {bridge} up"));
        lan
    }

    #[must_use]
    pub fn v4(&self, host: u8) -> String {
        format!("10.77.{}.{host}", self.number)
    }

    #[must_use]
    pub fn v6(&self, host: u8) -> String {
        format!("fd77:{:x}::{host:x}", self.number)
    }

    /// Joins a namespace to the network, as the host of that number, by an interface of that name.
    ///
    /// # Panics
    /// When `ip` fails.
    pub fn join(&self, netns: &Netns, interface: &str, host: u8) {
        let (bridge, mtu, name) = (self.bridge(), self.mtu, &netns.name);
        let outside = format!("kv{}-{host}", self.number);
        ip(&format!("link add {outside} mtu {mtu} type veth peer name {interface} mtu {mtu} netns {name}"));
        ip(&format!("link set {outside} master {bridge} up"));
        netns.ip(&format!("address add {}/24 dev {interface}", self.v4(host)));
        netns.ip(&format!("address add {}/64 dev {interface} nodad", self.v6(host)));
        netns.ip(&format!("link set {interface} up"));
    }

    fn bridge(&self) -> String {
        format!("kbr{}", self.number)
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.bridge()]).status();
    }
}

impl Netns {
    /// # Panics
    /// When `ip` fails.
    #[must_use]
    pub fn new() -> Self {
        let netns = Self { name: format!("krx-test-{}", NEXT.fetch_add(1, Ordering::Relaxed)) };
        ip(&format!("netns add {}", netns.name));
        netns.ip("link set lo up");
        netns
    }

    /// What `krx run --netns` is given.
    #[must_use]
    pub fn path(&self) -> String {
        PathBuf::from("/run/netns").join(&self.name).display().to_string()
    }

    /// `ip`, in the namespace; what it says.
    ///
    /// # Panics
    /// When it fails.
    pub fn ip(&self, arguments: &str) -> String {
        ip(&format!("-netns {} {arguments}", self.name))
    }

    /// A command of the host's, in the namespace.
    #[must_use]
    pub fn exec(&self, command: &[&str]) -> Ended {
        finish(Command::new("ip").args(["netns", "exec", &self.name]).args(command), b"")
    }

    /// Does something in the namespace.
    ///
    /// # Panics
    /// As `body` does.
    pub fn inside<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let file = File::open(self.path()).expect("namespace");
        thread::scope(|scope| {
            let entered = || {
                setns(&file, CloneFlags::CLONE_NEWNET).expect("setns");
                body()
            };
            scope.spawn(entered).join().expect("in the namespace")
        })
    }

    /// What of krx is in the namespace: taps and queueing disciplines.
    #[must_use]
    pub fn remains(&self) -> Vec<String> {
        let links = self.ip("-oneline link show");
        let qdiscs = finish(Command::new("tc").args(["-netns", &self.name, "qdisc", "show"]), b"").ok().out;
        let taps = links.lines().filter(|line| line.contains("krx-tap"));
        let clsact = qdiscs.lines().filter(|line| line.contains("clsact"));
        taps.chain(clsact).map(str::to_string).collect()
    }
}

impl Default for Netns {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

fn ip(arguments: &str) -> String {
    finish(Command::new("ip").args(arguments.split_whitespace()), b"").ok().out
}
