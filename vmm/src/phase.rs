//! When each phase of the start was reached, by the host's monotonic clock. One store a mark, so they are always
//! on; read through the control socket's `timings`.

use std::sync::atomic::{AtomicU64, Ordering};

use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// Points of a VM's life, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// `main` was entered.
    Main,
    /// The configuration is read and valid, the share is mounted.
    Configured,
    /// KVM has a VM with memory and interrupt controllers.
    VmCreated,
    /// The kernel and the initramfs are in guest memory.
    KernelLoaded,
    /// Devices and vCPUs are ready; the first vCPU is about to execute its first instruction.
    FirstInstruction,
    /// The agent runs as PID 1.
    Pid1,
    /// The guest powered off.
    PowerOff,
}

const NAMES: [&str; 7] =
    ["main", "configured", "vm_created", "kernel_loaded", "first_instruction", "pid1", "power_off"];

static MARKS: [AtomicU64; NAMES.len()] = [const { AtomicU64::new(0) }; NAMES.len()];

/// Notes the time of the first call for `phase`.
pub fn mark(phase: Phase) {
    let slot = &MARKS[phase as usize];
    let _ = slot.compare_exchange(0, monotonic_ns(), Ordering::Relaxed, Ordering::Relaxed);
}

/// Whether `phase` was reached.
#[must_use]
pub fn reached(phase: Phase) -> bool {
    MARKS[phase as usize].load(Ordering::Relaxed) != 0
}

/// A phase that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Reached {
    pub name: &'static str,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub monotonic_ns: u64,
}

/// All phases reached so far, in order.
#[must_use]
pub fn all() -> Vec<Reached> {
    let times = MARKS.iter().map(|mark| mark.load(Ordering::Relaxed));
    let reached = NAMES.into_iter().zip(times).filter(|(_, ns)| *ns != 0);
    reached.map(|(name, monotonic_ns)| Reached { name, monotonic_ns }).collect()
}

/// The monotonic clock in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        let (seconds, nanoseconds) = (time.tv_sec().unsigned_abs(), time.tv_nsec().unsigned_abs());
        seconds * 1_000_000_000 + nanoseconds
    })
}
