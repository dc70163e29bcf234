//! What a container uses, as its cgroup of version 2 counts it.

use serde::{Deserialize, Serialize};

use crate::resources::Limit;

/// Figures of one container, or of all of them together. What the guest's kernel does not count is zero.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    pub cpu: CpuStats,
    pub memory: MemoryStats,
    pub pids: PidsStats,
    /// One entry a block device.
    pub io: Vec<IoStats>,
    /// Of the guest as a whole, where that was asked for.
    pub guest: Option<GuestStats>,
}

/// `cpu.stat`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuStats {
    pub usage_usec: u64,
    pub user_usec: u64,
    pub system_usec: u64,
    pub nr_periods: u64,
    pub nr_throttled: u64,
    pub throttled_usec: u64,
}

/// `memory.*`, bytes unless the name says otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStats {
    pub current: u64,
    pub max: Option<Limit>,
    pub swap_current: u64,
    pub swap_max: Option<Limit>,
    /// `memory.stat` by the kernel's names; see [`MemoryStats::of`].
    pub stat: Vec<(String, u64)>,
    pub events: MemoryEvents,
}

/// `memory.events`: how often each has happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryEvents {
    pub low: u64,
    pub high: u64,
    pub max: u64,
    pub oom: u64,
    /// Processes that the kernel killed for want of memory.
    pub oom_kill: u64,
}

/// `pids.*`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidsStats {
    pub current: u64,
    pub max: Option<Limit>,
}

/// A line of `io.stat`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoStats {
    pub major: u64,
    pub minor: u64,
    pub rbytes: u64,
    pub wbytes: u64,
    pub rios: u64,
    pub wios: u64,
}

/// The guest as a whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStats {
    pub memory: GuestMemory,
    /// Its network interfaces, but for the loopback one.
    pub interfaces: Vec<InterfaceStats>,
}

/// A line of `/proc/net/dev`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStats {
    pub name: String,
    pub received: TrafficStats,
    pub sent: TrafficStats,
}

/// One direction of an interface.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficStats {
    pub bytes: u64,
    pub packets: u64,
    pub errors: u64,
    pub dropped: u64,
}

/// `/proc/meminfo`, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemory {
    pub total: u64,
    pub available: u64,
}

impl MemoryStats {
    /// A figure of `memory.stat` by its name there, such as `anon` or `pgfault`.
    #[must_use]
    pub fn of(&self, name: &str) -> u64 {
        self.stat.iter().find(|(known, _)| known == name).map_or(0, |(_, value)| *value)
    }

    /// What the kubelet calls the working set: all but the file cache that could go at once.
    #[must_use]
    pub fn working_set(&self) -> u64 {
        self.current.saturating_sub(self.of("inactive_file"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_working_set_is_never_negative() {
        let of = |current: u64, inactive: u64| MemoryStats {
            current,
            stat: vec![("inactive_file".into(), inactive)],
            ..MemoryStats::default()
        };
        assert_eq!(of(10, 3).working_set(), 7);
        assert_eq!(of(3, u64::MAX).working_set(), 0);
        assert_eq!(MemoryStats::default().working_set(), 0);
    }
}
