//! containerd in a root file system in memory, of the benches that measure through it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use benches::host;
use benches::root::Root;
use tests::containerd::image;
use tests::containerd::tools::Tools;
use tests::containerd::{KRX, Setup};

const PROGRAMS: [&str; 12] = [
    "containerd/usr/bin/containerd",
    "containerd/usr/bin/ctr",
    "containerd/usr/bin/containerd-shim-runc-v2",
    "containerd/usr/sbin/runc",
    "containerd/usr/sbin/iptables",
    "containerd/usr/sbin/ip6tables",
    "containerd/bin/ip",
    "containerd/usr/lib/cni/bridge",
    "containerd/usr/lib/cni/host-local",
    "containerd/usr/lib/cni/loopback",
    "containerd/usr/lib/cni/portmap",
    "release/containerd-shim-krx-v2",
];
/// What removes scratch directories in the end.
const OF_HOST: [&str; 2] = ["/bin/sh", "/bin/rm"];
const FILES: [&str; 3] = ["release/krx-vmm", "guest/vmlinux", "guest/initramfs.cpio"];
const DIRECTORIES: [&str; 1] = ["containerd/usr/lib/x86_64-linux-gnu/xtables"];

/// Copies what is executed and read into memory, with what `more` copies, and moves there.
pub(crate) fn move_into_memory(more: impl FnOnce(&Root, &Tools) -> io::Result<()>) -> io::Result<Setup> {
    let target = host::root().join("target").canonicalize()?;
    let tools = Tools::of(target.clone());
    let root = Root::new(target.join("containerd/usr/lib/x86_64-linux-gnu"))?;
    for program in PROGRAMS {
        root.copy_program(&target.join(program))?;
    }
    for program in OF_HOST {
        root.copy_program(Path::new(program))?;
    }
    for file in FILES {
        root.copy(&target.join(file))?;
    }
    for directory in DIRECTORIES {
        root.copy_all(&target.join(directory))?;
    }
    // The kubelet's and the CRI plugin's part of what a pod has in its /etc.
    fs::write(root.path(Path::new("/etc/hosts")), "127.0.0.1 localhost\n")?;
    fs::write(root.path(Path::new("/etc/resolv.conf")), "nameserver 10.96.0.10\n")?;
    let image = PathBuf::from("/tmp/small.tar");
    image::small(&tools, &root.path(&image));
    more(&root, &tools)?;
    root.enter()?;
    Ok(Setup { tools, runtime: KRX, log: "info".into(), image: Some(image) })
}
