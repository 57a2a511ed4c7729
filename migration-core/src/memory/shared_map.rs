//! A page map that several threads use at once. Each thread has its own claim on the pages that it
//! installs.

use std::{
    collections::BTreeMap,
    io,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    page::PageRange,
    page_map::{PageCopy, PageMap, StoreCopy},
    page_set::PageSet,
    patience::{Holder, PATIENCE, StillHeld, wait_until},
};

/// The largest number of runs of pages in one claim.
const MAX_RUNS: usize = 1024;

/// The [`PageMap`] of a VM whose pages arrive while it runs. Its lock is held only for short reads
/// and changes of the map, never during a system call or while contents arrive. During those a
/// thread has a [`Claim`].
pub struct SharedPageMap {
    state: Mutex<State>,
    /// Notified when a claim is released.
    released: Condvar,
    /// The longest wait for a claim of another thread.
    patience: Duration,
}

struct State {
    map: PageMap,
    /// Claims by their number.
    claims: BTreeMap<u64, Claimed>,
    /// The number of the next claim.
    next: u64,
}

struct Claimed {
    holder: Holder,
    /// The claimed pages. The flag says whether a fault of a page of the run was read during the
    /// claim.
    runs: Vec<(PageRange, bool)>,
}

impl SharedPageMap {
    /// Returns a shared map of `map`.
    pub fn new(map: PageMap) -> Self {
        let state = State { map, claims: BTreeMap::new(), next: 0 };
        Self { state: Mutex::new(state), released: Condvar::new(), patience: PATIENCE }
    }

    /// Calls `look` with the map. No other thread can change the map during the call.
    pub fn read<T>(&self, look: impl FnOnce(&PageMap) -> T) -> T {
        look(&self.lock().map)
    }

    /// Calls `change` with the map. `change` must not take a page away from the thread that has
    /// claimed it.
    pub fn change<T>(&self, change: impl FnOnce(&mut PageMap) -> T) -> T {
        change(&mut self.lock().map)
    }

    /// Returns the missing pages.
    pub fn missing(&self) -> PageSet {
        self.read(|map| map.missing().clone())
    }

    /// Returns whether `page` is missing.
    pub fn is_missing(&self, page: u64) -> bool {
        self.read(|map| map.missing().contains(page))
    }

    /// Records that a fault of `page` was read: a thread has touched the page and sleeps. Returns
    /// whether the page is missing.
    pub fn touched(&self, page: u64) -> bool {
        let mut state = self.lock();
        if !state.map.missing().contains(page) {
            return false;
        }
        let runs = state.claims.values_mut().flat_map(|claim| &mut claim.runs);
        if let Some((_, touched)) = runs.into_iter().find(|(run, _)| run.pages().contains(&page)) {
            *touched = true;
        }
        true
    }

