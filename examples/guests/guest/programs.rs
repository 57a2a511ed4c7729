//! Workloads that resemble programs: a sort, a key-value table, a log, and a mixture of zero,
//! shared and unique pages.

use crate::Workload;
use crate::cpu::{Cpu, Fault};
use crate::layout::{PAGE_SIZE, fault};
use crate::memory::Area;
use crate::page::{
    Ledger, RECORD_WORDS, Stream, WORDS, check, check_record, check_whole, fill, load, mix, store, write_record,
    write_whole,
};
use crate::platform;
use crate::spec::Spec;
use crate::writers::Pacer;

/// `quicksort`: each segment in turn is checked (the last pass sorted it), filled again, and
/// sorted.
///
/// A segment begins with a page record. The fourth word is the sum of all elements, which are the
/// words after it.
pub struct Quicksort {
    part: Area,
    segment_pages: u64,
    segments: u64,
    next: u64,
    pass: u64,
    seed: u64,
}

/// The number of elements that are processed between two beats: this takes some microseconds.
const ELEMENTS: usize = 1024;

impl Quicksort {
    /// Returns the address and the elements of a segment, or `None` if it crosses the end of a
    /// piece of RAM.
    fn elements(&self, segment: u64) -> Option<(u64, &'static mut [u64])> {
        let first = segment * self.segment_pages;
        let address = self.part.address(first);
        if self.part.address(first + self.segment_pages - 1) != address + (self.segment_pages - 1) * PAGE_SIZE {
            return None;
        }
        let count = self.segment_pages as usize * WORDS - RECORD_WORDS;
        // SAFETY: these consecutive pages belong to this CPU, and only one segment is borrowed at a
        // time.
        Some((address, unsafe { core::slice::from_raw_parts_mut((address as *mut u64).add(RECORD_WORDS), count) }))
    }

    /// Checks that a segment is sorted and has the sum in its record.
    fn check(cpu: &mut Cpu, address: u64, elements: &[u64]) {
        let (mut sum, mut last) = (0u64, 0);
        for (n, &element) in elements.iter().enumerate() {
            if element < last {
                let place = &raw const elements[n] as u64;
                cpu.fail(Fault { kind: fault::ORDER, address: place, expected: last, found: element });
                return;
            }
            sum = sum.wrapping_add(element);
            last = element;
            if n % ELEMENTS == 0 {
                cpu.beat();
            }
        }
        let expected = load(address + 24);
        if sum != expected {
            cpu.fail(Fault { kind: fault::ORDER, address, expected, found: sum });
        }
    }
}

impl Workload for Quicksort {
    fn prepare(cpu: &mut Cpu, part: Area, spec: &Spec<'_>) -> Self {
        let segment_pages = spec.value("segment").div_ceil(PAGE_SIZE).clamp(2, part.pages());
        let segments = part.pages() / segment_pages;
        let sort = Quicksort { part, segment_pages, segments, next: 0, pass: 0, seed: spec.value("seed") };
        for segment in 0..segments {
            // Zeros are sorted, and their sum is zero.
            if let Some((address, elements)) = sort.elements(segment) {
                elements.chunks_mut(ELEMENTS).for_each(|chunk| {
                    chunk.fill(0);
                    cpu.beat();
                });
                write_record(address, 0);
                store(address + 24, 0);
            }
        }
        sort
    }

    fn step(&mut self, cpu: &mut Cpu) {
        if let Some((address, elements)) = self.elements(self.next) {
            cpu.check(check_record(address, self.pass));
            Self::check(cpu, address, elements);
            let mut stream = Stream::new(mix(mix(address, self.pass), self.seed));
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
            sort(cpu, elements);
            Self::check(cpu, address, elements);
            write_record(address, self.pass + 1);
            cpu.done(1);
        }
        self.next += 1;
        if self.next == self.segments {
            self.next = 0;
            self.pass += 1;
        }
    }

