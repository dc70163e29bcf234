//! Pods under containerd, krx beside runc on one host: `cargo bench -p benches --bench containerd`, in counted time with
//! `-- --icount` (`make bench`).
//!
//! Times are from a call to the first byte of output, of both runtimes in turn. Where krx's goes is taken in runs of
//! their own, from the shim's log, as logging takes time. All programs lie in a root file system in memory.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use benches::host;
use benches::launch::{self, Options, ReportFile};
use benches::report::{Report, Row};
use benches::resident;
use benches::start::monotonic_ns;
use benches::tracing::Recording;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::Signal;
use tests::containerd::image::SMALL;
use tests::containerd::{Engine, KRX, RUNC, Runtime};
use tests::cri::messages::{PodLinux, Resources};
use tests::cri::pod::{Pod, PodPlan};
use tests::pod::until;

/// krx's times, of runc's in the same run.
const RUN_BUDGET: f64 = 0.8;
const CNI_POD_BUDGET: f64 = 0.6;
/// Of an idle pod with a guest of [`GUEST_MIB`], and of the shim in it.
const POD_BUDGET: f64 = 40.0;
const SHIM_BUDGET: f64 = 5.0;
const GUEST_MIB: u64 = 128;
/// Idle pods at a time.
const PODS: usize = 20;
/// A container's memory limit that is used up, and how much of it a program can have beside the kernel's share.
const LIMIT_MIB: i64 = 256;
const USED_MIB: i64 = 240;
/// What a start leaves to be done, and containerd's answers to the end of what was before.
const SETTLE: Duration = Duration::from_secs(3);
const ENDS: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    launch::main("containerd", measure)
}

fn measure(options: &Options, revision: &str) -> io::Result<ExitCode> {
    let unit = if host::is_counting() { "cms" } else { "ms" };
    let file = ReportFile::create("containerd", revision, unit)?;
    let setup = common::move_into_memory(|_, _| Ok(()))?;
    let engine = Engine::start_with(setup);
    let runs = options.runs;
    let mut report =
        Report { bench: "containerd".into(), revision: revision.into(), unit: unit.into(), rows: Vec::new() };
    // Told as it comes, too: all of it takes minutes.
    let mut add = |rows: Vec<Row>| {
        let medians = rows.iter().map(|row| format!("{} {:.2} {}", row.name, row.median, row.unit));
        eprintln!("{}", medians.collect::<Vec<_>>().join("\n"));
        report.rows.extend(rows);
    };
    add(compared(("ctr run", RUN_BUDGET), runs, unit, |name, runtime| ctr_run(&engine, name, runtime))?);
    add(compared(("pod", CNI_POD_BUDGET), runs, unit, |name, runtime| pod(&engine, name, runtime))?);
    add(idle(&engine)?);
    add(full(&engine)?);
    engine.end(Signal::SIGTERM);
    engine.start_again_logging("debug");
    add(parts("ctr run", runs, unit, &engine, |name| ctr_run(&engine, name, KRX))?);
    add(parts("pod", runs, unit, &engine, |name| pod(&engine, name, KRX))?);
    drop(engine);
    file.publish(&report)
}

/// Instants of one start, by the monotonic clock.
type Phases = Vec<(String, u64)>;

fn between(phases: &Phases, from: &str, to: &str) -> io::Result<f64> {
    let at = |name: &str| {
        let found = phases.iter().find(|(known, _)| known == name).map(|(_, at)| *at);
        found.ok_or_else(|| io::Error::other(format!("no phase {name} in {phases:?}")))
    };
    Ok(milliseconds(at(to)?.saturating_sub(at(from)?)))
}

const ASKED: &str = "asked";
const FIRST_BYTE: &str = "first byte";

