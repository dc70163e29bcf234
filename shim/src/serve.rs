//! The action `serve`: the process that serves a pod, from the first request to the end of its last task.

use std::collections::HashMap;
use std::env;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use containerd_shim_protos::ttrpc::r#async::transport::Listener;
use containerd_shim_protos::ttrpc::r#async::{Server, Service as Methods};
use krx_sandbox::settings::Settings;
use krx_sandbox::timings::monotonic_ns;
use nix::fcntl::OFlag;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::dup2_stderr;
use tokio::sync::{Notify, mpsc};

use crate::cgroup;
use crate::events::Events;
use crate::flags::Flags;
use crate::sandbox_service::SandboxService;
use crate::service::Service;
use crate::shim::Shim;
use crate::start::TTRPC_ADDRESS;
use crate::watch::{self, Notice};

/// The Task API's name up to containerd 1.7; containerd 2 knows the same messages by another. It takes either.
const TASK_V2: &str = "containerd.task.v2.Task";
/// For a VM to end that was told to.
const SHUTDOWN: Duration = Duration::from_secs(30);
/// A thread's stack that calls next to nothing.
const SMALL: usize = 64 << 10;
/// For the last events to be delivered.
const LAST_EVENTS: Duration = Duration::from_secs(5);

/// Why the shim could not serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error("Standard input is not a socket to serve on: the action `serve` is the shim's own")]
    Listener(#[source] io::Error),
    #[error("{TTRPC_ADDRESS} is not set")]
    NoTtrpc,
    #[error("Runtime cannot be made")]
    Runtime(#[source] io::Error),
    #[error("Server cannot be started")]
    Server(#[source] containerd_shim_protos::ttrpc::Error),
}

/// Carries the action out.
pub(crate) fn serve(flags: &Flags) -> Result<(), ServeError> {
    let listener = io::stdin().as_fd().try_clone_to_owned().map_err(ServeError::Listener)?;
    let listener = UnixListener::from(listener);
    let events = env::var(TTRPC_ADDRESS).map_err(|_| ServeError::NoTtrpc)?;
    let signals = block_signals();
    begin_log(flags);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    let served = runtime.map_err(ServeError::Runtime)?.block_on(run(flags, listener, &events, signals));
    // Not to wait for threads that wait for a guest.
    served.map(|()| std::process::exit(0))
}

/// The log, and standard error, go to the FIFO that containerd has put into the bundle. Without it, tasks can be served.
fn begin_log(flags: &Flags) {
    // Whether the settings are right is told when a pod is made.
    let settings = Settings::load().unwrap_or_default();
    let level = settings.log_level.as_str();
    let _ = containerd_shim::logger::init(flags.debug, level, &flags.namespace, &flags.id);
    // The guest's console comes through it: who does not read must not hold up the pod.
    let log = OpenOptions::new().write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open("log");
    if let Ok(log) = log {
        let _ = dup2_stderr(log);
    }
}

/// Blocks them, as whoever ends the shim takes its pod along: containerd asks for it by requests. The VMM, a child, sets its own mask.
fn block_signals() -> SigSet {
    let blocked: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    let _ = blocked.thread_block();
    blocked
}

/// Ends the shim with its VM, if it was told to end shortly before. When a host shuts down, systemd tells all processes that are left
/// so, the VMM among them, and waits for each for 90 s.
async fn end_with_vm(shim: Arc<Shim>, told: Arc<Notify>) {
    loop {
        told.notified().await;
        let Some(vm) = shim.tasks.vm() else { continue };
        if tokio::time::timeout(SHUTDOWN, vm.wait()).await.is_ok() {
            return shim.end();
        }
    }
}

async fn run(
    flags: &Flags,
    listener: UnixListener,
    address: &str,
    signals: SigSet,
) -> Result<(), ServeError> {
    let socket = listener.local_addr().map_err(ServeError::Listener)?;
    let (notices, waiting) = mpsc::unbounded_channel();
    let shim = Arc::new(Shim {
        namespace: flags.namespace.clone(),
        tasks: Arc::default(),
        events: Events::to(address, &flags.namespace),
        notices,
        done: Notify::new(),
        socket: socket.as_pathname().map(Into::into),
        served_since: monotonic_ns(),
        starts: Arc::default(),
    });
    let told = Arc::new(Notify::new());
    tokio::spawn(end_with_vm(shim.clone(), told.clone()));
    let wait = move || {
        while let Ok(signal) = signals.wait() {
            if signal == Signal::SIGTERM {
                told.notify_one();
            }
        }
    };
    // Without it, a host takes longer to shut down.
    let _ = thread::Builder::new().name("signals".into()).stack_size(SMALL).spawn(wait);
    let watching = tokio::spawn(watch::handle(shim.clone(), waiting));
    let listener = Listener::try_from(listener).map_err(ServeError::Listener)?;
    let mut server = Server::new().add_listener(listener).register_service(services(&shim));
    server.start().await.map_err(ServeError::Server)?;
    shim.done.notified().await;
    // All of this before the connections close: containerd then kills what is left of a shim.
    let _ = shim.notices.send(Notice::Last);
    let _ = tokio::time::timeout(LAST_EVENTS, watching).await;
    let _ = tokio::time::timeout(LAST_EVENTS, shim.events.told()).await;
    cgroup::leave();
    let _ = server.shutdown().await;
    Ok(())
}

/// The Task service under both of its names, and the Sandbox service.
fn services(shim: &Arc<Shim>) -> HashMap<String, Methods> {
    let service = || create_task(Arc::new(Service(shim.clone())));
    let mut services = service();
    services.extend(service().into_values().map(|methods| (TASK_V2.to_string(), methods)));
    services.extend(create_sandbox(Arc::new(SandboxService::new(shim.clone()))));
    services
}
