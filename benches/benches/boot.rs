//! Boot latency: `cargo bench -p benches --bench boot`, in counted time with `-- --icount` (`make bench`).
//!
//! Times and exits are taken in different runs, as recording an exit takes time of its own. The first run of each kind
//! warms up and is not counted.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use benches::exits;
use benches::host::{self, Memory};
use benches::launch::{self, Options, ReportFile};
use benches::plot::{self, Lane};
use benches::report::{Report, Row};
use benches::resident::Resident;
use benches::start::{self, Programs, Qemu, SPAWNED, Size, Start};
use benches::system_calls;
use benches::tracing::{Event, Recording};

const SMALL: Size = Size { memory_mib: 128, vcpus: 1 };
const LARGE: Size = Size { memory_mib: 2048, vcpus: 1 };
/// Without a budget: an emulated host has one CPU, on which the guest's wait for each other.
const WIDE: Size = Size { memory_mib: 2048, vcpus: 4 };
/// Budgets by row, 3 % above what was reached: counted time and exits are the same in each run, so that more is a change.
const BUDGETS: [(&str, f64); 7] = [
    ("krx-vmm, 128 MiB: exec to first guest instruction", 8.85),
    ("krx-vmm, 128 MiB: exec to PID 1", 25.5),
    ("krx-vmm, 128 MiB: VM exits to PID 1", 420.0),
    ("krx-vmm, 128 MiB: system calls to agent ready", 355.0),
    ("krx-vmm, 128 MiB: guest memory resident", 18.9),
    ("krx-vmm, 128 MiB: memory beyond the guest's", 4.0),
    ("krx-vmm, 2 GiB: exec to agent ready", 29.0),
];
/// Of a current server core, to translate: it executes as many instructions in a nanosecond, an exit to KVM and back takes so many
/// microseconds on top of the instructions counted, and so many more when it is for a page that the guest has not.
const INSTRUCTIONS_PER_NS: f64 = 3.0;
const EXIT_US: f64 = 1.2;
const NESTED_FAULT_US: f64 = 0.8;
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Seconds after which QEMU's guest has booted; idle time passes at once where time is counted.
const QEMU_SECONDS: u64 = 5;
/// Boots of QEMU for one that is measured, at the most.
const QEMU_ATTEMPTS: usize = 12;

fn main() -> ExitCode {
    launch::main("boot", measure)
}

fn measure(options: &Options, revision: &str) -> io::Result<ExitCode> {
    let memory = Memory::new()?;
    let programs = Programs::load(&memory, &host::root())?;
    let unit = if host::is_counting() { "cms" } else { "ms" };
    let mut rows = Vec::new();
    for size in [SMALL, LARGE, WIDE] {
        rows.extend(vmm_rows(&programs, &memory, options.runs, (size, unit))?);
    }
    for size in [SMALL, LARGE] {
        rows.extend(container_rows(&programs, &memory, options.runs, (size, unit))?);
    }
    for size in [SMALL, WIDE] {
        rows.extend(qemu_rows(&programs, options.runs, (size, unit))?);
        rows.extend(beside_qemu(&rows, size));
    }
    for row in &mut rows {
        row.budget = budget(&row.name, &row.unit);
    }
    let report = Report { bench: "boot".into(), revision: revision.into(), unit: unit.into(), rows };
    let file = ReportFile::create(&report.bench, revision, unit)?;
    file.draw(&plot::svg(&lanes(&report.rows, unit), unit))?;
    file.publish(&report)
}

/// Where the time of each kind of start goes.
fn lanes(rows: &[Row], unit: &str) -> Vec<Lane> {
    let lane = |(title, prefix): (&str, &str)| Lane::of(rows, title, unit, prefix);
    let wanted = [
        ("krx-vmm, 128 MiB", "krx-vmm, 128 MiB: exec to "),
        ("krx run, 128 MiB", "krx run, 128 MiB: exec of krx-vmm to "),
        ("krx-vmm, 2 GiB", "krx-vmm, 2 GiB: exec to "),
        ("QEMU microvm", "QEMU microvm, 128 MiB: exec to "),
    ];
    wanted.into_iter().map(lane).filter(|lane| !lane.reached.is_empty()).collect()
}

/// Milliseconds have none: they are those of the machine.
fn budget(name: &str, unit: &str) -> Option<f64> {
    let row = BUDGETS.iter().find(|(row, _)| *row == name && unit != "ms");
    row.map(|(_, budget)| *budget)
}

