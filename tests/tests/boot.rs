//! The VMM's own front door: kernels, initramfs, sizes and guests that end in every possible way, by its exit code.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::guest::{self, Mode};
use tests::pod::{Ended, finish, until};
use tests::scratch::Scratch;
use tests::{Host, host, image};

/// Boots `kernel` with further keys of the configuration.
fn boot(host: &Host, scratch: &Scratch, kernel: &Path, more: Value) -> Ended {
    let mut config = json!({"kernel": kernel, "memory_mib": 128, "vcpus": 1, "boot_timeout_ms": 30_000});
    let more = more.as_object().cloned().unwrap_or_default();
    config.as_object_mut().expect("object").extend(more);
    let config = scratch.write("config.json", config.to_string());
    finish(Command::new(host.vmm()).arg("--config").arg(config), b"")
}

fn code(name: &str) -> i32 {
    let codes =
        ["power-off", "", "config", "host", "boot", "guest-panic", "guest-crash", "stopped", "guest-reset"];
    codes.iter().position(|code| *code == name).and_then(|code| i32::try_from(code).ok()).expect("code")
}

/// Boots and expects one exit code, and each of `words` in the message.
fn expect(kernel: &Path, scratch: &Scratch, host: &Host, more: Value, name: &str, words: &[&str]) {
    let ended = boot(host, scratch, kernel, more);
    assert_eq!(ended.code, code(name), "{ended:?}");
    for word in words {
        assert!(ended.err.contains(word), "no `{word}` in {}", ended.err);
    }
    assert!(!ended.err.contains("panicked at"), "{}", ended.err);
}

#[test]
fn boots_to_pid_1_and_powers_off() {
    let Some(host) = host() else { return };
    let scratch = Scratch::new();
    for vcpus in [1, 2, 8] {
        let more = json!({"initramfs": host.initramfs(), "cmdline": "-- exit-at-pid1", "vcpus": vcpus});
        expect(&host.kernel(), &scratch, &host, more, "power-off", &[]);
    }
}

#[test]
fn boots_a_bzimage() {
    let Some(host) = host() else { return };
    let more = json!({"initramfs": host.initramfs(), "cmdline": "-- exit-at-pid1"});
    expect(&host.bzimage(), &Scratch::new(), &host, more, "power-off", &[]);
}

#[test]
fn memory_above_the_hole_is_used() {
    let Some(host) = host() else { return };
    let more = json!({"initramfs": host.initramfs(), "cmdline": "-- exit-at-pid1", "memory_mib": 5120, "console": true});
    let ended = boot(&host, &Scratch::new(), &host.kernel(), more);
    assert_eq!(ended.code, code("power-off"), "{ended:?}");
    // Memory: 5080908K/5242492K available (...)
    let line =
        ended.err.lines().find(|line| line.contains("] Memory: ")).expect("the kernel tells its memory");
    let total = line.split_once('/').and_then(|(_, rest)| rest.split_once('K')).expect("total").0;
    assert!(total.parse::<u64>().is_ok_and(|kib| kib > 5100 << 10), "{line}");
}

#[test]
fn kernels_that_are_none_are_refused() {
    let Some(host) = host() else { return };
    let scratch = Scratch::new();
    let whole = std::fs::read(host.kernel()).expect("kernel");
    let long = image::elf(2, image::HALT, 1 << 40);
    let cases: [(&str, &[u8], &str); 7] = [
        ("empty", b"", "Kernel"),
        ("text", b"#!/bin/sh\necho I am no kernel\n", "Kernel"),
        ("header", &whole[..64], "Kernel"),
        ("truncated", &whole[..whole.len() / 2], "Kernel"),
        ("32-bit", &image::elf(1, image::HALT, 4096), "32-bit"),
        ("too-large", &long, "memory"),
        ("zeroes", &[0; 4096], "Kernel"),
    ];
    for (name, content, word) in cases {
        let kernel = scratch.write(name, content);
        expect(&kernel, &scratch, &host, json!({}), "config", &[word]);
    }
    expect(&scratch.join("missing"), &scratch, &host, json!({}), "config", &["missing"]);
    expect(scratch.path(), &scratch, &host, json!({}), "config", &["Kernel"]);
}

#[test]
fn initramfs_larger_than_memory_is_refused() {
    let Some(host) = host() else { return };
    let scratch = Scratch::new();
    let large = scratch.write("large", b"");
    std::fs::OpenOptions::new().write(true).open(&large).and_then(|f| f.set_len(200 << 20)).expect("sparse");
    expect(&host.kernel(), &scratch, &host, json!({"initramfs": large}), "config", &["nitramfs"]);
    let missing = scratch.join("missing");
    expect(&host.kernel(), &scratch, &host, json!({"initramfs": missing}), "config", &["missing"]);
}

