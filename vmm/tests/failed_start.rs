//! Starts that fail, by the program itself: what it leaves, what it says. None of these needs KVM.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};

use vmm_sys_util::tempdir::TempDir;

/// Runs krx-vmm on a kernel that is not there, without any descriptor but the standard streams.
fn run(dir: &Path, keys: &str) -> Output {
    let config = dir.join("config.json");
    let json = format!(r#"{{"kernel":"/nonexistent","memory_mib":64,"vcpus":1,{keys}}}"#);
    std::fs::write(&config, json).expect("configuration");
    let script = r#"exec "$0" --config "$1" 3<&- 4<&- 5<&- 6<&- 7<&- 8<&- 9<&-"#;
    let mut shell = Command::new("sh");
    shell.args(["-c", script, env!("CARGO_BIN_EXE_krx-vmm")]).arg(config).output().expect("krx-vmm runs")
}

#[test]
fn files_it_has_not_made_are_left_alone() {
    let dir = TempDir::new().unwrap();
    let (control, vsock) = (dir.as_path().join("precious"), dir.as_path().join("v"));
    std::fs::write(&control, "precious").unwrap();
    let _another = UnixListener::bind(&vsock).unwrap();
    let keys = format!(r#""control":"{}","vsock":"{}""#, control.display(), vsock.display());
    assert!(!run(dir.as_path(), &keys).status.success());
    assert_eq!(std::fs::read(&control).unwrap(), b"precious");
    assert!(vsock.exists());
}

#[test]
fn lifeline_that_was_not_inherited_is_a_fault_of_the_configuration() {
    let dir = TempDir::new().unwrap();
    // The numbers that what the VMM opens itself would have.
    for fd in 3..=9 {
        let output = run(dir.as_path(), &format!(r#""lifeline_fd":{fd}"#));
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{fd}: {said}");
        assert!(said.contains("lifeline_fd is not"), "{fd}: {said}");
    }
}
