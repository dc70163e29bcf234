//! Software that people run, in pods: Debian's redis, PostgreSQL and nginx.

use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::io::{Read, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};
use tests::containerd::image::{self, SOFTWARE};
use tests::containerd::{Engine, suite};
use tests::cri::container::{Container, END, Plan};
use tests::cri::messages::{CONTAINER_EXITED, CONTAINER_RUNNING};
use tests::cri::pod::{Pod, PodPlan};
use tests::pod::{patience, until};
use tests::scratch::Scratch;

/// Programs and options of the database, whose data lie in the volume `/data`.
const INITDB: &str = "/usr/lib/postgresql/15/bin/initdb -D /data/db -U web -A trust --no-locale -E UTF8";
const POSTGRES: &str = "/usr/lib/postgresql/15/bin/postgres -D /data/db -c unix_socket_directories=/tmp \
    -c listen_addresses= -c shared_buffers=16MB -c max_connections=10";
const PSQL: &str = "/usr/lib/postgresql/15/bin/psql -h /tmp -U web -qtA -v ON_ERROR_STOP=1 postgres";
/// `PostgreSQL`'s own benchmark, with fewer accounts than its scale 1 has: each of its transactions adds a number to an account, to a
/// teller, to a branch, and to a history.
const PGBENCH: &str = "/usr/lib/postgresql/15/bin/pgbench -h /tmp -U web";
const ACCOUNTS: &str = "insert into pgbench_branches values (1, 0); insert into pgbench_tellers select n, 1, 0 from generate_series(1, 10) n; \
    insert into pgbench_accounts select n, 1, 0 from generate_series(1, 1000) n;";
const TRANSACTION: &str = r"\set aid random(1, 1000)
\set tid random(1, 10)
\set delta random(-5000, 5000)
begin;
update pgbench_accounts set abalance = abalance + :delta where aid = :aid;
update pgbench_tellers set tbalance = tbalance + :delta where tid = :tid;
update pgbench_branches set bbalance = bbalance + :delta where bid = 1;
insert into pgbench_history (tid, bid, aid, delta, mtime) values (:tid, 1, :aid, :delta, current_timestamp);
end;
";
const BALANCES: &str = "select (select sum(abalance) from pgbench_accounts) = all (array[(select sum(tbalance) from pgbench_tellers), \
    (select sum(bbalance) from pgbench_branches), (select coalesce(sum(delta), 0) from pgbench_history)]), \
    (select count(*) from pgbench_history)";
/// Longest that a database may take to be made, or to recover.
const DATABASE: Duration = Duration::from_secs(240);

fn main() -> ExitCode {
    suite::run_in_turn(&[
        ("redis_serves_a_client_in_another_pod", redis),
        ("nginx_serves_what_an_init_container_made", nginx),
        ("a_sidecar_shares_memory_and_localhost", sidecar),
        ("postgresql_recovers_from_the_end_of_its_vm", postgresql),
    ])
}

/// A container of the image with the servers, which is imported for the first.
fn software<'p, 'e>(pod: &'p Pod<'e>, name: &str, script: &str) -> Plan<'p, 'e> {
    static IMPORTED: OnceLock<()> = OnceLock::new();
    IMPORTED.get_or_init(|| {
        let archive = pod.engine.scratch().join("software.tar");
        image::software(pod.engine.tools(), &archive);
        pod.engine.import_for_pods(&archive);
    });
    pod.shell(name, script).image(SOFTWARE)
}

/// Waits for a line of a log, for as long as a database may take.
fn wait_long(container: &Container<'_, '_>, text: &str) {
    let found = until(DATABASE, || {
        let said = container.logs().0.contains(text);
        (said || container.status().state == CONTAINER_EXITED).then_some(said)
    });
    assert_eq!(found, Some(true), "no {text:?} in {:?}: {:?}", container.logs(), container.status());
}

