//! Decides which pages are evicted, and evicts them in the order of rule 21.

use std::{
    io,
    time::{Duration, Instant},
};

use migration_core::{
    PAGE_SIZE, PageRange, PageSet,
    page_map::{MapError, StoreCopy},
    paged_memory::{NewEntry, PutError, Renewed},
    store::{PageToPut, Purpose},
    text::describe,
    vm::VmError,
    working_set::{Ages, EstimatorOptions, LimitPolicy, ResidentLimit, WorkingSetEstimator},
};

use super::{Swapper, bytes, lock};
use crate::ram::Backing;

/// Most pages of one put: 512 KiB. Their contents are copied while no fault is answered.
const PUT_PAGES: u64 = 128;
/// Pages that are taken out of the guest's reach at a time, while no fault is answered.
const TAKE_PAGES: u64 = 64;
/// The same for transparent huge pages, which the kernel moves whole.
const TAKE_HUGE: u64 = 512;
/// The rest after a store has failed, the first time and at most.
const RETRY: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// What a [`step`](Swapper::step) has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stepped {
    /// Pages that were taken out of the guest's reach, and are on probation.
    pub taken: u64,
    /// Pages that were put into the stores and dropped.
    pub evicted: u64,
    /// Pages of zeros that were dropped.
    pub zeros: u64,
    /// Pages that a store did not take. They are mapped again.
    pub failed: u64,
}

/// What one step leaves to the next.
pub(super) struct Work {
    ages: Ages,
    estimator: Option<WorkingSetEstimator>,
    /// Where pages are put. `None` if the last namespace was lost.
    home: Option<Home>,
    renew_at: Option<Instant>,
    /// No page is put before, because a store has failed.
    retry_at: Option<Instant>,
    retry: Duration,
}

/// A namespace for cold pages.
struct Home {
    entry: u8,
    /// The generation of the last put.
    generation: u32,
}

impl Work {
    pub(super) fn new(pages: u64, remembered: usize) -> Self {
        let ages = Ages::new(pages, remembered);
        Self { ages, estimator: None, home: None, renew_at: None, retry_at: None, retry: RETRY[0] }
    }

    fn failed(&mut self, now: Instant) {
        self.retry_at = Some(now + self.retry);
        self.retry = (2 * self.retry).min(RETRY[1]);
    }
}

/// What is to be resident.
struct Policy {
    limit: LimitPolicy,
    /// The estimate of the working set in bytes, where there is one.
    estimate: u64,
}

/// Pages that are put together, and what they hold.
struct Batch {
    copy: StoreCopy,
    pages: PageSet,
    contents: Vec<u8>,
    /// Where the next batch begins.
    end: u64,
    /// Pages of zeros, which were dropped at once.
    zeros: u64,
}

impl Swapper {
    /// Looks which pages were referenced, takes some of the others out of the guest's reach, and evicts
    /// those of the last step that were not touched since, if more is resident than the limit allows.
    /// `now` is the time: steps are an [interval](super::SwapperOptions::interval) apart.
    ///
    /// A step takes as long as the stores take. It holds nothing up meanwhile.
    ///
    /// # Errors
    /// Memory cannot be looked at or moved. That a store fails is no error: see
    /// [`PagingStatus`](super::PagingStatus).
    pub fn step(&self, now: Instant) -> Result<Stepped, VmError> {
        let mut work = lock(&self.work);
        if let Some(mut moves) = self.pager.out_of_reach() {
            moves.give_back_touched().map_err(|e| VmError::because("map touched pages again", e))?;
        }
        self.renew(&mut work, now);
        let resident = self.look().map_err(|e| VmError::because("look which pages are resident", e))?;
        self.note_references(&mut work);
        let policy = self.policy(&mut work, now, resident.len());
        let mut left = self.pages_to_evict(&policy, resident.len());
        let mut stepped = Stepped::default();
        if left == 0 {
            self.give_back_all().map_err(|e| VmError::because("map pages again that stay", e))?;
        } else if work.retry_at.is_none_or(|at| at <= now) {
            let evicted = self.evict_probation(&mut work, &mut left, now, &mut stepped);
            evicted.map_err(|e| VmError::because("read pages that are to be evicted", e))?;
            if stepped.failed == 0 {
                let left = self.pages_to_evict(&policy, resident.len().saturating_sub(stepped.evicted + stepped.zeros));
                let out = self.map.read(|map| map.being_evicted().len());
                self.take_out(&mut work, &resident, left.saturating_sub(out), &mut stepped);
            } else {
                self.give_back_all().map_err(|e| VmError::because("map pages again that stay", e))?;
            }
        }
        let mut counters = lock(&self.counters);
        counters.evicted += stepped.evicted;
        counters.zeros += stepped.zeros;
        counters.resident = counters.resident.saturating_sub(stepped.evicted + stepped.zeros);
        Ok(stepped)
    }