#[test]
fn sizes_out_of_range_are_refused() {
    let Some(host) = host() else { return };
    let scratch = Scratch::new();
    for memory in [json!(0), json!(1), json!(1_u64 << 30), json!(-1), json!("big")] {
        expect(&host.kernel(), &scratch, &host, json!({"memory_mib": memory}), "config", &[]);
    }
    for vcpus in [json!(0), json!(9), json!(1000), json!(-1)] {
        expect(&host.kernel(), &scratch, &host, json!({"vcpus": vcpus}), "config", &[]);
    }
}

#[test]
fn panic_is_told_with_the_kernels_last_words() {
    let Some(host) = host() else { return };
    expect(&host.kernel(), &Scratch::new(), &host, json!({}), "guest-panic", &["Kernel panic", "VFS"]);
}

#[test]
fn end_of_pid_1_is_a_panic() {
    let Some(host) = host() else { return };
    let scratch = Scratch::new();
    let initramfs = guest::initramfs(&host, &scratch, Mode::Exit);
    expect(&host.kernel(), &scratch, &host, json!({"initramfs": initramfs}), "guest-panic", &["kill init"]);
}

#[test]
fn triple_fault_is_a_crash() {
    let Some(host) = host() else { return };
    let scratch = Scratch::new();
    let kernel = scratch.write("kernel", image::elf(2, image::TRIPLE_FAULT, 4096));
    expect(&kernel, &scratch, &host, json!({}), "guest-crash", &["vCPU 0"]);
}

#[test]
fn reset_without_panic_is_told_apart() {
    let Some(host) = host() else { return };
    let scratch = Scratch::new();
    let kernel = scratch.write("kernel", image::elf(2, image::RESET, 4096));
    expect(&kernel, &scratch, &host, json!({}), "guest-reset", &["reset"]);
}

#[test]
fn guests_that_never_reach_pid_1_time_out() {
    let Some(host) = host() else { return };
    let scratch = Scratch::new();
    for code in [image::HALT, image::SPIN] {
        let kernel = scratch.write("kernel", image::elf(2, code, 4096));
        let more = json!({"boot_timeout_ms": 1000});
        expect(&kernel, &scratch, &host, more, "boot", &["boot timeout of 1 s"]);
    }
}

#[test]
fn signals_stop_a_guest_that_cannot_be_asked() {
    let Some(host) = host() else { return };
    let scratch = Scratch::new();
    let kernel = scratch.write("kernel", image::elf(2, image::SPIN, 4096));
    let control = scratch.join("control");
    let config =
        json!({"kernel": kernel, "memory_mib": 64, "vcpus": 1, "boot_timeout_ms": 0, "control": control});
    let config = scratch.write("config.json", config.to_string());
    let mut vmm = Command::new(host.vmm());
    let vmm = vmm.arg("--config").arg(config).stderr(Stdio::piped()).spawn().expect("krx-vmm");
    until(Duration::from_secs(10), || UnixStream::connect(&control).ok()).expect("control socket");
    kill(Pid::from_raw(i32::try_from(vmm.id()).expect("pid")), Signal::SIGTERM).expect("kill");
    let ended = Ended::from(vmm.wait_with_output().expect("output"));
    assert_eq!(ended.code, code("stopped"), "{ended:?}");
    assert!(ended.err.contains("Stopped from outside"), "{ended:?}");
    assert!(!control.exists(), "the control socket is left");
}

#[test]
fn what_the_host_refuses_is_the_hosts() {
    let Some(host) = host() else { return };
    let nowhere = json!({"control": "/nonexistent/directory/control"});
    expect(&host.kernel(), &Scratch::new(), &host, nowhere, "host", &["/nonexistent/directory/control"]);
}

#[test]
fn console_shows_the_kernel_log() {
    let Some(host) = host() else { return };
    let more = json!({"initramfs": host.initramfs(), "cmdline": "-- exit-at-pid1", "console": true});
    expect(&host.kernel(), &Scratch::new(), &host, more, "power-off", &["Linux version 6.12"]);
}

#[test]
fn bad_arguments_and_configurations_are_refused() {
    let Some(host) = host() else { return };
    let scratch = Scratch::new();
    let unknown = scratch.write("unknown", r#"{"kernel":"/k","memory_mib":128,"vcpus":1,"color":1}"#);
    let endless = "/dev/zero";
    let unknown = unknown.to_string_lossy();
    let cases: [&[&str]; 8] = [
        &[],
        &["--confg", "x"],
        &["--config", "/nonexistent"],
        &["--config", &unknown],
        &["--config", endless],
        &["--config-fd", "99"],
        &["--config-fd", "two"],
        &["--config-fd", "-1"],
    ];
    for arguments in cases {
        let ended = finish(Command::new(host.vmm()).args(arguments), b"");
        assert_eq!(ended.code, code("config"), "{arguments:?}: {ended:?}");
        assert!(!ended.err.is_empty());
    }
}
