//! What a pod's network and files carry, krx beside runc and QEMU's microvm on one host: `cargo bench -p benches --bench throughput`, in counted
//! time with `-- --icount`.
//!
//! iperf3 between a pod and its host, and fio on a volume and on the root file system, which lie in memory on the host.
//! Times are those that the two programs take by their own clock; on a counting host it counts in a guest, too.

mod common;

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Error};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use benches::launch::{self, Options, ReportFile};
use benches::report::{Report, Row};
use benches::{host, microvm};
use serde_json::Value;
use tests::containerd::{Engine, GATEWAY, KRX, RUNC, Runtime, image};
use tests::cri::pod::PodPlan;
use tests::scratch::Scratch;

/// What goes over the network for one figure.
const NETWORK: &str = "64M";
/// Memory of a guest: room for the files, which it may keep.
const MEMORY_MIB: u64 = 512;
/// iperf3 on the host is the image's, by its own dynamic linker.
const OF_SERVER: [&str; 7] = [
    "usr/lib64/ld-linux-x86-64.so.2",
    "usr/bin/iperf3",
    "usr/lib/x86_64-linux-gnu/libiperf.so.0",
    "usr/lib/x86_64-linux-gnu/libsctp.so.1",
    "usr/lib/x86_64-linux-gnu/libcrypto.so.3",
    "usr/lib/x86_64-linux-gnu/libm.so.6",
    "usr/lib/x86_64-linux-gnu/libc.so.6",
];
/// Time for a server to listen.
const LISTENS: Duration = Duration::from_secs(1);

/// How files are used: what the row says, and what fio is told.
const ACCESSES: [(&str, &[&str]); 6] = [
    ("1 MiB written", &["--rw=write", "--bs=1M", "--size=32M"]),
    ("1 MiB read, not cached", &["--rw=read", "--bs=1M", "--size=32M", "--direct=1"]),
    ("1 MiB read, cached", &["--rw=read", "--bs=1M", "--size=32M", "--pre_read=1"]),
    ("4 KiB written", &["--rw=randwrite", "--bs=4k", "--size=32M", "--io_size=4M"]),
    ("4 KiB read, not cached", &["--rw=randread", "--bs=4k", "--size=32M", "--io_size=4M", "--direct=1"]),
    ("4 KiB written and synced", &["--rw=randwrite", "--bs=4k", "--size=32M", "--io_size=1M", "--fsync=1"]),
];

fn main() -> ExitCode {
    launch::main("throughput", measure)
}

/// A figure: what the row says, the command whose report has it, and how it is read from there.
struct Figure {
    name: String,
    unit: &'static str,
    command: Vec<String>,
    read: fn(&Value) -> io::Result<f64>,
}

/// All figures, with a server at `host`, a volume at `/data` where there is one, and the root file system.
fn figures(host: &str, places: &[(&str, &str)]) -> Vec<Figure> {
    let (unit, small) = if host::is_counting() { ("cms", "cµs") } else { ("ms", "µs") };
    let mut all = Vec::new();
    for (name, flag) in [("pod to host", None), ("host to pod", Some("-R"))] {
        let command = ["iperf3", "-c", host, "-n", NETWORK, "-J"].into_iter().chain(flag);
        let command = command.map(String::from).collect();
        all.push(Figure { name: format!("network, {name}, a MiB"), unit, command, read: network });
    }
    for (place, directory) in places {
        for (name, access) in ACCESSES {
            // One thread, and one operation at a time; the file stays for the next run.
            let directory = format!("--directory={directory}");
            let fixed = ["fio", "--name=file", "--ioengine=psync", "--thread", "--fallocate=none"];
            let command = fixed.into_iter().chain(["--output-format=json", &*directory]);
            let command = command.chain(access.iter().copied()).map(String::from).collect();
            all.push(Figure { name: format!("{place}, {name}"), unit: small, command, read: files });
        }
    }
    all
}

fn measure(options: &Options, revision: &str) -> io::Result<ExitCode> {
    let unit = if host::is_counting() { "cms" } else { "ms" };
    let file = ReportFile::create("throughput", revision, unit)?;
    let archive = PathBuf::from("/tmp/throughput.tar");
    let tree = host::root().canonicalize()?.join("target/guest/throughput-rootfs");
    let kernel = host::root().canonicalize()?.join("target/guest/vmlinux");
    let setup = common::move_into_memory(|root, tools| {
        image::throughput(tools, &root.path(&archive));
        microvm::prepare(root)?;
        OF_SERVER.iter().try_for_each(|file| root.copy(&tree.join(file)))
    })?;
    let engine = Engine::start_with(setup);
    engine.import_for_pods(&archive);
    let server = Server::start(&tree)?;
    let mut rows = Vec::new();
    for runtime in [RUNC, KRX] {
        rows.extend(of_pod(&engine, runtime, options.runs)?);
    }
    rows.extend(of_microvm(&engine, &kernel, options.runs)?);
    drop(server);
    drop(engine);
    let report = Report { bench: "throughput".into(), revision: revision.into(), unit: unit.into(), rows };
    file.publish(&report)
}

