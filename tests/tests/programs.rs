//! Programs that people run, by `krx run` and on a volume: what they do with files, processes and sockets is right, and what they were
//! told to be stored is there when their VM has been killed.
//!
//! `KRX_FULL=1` does more of everything.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::dice::Dice;
use tests::pod::{Ended, Place, finish, finish_within, until};

/// Longest that a program may take; emulated, and beside another.
const LIMIT: Duration = Duration::from_secs(240);
const LIMIT_FULL: Duration = Duration::from_secs(12_000);

fn is_full() -> bool {
    std::env::var_os("KRX_FULL").is_some()
}

/// A place with these programs, and an empty volume for them.
fn place(set: &str) -> Option<Place> {
    let place = Place::with_software(set)?;
    fs::create_dir(place.scratch.join("data")).expect("directory");
    Some(place)
}

/// Options of each run: nothing writes but to the volume and to memory.
fn options(place: &Place) -> Vec<String> {
    let data = format!("{}:/data", place.scratch.join("data").display());
    let workload = format!("{}:/workload:ro", place.host.workload().display());
    let options = ["--read-only", "--tmpfs", "/tmp", "--memory", "512M", "-v", &data, "-v", &workload];
    options.map(String::from).into()
}

fn run(place: &Place, command: &[&str]) -> Ended {
    let options = options(place);
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let limit = if is_full() { LIMIT_FULL } else { LIMIT };
    finish_within(limit, &mut place.run(&options, command), b"")
}

/// Runs the program of the test images on this side.
fn workload(place: &Place, arguments: &[&str]) -> Ended {
    finish(Command::new(place.host.workload()).args(arguments).current_dir(place.scratch.path()), b"")
}

const TABLES: &str =
    "pragma journal_mode = wal; create table t (who text, text text); create table late (n, row, text);";

#[test]
fn sqlite_serves_two_writers_and_survives_its_vm() {
    let Some(place) = place("programs") else { return };
    let (each, data) = (if is_full() { 1000 } else { 40 }, place.scratch.join("data"));
    let script = format!(
        "set -e; cd /data; sqlite3 db '{TABLES}'
        write() {{ seq {each} | sed \"s/.*/begin immediate; insert into t values ('$1', hex(randomblob(300))); commit;/\" |
            sqlite3 -bail -cmd '.timeout 100000' -cmd 'pragma synchronous=full' db >/dev/null; }}
        write a & one=$!; write b; wait $one
        (echo 'begin immediate; select 1;'; until [ -e refused ]; do sleep 0.1; done; echo 'rollback;') |
            sqlite3 -cmd '.timeout 100000' db >/dev/null & two=$!
        until sqlite3 db 'begin immediate; rollback;' 2>&1 | grep -q 'is locked'; do sleep 0.1; done; echo >refused; wait $two
        sqlite3 db \"select who, count(*), min(length(text)) from t group by who; pragma integrity_check; pragma journal_mode;\""
    );
    let ended = run(&place, &["sh", "-c", &script]).ok();
    assert_eq!(ended.out, format!("wal\na|{each}|600\nb|{each}|600\nok\nwal\n"), "{ended:?}");

    fs::write(data.join("transactions.py"), include_str!("programs/transactions.py")).expect("script");
    let options = options(&place);
    let named =
        ["--name", "database"].into_iter().chain(options.iter().map(String::as_str)).collect::<Vec<_>>();
    let mut writer = place.run(&named, &["python3", "/data/transactions.py"]).spawn().expect("krx");
    let told = || fs::read_to_string(data.join("promised")).unwrap_or_default().lines().count();
    assert!(until(LIMIT, || (told() >= 20).then_some(())).is_some(), "{} transactions", told());
    kill(Pid::from_raw(place.vmm_pid("database")), Signal::SIGKILL).expect("kill");
    writer.wait().expect("wait");
    assert!(data.join("db-wal").metadata().expect("log").len() > 0, "what is to be recovered from");
    let lasting = told();
    let script = "pragma integrity_check; select max(n), count(*) - 5 * max(n), count(distinct n) - max(n) from late; \
        insert into late values (0, 0, ''); pragma wal_checkpoint(truncate);";
    let ended = run(&place, &["sqlite3", "/data/db", script]).ok();
    let lines: Vec<_> = ended.out.lines().collect();
    let (last, rest) = lines[1].split_once('|').expect("columns");
    assert_eq!((lines[0], rest, lines[2]), ("ok", "0|0", "0|0|0"), "{ended:?}");
    assert!(last.parse::<usize>().expect("number") >= lasting, "{last} of {lasting} promised are there");
    assert_eq!(data.join("db-wal").metadata().map_or(0, |log| log.len()), 0);
    place.assert_clean();
}

