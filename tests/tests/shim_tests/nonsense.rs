//! Requests for a task that make no sense, and those that do.

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, PauseRequest, PidsRequest, ResizePtyRequest,
    ResumeRequest, StatsRequest, UpdateTaskRequest,
};
use containerd_shim_protos::protobuf::EnumOrUnknown;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::shim::CreateTaskRequest;
use containerd_shim_protos::ttrpc::Code;
use serde_json::json;
use tests::shim::{Player, Shim, assert_refused, bundle, limit, refusal, write_fifo};

use super::SLEEP;

fn all_of(shim: &Shim, id: &str, code: Code) {
    let refused = [
        refusal(shim.start(id, "")),
        refusal(shim.kill(id, "", 9)),
        refusal(shim.wait(id, "")),
        refusal(shim.delete(id, "")),
        refusal(shim.state(id, "")),
        refusal(shim.exec(id, "x", &["true"])),
        refusal(shim.task.pids(limit(), &PidsRequest { id: id.into(), ..Default::default() })),
        refusal(shim.task.stats(limit(), &StatsRequest { id: id.into(), ..Default::default() })),
        refusal(shim.task.pause(limit(), &PauseRequest { id: id.into(), ..Default::default() })),
        refusal(shim.task.resume(limit(), &ResumeRequest { id: id.into(), ..Default::default() })),
        refusal(shim.task.connect(limit(), &ConnectRequest { id: id.into(), ..Default::default() })),
        refusal(shim.task.resize_pty(limit(), &ResizePtyRequest { id: id.into(), ..Default::default() })),
        refusal(
            shim.task.close_io(limit(), &CloseIORequest { id: id.into(), stdin: true, ..Default::default() }),
        ),
        refusal(shim.task.update(limit(), &UpdateTaskRequest { id: id.into(), ..Default::default() })),
    ];
    for (number, (found, message)) in refused.into_iter().enumerate() {
        assert_eq!(found, code, "request {number} for {id:.20}: {message:.200}");
    }
}

pub(crate) fn requests(player: &Player) {
    let shim = player.running("odd", &SLEEP);
    let id = shim.id.as_str();
    let long = "x".repeat(1 << 20);
    for unknown in ["unknown", "", "../x", &long] {
        all_of(&shim, unknown, Code::NOT_FOUND);
    }
    assert_refused(shim.create(id), Code::ALREADY_EXISTS, "exists already");
    for bad in ["", "../x", "a/b", "a b", &long] {
        assert_refused(shim.create(bad), Code::INVALID_ARGUMENT, "can be named");
    }
    // Its bundle is that of a pod of its own, of which this shim has one.
    assert_refused(shim.create("second"), Code::FAILED_PRECONDITION, "pod already");
    let mut checkpoint = shim.creation("third");
    checkpoint.checkpoint = "/var/lib/x".into();
    assert_refused(shim.task.create(limit(), &checkpoint), Code::UNIMPLEMENTED, "checkpoint");
    assert_refused(shim.start(id, ""), Code::FAILED_PRECONDITION, "started already");
    assert_refused(shim.delete(id, ""), Code::FAILED_PRECONDITION, "killed first");
    assert_refused(shim.kill(id, "", 65), Code::INVALID_ARGUMENT, "65");
    assert_refused(shim.kill(id, "", 1 << 31), Code::INVALID_ARGUMENT, "2147483648");
    shim.kill(id, "", 0).expect("a probe, as of kill(2)");
    assert_refused(shim.kill(id, "none", 9), Code::NOT_FOUND, "none");
    let checkpoint = CheckpointTaskRequest { id: id.into(), ..Default::default() };
    assert_refused(shim.task.checkpoint(limit(), &checkpoint), Code::UNIMPLEMENTED, "micro-VM");
    shim.shut_down();
    assert!(shim.state(id, "").is_ok(), "it has a task");
    shim.kill(id, "", 9).expect("kill");
    shim.wait(id, "").expect("wait");
    assert_refused(shim.kill(id, "", 9), Code::NOT_FOUND, "ended");
    assert_refused(shim.start(id, ""), Code::FAILED_PRECONDITION, "ended");
    let pause = PauseRequest { id: id.into(), ..Default::default() };
    assert_refused(shim.task.pause(limit(), &pause), Code::FAILED_PRECONDITION, "not running");
    // In a container that has ended; the pod may have, too.
    let (code, message) = refusal(shim.exec(id, "x", &["true"]));
    assert!([Code::FAILED_PRECONDITION, Code::UNAVAILABLE].contains(&code), "{code:?} {message}");
    shim.delete(id, "").expect("delete");
    all_of(&shim, id, Code::NOT_FOUND);
    shim.shut_down();
}

