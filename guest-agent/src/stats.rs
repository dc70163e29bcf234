//! What a cgroup counts, read out of its files. The parsers are pure; what they do not understand, they leave out.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use krx_proto::{
    CpuStats, GuestMemory, GuestStats, InterfaceStats, IoStats, Limit, MemoryEvents, MemoryStats, PidsStats,
    Stats, TrafficStats,
};

/// Most that is read of a file, several times what the kernel writes: `io.stat` has a line for each block device.
const MAX_FILE: u64 = 64 << 10;
/// Most lines that are taken of a file.
const MAX_LINES: usize = 256;
/// Longest name of a figure; the kernel's are shorter.
const MAX_NAME: usize = 64;

/// All figures of the cgroup at `path`.
pub(crate) fn read(path: &Path) -> Stats {
    let text = |file: &str| text(&path.join(file));
    let memory_stat = text("memory.stat");
    Stats {
        cpu: cpu(&text("cpu.stat")),
        memory: MemoryStats {
            current: number(&text("memory.current")),
            max: limit(&text("memory.max")),
            swap_current: number(&text("memory.swap.current")),
            swap_max: limit(&text("memory.swap.max")),
            stat: flat(&memory_stat).into_iter().map(|(name, value)| (name.into(), value)).collect(),
            events: memory_events(&text("memory.events")),
        },
        pids: PidsStats { current: number(&text("pids.current")), max: limit(&text("pids.max")) },
        io: io(&text("io.stat")),
        guest: None,
    }
}

/// The guest as a whole; its network is that of the agent's own namespace.
pub(crate) fn guest() -> GuestStats {
    GuestStats {
        memory: meminfo(&text(Path::new("/proc/meminfo"))),
        interfaces: interfaces(&text(Path::new("/proc/net/dev"))),
    }
}

/// What the kernel has counted in `memory.events`.
pub(crate) fn memory_events(text: &str) -> MemoryEvents {
    let of = by_name(text);
    MemoryEvents {
        low: of("low"),
        high: of("high"),
        max: of("max"),
        oom: of("oom"),
        oom_kill: of("oom_kill"),
    }
}

/// A file's text; nothing of one that cannot be read, for then there is nothing to count.
fn text(path: &Path) -> String {
    File::open(path).map(capped).unwrap_or_default()
}

