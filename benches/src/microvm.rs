//! QEMU's microvm with its virtiofsd and vhost-net, to be measured beside krx: one guest, whose PID 1 is a script.
//!
//! The kernel is krx's. Programs and data are Debian's QEMU, found where the machine has them.

use std::fs;
use std::io::{self, Error};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use crate::root::Root;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";
const FIRMWARE: [&str; 3] =
    ["/usr/share/qemu/qboot.rom", "/usr/share/qemu/pvh.bin", "/usr/share/qemu/linuxboot_dma.bin"];
const TAP: &str = "krx-bench0";
const SOCKET: &str = "/run/krx-bench-fs.sock";
/// Addresses of the host and the guest on the wire between them.
pub const HOST: &str = "10.77.0.1";
const GUEST: &str = "10.77.0.2";
/// Name of the script in the guest's root.
const INIT: &str = "krx-bench-init";
/// Time for virtiofsd to listen, and for the guest to end.
const LISTENS: Duration = Duration::from_secs(30);
const LIMIT: Duration = Duration::from_secs(900);

/// Copies what it needs, and has the host's kernel load the module that moves frames.
///
/// # Errors
/// Something of it is not there.
pub fn prepare(root: &Root) -> io::Result<()> {
    // Without it QEMU moves the frames itself, and says so.
    let _ = Command::new("modprobe").arg("vhost_net").status();
    for program in [QEMU, VIRTIOFSD] {
        root.copy_program(Path::new(program))?;
    }
    FIRMWARE.iter().try_for_each(|file| root.copy(Path::new(file)))
}

/// A daemon that ends with its owner.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the lines of `script` in a guest of `memory_mib` whose root file system is `tree`; returns when it has ended. `ip`
/// is a command that runs iproute2.
///
/// # Errors
/// The guest does not end in time, or one of the programs fails; with what the guest's console shows.
pub fn run(
    tree: &Path,
    kernel: &Path,
    memory_mib: u64,
    script: &str,
    ip: impl Fn() -> Command,
) -> io::Result<()> {
    let script = format!(
        "#!/bin/sh\nmount -t proc proc /proc\nmount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\nmkdir -p /dev/shm\n\
         mount -t tmpfs shm /dev/shm\nip link set lo up\nip address add {GUEST}/24 dev eth0\nip link set eth0 up\n{script}\n"
    );
    fs::write(tree.join(INIT), script)?;
    fs::set_permissions(tree.join(INIT), fs::Permissions::from_mode(0o755))?;
    for arguments in [
        &["tuntap", "add", TAP, "mode", "tap", "vnet_hdr"][..],
        &["address", "add", &format!("{HOST}/24"), "dev", TAP],
        &["link", "set", TAP, "up"],
    ] {
        if !ip().args(arguments).status()?.success() {
            return Err(Error::other(format!("ip {arguments:?} failed")));
        }
    }
    let files = Command::new(VIRTIOFSD)
        .args([
            &format!("--socket-path={SOCKET}"),
            "-o",
            &format!("source={}", tree.display()),
            "-o",
            "cache=auto",
            "-o",
            "sandbox=chroot",
        ])
        .stderr(fs::File::create(tree.with_extension("virtiofsd"))?)
        .spawn()?;
    let _files = Daemon(files);
    let begin = Instant::now();
    while !Path::new(SOCKET).exists() {
        if begin.elapsed() > LISTENS {
            let said = fs::read_to_string(tree.with_extension("virtiofsd")).unwrap_or_default();
            return Err(Error::other(format!("virtiofsd does not listen: {said}")));
        }
        thread::sleep(Duration::from_millis(50));
    }
    boot(tree, kernel, memory_mib)
}

fn boot(tree: &Path, kernel: &Path, memory_mib: u64) -> io::Result<()> {
    let console = tree.with_extension("console");
    let memory = format!("memory-backend-memfd,id=ram,size={memory_mib}M,share=on");
    let mut guest = Command::new(QEMU)
        .args(["-M", "microvm,accel=kvm,pic=off,pit=off,rtc=off,acpi=off", "-cpu", "host"])
        .args(["-m", &format!("{memory_mib}M"), "-global", "virtio-mmio.force-legacy=false", "-nodefaults"])
        .args(["-no-user-config", "-display", "none", "-no-reboot", "-kernel"])
        .arg(kernel)
        .args(["-append", &format!("console=ttyS0 panic=-1 root=tree rootfstype=virtiofs rw init=/{INIT} tsc=reliable no_timer_check")])
        .args(["-object", &memory, "-numa", "node,memdev=ram", "-chardev", &format!("socket,id=fs,path={SOCKET}")])
        .args(["-device", "vhost-user-fs-device,chardev=fs,tag=tree", "-device", "virtio-net-device,netdev=net"])
        .args(["-netdev", &format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost=on")])
        .args(["-serial", &format!("file:{}", console.display())])
        .spawn()
        .map(Daemon)?;
    let begin = Instant::now();
    // The end of PID 1 is a panic, which -no-reboot makes QEMU's end.
    let outcome = loop {
        match guest.0.try_wait()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => break format!("QEMU ended with {status}"),
            None if begin.elapsed() > LIMIT => break "QEMU's guest does not end".to_string(),
            None => thread::sleep(Duration::from_millis(200)),
        }
    };
    Err(Error::other(format!("{outcome}: {}", fs::read_to_string(&console).unwrap_or_default())))
}
