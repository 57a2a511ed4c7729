//! `quicksort:regions=…`: many sorts that take turns, as processes do that share a CPU.

use core::ptr::{read_volatile, write_volatile};

use crate::Workload;
use crate::cpu::{Cpu, Fault};
use crate::layout::{PAGE_SIZE, fault};
use crate::memory::Area;
use crate::page::{Stream, WORDS, check_record, load, mix, store, write_record};
use crate::platform;
use crate::spec::{MAX_REGIONS, Spec};

/// The regions of a CPU. Each is shuffled, sorted and checked, again and again; after every `slice`
/// the next region has its turn.
///
/// A region's first page holds the process: a record whose generation is the number of its slices,
/// the sum of all elements as the fourth word, which never changes, and a [`Process`]. The elements
/// are in the pages after it.
pub struct Sorters {
    part: Area,
    region_pages: u64,
    regions: u64,
    /// The number of slices that each region has had.
    slices: [u32; MAX_REGIONS as usize],
    current: u64,
    /// The process whose turn it is, and the end of its slice.
    running: Option<(Process, u64)>,
    slice: u64,
}

/// The offset of the process in its page.
const PROCESS: u64 = 64;

/// The progress of a sort. Between slices it is stored in its region, so that it is migrated with
/// the memory.
#[repr(C)]
#[derive(Clone, Copy)]
struct Process {
    /// [`SHUFFLE`], [`SORT`] or [`CHECK`].
    phase: usize,
    /// The number of elements that this phase has processed (shuffle, check).
    at: usize,
    /// Their sum and the last of them (check).
    sum: u64,
    last: u64,
    /// The current partition, if `busy` is set (sort).
    busy: usize,
    start: usize,
    end: usize,
    low: usize,
    high: usize,
    pivot: u64,
    /// The parts still to be sorted. The smaller of two comes first, so each is at most half as
    /// long as the one below it.
    depth: usize,
    stack: [[usize; 2]; 64],
    /// The checksum over all words before it.
    checksum: u64,
}

const SHUFFLE: usize = 0;
const SORT: usize = 1;
const CHECK: usize = 2;

/// Parts of at most this length are sorted by insertion.
const SMALL: usize = 16;
/// The number of elements between two beats if they are consecutive; others count as several.
const ELEMENTS: usize = 256;
/// The number of beats in an operation, which thus is the processing of a thousand elements.
const BEATS: usize = 4;

impl Process {
    const NEW: Process = Process {
        phase: SHUFFLE,
        at: 0,
        sum: 0,
        last: 0,
        busy: 0,
        start: 0,
        end: 0,
        low: 0,
        high: 0,
        pivot: 0,
        depth: 0,
        stack: [[0; 2]; 64],
        checksum: 0,
    };

    fn sum(&self) -> u64 {
        let words = (&raw const *self).cast::<u64>();
        let count = size_of::<Process>() / 8 - 1;
        // SAFETY: a process consists of words without gaps.
        (0..count).fold(0, |sum, n| mix(unsafe { words.add(n).read() }, sum))
    }

    fn save(&mut self, address: u64) {
        self.checksum = self.sum();
        // SAFETY: the process is within the region's first page, which belongs to this CPU.
        unsafe { write_volatile((address + PROCESS) as *mut Process, *self) }
    }

    /// Loads a process. If its checksum is wrong, reports a fault and starts the process anew,
    /// because its other words cannot be trusted.
    fn load(cpu: &mut Cpu, address: u64) -> Process {
        // SAFETY: as in `save`; every bit pattern is a valid process.
        let process = unsafe { read_volatile((address + PROCESS) as *const Process) };
        let (expected, found) = (process.sum(), process.checksum);
        if expected == found {
            return process;
        }
        cpu.fail(Fault { kind: fault::CHECKSUM, address: address + PROCESS, expected, found });
        Process::NEW
    }

