//! Mounts that are more than what is mounted: with other owners, and with what was at their place.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

use nix::errno::Errno;
use serde_json::{Value, json};
use tests::pod::{Place, finish};

use super::{set, user_namespace, usual};

/// Runs a script of Python in a container of the usual bundle with changes, and says what it wrote.
fn python(place: &Place, name: &str, script: &str, changes: &[(&str, Value)]) -> String {
    let mut bundle = usual(place);
    set(&mut bundle, "/mounts/7", json!({"destination": "/run", "type": "tmpfs"}));
    set(&mut bundle, "/process/args", json!(["python3", "-c", script]));
    changes.iter().for_each(|(pointer, value)| set(&mut bundle, pointer, value.clone()));
    place.scratch.write(&format!("{name}/config.json"), bundle.to_string());
    let directory = place.scratch.join(name).display().to_string();
    finish(&mut place.krx(&["run", "--bundle", &directory]), b"").ok().out
}

const OWNERS: &str = "
import os
def owner(path):
    found = os.lstat(path)
    return f'{found.st_uid}:{found.st_gid}'
";

/// A directory of a bundle in which everybody may write, with a file of root's and one of somebody else's.
fn shared(place: &Place, name: &str, directory: (u32, u32), (uid, gid): (u32, u32)) {
    place.scratch.write(&format!("{name}/data/of-root"), "");
    place.scratch.write(&format!("{name}/data/of-one"), "one");
    let data = place.scratch.join(name).join("data");
    fs::set_permissions(&data, fs::Permissions::from_mode(0o777)).expect("mode");
    // Nobody may write where the owner is nobody.
    chown(&data, Some(directory.0), Some(directory.1)).expect("chown");
    chown(data.join("of-one"), Some(uid), Some(gid)).expect("chown");
}

fn owner(place: &Place, path: &str) -> (u32, u32) {
    let found = fs::symlink_metadata(place.scratch.join(path)).expect("file of the container");
    (found.uid(), found.gid())
}

#[test]
fn owners_of_a_mount_are_mapped() {
    let Some(place) = Place::new() else { return };
    shared(&place, "owners", (1000, 2000), (1001, 2001));
    let map = |from: u32, to: u32| json!([{"containerID": from, "hostID": to, "size": 10}]);
    let mapped = json!({
        "destination": "/media", "type": "bind", "source": "data", "options": ["rbind", "idmap"],
        "uidMappings": map(1000, 5000), "gidMappings": map(2000, 6000)
    });
    let plain = json!({"destination": "/srv", "type": "bind", "source": "data", "options": ["rbind"]});
    let script = format!(
        "{OWNERS}
print(owner('/media/of-one'), owner('/media/of-root'), owner('/srv/of-one'))
os.chown('/media/of-one', 5002, 6002)
try:
    open('/media/nobody-s', 'w')
except OSError as error:
    print(error.errno)
os.setresgid(6004, 6004, 6004)
os.setresuid(5003, 5003, 5003)
os.mkdir('/media/made')
os.symlink('x', '/media/made/link')
open('/media/made/file', 'w').write('mine')
os.link('/media/made/file', '/media/made/hard')
os.rename('/media/made/hard', '/media/made/moved')
print(owner('/media/made'), owner('/media/made/link'), owner('/media/made/moved'))
try:
    open('/media/of-root', 'w')
except OSError as error:
    print(error.errno)
"
    );
    let all = json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_SETUID", "CAP_SETGID"]);
    let changes = [
        ("/mounts/-", mapped),
        ("/mounts/-", plain),
        ("/process/capabilities", json!({"bounding": all, "effective": all, "permitted": all})),
    ];
    let said = python(&place, "owners", &script, &changes);
    let expected = format!(
        "5001:6001 65534:65534 1001:2001\n{}\n{}\n{}\n",
        Errno::EOVERFLOW as i32,
        "5003:6004 5003:6004 5003:6004",
        Errno::EACCES as i32
    );
    assert_eq!(said, expected);
    assert_eq!(owner(&place, "owners/data/of-one"), (1002, 2002));
    for made in ["made", "made/link", "made/file", "made/moved"] {
        assert_eq!(owner(&place, &format!("owners/data/{made}")), (1003, 2004), "{made}");
    }
    assert!(!place.scratch.join("owners/data/nobody-s").exists());
    place.assert_clean();
}