fn redis(engine: &Engine) {
    let first = PodPlan::new(engine, "redis").run();
    let script = "exec redis-server --bind 0.0.0.0 --protected-mode no --save '' --dir /tmp 2>&1";
    let server = software(&first, "server", script).start();
    server.wait_for("Ready to accept connections");
    let second = PodPlan::new(engine, "redis-client").run();
    let address = first.ip();
    let script = format!(
        "redis-cli -h {address} set greeting 'from another pod' && redis-benchmark -h {address} -q -t set,get,lrange_100 -n 300 -c 8 -d 512 && redis-cli -h {address} dbsize"
    );
    let seen = software(&second, "client", &script).run().ok();
    assert!(seen.out.starts_with("OK\n"), "{seen:?}");
    assert!(seen.out.matches("requests per second").count() >= 3, "{seen:?}");
    let read = server.sh("redis-cli get greeting; redis-cli get key:__rand_int__ | head -c 3 || true");
    assert!(read.starts_with("from another pod\n"), "{read}");
    server.stop(20).expect("stop");
    assert_eq!(server.status().exit_code, 0, "{:?}", server.logs());
}

/// Lines of nginx's configuration for one server, and where it keeps what it must write.
fn nginx_configuration(server: &str) -> String {
    let mut text = String::from(
        "user nobody nogroup;\ndaemon off;\npid /tmp/nginx.pid;\nerror_log stderr;\nevents {}\nhttp {\naccess_log off;\n",
    );
    for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        writeln!(text, "{kind}_temp_path /tmp/{kind};").expect("text");
    }
    text + "sendfile on;\nserver {\n" + server + "\n}\n}\n"
}

/// `GET`, without more of HTTP than that.
fn get(address: &str, path: &str) -> Option<Vec<u8>> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(patience(Duration::from_secs(30)))).ok()?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let head = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    assert!(answer.starts_with(b"HTTP/1.1 200 OK"), "{}", String::from_utf8_lossy(&answer[..head]));
    Some(answer.split_off(head + 4))
}

fn nginx(engine: &Engine) {
    let volume = Scratch::under(&engine.scratch().join("logs"));
    // nginx serves as nobody.
    fs::set_permissions(volume.path(), Permissions::from_mode(0o755)).expect("permissions");
    let pod = PodPlan::new(engine, "web").host_port(18081, 80).run();
    let configuration = nginx_configuration("listen 80;\nroot /work/www;");
    let script = format!(
        "mkdir /work/www && echo made first > /work/www/index.html && head -c 8000000 /dev/urandom > /work/www/big && echo '{configuration}' > /work/nginx.conf"
    );
    let init = pod.shell("init", &script).mount(volume.path(), "/work", false).run();
    assert_eq!(init.code, 0, "{init:?}");
    let server = software(&pod, "server", "exec nginx -c /work/nginx.conf 2>&1");
    let server = server.mount(volume.path(), "/work", true).start();
    let address = format!("{}:80", pod.ip());
    let index = until(END, || get(&address, "/index.html"));
    assert_eq!(index.as_deref(), Some(&b"made first\n"[..]), "{:?}", server.logs());
    let on_host = fs::read(volume.join("www/big")).expect("file");
    let fetched = get(&address, "/big").expect("file");
    assert_eq!(fetched.len(), on_host.len());
    assert_eq!(Sha256::digest(&fetched), Sha256::digest(&on_host), "as it was written");
    let mapped = format!("{}:18081", tests::containerd::GATEWAY);
    assert_eq!(get(&mapped, "/").as_deref(), Some(&b"made first\n"[..]), "by a port of the host");
    // A file that changes on the host is served as it is now.
    fs::write(volume.join("www/index.html"), "changed since, and longer\n").expect("file");
    let changed =
        until(END, || get(&address, "/index.html").filter(|body| body.starts_with(b"changed since")));
    assert_eq!(changed.as_deref(), Some(&b"changed since, and longer\n"[..]));
    server.stop(20).expect("stop");
    assert_eq!(server.status().exit_code, 0, "{:?}", server.logs());
}

/// One container writes into shared memory what the other serves, and asks for it at localhost.
fn sidecar(engine: &Engine) {
    let pod = PodPlan::new(engine, "sidecar").run();
    let configuration = nginx_configuration("listen 127.0.0.1:8080;\nroot /dev/shm/www;");
    let script = format!(
        "mkdir -p /dev/shm/www; echo '{configuration}' > /tmp/nginx.conf; exec nginx -c /tmp/nginx.conf 2>&1"
    );
    let server = software(&pod, "server", &script).start();
    server.sh("until [ -e /tmp/nginx.pid ]; do sleep 0.2; done");
    let script = "for turn in 1 2 3; do echo turn $turn > /dev/shm/www/state; workload dial 127.0.0.1:8080 'GET /state HTTP/1.0

' | tail -n 2; done";
    let seen = pod.shell("sidecar", script).run().ok();
    let turns: Vec<_> = seen.out.lines().filter(|line| line.starts_with("turn")).collect();
    assert_eq!(turns, ["turn 1", "turn 2", "turn 3"], "{seen:?}");
    assert!(get(&format!("{}:8080", pod.ip()), "/state").is_none(), "localhost is the pod's own");
}

