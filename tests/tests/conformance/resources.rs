//! Limits, disks and filters that are not in every bundle.

use serde_json::{Value, json};
use tests::disk_image::LoopDevice;
use tests::pod::Place;

use super::{conforms, set, usual};

#[test]
fn limits_that_few_ask_for_are_as_the_bundle_says() {
    let Some(place) = Place::new() else { return };
    let memory = json!({"limit": 100 << 20, "swap": 150 << 20, "reservation": 0});
    let burst = json!({"quota": 50_000, "period": 100_000, "burst": 20_000, "cpus": "0-1", "mems": "0"});
    conforms(&place, "burst", &[("/linux/resources", json!({"memory": memory, "cpu": burst}))]);
    conforms(&place, "idle", &[("/linux/resources", json!({"cpu": {"idle": 1, "cpus": "1"}}))]);
    place.assert_clean();
}

#[test]
fn a_disk_of_the_host_is_one_of_the_container() {
    let Some(place) = Place::new() else { return };
    let path = "/dev/of-the-bundle";
    let file = place.scratch.write("image", path);
    std::fs::OpenOptions::new().write(true).open(&file).and_then(|file| file.set_len(1 << 20)).expect("size");
    let disk = LoopDevice::over(&file);
    let (major, minor) = disk.numbers();
    let changes = [
        (
            "/linux/devices",
            json!([{"path": path, "type": "b", "major": major, "minor": minor, "fileMode": 0o640, "uid": 0, "gid": 6}]),
        ),
        (
            "/linux/resources/devices/-",
            json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": "r"}),
        ),
    ];
    conforms(&place, "disk", &changes);
    drop(disk);
    place.assert_clean();
}

/// Conditions: index, operator, value, second value.
fn rule(name: &str, action: &str, errno: Option<u32>, conditions: &[(u32, &str, u64, u64)]) -> Value {
    let condition = |(index, operator, value, second): &(u32, &str, u64, u64)| json!({"index": index, "op": format!("SCMP_CMP_{operator}"), "value": value, "valueTwo": second});
    let conditions: Vec<_> = conditions.iter().map(condition).collect();
    let mut rule = json!({"names": [name], "action": format!("SCMP_ACT_{action}"), "args": conditions});
    errno.into_iter().for_each(|errno| set(&mut rule, "/errnoRet", json!(errno)));
    rule
}

#[test]
fn filters_look_at_arguments_and_do_as_they_say() {
    let Some(place) = Place::new() else { return };
    let most = "sched_get_priority_max";
    let least = "sched_get_priority_min";
    // The first that holds decides, and what holds for none is let through.
    let compared = [
        rule(most, "ERRNO", Some(101), &[(0, "EQ", 7, 0), (5, "GE", 1 << 33, 0)]),
        rule(most, "ERRNO", Some(102), &[(1, "EQ", 5, 0), (1, "EQ", 1 << 40, 0)]),
        rule(most, "ERRNO", Some(103), &[(2, "MASKED_EQ", 0xff00_0000_00f0, 0x1200_0000_0030)]),
        rule(most, "ERRNO", Some(104), &[(3, "GT", u64::from(u32::MAX), 0), (4, "LE", 9, 0)]),
        rule(most, "ERRNO", Some(105), &[(4, "LT", 1 << 32, 0), (0, "NE", 0, 0), (3, "NE", 1 << 63, 0)]),
        rule(least, "KILL_PROCESS", None, &[(0, "EQ", 1, 0)]),
        rule(least, "KILL_THREAD", None, &[(0, "EQ", 1000, 0)]),
        rule(least, "TRAP", None, &[(0, "EQ", 2000, 0)]),
        rule(least, "TRACE", None, &[(0, "EQ", 3000, 0)]),
        rule(least, "LOG", None, &[(0, "EQ", 4000, 0)]),
        rule(least, "ERRNO", None, &[(0, "EQ", 5000, 0)]),
    ];
    // Before all others of its call, wherever it stands.
    let unconditional =
        [rule("acct", "ERRNO", Some(98), &[(0, "EQ", 0, 0)]), rule("acct", "ERRNO", Some(99), &[])];
    let rules = [&compared[..], &unconditional[..]].concat();
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"],
        "syscalls": rules
    });
    conforms(&place, "filter", &[("/linux/seccomp", profile.clone())]);
    // A checker that is told another condition sees that.
    let mut bundle = usual(&place);
    set(&mut bundle, "/linux/seccomp", profile);
    let mut told = bundle.clone();
    set(&mut told, "/linux/seccomp/syscalls/3/args/0/op", json!("SCMP_CMP_GE"));
    let ended = super::check(&place, "filter-told", &bundle, &told);
    assert!(
        ended.out.contains("not ok linux.seccomp sched_get_priority_max(0, 0, 0, 4294967295"),
        "{ended:?}"
    );
}
