//! The guest: the pages that it touches over time, on either side.

use std::time::Duration;

use super::{Dirtying, Simulation, Touching};
use crate::page_map::Location;

/// A part of the time of a simulation, in which a guest may run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// The beginning, in virtual time since the simulation began.
    pub from: Duration,
    /// The length.
    pub time: Duration,
    /// The part of the time for which the vCPUs run: less than 1 when they are throttled.
    pub share: f64,
}

/// Memory as a guest sees it.
pub trait GuestMemory {
    /// Returns the number of pages.
    fn pages(&self) -> u64;

    /// Reads or writes a page. Returns whether the touch is complete. If it is not, the page is
    /// missing: the guest waits for the page, and has to touch it again when it runs next.
    fn touch(&mut self, page: u64, write: bool) -> bool;
}

/// The behaviour of a guest while it runs, at the source and at the destination alike.
///
/// ```
/// use std::time::Duration;
/// use migration_core::{sim::{Guest, GuestMemory, SimConfig, Simulation, Span}, strategy::{Linear, PostCopy}};
///
/// /// Writes one page, then reads the one before it, and so on: 1000 pages a second.
/// struct Pairs(u64);
///
/// impl Guest for Pairs {
///     fn run(&mut self, span: Span, memory: &mut dyn GuestMemory) -> Duration {
///         let step = Duration::from_millis(1);
///         let mut at = step;
///         while at <= span.time {
///             let page = self.0 / 2 % memory.pages();
///             if !memory.touch(page, self.0 % 2 == 0) {
///                 return at; // it waits for the page
///             }
///             self.0 += 1;
///             at += step;
///         }
///         span.time
///     }
/// }
///
/// let mut sim = Simulation::with_guest(SimConfig::default(), Box::new(Pairs(0)));
/// sim.attempt(&mut PostCopy { order: Box::new(Linear::default()) });
/// assert_eq!(sim.broken(), &[] as &[String]);
/// assert!(sim.guest_report().touches > 100);
/// ```
pub trait Guest: Send {
    /// Runs the guest for a span of time. Returns the time after which the guest stopped: less than
    /// `span.time` only if a touch has to wait.
    fn run(&mut self, span: Span, memory: &mut dyn GuestMemory) -> Duration;
}

/// The guest that a [`SimConfig`](super::SimConfig) describes. It writes and reads, each at its
/// rate.
pub(super) struct Configured {
    dirtying: Dirtying,
    touching: Touching,
    writes: Paced,
    reads: Paced,
    /// The index of the next item of the script, and the number of pages of it that were written.
    scripted: (usize, u64),
}

/// An action that is repeated at a rate.
#[derive(Default)]
struct Paced {
    /// The number of times that the action was done.
    done: u64,
    /// The part of the next action that is due, from 0 to 1.
    credit: f64,
}

impl Paced {
    /// Returns the seconds until the next action is due.
    fn due_in(&self, rate: f64) -> f64 {
        if rate > 0.0 { (1.0 - self.credit).max(0.0) / rate } else { f64::INFINITY }
    }

    fn pass(&mut self, rate: f64, seconds: f64) {
        self.credit = (self.credit + rate * seconds).min(1.0);
    }

    fn finish(&mut self) {
        self.done += 1;
        self.credit = 0.0;
    }

    /// Skips all but the last `most` of the actions that are due in `seconds` seconds. Returns the
    /// rate of those that remain.
    fn at_most(&mut self, most: u64, rate: f64, seconds: f64) -> f64 {
        let due = rate * seconds;
        if due <= most as f64 {
            return rate;
        }
        self.done += due as u64 - most;
        most as f64 / seconds
    }
}

/// The next action of a configured guest.
enum Step {
    Write,
    Read,
    Script,
}

impl Configured {
    pub(super) fn new(dirtying: Dirtying, touching: Touching) -> Self {
        Self { dirtying, touching, writes: Paced::default(), reads: Paced::default(), scripted: (0, 0) }
    }

