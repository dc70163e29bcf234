//! The action `start`: containerd asks for a shim that serves a container, and gets the address of its socket.
//!
//! The first container of a pod gets a new process, which inherits the listening socket: containerd may connect before
//! it runs. The others get the address of the one that serves their pod.

use std::env;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim::StartOpts;
use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult, LogLevel};
use containerd_shim_protos::TASK_API_VERSION;
use containerd_shim_protos::protobuf::Message;
use krx_sandbox::cgroup_child;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::cgroup;
use crate::config_json::{ConfigJson, ConfigJsonError, Role};
use crate::flags::Flags;

/// Where containerd listens for events, in the environment of its shims.
pub(crate) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// Of what containerd pipes in; as much as containerd itself takes.
const MAX_INPUT: u64 = 10 << 20;
/// In the bundle: by it, containerd finds the shim again after a restart.
const ADDRESS: &str = "address";

/// Why no shim was started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("What containerd pipes in cannot be read")]
    Input(#[source] io::Error),
    #[error("Parameters are those of another shim: {0}")]
    OtherShim(String),
    #[error("There is no address for events: {TTRPC_ADDRESS} is not set. The shim is started by containerd")]
    NoTtrpc,
    #[error(transparent)]
    Config(#[from] ConfigJsonError),
    #[error("Pod {0} has no shim that runs")]
    NoPod(String),
    #[error("Cannot listen on {path}")]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Shim cannot be started")]
    Spawn(#[source] io::Error),
    #[error("Answer cannot be given")]
    Answer(#[source] io::Error),
}

/// Carries the action out; the bundle is the working directory.
pub(crate) fn start(flags: &Flags) -> Result<(), StartError> {
    let (options, bootstrap) = parameters(flags, &input()?)?;
    let config = config(Path::new("."))?;
    if let Some(Role::Member(sandbox)) = config.as_ref().map(|config| &config.role) {
        let address = options.socket_address(sandbox);
        UnixStream::connect(socket_path(&address)).map_err(|_| StartError::NoPod(sandbox.clone()))?;
        return answer(&address, bootstrap);
    }
    let cgroup = config.and_then(|config| config.cgroup);
    let address = options.socket_address(&options.id);
    let shim = serve(&options, &address, cgroup.as_deref())?;
    let answered = answer(&address, bootstrap);
    if answered.is_err() {
        // Nobody knows of it: it would wait for requests for ever.
        let _ = kill(shim, Signal::SIGKILL).and_then(|()| waitpid(shim, None));
        let _ = fs::remove_file(socket_path(&address));
        cgroup.as_deref().map(cgroup::clean_up);
    }
    answered
}

fn answer(address: &str, bootstrap: bool) -> Result<(), StartError> {
    fs::write(ADDRESS, address).map_err(StartError::Answer)?;
    let answer = if bootstrap { encode(address)? } else { address.into() };
    let mut stdout = io::stdout();
    stdout.write_all(&answer).and_then(|()| stdout.flush()).map_err(StartError::Answer)
}

/// The configuration of what is to be served. A sandbox that containerd asks for by the Sandbox service has a bundle
/// without one.
fn config(bundle: &Path) -> Result<Option<ConfigJson>, ConfigJsonError> {
    bundle.join("config.json").exists().then(|| ConfigJson::read(bundle)).transpose()
}

/// The path of a unix socket's address.
pub(crate) fn socket_path(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap_or(address))
}

fn input() -> Result<Vec<u8>, StartError> {
    let mut input = Vec::new();
    // Called by hand, there is nothing to wait for.
    if !io::stdin().is_terminal() {
        io::stdin().take(MAX_INPUT).read_to_end(&mut input).map_err(StartError::Input)?;
    }
    Ok(input)
}

/// What containerd says, and whether it does so in the way of 2.3, by a message on standard input. Before that there are
/// flags and the environment, and on standard input at most options.
fn parameters(flags: &Flags, input: &[u8]) -> Result<(StartOpts, bool), StartError> {
    let params =
        BootstrapParams::parse_from_bytes(input).ok().filter(|params| !input.is_empty() && is_whole(params));
    let (mut options, bootstrap) = match params {
        Some(params) if params.instance_id != flags.id || params.namespace != flags.namespace => {
            return Err(StartError::OtherShim(params.instance_id));
        }
        Some(params) => (StartOpts::from(params), true),
        None => (
            StartOpts {
                id: flags.id.clone(),
                namespace: flags.namespace.clone(),
                address: flags.address.clone(),
                publish_binary: flags.publish_binary.clone(),
                ttrpc_address: env::var(TTRPC_ADDRESS).unwrap_or_default(),
                ..StartOpts::default()
            },
            false,
        ),
    };
    options.debug |= flags.debug || options.log_level == LogLevel::LOG_LEVEL_DEBUG;
    if options.ttrpc_address.is_empty() {
        return Err(StartError::NoTtrpc);
    }
    Ok((options, bootstrap))
}

/// Options of an older containerd can be read as such a message, too, with no more in it than a name and bytes.
fn is_whole(params: &BootstrapParams) -> bool {
    !params.containerd_ttrpc_address.is_empty()
}

/// The answer is an address alone up to containerd 2.2: 1.6 knows no other form, and later ones take it as well.
fn encode(address: &str) -> Result<Vec<u8>, StartError> {
    let result = BootstrapResult {
        version: TASK_API_VERSION,
        address: address.into(),
        protocol: "ttrpc".into(),
        ..BootstrapResult::default()
    };
    result.write_to_bytes().map_err(|error| StartError::Answer(io::Error::other(error)))
}

fn serve(options: &StartOpts, address: &str, cgroup: Option<&Path>) -> Result<Pid, StartError> {
    let path = socket_path(address);
    let failed = |source| StartError::Listen { path: path.into(), source };
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed)?;
    }
    let listener = match UnixListener::bind(path) {
        // Of a shim that is gone, else somebody answers there.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && UnixStream::connect(path).is_err() => {
            fs::remove_file(path).and_then(|()| UnixListener::bind(path))
        }
        bound => bound,
    };
    let listener = listener.map_err(failed)?;
    let spawned = cgroup.and_then(|cgroup| spawn_into(options, &listener, cgroup));
    let spawned = spawned.map_or_else(|| spawn(&mut command(options, &listener)?), Ok);
    if spawned.is_err() {
        let _ = fs::remove_file(path);
    }
    spawned.map_err(StartError::Spawn)
}

