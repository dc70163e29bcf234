//! What a pod's network and files carry, krx beside runc on one host: `cargo bench -p benches --bench throughput`, in counted
//! time with `-- --icount`.
//!
//! iperf3 between a pod and its host, and fio on a volume and on the root file system, which lie in memory on the host.
//! Times are those that the two programs take by their own clock; on a counting host it counts in a guest, too.

mod common;

use std::io::{self, Error};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use benches::host;
use benches::launch::{self, Options, ReportFile};
use benches::report::{Report, Row};
use serde_json::Value;
use tests::containerd::{Engine, GATEWAY, KRX, RUNC, image};
use tests::cri::container::Container;
use tests::cri::pod::PodPlan;
use tests::scratch::Scratch;

/// What goes over the network for one figure.
const NETWORK: &str = "64M";
/// Annotation of the pods of krx: room for the files, which the guest may keep.
const MEMORY: &str = "512M";
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

fn measure(options: &Options, revision: &str) -> io::Result<ExitCode> {
    let (unit, small) = if host::is_counting() { ("cms", "cµs") } else { ("ms", "µs") };
    let file = ReportFile::create("throughput", revision, unit)?;
    let archive = PathBuf::from("/tmp/throughput.tar");
    let tree = host::root().canonicalize()?.join("target/guest/throughput-rootfs");
    let setup = common::move_into_memory(|root, tools| {
        image::throughput(tools, &root.path(&archive));
        OF_SERVER.iter().try_for_each(|file| root.copy(&tree.join(file)))
    })?;
    let engine = Engine::start_with(setup);
    engine.import_for_pods(&archive);
    let mut rows = Vec::new();
    for runtime in [RUNC, KRX] {
        let volume = Scratch::under(engine.scratch().path());
        let mut plan = PodPlan::new(&engine, "throughput").annotation("io.krx.memory", MEMORY);
        plan.runtime = runtime;
        let pod = plan.run();
        let container = pod.container("main", &["sleep", "36000"]).image(image::THROUGHPUT);
        let container = container.mount(volume.path(), "/data", false).start();
        let mut add = |name: String, unit: &str, sample: &dyn Fn() -> io::Result<f64>| -> io::Result<()> {
            let samples = (0..options.runs).map(|_| sample()).collect::<io::Result<_>>()?;
            let row = Row::new(format!("{}: {name}", runtime.handler), unit, samples);
            eprintln!("{} {:.3} {}", row.name, row.median, row.unit);
            rows.push(row);
            Ok(())
        };
        for (name, flags) in [("pod to host", &[][..]), ("host to pod", &["-R"][..])] {
            add(format!("network, {name}, a MiB"), unit, &|| network(&tree, &container, flags))?;
        }
        for (place, directory) in [("volume", "/data"), ("root file system", "/var")] {
            for (name, access) in ACCESSES {
                add(format!("{place}, {name}"), small, &|| files(&container, directory, access))?;
            }
        }
    }
    let report = Report { bench: "throughput".into(), revision: revision.into(), unit: unit.into(), rows };
    drop(engine);
    file.publish(&report)
}

/// Milliseconds a MiB, by the receiver.
fn network(tree: &Path, container: &Container<'_, '_>, flags: &[&str]) -> io::Result<f64> {
    let server = Server::start(tree)?;
    let mut command = vec!["iperf3", "-c", GATEWAY, "-n", NETWORK, "-J"];
    command.extend(flags);
    let report = execute(container, &command)?;
    drop(server);
    let received = &report["end"]["sum_received"];
    let (seconds, bytes) = (number(&received["seconds"])?, number(&received["bytes"])?);
    Ok(seconds * 1000.0 / (bytes / f64::from(1 << 20)))
}

/// Microseconds an operation.
fn files(container: &Container<'_, '_>, directory: &str, access: &[&str]) -> io::Result<f64> {
    let directory = format!("--directory={directory}");
    // One thread, and one operation at a time; the file stays for the next run.
    let mut command =
        vec!["fio", "--name=file", &directory, "--ioengine=psync", "--thread", "--fallocate=none"];
    command.push("--output-format=json");
    command.extend(access);
    let report = execute(container, &command)?;
    let job = &report["jobs"][0];
    let side = |name: &str| -> io::Result<(f64, f64)> {
        Ok((number(&job[name]["total_ios"])?, number(&job[name]["lat_ns"]["mean"])?))
    };
    let (read, written) = (side("read")?, side("write")?);
    // Of a synced write the time of the sync is counted apart.
    let synced = number(&job["sync"]["lat_ns"]["mean"]).unwrap_or_default();
    Ok(if read.0 > 0.0 { read.1 } else { written.1 + synced } / 1000.0)
}

/// Runs a program that reports in JSON.
fn execute(container: &Container<'_, '_>, command: &[&str]) -> io::Result<Value> {
    let ended = container.try_exec(command, 0).map_err(|status| Error::other(status.to_string()))?;
    let wrong = || Error::other(format!("{command:?}: {ended:?}"));
    if ended.code != 0 {
        return Err(wrong());
    }
    serde_json::from_str(&ended.out).map_err(|_| wrong())
}

fn number(value: &Value) -> io::Result<f64> {
    value.as_f64().ok_or_else(|| Error::other(format!("{value} is no number")))
}

/// iperf3 on the host, for one client.
struct Server(Child);

impl Server {
    fn start(tree: &Path) -> io::Result<Self> {
        let mut command = Command::new(tree.join(OF_SERVER[0]));
        command.arg("--library-path").arg(tree.join("usr/lib/x86_64-linux-gnu"));
        let child = command.arg(tree.join(OF_SERVER[1])).args(["-s", "-1"]).stdout(Stdio::null()).spawn()?;
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