    /// Returns the next page of the script, with the time at which it is due.
    fn script(&self) -> Option<(Duration, u64)> {
        let Dirtying::Script(script) = &self.dirtying else { return None };
        let (at, range) = script.get(self.scripted.0)?;
        Some((*at, range.first + self.scripted.1))
    }

    fn script_done(&mut self) {
        let Dirtying::Script(script) = &self.dirtying else { return };
        self.scripted.1 += 1;
        if script.get(self.scripted.0).is_none_or(|(_, range)| self.scripted.1 >= range.count) {
            self.scripted = (self.scripted.0 + 1, 0);
        }
    }
}

impl Guest for Configured {
    fn run(&mut self, span: Span, memory: &mut dyn GuestMemory) -> Duration {
        let (pages, total) = (memory.pages(), span.time.as_secs_f64());
        let (write_rate, set) = match self.dirtying {
            Dirtying::Rate { pages_per_second, working_set } => {
                (pages_per_second * span.share, working_set.clamp(1, pages))
            }
            _ => (0.0, 1),
        };
        let (read_rate, random) = match self.touching {
            Touching::Nothing => (0.0, false),
            Touching::Sequential { pages_per_second } => (pages_per_second * span.share, false),
            Touching::Random { pages_per_second } => (pages_per_second * span.share, true),
        };
        // two writes of a page within a span have the effect of one
        let write_rate = self.writes.at_most(set, write_rate, total);
        let read_rate = self.reads.at_most(pages, read_rate, total);
        let mut now = 0.0;
        loop {
            let script = self.script();
            let script_in = script.map_or(f64::INFINITY, |(at, _)| at.saturating_sub(span.from).as_secs_f64() - now);
            let (write_in, read_in) = (self.writes.due_in(write_rate), self.reads.due_in(read_rate));
            let step_in = script_in.min(write_in).min(read_in).max(0.0);
            if now + step_in > total {
                self.writes.pass(write_rate, total - now);
                self.reads.pass(read_rate, total - now);
                return span.time;
            }
            now += step_in;
            self.writes.pass(write_rate, step_in);
            self.reads.pass(read_rate, step_in);
            let step = match (script_in.max(0.0) <= step_in, write_in <= step_in) {
                (true, _) => Step::Script,
                (_, true) => Step::Write,
                _ => Step::Read,
            };
            let (page, write) = match step {
                Step::Script => (script.map_or(0, |(_, page)| page), true),
                Step::Write => (self.writes.done % set, true),
                // any odd multiplier spreads the numbers over all pages
                Step::Read if random => ((self.reads.done.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16) % pages, false),
                Step::Read => (self.reads.done % pages, false),
            };
            if page < pages && !memory.touch(page, write) {
                return Duration::from_secs_f64(now).min(span.time);
            }
            match step {
                Step::Script => self.script_done(),
                Step::Write => self.writes.finish(),
                Step::Read => self.reads.finish(),
            }
        }
    }
}

/// The memory of a simulation, as its guest sees it.
struct Memory<'a>(&'a mut Simulation);

impl GuestMemory for Memory<'_> {
    fn pages(&self) -> u64 {
        self.0.config.pages
    }

    fn touch(&mut self, page: u64, write: bool) -> bool {
        let done = if self.0.destination.runs {
            self.0.touch_at_destination(page, write)
        } else {
            self.0.touch_at_source(page, write)
        };
        self.0.guest.report.touches += u64::from(done);
        done
    }
}

/// The guest, and the true content of its memory.
pub(super) struct GuestState {
    /// The guest; `None` while it runs.
    guest: Option<Box<dyn Guest>>,
    /// The newest version of each page.
    pub(super) newest: Vec<u64>,
    /// The last version that was given to a page.
    written: u64,
    /// The pages that the guest has reported free and not used again.
    pub(super) free: crate::PageSet,
    /// The number of items of the configured list that were reported.
    freed: usize,
    /// The missing page for which the guest waits, and the time at which the wait began.
    pub(super) waiting: Option<(u64, Duration)>,
    pub(super) report: super::GuestReport,
}

