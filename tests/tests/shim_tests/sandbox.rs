//! The Sandbox service.

use std::collections::HashMap;
use std::thread;
use std::time::Duration;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest,
    ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
};
use containerd_shim_protos::ttrpc::Code;
use prost::Message;
use tests::cri::messages::{PodConfig, PodLinux};
use tests::shim::{Player, Shim, Way, assert_refused, bundle, limit};

use super::SLEEP;

fn creation(id: &str) -> CreateSandboxRequest {
    let sysctls = HashMap::from([("net.core.somaxconn".to_string(), "77".to_string())]);
    let linux = Some(PodLinux { sysctls, ..PodLinux::default() });
    let config = PodConfig { hostname: "of-the-pod".into(), linux, ..PodConfig::default() };
    let value = config.encode_to_vec();
    let options = Any { type_url: "runtime.v1.PodSandboxConfig".into(), value, ..Any::default() };
    CreateSandboxRequest {
        sandbox_id: id.into(),
        options: Some(options).into(),
        ..CreateSandboxRequest::default()
    }
}

/// A request that says no more than the sandbox's id.
macro_rules! of {
    ($request:ident, $id:expr) => {
        &$request { sandbox_id: $id.to_string(), ..$request::default() }
    };
}

fn started(player: &Player, name: &str) -> (Shim, u32) {
    let id = player.id(name);
    let shim = player.shim_by(&id, None, Way::Bootstrap);
    shim.sandbox.create_sandbox(limit(), &creation(&id)).expect("create");
    let pid = shim.sandbox.start_sandbox(limit(), of!(StartSandboxRequest, id)).expect("start").pid;
    (shim, pid)
}

/// A container of the pod, whose shim is found by `start`.
fn member(player: &Player, pod: &Shim, pid: u32, name: &str, command: &[&str]) -> Shim {
    let id = player.id(name);
    let member = player.shim(&id, &bundle::member(&player.host, command, &pod.id, pid));
    assert_eq!(member.address, pod.address, "it is the pod's shim");
    member
}

pub(crate) fn end_to_end(player: &Player) {
    let (pod, pid) = started(player, "sandbox");
    let platform = pod.sandbox.platform(limit(), of!(PlatformRequest, pod.id)).expect("platform");
    assert_eq!((platform.platform.os.as_str(), platform.platform.architecture.as_str()), ("linux", "amd64"));
    let mut asked = SandboxStatusRequest { sandbox_id: pod.id.clone(), ..SandboxStatusRequest::default() };
    asked.verbose = true;
    let status = pod.sandbox.sandbox_status(limit(), &asked).expect("status");
    assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_READY", pid));
    assert!(status.info["kernel"].starts_with(char::is_numeric) && status.created_at.seconds > 0);
    pod.sandbox.ping_sandbox(limit(), of!(PingRequest, pod.id)).expect("ping");
    let metrics = pod.sandbox.sandbox_metrics(limit(), of!(SandboxMetricsRequest, pod.id)).expect("metrics");
    assert!(metrics.metrics.data.type_url.ends_with("io.containerd.cgroups.v2.Metrics"), "{metrics:?}");
    let (waiting, id) = (pod.again(), pod.id.clone());
    let waiter = thread::spawn(move || waiting.sandbox.wait_sandbox(limit(), of!(WaitSandboxRequest, id)));

    let script = "test $(hostname) = of-the-pod && test $(cat /proc/sys/net/core/somaxconn) = 77";
    let container = member(player, &pod, pid, "inside", &["sh", "-c", script]);
    container.create(&container.id).expect("create");
    container.start(&container.id, "").expect("start");
    assert_eq!(container.wait(&container.id, "").expect("wait"), 0);
    container.delete(&container.id, "").expect("delete");
    // What containerd asks of a shim whose last task is deleted; this one has a pod.
    container.shut_down();
    pod.sandbox.ping_sandbox(limit(), of!(PingRequest, pod.id)).expect("the pod lives on");
    player.events.expect(&container.id, &["create", "start", "exit 0", "delete 0"]);

    pod.sandbox.stop_sandbox(limit(), of!(StopSandboxRequest, pod.id)).expect("stop");
    let ended = waiter.join().expect("thread").expect("wait");
    assert_eq!(ended.exit_status, 143);
    let status = pod.sandbox.sandbox_status(limit(), of!(SandboxStatusRequest, pod.id)).expect("status");
    assert!(status.state == "SANDBOX_NOTREADY" && status.exited_at.seconds > 0, "{status:?}");
    assert_refused(
        pod.sandbox.ping_sandbox(limit(), of!(PingRequest, pod.id)),
        Code::FAILED_PRECONDITION,
        "ended",
    );
    pod.sandbox.stop_sandbox(limit(), of!(StopSandboxRequest, pod.id)).expect("stop again");
    pod.sandbox.shutdown_sandbox(limit(), of!(ShutdownSandboxRequest, pod.id)).expect("shutdown");
    assert!(player.events.of(&pod.id).is_empty(), "a sandbox is no task");
}