    /// Returns the pages that take memory, and tells the map of them.
    pub(super) fn look(&self) -> io::Result<PageSet> {
        let mut resident = PageSet::empty(self.map.read(|map| map.pages()));
        self.pager.ram().guest_ram().populated(&mut resident)?;
        self.map.change(|map| {
            map.populated(&resident);
            resident.subtract(map.missing());
            resident.union_with(map.being_evicted());
        });
        lock(&self.counters).resident = resident.len();
        Ok(resident)
    }

    /// Ends an interval: which pages were referenced in it?
    fn note_references(&self, work: &mut Work) {
        let pages = self.map.read(|map| map.pages());
        let mut referenced = std::mem::replace(&mut *lock(&self.recent), PageSet::empty(pages));
        let mut source = lock(&self.references);
        if !self.is_held()
            && let Err(error) = source.referenced(&mut referenced)
        {
            lock(&self.counters).problem = Some(describe(&error));
        }
        drop(source);
        if let Some(mut moves) = self.pager.out_of_reach() {
            // a source may take a page for written that was only moved
            referenced.subtract(&moves.pages());
            let touched = moves.take_touched();
            lock(&self.counters).kept += touched.len();
            referenced.union_with(&touched);
        }
        work.ages.interval_ended(referenced);
    }

    /// Returns what is to be resident, after a look at how much the guest swaps.
    fn policy(&self, work: &mut Work, now: Instant, resident: u64) -> Policy {
        let limit = self.limit();
        let mut counters = lock(&self.counters);
        if limit == ResidentLimit::Auto {
            let options = self.options.estimator;
            let ram = bytes(self.map.read(|map| map.pages()));
            let new = || WorkingSetEstimator::new(options.unwrap_or(EstimatorOptions::of_ram(ram)), bytes(resident));
            let estimator = work.estimator.get_or_insert_with(new);
            estimator.observe(now.saturating_duration_since(self.began), bytes(counters.fetched));
        } else {
            work.estimator = None;
        }
        counters.working_set = work.estimator.as_ref().map(WorkingSetEstimator::estimate);
        let estimate = counters.working_set.unwrap_or(0);
        let limit = LimitPolicy { limit, floor: self.options.floor, most: self.options.most };
        counters.limit_bytes = limit.bytes(estimate);
        Policy { limit, estimate }
    }

    /// Returns how many pages are to be evicted while `resident` are resident.
    fn pages_to_evict(&self, policy: &Policy, resident: u64) -> u64 {
        let excess = policy.limit.to_evict(bytes(resident), policy.estimate);
        if self.is_held() { 0 } else { excess.div_ceil(PAGE_SIZE as u64) }
    }