impl GuestState {
    pub(super) fn new(guest: Box<dyn Guest>, pages: u64) -> Self {
        Self {
            guest: Some(guest),
            newest: (1..=pages).collect(),
            written: pages,
            free: crate::PageSet::empty(pages),
            freed: 0,
            waiting: None,
            report: super::GuestReport::default(),
        }
    }
}

impl Simulation {
    /// Lets the guest run until `until`, or until it faults, and sets the clock to that time.
    /// Returns whether it ran until `until`.
    pub(super) fn run_guest(&mut self, until: Duration) -> bool {
        let from = self.clock;
        self.report_free_pages(until);
        if !self.guest_runs() || self.guest.waiting.is_some() {
            self.clock = until;
            return true;
        }
        let Some(mut guest) = self.guest.guest.take() else { return true };
        let share = if self.source.runs { 1.0 - f64::from(self.source.throttle) / 100.0 } else { 1.0 };
        let span = Span { from, time: until - from, share };
        let ran = guest.run(span, &mut Memory(self)).min(span.time);
        self.guest.guest = Some(guest);
        self.guest.report.ran += ran;
        self.clock = if self.guest.waiting.is_some() { from + ran } else { until };
        match self.guest.waiting {
            Some((page, _)) => {
                self.guest.waiting = Some((page, self.clock));
                self.attempt.faults += 1;
                self.fault(page);
                false
            }
            None => true,
        }
    }

    /// Requests the page for which the guest waits.
    pub(super) fn fault(&mut self, page: u64) {
        if self.destination.runs {
            self.fault_at_destination(page);
        } else {
            self.fault_at_source(page);
        }
    }

    /// Ends the guest's wait for `page`, which has arrived.
    pub(super) fn page_is_there(&mut self, page: u64) {
        if let Some((_, since)) = self.guest.waiting.take_if(|(waiting, _)| *waiting == page) {
            let waited = self.clock - since;
            self.guest.report.waited += waited;
            self.guest.report.faults.record(waited);
        }
    }

    fn report_free_pages(&mut self, until: Duration) {
        if !self.source.runs {
            return;
        }
        while let Some(&(_, range)) = self.config.freeing.get(self.guest.freed).filter(|(at, _)| *at <= until) {
            self.guest.free.insert_range(range);
            self.guest.freed += 1;
        }
    }

    fn touch_at_source(&mut self, page: u64, write: bool) -> bool {
        if self.source.map.in_store().contains(page) {
            self.guest.waiting = Some((page, self.clock));
            return false;
        }
        self.check_read("source", page, self.source.ram[page as usize]);
        if write {
            self.write_at_source(page);
        }
        true
    }

    /// Writes a page, as the guest does, or the VMM while it saves the state.
    pub(super) fn write_at_source(&mut self, page: u64) {
        let version = self.new_version(page);
        self.source.ram[page as usize] = version;
        self.source.dirty.insert(page);
    }

    fn touch_at_destination(&mut self, page: u64, write: bool) -> bool {
        match self.destination.map.location(page) {
            Location::Here | Location::Zero => {}
            _ => {
                self.guest.waiting = Some((page, self.clock));
                return false;
            }
        }
        self.check_read("destination", page, self.destination.content(page));
        if write {
            let version = self.new_version(page);
            self.destination.write(page, version);
        }
        true
    }

    fn new_version(&mut self, page: u64) -> u64 {
        // the order matters: see `SourceVm::free_pages`
        self.guest.free.remove(page);
        self.guest.written += 1;
        self.guest.newest[page as usize] = self.guest.written;
        self.guest.written
    }

    /// Checks that the guest reads the version that it wrote last.
    fn check_read(&mut self, side: &str, page: u64, found: u64) {
        let newest = self.guest.newest[page as usize];
        if found != newest && !self.guest.free.contains(page) {
            let what = if found == 0 { "zeros".to_owned() } else { format!("version {found}") };
            self.broken.push(format!("the guest read {what} of page {page} at the {side}, the newest is {newest}"));
        }
    }
}