pub(crate) fn out_of_order(player: &Player) {
    let id = player.id("order");
    let pod = player.shim_by(&id, None, Way::Flags);
    let service = &pod.sandbox;
    let missing = Code::NOT_FOUND;
    assert_refused(service.start_sandbox(limit(), of!(StartSandboxRequest, id)), missing, "not created");
    assert_refused(service.stop_sandbox(limit(), of!(StopSandboxRequest, id)), missing, "no sandbox");
    assert_refused(service.wait_sandbox(limit(), of!(WaitSandboxRequest, id)), missing, "no sandbox");
    assert_refused(service.sandbox_status(limit(), of!(SandboxStatusRequest, id)), missing, "no sandbox");
    for bad in ["", "../x", &"x".repeat(1 << 20)] {
        assert_refused(
            service.create_sandbox(limit(), &creation(bad)),
            Code::INVALID_ARGUMENT,
            "can be named",
        );
    }
    let mut odd = creation(&id);
    odd.options.mut_or_insert_default().value = vec![0xff; 100];
    assert_refused(service.create_sandbox(limit(), &odd), Code::INVALID_ARGUMENT, "PodSandboxConfig");
    odd = creation(&id);
    odd.options.mut_or_insert_default().type_url = "some.other.Config".into();
    assert_refused(service.create_sandbox(limit(), &odd), Code::INVALID_ARGUMENT, "some.other.Config");

    // A host name that the guest cannot have: the sandbox is not started, and may be created anew.
    odd = creation(&id);
    let config = PodConfig { hostname: "h".repeat(65), ..PodConfig::default() };
    odd.options.mut_or_insert_default().value = config.encode_to_vec();
    service.create_sandbox(limit(), &odd).expect("create");
    assert_refused(
        service.start_sandbox(limit(), of!(StartSandboxRequest, id)),
        Code::INVALID_ARGUMENT,
        "hostname",
    );
    service.create_sandbox(limit(), &creation(&id)).expect("create");
    assert_refused(service.create_sandbox(limit(), &creation(&id)), Code::ALREADY_EXISTS, "already");
    assert_refused(service.start_sandbox(limit(), of!(StartSandboxRequest, "other")), missing, "other");
    assert_refused(service.ping_sandbox(limit(), of!(PingRequest, id)), missing, "started");

    let (starting, own) = (pod.again(), id.clone());
    let start = thread::spawn(move || starting.sandbox.start_sandbox(limit(), of!(StartSandboxRequest, own)));
    thread::sleep(Duration::from_millis(100));
    assert_refused(service.create_sandbox(limit(), &creation("second")), Code::ALREADY_EXISTS, "already");
    assert_refused(
        service.shutdown_sandbox(limit(), of!(ShutdownSandboxRequest, id)),
        Code::FAILED_PRECONDITION,
        "being started",
    );
    start.join().expect("thread").expect("start");
    assert_refused(service.start_sandbox(limit(), of!(StartSandboxRequest, id)), missing, "already");
    assert_refused(service.create_sandbox(limit(), &creation(&id)), Code::ALREADY_EXISTS, "already");
    assert_refused(service.shutdown_sandbox(limit(), of!(ShutdownSandboxRequest, "other")), missing, "other");
    service.ping_sandbox(limit(), of!(PingRequest, id)).expect("another's shutdown is not the pod's");
    service.shutdown_sandbox(limit(), of!(ShutdownSandboxRequest, id)).expect("shutdown");
}

pub(crate) fn shutdown_with_tasks(player: &Player) {
    let (pod, pid) = started(player, "alone");
    let container = member(player, &pod, pid, "left", &SLEEP);
    container.create(&container.id).expect("create");
    container.start(&container.id, "").expect("start");
    let created = member(player, &pod, pid, "created", &SLEEP);
    created.create(&created.id).expect("create");
    container.shut_down();
    pod.sandbox.ping_sandbox(limit(), of!(PingRequest, pod.id)).expect("the pod lives on");
    pod.sandbox.shutdown_sandbox(limit(), of!(ShutdownSandboxRequest, pod.id)).expect("shutdown");
    player.events.expect(&container.id, &["create", "start", "exit 137"]);
}