    /// Takes up to `most` cold pages out of the guest's reach.
    fn take_out(&self, work: &mut Work, resident: &PageSet, most: u64, stepped: &mut Stepped) {
        let mut candidates = resident.clone();
        candidates.subtract(&lock(&self.pinned));
        candidates.subtract(&self.map.read(|map| map.being_evicted().clone()));
        let piece = if self.pager.ram().backing() == Backing::TransparentHuge { TAKE_HUGE } else { TAKE_PAGES };
        let mut stayed = PageSet::empty(candidates.capacity());
        for run in work.ages.coldest(&candidates, most) {
            let mut first = run.first;
            while first < run.end() {
                let end = run.end().min((first / piece + 1) * piece);
                let part = PageRange::new(first, end - first);
                first = end;
                let Some(mut moves) = self.pager.out_of_reach() else { return };
                // whoever holds evictions waits for this lock, and maps again what was taken before
                if self.is_held() {
                    return;
                }
                let (taken, why) = moves.take(part);
                let now_out = moves.pages();
                drop(moves);
                stepped.taken += taken;
                if taken < part.count {
                    stayed.insert_range(part);
                    now_out.ranges_in(part).for_each(|run| stayed.remove_range(run));
                    let mut counters = lock(&self.counters);
                    counters.refused += part.count - taken;
                    counters.problem = why.map(|why| format!("pages stay resident: {why}")).or(counters.problem.take());
                }
            }
        }
        // others come first the next time
        work.ages.referenced(&stayed);
    }

