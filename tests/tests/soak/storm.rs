//! Much at once, and kills at random moments.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::containerd::Engine;
use tests::containerd::image::SMALL;
use tests::containerd::remains::Remains;
use tests::cri::container::END;
use tests::cri::messages::{CONTAINER_RUNNING, Empty};
use tests::cri::pod::PodPlan;
use tests::dice::Dice;
use tests::pod::{finish, until};

use crate::{assert_clean, at_length};

/// Pods come and go, ten at a time; in short, an eighth of them.
pub(crate) fn by_the_dozen(engine: &Engine) {
    let before = Remains::now();
    let (waves, at_a_time) = if at_length() { (5, 10) } else { (1, 6) };
    for wave in 0..waves {
        thread::scope(|scope| {
            for number in 0..at_a_time {
                scope.spawn(move || {
                    let pod = PodPlan::new(engine, &format!("wave{wave}-{number}")).run();
                    let said = format!("pod {number} of wave {wave}");
                    let container = pod.shell("main", &format!("echo {said}; exec sleep 600")).start();
                    container.wait_for(&said);
                    assert_eq!(container.status().state, CONTAINER_RUNNING);
                    // Some are stopped in good order, some are removed as they are.
                    if number % 2 == 0 {
                        container.stop(0).expect("stop");
                        container.remove().expect("remove");
                    }
                });
            }
        });
    }
    assert_clean(&before);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Shim,
    Vmm,
    Containerd,
}

/// What of a pod's life is going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Run,
    Create,
    Start,
    Exec,
    Stop,
    Remove,
}

const PHASES: [Phase; 6] = [Phase::Run, Phase::Create, Phase::Start, Phase::Exec, Phase::Stop, Phase::Remove];

/// Pids of the processes of a name, as `proc(5)` cuts it off.
fn processes(name: &str) -> Vec<Pid> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let named =
        |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name);
    pids.filter(named).map(Pid::from_raw).collect()
}

