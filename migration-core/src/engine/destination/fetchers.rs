//! Which pages in stores are to be fetched, and which thread asks which entry of the store table
//! for them next.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    num::NonZeroU64,
    ops::Range,
    sync::Condvar,
};

use super::*;
use crate::{
    PAGE_SIZE,
    page_map::PageMap,
    paged_memory::{MAX_FETCHED_PAGES, PagedMemory},
    shared_map::SharedPageMap,
    store::Owner,
};

/// Most threads of one VM that fetch pages for which somebody waits.
const MOST_FAULT_THREADS: usize = 4;
/// Most threads of one VM that fetch all other pages.
const MOST_PREFETCH_THREADS: usize = 2;
/// The time from a fetch that has failed to the next attempt.
const BACK_OFF: Duration = Duration::from_millis(200);
/// The longest time for which a rate keeps the next batch waiting.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);
/// The longest time without a look whether there is something to do.
const TICK: Duration = Duration::from_millis(200);

/// The pages in stores that are to be fetched for one VM.
///
/// Some threads fetch pages for which somebody waits, and others fetch ahead, so that a fault never
/// waits for a page that nobody wants yet. How many there are depends on the number of entries: see
/// [`Turns`] for why.
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
    /// How far each entry was fetched ahead.
    progress: BTreeMap<u8, Progress>,
    /// The entry that was fetched ahead last.
    last: u8,
    /// Entries whose stores were silent at the last attempt.
    silent: BTreeSet<u8>,
    /// Entries that were silent, and for whose pages the source was told to care.
    given_up: BTreeSet<u8>,
    /// Entries of which the user was told that they have failed.
    reported: BTreeSet<u8>,
    running: bool,
    ended: bool,
    released: bool,
    /// Whether the source has said that nothing follows.
    source_done: bool,
    /// The most bytes a second that are fetched ahead.
    rate: Option<NonZeroU64>,
    /// The time from which the rate permits the next batch.
    permits_at: Option<Instant>,
}

/// A page for which somebody waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) page: u64,
    /// The entry that had the page when it was asked for.
    pub(super) entry: u8,
    /// The time from which it is fetched.
    due: Instant,
}

#[derive(Clone, Copy, Default)]
struct Progress {
    /// The page from which the next batch begins.
    at: u64,
    /// The end of the pause after a failure.
    rests_until: Option<Instant>,
}

/// Pages to be fetched ahead: those of one entry, from a page on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) entry: u8,
    pub(super) first: u64,
}

/// Which entries are asked by the threads of one kind.
///
/// An entry is asked by one thread of a kind at a time, and an entry that was silent never by the
/// last thread that is free. So entries that answer do not wait for those that do not.
#[derive(Default)]
struct Turns {
    threads: usize,
    busy: BTreeSet<u8>,
}

impl Turns {
    /// Returns the numbers of the threads that are to be started for so many entries.
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

/// The threads that are to be started.
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

    /// Counts the threads that the present table needs, and returns those that are not there yet.
    pub(super) fn more_threads(&self) -> MoreThreads {
        let entries = usize::from(self.memory.entries());
        self.change(|queue| MoreThreads {
            for_faults: queue.fault_turns.start(entries, MOST_FAULT_THREADS),
            for_prefetch: queue.prefetch_turns.start(entries, MOST_PREFETCH_THREADS),
        })
    }

    /// Somebody waits for `page`, which is in a store of `entry`.
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

    /// Returns the next page to be fetched for somebody who waits; `None` when this has ended. The
    /// caller asks the entry for it, and calls [`fault_tried`](Self::fault_tried).
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

    /// An attempt to fetch the page has ended. It is tried again if the page is still in an entry.
    pub(super) fn fault_tried(&self, fault: Fault, still_in: Option<u8>) {
        self.change(|queue| queue.fault_turns.busy.remove(&fault.entry));
        if let Some(entry) = still_in {
            self.add(Fault { entry, due: Instant::now() + BACK_OFF, ..fault });
        }
    }

    /// Returns the next pages to be fetched ahead; `None` when this has ended. Waits until the VM
    /// runs (rule 7), and while there are none. The caller asks the entry for them, and calls
    /// [`batch_tried`](Self::batch_tried).
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