    fn finish(&mut self, cpu: &mut Cpu) {
        for segment in 0..self.segments {
            if let Some((address, elements)) = self.elements(segment) {
                cpu.check(check_record(address, self.pass + u64::from(segment < self.next)));
                Self::check(cpu, address, elements);
            }
        }
    }
}

/// Sorts by quicksort with an explicit stack, with regular beats. The smaller half comes first, so
/// 64 entries are enough.
fn sort(cpu: &mut Cpu, all: &mut [u64]) {
    let mut stack = [(0usize, 0usize); 64];
    let mut depth = 1;
    stack[0] = (0, all.len());
    while depth > 0 {
        depth -= 1;
        let (start, end) = stack[depth];
        let slice = &mut all[start..end];
        if slice.len() <= 16 {
            for n in 1..slice.len() {
                let mut at = n;
                while at > 0 && slice[at - 1] > slice[at] {
                    slice.swap(at - 1, at);
                    at -= 1;
                }
            }
            continue;
        }
        cpu.beat();
        let (first, middle, last) = (slice[0], slice[slice.len() / 2], slice[slice.len() - 1]);
        let pivot = first.min(middle).max(first.max(middle).min(last));
        // Hoare's partition: everything below `low` is at most the pivot, everything above `high`
        // at least.
        let (mut low, mut high) = (0usize, slice.len() - 1);
        let mut swaps = 0usize;
        loop {
            while slice[low] < pivot {
                low += 1;
            }
            while slice[high] > pivot {
                high -= 1;
            }
            if low >= high {
                break;
            }
            slice.swap(low, high);
            low += 1;
            high -= 1;
            swaps += 1;
            if swaps.is_multiple_of(ELEMENTS / 4) {
                cpu.beat();
            }
        }
        let cut = start + high + 1;
        let (left, right) = ((start, cut), (cut, end));
        let (large, small) = if cut - start > end - cut { (left, right) } else { (right, left) };
        stack[depth] = large;
        stack[depth + 1] = small;
        depth += 2;
    }
}

/// `kv`: a table of entries of 128 bytes; a page has 31 of them after its record. Key `k` is entry
/// `k`, so the queried range of keys is also a range of pages. It grows by a tenth of the table at
/// every `step`.
///
/// An entry is a key, a version, a checksum and a value that follows from them. The page's
/// generation counts the writes to it.
pub struct KeyValue {
    part: Area,
    ledger: Ledger,
    keys: u64,
    seed: u64,
    set: u64,
    start: u64,
    step_ticks: u64,
}

const ENTRY: u64 = 128;
const ENTRIES: u64 = PAGE_SIZE / ENTRY - 1;
/// The words of an entry before its value.
const ENTRY_HEADER: u64 = 3;

impl KeyValue {
    fn write(&self, address: u64, key: u64, version: u64) {
        let sum = mix(mix(key, version), self.seed);
        store(address, key);
        store(address + 8, version);
        store(address + 16, sum);
        let mut value = sum;
        for word in ENTRY_HEADER..ENTRY / 8 {
            value = next_word(value);
            store(address + 8 * word, value);
        }
    }

    /// Checks an entry and returns its version.
    fn read(&self, address: u64, key: u64) -> Result<u64, Fault> {
        let fault = |kind, expected, found| Err(Fault { kind, address, expected, found });
        let (found, version, found_sum) = (load(address), load(address + 8), load(address + 16));
        if found != key {
            return fault(fault::MISPLACED, key, found);
        }
        let sum = mix(mix(key, version), self.seed);
        if sum != found_sum {
            return fault(fault::CHECKSUM, sum, found_sum);
        }
        let mut value = sum;
        for word in ENTRY_HEADER..ENTRY / 8 {
            value = next_word(value);
            let found = load(address + 8 * word);
            if found != value {
                return fault(fault::CONTENT, value, found);
            }
        }
        Ok(version)
    }

    /// Returns the address of a key's page, its index in the ledger, and the address of the key's
    /// entry.
    fn place(&self, key: u64) -> (u64, u64, u64) {
        let page = key / ENTRIES;
        let address = self.part.address(page);
        (address, page, address + (1 + key % ENTRIES) * ENTRY)
    }
}