#[test]
fn git_keeps_a_history() {
    let Some(place) = place("programs") else { return };
    let turns = if is_full() { 12 } else { 2 };
    let ended = run(&place, &["sh", "-c", include_str!("programs/git.sh"), "sh", &turns.to_string()]).ok();
    let lines: Vec<_> = ended.out.lines().collect();
    let fields = |line: &str| line.split(' ').map(String::from).collect::<Vec<_>>();
    let [linked, sent, repository] = lines[..] else { panic!("{ended:?}") };
    assert_eq!(fields(linked)[0], (turns + 3).to_string(), "{ended:?}");
    assert_eq!((sent, fields(repository)[0].clone()), (repository, (turns + 2).to_string()), "{ended:?}");
    // In another VM, which may only read.
    let data = format!("{}:/data:ro", place.scratch.join("data").display());
    let script = "export HOME=/tmp; cd /data/sent && git fsck --full --strict 2>/dev/null && git diff --quiet HEAD && git rev-parse 'main^{tree}'";
    let options = ["--read-only", "--tmpfs", "/tmp", "-v", &data];
    let again = finish(&mut place.run(&options, &["sh", "-c", script]), b"").ok();
    assert_eq!(again.out.trim(), fields(sent)[1]);
}

#[test]
fn gcc_makes_programs() {
    let Some(place) = place("programs") else { return };
    let ended = run(&place, &["sh", "-c", include_str!("programs/gcc.sh")]).ok();
    assert_eq!(ended.out, "2 1.414214 1199980\n1\n");
    let data = place.scratch.join("data");
    let program = fs::read(data.join("program")).expect("program");
    assert!(program.starts_with(b"\x7fELF"));
    // What it made is a program on this side, too.
    let here = finish(Command::new(data.join("program")).arg(data.join("library.so")), b"").ok();
    assert_eq!(here.out, "2 1.414214 1199980\n");
}

#[test]
fn tar_and_rsync_copy_all_that_files_have() {
    let Some(place) = place("programs") else { return };
    // Emulated, some 100 ms a file for all that is done with it.
    let count = if is_full() { "20000" } else { "100" };
    let ended = run(&place, &["sh", "-c", include_str!("programs/copies.sh"), "sh", count]).ok();
    println!("{}", ended.out);
    assert!(ended.out.lines().all(|line| line.ends_with(" s")), "rsync found more to do: {}", ended.out);
    let data = place.scratch.join("data");
    let inside = |name: &str| fs::read_to_string(data.join(format!("{name}.manifest"))).expect("manifest");
    let made = inside("tree");
    assert!(made.lines().count() > count.parse::<usize>().expect("number"));
    for part in [
        ", 2 names, as ",
        ", sparse",
        " user.number=2\n",
        " 104751 (0, 0) ",
        "(1000, 2000)",
        "odd/n\\n ",
        "odd/n\\xff ",
    ] {
        assert!(made.contains(part), "no {part:?} in the manifest");
    }
    for copy in ["tree", "by-tar", "by-rsync"] {
        let outside = workload(&place, &["manifest", &format!("data/{copy}")]).ok().out;
        for (side, manifest) in [("inside", inside(copy)), ("outside", outside)] {
            let other = made.lines().zip(manifest.lines()).find(|(made, copied)| made != copied);
            assert!(made == manifest, "{copy} seen from {side}: {other:?}");
        }
    }
}