/// Starts it in the pod's cgroup. Where that cannot be, it tries to go there itself, and says why it could not.
fn spawn_into(options: &StartOpts, listener: &UnixListener, cgroup: &Path) -> Option<Pid> {
    let begin = |directory: PathBuf| {
        let mut command = command(options, listener)?;
        command.arg("serve").envs(cgroup::own()?.map(|home| (cgroup::HOME, home)));
        cgroup_child::spawn(&mut command, File::open(directory)?.as_fd())
    };
    let made = cgroup::make(cgroup).ok()??;
    begin(made.clone()).inspect_err(|_| cgroup::remove(&made)).ok()
}

fn spawn(command: &mut Command) -> io::Result<Pid> {
    let child = command.arg("serve").spawn()?;
    Ok(Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?))
}

fn command(options: &StartOpts, listener: &UnixListener) -> io::Result<Command> {
    let mut command = Command::new(env::current_exe()?);
    command
        .args(["-namespace", &options.namespace, "-id", &options.id, "-address", &options.address])
        .args(options.debug.then_some("-debug"))
        .env(TTRPC_ADDRESS, &options.ttrpc_address)
        // The socket it accepts on; containerd reads the other streams of this process to their end.
        .stdin(Stdio::from(OwnedFd::from(listener.try_clone()?)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Flags {
        Flags { id: "abc".into(), namespace: "k8s.io".into(), ..Flags::default() }
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "abc".into(),
            namespace: "k8s.io".into(),
            containerd_ttrpc_address: "/run/t".into(),
            containerd_grpc_address: "/run/g".into(),
            ..BootstrapParams::default()
        }
    }

    #[test]
    fn a_message_of_containerd_2_3_is_understood() {
        let (options, bootstrap) = parameters(&flags(), &params().write_to_bytes().unwrap()).unwrap();
        assert!(bootstrap);
        assert_eq!((options.ttrpc_address.as_str(), options.address.as_str()), ("/run/t", "/run/g"));
    }

    #[test]
    fn a_message_for_another_is_refused() {
        let other = BootstrapParams { instance_id: "other".into(), ..params() };
        let refused = parameters(&flags(), &other.write_to_bytes().unwrap());
        assert!(matches!(refused, Err(StartError::OtherShim(id)) if id == "other"));
    }

    #[test]
    fn options_of_an_older_containerd_are_no_message() {
        let options = BootstrapParams {
            instance_id: "containerd.runc.v1.Options".into(),
            namespace: "bytes".into(),
            ..BootstrapParams::default()
        };
        let refused = parameters(&flags(), &options.write_to_bytes().unwrap());
        // The environment of a test has no address for events.
        assert!(matches!(refused, Err(StartError::NoTtrpc)));
        assert!(matches!(parameters(&flags(), b"\xff\xff"), Err(StartError::NoTtrpc)));
    }

    #[test]
    fn an_address_leads_to_its_socket() {
        assert_eq!(socket_path("unix:///run/s/x"), Path::new("/run/s/x"));
    }
}