fn row(whose: &str, figure: &Figure, samples: Vec<f64>) -> Row {
    let row = Row::new(format!("{whose}: {}", figure.name), figure.unit, samples);
    eprintln!("{} {:.3} {}", row.name, row.median, row.unit);
    row
}

/// The figures of a pod with a volume.
fn of_pod(engine: &Engine, runtime: Runtime, runs: usize) -> io::Result<Vec<Row>> {
    let volume = Scratch::under(engine.scratch().path());
    let mut plan = PodPlan::new(engine, "throughput").annotation("io.krx.memory", &format!("{MEMORY_MIB}M"));
    plan.runtime = runtime;
    let pod = plan.run();
    let container = pod.container("main", &["sleep", "36000"]).image(image::THROUGHPUT);
    let container = container.mount(volume.path(), "/data", false).start();
    let mut rows = Vec::new();
    for figure in figures(GATEWAY, &[("volume", "/data"), ("root file system", "/var")]) {
        let command: Vec<_> = figure.command.iter().map(String::as_str).collect();
        let mut samples = Vec::new();
        for _ in 0..runs {
            let ended = container.try_exec(&command, 0).map_err(|status| Error::other(status.to_string()))?;
            if ended.code != 0 {
                return Err(Error::other(format!("{command:?}: {ended:?}")));
            }
            samples.push((figure.read)(&serde_json::from_str(&ended.out)?)?);
        }
        rows.push(row(runtime.handler, &figure, samples));
    }
    Ok(rows)
}

/// Those of a QEMU, whose one share is the root file system.
fn of_microvm(engine: &Engine, kernel: &Path, runs: usize) -> io::Result<Vec<Row>> {
    let tree = engine.scratch().join("tree");
    fs::create_dir(&tree)?;
    let mounted = tree.to_string_lossy();
    let mount = ["-n", "k8s.io", "images", "mount", "--rw", image::THROUGHPUT, &mounted];
    if !engine.ctr(&mount).stdout(Stdio::null()).status()?.success() {
        return Err(Error::other("ctr does not mount the image"));
    }
    let figures = figures(microvm::HOST, &[("root file system", "/var")]);
    let mut script = String::new();
    for (number, figure) in figures.iter().enumerate() {
        for run in 0..runs {
            writeln!(script, "{} > /report-{number}-{run}", figure.command.join(" "))
                .map_err(Error::other)?;
        }
    }
    microvm::run(&tree, kernel, MEMORY_MIB, &script, || engine.tools().command("ip"))?;
    let mut rows = Vec::new();
    for (number, figure) in figures.iter().enumerate() {
        let sample = |run| -> io::Result<f64> {
            let report = fs::read(tree.join(format!("report-{number}-{run}")))?;
            (figure.read)(&serde_json::from_slice(&report)?)
        };
        rows.push(row("QEMU microvm", figure, (0..runs).map(sample).collect::<io::Result<_>>()?));
    }
    engine.ctr(&["-n", "k8s.io", "images", "unmount", "--rm", &mounted]).stdout(Stdio::null()).status()?;
    Ok(rows)
}

/// Milliseconds a MiB, by the receiver.
fn network(report: &Value) -> io::Result<f64> {
    let received = &report["end"]["sum_received"];
    let (seconds, bytes) = (number(&received["seconds"])?, number(&received["bytes"])?);
    Ok(seconds * 1000.0 / (bytes / f64::from(1 << 20)))
}

/// Microseconds an operation.
fn files(report: &Value) -> io::Result<f64> {
    let job = &report["jobs"][0];
    let mean = |side: &Value| number(&side["lat_ns"]["mean"]);
    if number(&job["read"]["total_ios"])? > 0.0 {
        return Ok(mean(&job["read"])? / 1000.0);
    }
    // The time of the sync of a write is counted apart.
    Ok((mean(&job["write"])? + mean(&job["sync"]).unwrap_or_default()) / 1000.0)
}

fn number(value: &Value) -> io::Result<f64> {
    value.as_f64().ok_or_else(|| Error::other(format!("{value} is no number")))
}

/// iperf3 on the host.
struct Server(Child);

impl Server {
    fn start(tree: &Path) -> io::Result<Self> {
        let mut command = Command::new(tree.join(OF_SERVER[0]));
        command.arg("--library-path").arg(tree.join("usr/lib/x86_64-linux-gnu"));
        let child = command.arg(tree.join(OF_SERVER[1])).args(["-s"]).stdout(Stdio::null()).spawn()?;
        thread::sleep(LISTENS);
        Ok(Self(child))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
