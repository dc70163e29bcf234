//! What a Linux guest can use up: its own processes, memory and files, its volume, and what the VMM has for it. Each time the VMM
//! stays small, krx ends as the container did, and the next container runs.

use std::fs;
use std::io::Read;
use std::process::{Child, Command, Stdio};

use benches::resident;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tests::pod::{Ended, Place, finish};

/// Memory of a guest, and what its VMM may use beyond.
const GUEST_MIB: u64 = 256;
const BEYOND_KIB: u64 = 40 << 10;
/// Of krx, which only passes bytes on.
const OWNER_KIB: u64 = 24 << 10;
/// Descriptors of a VMM that is to run out of them.
const FEW: &str = "1500";

/// The next container runs as if nothing had been.
fn assert_next_runs(place: &Place) {
    assert_eq!(place.sh(&["-m", "128M"], "echo next").ok().out, "next\n");
    place.assert_clean();
}

fn assert_small(place: &Place, name: &str, owner: u32) {
    let vmm = place.vmm_pid(name).unsigned_abs();
    let beyond = resident::of(vmm, GUEST_MIB).expect("the VMM lives").beyond_kib;
    let krx = resident::all_kib(owner).expect("krx lives");
    println!("{name}: the VMM has {beyond} KiB beyond the guest, krx {krx} KiB");
    assert!(beyond < BEYOND_KIB, "the VMM has {beyond} KiB beyond its guest");
    assert!(krx < OWNER_KIB, "krx has {krx} KiB");
}

/// Starts a Python program in a pod, and waits for its first line.
fn start(mut krx: Command, script: &str) -> (Child, String) {
    let krx = krx.args(["python3", "-c", script]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut krx = krx.spawn().expect("krx");
    let mut line = Vec::new();
    let mut byte = [0];
    let stdout = krx.stdout.as_mut().expect("piped");
    while stdout.read_exact(&mut byte).is_ok() && byte != *b"\n" {
        line.extend(byte);
    }
    (krx, String::from_utf8_lossy(&line).into_owned())
}

#[test]
fn memory_hog_is_killed_in_its_guest() {
    let Some(place) = Place::new() else { return };
    let hog = "import os; hog = []
while True: hog.append(os.urandom(1 << 12) * 256)";
    let ended = finish(&mut place.run(&[], &["python3", "-c", hog]), b"");
    assert_eq!(ended.code, 137, "{ended:?}");
    assert_next_runs(&place);
}

#[test]
fn full_disks_are_told_to_who_fills_them() {
    let Some(place) = Place::new() else { return };
    let volume = place.scratch.join("volume");
    fs::create_dir(&volume).expect("volume");
    mount(Some("krx"), &volume, Some("tmpfs"), MsFlags::empty(), Some("size=8m")).expect("tmpfs");
    // Until nothing goes, in pages; then a file less makes room again.
    let script = "
import errno, os
for place, size in (('/volume', 8), ('/small', 4)):
    written = 0
    with open(place + '/filler', 'wb', buffering=0) as filler:
        try:
            while written < 64 << 20:
                written += filler.write(bytes(1 << 16))
        except OSError as error:
            print(error.errno == errno.ENOSPC, size - 1 << 20 <= written <= size << 20)
    os.unlink(place + '/filler')
    with open(place + '/after', 'wb') as after: after.write(b'room')
";
    let shared = format!("{}:/volume", volume.display());
    let options = ["-v", &shared, "--tmpfs", "/small:size=4m"];
    let ended = finish(&mut place.run(&options, &["python3", "-c", script]), b"");
    let after = fs::read(volume.join("after"));
    let _ = umount2(&volume, MntFlags::MNT_DETACH);
    assert_eq!(ended.ok().out, "True True\nTrue True\n");
    assert_eq!(after.expect("volume"), b"room");
    assert_next_runs(&place);
}

#[test]
fn connections_and_files_without_end_cost_their_guest() {
    let Some(place) = Place::new() else { return };
    let volume = place.scratch.join("volume");
    fs::create_dir(&volume).expect("volume");
    for number in 0..2000 {
        fs::write(volume.join(number.to_string()), "x").expect("file");
    }
    // Connections to the port of the pod's owner, which is not a container's to call; then more files than the VMM may have.
    let script = "
import errno, resource, socket, time
resource.setrlimit(resource.RLIMIT_NOFILE, (8000, 8000))
held, refused, errors = [], 0, set()
def name(error): return errno.errorcode.get(error.errno, 'timeout')
for _ in range(2000):
    try:
        stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        stream.settimeout(5)
        stream.connect((2, 1024))
        held.append(stream)
    except OSError as error:
        refused += 1
        errors.add('connect:' + name(error))
connected, held = len(held), []
for number in range(2000):
    try: held.append(open('/volume/%d' % number))
    except OSError as error: errors.add(name(error))
print(connected, refused, len(held), *sorted(errors), flush=True)
time.sleep(600)
";
    let inner = place.run(
        &["--name", "greedy", "--ulimit", "nofile=8000:8000", "-v", &format!("{}:/volume", volume.display())],
        &[],
    );
    // The VMM inherits the limit, which is 65,536 at most elsewhere.
    let mut krx = Command::new("prlimit");
    krx.arg(format!("--nofile={FEW}:{FEW}")).arg(inner.get_program()).args(inner.get_args());
    krx.env("KRX_STATE_DIR", place.state());
    let (krx, line) = start(krx, script);
    println!("connected, refused, open, errors: {line}");
    let words: Vec<_> = line.split(' ').collect();
    let count = |at: usize| words[at].parse::<u64>().expect("number");
    assert_eq!(count(0) + count(1), 2000, "{line}");
    // Refused by who was called, if at all: the calls got there.
    assert!(!["EAFNOSUPPORT", "EPERM", "EACCES"].iter().any(|error| line.contains(error)), "{line}");
    assert!(count(2) > 500 && count(2) < 1500 && words.contains(&"EMFILE"), "{line}");
    assert_small(&place, "greedy", krx.id());
    // With none left, the owner is still heard.
    finish(&mut place.krx(&["kill", "--signal", "KILL", "greedy"]), b"").ok();
    // 125 where the guest was too busy to hear of it: then its VM is ended.
    let code = Ended::from(krx.wait_with_output().expect("output")).code;
    assert!([137, 125].contains(&code), "{code}");
    assert_next_runs(&place);
}