/// The same start `runs` times, after one that only warms up.
fn repeat(runs: usize, mut one: impl FnMut() -> io::Result<Start>) -> io::Result<Vec<Start>> {
    one()?;
    (0..runs).map(|_| one()).collect()
}

fn row(name: String, unit: &str, starts: &[Start], (from, to): (&str, &str)) -> Row {
    Row::new(name, unit, starts.iter().map(|start| start.between_ms(from, to)).collect())
}

/// From exec of `krx-vmm` to its agent's hello.
fn vmm_rows(
    programs: &Programs,
    memory: &Memory,
    runs: usize,
    (size, unit): (Size, &str),
) -> io::Result<Vec<Row>> {
    let starts = repeat(runs, || start::vmm(programs, memory, size))?;
    let name = |to: &str| format!("krx-vmm, {size}: exec to {to}");
    let mut rows: Vec<_> = [
        ("configuration read", "configured"),
        ("VM created", "vm_created"),
        ("kernel loaded", "kernel_loaded"),
        ("first guest instruction", "first_instruction"),
        ("PID 1", "pid1"),
        ("agent ready", "agent ready"),
    ]
    .into_iter()
    .map(|(to, phase)| row(name(to), unit, &starts, (SPAWNED, phase)))
    .collect();
    let ready = rows.last().map_or(0.0, |row| row.median);
    let exits = exit_rows(runs, &format!("krx-vmm, {size}"), || start::vmm(programs, memory, size))?;
    let exits_to_ready = exits.last().cloned();
    rows.extend(exits);
    if let Some(exits) = exits_to_ready.filter(|_| unit == "cms") {
        let name = format!("krx-vmm, {size}: exec to agent ready on hardware, by the model");
        rows.push(Row::new(name, "ms", vec![modelled_ms(ready, &exits.parts)]));
    }
    rows.push(call_row(runs, &format!("krx-vmm, {size}"), || start::vmm(programs, memory, size))?);
    let resident = |kib: fn(Resident) -> u64| {
        starts.iter().filter_map(|start| start.resident).map(|all| mebibytes(kib(all))).collect()
    };
    let name = |what: &str| format!("krx-vmm, {size}: {what}");
    rows.push(Row::new(name("guest memory resident"), "MiB", resident(|all| all.guest_kib)));
    rows.push(Row::new(name("memory beyond the guest's"), "MiB", resident(|all| all.beyond_kib)));
    Ok(rows)
}

/// Milliseconds that as many million instructions and these exits take on hardware.
fn modelled_ms(cms: f64, exits: &BTreeMap<String, u64>) -> f64 {
    let all = count(exits.values().sum());
    let faults = count(exits.get("npf").copied().unwrap_or_default());
    cms / INSTRUCTIONS_PER_NS + (all * EXIT_US + faults * NESTED_FAULT_US) / 1e3
}

/// Exits up to PID 1 and up to the agent's hello.
fn exit_rows(runs: usize, name: &str, mut one: impl FnMut() -> io::Result<Start>) -> io::Result<Vec<Row>> {
    let mut counts: [Vec<f64>; 2] = Default::default();
    let mut parts: [BTreeMap<String, u64>; 2] = Default::default();
    let points = [("pid1", "PID 1"), ("agent ready", "agent ready")];
    for _ in 0..runs {
        let (start, events) = recorded(&[("kvm/kvm_exit", "")], &mut one)?;
        for (index, (phase, _)) in points.iter().enumerate() {
            let by_reason = exits::by_reason(&events, start.at(SPAWNED), start.at(phase));
            counts[index].push(count(by_reason.values().sum()));
            parts[index] = by_reason;
        }
    }
    let rows = points.into_iter().zip(counts).zip(parts);
    Ok(rows
        .map(|(((_, to), counts), parts)| {
            Row::new(format!("{name}: VM exits to {to}"), "exits", counts).parts(parts)
        })
        .collect())
}

