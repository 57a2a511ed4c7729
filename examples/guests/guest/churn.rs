//! `churn`: an allocator that allocates and frees pages all the time, and a balloon that takes the
//! free ones.
//!
//! The policy is dynamic self-ballooning (Hines, Deshpande and Gopalan): at every interval the
//! balloon is inflated to 95 % of all memory that is not in use. An allocation that finds no free
//! page deflates it by 128 pages; the balloon then keeps its size for 10 intervals.

use crate::Workload;
use crate::balloon;
use crate::cpu::{Cpu, count};
use crate::layout::{PAGE_SIZE, board};
use crate::memory::Area;
use crate::page::{Ledger, check_whole, write_whole};
use crate::platform;
use crate::spec::Spec;
use crate::writers::Pacer;

/// The percentage of the unused memory to which the balloon is inflated.
const INFLATE_TO: u64 = 95;
/// The number of pages by which the balloon is deflated when memory is short.
const DEFLATE_BY: u64 = 128;
/// The number of intervals for which the balloon then keeps its size.
const BACK_OFF: u64 = 10;
/// One of this many operations goes in the opposite direction, so that pages are allocated and
/// freed also while the number of pages in use grows or shrinks.
const CONTRARY: u64 = 4;
/// The number of pages, in the balloon or not, in one request to the host.
const DISCARD_BY: u64 = 512;
/// The number of pages between two beats: this takes some microseconds.
const SLICE: u64 = 64;

/// The state of `churn` on one CPU. The generation of a page in use is the number of times that it
/// was allocated.
pub struct Churn {
    part: Area,
    /// The numbers of all pages: first those in use, then the free ones with the one freed last
    /// first, then those in the balloon.
    order: Ledger,
    generations: Ledger,
    /// The number of pages in use.
    used: u64,
    /// The index in `order` at which the balloon begins.
    edge: u64,
    /// The number of pages in use that is approached next, between the two bounds.
    target: u64,
    bounds: (u64, u64),
    balloon: bool,
    discards: bool,
    /// The pages before this one have been discarded, if they were in the balloon at that time.
    discarded: u64,
    interval: u64,
    /// The time at which the next interval begins.
    next: u64,
    back_off: u64,
    seed: u64,
    pacer: Pacer,
}

impl Churn {
    fn page(&self, at: u64) -> u64 {
        self.order.read(at).into()
    }

    fn allocate(&mut self, cpu: &mut Cpu) {
        if self.used == self.edge {
            self.deflate();
        }
        if self.used == self.edge {
            return; // All is in use.
        }
        let page = self.page(self.used);
        self.used += 1;
        let generation = self.generations.read(page).wrapping_add(1);
        self.generations.write(page, generation);
        write_whole(self.part.address(page), generation.into(), self.seed);
        cpu.beat();
    }

    /// Checks any one of the pages in use and frees it.
    fn free(&mut self, cpu: &mut Cpu) {
        if self.used == 0 {
            return;
        }
        let at = cpu.random_below(self.used);
        self.used -= 1;
        let (page, last) = (self.order.read(at), self.order.read(self.used));
        self.order.write(at, last);
        self.order.write(self.used, page);
        self.check(cpu, page.into());
    }

    fn check(&self, cpu: &mut Cpu, page: u64) {
        let generation = self.generations.read(page).into();
        cpu.check(check_whole(self.part.address(page), generation, generation, self.seed));
        cpu.beat();
    }

    fn inflate(&mut self, cpu: &mut Cpu) {
        let pages = self.part.pages();
        let (held, wanted) = (pages - self.edge, (pages - self.used) * INFLATE_TO / 100);
        if wanted <= held {
            return;
        }
        for n in held..wanted {
            self.edge -= 1;
            balloon::give(self.part.address(self.page(self.edge)));
            if n % SLICE == 0 {
                cpu.beat();
            }
        }
        count(board::BALLOON_PAGES, wanted - held);
        count(board::INFLATIONS, 1);
        if self.discards {
            self.discarded = 0;
        }
    }

    /// Discards some more pages of the balloon. Pages that are not adjacent are left to the next
    /// call.
    fn discard(&mut self, cpu: &mut Cpu) {
        let first = self.discarded;
        let address = self.part.address(first);
        let most = DISCARD_BY.min(self.part.pages() - first);
        let together = |n: &u64| self.part.address(first + n) == address + n * PAGE_SIZE;
        let pages = (1..most).take_while(together).count() as u64 + 1;
        balloon::discard(cpu.index, address, pages);
        self.discarded += pages;
        cpu.beat();
    }

    fn deflate(&mut self) {
        let pages = DEFLATE_BY.min(self.part.pages() - self.edge);
        for _ in 0..pages {
            balloon::take_back(self.part.address(self.page(self.edge)));
            self.edge += 1;
        }
        if pages != 0 {
            count(board::BALLOON_PAGES, pages.wrapping_neg());
            count(board::DEFLATIONS, 1);
        }
        self.back_off = BACK_OFF;
    }

    /// Starts the next interval if it is due.
    fn update_balloon(&mut self, cpu: &mut Cpu) {
        let now = cpu.beat();
        if !self.balloon || now < self.next {
            return;
        }
        // Intervals that a gap has swallowed are not made up for.
        self.next = now + self.interval;
        if self.back_off != 0 {
            self.back_off -= 1;
        } else {
            self.inflate(cpu);
        }
    }
}

impl Workload for Churn {
    fn timer_hz(spec: &Spec<'_>) -> Option<u64> {
        (spec.value("spin") == 0).then_some(Pacer::TIMER_HZ)
    }

    /// Writes every page once before the workload begins, as in a guest that has run for some time.
    fn prepare(cpu: &mut Cpu, mut part: Area, spec: &Spec<'_>) -> Self {
        let order = Ledger::take(&mut part);
        let generations = Ledger::take(&mut part);
        let pages = part.pages();
        let live = spec.value("live");
        let bounds = (pages * live / 200, (pages * live * 3 / 200).min(pages * 9 / 10));
        let interval = platform::ticks(spec.value("interval").max(1));
        let mut churn = Churn {
            part,
            order,
            generations,
            used: 0,
            edge: pages,
            target: pages * live / 100,
            bounds,
            balloon: spec.value("balloon") != 0 && balloon::is_on(),
            discards: spec.value("balloon") == 2,
            discarded: pages,
            interval,
            next: platform::now() + interval,
            back_off: 0,
            seed: spec.value("seed"),
            pacer: Pacer::new(cpu, spec),
        };
        for page in 0..pages {
            order.write(page, page as u32);
            write_whole(part.address(page), 0, churn.seed);
            cpu.beat();
        }
        while churn.used < churn.target {
            churn.allocate(cpu);
        }
        churn
    }

    fn step(&mut self, cpu: &mut Cpu) {
        self.update_balloon(cpu);
        if self.discarded < self.part.pages() {
            self.discard(cpu);
        }
        let due = self.pacer.due(cpu);
        for _ in 0..due {
            if self.used == self.target {
                self.target = self.bounds.0 + cpu.random_below(self.bounds.1 - self.bounds.0 + 1);
            }
            let contrary = cpu.random_below(CONTRARY) == 0;
            if (self.used < self.target) != contrary {
                self.allocate(cpu);
            } else {
                self.free(cpu);
            }
        }
        cpu.done(due);
    }

    fn finish(&mut self, cpu: &mut Cpu) {
        for at in 0..self.used {
            self.check(cpu, self.page(at));
        }
    }
}
