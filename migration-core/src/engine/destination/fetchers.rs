//! The queue of pages that are to be fetched from stores: it selects the pages, and the entries of
//! the store table from which the threads fetch next.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    num::NonZeroU64,
    ops::Range,
    sync::Condvar,
};

use super::*;
use crate::{
    PAGE_SIZE,
    engine::stored::BACK_OFF,
    page_map::PageMap,
    paged_memory::{MAX_FETCHED_PAGES, PagedMemory},
    shared_map::SharedPageMap,
    store::Owner,
};

/// The largest number of threads of one VM that fetch pages for which the guest waits.
const MAX_FAULT_THREADS: usize = 4;
/// The largest number of threads of one VM that prefetch all other pages.
const MAX_PREFETCH_THREADS: usize = 2;
/// The longest time for which the rate limit delays the next batch.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);
/// The longest time between two checks whether there are pages to fetch.
const TICK: Duration = Duration::from_millis(200);

/// The pages in stores that are to be fetched for one VM.
///
/// Some threads fetch pages for which the guest waits, and other threads prefetch pages, so that a
/// fault never waits for the fetch of a page that is not needed yet. The number of threads depends
/// on the number of entries: see [`Turns`] for the reason.
pub(in crate::engine) struct Gatherer {
    pub(super) memory: PagedMemory,
    pub(super) owner: Owner,
    state: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    faults: VecDeque<Fault>,
    fault_turns: Turns,
    prefetch_turns: Turns,
    /// The progress of the prefetch of each entry.
    progress: BTreeMap<u8, Progress>,
    /// The entry that was prefetched last.
    last: u8,
    /// Entries whose stores did not answer at the last attempt.
    silent: BTreeSet<u8>,
    /// Entries whose stores did not answer, and whose pages the source was asked to send.
    given_up: BTreeSet<u8>,
    /// Entries whose failure was reported to the user.
    reported: BTreeSet<u8>,
    running: bool,
    ended: bool,
    released: bool,
    /// Whether the source is done with the session, or is gone permanently.
    source_done: bool,
    /// The largest number of bytes per second that are prefetched.
    rate: Option<NonZeroU64>,
    /// The time from which the rate limit permits the next batch.
    permits_at: Option<Instant>,
}

/// A page for which the guest waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) page: u64,
    /// The entry that contained the page when it was requested.
    pub(super) entry: u8,
    /// The earliest time of the fetch.
    due: Instant,
}

#[derive(Clone, Copy, Default)]
struct Progress {
    /// The page at which the next batch begins.
    at: u64,
    /// The end of the pause after a failed fetch.
    rests_until: Option<Instant>,
}

/// Pages to be prefetched: pages of one entry, from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) entry: u8,
    pub(super) first: u64,
}

/// Selects the entries that the threads of one kind ask.
///
/// At most one thread of a kind asks an entry at a time. The last free thread never asks an entry
/// that did not answer at the last attempt. So pages of entries that answer do not wait for entries
/// that do not.
#[derive(Default)]
struct Turns {
    threads: usize,
    busy: BTreeSet<u8>,
}

impl Turns {
    /// Returns the numbers of the threads that are to be started for `entries` entries. There are
    /// at most `most` threads in total.
    fn start(&mut self, entries: usize, most: usize) -> Range<usize> {
        let more = self.threads..self.threads.max(entries.clamp(1, most));
        self.threads = more.end;
        more
    }

    fn may_ask(&self, entry: u8, silent: &BTreeSet<u8>) -> bool {
        if self.busy.contains(&entry) {
            return false;
        }
        let others = self.busy.intersection(silent).count();
        !silent.contains(&entry) || self.threads <= 1 || others + 1 < self.threads
    }
}

/// The numbers of the threads that are to be started.
pub(super) struct MoreThreads {
    pub(super) for_faults: Range<usize>,
    pub(super) for_prefetch: Range<usize>,
}

impl Gatherer {
    pub(super) fn new(memory: PagedMemory, owner: Owner) -> Self {
        Self { memory, owner, state: Mutex::default(), changed: Condvar::new() }
    }

    fn change<T>(&self, change: impl FnOnce(&mut Queue) -> T) -> T {
        let changed = change(&mut lock(&self.state));
        self.changed.notify_all();
        changed
    }

    /// Computes the threads that the present store table needs, and returns those that were not
    /// started yet.
    pub(super) fn more_threads(&self) -> MoreThreads {
        let entries = usize::from(self.memory.entries());
        self.change(|queue| MoreThreads {
            for_faults: queue.fault_turns.start(entries, MAX_FAULT_THREADS),
            for_prefetch: queue.prefetch_turns.start(entries, MAX_PREFETCH_THREADS),
        })
    }

