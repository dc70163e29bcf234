//! PID 1 of a krx guest: runs the pod's OCI processes, as the host asks it to over vsock.
//!
//! One thread and one loop ([`server`]), which gives a child per process all work that could block: `child` and `rootfs`
//! run there. Everything that can be judged without touching the system is judged before ([`container`], [`process`]).
//! Nothing here knows of images, or of what is behind a network interface: the host prepares them.

mod cgroup;
mod child;
mod clock;
mod container;
mod containers;
mod control;
mod copying;
mod credentials;
mod device_filter;
mod disks;
mod error;
mod forked;
mod forward;
mod freezer;
mod greeting;
mod guest;
mod hooks;
mod id_map;
mod identity;
mod lifecycle;
mod limits;
mod live;
mod mount_options;
mod netlink;
mod network;
mod oom;
mod outside;
mod power;
mod process;
mod relay;
mod replica;
mod rootfs;
mod seccomp;
mod server;
mod shm;
mod sources;
mod stats;
mod stdio;
mod sys;
mod terminal;
mod user_namespace;
mod vsock;

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{getpid, sync};

use crate::control::Control;
use crate::error::{Doing, StepError};
use crate::server::Server;
use crate::vsock::Listeners;

/// On the kernel's command line after `--`: power off as soon as PID 1 runs, for measurements of the boot.
const EXIT_AT_PID1: &str = "exit-at-pid1";
/// Descriptors the agent may use itself, enough for the limits of `containers` and `server`; and the limit that
/// processes may raise their own to, Linux' default for the most.
const DESCRIPTORS: (u64, u64) = (8192, 1 << 20);

fn main() {
    if getpid().as_raw() != 1 {
        // It would write to I/O ports, and in the end switch the machine off.
        eprintln!("krx-agent: this is the first process of a krx guest, and nothing else");
        std::process::exit(2);
    }
    power::mark_pid1();
    if std::env::args().any(|argument| argument == EXIT_AT_PID1) {
        power::off();
    }
    if let Err(error) = run() {
        guest::log(krx_proto::AgentError::from(error));
    }
    sync();
    power::off();
}

fn run() -> Result<(), StepError> {
    prctl::set_dumpable(false).doing(|| "Cannot make the agent undumpable")?;
    let listeners = Listeners::open()?;
    let owner = vsock::dial_owner()?;
    let Ok(owner) = Control::new(owner) else {
        guest::log("the owner was gone before the hello");
        return Ok(());
    };
    // Behind the hello, which the host has work to do for; the first call is read when all is there.
    guest::mount_all()?;
    // Containers without a network namespace of their own have the guest's.
    sys::socket::loopback_up().doing(|| "Cannot set the loopback interface up")?;
    let (soft, hard) = DESCRIPTORS;
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).doing(|| "Cannot raise the limit of descriptors")?;
    Server::new(listeners, owner)?.run()
}
