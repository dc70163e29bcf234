//! A client of containerd's CRI plugin, as the kubelet is one: pods, containers, and their streams.
//!
//! Debian 12 has no `crictl`; a resident client is also the faster driver where each start of a program costs. Calls
//! block. It is not a general client: what no test needs is not there.

pub mod container;
pub mod messages;
pub mod pod;
pub mod statistics;
pub mod stream;

use std::path::Path;
use std::time::Duration;

use http::uri::PathAndQuery;
use prost::Message;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use self::messages::{Empty, PodItem, PodList, StatusAnswer, Text};
use crate::pod::patience;

/// Longest any call may take, see [`patience`]; the kubelet's for a pod is four minutes.
pub const CALL: Duration = Duration::from_secs(120);

/// A connection to a CRI socket, made at the first call and made again when containerd was.
#[derive(Debug)]
pub struct Client {
    runtime: Runtime,
    channel: Channel,
}

impl Client {
    /// # Panics
    /// When no thread can be started.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("runtime of the client");
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).expect("address");
        let channel = runtime.block_on(async { endpoint.connect_lazy() });
        Self { runtime, channel }
    }

    /// Calls a method of `runtime.v1.RuntimeService`.
    ///
    /// # Errors
    /// What containerd answers.
    ///
    /// # Panics
    /// When `method` is no name.
    pub fn call<Q, A>(&self, method: &str, request: Q) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let path = format!("/runtime.v1.RuntimeService/{method}").parse::<PathAndQuery>().expect("method");
        let mut request = Request::new(request);
        request.set_timeout(patience(CALL));
        self.runtime.block_on(async {
            let mut grpc = tonic::client::Grpc::new(self.channel.clone());
            grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            let answer = grpc.unary(request, path, tonic_prost::ProstCodec::<Q, A>::default()).await?;
            Ok(answer.into_inner())
        })
    }

    /// Calls a method that wants one text.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn call_for<A: Message + Default + 'static>(&self, method: &str, id: &str) -> Result<A, Status> {
        self.call(method, Text { text: id.into() })
    }

    /// What the runtime is not ready for: empty when it and its network are.
    ///
    /// # Errors
    /// What containerd answers, or that it does not.
    pub fn unready(&self) -> Result<Vec<String>, Status> {
        let answer: StatusAnswer = self.call("Status", Empty {})?;
        let conditions = answer.status.unwrap_or_default().conditions;
        Ok(conditions
            .into_iter()
            .filter(|c| !c.status)
            .map(|c| format!("{}: {}", c.kind, c.message))
            .collect())
    }

    /// # Panics
    /// When containerd does not answer.
    #[must_use]
    pub fn pods(&self) -> Vec<PodItem> {
        self.call::<_, PodList>("ListPodSandbox", Empty {}).expect("ListPodSandbox").items
    }
}