    /// Queues a fault on `page`, which is in a store of `entry`.
    pub(super) fn fault(&self, page: u64, entry: u8) {
        self.add(Fault { page, entry, due: Instant::now() });
    }

    fn add(&self, fault: Fault) {
        self.change(|queue| {
            if queue.faults.iter().all(|other| other.page != fault.page) {
                queue.faults.push_back(fault);
            }
        });
    }

    /// Returns the next page to be fetched for a fault, or `None` when the gatherer has ended. The
    /// caller fetches the page from the entry, and calls [`fault_tried`](Self::fault_tried).
    pub(super) fn next_fault(&self) -> Option<Fault> {
        let mut queue = lock(&self.state);
        loop {
            if queue.ended {
                return None;
            }
            let now = Instant::now();
            let Queue { faults, fault_turns, silent, .. } = &mut *queue;
            let may = |fault: &Fault| fault.due <= now && fault_turns.may_ask(fault.entry, silent);
            let at = faults.iter().position(may);
            if let Some(fault) = at.and_then(|at| faults.remove(at)) {
                fault_turns.busy.insert(fault.entry);
                return Some(fault);
            }
            let later = faults.iter().filter(|fault| fault.due > now).map(|fault| fault.due - now).min();
            queue = self.wait(queue, later.unwrap_or(TICK).min(TICK));
        }
    }

    /// Records the end of an attempt to fetch the page of a fault. If the page is still in an
    /// entry, which is `still_in`, the fetch is tried again later.
    pub(super) fn fault_tried(&self, fault: Fault, still_in: Option<u8>) {
        self.change(|queue| queue.fault_turns.busy.remove(&fault.entry));
        if let Some(entry) = still_in {
            self.add(Fault { entry, due: Instant::now() + BACK_OFF, ..fault });
        }
    }

    /// Returns the next pages to be prefetched, or `None` when the gatherer has ended. Waits until
    /// the VM runs (rule 7), and while there are no such pages. The caller fetches the pages from
    /// the entry, and calls [`batch_tried`](Self::batch_tried).
    pub(super) fn next_batch(&self, map: &SharedPageMap) -> Option<Batch> {
        let mut queue = lock(&self.state);
        loop {
            if queue.ended {
                return None;
            }
            if let Some(batch) = queue.next_batch(map) {
                queue.prefetch_turns.busy.insert(batch.entry);
                queue.last = batch.entry;
                return Some(batch);
            }
            let permits = queue.permits_at.map(|at| at.saturating_duration_since(Instant::now()));
            let time = permits.filter(|time| !time.is_zero()).unwrap_or(TICK).min(TICK);
            queue = self.wait(queue, time);
        }
    }

    /// Limits prefetching to `rate` bytes per second, or removes the limit.
    pub(super) fn limit(&self, rate: Option<NonZeroU64>) {
        self.change(|queue| queue.rate = rate);
    }

