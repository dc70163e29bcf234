//! Random operations on one file by every way there is to it, judged by a model in memory. Prints its seed, which repeats a run.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, copy_file_range, fallocate};

use super::mapping::Mapping;
use super::{Outcome, check};

const PAGE: usize = 4096;
/// Largest that the file becomes, in pages.
const PAGES: usize = 64;
/// Operations that are told when one is found to be wrong.
const TOLD: usize = 12;

/// Memory that begins at a page, as direct I/O wants it.
pub(super) struct Aligned {
    at: *mut u8,
    layout: Layout,
}

impl Aligned {
    pub(super) fn new(length: usize) -> Self {
        let layout = Layout::from_size_align(length.max(PAGE), PAGE).expect("a size of memory");
        // SAFETY: the layout is not empty.
        let at = unsafe { alloc_zeroed(layout) };
        assert!(!at.is_null(), "no memory");
        Self { at, layout }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: allocated and zeroed with this size.
        unsafe { std::slice::from_raw_parts(self.at, self.layout.size()) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.layout.size()) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.at, self.layout) };
    }
}

/// xorshift64*.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let value = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(value).unwrap_or_default() % bound
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Read,
    Write,
    ReadDirect,
    WriteDirect,
    Append,
    ReadMapped,
    WriteMapped,
    Truncate,
    Punch,
    Allocate,
    Copy,
    Reopen,
    Sync,
}

const OPERATIONS: [Operation; 13] = [
    Operation::Read,
    Operation::Write,
    Operation::ReadDirect,
    Operation::WriteDirect,
    Operation::Append,
    Operation::ReadMapped,
    Operation::WriteMapped,
    Operation::Truncate,
    Operation::Punch,
    Operation::Allocate,
    Operation::Copy,
    Operation::Reopen,
    Operation::Sync,
];

/// The ways to the file.
struct Ways {
    plain: File,
    direct: File,
    append: File,
}

impl Ways {
    fn open(path: &Path) -> Outcome<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        Ok(Self {
            plain: options.open(path)?,
            direct: options.clone().custom_flags(libc::O_DIRECT).open(path)?,
            append: OpenOptions::new().append(true).open(path)?,
        })
    }
}

struct Exercise {
    path: PathBuf,
    ways: Ways,
    /// What is in the file.
    model: Vec<u8>,
    dice: Dice,
    value: u8,
}

pub(super) fn run(path: &Path, seed: u64, steps: usize) -> Outcome {
    println!("seed {seed}, {steps} steps");
    File::create_new(path)?;
    let dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut exercise =
        Exercise { path: path.into(), ways: Ways::open(path)?, model: Vec::new(), dice, value: 0 };
    let mut done = Vec::new();
    for step in 0..steps {
        let operation = OPERATIONS[exercise.dice.below(OPERATIONS.len())];
        let (from, length) = (exercise.dice.below(PAGES * PAGE), 1 + exercise.dice.below(5 * PAGE));
        let to = (from + length).min(PAGES * PAGE);
        done.push(format!("{step}: {operation:?} {from}..{to} of {}", exercise.model.len()));
        let outcome = exercise.step(operation, from, to).and_then(|()| match step % 25 {
            24 => exercise.compare(),
            _ => exercise.size(),
        });
        if let Err(error) = outcome {
            let told = done[done.len().saturating_sub(TOLD)..].join("\n");
            return Err(format!("{error}, after\n{told}").into());
        }
    }
    exercise.compare()?;
    // For who looks at the file from the other side.
    println!("sum {:016x} of {}", sum(&exercise.model), exercise.model.len());
    Ok(())
}

/// FNV-1a.
pub(super) fn sum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

impl Exercise {
    /// Bytes that tell where they were written, and by which step.
    fn fresh(&mut self, from: usize, to: usize) -> Vec<u8> {
        self.value = self.value.wrapping_add(37) | 1;
        (from..to).map(|at| self.value ^ (at / 64).to_le_bytes()[0]).collect()
    }

    fn put(&mut self, from: usize, bytes: &[u8]) {
        let end = from + bytes.len();
        if self.model.len() < end {
            self.model.resize(end, 0);
        }
        self.model[from..end].copy_from_slice(bytes);
    }

    fn expect(&self, what: &str, from: usize, found: &[u8]) -> Outcome {
        let wanted = &self.model[from.min(self.model.len())..(from + found.len()).min(self.model.len())];
        check!(found.len() == wanted.len(), "{what}: {} bytes at {from}, not {}", found.len(), wanted.len());
        let wrong = found.iter().zip(wanted).position(|(found, wanted)| found != wanted);
        let Some(at) = wrong else { return Ok(()) };
        Err(format!("{what}: {:#x} at {}, not {:#x}", found[at], from + at, wanted[at]).into())
    }

