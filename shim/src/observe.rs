//! What others than containerd are told of a pod, over HTTP on a unix socket in the pod's directory: where the time of its
//! starts went, for Prometheus, and its containers, for `krx exec`.
//!
//! The figures are of starts alone: what containers use is asked of the Task API. Nobody's start waits for it, as the
//! socket is made when the first one has been answered; it goes with the pod.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use krx_sandbox::pod_containers::{self, PodMember};
use krx_sandbox::timings::Timings;
use log::{debug, warn};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use crate::http::{Head, Page, Taken, answer};
use crate::tasks::Tasks;
use crate::vm::Vm;

/// Longest that a client may take from its connection to the end of the answer.
const LIMIT: Duration = Duration::from_secs(5);
/// For the answer to the first start to be on its way.
const AFTER_ANSWER: Duration = Duration::from_millis(100);
/// Between two tries to accept where one fails: there are no descriptors left.
const PAUSE: Duration = Duration::from_secs(1);

const NAME: &str = "krx_start_phase_seconds";
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const JSON: &str = "application/json";
const HELP: &str = "Time from the first phase of a start to this one.";

/// The starts of what is there, by the id of the container or of the pod.
#[derive(Debug, Default)]
pub(crate) struct Starts(Mutex<BTreeMap<String, Arc<Timings>>>);

impl Starts {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Timings>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, id: &str, timings: Arc<Timings>) {
        self.lock().insert(id.into(), timings);
    }

    pub(crate) fn remove(&self, id: &str) {
        self.lock().remove(id);
    }

    /// What was created before has been started; that was asked for at `asked`.
    pub(crate) fn started(&self, id: &str, asked: u64) {
        if let Some(timings) = self.lock().get(id) {
            timings.add("start asked", asked);
            timings.mark("started");
        }
    }

    /// All of them in the text format of Prometheus, version 0.0.4.
    fn text(&self, namespace: &str, pod: &str) -> String {
        let mut text = format!("# HELP {NAME} {HELP}\n# TYPE {NAME} gauge\n");
        let (namespace, pod) = (escaped(namespace), escaped(pod));
        for (id, timings) in self.lock().iter() {
            let (id, phases) = (escaped(id), timings.phases());
            let first = phases.first().map_or(0, |phase| phase.monotonic_ns);
            // A sample may be there once; of a phase that was reached twice, the first time counts.
            let mut seen = BTreeSet::new();
            for phase in phases.iter().filter(|phase| seen.insert(phase.name.as_str())) {
                let (name, after) = (escaped(&phase.name), Duration::from_nanos(phase.monotonic_ns - first));
                // Writing to a string cannot fail.
                let _ = writeln!(
                    text,
                    "{NAME}{{namespace=\"{namespace}\",pod=\"{pod}\",id=\"{id}\",phase=\"{name}\"}} {}.{:09}",
                    after.as_secs(),
                    after.subsec_nanos()
                );
            }
        }
        text
    }
}

/// The value of a label: a backslash, a quote and the end of a line have other forms there.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The containers of a pod, in JSON.
fn containers(tasks: &Tasks) -> String {
    let all = tasks.all();
    let members = all.iter().filter_map(|task| {
        let process = task.container.as_ref()?.spec.clone();
        Some(PodMember { id: task.id.clone(), process })
    });
    // Names and numbers: there is nothing in it that JSON has not.
    serde_json::to_string(&members.collect::<Vec<_>>()).unwrap_or_default()
}