    /// Records that pages were prefetched. The next batch waits until the rate limit permits it.
    pub(super) fn fetched_ahead(&self, pages: u64) {
        self.change(|queue| {
            let Some(rate) = queue.rate else { return };
            let now = Instant::now();
            let seconds = (pages * PAGE_SIZE as u64) as f64 / rate.get() as f64;
            let time = Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST_PAUSE).min(LONGEST_PAUSE);
            queue.permits_at = Some(queue.permits_at.map_or(now, |at| at.max(now)) + time);
        });
    }

    /// Returns the number of missing pages in each store, by the name of the store.
    pub(super) fn stored(&self, map: &PageMap) -> BTreeMap<String, u64> {
        let mut stores = BTreeMap::new();
        for (entry, pages) in map.stored_pages() {
            for name in self.memory.stores_of(entry) {
                *stores.entry(name).or_default() += pages;
            }
        }
        stores
    }

    /// Records the end of an attempt to prefetch pages.
    pub(super) fn batch_tried(&self, batch: Batch, failed: bool) {
        let Batch { entry, first } = batch;
        let done = if failed { MAX_FETCHED_PAGES } else { 1 };
        let rests_until = failed.then(|| Instant::now() + BACK_OFF);
        self.change(|queue| {
            queue.prefetch_turns.busy.remove(&entry);
            queue.progress.insert(entry, Progress { at: first.saturating_add(done), rests_until });
        });
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>, time: Duration) -> MutexGuard<'a, Queue> {
        self.changed.wait_timeout(queue, time).unwrap_or_else(|e| e.into_inner()).0
    }

    /// Wakes the threads, because further pages are in stores.
    pub(super) fn wake(&self) {
        self.change(|_| {});
    }

    /// Records that the VM runs. From now on pages that the source holds are fetched from stores,
    /// too (rule 7).
    pub(super) fn run(&self) {
        self.change(|queue| queue.running = true);
    }

    pub(super) fn is_running(&self) -> bool {
        lock(&self.state).running
    }

    /// Waits until the VM runs or the gatherer has ended. Returns whether the gatherer has not
    /// ended.
    pub(super) fn wait_running(&self) -> bool {
        let waiting = |queue: &mut Queue| !queue.running && !queue.ended;
        let queue = self.changed.wait_while(lock(&self.state), waiting).unwrap_or_else(|e| e.into_inner());
        !queue.ended
    }

    /// Waits for `time`, or until the gatherer has ended. Returns whether the gatherer has not
    /// ended.
    pub(super) fn pause(&self, time: Duration) -> bool {
        let queue = lock(&self.state);
        let waited = self.changed.wait_timeout_while(queue, time, |queue| !queue.ended);
        !waited.unwrap_or_else(|e| e.into_inner()).0.ended
    }

    /// Records that the stores of `entry` have answered.
    pub(super) fn answered(&self, entry: u8) {
        self.change(|queue| queue.silent.remove(&entry));
    }

    /// Records that a store of `entry` does not answer.
    pub(super) fn mark_silent(&self, entry: u8) {
        self.change(|queue| queue.silent.insert(entry));
    }

    /// Returns whether the stores of `entry` did not answer at the last attempt.
    pub(super) fn is_silent(&self, entry: u8) -> bool {
        lock(&self.state).silent.contains(&entry)
    }

    /// Records that the source is to send the pages of `entry` that it holds. Returns whether this
    /// is new.
    pub(super) fn mark_given_up(&self, entry: u8) -> bool {
        self.change(|queue| queue.given_up.insert(entry))
    }

    /// Reverts [`mark_given_up`](Self::mark_given_up), because the source could not be informed.
    pub(super) fn unmark_given_up(&self, entry: u8) {
        self.change(|queue| queue.given_up.remove(&entry));
    }

    /// Returns the entries whose pages the source is to send, ascending.
    pub(super) fn given_up(&self) -> Vec<u8> {
        lock(&self.state).given_up.iter().copied().collect()
    }

    /// Records that the failure of `entry` is reported to the user. Returns whether this is the
    /// first report.
    pub(super) fn report(&self, entry: u8) -> bool {
        self.change(|queue| queue.reported.insert(entry))
    }

    pub(super) fn end(&self) {
        self.change(|queue| queue.ended = true);
    }

    pub(super) fn is_released(&self) -> bool {
        lock(&self.state).released
    }

    /// Records that the source is not needed any more.
    pub(super) fn release(&self) {
        self.change(|queue| queue.released = true);
    }

    /// Records that the source is done with the session, or is gone permanently.
    pub(super) fn source_is_done(&self) {
        self.change(|queue| queue.source_done = true);
    }

    pub(super) fn is_source_done(&self) -> bool {
        lock(&self.state).source_done
    }
}

impl Queue {
    fn next_batch(&self, map: &SharedPageMap) -> Option<Batch> {
        if !self.running {
            return None;
        }
        let now = Instant::now();
        if self.permits_at.is_some_and(|at| at > now) {
            return None;
        }
        let rests = |entry: &u8| {
            let until = self.progress.get(entry).and_then(|progress| progress.rests_until);
            until.is_some_and(|until| until > now)
        };
        let mut entries = map.read(PageMap::entries);
        entries.retain(|entry| !rests(entry) && self.prefetch_turns.may_ask(*entry, &self.silent));
        // the entries take turns, from the one after the last
        entries.sort_by_key(|&entry| (entry <= self.last, entry));
        entries.into_iter().find_map(|entry| {
            let at = self.progress.get(&entry).map_or(0, |progress| progress.at);
            let next = |map: &PageMap| map.first_unfetched(entry, at).or_else(|| map.first_unfetched(entry, 0));
            map.read(next).map(|first| Batch { entry, first })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_answer_do_not_wait_for_silent_ones() {
        let mut turns = Turns::default();
        assert_eq!(turns.start(0, 3), 0..1, "there is one thread for the first entry");
        assert_eq!((turns.start(2, 3), turns.start(9, 3), turns.start(1, 3)), (1..2, 2..3, 3..3));
        let silent = BTreeSet::from([1, 2, 3]);
        assert!(turns.may_ask(1, &silent) && turns.may_ask(7, &silent));
        turns.busy.insert(1);
        assert!(!turns.may_ask(1, &silent), "one thread asks it already");
        assert!(turns.may_ask(2, &silent));
        turns.busy.insert(2);
        assert!(!turns.may_ask(3, &silent) && turns.may_ask(7, &silent), "the last thread is for those that answer");
        // with one thread there is only one entry
        assert!(Turns { threads: 1, ..Turns::default() }.may_ask(1, &silent));
    }
}