/// System calls of the VMM up to the agent's hello.
fn call_row(runs: usize, name: &str, mut one: impl FnMut() -> io::Result<Start>) -> io::Result<Row> {
    let (mut counts, mut parts) = (Vec::new(), BTreeMap::new());
    for _ in 0..runs {
        let (start, events) = recorded(&[system_calls::EVENT], &mut one)?;
        let by_name = system_calls::by_name(&events, start.at(SPAWNED), start.at("agent ready"));
        counts.push(count(by_name.values().sum()));
        parts = by_name;
    }
    Ok(Row::new(format!("{name}: system calls to agent ready"), "calls", counts).parts(parts))
}

fn recorded<T>(
    events: &[(&str, &str)],
    one: &mut impl FnMut() -> io::Result<T>,
) -> io::Result<(T, Vec<Event>)> {
    let recording = Recording::start(events)?;
    let done = one()?;
    Ok((done, recording.finish()?))
}

/// From exec of `krx` to the first byte of a static program's output.
fn container_rows(
    programs: &Programs,
    memory: &Memory,
    runs: usize,
    (size, unit): (Size, &str),
) -> io::Result<Vec<Row>> {
    let starts = repeat(runs, || start::container(programs, memory, size))?;
    let name = |from: &str, to: &str| format!("krx run, {size}: exec of {from} to {to}");
    Ok(vec![
        row(name("krx", "exec of krx-vmm"), unit, &starts, (SPAWNED, "vmm spawned")),
        row(name("krx-vmm", "agent ready"), unit, &starts, ("vmm spawned", "agent ready")),
        row(name("krx-vmm", "container created"), unit, &starts, ("vmm spawned", "container created")),
        row(name("krx-vmm", "exec in the container"), unit, &starts, ("vmm spawned", "exec")),
        row(name("krx-vmm", "first byte of output"), unit, &starts, ("vmm spawned", "first byte")),
        row(name("krx", "first byte of output"), unit, &starts, (SPAWNED, "first byte")),
    ])
}

/// QEMU's time to PID 1 is what krx's is a part of.
fn beside_qemu(rows: &[Row], size: Size) -> Option<Row> {
    let of = |vmm: &str| {
        let name = format!("{vmm}, {size}: exec to PID 1");
        rows.iter().find(|row| row.name == name).map(|row| row.median)
    };
    let ratio = of("krx-vmm")? / of("QEMU microvm")?;
    Some(Row::new(format!("{size}: exec to PID 1, krx-vmm / QEMU"), "times", vec![ratio]))
}

/// QEMU's microvm with the same kernel and initramfs, as the reference.
fn qemu_rows(programs: &Programs, runs: usize, (size, unit): (Size, &str)) -> io::Result<Vec<Row>> {
    if !Path::new(QEMU).exists() {
        println!("boot: no {QEMU}, so no reference; apt-get install qemu-system-x86");
        return Ok(Vec::new());
    }
    let qemu = Qemu { program: QEMU.into() };
    let mut one = || qemu.boot(programs, size, QEMU_SECONDS);
    qemu.warm()?;
    let mut times = Vec::new();
    // What is still missing comes from the share, and a wait for that lets a counting clock jump to the end.
    for _ in 0..runs * QEMU_ATTEMPTS {
        let (spawned, events) = recorded(&[("kvm/kvm_pio", "")], &mut one)?;
        times.extend(start::pid1_ns(&events).map(|pid1| milliseconds(pid1.saturating_sub(spawned))));
        if times.len() > runs {
            break;
        }
    }
    if times.len() <= runs {
        println!(
            "boot: QEMU's guest reached PID 1 within {QEMU_SECONDS} s in {} boots only, so no reference",
            times.len()
        );
        return Ok(Vec::new());
    }
    // A jump adds seconds: what is near the least had none.
    let least = times.iter().copied().fold(f64::INFINITY, f64::min);
    times.retain(|time| *time < 1.5 * least);
    let name = format!("QEMU microvm, {size}: exec to PID 1");
    let mut rows = vec![Row::new(name, unit, times)];
    let (spawned, events) = recorded(&[("kvm/kvm_pio", ""), ("kvm/kvm_exit", "")], &mut one)?;
    if let Some(pid1) = start::pid1_ns(&events) {
        let by_reason = exits::by_reason(&events, spawned, pid1);
        let total = count(by_reason.values().sum());
        let name = format!("QEMU microvm, {size}: VM exits to PID 1");
        rows.push(Row::new(name, "exits", vec![total]).parts(by_reason));
    }
    Ok(rows)
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn milliseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn mebibytes(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn count(number: u64) -> f64 {
    number as f64
}
