//! Model-specific registers at power-on, where the kernel expects other values than KVM's.

use kvm_bindings::kvm_msr_entry;

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// What is written before the first instruction: fast string operations on, all memory write-back.
#[must_use]
pub fn boot_msrs() -> [kvm_msr_entry; 2] {
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    [msr(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), msr(IA32_MTRR_DEF_TYPE, MTRR_ENABLED | MTRR_WRITE_BACK)]
}