    /// Evicts the pages that are out of the guest's reach since an earlier step, `left` of them at most.
    fn evict_probation(&self, work: &mut Work, left: &mut u64, now: Instant, stepped: &mut Stepped) -> io::Result<()> {
        let mut at = 0;
        while *left > 0 {
            if let Err(error) = self.make_home(work) {
                self.store_failed(work, now, &error);
                stepped.failed += 1;
                return Ok(());
            }
            let Some(batch) = self.read_batch(work, at, PUT_PAGES.min(*left))? else { break };
            at = batch.end;
            stepped.zeros += batch.zeros;
            *left = left.saturating_sub(batch.zeros + batch.pages.len());
            if batch.pages.is_empty() {
                continue;
            }
            let put = self.put(&batch);
            let evicted = self.conclude_put(&batch, put.as_deref().ok())?;
            stepped.evicted += evicted;
            match put {
                Ok(_) => (work.retry, work.retry_at) = (RETRY[0], None),
                Err(error) => {
                    stepped.failed += batch.pages.len();
                    self.store_failed(work, now, &error);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Copies what the next pages hold that are out of reach, from page `at` on, and begins a put of
    /// them. Pages of zeros are dropped. `None` if there are no such pages.
    fn read_batch(&self, work: &mut Work, at: u64, most: u64) -> io::Result<Option<Batch>> {
        let Some(mut moves) = self.pager.out_of_reach() else { return Ok(None) };
        let Some(home) = work.home.as_mut().filter(|_| !self.is_held()) else { return Ok(None) };
        let copy = StoreCopy { entry: home.entry, generation: home.generation + 1 };
        let out = moves.pages();
        let (mut pages, mut zeros) = (PageSet::empty(out.capacity()), PageSet::empty(out.capacity()));
        let (mut contents, mut end) = (Vec::new(), at);
        let rest = PageRange::new(at, out.capacity().saturating_sub(at));
        for page in out.ranges_in(rest).flat_map(PageRange::pages).take(most as usize) {
            end = page + 1;
            let mut content = [0; PAGE_SIZE];
            if !moves.copy(page, &mut content)? {
                continue;
            }
            if content == [0; PAGE_SIZE] {
                zeros.insert(page);
            } else {
                pages.insert(page);
                contents.extend_from_slice(&content);
            }
        }
        if end == at {
            return Ok(None);
        }
        for run in zeros.ranges() {
            moves.drop_zeros(run)?;
        }
        home.generation = copy.generation;
        let began = self.map.change(|map| pages.ranges().try_for_each(|run| map.put_started(run, copy)));
        if let Err(error) = began {
            self.map.change(|map| pages.ranges().for_each(|run| drop(map.put_failed(run, copy))));
            work.home.take_if(|_| matches!(error, MapError::EntryLost(_)));
            return Err(io::Error::other(error));
        }
        Ok(Some(Batch { copy, pages, contents, end, zeros: zeros.len() }))
    }

    fn put(&self, batch: &Batch) -> Result<Vec<bool>, PutError> {
        let values = batch.contents.chunks_exact(PAGE_SIZE);
        let pages: Vec<_> = batch.pages.iter().zip(values).map(|(page, value)| PageToPut { page, value }).collect();
        self.memory.put(batch.copy.entry, batch.copy.generation, &pages)
    }

    /// Drops what was put and not touched meanwhile, and maps the rest again. Returns how many pages
    /// were dropped.
    fn conclude_put(&self, batch: &Batch, taken: Option<&[bool]>) -> io::Result<u64> {
        let mut stored = PageSet::empty(batch.pages.capacity());
        let taken = batch.pages.iter().zip(taken.unwrap_or_default()).filter(|(_, taken)| **taken);
        taken.for_each(|(page, _)| _ = stored.insert(page));
        let moves = self.pager.out_of_reach();
        // a page that was touched is not claimed for this put any more
        let counts: Vec<PageRange> = self.map.change(|map| {
            let counts = stored.ranges().flat_map(|run| map.put_done(run, batch.copy)).collect();
            batch.pages.ranges().for_each(|run| drop(map.put_failed(run, batch.copy)));
            counts
        });
        let Some(mut moves) = moves else { return Ok(0) };
        let mut result = Ok(());
        for &run in &counts {
            // pages that are not free all the same are missing
            result = result.and(moves.drop_stored(run));
        }
        for run in batch.pages.ranges() {
            result = result.and(moves.give_back(run));
        }
        result.map(|()| counts.iter().map(|run| run.count).sum())
    }

    /// Makes a namespace for cold pages, if there is none.
    pub(super) fn make_home(&self, work: &mut Work) -> Result<(), PutError> {
        // generations of a namespace only grow
        if work.home.as_ref().is_some_and(|home| home.generation < u32::MAX) {
            return Ok(());
        }
        work.home = None;
        let new = NewEntry {
            stores: &self.store_names,
            namespace: (self.new_namespace)(),
            purpose: Purpose::Home,
            owner: self.owner,
            lease: self.options.lease,
        };
        work.home = Some(Home { entry: self.memory.create_entry(&new)?, generation: 0 });
        Ok(())
    }

    fn store_failed(&self, work: &mut Work, now: Instant, error: &PutError) {
        work.failed(now);
        if error.is_loss()
            && let Some(home) = work.home.take()
        {
            self.lose(home.entry);
        }
        let mut counters = lock(&self.counters);
        counters.failed_puts += 1;
        counters.problem = Some(describe(error));
    }

    /// An entry has lost pages, or may have.
    fn lose(&self, entry: u8) {
        let loss = self.map.change(|map| map.entry_lost(entry));
        lock(&self.counters).lost += loss.only_there.len();
    }

    /// Renews the namespaces in which pages are, three times in each lease.
    fn renew(&self, work: &mut Work, now: Instant) {
        if work.renew_at.is_some_and(|at| now < at) {
            return;
        }
        let first = work.renew_at.replace(now + self.options.lease / 3).is_none();
        let mut entries = self.map.read(|map| {
            let lost = map.lost_entries();
            map.entries().into_iter().filter(|entry| !lost.contains(entry)).collect::<Vec<_>>()
        });
        entries.extend(work.home.as_ref().map(|home| home.entry).filter(|home| !entries.contains(home)));
        for entry in entries.into_iter().filter(|_| !first) {
            match self.memory.renew(entry, self.owner, self.options.lease) {
                Renewed::Intact => {}
                Renewed::Changed => {
                    self.lose(entry);
                    work.home.take_if(|home| home.entry == entry);
                    let what = format!("the stores have lost pages of entry {entry}");
                    lock(&self.counters).problem = Some(what);
                }
                Renewed::Silent { store, cause } => {
                    work.renew_at = Some(now + RETRY[1]);
                    let what = format!("page store {store} does not renew: {}", describe(&cause));
                    lock(&self.counters).problem = Some(what);
                }
            }
        }
    }
}
