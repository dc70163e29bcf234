//! `krx doctor`, on this machine as it is: whether its verdict is the right one. Needs no VM.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use krx_vmm::kvm::probe::{self, Verdict};
use serde_json::Value;
use tests::pod::{Ended, finish};

/// The promise of the documentation. An emulated host has a clock of its own.
const LIMIT: Duration = Duration::from_millis(50);

fn doctor(arguments: &[&str]) -> Ended {
    let krx = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/krx");
    finish(Command::new(krx).arg("doctor").args(arguments), b"")
}

fn runs_linux() -> bool {
    let verdict = probe::open().and_then(probe::examine).map(|facts| probe::judge(&facts));
    matches!(verdict, Ok(Verdict::RunsLinux { .. } | Verdict::Slow { .. }))
}

#[test]
fn verdict_is_that_of_the_probe() {
    let ended = doctor(&["--json"]);
    let report: Value = serde_json::from_str(&ended.out).expect("JSON");
    let checks = report["checks"].as_array().expect("checks");
    let kvm = checks.iter().find(|check| check["check"] == "kvm").expect("kvm");
    assert_eq!(kvm["level"] != "error", runs_linux(), "{kvm}");
    assert_eq!(report["ok"] == true, ended.code == 0, "{ended:?}");
    for name in ["kvm", "privilege", "memory", "kernel", "cgroup", "tun"] {
        let check = checks.iter().find(|check| check["check"] == name).unwrap_or_else(|| panic!("no {name}"));
        let told =
            ["what", "meaning"].iter().all(|key| check[key].as_str().is_some_and(|text| !text.is_empty()));
        assert!(told, "{check}");
        let mend = check["remedy"].as_str().is_some_and(|text| !text.is_empty());
        assert!(mend || check["level"] == "ok" || check["level"] == "note", "no remedy: {check}");
    }
}

#[test]
fn people_are_told_where_to_go() {
    let ended = doctor(&[]);
    assert!(ended.out.contains("kvm"), "{ended:?}");
    if !runs_linux() {
        assert_eq!(ended.code, 1, "{ended:?}");
        assert!(ended.out.contains("what to do:") && ended.out.contains("kvm"), "{ended:?}");
        if probe::open().is_ok() {
            assert!(
                ended.out.contains("cannot boot Linux") && ended.out.contains("tests/kvm-host"),
                "{ended:?}"
            );
        }
    }
    let wrong = doctor(&["--jsno"]);
    assert_eq!(wrong.code, 125, "{wrong:?}");
}

#[test]
fn it_is_quick() {
    if std::env::var_os("KRX_KVM_HOST_INSIDE").is_some() {
        return;
    }
    let best = (0..5).map(|_| {
        let begin = Instant::now();
        doctor(&[]);
        begin.elapsed()
    });
    let best = best.min().unwrap_or_default();
    assert!(best < LIMIT, "{best:?}");
}