    /// Does a part of a phase. Returns true at the end of the phase.
    fn advance(&mut self, cpu: &mut Cpu, all: &mut [u64], address: u64) -> bool {
        match self.phase {
            SHUFFLE => self.shuffle(cpu, all),
            SORT => self.sort(cpu, all),
            _ => self.check(cpu, all, address),
        }
    }

    /// Changes to the next phase.
    fn turn(&mut self, elements: usize) {
        let phase = (self.phase + 1) % 3;
        *self = Process { phase, ..Process::NEW };
        if phase == SORT {
            self.depth = 1;
            self.stack[0] = [0, elements];
        }
    }

    /// Shuffles by the method of Fisher and Yates.
    fn shuffle(&mut self, cpu: &mut Cpu, all: &mut [u64]) -> bool {
        let end = (self.at + ELEMENTS).min(all.len());
        while self.at < end {
            all.swap(self.at, cpu.random_below(self.at as u64 + 1) as usize);
            self.at += 1;
            // Each element may be in a page that has to be fetched.
            if self.at % 16 == 0 {
                cpu.beat();
            }
        }
        end == all.len()
    }

    fn sort(&mut self, cpu: &mut Cpu, all: &mut [u64]) -> bool {
        let mut left = ELEMENTS;
        while left > 0 {
            if self.busy == 0 {
                if self.depth == 0 {
                    return true;
                }
                self.depth -= 1;
                let [start, end] = self.stack[self.depth];
                if end - start <= SMALL {
                    insert(&mut all[start..end]);
                    left = left.saturating_sub(2 * SMALL);
                    continue;
                }
                let (first, middle, last) = (all[start], all[start + (end - start) / 2], all[end - 1]);
                let pivot = first.min(middle).max(first.max(middle).min(last));
                let stack = self.stack;
                *self = Process { busy: 1, start, end, low: start, high: end - 1, pivot, stack, ..*self };
            }
            left -= 1;
            // One step of Hoare's partition: everything below `low` is at most the pivot,
            // everything above `high` at least.
            let (low, high) = (self.low, self.high);
            if low <= high && all[low] < self.pivot {
                self.low += 1;
            } else if low <= high && high > self.start && all[high] > self.pivot {
                self.high -= 1;
            } else if low < high {
                all.swap(low, high);
                (self.low, self.high) = (low + 1, high - 1);
            } else {
                self.split();
            }
        }
        false
    }

    /// Ends a partition. Neither part is empty, even if memory is corrupt, so that every sort ends.
    fn split(&mut self) {
        let cut = (self.high + 1).clamp(self.start + 1, self.end - 1);
        let (left, right) = ([self.start, cut], [cut, self.end]);
        let parts = if cut - self.start > self.end - cut { [left, right] } else { [right, left] };
        self.stack[self.depth..self.depth + 2].copy_from_slice(&parts);
        self.depth += 2;
        self.busy = 0;
    }

    fn check(&mut self, cpu: &mut Cpu, all: &[u64], address: u64) -> bool {
        let end = (self.at + ELEMENTS).min(all.len());
        for (n, &element) in all[self.at..end].iter().enumerate() {
            if element < self.last {
                let place = &raw const all[self.at + n] as u64;
                cpu.fail(Fault { kind: fault::ORDER, address: place, expected: self.last, found: element });
            }
            self.last = element;
            self.sum = self.sum.wrapping_add(element);
        }
        self.at = end;
        if end == all.len() {
            check_sum(cpu, address, self.sum);
        }
        end == all.len()
    }
}

/// Sorts a part by insertion.
fn insert(part: &mut [u64]) {
    for n in 1..part.len() {
        let mut at = n;
        while at > 0 && part[at - 1] > part[at] {
            part.swap(at - 1, at);
            at -= 1;
        }
    }
}

