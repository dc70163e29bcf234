//! Standard streams and terminals: bytes in, bytes out, and who waits for whom.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::fs;
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use benches::resident;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};
use tests::pod::{Place, finish, until};
use tests::terminal::Terminal;

/// Bytes that differ from each other and from run to run of a pattern.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Resident memory of a process that is not shared with files, in KiB.
fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("RssAnon")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or_default()
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("pid"))
}

#[test]
fn large_input_comes_back_whole_to_a_slow_reader_without_memory_growth() {
    const SIZE: usize = 128 << 20;
    let Some(place) = Place::new() else { return };
    let mut command = place.run(&["-i", "--name", "cat"], &["cat"]);
    let mut krx = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("krx");
    let input = noise(SIZE);
    let expected = Sha256::digest(&input);
    let mut stdin = krx.stdin.take().expect("piped");
    let writer = thread::spawn(move || stdin.write_all(&input).map(|()| drop(stdin)));
    let mut stdout = krx.stdout.take().expect("piped");
    let (mut hash, mut total, mut peak) = (Sha256::new(), 0, (0, 0));
    let mut buffer = vec![0; 1 << 20];
    let mut vmm = None;
    loop {
        let read = stdout.read(&mut buffer).expect("stdout");
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        // Every 16 MiB the reader sleeps: all before it must wait and none may hoard.
        if total / (16 << 20) != (total + read) / (16 << 20) {
            thread::sleep(Duration::from_millis(300));
            let vmm = *vmm.get_or_insert_with(|| place.vmm_pid("cat").unsigned_abs());
            // Gone when all is in the pipes.
            let beyond = resident::of(vmm, 256).map_or(0, |weight| weight.beyond_kib);
            peak = (peak.0.max(resident_kib(krx.id())), peak.1.max(beyond));
        }
        total += read;
    }
    writer.join().expect("writer").expect("written");
    assert_eq!(total, SIZE);
    assert_eq!(hash.finalize(), expected);
    assert!(krx.wait().expect("wait").success());
    assert!(peak.0 < 16 << 10, "krx grew to {} KiB", peak.0);
    assert!(peak.1 > 0 && peak.1 < 16 << 10, "the VMM grew to {} KiB beyond the guest", peak.1);
}

#[test]
fn input_ends_where_it_ends() {
    let Some(place) = Place::new() else { return };
    let ended = finish(&mut place.run(&["-i"], &["sh", "-c", "wc -c; echo after"]), b"12345").ok();
    assert_eq!(ended.out, "5\nafter\n");
    // Without -i there is no input at all, whatever the caller's is.
    let ended = finish(&mut place.run(&[], &["wc", "-c"]), b"12345").ok();
    assert_eq!(ended.out, "0\n");
}

#[test]
fn every_byte_passes() {
    let Some(place) = Place::new() else { return };
    let bytes: Vec<u8> = (0..=255).cycle().take(70_001).collect();
    let mut command = place.run(&["-i"], &["cat"]);
    let mut krx = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("krx");
    let mut stdin = krx.stdin.take().expect("piped");
    let sent = bytes.clone();
    thread::spawn(move || stdin.write_all(&sent));
    assert_eq!(krx.wait_with_output().expect("output").stdout, bytes);
}

#[test]
fn process_end_does_not_wait_for_input() {
    let Some(place) = Place::new() else { return };
    let mut command = place.run(&["-i"], &["true"]);
    let mut krx = command.stdin(Stdio::piped()).spawn().expect("krx");
    let _open = krx.stdin.take();
    let ended = until(Duration::from_secs(60), || krx.try_wait().expect("wait"));
    assert!(ended.is_some_and(|status| status.success()), "{ended:?}");
}

#[test]
fn reader_that_leaves_ends_the_writer() {
    let Some(place) = Place::new() else { return };
    // Not the container's first process, which no SIGPIPE ends.
    let mut command = place.run(&[], &["sh", "-c", "yes; exit $?"]);
    let mut krx = command.stdout(Stdio::piped()).spawn().expect("krx");
    let mut stdout = krx.stdout.take().expect("piped");
    stdout.read_exact(&mut [0; 4096]).expect("output");
    drop(stdout);
    let status =
        until(Duration::from_secs(60), || krx.try_wait().expect("wait")).expect("krx goes on without reader");
    assert_eq!(status.code(), Some(128 + 13), "{status:?}");
    place.assert_clean();
}