/// Advances a single xorshift generator.
fn next_word(mut word: u64) -> u64 {
    word ^= word << 13;
    word ^= word >> 7;
    word ^ word << 17
}

impl Workload for KeyValue {
    fn prepare(cpu: &mut Cpu, mut part: Area, spec: &Spec<'_>) -> Self {
        let ledger = Ledger::take(&mut part);
        let table = KeyValue {
            part,
            ledger,
            keys: part.pages() * ENTRIES,
            seed: spec.value("seed"),
            set: spec.value("set"),
            start: 0,
            step_ticks: platform::ticks(spec.value("step").max(1)),
        };
        for page in 0..part.pages() {
            let address = part.address(page);
            write_record(address, 0);
            for key in page * ENTRIES..(page + 1) * ENTRIES {
                table.write(table.place(key).2, key, 0);
            }
            cpu.beat();
        }
        table
    }

    fn step(&mut self, cpu: &mut Cpu) {
        const QUERIES: u64 = 8;
        let now = cpu.beat();
        if self.start == 0 {
            self.start = now;
        }
        let tenths = (now.saturating_sub(self.start) / self.step_ticks + 1).min(10);
        let range = self.keys * tenths / 10;
        for _ in 0..QUERIES {
            let key = cpu.random_below(range);
            let (page, index, entry) = self.place(key);
            let generation = self.ledger.read(index);
            cpu.check(check_record(page, generation.into()));
            let version = match self.read(entry, key) {
                Ok(version) => version,
                Err(what) => {
                    cpu.fail(what);
                    0
                }
            };
            if cpu.random_below(100) < self.set {
                self.write(entry, key, version + 1);
                let generation = generation.wrapping_add(1);
                self.ledger.write(index, generation);
                write_record(page, generation.into());
            }
        }
        cpu.done(QUERIES);
    }

    fn finish(&mut self, cpu: &mut Cpu) {
        for key in 0..self.keys {
            let (page, index, entry) = self.place(key);
            if key % ENTRIES == 0 {
                cpu.check(check_record(page, self.ledger.read(index).into()));
                cpu.beat();
            }
            cpu.check(self.read(entry, key).map(|_| ()));
        }
    }
}

/// `log`: records of 512 bytes, which are appended in a ring; some of them are updated later.
///
/// A record is an address, a sequence number, a version, a checksum, and a payload that follows
/// from them. The ledger has a sum over the sequence numbers and versions in a page. It detects an
/// old copy of the page, whose records are all valid.
pub struct Log {
    part: Area,
    ledger: Ledger,
    records: u64,
    next: u64,
    sequence: u64,
    update: u64,
    seed: u64,
}

const LOG_RECORD: u64 = 512;
const LOG_RECORDS: u64 = PAGE_SIZE / LOG_RECORD;
/// The index of the payload's first word; the words between the header and it stay 0.
const PAYLOAD: u64 = 8;

impl Log {
    fn address(&self, record: u64) -> u64 {
        self.part.address(record / LOG_RECORDS) + record % LOG_RECORDS * LOG_RECORD
    }

    fn write(&self, address: u64, sequence: u64, version: u64) {
        let sum = mix(mix(address, sequence), mix(version, self.seed));
        store(address, address);
        store(address + 8, sequence);
        store(address + 16, version);
        store(address + 24, sum);
        let mut stream = Stream::new(sum);
        for at in (PAYLOAD..LOG_RECORD / 8).step_by(8) {
            for (n, word) in (0..).zip(stream.step()) {
                store(address + 8 * (at + n), word);
            }
        }
    }

