//! The boot recipe, flat and in boot order, and the life of the machine until its guest ends.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::EventSet;
use kvm_ioctls::Kvm;
use linux_loader::cmdline::Cmdline;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vm_memory::GuestMemoryMmap;

use crate::arch::x86_64::boot::{self, BootError, Hardware, Initramfs};
use crate::arch::x86_64::kernel::{self, KernelError};
use crate::arch::x86_64::layout;
use crate::bus::Buses;
use crate::config::ValidConfig;
use crate::control::{self, Handles};
use crate::devices::power::{BootMark, PowerOff, ResetControl};
use crate::devices::serial::Console;
use crate::event_loop::{EventLoop, Stop, Workers, on_readable};
use crate::host_socket::{BindError, Listener};
use crate::jail::janitor::Janitor;
use crate::jail::seccomp::{self, Kind};
use crate::klog::{self, KlogError};
use crate::kvm::exit::Crash;
use crate::kvm::vcpu::{Vcpu, Vcpus};
use crate::kvm::vm::{self, KvmError, Vm};
use crate::memory::{self, MemoryError};
use crate::phase::{self, Phase};
use crate::report;
use crate::slots::Slots;
use crate::virtio::net::Net;
use crate::virtio::net::vhost::Vhost;
use crate::virtio::rng;

