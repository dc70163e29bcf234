//! Volumes: the same files on both sides.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use sha2::{Digest, Sha256};
use tests::pod::{Place, finish};

const LARGE: usize = 256 << 20;

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn hash_of(path: &std::path::Path) -> String {
    let mut file = File::open(path).expect("file");
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).expect("read") {
            0 => return hex(&hash.finalize()),
            read => hash.update(&buffer[..read]),
        }
    }
}

#[test]
fn python_reads_and_writes_what_the_host_sees() {
    let Some(place) = Place::new() else { return };
    place.scratch.write("data/in.txt", "3 5 8 13\n");
    let volume = format!("{}:/data", place.scratch.join("data").display());
    let program = r#"
import os
numbers = [int(n) for n in open("/data/in.txt").read().split()]
os.makedirs("/data/out/deep")
with open("/data/out/deep/sum.txt", "w") as f: f.write(str(sum(numbers)))
os.symlink("deep/sum.txt", "/data/out/link")
os.rename("/data/in.txt", "/data/taken.txt")
os.chmod("/data/taken.txt", 0o640); os.chown("/data/taken.txt", 1000, 2000)
print(sorted(os.listdir("/data")))
"#;
    let ended = finish(&mut place.run(&["-v", &volume], &["python3", "-c", program]), b"").ok();
    assert_eq!(ended.out, "['out', 'taken.txt']\n");
    let data = place.scratch.join("data");
    assert_eq!(fs::read_to_string(data.join("out/link")).expect("link"), "29");
    let taken = fs::metadata(data.join("taken.txt")).expect("renamed");
    assert_eq!((taken.mode() & 0o777, taken.uid(), taken.gid()), (0o640, 1000, 2000));
}

#[test]
fn large_file_hashes_the_same_in_both_directions() {
    let Some(place) = Place::new() else { return };
    let path = place.scratch.write("data/from-host", b"");
    let mut file = File::create(&path).expect("file");
    let mut block = vec![0_u8; 1 << 20];
    for number in 0..LARGE >> 20 {
        block
            .iter_mut()
            .zip(0_usize..)
            .for_each(|(byte, i)| *byte = (i * 31 + number * 17 + i / 4096).to_le_bytes()[0]);
        file.write_all(&block).expect("write");
    }
    drop(file);
    let volume = format!("{}:/data", place.scratch.join("data").display());
    let script = "sha256sum < /data/from-host && \
        python3 -c 'import hashlib,sys; f=open(\"/data/from-guest\",\"wb\"); h=hashlib.sha256()
for n in range(256):
    b=bytes((n*7+i)%251 for i in range(4096))*256; f.write(b); h.update(b)
f.close(); print(h.hexdigest())'";
    let ended = place.sh(&["-v", &volume], script).ok();
    let hashes: Vec<_> = ended.out.split_whitespace().filter(|word| word.len() == 64).collect();
    assert_eq!(hashes[0], hash_of(&path));
    assert_eq!(hashes[1], hash_of(&place.scratch.join("data/from-guest")));
}

#[test]
fn read_only_volume_refuses_every_change() {
    let Some(place) = Place::new() else { return };
    let file = place.scratch.write("data/file", "as it was");
    let volume = format!("{}:/data:ro", place.scratch.join("data").display());
    let script = "cat /data/file; for c in 'touch /data/new' 'rm /data/file' 'mv /data/file /data/g' 'chmod 777 /data/file' \
        'truncate -s 0 /data/file' 'ln /data/file /data/l' 'mount -o remount,rw /data'; do $c 2>/dev/null && echo $c; done; true";
    let ended = place.sh(&["-v", &volume], script).ok();
    assert_eq!(ended.out, "as it was");
    assert_eq!(fs::read_to_string(file).expect("file"), "as it was");
    assert_eq!(fs::read_dir(place.scratch.join("data")).expect("directory").count(), 1);
}

