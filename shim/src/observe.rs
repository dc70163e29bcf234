//! Where the time of a pod's starts went, for Prometheus: text over HTTP on a unix socket in the pod's directory.
//!
//! It has the figures of starts alone: what containers use is asked of the Task API. Nobody's start waits for it, as the
//! socket is made when the first one has been answered; it goes with the pod.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use krx_sandbox::timings::Timings;
use log::{debug, warn};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use crate::vm::Vm;

/// Largest request, and longest that a client may take from its connection to the end of the answer.
const MAX_REQUEST: usize = 8 << 10;
const LIMIT: Duration = Duration::from_secs(5);
/// For the answer to the first start to be on its way.
const AFTER_ANSWER: Duration = Duration::from_millis(100);
/// Between two tries to accept where one fails: there are no descriptors left.
const PAUSE: Duration = Duration::from_secs(1);

const NAME: &str = "krx_start_phase_seconds";
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

/// Serves the pod's starts from now on, if nobody does yet.
pub(crate) fn serve(vm: &Arc<Vm>, namespace: &str, starts: Arc<Starts>) {
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
            Ok(listener) => tokio::select! {
                () = answer_all(&listener, || starts.text(&namespace, &pod)) => {}
                _ = ended => {}
            },
            Err(error) => warn!("timings cannot be served on {}: {error}", path.display()),
        }
    });
}

/// One client after the other: none can hold more than one connection's memory, nor for longer than the limit.
async fn answer_all(listener: &UnixListener, text: impl Fn() -> String) {
    loop {
        let Ok((mut client, _)) = listener.accept().await else {
            sleep(PAUSE).await;
            continue;
        };
        let answered = timeout(LIMIT, async {
            let answer = answer(request(&mut client).await?.as_deref(), &text);
            client.write_all(answer.as_bytes()).await?;
            client.shutdown().await
        });
        match answered.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!("a client of the timings has gone: {error}"),
            Err(_) => debug!("a client of the timings took more than {LIMIT:?}"),
        }
    }
}

/// The head of a request; `None` for one that is too large, and for one that ends before its head does.
async fn request(client: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<String>> {
    let mut head = Vec::new();
    let mut part = [0; 1024];
    loop {
        let read = client.read(&mut part).await?;
        head.extend_from_slice(&part[..read]);
        if read == 0 || head.len() > MAX_REQUEST {
            return Ok(None);
        }
        if head.windows(4).any(|end| end == b"\r\n\r\n") {
            return Ok(Some(String::from_utf8_lossy(&head).into_owned()));
        }
    }
}

/// The answer to a request's first line; nothing else of it matters. HTTP/1.0 (RFC 1945): the connection ends with it.
fn answer(request: Option<&str>, text: impl Fn() -> String) -> String {
    let line = request.and_then(|request| request.lines().next()).unwrap_or_default();
    let words: Vec<_> = line.split(' ').collect();
    let (status, body) = match words[..] {
        ["GET", path, version] if version.starts_with("HTTP/1.") => match path.split('?').next() {
            Some("/metrics") => ("200 OK", text()),
            _ => ("404 Not Found", "There is /metrics alone\n".into()),
        },
        [_, _, version] if version.starts_with("HTTP/1.") => {
            ("405 Method Not Allowed\r\nAllow: GET", "There is GET alone\n".into())
        }
        _ => ("400 Bad Request", "That is no request of HTTP/1 with a head of at most 8 KiB\n".into()),
    };
    format!(
        "HTTP/1.0 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
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

    #[test]
    fn only_the_one_request_has_figures() {
        let status = |request: Option<&str>| {
            let answer = answer(request, || "x 1\n".into());
            assert!(answer.contains("\r\n\r\n"));
            answer.split("\r\n").next().unwrap_or_default().to_string()
        };
        for line in ["GET /metrics HTTP/1.0", "GET /metrics?x=y HTTP/1.1"] {
            assert_eq!(status(Some(&format!("{line}\r\nHost: x\r\n\r\n"))), "HTTP/1.0 200 OK");
        }
        assert_eq!(status(Some("GET / HTTP/1.1\r\n\r\n")), "HTTP/1.0 404 Not Found");
        assert_eq!(status(Some("POST /metrics HTTP/1.1\r\n\r\n")), "HTTP/1.0 405 Method Not Allowed");
        for odd in [None, Some(""), Some("\r\n\r\n"), Some("GET /metrics"), Some("GET  /metrics HTTP/1.0")] {
            assert_eq!(status(odd), "HTTP/1.0 400 Bad Request");
        }
        assert!(answer(Some("GET /metrics HTTP/1.0\r\n\r\n"), || "x 1\n".into()).ends_with("\r\n\r\nx 1\n"));
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
