//! Can this `/dev/kvm` run Linux?
//!
//! That the device exists and makes VMs says little. Software implementations of KVM exist (for paravirtual guests,
//! on machines without VT-x or AMD-V) which emulate supervisor mode one instruction at a time, know only some
//! instructions, and let a system call arrive with the privilege of its caller: Linux hangs or dies on them with a
//! register dump. So a tiny 64-bit guest does here the two things that every kernel needs, and its answers decide.
//!
//! [`open`] is the cheap part, [`examine`] runs the guest (well under 20 ms even where it is emulated), [`judge`]
//! is a pure function of what was seen. Nothing here knows what a user should do about it.

mod verdict;

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::errno;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

pub use verdict::{Defect, Facts, Stop, Verdict, judge};

/// `KVM_API_VERSION`, unchanged since 2007; the API documentation asks to refuse any other.
const API_VERSION: i32 = 12;

/// What the VMM builds on, with the names used in the KVM API documentation.
const CAPABILITIES: [(Cap, &str); 10] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Why the question could not be put to the guest.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    #[error("/dev/kvm does not exist")]
    Missing,
    #[error("/dev/kvm has no driver behind it")]
    NoDriver,
    #[error("/dev/kvm may not be opened by this user")]
    Denied,
    #[error("/dev/kvm cannot be opened")]
    Open(#[source] errno::Error),
    #[error("KVM has API version {0} and not {API_VERSION}")]
    ApiVersion(i32),
    #[error("KVM lacks {0}")]
    Capabilities(String),
    #[error("KVM cannot make a VM")]
    CreateVm(#[source] errno::Error),
    #[error("KVM cannot prepare the probe's guest ({step})")]
    Setup {
        step: &'static str,
        #[source]
        source: errno::Error,
    },
    #[error("Memory for the probe's guest cannot be had")]
    Memory,
    #[error("No thread for the probe's guest")]
    Thread(#[source] io::Error),
}

/// Opens `/dev/kvm` and checks that its interface is the one the VMM needs: some ten system calls.
///
/// # Errors
/// [`ProbeError`], by what is wrong with the device.
pub fn open() -> Result<Kvm, ProbeError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT => ProbeError::Missing,
        libc::ENODEV | libc::ENXIO => ProbeError::NoDriver,
        libc::EACCES | libc::EPERM => ProbeError::Denied,
        _ => ProbeError::Open(error),
    })?;
    match kvm.get_api_version() {
        API_VERSION => {}
        other => return Err(ProbeError::ApiVersion(other)),
    }
    let lacking = CAPABILITIES.iter().filter(|(capability, _)| !kvm.check_extension(*capability));
    let lacking: Vec<_> = lacking.map(|(_, name)| *name).collect();
    if lacking.is_empty() { Ok(kvm) } else { Err(ProbeError::Capabilities(lacking.join(", "))) }
}

/// Time after which a guest that does not end is stopped. The slowest KVM seen needs 10 ms, but a host that is itself
/// a VM can stand still for more than a second.
const LIMIT: Duration = Duration::from_secs(10);
/// Between two attempts to stop it: the first signal may come just before it enters `KVM_RUN`.
const KICK_INTERVAL: Duration = Duration::from_millis(10);

/// Runs the guest.
///
/// # Errors
/// [`ProbeError`] when the VM cannot be made; a VM that runs and fails is a fact.
pub fn examine(kvm: Kvm) -> Result<Facts, ProbeError> {
    let deadline = Instant::now() + LIMIT;
    interruptible(deadline, move || Guest::new(&kvm)?.facts(deadline))
}

/// Runs `work` in a thread of its own, because a `KVM_RUN` that never returns can be ended only by a signal to its
/// thread. The signal's handler is installed only if it comes to that.
fn interruptible<T: Send + 'static>(
    deadline: Instant,
    work: impl FnOnce() -> Result<T, ProbeError> + Send + 'static,
) -> Result<T, ProbeError> {
    let (sender, receiver) = mpsc::channel();
    // The receiver stays until it has an answer, so sending does not fail.
    let run = move || drop(sender.send(work()));
    let guest = thread::Builder::new().name("kvm-probe".into()).spawn(run).map_err(ProbeError::Thread)?;
    let mut patience = deadline.saturating_duration_since(Instant::now());
    let answer = loop {
        match receiver.recv_timeout(patience) {
            Ok(answer) => break answer,
            Err(RecvTimeoutError::Timeout) => {
                register_signal_handler(SIGRTMIN(), interrupted).map_err(setup("signal handler"))?;
                // An error means that the thread has just ended: its answer is there.
                let _ = guest.kill(SIGRTMIN());
                patience = KICK_INTERVAL;
            }
            Err(RecvTimeoutError::Disconnected) => {
                break Err(ProbeError::Thread(io::Error::other("it ended without an answer")));
            }
        }
    };
    // The VM and its memory are gone when the thread is.
    let _ = guest.join();
    answer
}