    /// Claims all of `range`, to install it from `copy`. Returns `None` unless every page of
    /// `range` is missing and unclaimed, and `copy` is current for it.
    pub fn claim_whole(&self, range: PageRange, copy: PageCopy) -> Option<Claim<'_>> {
        self.take(&mut self.lock(), range, copy, vec![range])
    }

    /// Claims the pages of `range` that are missing, can be installed from `copy`, and are not
    /// claimed by another thread. Takes at most the first 1024 runs of them, so that the lock is
    /// held only for a short time. If other threads have claimed all pages that are missing there,
    /// the call waits until they have finished, because they may fail. Returns `None` if no page of
    /// `range` is to be installed from `copy`: the pages are installed, or their newest content is
    /// elsewhere by now (rule 2).
    ///
    /// The calling thread must hold no claim: two such threads could wait for each other.
    ///
    /// # Errors
    /// Returns an error of kind `TimedOut` if other threads have not released their claims within a
    /// minute. The error names the threads.
    pub fn claim(&self, range: PageRange, copy: PageCopy) -> io::Result<Option<Claim<'_>>> {
        let deadline = Instant::now() + self.patience;
        let mut state = self.lock();
        loop {
            let free = state.map.free_runs(range, copy, MAX_RUNS);
            if !free.is_empty() {
                return Ok(self.take(&mut state, range, copy, free));
            }
            if !state.map.is_claimed_in(range) {
                return Ok(None);
            }
            state = match wait_until(&self.released, state, deadline) {
                Some(state) => state,
                None => return Err(self.still_claimed(range)),
            };
        }
    }

    /// Returns the pages of `range` that are in stores, with their copies, in ascending order.
    /// Waits first until no thread has claimed a page of `range`: the guest may write a page as
    /// soon as it is installed, and the copy then differs from what the guest reads.
    ///
    /// # Errors
    /// Returns the errors of [`claim`](Self::claim).
    pub fn stored_runs(&self, range: PageRange) -> io::Result<Vec<(PageRange, StoreCopy)>> {
        let deadline = Instant::now() + self.patience;
        let mut state = self.lock();
        while state.map.is_claimed_in(range) {
            state = match wait_until(&self.released, state, deadline) {
                Some(state) => state,
                None => return Err(self.still_claimed(range)),
            };
        }
        let mut runs = state.map.unfetched_runs(range, range.count);
        drop(state);
        runs.sort_by_key(|(run, _)| run.first);
        Ok(runs)
    }

    fn still_claimed(&self, range: PageRange) -> io::Error {
        let state = self.lock();
        let holders = state.claims.values().map(|claim| &claim.holder);
        let overlap = holders.filter(|holder| holder.pages.first < range.end() && range.first < holder.pages.end());
        let held = StillHeld::new("their claim", range, self.patience, overlap, None);
        io::Error::new(io::ErrorKind::TimedOut, held)
    }

    /// Claims `runs`, which lie in `range`. `runs` is either one run that may not be free, or
    /// several free runs.
    fn take(&self, state: &mut State, range: PageRange, copy: PageCopy, runs: Vec<PageRange>) -> Option<Claim<'_>> {
        for &run in &runs {
            let claimed = match copy {
                PageCopy::Source => state.map.claim(run),
                PageCopy::Store(copy) => state.map.claim_stored(run, copy),
            };
            claimed.ok()?;
        }
        let number = state.next;
        state.next += 1;
        let holder = Holder::this_thread(range);
        state.claims.insert(number, Claimed { holder, runs: runs.iter().map(|&run| (run, false)).collect() });
        Some(Claim { shared: self, number, runs, installed: Vec::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // no code that holds the lock leaves the map with half a change
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Missing pages that one thread may install. When the claim is dropped, the pages that were not
/// installed can be claimed again.
pub struct Claim<'a> {
    shared: &'a SharedPageMap,
    number: u64,
    runs: Vec<PageRange>,
    installed: Vec<PageRange>,
}

impl Claim<'_> {
    /// Returns the claimed pages as maximal runs in ascending order.
    pub fn runs(&self) -> Vec<PageRange> {
        self.runs.clone()
    }

    /// Records that `pages` are installed. Pages that this claim does not have are ignored.
    pub fn installed(&mut self, pages: PageRange) {
        self.installed.push(pages);
    }

    /// Ends the claim. Returns the runs of which a fault was read during the claim.
    ///
    /// A thread that reads a fault of a claimed page treats the page as missing. But the page may
    /// have been installed already and been discarded again, before the map recorded it. So the
    /// installer wakes the threads that sleep on the returned runs. Their fault is raised once more
    /// and is then handled as what it is.
    pub fn finish(mut self) -> Vec<PageRange> {
        self.release()
    }

    fn release(&mut self) -> Vec<PageRange> {
        if self.runs.is_empty() {
            return Vec::new();
        }
        let mut state = self.shared.lock();
        let claimed = state.claims.remove(&self.number);
        for run in self.installed.drain(..) {
            // an error means that this claim does not have these pages, which is ignored
            let _ = state.map.arrived(run);
        }
        for run in self.runs.drain(..) {
            let rest: Vec<_> = state.map.missing().ranges_in(run).collect();
            // no other thread has claimed the run, so this cannot fail
            rest.into_iter().for_each(|run| _ = state.map.unclaim(run));
        }
        drop(state);
        self.shared.released.notify_all();
        let runs = claimed.map(|claimed| claimed.runs).unwrap_or_default();
        runs.into_iter().filter_map(|(run, touched)| touched.then_some(run)).collect()
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const SOURCE: PageCopy = PageCopy::Source;

    fn range(first: u64, count: u64) -> PageRange {
        PageRange::new(first, count)
    }

    fn missing(runs: &[PageRange]) -> SharedPageMap {
        let (mut map, mut set) = (PageMap::new(200), PageSet::empty(200));
        runs.iter().for_each(|&run| set.insert_range(run));
        map.leave_behind(&set).unwrap();
        SharedPageMap::new(map)
    }

    #[test]
    fn a_claim_takes_what_is_free_and_gives_back_what_it_did_not_install() {
        let record = missing(&[range(10, 20), range(40, 5)]);
        let mut a = record.claim(range(15, 5), SOURCE).unwrap().unwrap();
        assert_eq!(a.runs(), [range(15, 5)]);
        assert!(record.claim_whole(range(10, 20), SOURCE).is_none());
        assert!(record.claim_whole(range(28, 4), SOURCE).is_none());
        let b = record.claim(range(0, 200), SOURCE).unwrap().unwrap();
        assert_eq!(b.runs(), [range(10, 5), range(20, 10), range(40, 5)]);
        a.installed(range(15, 2));
        drop((a, b));
        assert_eq!(record.missing().len(), 23);
        assert_eq!(record.claim(range(0, 30), SOURCE).unwrap().unwrap().runs(), [range(10, 5), range(17, 13)]);
        assert!(record.claim(range(15, 2), SOURCE).unwrap().is_none());
        assert!(record.claim_whole(range(17, 13), SOURCE).is_some());
    }

    #[test]
    fn who_finds_all_claimed_waits_for_the_outcome() {
        let record = missing(&[range(0, 2)]);
        let mut first = record.claim_whole(range(0, 2), SOURCE).unwrap();
        thread::scope(|scope| {
            let second = scope.spawn(|| record.claim(range(0, 2), SOURCE).unwrap().map(|claim| claim.runs()));
            first.installed(range(0, 1));
            drop(first);
            assert_eq!(second.join().unwrap().unwrap(), [range(1, 1)]);
        });
    }

    #[test]
    fn a_wait_for_a_claim_ends_and_names_who_has_it() {
        let mut record = missing(&[range(0, 2), range(8, 4)]);
        record.patience = Duration::from_millis(1);
        let others = record.claim_whole(range(8, 4), SOURCE).unwrap();
        thread::scope(|scope| {
            let record = &record;
            let hold = move || record.claim_whole(range(0, 2), SOURCE).unwrap();
            let claim = thread::Builder::new().name("mig-lane-3".into()).spawn_scoped(scope, hold).unwrap();
            let claim = claim.join().unwrap();
            let error = record.claim(range(1, 1), SOURCE).err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            let text = error.to_string();
            assert!(text.contains("mig-lane-3 has had one for pages 0+2"), "{text}");
            assert!(!text.contains("8+4"), "{text}");
            drop(claim);
            assert_eq!(record.claim(range(1, 1), SOURCE).unwrap().unwrap().runs(), [range(1, 1)]);
        });
        drop(others);
        assert!(record.lock().claims.is_empty());
    }

    #[test]
    fn a_fault_during_an_installation_is_told_to_the_installer() {
        let record = missing(&[range(0, 8)]);
        let claim = record.claim_whole(range(0, 4), SOURCE).unwrap();
        assert!(record.touched(2) && record.touched(6));
        assert!(!record.touched(9));
        assert_eq!(claim.finish(), [range(0, 4)]);
        assert!(record.claim_whole(range(0, 8), SOURCE).unwrap().finish().is_empty());
    }

    #[test]
    fn who_reads_stored_pages_waits_for_those_that_are_being_installed() {
        let record = missing(&[range(0, 4)]);
        let copy = |generation| StoreCopy { entry: 0, generation };
        record.change(|map| {
            map.located(range(0, 2), copy(2), false);
            map.located(range(2, 2), copy(1), false);
        });
        let mut claim = record.claim_whole(range(1, 1), PageCopy::Store(copy(2))).unwrap();
        assert_eq!(record.stored_runs(range(2, 5)).unwrap(), [(range(2, 2), copy(1))]);
        thread::scope(|scope| {
            let reader = scope.spawn(|| record.stored_runs(range(0, 4)).unwrap());
            claim.installed(range(1, 1));
            claim.finish();
            assert_eq!(reader.join().unwrap(), [(range(0, 1), copy(2)), (range(2, 2), copy(1))]);
        });
        assert_eq!(record.stored_runs(range(9, 5)).unwrap(), []);
    }

    #[test]
    fn a_claim_is_for_one_copy() {
        let record = missing(&[range(0, 30)]);
        let copy = |generation| StoreCopy { entry: 0, generation };
        record.change(|map| {
            map.located(range(0, 10), copy(1), true);
            map.located(range(10, 10), copy(2), false);
        });
        let store = |generation| PageCopy::Store(copy(generation));
        // the source's copy is current for pages that are at the source or held there
        let from_source = record.claim(range(0, 30), SOURCE).unwrap().unwrap();
        assert_eq!(from_source.runs(), [range(0, 10), range(20, 10)]);
        assert_eq!(record.claim(range(10, 10), store(1)).unwrap().map(|claim| claim.runs()), None);
        let stored = record.claim(range(10, 10), store(2)).unwrap().unwrap();
        assert_eq!(stored.runs(), [range(10, 10)]);
        drop((from_source, stored));
        assert!(record.claim_whole(range(5, 10), SOURCE).is_none(), "half of it is only in the store");
        assert!(record.claim_whole(range(5, 5), store(2)).is_none());
        assert!(record.claim_whole(range(5, 5), store(1)).is_some());
    }
}