#[test]
fn interrupt_is_forwarded() {
    let Some(place) = Place::new() else { return };
    for (signal, script, code) in [
        (Signal::SIGINT, "trap 'echo caught; exit 5' INT; echo up; while :; do sleep 0.1; done", 5),
        (Signal::SIGTERM, "trap 'exit 6' TERM; echo up; while :; do sleep 0.1; done", 6),
    ] {
        let mut command = place.run(&[], &["sh", "-c", script]);
        let mut krx = command.stdout(Stdio::piped()).spawn().expect("krx");
        krx.stdout.as_mut().expect("piped").read_exact(&mut [0; 3]).expect("up");
        kill(pid(&krx), signal).expect("signal");
        let output = krx.wait_with_output().expect("output");
        assert_eq!(output.status.code(), Some(code), "{output:?}");
    }
}

#[test]
fn terminal_session_behaves() {
    let Some(place) = Place::new() else { return };
    let mut terminal = Terminal::new(&place, &["-i", "-t"], &["sh"]);
    terminal.expect("# ");
    terminal.type_in("tty; stty size; echo $TERM\n");
    let shown = terminal.expect("xterm");
    assert!(shown.contains("/dev/pts/") || shown.contains("/dev/console"), "{shown}");
    assert!(shown.contains("33 99"), "{shown}");
    // Ctrl-C reaches the foreground process and nothing else.
    terminal.type_in("sleep 1000\n");
    thread::sleep(Duration::from_secs(1));
    terminal.type_in("\x03");
    terminal.type_in("echo still-$((40+2))\n");
    terminal.expect("still-42");
    terminal.resize(50, 120);
    thread::sleep(Duration::from_secs(1));
    terminal.type_in("stty size\n");
    terminal.expect("50 120");
    terminal.type_in("exit 9\n");
    assert_eq!(terminal.end(), 9);
    place.assert_clean();
}

#[test]
fn terminal_is_as_it_was_after_the_run() {
    let Some(place) = Place::new() else { return };
    let terminal = Terminal::new(&place, &["-i", "-t"], &["sh", "-c", "exit 4"]);
    let before = nix::sys::termios::tcgetattr(&terminal.master).expect("termios");
    let master = terminal.master.try_clone().expect("clone");
    assert_eq!(terminal.end(), 4);
    let after = nix::sys::termios::tcgetattr(&master).expect("termios");
    assert_eq!(before.local_flags, after.local_flags);
    assert_eq!(before.input_flags, after.input_flags);
}

#[test]
fn terminal_of_an_exec_ends_with_its_process() {
    let Some(place) = Place::new() else { return };
    let pod = place.living("pod");
    let mut terminal = Terminal::of(&place, &place.krx(&["exec", "-it", "pod", "sh"]));
    terminal.expect("# ");
    terminal.type_in("stty size\n");
    terminal.expect("33 99");
    // Somebody else holds the terminal for much longer than the session.
    terminal.type_in("nohup sleep 1000 & exit 3\n");
    assert_eq!(terminal.end(), 3);
    assert_eq!(pod.exec(&["true"]).code, 0);
}

#[test]
fn output_that_nobody_reads_does_not_keep_krx_from_ending() {
    let Some(place) = Place::new() else { return };
    // More than the caller's pipe takes, and less than all that lies between.
    let mut command =
        place.run(&["--name", "full"], &["sh", "-c", "head -c 150000 /dev/zero; echo done >&2"]);
    let mut krx = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("krx");
    krx.stderr.as_mut().expect("piped").read_exact(&mut [0; 5]).expect("done");
    thread::sleep(Duration::from_secs(1));
    assert!(krx.try_wait().expect("wait").is_none(), "output was thrown away");
    kill(pid(&krx), Signal::SIGTERM).expect("signal");
    let status = until(Duration::from_secs(30), || krx.try_wait().expect("wait")).expect("krx ends");
    assert_eq!(status.code(), Some(128 + 15), "{status:?}");
    place.assert_clean();
}

#[test]
fn terminal_option_without_a_terminal_is_refused() {
    let Some(place) = Place::new() else { return };
    let ended = finish(&mut place.run(&["-i", "-t"], &["true"]), b"");
    assert_eq!(ended.code, 125, "{ended:?}");
    assert!(ended.err.contains("terminal"), "{ended:?}");
}
