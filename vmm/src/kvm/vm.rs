//! The VM: memory slots, interrupt controllers in the kernel, and eventfds in both directions.

use std::sync::{Arc, OnceLock};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::x86_64::layout;

/// Why KVM cannot make the machine.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    #[error("Cannot open /dev/kvm (run `krx doctor` for what this host lacks)")]
    Open(#[source] kvm_ioctls::Error),
    #[error("KVM refuses: {what}")]
    Refused {
        what: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("Out of event descriptors")]
    EventFd(#[source] std::io::Error),
    #[error("Thread of a device cannot be made")]
    Thread(#[source] std::io::Error),
    #[error("Registers of a device cannot be made")]
    Registers(#[source] std::io::Error),
}

/// Names the step for [`KvmError::Refused`].
pub(super) fn step(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Refused { what, source }
}

/// A VM with memory and an in-kernel interrupt controller; no PIT, as the guest needs none.
#[derive(Debug)]
pub struct Vm {
    vm: VmFd,
    cpuid: CpuId,
    /// Memory that the guest may read, kept as long as the VM.
    shown: OnceLock<Arc<MmapRegion>>,
}

impl Vm {
    /// # Errors
    /// [`KvmError`] with the step that failed.
    pub fn new(kvm: &Kvm, memory: &GuestMemoryMmap) -> Result<Self, KvmError> {
        let vm = kvm.create_vm().map_err(step("creating a VM"))?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(step("placing the identity map"))?;
        let tss = usize::try_from(layout::KVM_TSS).unwrap_or(usize::MAX);
        vm.set_tss_address(tss).map_err(step("placing the TSS"))?;
        hide_pic(&vm)?;
        vm.create_irq_chip().map_err(step("creating interrupt controllers"))?;
        map_memory(&vm, memory)?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(step("listing CPUID leaves"))?;
        Ok(Self { vm, cpuid, shown: OnceLock::new() })
    }

    /// CPUID leaves that KVM can show a guest.
    #[must_use]
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    pub(super) fn create_vcpu(&self, id: u8) -> Result<VcpuFd, KvmError> {
        self.vm.create_vcpu(id.into()).map_err(step("creating a vCPU"))
    }

    /// An eventfd that raises interrupt line `irq` when written.
    ///
    /// # Errors
    /// Out of descriptors, or no such line.
    pub fn irqfd(&self, irq: u32) -> Result<EventFd, KvmError> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(KvmError::EventFd)?;
        self.vm.register_irqfd(&event, irq).map_err(step("connecting an interrupt"))?;
        Ok(event)
    }

    /// An eventfd that is signalled when the guest writes the 32-bit `value` to `address`, without leaving the
    /// kernel.
    ///
    /// # Errors
    /// Out of descriptors or of ioeventfds.
    pub fn ioeventfd(&self, address: u64, value: u32) -> Result<EventFd, KvmError> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(KvmError::EventFd)?;
        let at = IoEventAddress::Mmio(address);
        self.vm.register_ioevent(&event, &at, value).map_err(step("connecting a notification"))?;
        Ok(event)
    }

    /// Lets the guest read `memory` at `address`, once a VM. Its writes there are exits, as where no memory is.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn show(&self, address: u64, memory: Arc<MmapRegion>) -> Result<(), KvmError> {
        let memory = self.shown.get_or_init(|| memory);
        let (at, length) = (memory.as_ptr(), memory.size() as u64);
        set_slot(&self.vm, READ_ONLY_SLOT, KVM_MEM_READONLY, address, (at, length))
    }

    /// Has writes of the guest to `address` change nothing, without leaving the kernel.
    ///
    /// # Errors
    /// As [`Self::ioeventfd`].
    pub fn drop_writes(&self, address: u64) -> Result<(), KvmError> {
        drop_writes(&self.vm, &IoEventAddress::Mmio(address), "connecting acknowledgements of interrupts")
    }
}

/// KVM's slot for memory that the guest may only read. Those before are for its own: one region, or two.
const READ_ONLY_SLOT: u32 = 2;

/// Has KVM take all writes to `address` that come to it first, and tell nobody.
fn drop_writes(vm: &VmFd, address: &IoEventAddress, what: &'static str) -> Result<(), KvmError> {
    // KVM keeps what the descriptor stands for; nobody listens.
    let nobody = EventFd::new(EFD_NONBLOCK).map_err(KvmError::EventFd)?;
    vm.register_ioevent(&nobody, address, NoDatamatch).map_err(step(what))
}

/// Lets the kernel find no PIC, by which it does without one, and without saving it time and again: 420 exits less.
///
/// KVM's interrupt controllers have one, which cannot be left out. The kernel probes it by a write to its mask, which it
/// reads back; an ioeventfd that is there first takes the write. Where KVM asked the PIC first the guest would find it,
/// and boot as well: the MP table has the timer's interrupt for that.
fn hide_pic(vm: &VmFd) -> Result<(), KvmError> {
    drop_writes(vm, &IoEventAddress::Pio(layout::PIC_MASK.into()), "hiding the PIC")
}

/// Opens the host's KVM.
///
/// # Errors
/// There is none, or it is not permitted.
pub fn open() -> Result<Kvm, KvmError> {
    Kvm::new().map_err(KvmError::Open)
}

fn map_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), KvmError> {
    (0..).zip(memory.iter()).try_for_each(|(slot, region)| {
        set_slot(vm, slot, 0, region.start_addr().raw_value(), (region.as_ptr(), region.len()))
    })
}

#[expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION takes a raw host address")]
fn set_slot(
    vm: &VmFd,
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    (at, memory_size): (*mut u8, u64),
) -> Result<(), KvmError> {
    let userspace_addr = at as u64;
    let slot = kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, userspace_addr };
    // SAFETY: what is mapped is one live mapping of that length at that address. The machine keeps the guest's own memory
    // alive for as long as the VM, the VM what it shows; regions do not overlap.
    unsafe { vm.set_user_memory_region(slot) }.map_err(step("mapping guest memory"))
}
