//! KVM: the VM, its vCPUs, and the check whether this host's KVM can run Linux at all.

pub mod exit;
pub mod probe;
pub mod vcpu;
pub mod vm;
