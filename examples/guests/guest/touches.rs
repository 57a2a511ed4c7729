//! Workloads that touch a few bytes of one page after the other and measure how long each access
//! takes. They show what a guest sees while its memory is fetched on demand.

use crate::Workload;
use crate::cpu::{Barrier, Cpu, Fault};
use crate::layout::{MAX_CPUS, fault};
use crate::memory::Area;
use crate::page::{Ledger, check, check_record, check_whole, load, mix, store, write_record, write_whole};
use crate::platform;
use crate::spec::Spec;
use crate::writers::{BATCH, Sequence};

/// Returns whether the key `mode` is `write`.
fn writes(spec: &Spec<'_>) -> bool {
    spec.value("mode") == 1
}

/// `sequential`: pages in address order.
pub struct Sequential {
    sequence: Sequence,
    seed: u64,
    write: bool,
}

impl Sequential {
    /// Pages that are only read keep their first generation.
    fn generation(&self, pass: u64) -> u64 {
        if self.write { pass } else { 0 }
    }
}

impl Workload for Sequential {
    const MEASURES: bool = true;

    fn prepare(cpu: &mut Cpu, part: Area, spec: &Spec<'_>) -> Self {
        let touch = Sequential { sequence: Sequence::in_order(part), seed: spec.value("seed"), write: writes(spec) };
        touch.sequence.fill(cpu, touch.seed);
        touch
    }

    fn step(&mut self, cpu: &mut Cpu) {
        let mut at = platform::now();
        for _ in 0..BATCH {
            let (address, pass) = self.sequence.next();
            cpu.check(check_record(address, self.generation(pass)));
            if self.write {
                write_record(address, pass + 1);
            }
            at = cpu.access(at);
        }
        cpu.done(BATCH);
    }

    fn finish(&mut self, cpu: &mut Cpu) {
        self.sequence.each(cpu, |address, pass| check_whole(address, self.generation(pass), 0, self.seed));
    }
}

/// `random`: any page of the CPU's part.
pub struct Random {
    part: Area,
    pages: u64,
    ledger: Ledger,
    seed: u64,
    write: bool,
}

impl Workload for Random {
    const MEASURES: bool = true;

    fn prepare(cpu: &mut Cpu, mut part: Area, spec: &Spec<'_>) -> Self {
        let ledger = Ledger::take(&mut part);
        let seed = spec.value("seed");
        Sequence::in_order(part).fill(cpu, seed);
        Random { part, pages: part.pages(), ledger, seed, write: writes(spec) }
    }

    fn step(&mut self, cpu: &mut Cpu) {
        let mut at = platform::now();
        for _ in 0..BATCH {
            let page = cpu.random_below(self.pages);
            let address = self.part.address(page);
            // The ledger's page may have to be fetched, too, so it is an access of its own.
            let generation = self.ledger.read(page);
            at = cpu.access(at);
            cpu.check(check_record(address, generation.into()));
            if self.write {
                let generation = generation.wrapping_add(1);
                self.ledger.write(page, generation);
                write_record(address, generation.into());
            }
            at = cpu.access(at);
        }
        cpu.done(BATCH);
    }

    fn finish(&mut self, cpu: &mut Cpu) {
        for page in 0..self.pages {
            cpu.check(check_whole(self.part.address(page), self.ledger.read(page).into(), 0, self.seed));
            cpu.beat();
        }
    }
}

/// `storm`: any page, and all CPUs use the same pages, so that several may need a page at the same
/// time.
///
/// After its record, which does not change, a page has a word for each CPU, in a cache line of its
/// own. The ledger has what the CPU wrote there last. This detects a page that arrives a second
/// time and overwrites a newer value.
pub struct Storm {
    pages: Area,
    /// The pages that this CPU has filled, and checks at the end.
    own: Area,
    ledger: Ledger,
    /// The offset of the CPU's word in each page.
    place: u64,
    seed: u64,
    write: bool,
}

/// Reached when no CPU writes any more.
static OVER: Barrier = Barrier::new();

impl Storm {
    /// The distance between the words of two CPUs; the first word has the same distance from the
    /// start of the page.
    const LINE: u64 = 64;
    /// The words of the record and of the CPUs; the page's content begins after them.
    const HEAD: usize = (MAX_CPUS + 1) * 8;

    /// Returns the value of the CPU's word after its n-th write.
    fn value(&self, address: u64, n: u32) -> u64 {
        if n == 0 { 0 } else { mix(address + self.place, n.into()) }
    }

    fn check(&self, address: u64, n: u32) -> Result<(), Fault> {
        check_record(address, 0)?;
        let (expected, found) = (self.value(address, n), load(address + self.place));
        if found == expected {
            return Ok(());
        }
        Err(Fault { kind: fault::STALE, address: address + self.place, expected, found })
    }
}

impl Workload for Storm {
    const MEASURES: bool = true;

    /// Returns the whole area for every CPU.
    fn part(area: &Area, _index: usize, _count: usize) -> Area {
        *area
    }

    fn prepare(cpu: &mut Cpu, mut pages: Area, spec: &Spec<'_>) -> Self {
        let ledgers = pages.take(cpu.count as u64 * pages.pages().div_ceil(Ledger::PER_PAGE));
        let ledger = Ledger::over(ledgers.part(cpu.index, cpu.count));
        let own = pages.part(cpu.index, cpu.count);
        let seed = spec.value("seed");
        for page in 0..own.pages() {
            let address = own.address(page);
            write_whole(address, 0, seed);
            (1..=MAX_CPUS as u64).for_each(|line| store(address + line * Self::LINE, 0));
            cpu.beat();
        }
        let place = (cpu.index as u64 + 1) * Self::LINE;
        Storm { pages, own, ledger, place, seed, write: writes(spec) }
    }

    fn step(&mut self, cpu: &mut Cpu) {
        let pages = self.pages.pages();
        let mut at = platform::now();
        for _ in 0..BATCH {
            let page = cpu.random_below(pages);
            let address = self.pages.address(page);
            let n = self.ledger.read(page);
            at = cpu.access(at);
            cpu.check(self.check(address, n));
            if self.write {
                let n = n.wrapping_add(1);
                self.ledger.write(page, n);
                store(address + self.place, self.value(address, n));
            }
            at = cpu.access(at);
        }
        cpu.done(BATCH);
    }

    fn finish(&mut self, cpu: &mut Cpu) {
        for page in 0..self.pages.pages() {
            cpu.check(self.check(self.pages.address(page), self.ledger.read(page)));
            cpu.beat();
        }
        // The check covers a whole page, so no CPU may write any more.
        OVER.wait(cpu);
        for page in 0..self.own.pages() {
            let address = self.own.address(page);
            cpu.check(check(address, mix(mix(address, 0), self.seed), Self::HEAD));
            cpu.beat();
        }
    }
}
