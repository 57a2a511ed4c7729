//! The plain workloads: they loop, sleep, or go through pages in some order. `touches.rs` has those
//! that measure accesses, `programs.rs` and `regions.rs` those that resemble a program.

use crate::Workload;
use crate::cpu::{Cpu, Fault};
use crate::layout::fault;
use crate::memory::Area;
use crate::page::{check, check_record, check_whole, fill, load, mix, write_record, write_whole};
use crate::platform;
use crate::spec::Spec;

/// The number of pages between two beats if only a record is written: about two microseconds of
/// cache misses.
pub const BATCH: u64 = 8;

/// `idle`: a busy loop.
pub struct Idle;

impl Workload for Idle {
    fn prepare(_cpu: &mut Cpu, _part: Area, _spec: &Spec<'_>) -> Self {
        Idle
    }

    fn step(&mut self, cpu: &mut Cpu) {
        for _ in 0..16 {
            core::hint::spin_loop();
        }
        cpu.done(1);
    }
}

/// `sleep`: wakes at each tick.
pub struct Sleep;

impl Workload for Sleep {
    fn timer_hz(spec: &Spec<'_>) -> Option<u64> {
        Some(spec.value("hz"))
    }

    fn prepare(_cpu: &mut Cpu, _part: Area, _spec: &Spec<'_>) -> Self {
        Sleep
    }

    fn step(&mut self, cpu: &mut Cpu) {
        platform::halt();
        cpu.done(1);
    }
}

/// Pages that are written repeatedly, in an order that tells which generation each must have: in
/// pass `n`, a page has generation `n` until its turn, and `n + 1` after it.
pub struct Sequence {
    part: Area,
    pages: u64,
    /// The distance between two consecutive pages, coprime to the number of pages.
    stride: u64,
    /// The page whose turn it is, and the number of pages written in this pass.
    page: u64,
    turn: u64,
    pass: u64,
}

impl Sequence {
    /// Returns a sequence in address order.
    pub fn in_order(part: Area) -> Sequence {
        Sequence { part, pages: part.pages(), stride: 1, page: 0, turn: 0, pass: 0 }
    }

    /// Returns a sequence in which consecutive pages are not neighbours in memory.
    pub fn spread(part: Area) -> Sequence {
        let pages = part.pages();
        let mut stride = 1_000_003 % pages.max(1);
        while gcd(stride, pages) != 1 {
            stride += 1;
        }
        Sequence { stride, ..Sequence::in_order(part) }
    }

    /// Advances, and returns the address of the page whose turn it was and the generation that it
    /// must have. The caller writes the next generation.
    #[inline(always)]
    pub fn next(&mut self) -> (u64, u64) {
        let result = (self.part.address(self.page), self.pass);
        self.page += self.stride;
        if self.page >= self.pages {
            self.page %= self.pages;
        }
        self.turn += 1;
        if self.turn == self.pages {
            (self.turn, self.page) = (0, 0);
            self.pass += 1;
        }
        result
    }

    /// Writes every page as a whole, with generation 0.
    pub fn fill(&self, cpu: &mut Cpu, seed: u64) {
        for page in 0..self.pages {
            write_whole(self.part.address(page), 0, seed);
            cpu.beat();
        }
    }