/// Checks the sum of a region's elements against the one on its first page.
fn check_sum(cpu: &mut Cpu, address: u64, found: u64) {
    let expected = load(address + 24);
    if found != expected {
        cpu.fail(Fault { kind: fault::ORDER, address, expected, found });
    }
}

impl Sorters {
    /// Returns the address of a region's first page and its elements, or `None` if it crosses the
    /// end of a piece of RAM.
    fn region(&self, region: u64) -> Option<(u64, &'static mut [u64])> {
        let first = region * self.region_pages;
        let address = self.part.address(first);
        let beyond = self.region_pages - 1;
        if self.part.address(first + beyond) != address + beyond * PAGE_SIZE {
            return None;
        }
        let (start, count) = ((address + PAGE_SIZE) as *mut u64, beyond as usize * WORDS);
        // SAFETY: these consecutive pages belong to this CPU, and only one region is borrowed at a
        // time.
        Some((address, unsafe { core::slice::from_raw_parts_mut(start, count) }))
    }

    /// Saves the process whose turn it is in its region.
    fn rest(&mut self, address: u64) {
        if let Some((mut process, _)) = self.running.take() {
            process.save(address);
            let slices = &mut self.slices[self.current as usize];
            *slices += 1;
            write_record(address, u64::from(*slices));
        }
    }
}

impl Workload for Sorters {
    fn prepare(cpu: &mut Cpu, part: Area, spec: &Spec<'_>) -> Self {
        let (wanted, index, count) = (spec.value("regions"), cpu.index as u64, cpu.count as u64);
        // A CPU without a region would have nothing to do.
        let own = (wanted * (index + 1) / count - wanted * index / count).clamp(1, MAX_REGIONS);
        let region_pages = (part.pages() / own).max(2);
        let regions = own.min(part.pages() / region_pages);
        let slices = [0; MAX_REGIONS as usize];
        let slice = platform::ticks(spec.value("slice"));
        let sorters = Sorters { part, region_pages, regions, slices, current: 0, running: None, slice };
        for region in 0..regions {
            let Some((address, elements)) = sorters.region(region) else { continue };
            let mut stream = Stream::new(mix(address, spec.value("seed")));
            let mut sum = 0u64;
            for (n, chunk) in elements.chunks_mut(8).enumerate() {
                for (element, value) in chunk.iter_mut().zip(stream.step()) {
                    *element = value;
                    sum = sum.wrapping_add(value);
                }
                if n % (ELEMENTS / 8) == 0 {
                    cpu.beat();
                }
            }
            store(address + 24, sum);
            let mut process = Process::NEW;
            process.save(address);
            write_record(address, 0);
        }
        sorters
    }

    fn step(&mut self, cpu: &mut Cpu) {
        if let Some((address, elements)) = self.region(self.current) {
            let slices = u64::from(self.slices[self.current as usize]);
            let (process, end) = self.running.get_or_insert_with(|| {
                cpu.check(check_record(address, slices));
                (Process::load(cpu, address), cpu.beat().saturating_add(self.slice))
            });
            for _ in 0..BEATS {
                if process.advance(cpu, elements, address) {
                    process.turn(elements.len());
                }
                cpu.beat();
            }
            cpu.done(1);
            if cpu.beat() < *end {
                return;
            }
            self.rest(address);
        }
        self.current = (self.current + 1) % self.regions;
    }

    fn finish(&mut self, cpu: &mut Cpu) {
        if let Some((address, _)) = self.region(self.current) {
            self.rest(address);
        }
        for region in 0..self.regions {
            let Some((address, elements)) = self.region(region) else { continue };
            cpu.check(check_record(address, self.slices[region as usize].into()));
            Process::load(cpu, address);
            let mut sum = 0u64;
            for chunk in elements.chunks(ELEMENTS) {
                sum = chunk.iter().fold(sum, |sum, element| sum.wrapping_add(*element));
                cpu.beat();
            }
            check_sum(cpu, address, sum);
        }
    }
}