/// How a machine ended.
#[derive(Debug)]
pub enum Outcome {
    PowerOff,
    Reset,
    Panic,
    Crash {
        crash: Crash,
        vcpu: u8,
        instruction: u64,
    },
    /// `KVM_RUN` itself failed.
    RunFailed(kvm_ioctls::Error),
    /// PID 1 was not reached in time.
    BootTimeout,
    /// Asked for from outside.
    Stopped,
    /// The owner is gone: nobody will clean up after the VM but itself.
    Orphaned,
}

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("Guest memory cannot be set up")]
    Memory(#[source] MemoryError),
    #[error("Virtual machine cannot be made")]
    Kvm(#[source] KvmError),
    #[error("Kernel cannot be loaded")]
    Kernel(#[source] KernelError),
    #[error("Guest cannot be prepared for boot")]
    Boot(#[source] BootError),
    #[error("Event loop cannot be made")]
    EventLoop(#[source] event_manager::Error),
    #[error("Event loop failed while the guest ran, so the VM was ended")]
    Loop(#[source] event_manager::Error),
    #[error("Control socket cannot be made")]
    Control(#[source] BindError),
    #[error("vsock device cannot be made")]
    Vsock(#[source] BindError),
    #[error("virtio-fs device cannot be made")]
    Fs(#[source] io::Error),
    #[error("lifeline_fd is not the read end of a pipe that was inherited")]
    Lifeline(#[source] io::Error),
    #[error("Threads or signals cannot be set up")]
    Host(#[source] io::Error),
}

/// A machine whose guest runs.
pub struct Machine {
    event_loop: EventLoop,
    stop: Stop<Outcome>,
    vcpus: Arc<Vcpus>,
    memory: GuestMemoryMmap,
    /// The image, by which the guest's log is found.
    kernel: File,
    /// Not used here any more, but closing it would disconnect every irqfd.
    _vm: Arc<Vm>,
    /// Devices go with the last holder, and would remove their files: not the business of a vCPU that ends.
    _buses: Arc<Buses>,
    boot_deadline_ns: Option<u64>,
}

/// What the owner passed by descriptors.
#[derive(Debug, Default)]
pub struct Inherited {
    /// The machine ends when its other end is closed.
    pub lifeline: Option<OwnedFd>,
    pub interfaces: Vec<Net>,
}

/// What is outside of the jail, opened before it is entered.
#[derive(Debug)]
pub struct Opened {
    /// Mapped before there is a second thread: the C library's memory for that could come to lie right behind, and the kernel
    /// would make one mapping of both.
    memory: GuestMemoryMmap,
    kvm: Kvm,
    kernel: File,
    initramfs: Option<File>,
    entropy: File,
    /// One for each interface, or none.
    vhost: Vec<Vhost>,
}

impl Opened {
    /// Reserves the guest's memory, and opens the host's KVM and the files of which `config` has the guest boot.
    ///
    /// # Errors
    /// [`MachineError`]: what is not there, or not permitted.
    pub fn open(config: &ValidConfig) -> Result<Self, MachineError> {
        let memory = memory::allocate(config.memory).map_err(MachineError::Memory)?;
        let kvm = vm::open().map_err(MachineError::Kvm)?;
        let kernel = kernel::open(&config.kernel).map_err(MachineError::Kernel)?;
        let initramfs = config.initramfs.as_deref().map(boot::open_initramfs);
        let initramfs = initramfs.transpose().map_err(MachineError::Boot)?;
        let entropy = rng::open().map_err(MachineError::Host)?;
        let vhost = open_vhost(config, &memory);
        Ok(Self { memory, kvm, kernel, initramfs, entropy, vhost })
    }
}

/// What a host need not have: without, the VMM moves the frames itself. That is only said to who debugs.
fn open_vhost(config: &ValidConfig, memory: &GuestMemoryMmap) -> Vec<Vhost> {
    let pairs = config.net.iter().map(|interface| 1 + interface.queue_fds.len());
    let count = if config.vhost_net { pairs.sum() } else { 0 };
    Vhost::open(memory, count).unwrap_or_else(|error| {
        if config.console {
            report::warn("Network without vhost-net", &error);
        }
        Vec::new()
    })
}

impl Machine {
    /// Builds the machine and starts its vCPUs, after the calling thread has been confined. `inherited` are the descriptors that `config` names.
    ///
    /// The files of its sockets are there if, and only if, this succeeds; [`clean_up`] removes them.
    ///
    /// # Errors
    /// [`MachineError`]: a file that cannot be used, or what the host lacks.
    pub fn start(config: &ValidConfig, opened: Opened, inherited: Inherited) -> Result<Self, MachineError> {
        let Inherited { lifeline, mut interfaces } = inherited;
        let mut vhost = opened.vhost.into_iter();
        for interface in &mut interfaces {
            interface.set_vhost(&mut vhost);
        }
        let memory = opened.memory;
        let vm = Arc::new(Vm::new(&opened.kvm, &memory).map_err(MachineError::Kvm)?);
        phase::mark(Phase::VmCreated);

        let image = opened.kernel.try_clone().map_err(MachineError::Host)?;
        let kernel = kernel::load_from(&memory, &config.kernel, image).map_err(MachineError::Kernel)?;
        let initramfs = match (&config.initramfs, &opened.initramfs) {
            (Some(path), Some(file)) => boot::load_initramfs_from(&memory, path, file, kernel.end),
            _ => Ok(Initramfs::default()),
        };
        let initramfs = initramfs.map_err(MachineError::Boot)?;
        phase::mark(Phase::KernelLoaded);

        let mut event_loop = EventLoop::new().map_err(MachineError::EventLoop)?;
        let stop = Stop::new().map_err(MachineError::Host)?;
        stop.wake(&mut event_loop).map_err(MachineError::Host)?;
        let handles = Handles::new(stop.clone(), config.vsock.clone());
        watch_signals(&mut event_loop, &handles).map_err(MachineError::Host)?;
        if let Some(lifeline) = lifeline {
            watch_owner(&mut event_loop, lifeline, stop.clone()).map_err(MachineError::Lifeline)?;
        }
        if let Some(path) = &config.control {
            let listener = Listener::bind(path.clone()).map_err(MachineError::Control)?;
            control::serve_on(&mut event_loop, listener, handles.clone()).map_err(MachineError::Host)?;
        }

        let mut cmdline = base_cmdline(config).map_err(MachineError::Boot)?;
        let workers = Workers::new(&event_loop);
        let mut slots = Slots::new(&vm, &memory, workers).map_err(MachineError::Host)?;
        let disks = crate::slots::attach_devices(&mut slots, config, opened.entropy, interfaces)?;
        handles.set_disks(disks);
        handles.set_guest(memory.clone(), opened.kernel.try_clone().map_err(MachineError::Host)?);
        for device in slots.cmdline() {
            append(&mut cmdline, device).map_err(MachineError::Boot)?;
        }
        append(&mut cmdline, &config.cmdline).map_err(MachineError::Boot)?;
        let serial = config.console.then_some(layout::COM1_IRQ);
        let irqs: Vec<_> =
            serial.into_iter().chain(slots.irqs()).filter_map(|irq| irq.try_into().ok()).collect();
        let mmio = slots.into_bus().map_err(MachineError::Kvm)?;
        let mut buses = Buses { mmio, ..Buses::default() };
        attach_ports(&mut buses, &vm, config.console).map_err(MachineError::Kvm)?;

        let count = config.vcpus.get();
        let hardware = Hardware { vcpus: count, irqs: &irqs };
        boot::write_tables(&memory, &kernel, initramfs, &cmdline, hardware).map_err(MachineError::Boot)?;
        let vcpus: Result<Vec<_>, _> = (0..count).map(|id| Vcpu::new(&vm, id, count, kernel.entry)).collect();
        let vcpus = vcpus.map_err(MachineError::Kvm)?;
        let buses = Arc::new(buses);
        let vcpus = Vcpus::start(vcpus, &buses, &stop).map_err(|error| {
            // Some may run and hold the devices: these are not dropped, and their files would stay.
            clean_up(config);
            MachineError::Host(error)
        })?;
        let vcpus = Arc::new(vcpus);
        *handles.vcpus.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&vcpus));
        seccomp::confine(Kind::EventLoop);
        vcpus.resume();

        let limit = config.boot_timeout_ms.saturating_mul(1_000_000);
        let boot_deadline_ns = (limit > 0).then(|| phase::monotonic_ns().saturating_add(limit));
        Ok(Self {
            event_loop,
            stop,
            vcpus,
            memory,
            kernel: opened.kernel,
            _vm: vm,
            _buses: buses,
            boot_deadline_ns,
        })
    }

    /// Runs the event loop until the guest ends, however it does.
    ///
    /// # Errors
    /// When the loop itself fails.
    pub fn run(&mut self) -> Result<Outcome, MachineError> {
        loop {
            if let Some(outcome) = self.stop.take() {
                return Ok(outcome);
            }
            let timeout = match self.boot_deadline_ns {
                Some(_) if phase::reached(Phase::Pid1) => {
                    self.boot_deadline_ns = None;
                    -1
                }
                Some(deadline) => match deadline.checked_sub(phase::monotonic_ns()) {
                    None => return Ok(Outcome::BootTimeout),
                    Some(left) => i32::try_from(left / 1_000_000 + 1).unwrap_or(i32::MAX),
                },
                None => -1,
            };
            self.event_loop.run_with_timeout(timeout).map_err(MachineError::Loop)?;
        }
    }

    /// The guest's kernel log, once the guest has ended. Stops the vCPUs first, as far as they can be: nobody serves the
    /// event loop any more, and one may wait for it for ever. The reader bears that memory changes.
    ///
    /// # Errors
    /// As [`klog::read`].
    pub fn last_words(&self) -> Result<String, KlogError> {
        let _ = self.vcpus.stop();
        klog::read_from(&self.memory, &self.kernel)
    }
}

/// What every guest is told. Reasons: `kernel-config/README.md`.
fn base_cmdline(config: &ValidConfig) -> Result<Cmdline, BootError> {
    let mut cmdline = Cmdline::new(layout::CMDLINE_SIZE).map_err(BootError::CmdlineText)?;
    append(&mut cmdline, "panic=-1 reboot=p,panic_warm tsc=reliable no_timer_check random.trust_cpu=on")?;
    // Patching every lock prefix would copy pages shared by all VMs.
    append(&mut cmdline, "noreplace-smp")?;
    append(&mut cmdline, if config.console { "console=ttyS0" } else { "quiet 8250.nr_uarts=0" })?;
    Ok(cmdline)
}

fn append(cmdline: &mut Cmdline, text: &str) -> Result<(), BootError> {
    if text.is_empty() { Ok(()) } else { cmdline.insert_str(text).map_err(BootError::CmdlineText) }
}

fn attach_ports(buses: &mut Buses, vm: &Vm, console: bool) -> Result<(), KvmError> {
    use krx_proto::io_port;
    let ports = &mut buses.ports;
    ports.attach(io_port::BOOT_MARK.into(), 1, Arc::new(Mutex::new(BootMark)));
    ports.attach(io_port::POWER_OFF.into(), 1, Arc::new(Mutex::new(PowerOff)));
    ports.attach(layout::RESET_CONTROL.into(), 1, Arc::new(Mutex::new(ResetControl)));
    if console {
        let serial = Console::new(vm.irqfd(layout::COM1_IRQ)?);
        ports.attach(layout::COM1.into(), layout::COM1_SIZE.into(), Arc::new(Mutex::new(serial)));
    }
    Ok(())
}

/// SIGTERM and SIGINT: the first asks the guest to power off, the second ends it.
fn watch_signals(event_loop: &mut EventLoop, handles: &Handles) -> io::Result<()> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    mask.add(Signal::SIGINT);
    // Before any thread is started, so that all of them inherit it; and nothing else, whatever the caller blocks: a
    // vCPU has to hear the signal that takes it out of the guest.
    mask.thread_set_mask()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let handles = handles.clone();
    let mut asked = false;
    on_readable(event_loop, signals.as_raw_fd(), EventSet::IN, move || {
        while let Ok(Some(_)) = signals.read_signal() {
            if asked {
                handles.stop.set(Outcome::Stopped);
            } else {
                handles.shut_down();
            }
            asked = true;
        }
    })
}

fn watch_owner(event_loop: &mut EventLoop, lifeline: OwnedFd, stop: Stop<Outcome>) -> io::Result<()> {
    on_readable(event_loop, lifeline.as_raw_fd(), EventSet::IN, move || {
        // Nothing is ever written to it: readable means that the other end is closed.
        let _ = &lifeline;
        stop.set(Outcome::Orphaned);
    })
}

/// Removes the files of a machine that was started: before that, they may be another's.
pub fn clean_up(config: &ValidConfig) {
    let remove = |path: &Path| drop(std::fs::remove_file(path));
    config.control.as_deref().into_iter().chain(config.vsock.as_deref()).for_each(remove);
}

/// The owner's lock in the state directory, which the VMM holds, too.
pub(crate) const LOCK_FILE: &str = "lock";

/// Removes the pod's directory in the place of an owner that died.
///
/// Never recursive: the share below it is made of bind mounts of the user's own files, and what a mistake would leave
/// mounted must survive it. In a jail there is nothing of it but the sockets, and the `janitor` removes the rest.
pub fn clean_up_for_owner(config: &ValidConfig, janitor: Option<Janitor>) {
    clean_up(config);
    let Some(directory) = &config.state_dir else { return janitor.map_or((), Janitor::remove) };
    // The owner listens beside them.
    let sockets =
        config.vsock.as_deref().and_then(Path::parent).filter(|sockets| sockets.starts_with(directory));
    sockets.into_iter().for_each(empty);
    let Some(janitor) = janitor else {
        if let Some(share) = &config.share {
            let _ = nix::mount::umount2(&share.root, nix::mount::MntFlags::MNT_DETACH);
        }
        empty(directory);
        let _ = std::fs::remove_file(directory.join(LOCK_FILE));
        return drop(std::fs::remove_dir(directory));
    };
    janitor.remove();
}

/// Removes files and empty directories, but for the lock: as long as it is there the name is taken, and all of this is still ours.
fn empty(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if entry.file_name() != LOCK_FILE {
            let path = entry.path();
            let _ = if is_directory { std::fs::remove_dir(path) } else { std::fs::remove_file(path) };
        }
    }
}