    fn step(&mut self, operation: Operation, from: usize, to: usize) -> Outcome {
        let size = self.model.len();
        // Whole pages for what wants them.
        let (first, last) = (from / PAGE * PAGE, to.div_ceil(PAGE) * PAGE);
        match operation {
            Operation::Read => {
                let mut bytes = vec![0; to - from];
                let read = self.ways.plain.read_at(&mut bytes, from as u64)?;
                let wanted = size.saturating_sub(from).min(to - from);
                check!(read == wanted, "read {read} bytes of {wanted}");
                self.expect("read", from, &bytes[..read])?;
            }
            Operation::Write => {
                let bytes = self.fresh(from, to);
                self.ways.plain.write_all_at(&bytes, from as u64)?;
                self.put(from, &bytes);
            }
            Operation::ReadDirect => {
                let mut block = Aligned::new(last - first);
                let read = self.ways.direct.read_at(block.bytes_mut(), first as u64)?;
                let wanted = size.saturating_sub(first).min(last - first);
                check!(read == wanted, "read {read} bytes directly of {wanted}");
                self.expect("direct read", first, &block.bytes()[..read])?;
            }
            Operation::WriteDirect => {
                let bytes = self.fresh(first, last);
                let mut block = Aligned::new(last - first);
                block.bytes_mut().copy_from_slice(&bytes);
                self.ways.direct.write_all_at(block.bytes(), first as u64)?;
                self.put(first, &bytes);
            }
            Operation::Append if size + to - from <= PAGES * PAGE => {
                let bytes = self.fresh(size, size + to - from);
                self.ways.append.write_all(&bytes)?;
                self.put(size, &bytes);
            }
            Operation::ReadMapped | Operation::WriteMapped if first < size => {
                let end = last.min(size);
                let mut mapping = Mapping::shared(&self.ways.plain, first, end - first)?;
                self.expect("mapped", first, mapping.bytes())?;
                if operation == Operation::WriteMapped {
                    let (from, to) = (from.min(end - 1), to.min(end).max(from.min(end - 1) + 1));
                    let bytes = self.fresh(from, to);
                    mapping.bytes_mut()[from - first..to - first].copy_from_slice(&bytes);
                    self.put(from, &bytes);
                    if self.dice.below(2) == 0 {
                        mapping.sync()?;
                    }
                }
            }
            _ => self.reshape(operation, from, to)?,
        }
        Ok(())
    }

    /// Operations on more than a range's bytes.
    fn reshape(&mut self, operation: Operation, from: usize, to: usize) -> Outcome {
        let size = self.model.len();
        let (offset, length) = (i64::try_from(from)?, i64::try_from(to - from)?);
        match operation {
            Operation::Truncate => {
                self.ways.plain.set_len(from as u64)?;
                self.model.resize(from, 0);
            }
            Operation::Punch => {
                let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(&self.ways.plain, flags, offset, length)?;
                self.model[from.min(size)..to.min(size)].fill(0);
            }
            Operation::Allocate => {
                fallocate(&self.ways.plain, FallocateFlags::empty(), offset, length)?;
                self.model.resize(size.max(to), 0);
            }
            Operation::Copy if from + 2 * PAGE < size => {
                let count = (to - from).min(size - from).min(from.max(1));
                let (mut source, mut sink) = (offset, 0);
                while usize::try_from(sink)? < count {
                    let left = count - usize::try_from(sink)?;
                    let plain = &self.ways.plain;
                    let copied = copy_file_range(plain, Some(&mut source), plain, Some(&mut sink), left)?;
                    check!(copied > 0, "nothing was copied");
                }
                self.model.copy_within(from..from + count, 0);
            }
            Operation::Reopen => self.ways = Ways::open(&self.path)?,
            Operation::Sync => self.ways.plain.sync_all()?,
            _ => {}
        }
        Ok(())
    }

    fn size(&self) -> Outcome {
        let (open, named) = (self.ways.plain.metadata()?.len(), std::fs::metadata(&self.path)?.len());
        let size = self.model.len() as u64;
        check!(
            open == size && named == size,
            "its size is {open} where it is open, {named} by its name, not {size}"
        );
        Ok(())
    }

    fn compare(&self) -> Outcome {
        self.size()?;
        self.expect("all of it", 0, &std::fs::read(&self.path)?)
    }
}
