//! What CPUID tells the guest: KVM's supported leaves, with topology, APIC IDs and the TSC frequency filled in.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHE: u32 = 0x4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
/// "Timing information": EAX is the TSC frequency in kHz (a leaf VMware defined and KVM guests read).
const LEAF_TIMING: u32 = 0x4000_0010;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const FEATURE_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_HYPERVISOR: u32 = 1 << 31;
const FEATURE_HTT: u32 = 1 << 28;
const LEVEL_CORE: u32 = 2;
const LEVEL_SMT: u32 = 1;

/// What is particular to one vCPU.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    /// Index of the vCPU, which is also its APIC ID.
    pub id: u8,
    /// vCPUs of the VM: cores of one socket, one thread each.
    pub count: u8,
    /// TSC frequency, when KVM tells it.
    pub tsc_khz: Option<u32>,
}

/// The leaves for one vCPU, from those KVM supports.
#[must_use]
pub fn for_vcpu(supported: &CpuId, topology: Topology) -> CpuId {
    let mut cpuid = supported.clone();
    if topology.count > 1 {
        add_core_levels(&mut cpuid);
    }
    for entry in cpuid.as_mut_slice() {
        adjust(entry, topology);
    }
    if let Some(tsc_khz) = topology.tsc_khz {
        // No room left in the table (KVM's own maximum) costs the leaf, which is a convenience.
        let _ = cpuid.push(kvm_cpuid_entry2 { function: LEAF_TIMING, eax: tsc_khz, ..Default::default() });
    }
    cpuid
}

/// From Linux 6.2 on KVM lists only the first level of the topology leaves. Without the second, the level of cores, every
/// vCPU would be a package of its own.
fn add_core_levels(cpuid: &mut CpuId) {
    for function in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2] {
        let has = |index| cpuid.as_slice().iter().any(|e| e.function == function && e.index == index);
        if has(0) && !has(1) {
            let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
            // No room left in the table (KVM's own maximum) costs the level: the guest boots with more packages.
            let _ = cpuid.push(kvm_cpuid_entry2 { function, index: 1, flags, ..Default::default() });
        }
    }
}

fn adjust(entry: &mut kvm_cpuid_entry2, Topology { id, count, tsc_khz }: Topology) {
    let (id, count) = (u32::from(id), u32::from(count));
    match entry.function {
        LEAF_FEATURES => {
            entry.ebx = (entry.ebx & 0xffff) | (count << 16) | (id << 24);
            entry.ecx |= FEATURE_HYPERVISOR | FEATURE_TSC_DEADLINE;
            entry.edx = if count > 1 { entry.edx | FEATURE_HTT } else { entry.edx & !FEATURE_HTT };
        }
        // EAX bits 31-26: cores a package; bits 25-14: threads that share the cache (all, for the last level).
        LEAF_CACHE if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharers = if level >= 3 { count - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharers << 14) | ((count - 1) << 26);
        }
        LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => topology_level(entry, id, count),
        LEAF_HYPERVISOR if tsc_khz.is_some() => entry.eax = entry.eax.max(LEAF_TIMING),
        // ECX bits 7-0: cores minus one; bits 15-12: width of the core ID in the APIC ID.
        LEAF_AMD_SIZES => entry.ecx = (entry.ecx & !0xf0ff) | (count - 1) | (core_bits(count) << 12),
        LEAF_AMD_TOPOLOGY => {
            entry.eax = id;
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

fn topology_level(entry: &mut kvm_cpuid_entry2, id: u32, count: u32) {
    let (shift, processors, level) = match entry.index {
        0 => (0, 1, LEVEL_SMT),
        1 => (core_bits(count), count, LEVEL_CORE),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = processors;
    entry.ecx = (entry.index & 0xff) | (level << 8);
    entry.edx = id;
}

/// Bits of an APIC ID that number the cores.
fn core_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, topology: Topology) -> kvm_cpuid_entry2 {
        let all = [
            kvm_cpuid_entry2 {
                function: LEAF_FEATURES,
                ebx: 0xff00_0800,
                edx: FEATURE_HTT,
                ..Default::default()
            },
            kvm_cpuid_entry2 { function: LEAF_TOPOLOGY, index: 0, ..Default::default() },
            kvm_cpuid_entry2 { function: LEAF_TOPOLOGY, index: 1, ..Default::default() },
            kvm_cpuid_entry2 { function: LEAF_HYPERVISOR, eax: 0x4000_0001, ..Default::default() },
        ];
        let cpuid = for_vcpu(&CpuId::from_entries(&all).unwrap(), topology);
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    const ONE: Topology = Topology { id: 0, count: 1, tsc_khz: Some(2_600_000) };
    const LAST_OF_SIX: Topology = Topology { id: 5, count: 6, tsc_khz: None };

    #[test]
    fn apic_id_and_processor_count_are_in_leaf_1() {
        assert_eq!(leaf(LEAF_FEATURES, 0, LAST_OF_SIX).ebx, 0x0506_0800);
        assert_eq!(leaf(LEAF_FEATURES, 0, ONE).edx & FEATURE_HTT, 0);
    }

    #[test]
    fn topology_counts_cores_of_one_socket() {
        let core = leaf(LEAF_TOPOLOGY, 1, LAST_OF_SIX);
        assert_eq!((core.eax, core.ebx, core.ecx >> 8, core.edx), (3, 6, LEVEL_CORE, 5));
        assert_eq!(leaf(LEAF_TOPOLOGY, 0, LAST_OF_SIX).ebx, 1);
    }

    #[test]
    fn level_of_cores_is_added_where_kvm_lists_the_first_only() {
        let only_first = |function| kvm_cpuid_entry2 {
            function,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ..Default::default()
        };
        let levels = |all: &[kvm_cpuid_entry2], function, topology| {
            let cpuid = for_vcpu(&CpuId::from_entries(all).unwrap(), topology);
            let of_leaf = cpuid.as_slice().iter().filter(|e| e.function == function);
            of_leaf.map(|e| (e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)).collect::<Vec<_>>()
        };
        let both = [only_first(LEAF_TOPOLOGY), only_first(LEAF_TOPOLOGY_V2)];
        for function in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2] {
            assert_eq!(
                levels(&both, function, LAST_OF_SIX),
                [(0, 1, 0, 1, 0x100, 5), (1, 1, 3, 6, 0x201, 5)]
            );
            assert_eq!(levels(&both, function, ONE).len(), 1);
        }
        // A leaf that the processor has not is not made up.
        assert_eq!(levels(&both[..1], LEAF_TOPOLOGY_V2, LAST_OF_SIX), []);
    }

    #[test]
    fn tsc_frequency_is_in_the_timing_leaf() {
        assert_eq!(leaf(LEAF_TIMING, 0, ONE).eax, 2_600_000);
        assert_eq!(leaf(LEAF_HYPERVISOR, 0, ONE).eax, LEAF_TIMING);
    }
}