pub(crate) fn additions(player: &Player) {
    let id = player.id("add");
    let shim = player.shim(&id, &bundle::config(&player.host, &SLEEP));
    shim.create(&id).expect("create");
    shim.exec(&id, "early", &["true"]).expect("into a created container, as runc has it");
    shim.start(&id, "").expect("start");
    shim.start(&id, "early").expect("start");
    assert_eq!(shim.wait(&id, "early").expect("wait"), 0);
    let long = "x".repeat(1 << 20);
    for bad in ["", "../x", "a/b", &long] {
        assert_refused(shim.exec(&id, bad, &["true"]), Code::INVALID_ARGUMENT, "can be named");
    }
    let with = |change: &dyn Fn(&mut Any)| {
        let mut request = shim.addition(&id, "odd", &bundle::process(&["true"]));
        change(request.spec.mut_or_insert_default());
        shim.task.exec(limit(), &request)
    };
    let invalid = Code::INVALID_ARGUMENT;
    assert_refused(with(&|spec| spec.value = b"{\"args\": [".to_vec()), invalid, "process");
    assert_refused(with(&|spec| spec.value = b"[]".to_vec()), invalid, "process");
    assert_refused(with(&|spec| spec.value.clear()), invalid, "process");
    assert_refused(with(&|spec| spec.type_url = "x/1/Spec".into()), invalid, "x/1/Spec");
    // More than Linux gives to a program.
    let too_long = with(&|spec| {
        let mut process = bundle::process(&["true"]);
        process["env"] = json!([format!("A={}", "x".repeat(3 << 20))]);
        spec.value = process.to_string().into_bytes();
    });
    assert_refused(too_long, invalid, "131071 at most");
    // More than a message of ttrpc may have: refused by the transport, whose client does so itself.
    assert!(with(&|spec| spec.value = vec![b' '; 10 << 20]).is_err());
    let mut deep = "[".repeat(100_000);
    deep.push_str(&"]".repeat(100_000));
    assert_refused(with(&|spec| spec.value = deep.clone().into_bytes()), invalid, "process");
    shim.exec(&id, "one", &["sh", "-c", "exit 4"]).expect("exec");
    assert_refused(shim.exec(&id, "one", &["true"]), Code::ALREADY_EXISTS, "one");
    shim.exec(&id, "never", &["true"]).expect("exec");
    shim.delete(&id, "never").expect("delete of a created process");
    assert_refused(shim.state(&id, "never"), Code::NOT_FOUND, "never");
    shim.exec(&id, "none", &["/no/such/program"]).expect("exec");
    let (code, message) = refusal(shim.start(&id, "none"));
    assert!(message.contains("/no/such/program"), "{code:?} {message}");
    assert_eq!(shim.wait(&id, "none").expect("wait"), 127);
    shim.delete(&id, "none").expect("delete");
    shim.start(&id, "one").expect("start");
    assert_eq!(shim.wait(&id, "one").expect("wait"), 4);
    assert_refused(shim.start(&id, "one"), Code::FAILED_PRECONDITION, "ended");
    shim.end();
}

pub(crate) fn whole_service(player: &Player) {
    let id = player.id("whole");
    let (stdin, stdout) = (player.fifo("whole-in"), player.fifo("whole-out"));
    let shim = player.shim(&id, &bundle::config(&player.host, &["cat"]));
    let request = CreateTaskRequest { stdin: stdin.clone(), stdout: stdout.clone(), ..shim.creation(&id) };
    let pid = shim.task.create(limit(), &request).expect("create").pid;
    let state = shim.state(&id, "").expect("state");
    assert_eq!((state.pid, state.stdin.as_str(), state.terminal), (pid, stdin.as_str(), false));
    assert_eq!(state.status, EnumOrUnknown::from_i32(1), "created");
    assert_eq!(shim.start(&id, "").expect("start"), pid);
    let of = |id: &str| PidsRequest { id: id.into(), ..Default::default() };
    assert_eq!(shim.task.pids(limit(), &of(&id)).expect("pids").processes.len(), 1);
    let stats = StatsRequest { id: id.clone(), ..Default::default() };
    let stats = shim.task.stats(limit(), &stats).expect("stats").stats;
    assert!(stats.type_url.ends_with("io.containerd.cgroups.v2.Metrics"), "{}", stats.type_url);
    let resize = ResizePtyRequest { id: id.clone(), width: 80, height: 1 << 30, ..Default::default() };
    assert_refused(shim.task.resize_pty(limit(), &resize), Code::FAILED_PRECONDITION, "terminal");
    let mut update = UpdateTaskRequest { id: id.clone(), ..Default::default() };
    let resources = |url: &str, json: &str| {
        Some(Any { type_url: url.into(), value: json.as_bytes().to_vec(), ..Any::default() }).into()
    };
    update.resources = resources("x/1/LinuxResources", r#"{"pids": {"limit": 50}}"#);
    shim.task.update(limit(), &update).expect("update");
    update.resources = resources("x/1/LinuxResources", r#"{"pids": "#);
    assert_refused(shim.task.update(limit(), &update), Code::INVALID_ARGUMENT, "resources");
    update.resources = resources("x/1/WindowsResources", "{}");
    assert_refused(shim.task.update(limit(), &update), Code::INVALID_ARGUMENT, "WindowsResources");
    let (pause, resume) = (
        PauseRequest { id: id.clone(), ..Default::default() },
        ResumeRequest { id: id.clone(), ..Default::default() },
    );
    assert_refused(shim.task.resume(limit(), &resume), Code::FAILED_PRECONDITION, "not paused");
    shim.task.pause(limit(), &pause).expect("pause");
    assert_refused(shim.task.pause(limit(), &pause), Code::FAILED_PRECONDITION, "paused already");
    assert_eq!(shim.state(&id, "").expect("state").status, EnumOrUnknown::from_i32(4), "paused");
    shim.task.resume(limit(), &resume).expect("resume");
    // The client's end of the input goes, and comes again; only what is told to be the end is the end.
    write_fifo(&stdin, b"one ");
    write_fifo(&stdin, b"two");
    let close = CloseIORequest { id: id.clone(), stdin: true, ..Default::default() };
    shim.task.close_io(limit(), &close).expect("close");
    assert_eq!(std::fs::read_to_string(&stdout).expect("output"), "one two");
    assert_eq!(shim.wait(&id, "").expect("wait"), 0);
    let deleted = shim.delete(&id, "").expect("delete");
    assert_eq!((deleted.pid, deleted.exit_status), (pid, 0));
    shim.shut_down();
}
