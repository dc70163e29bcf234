//! What a container or a pod uses, in the form that containerd's metrics have for cgroups of version 2. Pure.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use krx_proto::{InterfaceStats, Limit, Stats};

/// Figures of the guest's kernel as containerd takes them from the host's.
pub(crate) fn metrics(stats: &Stats) -> Metrics {
    let Stats { cpu, memory, pids, io, guest } = stats;
    let events = &memory.events;
    let usage = io.iter().map(|entry| IOEntry {
        major: entry.major,
        minor: entry.minor,
        rbytes: entry.rbytes,
        wbytes: entry.wbytes,
        rios: entry.rios,
        wios: entry.wios,
        ..IOEntry::default()
    });
    Metrics {
        pids: Some(PidsStat { current: pids.current, limit: limit(pids.max), ..PidsStat::default() }).into(),
        cpu: Some(CPUStat {
            usage_usec: cpu.usage_usec,
            user_usec: cpu.user_usec,
            system_usec: cpu.system_usec,
            nr_periods: cpu.nr_periods,
            nr_throttled: cpu.nr_throttled,
            throttled_usec: cpu.throttled_usec,
            ..CPUStat::default()
        })
        .into(),
        memory: Some(memory_stat(memory)).into(),
        memory_events: Some(MemoryEvents {
            low: events.low,
            high: events.high,
            max: events.max,
            oom: events.oom,
            oom_kill: events.oom_kill,
            ..MemoryEvents::default()
        })
        .into(),
        io: Some(IOStat { usage: usage.collect(), ..IOStat::default() }).into(),
        network: guest.iter().flat_map(|guest| &guest.interfaces).map(network).collect(),
        ..Metrics::default()
    }
}

fn network(interface: &InterfaceStats) -> NetworkStat {
    NetworkStat {
        name: interface.name.clone(),
        rx_bytes: interface.received.bytes,
        rx_packets: interface.received.packets,
        rx_errors: interface.received.errors,
        rx_dropped: interface.received.dropped,
        tx_bytes: interface.sent.bytes,
        tx_packets: interface.sent.packets,
        tx_errors: interface.sent.errors,
        tx_dropped: interface.sent.dropped,
        ..NetworkStat::default()
    }
}

/// `pids.max` and its like: containerd shows the largest number for none, as it does with runc.
fn limit(limit: Option<Limit>) -> u64 {
    match limit {
        Some(Limit::At(limit)) => limit,
        Some(Limit::Max) | None => u64::MAX,
    }
}

fn memory_stat(memory: &krx_proto::MemoryStats) -> MemoryStat {
    let of = |name| memory.of(name);
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        workingset_refault: of("workingset_refault_anon").saturating_add(of("workingset_refault_file")),
        workingset_activate: of("workingset_activate_anon").saturating_add(of("workingset_activate_file")),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: memory.current,
        usage_limit: limit(memory.max),
        swap_usage: memory.swap_current,
        swap_limit: limit(memory.swap_max),
        ..MemoryStat::default()
    }
}

#[cfg(test)]
mod tests {
    use krx_proto::{CpuStats, MemoryStats, PidsStats};

    use super::*;

    #[test]
    fn figures_have_their_places() {
        let stats = Stats {
            cpu: CpuStats { usage_usec: 7, ..CpuStats::default() },
            memory: MemoryStats {
                current: 100,
                max: Some(Limit::At(200)),
                stat: vec![("inactive_file".into(), 30), ("workingset_refault_file".into(), u64::MAX)],
                ..MemoryStats::default()
            },
            pids: PidsStats { current: 3, max: Some(Limit::Max) },
            ..Stats::default()
        };
        let metrics = metrics(&stats);
        assert_eq!(metrics.cpu.usage_usec, 7);
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (100, 200));
        assert_eq!((metrics.memory.inactive_file, metrics.pids.current), (30, 3));
        assert_eq!(metrics.pids.limit, u64::MAX);
    }
}