/// Does nothing: that `KVM_RUN` returns is the effect.
extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Guest-physical addresses, which are also its linear ones: a single 2 MiB page maps them all.
mod address {
    pub(super) const PML4: u64 = 0x0000;
    pub(super) const PDPT: u64 = 0x1000;
    pub(super) const PAGE_DIRECTORY: u64 = 0x2000;
    pub(super) const GDT: u64 = 0x3000;
    /// 16 bytes, aligned so, for CMPXCHG16B.
    pub(super) const OPERAND: u64 = 0x4000;
    pub(super) const STACK: u64 = 0x6000;
    pub(super) const SUPERVISOR: u64 = 0x7000;
    pub(super) const USER: u64 = 0x7100;
    pub(super) const SYSTEM_CALL: u64 = 0x7200;
    pub(super) const END: usize = 0x8000;
}

/// Ports on which the guest tells how far it came.
mod port {
    pub(super) const LOOP_BEGINS: u16 = 0x10;
    pub(super) const LOOP_ENDED: u16 = 0x11;
    pub(super) const EXCHANGED: u16 = 0x12;
    pub(super) const SYSTEM_CALL: u16 = 0x13;
}

/// Iterations of the loop: 1 to 2 ms where it is emulated, in which the exits at its ends are lost.
const ITERATIONS: u64 = 1000;
/// Rounds of the loop, of which the fastest counts: the host may be busy with something else in one.
const ROUNDS: u32 = 3;

/// Runs at CPL 0 in 64-bit mode. RDX:RAX is zero, as is the operand; RCX:RBX is not.
#[rustfmt::skip]
const SUPERVISOR_CODE: [u8; 24] = [
    0xe6, 0x10,                                             // out  LOOP_BEGINS, al
    0xb9, 0xe8, 0x03, 0x00, 0x00,                           // mov  ecx, ITERATIONS
    0xff, 0xc9,                                             // again: dec ecx
    0x75, 0xfc,                                             // jnz  again
    0xe6, 0x11,                                             // out  LOOP_ENDED, al
    0x48, 0x0f, 0xc7, 0x0c, 0x25, 0x00, 0x40, 0x00, 0x00,   // cmpxchg16b [OPERAND]
    0xe6, 0x12,                                             // out  EXCHANGED, al
];
const RBX: u64 = 0x6b72_7820_7072_6f62;

/// Runs at CPL 3 in 64-bit mode.
#[rustfmt::skip]
const USER_CODE: [u8; 4] = [
    0x0f, 0x05,         // syscall
    0x0f, 0x0b,         // ud2: never reached
];

/// Where SYSCALL leads (`IA32_LSTAR`).
#[rustfmt::skip]
const SYSTEM_CALL_CODE: [u8; 6] = [
    0x8c, 0xc8,         // mov  eax, cs
    0xe7, 0x13,         // out  SYSTEM_CALL, eax
    0x0f, 0x0b,         // ud2: never reached
];

/// Selectors, in the order that SYSCALL and SYSRET prescribe (AMD64 manual volume 2, 6.1.1).
const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const USER_DATA: u16 = 0x18 | 3;
const USER_CODE_SELECTOR: u16 = 0x20 | 3;
/// Descriptors of those selectors: flat, present, accessed, with DPL 0 or 3; code has the L bit.
const GDT: [u64; 5] =
    [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];

/// RFLAGS with only the bit that is always one.
const RFLAGS: u64 = 0x2;
/// I/O privilege level 3: the system call's stub can then report a CPL of 3 instead of faulting on its OUT.
const RFLAGS_IOPL_3: u64 = 3 << 12;
/// Page table entry bits: present, writable, user; and page size, for an entry of the page directory.
const TABLE: u64 = 0x7;
const LARGE_PAGE: u64 = 0x87;

const CR0_PROTECTION_AND_PAGING: u64 = 1 << 31 | 1 << 4 | 1 << 1 | 1;
const CR4_PAE: u64 = 1 << 5;
/// SYSCALL, long mode enabled and active.
const EFER: u64 = 1 << 10 | 1 << 8 | 1;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_SFMASK: u32 = 0xc000_0084;

