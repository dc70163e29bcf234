//! x86-64: the address map and what the processor and the kernel need to start in 64-bit mode.

pub mod boot;
pub mod cpuid;
pub mod kernel;
pub mod layout;
pub mod mptable;
pub mod msr;
#[cfg(test)]
mod placement;
pub mod regs;