/// Starts by both runtimes in turn, after one of each that warms up; from each phase to the next, all of it, and how much
/// longer krx takes, beside a budget for that.
fn compared(
    (what, budget): (&str, f64),
    runs: usize,
    unit: &str,
    mut one: impl FnMut(&str, Runtime) -> io::Result<Phases>,
) -> io::Result<Vec<Row>> {
    let mut all: BTreeMap<&str, Vec<Phases>> = BTreeMap::new();
    for run in 0..=runs {
        for runtime in [RUNC, KRX] {
            let phases = one(&format!("{}-{run}", runtime.handler), runtime)?;
            if run > 0 {
                all.entry(runtime.handler).or_default().push(phases);
            }
        }
    }
    let mut rows = Vec::new();
    let mut medians = Vec::new();
    for runtime in [RUNC, KRX] {
        let starts = &all[runtime.handler];
        let names: Vec<_> = starts[0].iter().map(|(name, _)| name.as_str()).collect();
        if names.len() > 2 {
            for pair in names.windows(2) {
                let name = format!("{what}, {}: {} to {}", runtime.handler, pair[0], pair[1]);
                rows.push(Row::new(name, unit, times(starts, pair[0], pair[1])?));
            }
        }
        let name = format!("{what}, {}: {ASKED} to {FIRST_BYTE}", runtime.handler);
        let row = Row::new(name, unit, times(starts, ASKED, FIRST_BYTE)?);
        medians.push(row.median);
        rows.push(row);
    }
    let ratio = Row::new(format!("{what}: krx / runc"), "times", vec![medians[1] / medians[0]]);
    rows.push(ratio.budget(budget));
    Ok(rows)
}

fn times(starts: &[Phases], from: &str, to: &str) -> io::Result<Vec<f64>> {
    starts.iter().map(|start| between(start, from, to)).collect()
}

/// `ctr run` of a static program, to its first byte of output.
fn ctr_run(engine: &Engine, name: &str, runtime: Runtime) -> io::Result<Phases> {
    let arguments =
        ["run", "--rm", "--runtime", runtime.kind, SMALL, name, "/usr/bin/workload", "print", "42"];
    let mut command: Command = engine.ctr(&arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let asked = monotonic_ns();
    let mut child = command.spawn()?;
    let mut first = [0];
    let read = child.stdout.as_mut().map_or(Ok(0), |output| output.read(&mut first))?;
    let shown = monotonic_ns();
    let output = child.wait_with_output()?;
    let said = [&first[..read], &output.stdout].concat();
    if said != b"42\n" || !output.status.success() {
        let said = String::from_utf8_lossy(&said).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(io::Error::other(format!("`print 42` said {said:?}: {errors}{}", engine.last_words())));
    }
    thread::sleep(SETTLE);
    Ok(vec![(ASKED.into(), asked), (FIRST_BYTE.into(), shown)])
}

/// A pod with a network and one container, by the CRI, to the first byte in the container's log.
fn pod(engine: &Engine, name: &str, runtime: Runtime) -> io::Result<Phases> {
    let mut plan = PodPlan::new(engine, name);
    plan.runtime = runtime;
    let mut phases = vec![(ASKED.to_string(), monotonic_ns())];
    let mut reached = |name: &str| phases.push((name.into(), monotonic_ns()));
    let pod = plan.run();
    reached("pod runs");
    let container = pod.container("main", &["/usr/bin/workload", "print", "42"]).create();
    reached("container created");
    let logged = first_write(Path::new(&pod.config.log_directory))?;
    container.start().map_err(|status| io::Error::other(status.to_string()))?;
    let shown = logged.join().map_err(|_| io::Error::other("the watch of the log has failed"))??;
    phases.push((FIRST_BYTE.into(), shown));
    let (code, (said, _)) = (container.wait().exit_code, container.logs());
    if (code, said.as_str()) != (0, "42\n") {
        return Err(io::Error::other(format!("`print 42` ended with {code} and said {said:?}")));
    }
    drop(pod);
    thread::sleep(SETTLE);
    Ok(phases)
}

/// When something is first written to a file of `directory`.
fn first_write(directory: &Path) -> io::Result<thread::JoinHandle<io::Result<u64>>> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
    inotify.add_watch(directory, AddWatchFlags::IN_MODIFY)?;
    Ok(thread::spawn(move || {
        inotify.read_events()?;
        Ok(monotonic_ns())
    }))
}