#[test]
fn single_file_can_be_a_volume() {
    let Some(place) = Place::new() else { return };
    let file = place.scratch.write("config", "one\n");
    let volume = format!("{}:/etc/app.conf", file.display());
    let ended = place.sh(&["-v", &volume], "cat /etc/app.conf; echo two >>/etc/app.conf").ok();
    assert_eq!(ended.out, "one\n");
    assert_eq!(fs::read_to_string(file).expect("file"), "one\ntwo\n");
}

#[test]
fn links_of_a_volume_do_not_lead_out_of_it() {
    let Some(place) = Place::new() else { return };
    place.scratch.write("secret", "host secret");
    fs::create_dir(place.scratch.join("data")).expect("directory");
    let data = place.scratch.join("data");
    std::os::unix::fs::symlink("../secret", data.join("up")).expect("link");
    std::os::unix::fs::symlink(place.scratch.join("secret"), data.join("absolute")).expect("link");
    let volume = format!("{}:/data", data.display());
    let script = "cat /data/up /data/absolute /data/../secret 2>/dev/null; ls /data/..; true";
    let ended = place.sh(&["-v", &volume], script).ok();
    assert!(!ended.out.contains("secret"), "{ended:?}");
}

#[test]
fn volume_paths_cannot_be_made_through_links_of_the_image() {
    let Some(place) = Place::new() else { return };
    let root = place.scratch.join("root");
    for directory in ["bin", "proc", "dev", "sys"] {
        fs::create_dir_all(root.join(directory)).expect("directory");
    }
    std::os::unix::fs::symlink("/../../../../run", root.join("escape")).expect("link");
    let data = place.scratch.write("data/file", "x");
    let volume = format!("{}:/escape/inside", data.parent().expect("parent").display());
    let arguments = ["run", "-v", &volume, "--rootfs", &root.to_string_lossy(), "--", "/bin/none"];
    let ended = finish(&mut place.krx(&arguments), b"");
    assert_eq!(ended.code, 127, "{ended:?}");
    // Resolved inside the container's root, as the kernel would for a process in it.
    assert!(root.join("run/inside").exists());
}

/// Makes, finds and reads more files than the VMM may have descriptors for; then has as many open as it may, and more.
const MANY_FILES: &str = r#"
import errno, os
for directory in range(12):
    os.mkdir(f"/data/{directory}")
    for number in range(100):
        with open(f"/data/{directory}/{number}", "x") as file: file.write(str(number))
    os.symlink("0", f"/data/{directory}/link")
    os.link(f"/data/{directory}/1", f"/data/{directory}/hard")
    os.mkdir(f"/data/{directory}/inner")
for turn in range(2):
    found = [os.path.join(path, name) for path, _, names in os.walk("/data") for name in names]
    sizes = sum(os.stat(path).st_size for path in found)
    print(len(found), sizes)
held = [open(path) for path in found[:300]]
print(sum(os.stat(path).st_size for path in found) == sizes, held[7].read() == open(found[7]).read())
more = []
try:
    for path in found: more.append(open(path))
except OSError as error:
    print(errno.errorcode[error.errno], len(more) > 100)
held = more = None
print(len(os.listdir("/data/3")), open(found[5]).read() == open(found[5]).read())
"#;

#[test]
fn a_tree_may_have_more_files_than_the_vmm_has_descriptors() {
    let Some(place) = Place::new() else { return };
    place.scratch.write("data/script.py", MANY_FILES);
    let volume = format!("{}:/data", place.scratch.join("data").display());
    let krx = place.run(&["-v", &volume, "--ulimit", "nofile=4096"], &["python3", "/data/script.py"]);
    let mut few = Command::new("sh");
    few.args(["-c", "ulimit -n 1024 && exec \"$0\" \"$@\""]).arg(krx.get_program()).args(krx.get_args());
    few.envs(krx.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let ended = finish(&mut few, b"").ok();
    let lines: Vec<_> = ended.out.lines().collect();
    // The script, and in each of 12 directories 100 files, a link, and a file's second name.
    let files = 1 + 12 * 102;
    assert!(lines[0].starts_with(&format!("{files} ")), "{ended:?}");
    assert_eq!(lines[1..], [lines[0], "True True", "EMFILE True", "103 True"], "{ended:?}");
    place.assert_clean();
}