/// What belongs to the host's users belongs to the container's of the same IDs, though those are others in the guest.
#[test]
fn a_mount_has_the_owners_of_its_container() {
    let Some(place) = Place::new() else { return };
    shared(&place, "users", (0, 0), (5, 6));
    let mount = |options: &[&str]| json!({"destination": "/media", "type": "bind", "source": "data", "options": options});
    let script = format!(
        "{OWNERS}
print(owner('/media/of-root'), owner('/media/of-one'))
try:
    open('/media/made', 'w').write('of root')
    print(owner('/media/made'))
except OSError as error:
    print(error.errno)
"
    );
    let said = |name: &str, options: &[&str]| {
        python(&place, name, &script, &[user_namespace(), vec![("/mounts/-", mount(options))]].concat())
    };
    assert_eq!(said("users", &["rbind", "idmap"]), "0:0 5:6\n0:0\n");
    assert_eq!(owner(&place, "users/data/made"), (0, 0));
    // Without a map it is all nobody's.
    shared(&place, "others", (0, 0), (5, 6));
    assert!(said("others", &["rbind"]).starts_with("65534:65534 65534:65534\n"));
    // Nobody's files can be copied, and are the container's then.
    let program = place.scratch.join("others/data/of-one");
    fs::set_permissions(program, fs::Permissions::from_mode(0o4755)).expect("mode");
    let script = format!("{OWNERS}\nprint(owner('/media/of-one'), oct(os.stat('/media/of-one').st_mode))");
    let copy = json!({"destination": "/media", "type": "tmpfs", "options": ["tmpcopyup"]});
    let mounts = vec![("/mounts/-", mount(&["rbind"])), ("/mounts/-", copy)];
    assert_eq!(python(&place, "others", &script, &[user_namespace(), mounts].concat()), "0:0 0o100755\n");
    place.assert_clean();
}

#[test]
fn a_tmpfs_has_what_was_at_its_place() {
    let Some(place) = Place::new() else { return };
    place.scratch.write("copied/data/deep/er/file", "deep");
    place.scratch.write("copied/data/script", "#!/bin/sh\n");
    let data = place.scratch.join("copied/data");
    fs::set_permissions(data.join("script"), fs::Permissions::from_mode(0o4755)).expect("mode");
    fs::set_permissions(&data, fs::Permissions::from_mode(0o1777)).expect("mode");
    chown(data.join("deep"), Some(7), Some(8)).expect("chown");
    symlink("/etc/shadow", data.join("link")).expect("link");
    let script = format!(
        "{OWNERS}
print(oct(os.stat('/media').st_mode), oct(os.stat('/media/script').st_mode), owner('/media/deep'))
print(sorted(os.listdir('/media')), os.readlink('/media/link'), open('/media/deep/er/file').read())
open('/media/script', 'w').write('other')
print(os.getcwd(), 'tmpfs' in [line.split()[2] for line in open('/proc/mounts') if line.split()[1] == '/media'])
print(os.listdir('/srv'), oct(os.stat('/home').st_mode), owner('/home'))
try:
    open('/opt/x', 'w')
except OSError as error:
    print(error.errno)
"
    );
    let tmpfs = |destination: &str, options: &[&str]| json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options});
    let mounts = [
        json!({"destination": "/media", "type": "bind", "source": "data", "options": ["rbind"]}),
        tmpfs("/media", &["tmpcopyup", "size=1m"]),
        json!({"destination": "/home", "type": "bind", "source": "data", "options": ["rbind"]}),
        tmpfs("/home", &["tmpcopyup", "mode=711", "uid=9"]),
        // There is nothing in the image.
        tmpfs("/srv", &["tmpcopyup"]),
        tmpfs("/opt", &["tmpcopyup", "ro"]),
    ];
    let cwd = ("/process/cwd", json!("/run/made/here"));
    let changes: Vec<_> = mounts.into_iter().map(|mount| ("/mounts/-", mount)).chain([cwd]).collect();
    let said = python(&place, "copied", &script, &changes);
    let expected = format!(
        "0o41777 0o104755 7:8\n['deep', 'link', 'script'] /etc/shadow deep\n/run/made/here True\n[] 0o40711 9:0\n{}\n",
        Errno::EROFS as i32
    );
    assert_eq!(said, expected);
    assert_eq!(fs::read_to_string(data.join("script")).expect("script"), "#!/bin/sh\n");
    place.assert_clean();
}