/// Where krx's time goes, by the shim's own log and by when programs were executed.
fn parts(
    what: &str,
    runs: usize,
    unit: &str,
    engine: &Engine,
    mut one: impl FnMut(&str) -> io::Result<Phases>,
) -> io::Result<Vec<Row>> {
    let mut all = Vec::new();
    for run in 0..=runs {
        let before = fs::metadata(engine.log())?.len();
        let recording = Recording::start(&[("sched/sched_process_exec", "")])?;
        let mut phases = one(&format!("split-{run}"))?;
        let begin = phases[0].1;
        for event in recording.finish()?.iter().filter(|event| event.monotonic_us * 1000 > begin) {
            let program = event.fields.strip_prefix("filename=").and_then(|text| text.split(' ').next());
            let program = program.and_then(|path| path.rsplit('/').next()).unwrap_or_default();
            phases.push((format!("exec of {program}"), event.monotonic_us * 1000));
        }
        let log = fs::read(engine.log())?;
        let log =
            String::from_utf8_lossy(log.get(usize::try_from(before).unwrap_or(0)..).unwrap_or_default());
        phases.extend(log.lines().filter(|line| line.contains("timings of ")).flat_map(logged));
        let end = between_end(&phases)?;
        phases.retain(|(_, at)| (begin..=end).contains(at));
        phases.sort_by_key(|(_, at)| *at);
        number(&mut phases);
        if run > 0 {
            all.push(phases);
        }
    }
    steps(&format!("{what}, krx, logging"), unit, &all)
}

fn between_end(phases: &Phases) -> io::Result<u64> {
    let last = phases.iter().find(|(name, _)| name == FIRST_BYTE);
    last.map(|(_, at)| *at).ok_or_else(|| io::Error::other("no first byte"))
}

/// The phases in a line of the shim's log: `timings of create ID: NAME @NANOSECONDS, ...`.
fn logged(line: &str) -> Phases {
    let text =
        line.split_once("timings of ").and_then(|(_, text)| text.split_once(": ")).unwrap_or_default().1;
    let phase = |text: &str| {
        let (name, at) = text.rsplit_once(" @")?;
        let digits: String = at.chars().take_while(char::is_ascii_digit).collect();
        Some((name.to_string(), digits.parse().ok()?))
    };
    text.split(", ").filter_map(phase).collect()
}

/// Makes names differ: what happens several times is numbered.
fn number(phases: &mut Phases) {
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    for (name, _) in phases {
        let count = seen.entry(name.clone()).or_default();
        *count += 1;
        if *count > 1 {
            *name = format!("{name} ({count})");
        }
    }
}

/// From each phase to the next, in the order of the first start; a phase that another start has not is left out.
fn steps(what: &str, unit: &str, starts: &[Phases]) -> io::Result<Vec<Row>> {
    let in_all = |name: &str| starts.iter().all(|start| start.iter().any(|(known, _)| known == name));
    let Some(first) = starts.first() else { return Ok(Vec::new()) };
    let names: Vec<_> = first.iter().map(|(name, _)| name.as_str()).filter(|name| in_all(name)).collect();
    let mut rows = Vec::new();
    for pair in names.windows(2) {
        let name = format!("{what}: {} to {}", pair[0], pair[1]);
        rows.push(Row::new(name, unit, times(starts, pair[0], pair[1])?));
    }
    Ok(rows)
}