    /// Limits what is fetched ahead to so many bytes a second.
    pub(super) fn limit(&self, rate: Option<NonZeroU64>) {
        self.change(|queue| queue.rate = rate);
    }

    /// So many pages were fetched ahead: the next ones come when the rate permits.
    pub(super) fn fetched_ahead(&self, pages: u64) {
        self.change(|queue| {
            let Some(rate) = queue.rate else { return };
            let now = Instant::now();
            let seconds = (pages * PAGE_SIZE as u64) as f64 / rate.get() as f64;
            let time = Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST_PAUSE).min(LONGEST_PAUSE);
            queue.permits_at = Some(queue.permits_at.map_or(now, |at| at.max(now)) + time);
        });
    }

    /// Returns what of the missing pages is in which store.
    pub(super) fn stored(&self, map: &PageMap) -> BTreeMap<String, u64> {
        let mut stores = BTreeMap::new();
        for (entry, pages) in map.stored_pages() {
            for name in self.memory.stores_of(entry) {
                *stores.entry(name).or_default() += pages;
            }
        }
        stores
    }

    /// An attempt to fetch pages ahead has ended.
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

    /// Further pages are in stores.
    pub(super) fn wake(&self) {
        self.change(|_| {});
    }

    /// The VM runs: from now on pages that the source holds are fetched, too (rule 7).
    pub(super) fn run(&self) {
        self.change(|queue| queue.running = true);
    }

    pub(super) fn is_running(&self) -> bool {
        lock(&self.state).running
    }

    /// Waits until the VM runs. Returns whether it does.
    pub(super) fn wait_running(&self) -> bool {
        let waiting = |queue: &mut Queue| !queue.running && !queue.ended;
        let queue = self.changed.wait_while(lock(&self.state), waiting).unwrap_or_else(|e| e.into_inner());
        !queue.ended
    }

    /// Waits for this time, or until this has ended. Returns whether it goes on.
    pub(super) fn pause(&self, time: Duration) -> bool {
        let queue = lock(&self.state);
        let waited = self.changed.wait_timeout_while(queue, time, |queue| !queue.ended);
        !waited.unwrap_or_else(|e| e.into_inner()).0.ended
    }

    /// The stores of `entry` have answered.
    pub(super) fn answered(&self, entry: u8) {
        self.change(|queue| queue.silent.remove(&entry));
    }

    /// A store of `entry` does not answer.
    pub(super) fn mark_silent(&self, entry: u8) {
        self.change(|queue| queue.silent.insert(entry));
    }

    /// Returns whether the stores of `entry` were silent at the last attempt.
    pub(super) fn is_silent(&self, entry: u8) -> bool {
        lock(&self.state).silent.contains(&entry)
    }

    /// The source is to send the pages of `entry` that it holds. Returns whether this is new.
    pub(super) fn mark_given_up(&self, entry: u8) -> bool {
        self.change(|queue| queue.given_up.insert(entry))
    }

    /// The source could not be told.
    pub(super) fn unmark_given_up(&self, entry: u8) {
        self.change(|queue| queue.given_up.remove(&entry));
    }

    /// Returns the entries that were given up, ascending.
    pub(super) fn given_up(&self) -> Vec<u8> {
        lock(&self.state).given_up.iter().copied().collect()
    }

    /// The user is told that `entry` has failed. Returns whether this is the first time.
    pub(super) fn report(&self, entry: u8) -> bool {
        self.change(|queue| queue.reported.insert(entry))
    }

    pub(super) fn end(&self) {
        self.change(|queue| queue.ended = true);
    }

    pub(super) fn is_released(&self) -> bool {
        lock(&self.state).released
    }

    /// The source is not needed any more.
    pub(super) fn release(&self) {
        self.change(|queue| queue.released = true);
    }

    /// The source is done with the session, or gone for ever.
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
        // each in its turn
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
        // where there is one thread, there is one entry
        assert!(Turns { threads: 1, ..Turns::default() }.may_ask(1, &silent));
    }
}
