//! Each target on its seeds and on changes of these: a minute of fuzzing that every test run can afford.

#![allow(clippy::tests_outside_test_module, reason = "an integration test is one")]

use std::time::{Duration, Instant};

use krx_fuzz::{TARGETS, seeds};

/// Changed inputs for each target, and the time after which one more is not begun.
const CHANGES: u32 = 3000;
const TIME: Duration = Duration::from_secs(20);
/// An input that takes longer hangs, or does what it should not.
const SLOW: Duration = Duration::from_secs(5);

/// xorshift64: the same inputs in every run.
struct Prng(u64);

impl Prng {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end.max(1) as u64).expect("index")
    }

    fn byte(&mut self) -> u8 {
        const EDGES: [u8; 6] = [0, 1, 0x7f, 0x80, 0xfe, 0xff];
        let random = self.below(256).to_le_bytes()[0];
        if self.below(3) == 0 { EDGES[self.below(EDGES.len())] } else { random }
    }

    /// One to eight small changes of the sort that find what hand-written tests do not.
    fn change(&mut self, mut data: Vec<u8>) -> Vec<u8> {
        for _ in 0..=self.below(8) {
            let at = self.below(data.len());
            match self.below(6) {
                _ if data.is_empty() => data.push(self.byte()),
                0 => data[at] ^= 1 << self.below(8),
                1 => data.truncate(at),
                2 => data.insert(at, self.byte()),
                3 => {
                    let end = (at + self.below(16)).min(data.len());
                    data.extend_from_within(at..end);
                }
                4 => {
                    let byte = self.byte();
                    let end = (at + 4).min(data.len());
                    data[at..end].fill(byte);
                }
                _ => data[at] = self.byte(),
            }
        }
        data
    }
}

fn play(name: &str, target: fn(&[u8]), data: &[u8]) {
    let begin = Instant::now();
    target(data);
    assert!(begin.elapsed() < SLOW, "{name} took {:?} for {data:02x?}", begin.elapsed());
}

fn run(name: &str) {
    let (name, target) = TARGETS.into_iter().find(|(known, _)| *known == name).expect("a target");
    let seeds = seeds::of(name);
    for seed in &seeds {
        play(name, target, seed);
    }
    let mut random = Prng(0x9e37_79b9_7f4a_7c15);
    let begin = Instant::now();
    for _ in 0..CHANGES {
        let seed = &seeds[random.below(seeds.len())];
        let data = random.change(seed.clone());
        play(name, target, &data);
        if begin.elapsed() > TIME {
            return;
        }
    }
}

macro_rules! targets {
    ($($name:ident),*) => {
        $(#[test] fn $name() { run(stringify!($name)); })*

        #[test]
        fn every_target_is_here() {
            let mut here = [$(stringify!($name)),*];
            let mut all = TARGETS.map(|(name, _)| name);
            here.sort_unstable();
            all.sort_unstable();
            assert_eq!(here, all);
        }
    };
}

targets!(
    mmio_rng,
    mmio_block,
    mmio_vsock,
    mmio_fs,
    mmio_net,
    mmio_net_control,
    vmm_config,
    kernel,
    klog,
    agent_frames,
    bundle,
    image_archive,
    image_layer,
    settings,
    annotations,
    shim_config,
    pod_sandbox_config,
    log_uri,
    timings_request
);