/// Reads so much of a file as is to be parsed.
pub(crate) fn capped(file: impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = file.take(MAX_FILE).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Lines of a name and a number each.
pub(crate) fn flat(text: &str) -> Vec<(&str, u64)> {
    let pairs = text.lines().take(MAX_LINES).filter_map(|line| line.split_once(' '));
    let named = pairs.filter(|(name, _)| name.len() <= MAX_NAME);
    named.filter_map(|(name, value)| Some((name, value.trim().parse().ok()?))).collect()
}

/// The figures of such a file by name.
fn by_name(text: &str) -> impl Fn(&str) -> u64 {
    let figures = flat(text);
    move |name| figures.iter().find(|(known, _)| *known == name).map_or(0, |(_, value)| *value)
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

fn limit(text: &str) -> Option<Limit> {
    match text.trim() {
        "max" => Some(Limit::Max),
        number => number.parse().ok().map(Limit::At),
    }
}

fn cpu(text: &str) -> CpuStats {
    let of = by_name(text);
    CpuStats {
        usage_usec: of("usage_usec"),
        user_usec: of("user_usec"),
        system_usec: of("system_usec"),
        nr_periods: of("nr_periods"),
        nr_throttled: of("nr_throttled"),
        throttled_usec: of("throttled_usec"),
    }
}

/// Lines such as `253:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0`.
fn io(text: &str) -> Vec<IoStats> {
    let device = |line: &str| {
        let (device, figures) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let of = |name: &str| {
            let figures = figures.split(' ').filter_map(|figure| figure.split_once('='));
            figures.filter(|(known, _)| *known == name).find_map(|(_, value)| value.parse().ok()).unwrap_or(0)
        };
        Some(IoStats {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: of("rbytes"),
            wbytes: of("wbytes"),
            rios: of("rios"),
            wios: of("wios"),
        })
    };
    text.lines().take(MAX_LINES).filter_map(device).collect()
}

/// Lines such as `MemTotal:  123456 kB`.
fn meminfo(text: &str) -> GuestMemory {
    let of = |name: &str| {
        let line = text.lines().take(MAX_LINES).find_map(|line| line.strip_prefix(name));
        let value = line.and_then(|line| line.trim().strip_suffix("kB"));
        value.and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or(0).saturating_mul(1024)
    };
    GuestMemory { total: of("MemTotal:"), available: of("MemAvailable:") }
}

/// Lines such as `  eth0: 10 1 0 0 0 0 0 0 20 2 0 0 0 0 0 0`: eight figures of what was received, of which bytes,
/// packets, errors and dropped come first, and eight of what was sent. The two lines of headings have no such figures.
fn interfaces(text: &str) -> Vec<InterfaceStats> {
    const COLUMNS: usize = 8;
    let interface = |line: &str| {
        let (name, figures) = line.rsplit_once(':')?;
        let name = name.trim();
        let figures: Vec<u64> =
            figures.split_whitespace().take(2 * COLUMNS).map_while(|figure| figure.parse().ok()).collect();
        let usable = !name.is_empty() && name.len() <= MAX_NAME && name != "lo";
        if !usable || figures.len() != 2 * COLUMNS {
            return None;
        }
        let traffic = |from: &[u64]| TrafficStats {
            bytes: from[0],
            packets: from[1],
            errors: from[2],
            dropped: from[3],
        };
        let (received, sent) = figures.split_at(COLUMNS);
        Some(InterfaceStats { name: name.into(), received: traffic(received), sent: traffic(sent) })
    };
    text.lines().take(MAX_LINES).filter_map(interface).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_kernel_are_understood() {
        let cpu = cpu(
            "usage_usec 300\nuser_usec 200\nsystem_usec 100\nnice_usec 0\nnr_periods 5\nnr_throttled 2\nthrottled_usec 9\n",
        );
        assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.system_usec), (300, 200, 100));
        assert_eq!((cpu.nr_periods, cpu.nr_throttled, cpu.throttled_usec), (5, 2, 9));
        assert_eq!(flat("anon 4096\nfile 0\n"), [("anon", 4096), ("file", 0)]);
        assert_eq!((limit("max\n"), limit("12\n"), limit("")), (Some(Limit::Max), Some(Limit::At(12)), None));
        let events = memory_events("low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 0\n");
        assert_eq!((events.high, events.max, events.oom, events.oom_kill), (1, 2, 3, 4));
        let io = io("253:0 rbytes=4096 wbytes=8 rios=1 wios=2 dbytes=0 dios=0\n7:1 \n");
        assert_eq!(io[0], IoStats { major: 253, minor: 0, rbytes: 4096, wbytes: 8, rios: 1, wios: 2 });
        assert_eq!(io[1], IoStats { major: 7, minor: 1, ..IoStats::default() });
        let memory = meminfo("MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    500 kB\n");
        assert_eq!(memory, GuestMemory { total: 1_024_000, available: 512_000 });
    }

    #[test]
    fn what_is_not_understood_is_left_out() {
        let long = format!("{} 1\n", "x".repeat(MAX_NAME + 1));
        for text in [
            "",
            "\n\n",
            "anon",
            "anon ",
            "anon -1",
            "anon 99999999999999999999999",
            "a=b",
            &long,
            "\u{fffd} x",
        ] {
            assert_eq!(flat(text), [], "{text:?}");
            assert_eq!(cpu(text), CpuStats::default());
            assert_eq!(memory_events(text), MemoryEvents::default());
            assert_eq!(io(text), []);
            assert_eq!(meminfo(text), GuestMemory::default());
            assert_eq!(number(text), 0);
        }
        for text in ["1:", ":1 rbytes=1", "x:y rbytes=1", "1:-2 rbytes=1", "1:2:3 rbytes=1"] {
            assert_eq!(io(text), [], "{text}");
        }
        assert_eq!(
            io("1:2 rbytes=x wbytes=-1 rios== wios"),
            [IoStats { major: 1, minor: 2, ..IoStats::default() }]
        );
        assert_eq!(meminfo("MemTotal: 99999999999999999 kB").total, u64::MAX);
    }

    #[test]
    fn interfaces_are_counted_but_for_the_loopback_one() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
            lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0\n  \
            eth0:18446744073709551615 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n\
            eth0:1: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n";
        let traffic = |bytes, packets, errors, dropped| TrafficStats { bytes, packets, errors, dropped };
        let of = |name: &str, received, sent| InterfaceStats { name: name.into(), received, sent };
        let expected = [
            of("eth0", traffic(u64::MAX, 2, 3, 4), traffic(9, 10, 11, 12)),
            of("eth0:1", traffic(1, 2, 3, 4), traffic(5, 6, 7, 8)),
        ];
        assert_eq!(interfaces(text), expected);
        let long = format!("{}: {}", "x".repeat(MAX_NAME + 1), "1 ".repeat(16));
        for text in ["", ":", "eth0:", "eth0: 1 2 3", ": 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1", &long, "\u{fffd}"]
        {
            assert_eq!(interfaces(text), [], "{text:?}");
        }
        for bad in ["-1", "x", "99999999999999999999999", "1.5"] {
            assert_eq!(interfaces(&format!("eth0: {}{bad}", "1 ".repeat(15))), [], "{bad}");
        }
        let many = format!("e: {}\n", "1 ".repeat(16)).repeat(MAX_LINES + 10);
        assert_eq!(interfaces(&many).len(), MAX_LINES);
    }

    #[test]
    fn no_file_is_read_without_end() {
        let endless = capped(std::io::repeat(b'\n'));
        assert_eq!(endless.len() as u64, MAX_FILE);
        assert_eq!(flat(&"a 1\n".repeat(MAX_LINES + 10)).len(), MAX_LINES);
        assert_eq!(io(&"1:1 rios=1\n".repeat(MAX_LINES + 10)).len(), MAX_LINES);
        assert_eq!(capped(&b"a\xff 1"[..]), "a\u{fffd} 1");
        assert_eq!(read(Path::new("/nonexistent")), Stats::default());
    }
}
