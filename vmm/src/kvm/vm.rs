//! The VM: memory slots, interrupt controllers in the kernel, and eventfds in both directions.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
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
        Ok(Self { vm, cpuid })
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

    /// Has writes of the guest to `address` change nothing, without leaving the kernel.
    ///
    /// # Errors
    /// As [`Self::ioeventfd`].
    pub fn drop_writes(&self, address: u64) -> Result<(), KvmError> {
        drop_writes(&self.vm, &IoEventAddress::Mmio(address), "connecting acknowledgements of interrupts")
    }
}

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

#[expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION takes a raw host address")]
fn map_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), KvmError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is one live mapping of `len` bytes at that address; the machine keeps the memory alive
        // for as long as the VM, and regions do not overlap.
        unsafe { vm.set_user_memory_region(slot) }.map_err(step("mapping guest memory"))?;
    }
    Ok(())
}