/// The guest: fields are dropped in this order, memory after all that may use it.
struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    memory: GuestMemoryMmap,
    /// System registers at CPL 0.
    sregs: kvm_sregs,
}

fn setup(step: &'static str) -> impl FnOnce(errno::Error) -> ProbeError {
    move |source| ProbeError::Setup { step, source }
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, ProbeError> {
        let memory = image()?;
        let vm = kvm.create_vm().map_err(ProbeError::CreateVm)?;
        map(&vm, &memory)?;
        let vcpu = vm.create_vcpu(0).map_err(setup("vCPU"))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(setup("supported CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(setup("CPUID"))?;
        let sregs = supervisor(vcpu.get_sregs().map_err(setup("system registers"))?);
        vcpu.set_sregs(&sregs).map_err(setup("system registers"))?;
        set_msrs(&vcpu)?;
        Ok(Self { vcpu, _vm: vm, memory, sregs })
    }

    fn facts(&mut self, deadline: Instant) -> Result<Facts, ProbeError> {
        let mut loop_ns = Ok(u64::MAX);
        for _ in 0..ROUNDS {
            let round = self.time_loop(deadline)?;
            loop_ns = loop_ns.and_then(|fastest: u64| round.map(|ns| ns.min(fastest)));
        }
        // The program stands right after the loop, if it came that far.
        let cmpxchg16b = match loop_ns {
            Ok(_) => self.run_to(port::EXCHANGED, deadline).map(|_| self.exchanged()),
            Err(stop) => Err(stop),
        };
        let syscall_cs = self.call_system(deadline)?;
        Ok(Facts { loop_ns, cmpxchg16b, syscall_cs })
    }

    fn time_loop(&mut self, deadline: Instant) -> Result<Result<u64, Stop>, ProbeError> {
        self.start(address::SUPERVISOR, RFLAGS)?;
        Ok(self.run_to(port::LOOP_BEGINS, deadline).and_then(|_| {
            let begin = Instant::now();
            self.run_to(port::LOOP_ENDED, deadline)?;
            let elapsed = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
            Ok(elapsed / ITERATIONS)
        }))
    }

    /// Whether the operand of CMPXCHG16B now holds RCX:RBX; RCX was counted down to zero by the loop.
    fn exchanged(&self) -> bool {
        let mut operand = [0; 16];
        let read = self.memory.read_slice(&mut operand, GuestAddress(address::OPERAND));
        read.is_ok() && u128::from_le_bytes(operand) == u128::from(RBX)
    }

    fn call_system(&mut self, deadline: Instant) -> Result<Result<u16, Stop>, ProbeError> {
        let mut sregs = self.sregs;
        sregs.cs = segment(USER_CODE_SELECTOR);
        sregs.ss = segment(USER_DATA);
        self.vcpu.set_sregs(&sregs).map_err(setup("system registers at CPL 3"))?;
        self.start(address::USER, RFLAGS | RFLAGS_IOPL_3)?;
        Ok(self.run_to(port::SYSTEM_CALL, deadline))
    }

    fn start(&mut self, rip: u64, rflags: u64) -> Result<(), ProbeError> {
        let regs = kvm_regs { rip, rflags, rsp: address::STACK, rbx: RBX, ..Default::default() };
        self.vcpu.set_regs(&regs).map_err(setup("registers"))
    }

    /// Runs until the guest writes to `port`; the lower 16 bits of what it wrote.
    fn run_to(&mut self, port: u16, deadline: Instant) -> Result<u16, Stop> {
        loop {
            return match self.vcpu.run() {
                Ok(VcpuExit::IoOut(at, data)) if at == port => {
                    let low = |index| data.get(index).copied().unwrap_or(0);
                    Ok(u16::from_le_bytes([low(0), low(1)]))
                }
                Ok(VcpuExit::InternalError) => Err(Stop::InternalError),
                Ok(VcpuExit::Shutdown) => Err(Stop::TripleFault),
                Ok(VcpuExit::FailEntry(..)) => Err(Stop::EntryRefused),
                Ok(_) => Err(Stop::OtherExit),
                Err(error) => match error.errno() {
                    libc::EINTR | libc::EAGAIN if Instant::now() < deadline => continue,
                    libc::EINTR | libc::EAGAIN => Err(Stop::Hung),
                    errno => Err(Stop::RunFailed(errno)),
                },
            };
        }
    }
}

/// Guest memory with page tables, GDT and the three programs.
fn image() -> Result<GuestMemoryMmap, ProbeError> {
    let ranges = [(GuestAddress(0), address::END)];
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).map_err(|_| ProbeError::Memory)?;
    let gdt: Vec<u8> = GDT.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect();
    let contents: [(u64, &[u8]); 7] = [
        (address::PML4, &(address::PDPT | TABLE).to_le_bytes()),
        (address::PDPT, &(address::PAGE_DIRECTORY | TABLE).to_le_bytes()),
        (address::PAGE_DIRECTORY, &LARGE_PAGE.to_le_bytes()),
        (address::GDT, &gdt),
        (address::SUPERVISOR, &SUPERVISOR_CODE),
        (address::USER, &USER_CODE),
        (address::SYSTEM_CALL, &SYSTEM_CALL_CODE),
    ];
    for (at, bytes) in contents {
        memory.write_slice(bytes, GuestAddress(at)).map_err(|_| ProbeError::Memory)?;
    }
    Ok(memory)
}

#[expect(unsafe_code, reason = "KVM is told of memory by its address")]
fn map(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), ProbeError> {
    let host = memory.get_host_address(GuestAddress(0)).map_err(|_| ProbeError::Memory)?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: address::END as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: `host` is the start of a mapping of `address::END` bytes, made by `image` as one range. It is owned
    // by the `Guest` and dropped after the vCPU and the VM, so no guest instruction runs when it is unmapped; the
    // host reaches it only through vm-memory's volatile accesses.
    unsafe { vm.set_user_memory_region(region) }.map_err(setup("memory"))
}

/// 64-bit mode at CPL 0 over the reset state. Without an IDT every exception ends the guest.
fn supervisor(reset: kvm_sregs) -> kvm_sregs {
    let mut sregs = kvm_sregs {
        cs: segment(KERNEL_CODE),
        ss: segment(KERNEL_DATA),
        ds: segment(USER_DATA),
        es: segment(USER_DATA),
        cr0: CR0_PROTECTION_AND_PAGING,
        cr3: address::PML4,
        cr4: CR4_PAE,
        efer: EFER,
        ..reset
    };
    sregs.gdt.base = address::GDT;
    sregs.gdt.limit = u16::try_from(size_of_val(&GDT) - 1).unwrap_or(u16::MAX);
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    // A busy 64-bit TSS, without which VT-x refuses entry (Intel SDM volume 3, 27.3.1.2).
    sregs.tr.type_ = 11;
    sregs.tr.present = 1;
    sregs
}

/// The segment register's hidden part for a selector of the [`GDT`].
fn segment(selector: u16) -> kvm_segment {
    let descriptor = GDT.get(usize::from(selector >> 3)).copied().unwrap_or(0);
    let bits =
        |shift: u32, count: u32| u8::try_from(descriptor >> shift & ((1 << count) - 1)).unwrap_or(u8::MAX);
    kvm_segment {
        selector,
        base: 0,
        limit: u32::MAX,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        ..Default::default()
    }
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), ProbeError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [
        entry(MSR_STAR, u64::from(KERNEL_DATA) << 48 | u64::from(KERNEL_CODE) << 32),
        entry(MSR_LSTAR, address::SYSTEM_CALL),
        entry(MSR_SFMASK, 0),
    ];
    let msrs = Msrs::from_entries(&entries).map_err(|_| ProbeError::Memory)?;
    match vcpu.set_msrs(&msrs).map_err(setup("model-specific registers"))? {
        count if count == entries.len() => Ok(()),
        _ => Err(ProbeError::Setup {
            step: "model-specific registers",
            source: errno::Error::new(libc::EINVAL),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Facts = Facts { loop_ns: Ok(1), cmpxchg16b: Ok(true), syscall_cs: Ok(KERNEL_CODE) };

    #[test]
    fn hardware_runs_linux() {
        assert_eq!(judge(&GOOD), Verdict::RunsLinux { loop_ns: 1 });
        let nested = Facts { loop_ns: Ok(60), ..GOOD };
        assert_eq!(judge(&nested), Verdict::RunsLinux { loop_ns: 60 });
    }

    #[test]
    fn time_alone_condemns_nothing() {
        assert_eq!(judge(&Facts { loop_ns: Ok(5000), ..GOOD }), Verdict::Slow { loop_ns: 5000 });
    }

    #[test]
    fn software_kvm_is_recognised() {
        let facts = Facts {
            loop_ns: Ok(1100),
            cmpxchg16b: Err(Stop::InternalError),
            syscall_cs: Ok(USER_CODE_SELECTOR),
        };
        let defects = vec![
            Defect::SyscallWithoutPrivilege { cs: USER_CODE_SELECTOR },
            Defect::Cmpxchg16b(Stop::InternalError),
        ];
        let expected = Verdict::CannotRunLinux { emulated: true, loop_ns: Some(1100), defects };
        assert_eq!(judge(&facts), expected);
    }

    #[test]
    fn time_that_ran_out_is_no_lasting_verdict() {
        let hung = Facts { cmpxchg16b: Err(Stop::Hung), ..GOOD };
        assert!(!judge(&hung).is_lasting());
        let wrong = Facts { cmpxchg16b: Err(Stop::Hung), syscall_cs: Ok(USER_CODE_SELECTOR), ..GOOD };
        assert!(judge(&wrong).is_lasting());
        assert!(judge(&GOOD).is_lasting());
    }

    #[test]
    fn one_wrong_answer_is_enough() {
        let wrong = [
            Facts { loop_ns: Err(Stop::Hung), ..GOOD },
            Facts { cmpxchg16b: Ok(false), ..GOOD },
            Facts { cmpxchg16b: Err(Stop::TripleFault), ..GOOD },
            Facts { syscall_cs: Err(Stop::RunFailed(libc::EFAULT)), ..GOOD },
            Facts { syscall_cs: Ok(KERNEL_CODE | 3), ..GOOD },
        ];
        for facts in wrong {
            let Verdict::CannotRunLinux { emulated: false, defects, .. } = judge(&facts) else {
                panic!("{facts:?}")
            };
            assert_eq!(defects.len(), 1, "{facts:?}");
        }
    }

    #[test]
    fn defects_are_told_in_words() {
        let defect = Defect::SyscallWithoutPrivilege { cs: 0x33 };
        assert_eq!(defect.to_string(), "SYSCALL arrives at CPL 3 instead of CPL 0 (CS 0x33)");
        let defect = Defect::Cmpxchg16b(Stop::InternalError);
        assert_eq!(defect.to_string(), "CMPXCHG16B at CPL 0 fails: KVM could not emulate it");
    }

    /// The byte tables are written by hand; what they share with named constants must agree.
    #[test]
    fn machine_code_uses_the_constants() {
        assert_eq!(SUPERVISOR_CODE[3..7], u32::try_from(ITERATIONS).unwrap().to_le_bytes());
        assert_eq!(SUPERVISOR_CODE[18..22], u32::try_from(address::OPERAND).unwrap().to_le_bytes());
        let ports = [SUPERVISOR_CODE[1], SUPERVISOR_CODE[12], SUPERVISOR_CODE[23], SYSTEM_CALL_CODE[3]];
        let named = [port::LOOP_BEGINS, port::LOOP_ENDED, port::EXCHANGED, port::SYSTEM_CALL];
        assert_eq!(ports.map(u16::from), named);
    }

    #[test]
    fn segments_follow_their_descriptors() {
        let code = segment(USER_CODE_SELECTOR);
        assert_eq!(
            (code.type_, code.s, code.dpl, code.present, code.l, code.db, code.g),
            (11, 1, 3, 1, 1, 0, 1)
        );
        let data = segment(KERNEL_DATA);
        assert_eq!(
            (data.type_, data.s, data.dpl, data.present, data.l, data.db, data.g),
            (3, 1, 0, 1, 0, 1, 1)
        );
    }

    #[test]
    fn guest_that_never_ends_is_stopped() {
        let kvm = match open() {
            Ok(kvm) => kvm,
            Err(error) => return eprintln!("SKIP: {error}"),
        };
        let deadline = Instant::now() + Duration::from_millis(50);
        let facts = interruptible(deadline, move || {
            let mut guest = Guest::new(&kvm)?;
            let jump_to_itself = [0xeb, 0xfe];
            for at in [address::SUPERVISOR, address::USER] {
                guest.memory.write_slice(&jump_to_itself, GuestAddress(at)).unwrap();
            }
            guest.facts(deadline)
        });
        let expected =
            Facts { loop_ns: Err(Stop::Hung), cmpxchg16b: Err(Stop::Hung), syscall_cs: Err(Stop::Hung) };
        assert_eq!(facts.unwrap(), expected);
    }

    /// Whatever KVM the machine has, good or bad, the probe ends in time with a verdict.
    #[test]
    fn this_machine_gets_a_verdict_in_time() {
        let kvm = match open() {
            Ok(kvm) => kvm,
            Err(error) => return eprintln!("SKIP: {error}"),
        };
        let begin = Instant::now();
        let facts = examine(kvm).unwrap();
        eprintln!("{facts:?}: {:?} in {:?}", judge(&facts), begin.elapsed());
        assert!(begin.elapsed() < LIMIT);
    }
}