#[test]
fn files_keep_what_posix_promises() {
    let Some(place) = place("programs") else { return };
    let scale = if is_full() { "100" } else { "8" };
    // On a local file system: else the checks are wrong.
    let local = place.scratch.join("local");
    fs::create_dir(&local).expect("directory");
    // Other users are to reach it.
    fs::set_permissions(place.scratch.path(), Permissions::from_mode(0o755)).expect("permissions");
    let here = workload(&place, &["files", &local.to_string_lossy(), "local", scale]);
    assert_eq!(here.code, 0, "here: {}", here.out);
    let ended = run(&place, &["/workload", "files", "/data", "share", scale]);
    println!("{}", ended.out);
    assert_eq!(ended.code, 0, "{}\n{}", ended.out, ended.err);
    let names = |text: &str| -> Vec<_> {
        text.lines()
            .filter_map(|line| Some(line.strip_prefix("ok ")?.split_once(',')?.0.to_string()))
            .collect()
    };
    assert_eq!(names(&ended.out), names(&here.out));
    assert!(names(&ended.out).len() >= 24);
}

/// A small file system on this side, until it is dropped.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn on(directory: &'a Path) -> Self {
        let size = Some("size=4m");
        mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), size).expect("small file system");
        Self(directory)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = umount(self.0);
    }
}

#[test]
fn a_full_file_system_is_told() {
    let Some(place) = place("programs") else { return };
    let data = place.scratch.join("data");
    let small = Small::on(&data);
    let ended = run(&place, &["/workload", "files", "/data", "share", "20", "full-file-system"]);
    assert_eq!((ended.code, ended.out.lines().count()), (0, 1), "{ended:?}");
    assert!(ended.out.starts_with("ok full-file-system"), "{ended:?}");
    drop(small);
    place.assert_clean();
}

#[test]
fn random_operations_on_a_file_agree_with_a_model() {
    let Some(place) = place("programs") else { return };
    let (runs, steps) = if is_full() { (10, 10_000) } else { (1, 1000) };
    let mut dice = Dice::new();
    for turn in 0..runs {
        let (seed, file) = (dice.below(1 << 32).to_string(), format!("/data/{turn}"));
        let ended = run(&place, &["/workload", "exercise", &file, &seed, &steps.to_string()]);
        assert_eq!(ended.code, 0, "KRX_SEED={seed}: {}{}", ended.out, ended.err);
        // The file on this side is the model's, too.
        let content = fs::read(place.scratch.join(&file[1..])).expect("file");
        let sum = content.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        });
        let seen = format!("sum {sum:016x} of {}", content.len());
        assert_eq!(ended.out.lines().last(), Some(seen.as_str()), "KRX_SEED={seed}");
    }
}

#[test]
fn fio_reads_what_it_wrote() {
    let Some(place) = place("programs") else { return };
    let size = if is_full() { "64m" } else { "1m" };
    let common = format!(
        "--directory=/data --size={size} --bs=4k --rw=randwrite --verify=crc32c --verify_fatal=1 --end_fsync=1 --thread"
    );
    let jobs = "--name=buffered --ioengine=psync --direct=0 --stonewall --name=direct --ioengine=psync --direct=1 --stonewall \
        --name=mapped --ioengine=mmap --direct=0";
    let script = format!("fio {common} --output-format=json {jobs}");
    let check = |ended: Ended| {
        let json: serde_json::Value =
            serde_json::from_str(&ended.out).unwrap_or_else(|_| panic!("{ended:?}"));
        let jobs = json["jobs"].as_array().expect("jobs");
        assert_eq!(jobs.len(), 3, "{}", ended.out);
        for job in jobs {
            let bytes = |direction: &str| job[direction]["io_bytes"].as_u64().expect("bytes");
            assert_eq!(job["error"].as_u64(), Some(0), "{job}");
            assert!(bytes("read") >= 1 << 20, "{job}");
        }
    };
    check(run(&place, &["sh", "-c", &script]).ok());
    // In another VM, which knows no page of it: as it is, and after this side has changed some bytes.
    let again = ["sh", "-c", &format!("{script} --verify_only")];
    check(run(&place, &again).ok());
    if is_full() {
        let files = fs::read_dir(place.scratch.join("data")).expect("directory").flatten();
        let mut files = files.filter(|file| file.file_name().to_string_lossy().starts_with("direct."));
        let path = files.next().expect("file of fio").path();
        let file = OpenOptions::new().write(true).open(path).expect("file");
        file.write_all_at(b"changed", 500_000).expect("write");
        let ended = run(&place, &again);
        assert!(ended.code != 0 && ended.err.contains("verify"), "{ended:?}");
    }
}

