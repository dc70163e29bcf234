//! The socket on which containerd takes events, and what was told there.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::ttrpc::{Result, Server, TtrpcContext};
use containerd_shim_protos::{Events, create_events};

use super::NAMESPACE;
use crate::pod::until;

/// Longest that an event may be on its way.
const DELIVERY: Duration = Duration::from_secs(60);

/// An event: of which task, and what it says as one line.
type Told = (String, String);

/// Takes events.
pub struct Recorder {
    path: PathBuf,
    told: Arc<Mutex<Vec<Told>>>,
    server: Mutex<Option<Server>>,
}

struct Service(Arc<Mutex<Vec<Told>>>);

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Events for Service {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        assert_eq!(envelope.namespace, NAMESPACE);
        let event = envelope.event.unwrap_or_default();
        let line = read(&envelope.topic, &event.value).unwrap_or_else(|error| (String::new(), error));
        self.0.lock().expect("lock").push(line);
        Ok(Empty::default())
    }
}

fn read(topic: &str, bytes: &[u8]) -> std::result::Result<Told, String> {
    fn parse<M: Message>(bytes: &[u8]) -> std::result::Result<M, String> {
        M::parse_from_bytes(bytes).map_err(|error| error.to_string())
    }
    Ok(match topic {
        "/tasks/create" => (parse::<TaskCreate>(bytes)?.container_id, "create".into()),
        "/tasks/start" => (parse::<TaskStart>(bytes)?.container_id, "start".into()),
        "/tasks/oom" => (parse::<TaskOOM>(bytes)?.container_id, "oom".into()),
        "/tasks/delete" => {
            let event = parse::<TaskDelete>(bytes)?;
            (event.container_id, format!("delete {}", event.exit_status))
        }
        "/tasks/exit" => {
            let event = parse::<TaskExit>(bytes)?;
            let line = match event.id == event.container_id {
                true => format!("exit {}", event.exit_status),
                false => format!("exit {} {}", event.id, event.exit_status),
            };
            (event.container_id, line)
        }
        "/tasks/exec-added" => {
            let event = parse::<TaskExecAdded>(bytes)?;
            (event.container_id, format!("added {}", event.exec_id))
        }
        "/tasks/exec-started" => {
            let event = parse::<TaskExecStarted>(bytes)?;
            (event.container_id, format!("started {}", event.exec_id))
        }
        "/tasks/paused" => (parse::<TaskPaused>(bytes)?.container_id, "paused".into()),
        "/tasks/resumed" => (parse::<TaskResumed>(bytes)?.container_id, "resumed".into()),
        other => return Err(format!("unknown topic {other}")),
    })
}

impl Recorder {
    pub(super) fn new(path: &Path) -> Self {
        let recorder = Self { path: path.into(), told: Arc::default(), server: Mutex::new(None) };
        recorder.open();
        recorder
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Listens.
    ///
    /// # Panics
    /// When it cannot.
    pub fn open(&self) {
        let service = create_events(Arc::new(Service(Arc::clone(&self.told))));
        let server = Server::new().bind(&format!("unix://{}", self.path.display())).expect("socket");
        let mut server = server.register_service(service);
        server.start().expect("server");
        *self.server.lock().expect("lock") = Some(server);
    }

    /// Is away, as a containerd that restarts.
    ///
    /// # Panics
    /// When it is already.
    pub fn close(&self) {
        self.server.lock().expect("lock").take().expect("open").shutdown();
        let _ = std::fs::remove_file(&self.path);
    }

    /// What was told of a task until now.
    ///
    /// # Panics
    /// When something was told that nobody understands.
    #[must_use]
    pub fn of(&self, id: &str) -> Vec<String> {
        let told = self.told.lock().expect("lock");
        let unread: Vec<_> = told.iter().filter(|(task, _)| task.is_empty()).collect();
        assert!(unread.is_empty(), "{unread:?}");
        told.iter().filter(|(task, _)| task == id).map(|(_, line)| line.clone()).collect()
    }

    /// Waits until a task's events are these, and no others.
    ///
    /// # Panics
    /// When they are not after a while.
    #[track_caller]
    pub fn expect(&self, id: &str, wanted: &[&str]) {
        let _ = until(DELIVERY, || (self.of(id).len() >= wanted.len()).then_some(()));
        assert_eq!(self.of(id), wanted, "events of {id}");
    }

    /// Waits until this was told of a task.
    ///
    /// # Panics
    /// When it was not after a while.
    #[track_caller]
    pub fn wait_for(&self, id: &str, line: &str) {
        let told = until(DELIVERY, || self.of(id).iter().any(|told| told == line).then_some(()));
        assert!(told.is_some(), "{line} is not among {:?}", self.of(id));
    }
}
