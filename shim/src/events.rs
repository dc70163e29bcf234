//! Events for containerd: each once, in the order in which they were given here.
//!
//! They go through a queue to a task of their own: no request waits for containerd to take an event, and a containerd
//! that restarts gets what happened meanwhile.

use std::time::Duration;

use containerd_shim::event::Event;
use containerd_shim::util::{convert_to_any, timestamp};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::context;
use log::warn;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

/// Events that may wait. A containerd that is gone for longer gets no more: it asks for the state of its tasks itself.
const QUEUE: usize = 4096;
/// How long containerd may take for one event, and how often one is tried: for half a minute. Between tries the wait
/// grows, but not so far that a containerd which is back would have to wait for what has happened.
const LIMIT: Duration = Duration::from_secs(10);
const TRIES: u32 = 33;
const PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
enum Item {
    Event(Envelope),
    /// Answered when all before it was sent.
    Mark(oneshot::Sender<()>),
}

/// The queue's end for who has something to tell.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

impl Events {
    /// A queue whose events go to the socket at `address`.
    pub(crate) fn to(address: &str, namespace: &str) -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let address = if address.contains("://") { address.into() } else { format!("unix://{address}") };
        tokio::spawn(forward(address, waiting));
        Self { namespace: namespace.into(), queue }
    }

    /// Waits until all that was given until now is sent, or has turned out not to be taken.
    pub(crate) async fn told(&self) {
        let (mark, reached) = oneshot::channel();
        if self.queue.send(Item::Mark(mark)).await.is_ok() {
            let _ = reached.await;
        }
    }

    /// Queues an event.
    pub(crate) fn send(&self, event: impl Event) {
        let topic = event.topic();
        let envelope = || -> containerd_shim::Result<Envelope> {
            Ok(Envelope {
                topic: topic.clone(),
                namespace: self.namespace.clone(),
                timestamp: Some(timestamp()?).into(),
                event: Some(convert_to_any(Box::new(event))?).into(),
                ..Envelope::default()
            })
        };
        match envelope() {
            Ok(envelope) => {
                if self.queue.try_send(Item::Event(envelope)).is_err() {
                    warn!("event {topic} is dropped: {QUEUE} others wait for containerd");
                }
            }
            Err(error) => warn!("event {topic} cannot be made: {error}"),
        }
    }
}

async fn forward(address: String, mut waiting: mpsc::Receiver<Item>) {
    let mut client = None;
    while let Some(item) = waiting.recv().await {
        let envelope = match item {
            Item::Event(envelope) => envelope,
            Item::Mark(reached) => {
                let _ = reached.send(());
                continue;
            }
        };
        let topic = envelope.topic.clone();
        let request = ForwardRequest { envelope: Some(envelope).into(), ..ForwardRequest::default() };
        let mut pause = PAUSE;
        for attempt in 1..=TRIES {
            match send(&mut client, &address, &request).await {
                Ok(()) => break,
                Err(error) if attempt == TRIES => warn!("event {topic} is lost: {error}"),
                Err(_) => sleep(pause).await,
            }
            pause = LONGEST_PAUSE.min(pause * 2);
        }
    }
}

/// Sends over the connection there is, or a new one.
async fn send(
    client: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> Result<(), String> {
    let connected = match client.take() {
        Some(connected) => connected,
        None => {
            let connected = Client::connect(address).await;
            EventsClient::new(connected.map_err(|error| format!("{address}: {error}"))?)
        }
    };
    let sent = timeout(LIMIT, connected.forward(context::with_duration(LIMIT), request)).await;
    match sent {
        Ok(Ok(_)) => {
            *client = Some(connected);
            Ok(())
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {LIMIT:?}")),
    }
}