/// Serves what is to be told of the pod from now on, if nobody does yet.
pub(crate) fn serve(vm: &Arc<Vm>, namespace: &str, starts: Arc<Starts>, tasks: Arc<Tasks>) {
    if !vm.begin_observing() {
        return;
    }
    let (alive, ended) = oneshot::channel();
    vm.pod.vmm().on_end(move || {
        let _ = alive.send(());
    });
    let (weak, namespace) = (Arc::downgrade(vm), namespace.to_string());
    tokio::spawn(async move {
        sleep(AFTER_ANSWER).await;
        // Held no longer than is needed: what serves must not keep the pod.
        let Some(vm) = weak.upgrade() else { return };
        let (path, pod) = (vm.pod.metrics_socket(), vm.sandbox.clone());
        let of_pod = starts.lock().get(&pod).cloned();
        if let Some(timings) = of_pod {
            let vm = vm.clone();
            // A round trip to the VMM.
            let _ = spawn_blocking(move || vm.pod.collect_timings(&timings)).await;
        }
        let bound = UnixListener::bind(&path);
        drop(vm);
        match bound {
            Ok(listener) => {
                let page = |path: &str| match path {
                    "/metrics" => Some((TEXT, starts.text(&namespace, &pod))),
                    pod_containers::PATH => Some((JSON, containers(&tasks))),
                    _ => None,
                };
                tokio::select! {
                    () = answer_all(&listener, page) => {}
                    _ = ended => {}
                }
            }
            Err(error) => warn!("the pod cannot be asked on {}: {error}", path.display()),
        }
    });
}

/// One client after the other: none can hold more than one connection's memory, nor for longer than the limit.
async fn answer_all(listener: &UnixListener, page: impl Fn(&str) -> Option<Page>) {
    loop {
        let Ok((mut client, _)) = listener.accept().await else {
            sleep(PAUSE).await;
            continue;
        };
        let answered = timeout(LIMIT, async {
            let answer = answer(request(&mut client).await?.as_deref(), &page);
            client.write_all(answer.as_bytes()).await?;
            client.shutdown().await
        });
        match answered.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!("a client of the pod's socket has gone: {error}"),
            Err(_) => debug!("a client of the pod's socket took more than {LIMIT:?}"),
        }
    }
}

/// The head of a request; `None` for one that is too large, and for one that ends before its head does.
async fn request(client: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<String>> {
    let (mut head, mut part) = (Head::default(), [0; 1024]);
    loop {
        let read = client.read(&mut part).await?;
        match head.add(&part[..read]) {
            Taken::More => {}
            Taken::Refused => return Ok(None),
            Taken::Whole(head) => return Ok(Some(head)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn starts() -> Starts {
        let (starts, timings) = (Starts::default(), Timings::default());
        timings.add("create asked", 7_000_000_000);
        timings.add("odd \"\\\n", 8_500_000_001);
        timings.add("create asked", 9_000_000_000);
        starts.add("a", Arc::new(timings));
        starts
    }

    #[test]
    fn each_phase_is_told_once_with_its_labels_escaped() {
        let starts = starts();
        let text = starts.text("k8s.io", "p");
        let labels = r#"krx_start_phase_seconds{namespace="k8s.io",pod="p",id="a",phase="#;
        assert_eq!(
            text.lines().skip(2).collect::<Vec<_>>(),
            [
                format!(r#"{labels}"create asked"}} 0.000000000"#),
                format!(r#"{labels}"odd \"\\\n"}} 1.500000001"#),
            ]
        );
        starts.started("a", 7_000_000_001);
        starts.started("of nobody", 0);
        assert!(starts.text("k8s.io", "p").contains("phase=\"start asked\"} 0.000000001\n"));
        starts.remove("a");
        assert_eq!(starts.text("", "").lines().count(), 2);
    }

    #[tokio::test]
    async fn a_request_has_a_largest_size() {
        let mut whole: &[u8] = b"GET /metrics HTTP/1.0\r\nA: b\r\n\r\nmore";
        assert!(request(&mut whole).await.unwrap().is_some_and(|head| head.starts_with("GET /metrics ")));
        let mut cut: &[u8] = b"GET /metrics HTTP/1.0\r\n";
        assert_eq!(request(&mut cut).await.unwrap(), None);
        assert_eq!(request(&mut tokio::io::repeat(b'x')).await.unwrap(), None);
        let mut odd: &[u8] = b"\xff\0\r\n\r\n";
        assert!(request(&mut odd).await.unwrap().is_some());
    }
}
