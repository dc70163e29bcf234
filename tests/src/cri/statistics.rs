//! Statistics of the Container Runtime Interface (runtime.v1), as far as the tests read them.

use prost::Message;

#[derive(Clone, PartialEq, Message)]
pub struct Unsigned {
    #[prost(uint64, tag = "1")]
    pub value: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct CpuUsage {
    #[prost(int64, tag = "1")]
    pub timestamp: i64,
    #[prost(message, optional, tag = "2")]
    pub usage_core_nano_seconds: Option<Unsigned>,
}

#[derive(Clone, PartialEq, Message)]
pub struct MemoryUsage {
    #[prost(int64, tag = "1")]
    pub timestamp: i64,
    #[prost(message, optional, tag = "2")]
    pub working_set_bytes: Option<Unsigned>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ContainerStats {
    #[prost(message, optional, tag = "2")]
    pub cpu: Option<CpuUsage>,
    #[prost(message, optional, tag = "3")]
    pub memory: Option<MemoryUsage>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ContainerStatsAnswer {
    #[prost(message, optional, tag = "1")]
    pub stats: Option<ContainerStats>,
}

/// Of the pod as the CRI plugin counts it: from the pod's cgroup.
#[derive(Clone, PartialEq, Message)]
pub struct LinuxPodStats {
    #[prost(message, optional, tag = "1")]
    pub cpu: Option<CpuUsage>,
    #[prost(message, optional, tag = "2")]
    pub memory: Option<MemoryUsage>,
}

#[derive(Clone, PartialEq, Message)]
pub struct PodStats {
    #[prost(message, optional, tag = "2")]
    pub linux: Option<LinuxPodStats>,
}

#[derive(Clone, PartialEq, Message)]
pub struct PodStatsAnswer {
    #[prost(message, optional, tag = "1")]
    pub stats: Option<PodStats>,
}