    /// Checks a record and returns its sequence number and version.
    fn read(&self, address: u64) -> Result<(u64, u64), Fault> {
        let fault = |kind, expected, found| Err(Fault { kind, address, expected, found });
        let (found, sequence, version, found_sum) =
            (load(address), load(address + 8), load(address + 16), load(address + 24));
        if found != address {
            return fault(fault::MISPLACED, address, found);
        }
        let sum = mix(mix(address, sequence), mix(version, self.seed));
        if sum != found_sum {
            return fault(fault::CHECKSUM, sum, found_sum);
        }
        let mut stream = Stream::new(sum);
        for at in (PAYLOAD..LOG_RECORD / 8).step_by(8) {
            for (n, word) in (0..).zip(stream.step()) {
                let found = load(address + 8 * (at + n));
                if found != word {
                    return fault(fault::CONTENT, word, found);
                }
            }
        }
        Ok((sequence, version))
    }

    fn digest(sequence: u64, version: u64) -> u32 {
        mix(sequence, version) as u32
    }

    /// Checks a page's sum against the ledger.
    fn check_page(&self, page: u64) -> Result<(), Fault> {
        let address = self.part.address(page);
        let sum = (0..LOG_RECORDS).fold(0u32, |sum, n| {
            let record = address + n * LOG_RECORD;
            sum.wrapping_add(Self::digest(load(record + 8), load(record + 16)))
        });
        let expected = self.ledger.read(page);
        if sum == expected {
            return Ok(());
        }
        Err(Fault { kind: fault::STALE, address, expected: expected.into(), found: sum.into() })
    }

    fn replace(&self, cpu: &mut Cpu, record: u64, new: impl FnOnce(u64, u64) -> (u64, u64)) {
        let (page, address) = (record / LOG_RECORDS, self.address(record));
        cpu.check(self.check_page(page));
        let (sequence, version) = match self.read(address) {
            Ok(both) => both,
            Err(what) => {
                cpu.fail(what);
                (load(address + 8), load(address + 16))
            }
        };
        let (next_sequence, next_version) = new(sequence, version);
        let sum = self.ledger.read(page).wrapping_sub(Self::digest(sequence, version));
        self.ledger.write(page, sum.wrapping_add(Self::digest(next_sequence, next_version)));
        self.write(address, next_sequence, next_version);
    }
}

impl Workload for Log {
    fn prepare(cpu: &mut Cpu, mut part: Area, spec: &Spec<'_>) -> Self {
        let ledger = Ledger::take(&mut part);
        let records = part.pages() * LOG_RECORDS;
        let log =
            Log { part, ledger, records, next: 0, sequence: 0, update: spec.value("update"), seed: spec.value("seed") };
        for page in 0..part.pages() {
            for n in 0..LOG_RECORDS {
                log.write(part.address(page) + n * LOG_RECORD, 0, 0);
            }
            ledger.write(page, Self::digest(0, 0).wrapping_mul(LOG_RECORDS as u32));
            cpu.beat();
        }
        log
    }

    fn step(&mut self, cpu: &mut Cpu) {
        const OPERATIONS: u64 = 4;
        for _ in 0..OPERATIONS {
            if cpu.random_below(100) < self.update {
                let record = cpu.random_below(self.records);
                self.replace(cpu, record, |sequence, version| (sequence, version + 1));
            } else {
                self.sequence += 1;
                let sequence = self.sequence;
                self.replace(cpu, self.next, |_, _| (sequence, 0));
                self.next = (self.next + 1) % self.records;
            }
        }
        cpu.done(OPERATIONS);
    }

    fn finish(&mut self, cpu: &mut Cpu) {
        for record in 0..self.records {
            if record % LOG_RECORDS == 0 {
                cpu.check(self.check_page(record / LOG_RECORDS));
                cpu.beat();
            }
            cpu.check(self.read(self.address(record)).map(|_| ()));
        }
    }
}

/// `mix`: memory as in many guests with the same system. Only unique pages are ever written.
pub struct Mix {
    part: Area,
    ledger: Ledger,
    pages: u64,
    /// The cumulative percentages of zero pages, shared pages and nearly shared pages.
    ends: [u64; 3],
    seed: u64,
    pacer: Pacer,
    cursor: u64,
    offset: u64,
}

/// The kind of a page.
enum Class {
    Zero,
    Shared,
    Near,
    Unique,
}