/// Kills the pod as a power failure would: its VM, or on a runtime without one the database's processes.
fn fail(engine: &Engine) {
    let name = if engine.is_krx() { "krx-vmm" } else { "postgres" };
    for process in fs::read_dir("/proc").expect("/proc").flatten() {
        let is_it = fs::read_to_string(process.path().join("comm")).is_ok_and(|comm| comm.trim() == name);
        if let Some(pid) = process.file_name().to_str().filter(|_| is_it).and_then(|pid| pid.parse().ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn database<'p, 'e>(pod: &'p Pod<'e>, volume: &Path, script: &str) -> Container<'p, 'e> {
    let plan = software(pod, "database", script).mount(volume, "/data", false);
    plan.user(1000, 1000, &[]).start()
}

fn postgresql(engine: &Engine) {
    let volume = Scratch::under(&engine.scratch().join("logs"));
    chown(volume.path(), Some(1000), Some(1000)).expect("owner");
    let pod = PodPlan::new(engine, "database").run();
    let server = database(&pod, volume.path(), &format!("{INITDB} && exec {POSTGRES} 2>&1"));
    wait_long(&server, "database system is ready to accept connections");
    let sql = "create table t (n int primary key, text text); insert into t select n, repeat('x', 100) from generate_series(1, 3000) n; checkpoint;";
    assert_eq!(server.sh(&format!("{PSQL} -c \"{sql}\"")), "");
    fs::write(volume.join("transaction"), TRANSACTION).expect("script");
    let bench = format!("{PGBENCH} -n -f /data/transaction -c 4 postgres");
    let counted = server
        .sh(&format!("{PGBENCH} -i -I dtp -q postgres 2>&1 && {PSQL} -c '{ACCOUNTS}' && {bench} -t 10 2>&1"));
    assert!(counted.contains("number of transactions actually processed: 40/40\n"), "{counted}");
    // Each line that is told is a transaction that was promised to last.
    let promised = volume.join("promised");
    let script = format!(
        "for n in $(seq 10001 99999); do {PSQL} -c \"insert into t values ($n, 'late')\" && echo $n >> /data/promised || exit 1; done"
    );
    let writer = server.exec_stream(&["sh", "-c", &script], false);
    let told = || fs::read_to_string(&promised).unwrap_or_default().lines().count();
    let bench = server.exec_stream(&["sh", "-c", &format!("{bench} -T 600 >/dev/null 2>&1")], false);
    assert!(until(END, || (told() >= 5).then_some(())).is_some(), "nothing is written: {:?}", server.logs());
    fail(engine);
    assert_eq!(until(END, || (server.status().state != CONTAINER_RUNNING).then_some(())), Some(()));
    drop((writer, bench));
    drop(pod);

    let lasting = told();
    let pod = PodPlan::new(engine, "database-again").run();
    let server = database(&pod, volume.path(), &format!("exec {POSTGRES} 2>&1"));
    wait_long(&server, "database system is ready to accept connections");
    assert!(server.logs().0.contains("automatic recovery in progress"), "{:?}", server.logs());
    let count =
        server.sh(&format!("{PSQL} -c \"select count(*) from t where n <= 3000 and length(text) = 100\""));
    assert_eq!(count, "3000\n");
    let late = server.sh(&format!("{PSQL} -c \"select count(*) from t where n > 10000\""));
    assert!(
        late.trim().parse::<usize>().expect("number") >= lasting,
        "{late} of {lasting} promised are there"
    );
    // Each of the benchmark's transactions is there whole or not at all; those that it was told of before are.
    let balances = server.sh(&format!("{PSQL} -c '{BALANCES}'"));
    let (balanced, transactions) = balances.trim().split_once('|').expect("columns");
    assert_eq!(balanced, "t", "{balances}");
    assert!(transactions.parse::<usize>().expect("number") >= 40, "{balances}");
    server.sh(&format!("{PSQL} -c \"reindex table t; update t set text = 'new'\" -c 'vacuum t'"));
    server.stop(60).expect("stop");
    assert_eq!(server.status().exit_code, 0, "{:?}", server.logs());
}