impl Victim {
    fn kill(self, engine: &Engine) {
        let name = match self {
            Self::Containerd => return engine.end(Signal::SIGKILL),
            Self::Shim => "containerd-shim",
            Self::Vmm => "krx-vmm",
        };
        for pid in processes(name) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// What is killed, during which phase, and how long after its begin.
type Kill = (Victim, Phase, Duration);

/// One pod's life, during which something may be killed. What fails of it may fail. Gives how long each phase took.
fn life(engine: &Engine, name: &str, fatal: Option<Kill>) -> Vec<Duration> {
    let mut took = Vec::new();
    let mut step = |phase: Phase, work: &mut dyn FnMut() -> Result<(), String>| {
        let begin = Instant::now();
        let outcome = thread::scope(|scope| {
            let killer = fatal.filter(|(_, fatal, _)| *fatal == phase).map(|(victim, _, delay)| {
                let killer = scope.spawn(move || {
                    thread::sleep(delay);
                    victim.kill(engine);
                });
                (killer, victim, delay)
            });
            let outcome = work();
            took.push(begin.elapsed());
            if let Some((killer, victim, delay)) = killer {
                killer.join().expect("killer");
                println!("    {phase:?}, {victim:?} after {delay:?}: {outcome:?}");
                if victim == Victim::Containerd {
                    engine.start_again();
                }
            }
            outcome
        });
        outcome.is_ok()
    };
    let failed = |status: tonic::Status| format!("{:?} {}", status.code(), status.message());
    let mut pod = None;
    let plan = || PodPlan::new(engine, name);
    let ran = step(Phase::Run, &mut || plan().try_run().map(|made| pod = Some(made)).map_err(failed));
    let Some(pod) = pod.filter(|_| ran) else { return took };
    let mut container = None;
    let sleeper = || pod.container("main", &["sleep", "600"]);
    step(Phase::Create, &mut || sleeper().try_create().map(|made| container = Some(made)).map_err(failed));
    if let Some(container) = &container {
        step(Phase::Start, &mut || container.start().map_err(failed));
        step(Phase::Exec, &mut || {
            container.try_exec(&["sh", "-c", "echo x; sleep 1"], 20).map(drop).map_err(failed)
        });
    }
    step(Phase::Stop, &mut || pod.stop().map_err(failed));
    step(Phase::Remove, &mut || pod.remove().map_err(failed));
    took
}

/// As the kubelet does with what it finds and does not know: stops and removes it, until it is gone.
pub(crate) fn sweep(engine: &Engine) {
    let mut last = String::new();
    let gone = until(END, || {
        let pods = engine.client().pods();
        for pod in &pods {
            let call = |method| engine.client().call_for::<Empty>(method, &pod.id);
            let ended = call("StopPodSandbox").and_then(|Empty {}| call("RemovePodSandbox"));
            last = format!("{ended:?}");
        }
        pods.is_empty().then_some(())
    });
    assert!(gone.is_some(), "pods cannot be removed: {last}{}", engine.last_words());
    let cgroups =
        std::path::Path::new(tests::cri::pod::CGROUPS).join(engine.cgroup().trim_start_matches('/'));
    for pod in fs::read_dir(cgroups).into_iter().flatten().flatten() {
        // What is left in it shows.
        let _ = fs::remove_dir(pod.path());
    }
}

/// What containerd 1.6 forgets of a pod that it was making when it was killed: the network, which no shim has made.
fn forget_network(engine: &Engine, before: &Remains) {
    for left in Remains::now().since(before) {
        if let Some(name) = left.strip_prefix("file /run/netns/") {
            finish(engine.tools().command("ip").args(["netns", "delete", name]), b"");
        } else if let Some(file) = left.strip_prefix("file /var/lib/cni/") {
            let _ = fs::remove_file(format!("/var/lib/cni/{file}"));
        }
    }
}

/// containerd is killed as soon as there is a shim, which has no task yet, or is about to have one: nobody would end it.
pub(crate) fn orphaned(engine: &Engine) {
    let before = Remains::now();
    for delay in [0, 60, 250] {
        thread::scope(|scope| {
            scope.spawn(|| {
                until(END, || (!processes("containerd-shim").is_empty()).then_some(())).expect("a shim");
                thread::sleep(Duration::from_millis(delay));
                engine.end(Signal::SIGKILL);
            });
            let _ = PodPlan::new(engine, "orphan").try_run();
        });
        engine.start_again();
        sweep(engine);
        forget_network(engine, &before);
        let left = Remains::left_since(&before);
        assert!(
            left.is_empty(),
            "left after {delay} ms:\n    {}{}",
            left.join("\n    "),
            engine.last_words()
        );
    }
}

pub(crate) fn killed(engine: &Engine) {
    let before = Remains::now();
    let mut dice = Dice::new();
    // So that most moments are within what they are to hit.
    let healthy = life(engine, "healthy", None);
    assert_eq!(healthy.len(), PHASES.len(), "a pod's life is longer: {healthy:?}");
    println!("    {healthy:?}");
    let rounds = if at_length() { 72 } else { 8 };
    for round in 0..rounds {
        // Each victim meets each phase in turn, at a moment of chance.
        let victim = [Victim::Vmm, Victim::Shim, Victim::Containerd][round % 3];
        let number = if at_length() { round / 3 % PHASES.len() } else { dice.index(PHASES.len()) };
        let (phase, delay) = (PHASES[number], dice.moment(healthy[number]));
        life(engine, &format!("victim{round}"), Some((victim, phase, delay)));
        sweep(engine);
        if (victim, phase) == (Victim::Containerd, Phase::Run) && !Remains::left_since(&before).is_empty() {
            forget_network(engine, &before);
        }
        let left = Remains::left_since(&before);
        assert!(
            left.is_empty(),
            "left of round {round}, {victim:?} killed in {phase:?} after {delay:?}:\n    {}{}",
            left.join("\n    "),
            engine.last_words()
        );
    }
    let pod = PodPlan::new(engine, "survivor").run();
    assert_eq!(pod.shell("main", "echo well").run().ok().out, "well\n");
    drop(pod);
    assert_clean(&before);
}

/// Several `ctr` make, start and delete containers of the same few names.
pub(crate) fn race(engine: &Engine) {
    let before = Remains::now();
    let (threads, times) = if at_length() { (6, 10) } else { (3, 2) };
    let ids = ["race-a", "race-b"];
    thread::scope(|scope| {
        for number in 0..threads {
            scope.spawn(move || {
                for time in 0..times {
                    let id = ids[(number + time) % ids.len()];
                    if number % 3 == 2 {
                        engine.ctr_end(&["tasks", "delete", "--force", id]);
                        engine.ctr_end(&["containers", "delete", id]);
                    } else {
                        let run = engine.ctr_run(&["--rm"], id, &["echo", "ran"]);
                        let ended = engine.ctr_end(&run);
                        // Either it ran, or it is told why not.
                        assert!(ended.out == "ran\n" || !ended.err.is_empty(), "{ended:?}");
                    }
                }
            });
        }
    });
    for id in ids {
        engine.ctr_end(&["tasks", "delete", "--force", id]);
        engine.ctr_end(&["containers", "delete", id]);
    }
    let run = engine.ctr_run(&["--rm"], ids[0], &["echo", SMALL]);
    assert_eq!(engine.ctr_end(&run).ok().out, format!("{SMALL}\n"), "the name is free again");
    assert_clean(&before);
}