/// What idle pods weigh.
fn idle(engine: &Engine) -> io::Result<Vec<Row>> {
    let pods: Vec<_> = (0..PODS)
        .map(|serial| {
            let memory = format!("{GUEST_MIB}M");
            PodPlan::new(engine, &format!("idle-{serial}")).annotation("io.krx.memory", &memory).run()
        })
        .collect();
    let containers: Vec<_> =
        pods.iter().map(|pod| pod.container("main", &["sleep", "3600"]).start()).collect();
    thread::sleep(SETTLE);
    let (mut shims, mut vmms, mut guests, mut sums) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for pod in &pods {
        let (shim, vmm) = (pid_of("containerd-shim", &pod.id)?, vmm_of(pod)?);
        let shim = mebibytes(resident::all_kib(shim)?);
        let weight = resident::of(vmm, GUEST_MIB)?;
        let (beyond, guest) = (mebibytes(weight.beyond_kib), mebibytes(weight.guest_kib));
        sums.push(shim + beyond + guest);
        shims.push(shim);
        vmms.push(beyond);
        guests.push(guest);
    }
    drop(containers);
    drop(pods);
    let name = |what: &str| format!("idle pod of {GUEST_MIB} MiB, one of {PODS}: {what}");
    Ok(vec![
        Row::new(name("shim"), "MiB", shims).budget(SHIM_BUDGET),
        Row::new(name("VMM beyond its guest"), "MiB", vmms),
        Row::new(name("guest"), "MiB", guests),
        Row::new(name("shim, VMM and guest"), "MiB", sums).budget(POD_BUDGET),
    ])
}

/// The process `comm` that has `text` on its command line.
fn pid_of(comm: &str, text: &str) -> io::Result<u32> {
    for process in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let read = |file: &str| fs::read(process.path().join(file)).unwrap_or_default();
        let (name, line) = (read("comm"), read("cmdline"));
        if name.trim_ascii() == comm.as_bytes() && String::from_utf8_lossy(&line).contains(text) {
            return Ok(pid);
        }
    }
    Err(io::Error::other(format!("no process {comm} of {text}")))
}

/// The VMM of a pod: it is the one in the pod's cgroup.
fn vmm_of(pod: &Pod<'_>) -> io::Result<u32> {
    let procs = fs::read_to_string(pod.cgroup().join(&pod.id).join("cgroup.procs"))?;
    let is_vmm = |pid: &&str| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == "krx-vmm")
    };
    let found = procs.lines().find(is_vmm).and_then(|pid| pid.parse().ok());
    found.ok_or_else(|| io::Error::other(format!("no krx-vmm in the cgroup of pod {}", pod.id)))
}

/// What a pod takes beyond its limit when its container uses that up.
fn full(engine: &Engine) -> io::Result<Vec<Row>> {
    let limit = Resources { memory_limit: LIMIT_MIB << 20, ..Resources::default() };
    let mut plan = PodPlan::new(engine, "full");
    let linux: &mut PodLinux = plan.linux();
    linux.resources = Some(limit.clone());
    let pod = plan.run();
    let used = USED_MIB.to_string();
    let container = pod.container("main", &["/usr/bin/workload", "allocate", &used]).resources(limit).start();
    container.wait_for("allocated");
    let read = |file: &str| -> io::Result<u64> {
        let text = fs::read_to_string(pod.cgroup().join(file))?;
        text.trim().parse().map_err(|_| io::Error::other(format!("{file} says {text}")))
    };
    let (now, peak) = (read("memory.current")?, read("memory.peak")?);
    let beyond =
        |bytes: u64| mebibytes(bytes / 1024) - f64::from(i32::try_from(LIMIT_MIB).unwrap_or_default());
    drop(pod);
    let ended = until(ENDS, || engine.client().pods().is_empty().then_some(()));
    ended.ok_or_else(|| io::Error::other("pods do not end"))?;
    let name = |what: &str| {
        format!("pod with {USED_MIB} of {LIMIT_MIB} MiB in use: {what} of its cgroup beyond the limit")
    };
    Ok(vec![
        Row::new(name("memory.current"), "MiB", vec![beyond(now)]),
        Row::new(name("memory.peak"), "MiB", vec![beyond(peak)]),
    ])
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn milliseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn mebibytes(kib: u64) -> f64 {
    kib as f64 / 1024.0
}