    /// Calls a check with the address and generation of every page, in the order of writing.
    pub fn each(&self, cpu: &mut Cpu, mut check: impl FnMut(u64, u64) -> Result<(), Fault>) {
        let mut all = Sequence { pass: 0, turn: 0, page: 0, ..*self };
        for turn in 0..self.pages {
            let (address, _) = all.next();
            cpu.check(check(address, self.pass + u64::from(turn < self.turn)));
            cpu.beat();
        }
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// `one-edge`: QEMU's migration test, which increments the first byte of each page, in order.
pub struct OneEdge {
    sequence: Sequence,
    seed: u64,
}

impl OneEdge {
    fn check(address: u64, pass: u64) -> Result<(), Fault> {
        match (load(address), pass & 0xff) {
            (found, expected) if found == expected => Ok(()),
            (found, expected) => Err(Fault { kind: fault::STALE, address, expected, found }),
        }
    }
}

impl Workload for OneEdge {
    fn prepare(cpu: &mut Cpu, part: Area, spec: &Spec<'_>) -> Self {
        let seed = spec.value("seed");
        for page in 0..part.pages() {
            let address = part.address(page);
            fill(address, mix(address, seed));
            crate::page::store(address, 0);
            cpu.beat();
        }
        OneEdge { sequence: Sequence::in_order(part), seed }
    }

    fn step(&mut self, cpu: &mut Cpu) {
        for _ in 0..BATCH {
            let (address, pass) = self.sequence.next();
            cpu.check(Self::check(address, pass));
            // Only the byte is written, so that an error in the rest of the word is kept.
            // SAFETY: this is a page of this CPU's part.
            unsafe { (address as *mut u8).write_volatile((pass + 1) as u8) };
        }
        cpu.done(BATCH);
    }

    fn finish(&mut self, cpu: &mut Cpu) {
        self.sequence.each(cpu, |address, pass| {
            Self::check(address, pass)?;
            check(address, mix(address, self.seed), 1)
        });
    }
}

/// `touch`: whole pages in address order.
pub struct Touch {
    sequence: Sequence,
    seed: u64,
    write: bool,
}

impl Workload for Touch {
    fn prepare(cpu: &mut Cpu, part: Area, spec: &Spec<'_>) -> Self {
        let touch =
            Touch { sequence: Sequence::in_order(part), seed: spec.value("seed"), write: spec.value("mode") == 1 };
        touch.sequence.fill(cpu, touch.seed);
        touch
    }

    fn step(&mut self, cpu: &mut Cpu) {
        let (address, pass) = self.sequence.next();
        let generation = if self.write { pass } else { 0 };
        cpu.check(check_whole(address, generation, generation, self.seed));
        if self.write {
            write_whole(address, generation + 1, self.seed);
        }
        cpu.done(1);
    }

    fn finish(&mut self, cpu: &mut Cpu) {
        self.sequence.each(cpu, |address, pass| {
            let generation = if self.write { pass } else { 0 };
            check_whole(address, generation, generation, self.seed)
        });
    }
}

/// Spreads operations over time.
pub struct Pacer {
    /// The ticks between two operations of this CPU.
    period: u64,
    /// The time at which the next operation is due.
    next: u64,
    spin: bool,
}

impl Pacer {
    /// The number of wake-ups per second while it sleeps.
    pub const TIMER_HZ: u64 = 1000;
    /// The largest number of operations between two beats.
    const BURST: u64 = 16;

    /// Returns a pacer for `pages` operations per second over all CPUs, none if it is 0.
    pub fn new(cpu: &Cpu, spec: &Spec<'_>) -> Pacer {
        let period =
            (platform::ticks(1_000_000) * cpu.count as u64).checked_div(spec.value("pages")).unwrap_or(u64::MAX);
        Pacer { period: period.max(1), next: platform::now(), spin: spec.value("spin") == 1 }
    }

    /// Returns the number of operations that are due now, at most [`Pacer::BURST`]. If none is due,
    /// waits and returns 0.
    pub fn due(&mut self, cpu: &mut Cpu) -> u64 {
        let now = cpu.beat();
        // Only 10 ms of a gap are made up for: a guest that was migrated should not continue with a
        // burst of writes.
        self.next = self.next.max(now.saturating_sub(platform::ticks(10_000)));
        if self.next <= now && self.period != u64::MAX {
            let due = ((now - self.next) / self.period + 1).min(Self::BURST);
            self.next += due * self.period;
            return due;
        }
        if self.spin {
            core::hint::spin_loop();
        } else {
            platform::halt();
        }
        0
    }
}

/// `rate`: writes a few bytes per page, in a given number of pages per second.
pub struct Rate {
    sequence: Sequence,
    seed: u64,
    pacer: Pacer,
}

impl Workload for Rate {
    fn timer_hz(spec: &Spec<'_>) -> Option<u64> {
        (spec.value("spin") == 0).then_some(Pacer::TIMER_HZ)
    }

    fn prepare(cpu: &mut Cpu, part: Area, spec: &Spec<'_>) -> Self {
        let seed = spec.value("seed");
        let sequence = Sequence::spread(part);
        sequence.fill(cpu, seed);
        Rate { sequence, seed, pacer: Pacer::new(cpu, spec) }
    }

    fn step(&mut self, cpu: &mut Cpu) {
        let due = self.pacer.due(cpu);
        for _ in 0..due {
            let (address, pass) = self.sequence.next();
            cpu.check(check_record(address, pass));
            write_record(address, pass + 1);
        }
        cpu.done(due);
    }

    fn finish(&mut self, cpu: &mut Cpu) {
        self.sequence.each(cpu, |address, pass| check_whole(address, pass, 0, self.seed));
    }
}

/// `hot`: the pages of a small area, in order and without pauses.
pub struct Hot {
    sequence: Sequence,
    seed: u64,
}

impl Workload for Hot {
    fn prepare(cpu: &mut Cpu, part: Area, spec: &Spec<'_>) -> Self {
        let hot = Hot { sequence: Sequence::in_order(part), seed: spec.value("seed") };
        hot.sequence.fill(cpu, hot.seed);
        hot
    }

    fn step(&mut self, cpu: &mut Cpu) {
        for _ in 0..BATCH {
            let (address, pass) = self.sequence.next();
            cpu.check(check_record(address, pass));
            write_record(address, pass + 1);
        }
        cpu.done(BATCH);
    }

    fn finish(&mut self, cpu: &mut Cpu) {
        self.sequence.each(cpu, |address, pass| check_whole(address, pass, 0, self.seed));
    }
}