/// Of python3's own tests, those that are run each time: what touches files, processes, threads and sockets, and is quick.
const PYTHON: &str = "test_tempfile.TestNamedTemporaryFile test_tempfile.TestMkstempInner test_os.StatAttributeTests test_os.UtimeTests \
    test_os.LinkTests test_os.TestScandir test_os.TestSendfile test_os.ExtendedAttributeTests test_threading.ConditionTests \
    test_threading.BarrierTests test_subprocess.RunFuncTestCase test_socket.BasicTCPTest test_socket.SendmsgUnixStreamTest";
const PYTHON_FULL: &str = "test_os test_tempfile test_threading test_subprocess test_socket";
/// Those that fail, and why.
const PYTHON_FAILS: [(&str, &str); 3] = [
    ("test.test_os.UtimeTests.test_utime_current", GUEST_CLOCK),
    ("test.test_os.UtimeTests.test_utime_current_old", GUEST_CLOCK),
    (
        "test.test_subprocess.RunFuncTestCase.test_check_output_timeout",
        "it gives python 3 s to start, on an emulated host",
    ),
];
/// They allow for 50 ms.
const GUEST_CLOCK: &str =
    "`now` as a file's time is the host's; the guest's clock was seen 0.1 to 0.5 s behind it, emulated";

#[test]
fn python_passes_its_own_tests() {
    let Some(place) = place("programs") else { return };
    fs::write(place.scratch.join("data/python.py"), include_str!("programs/python.py")).expect("script");
    let names = if is_full() { PYTHON_FULL } else { PYTHON };
    let names = names.split_whitespace().map(|name| format!("test.{name} ")).collect::<String>();
    let script = format!("HOME=/tmp TMPDIR=/data exec python3 /data/python.py {names}");
    let ended = run(&place, &["sh", "-c", &script]).ok();
    let json: serde_json::Value =
        serde_json::from_str(ended.out.lines().last().unwrap_or_default()).expect("JSON");
    println!("{json}");
    let failed = json["failed"].as_array().expect("names").iter().filter_map(|name| name.as_str());
    let unknown: Vec<_> = failed.filter(|name| PYTHON_FAILS.iter().all(|(known, _)| name != known)).collect();
    assert!(unknown.is_empty(), "{unknown:#?} failed: {}", ended.err);
    assert!(json["ran"].as_u64() > Some(if is_full() { 1000 } else { 50 }), "{json}");
}

#[test]
fn node_java_and_nginx_run() {
    let Some(place) = place("runtimes") else { return };
    fs::write(place.scratch.join("data/node.js"), include_str!("programs/node.js")).expect("script");
    let ended = run(&place, &["node", "/data/node.js"]).ok();
    let wanted = "POST /0 0\nPOST /1 100000\nPOST /2 200000\nPOST /3 300000\n45\n4999950000\nwatched\n";
    assert_eq!(ended.out, wanted, "{ended:?}");

    let script = "export PATH=$PATH:/usr/lib/jvm/java-17-openjdk-amd64/bin; java --version; \
        keytool -genkeypair -alias key -keyalg EC -dname CN=krx -keystore /data/keys -storepass password && \
        keytool -list -v -keystore /data/keys -storepass password";
    let ended = run(&place, &["sh", "-c", script]).ok();
    assert!(ended.out.contains("OpenJDK Runtime Environment"), "{ended:?}");
    assert!(ended.out.contains("Owner: CN=krx") && ended.out.contains("256-bit EC"), "{ended:?}");

    let ended = run(&place, &["sh", "-c", include_str!("programs/web.sh")]).ok();
    assert_eq!(ended.out, format!("{}same part\n404\n", "same\n".repeat(8)), "{ended:?}");
}
