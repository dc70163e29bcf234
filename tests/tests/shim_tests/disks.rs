//! Root file systems in images and on block devices, and block devices as they are: the guest has them as disks.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use containerd_shim_protos::api::{CreateTaskRequest, Mount};
use containerd_shim_protos::ttrpc::{Code, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::disk_image::{self, LoopDevice};
use tests::shim::{Player, Shim, assert_refused, bundle, limit};

use super::SLEEP;

/// A small root file system in a directory, made once.
fn root(player: &Player) -> PathBuf {
    let root = player.scratch.join("small-root");
    if !root.exists() {
        disk_image::small_root(&player.host, &root);
    }
    root
}

fn image(player: &Player, name: &str) -> PathBuf {
    let image = player.scratch.join(name);
    disk_image::ext4(&root(player), &image);
    image
}

/// A container on a disk, whose root can be written.
fn config(player: &Player, command: &[&str]) -> Value {
    let mut config = bundle::config(&player.host, command);
    config["root"] = json!({"path": "rootfs", "readonly": false});
    config
}

fn creation(shim: &Shim, (kind, source): (&str, &Path), options: &[&str]) -> CreateTaskRequest {
    let mount = Mount {
        type_: kind.into(),
        source: source.to_string_lossy().into_owned(),
        options: options.iter().map(ToString::to_string).collect(),
        ..Mount::default()
    };
    CreateTaskRequest { rootfs: vec![mount], ..shim.creation(&shim.id) }
}

fn shim(player: &Player, name: &str, config: &Value) -> Shim {
    let id = player.id(name);
    let shim = player.shim(&id, config);
    fs::create_dir_all(shim.bundle.join("rootfs")).expect("rootfs");
    shim
}

/// Runs a container to its end and deletes it; gives its exit status and what it said.
fn run(shim: &Shim, request: CreateTaskRequest) -> Result<(u32, String)> {
    let log = shim.bundle.join("log");
    let uri = format!("file://{}", log.display());
    let request = CreateTaskRequest { stdout: uri.clone(), stderr: uri, ..request };
    shim.task.create(limit(), &request)?;
    shim.start(&request.id, "")?;
    let status = shim.wait(&request.id, "")?;
    shim.delete(&request.id, "")?;
    Ok((status, fs::read_to_string(log).expect("log")))
}

pub(crate) fn writable_image(player: &Player) {
    let image = image(player, "writable");
    let script = "set -e; echo written >/made; stat -f -c %T /; while read d m t o; do \
                  [ $m = / ] && echo $t ${o%%,*}; done </proc/mounts; ls /dev";
    let shim = shim(player, "writable", &config(player, &["sh", "-c", script]));
    let (status, said) = run(&shim, creation(&shim, ("ext4", &image), &["loop"])).expect("run");
    shim.shut_down();
    assert_eq!(status, 0, "{said}");
    assert!(said.starts_with("ext2/ext3\next4 rw\n"), "{said}");
    // The disk itself is not the container's.
    assert!(!said.contains("disk") && !said.contains("vda"), "{said}");
    disk_image::assert_clean(&image);
    assert_eq!(disk_image::read_ext4(&image, "/made"), "written\n");
    assert_eq!(fs::read_dir(shim.bundle.join("rootfs")).expect("rootfs").count(), 0);
}

pub(crate) fn read_only_images(player: &Player) {
    let erofs = player.scratch.join("erofs");
    disk_image::erofs(&root(player), &erofs);
    let ext4 = image(player, "read-only");
    let before = fs::read(&ext4).expect("image");
    // A file system that can be written, of a container that may not; and two that cannot be.
    for (kind, image, options) in
        [("ext4", &ext4, &[] as &[&str]), ("ext4", &ext4, &["ro"]), ("erofs", &erofs, &["loop"])]
    {
        let script = "touch /made 2>&1; echo x >/tmp/t; stat -f -c %T /; cat /etc/hosts; echo $?";
        let mut config = config(player, &["sh", "-c", script]);
        config["root"]["readonly"] = json!(true);
        let shim = shim(player, "read-only", &config);
        let (_, said) = run(&shim, creation(&shim, (kind, image), options)).expect("run");
        shim.shut_down();
        assert!(said.starts_with("touch: cannot touch '/made': Read-only file system"), "{kind}: {said}");
        assert!(said.contains("ext2/ext3") == (kind == "ext4"), "{kind}: {said}");
        if !options.is_empty() && kind == "ext4" {
            assert!(fs::read(image).expect("image").len() == before.len());
        }
    }
    // Only the first had a disk that the guest could write.
    disk_image::assert_clean(&ext4);
}

/// Containers of a pod come and go while its VM runs; slots are used again.
pub(crate) fn members(player: &Player) {
    let sandbox = player.id("disk-pod");
    let pod = player.shim(&sandbox, &bundle::sandbox(&player.host, &sandbox));
    let pid = pod.create(&sandbox).expect("create");
    pod.start(&sandbox, "").expect("start");
    let (image, other) = (image(player, "members"), image(player, "other"));
    let member = |name: &str, script: &str| {
        let id = player.id(name);
        let mut config = bundle::member(&player.host, &["sh", "-c", script], &sandbox, pid);
        config["root"] = json!({"path": "rootfs"});
        let bundle = player.bundle(&id, Some(&config));
        fs::create_dir_all(bundle.join("rootfs")).expect("rootfs");
        Shim::at(&id, bundle, &pod.address)
    };
    // More than there are slots.
    for round in 0..18 {
        let script = format!("echo {round} >>/rounds && wc -l </rounds");
        let one = member("round", &script);
        let (status, said) = run(&one, creation(&one, ("ext4", &image), &[])).expect("run");
        assert_eq!((status, said.trim()), (0, (round + 1).to_string().as_str()), "{said}");
    }
    // Two at once, of which one ends first.
    let stays = member("stays", "exec sleep 1000");
    stays.task.create(limit(), &creation(&stays, ("ext4", &other), &[])).expect("create");
    stays.start(&stays.id, "").expect("start");
    let one = member("goes", "stat -f -c %T /");
    assert_eq!(run(&one, creation(&one, ("ext4", &image), &[])).expect("run").1, "ext2/ext3\n");
    stays.kill(&stays.id, "", 9).expect("kill");
    stays.wait(&stays.id, "").expect("wait");
    stays.delete(&stays.id, "").expect("delete");
    disk_image::assert_clean(&other);
    disk_image::assert_clean(&image);
    pod.end();
}

/// Block devices of the host: one with a root, and one as it is.
pub(crate) fn devices(player: &Player) {
    let image = image(player, "device");
    let root = LoopDevice::over(&image);
    let raw = player.scratch.join("raw");
    fs::write(&raw, vec![b'a'; 1 << 20]).expect("raw");
    let data = LoopDevice::over(&raw);
    let (major, minor) = data.numbers();
    let with = |access: &str, script: &str| {
        let mut config = config(player, &["sh", "-c", script]);
        config["linux"]["devices"] =
            json!([{"path": "/dev/data", "type": "b", "major": major, "minor": minor, "fileMode": 0o660}]);
        config["linux"]["resources"] = json!({"devices": [
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": major, "minor": minor, "access": access},
        ]});
        config
    };
    let script = "stat -c '%F %a' /dev/data; wc -c </dev/data; dd if=/dev/zero of=/dev/data bs=4096 seek=3 count=1 2>&1; sync";
    let container = shim(player, "device", &with("rw", script));
    let (status, said) = run(&container, creation(&container, ("ext4", &root.0), &[])).expect("run");
    container.shut_down();
    assert!(status == 0 && said.starts_with("block special file 660\n1048576\n1+0 records in"), "{said}");
    // What the loop device has is in its file when it is synchronised.
    nix::unistd::sync();
    let written = fs::read(&raw).expect("raw");
    assert_eq!(
        (written[3 * 4096 - 1], written[3 * 4096], written[4 * 4096 - 1], written[4 * 4096]),
        (b'a', 0, 0, b'a')
    );
    let container = shim(player, "device", &with("r", "wc -c </dev/data; echo x >/dev/data"));
    let (status, said) = run(&container, creation(&container, ("ext4", &root.0), &[])).expect("run");
    container.shut_down();
    assert!(status != 0 && said.starts_with("1048576\n") && said.contains("/dev/data"), "{said}");
    assert_eq!(fs::read(&raw).expect("raw"), written);
    claimed(player, &root.0);
}

/// What the host has mounted is not for a guest's kernel, too.
fn claimed(player: &Player, device: &Path) {
    let mounted = player.scratch.join("mounted");
    fs::create_dir_all(&mounted).expect("mount point");
    assert!(Command::new("mount").arg(device).arg(&mounted).status().expect("mount").success());
    let container = shim(player, "claimed", &config(player, &["sleep", "1"]));
    let refused = run(&container, creation(&container, ("ext4", device), &[]));
    assert!(Command::new("umount").arg(&mounted).status().expect("umount").success());
    assert_refused(refused, Code::FAILED_PRECONDITION, "the host has it mounted");
    container.shut_down();
}

pub(crate) fn refused(player: &Player) {
    let image = image(player, "refused");
    let ask = |kind: &str, source: &Path, options: &[&str], (code, part): (Code, &str)| {
        let container = shim(player, "refused", &config(player, &SLEEP));
        assert_refused(run(&container, creation(&container, (kind, source), options)), code, part);
        container.shut_down();
    };
    ask("xfs", &image, &["loop"], (Code::INVALID_ARGUMENT, "option loop"));
    ask("erofs", &image, &[], (Code::UNKNOWN, "Cannot mount the erofs"));
    ask("ext4", &image, &["no_such_option"], (Code::UNKNOWN, "no_such_option"));
    let garbage = player.scratch.write("garbage", vec![0xff; 1 << 20]);
    ask("ext4", &garbage, &[], (Code::UNKNOWN, "Cannot mount the ext4"));
    let empty = player.scratch.write("empty", b"");
    ask("ext4", &empty, &[], (Code::UNKNOWN, "Cannot mount the ext4"));
    let mut config = config(player, &SLEEP);
    config["root"] = json!({"path": player.host.rootfs(), "readonly": true});
    config["linux"]["devices"] = json!([{"path": "/dev/data", "type": "b", "major": 4000, "minor": 7}]);
    let container = shim(player, "refused", &config);
    assert_refused(
        container.create(&container.id),
        Code::FAILED_PRECONDITION,
        "linux.devices: /dev/data is to be block device 4000:7",
    );
    container.shut_down();
}

/// A VMM that is killed lets go of the device.
pub(crate) fn vmm_killed(player: &Player) {
    let image = image(player, "killed");
    let device = LoopDevice::over(&image);
    let container = shim(player, "killed", &config(player, &SLEEP));
    let request = creation(&container, ("ext4", &device.0), &[]);
    let vmm = container.task.create(limit(), &request).expect("create").pid;
    container.start(&container.id, "").expect("start");
    let claim = || fs::File::options().read(true).write(true).custom_flags(nix::libc::O_EXCL).open(&device.0);
    assert!(claim().is_err(), "the guest has it for itself");
    kill(Pid::from_raw(vmm.cast_signed()), Signal::SIGKILL).expect("kill");
    container.wait(&container.id, "").expect("wait");
    container.delete(&container.id, "").expect("delete");
    container.shut_down();
    assert!(claim().is_ok(), "somebody still has the device");
}