impl Mix {
    /// The words in which a nearly shared page differs: 128 bytes of 4096.
    const NEAR_WORDS: usize = 16;
    /// The seed of the pages that all guests share.
    const COMMON: u64 = 0x5ade_d000;

    fn class(&self, page: u64) -> Class {
        // 37 spreads the classes evenly over every hundred pages.
        match (page + self.offset) * 37 % 100 {
            n if n < self.ends[0] => Class::Zero,
            n if n < self.ends[1] => Class::Shared,
            n if n < self.ends[2] => Class::Near,
            _ => Class::Unique,
        }
    }

    /// Returns the seed of a shared page: the same in every guest, whatever its seed.
    fn shared(&self, page: u64) -> u64 {
        mix(Self::COMMON, page + self.offset)
    }

    fn check(&self, page: u64) -> Result<(), Fault> {
        let address = self.part.address(page);
        match self.class(page) {
            Class::Zero => {
                for word in 0..WORDS as u64 {
                    let (address, found) = (address + 8 * word, load(address + 8 * word));
                    if found != 0 {
                        return Err(Fault { kind: fault::CONTENT, address, expected: 0, found });
                    }
                }
                Ok(())
            }
            Class::Shared => check(address, self.shared(page), 0),
            Class::Near => {
                for word in 0..Self::NEAR_WORDS as u64 {
                    let (expected, found) = (mix(address + 8 * word, self.seed), load(address + 8 * word));
                    if found != expected {
                        return Err(Fault { kind: fault::CONTENT, address: address + 8 * word, expected, found });
                    }
                }
                check(address, self.shared(page), Self::NEAR_WORDS)
            }
            Class::Unique => check_whole(address, self.ledger.read(page).into(), 0, self.seed),
        }
    }
}

impl Workload for Mix {
    fn timer_hz(spec: &Spec<'_>) -> Option<u64> {
        (spec.value("spin") == 0).then_some(Pacer::TIMER_HZ)
    }

    fn prepare(cpu: &mut Cpu, mut part: Area, spec: &Spec<'_>) -> Self {
        let ledger = Ledger::take(&mut part);
        let mut end = 0;
        let ends = ["zero", "shared", "near"].map(|name| {
            end += spec.value(name);
            end
        });
        let pages = part.pages();
        // The pages of each CPU differ from those of the other CPUs, but are the same as those of
        // this CPU in another guest.
        let offset = pages * 2 * cpu.index as u64;
        let seed = spec.value("seed");
        let mix_ = Mix { part, ledger, pages, ends, seed, pacer: Pacer::new(cpu, spec), cursor: 0, offset };
        for page in 0..pages {
            let address = part.address(page);
            match mix_.class(page) {
                Class::Zero => {} // RAM begins as zeros.
                Class::Shared => fill(address, mix_.shared(page)),
                Class::Near => {
                    fill(address, mix_.shared(page));
                    (0..Self::NEAR_WORDS as u64)
                        .for_each(|word| store(address + 8 * word, mix(address + 8 * word, seed)));
                }
                Class::Unique => write_whole(address, 0, seed),
            }
            cpu.beat();
        }
        mix_
    }

    fn step(&mut self, cpu: &mut Cpu) {
        // Each step reads one page: at the timer's pace, a thousand per second.
        cpu.check(self.check(self.cursor));
        self.cursor = (self.cursor + 1) % self.pages;
        let due = self.pacer.due(cpu);
        for _ in 0..due {
            // The search for a unique page ends after 64 tries, as a guest may have few or none.
            let mut tries = (0..64).map(|_| cpu.random_below(self.pages));
            let Some(page) = tries.find(|page| matches!(self.class(*page), Class::Unique)) else { continue };
            let address = self.part.address(page);
            let generation = self.ledger.read(page);
            cpu.check(check_record(address, generation.into()));
            self.ledger.write(page, generation.wrapping_add(1));
            write_record(address, generation.wrapping_add(1).into());
            cpu.done(1);
        }
    }

    fn finish(&mut self, cpu: &mut Cpu) {
        for page in 0..self.pages {
            cpu.check(self.check(page));
            cpu.beat();
        }
    }
}
