//! What the end-to-end tests stand on: built programs, a host whose KVM runs Linux, scratch directories, and
//! kernels and initramfs that misbehave.
//!
//! A test asks [`host`] first. Where KVM cannot run Linux it says `SKIP` and why; with `KRX_REQUIRE_VM` set, as
//! `make test` does, it fails instead.

pub mod agent;
pub mod attempt;
pub mod containerd;
pub mod cri;
pub mod dice;
pub mod disk_image;
pub mod guest;
pub mod hostile;
pub mod image;
pub mod lan;
pub mod pod;
pub mod remains;
pub mod scratch;
pub mod shim;
pub mod systemd;
pub mod terminal;

use std::path::{Path, PathBuf};

use krx_vmm::kvm::probe::{self, Verdict};

/// The built programs and files the tests use.
#[derive(Debug, Clone)]
pub struct Host {
    target: PathBuf,
}

/// A host that runs VMs, or `None` (said on standard output) where a test is to be skipped.
///
/// # Panics
/// When there is none and `KRX_REQUIRE_VM` demands one, or a program is not built.
#[must_use]
pub fn host() -> Option<Host> {
    let verdict = probe::open().and_then(probe::examine).map(|facts| probe::judge(&facts));
    let reason = match verdict {
        // Slow it may be: an emulated host is, beside other work.
        Ok(Verdict::RunsLinux { .. } | Verdict::Slow { .. }) => return Some(Host::built()),
        Ok(_) => "this machine's KVM cannot run Linux".to_string(),
        Err(error) => krx_vmm::report::chain(&error),
    };
    assert!(std::env::var_os("KRX_REQUIRE_VM").is_none(), "a VM host is required: {reason}");
    println!("SKIP: {reason}; run the test by tests/kvm-host");
    None
}

impl Host {
    fn built() -> Self {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
        let target = target.canonicalize().expect("target directory: run make build");
        let host = Self { target };
        for file in ["release/krx", "release/krx-vmm", "guest/vmlinux", "guest/initramfs.cpio"] {
            assert!(host.target.join(file).exists(), "target/{file} is not built: run make build");
        }
        host
    }

    #[must_use]
    pub fn krx(&self) -> PathBuf {
        self.target.join("release/krx")
    }

    #[must_use]
    pub fn vmm(&self) -> PathBuf {
        self.target.join("release/krx-vmm")
    }

    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.target.join("guest/vmlinux")
    }

    #[must_use]
    pub fn bzimage(&self) -> PathBuf {
        self.target.join("guest/bzImage")
    }

    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.target.join("guest/initramfs.cpio")
    }

    /// Initramfs of the init that misbehaves, see [`guest`].
    #[must_use]
    pub fn odd_initramfs(&self) -> PathBuf {
        self.target.join("guest/odd-initramfs.cpio")
    }

    /// Kernel that attacks, see [`hostile`].
    #[must_use]
    pub fn hostile_guest(&self) -> PathBuf {
        self.target.join("x86_64-unknown-linux-gnu/agent/hostile-guest")
    }

    /// Debian with python3.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        self.target.join("guest/python-rootfs")
    }

    /// One of the root file systems with real software.
    ///
    /// # Panics
    /// When it is not there.
    #[must_use]
    pub fn software(&self, set: &str) -> PathBuf {
        let rootfs = self.target.join(format!("guest/{set}-rootfs"));
        assert!(
            rootfs.join("usr/bin/sh").exists(),
            "there is no {}: run rootfs/software-rootfs.sh {set}",
            rootfs.display()
        );
        rootfs
    }

    /// Static program that does what a shell cannot, see tests/workload.
    #[must_use]
    pub fn workload(&self) -> PathBuf {
        self.target.join("x86_64-unknown-linux-gnu/agent/workload")
    }
}
