//! Which pages are missing, and who is just installing which.

use std::{
    collections::BTreeMap,
    io,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use migration_core::{PageRange, PageSet};

use super::patience::{Holder, PATIENCE, StillHeld, wait_until};

/// The record that fault handlers and installers share. Its lock is held for looking at bits only, never during a
/// request to the kernel or while contents arrive.
pub(super) struct Missing {
    state: Mutex<State>,
    /// A claim was given back.
    released: Condvar,
    /// The longest wait for a claim of another thread.
    patience: Duration,
}

struct State {
    /// Not installed yet; claimed ones among them.
    missing: PageSet,
    /// Being installed.
    claimed: PageSet,
    /// Claimed pages whose fault was read meanwhile.
    touched: PageSet,
    /// The threads that have claims, by the number of the claim.
    holders: BTreeMap<u64, Holder>,
    /// Number of the next claim.
    next: u64,
}

impl Missing {
    pub(super) fn none(pages: u64) -> Self {
        let empty = PageSet::empty(pages);
        let holders = BTreeMap::new();
        let state = State { missing: empty.clone(), claimed: empty.clone(), touched: empty, holders, next: 0 };
        Self { state: Mutex::new(state), released: Condvar::new(), patience: PATIENCE }
    }

    /// Replaces the set of what is missing.
    pub(super) fn set(&self, missing: &PageSet) {
        self.lock().missing.clone_from(missing);
    }

    pub(super) fn len(&self) -> u64 {
        self.lock().missing.len()
    }

    pub(super) fn contains(&self, page: u64) -> bool {
        self.lock().missing.contains(page)
    }

    /// Somebody touched `page`, and sleeps: whether it is missing.
    pub(super) fn touched(&self, page: u64) -> bool {
        let mut state = self.lock();
        if state.claimed.contains(page) {
            state.touched.insert(page);
        }
        state.missing.contains(page)
    }

    /// Claims all of `range`; `None` unless every page of it is missing and unclaimed.
    pub(super) fn claim_whole(&self, range: PageRange) -> Option<Claim<'_>> {
        let mut state = self.lock();
        let whole = state.missing.count_in(range) == range.count && state.claimed.count_in(range) == 0;
        whole.then(|| self.take(&mut state, range, vec![range]))
    }

    /// Claims what is missing in `range` and nobody else has claimed. When others have claimed all that is missing there,
    /// it waits until they are done, for they may fail. `None` when nothing is missing in it any more.
    ///
    /// Who calls this must hold no claim: two of them could wait for each other.
    ///
    /// # Errors
    /// Of kind `TimedOut`, when others have not come to an end in time: it names the threads.
    pub(super) fn claim(&self, range: PageRange) -> io::Result<Option<Claim<'_>>> {
        let deadline = Instant::now() + self.patience;
        let mut state = self.lock();
        loop {
            let free = state.free(range);
            if !free.is_empty() {
                return Ok(Some(self.take(&mut state, range, free)));
            }
            if state.missing.count_in(range) == 0 {
                return Ok(None);
            }
            state = match wait_until(&self.released, state, deadline) {
                Some(state) => state,
                None => return Err(self.still_claimed(range)),
            };
        }
    }

    fn still_claimed(&self, range: PageRange) -> io::Error {
        let state = self.lock();
        let overlap = state
            .holders
            .values()
            .filter(|holder| holder.pages.first < range.end() && range.first < holder.pages.end());
        let held = StillHeld::new("their claim", range, self.patience, overlap, None);
        io::Error::new(io::ErrorKind::TimedOut, held)
    }

    /// Claims `runs`, which lie in `range`.
    fn take(&self, state: &mut State, range: PageRange, runs: Vec<PageRange>) -> Claim<'_> {
        runs.iter().for_each(|&run| state.claimed.insert_range(run));
        let number = state.next;
        state.next += 1;
        state.holders.insert(number, Holder::this_thread(range));
        Claim { missing: self, number, runs, installed: Vec::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // no code that holds the lock leaves the record half-changed
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn free(&self, range: PageRange) -> Vec<PageRange> {
        let mut free = Vec::new();
        for run in self.missing.ranges_in(range) {
            let mut at = run.first;
            for taken in self.claimed.ranges_in(run) {
                free.push(PageRange::new(at, taken.first - at));
                at = taken.end();
            }
            free.push(PageRange::new(at, run.end() - at));
        }
        free.retain(|run| run.count != 0);
        free
    }
}

/// Missing pages that one thread may install. When it is dropped, what was not installed is missing and free again.
pub(super) struct Claim<'a> {
    missing: &'a Missing,
    /// Of this claim.
    number: u64,
    runs: Vec<PageRange>,
    installed: Vec<PageRange>,
}

impl Claim<'_> {
    /// The pages: maximal runs, ascending.
    pub(super) fn runs(&self) -> Vec<PageRange> {
        self.runs.clone()
    }

    /// These pages are there now.
    pub(super) fn installed(&mut self, pages: PageRange) {
        self.installed.push(pages);
    }

    /// Ends the claim; the runs in which a fault was read meanwhile. Whoever reads a fault of a claimed page takes it
    /// for a missing one. But it may have been there already and been discarded again, before this record knew. So the
    /// installer wakes who sleeps there, and the fault is raised once more and seen for what it is.
    pub(super) fn finish(mut self) -> Vec<PageRange> {
        self.release()
    }

    fn release(&mut self) -> Vec<PageRange> {
        let runs = std::mem::take(&mut self.runs);
        if runs.is_empty() {
            return runs;
        }
        let mut state = self.missing.lock();
        state.holders.remove(&self.number);
        self.installed.drain(..).for_each(|run| state.missing.remove_range(run));
        let touched = runs.iter().copied().filter(|&run| state.touched.count_in(run) != 0).collect();
        for run in runs {
            state.claimed.remove_range(run);
            state.touched.remove_range(run);
        }
        drop(state);
        self.missing.released.notify_all();
        touched
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

    fn range(first: u64, count: u64) -> PageRange {
        PageRange::new(first, count)
    }

    fn missing(runs: &[PageRange]) -> Missing {
        let (record, mut set) = (Missing::none(200), PageSet::empty(200));
        runs.iter().for_each(|&run| set.insert_range(run));
        record.set(&set);
        record
    }

    #[test]
    fn a_claim_takes_what_is_free_and_gives_back_what_it_did_not_install() {
        let record = missing(&[range(10, 20), range(40, 5)]);
        let mut a = record.claim(range(15, 5)).unwrap().unwrap();
        assert_eq!(a.runs(), [range(15, 5)]);
        assert!(record.claim_whole(range(10, 20)).is_none());
        assert!(record.claim_whole(range(28, 4)).is_none());
        let b = record.claim(range(0, 200)).unwrap().unwrap();
        assert_eq!(b.runs(), [range(10, 5), range(20, 10), range(40, 5)]);
        a.installed(range(15, 2));
        drop((a, b));
        assert_eq!(record.len(), 23);
        assert_eq!(record.claim(range(0, 30)).unwrap().unwrap().runs(), [range(10, 5), range(17, 13)]);
        assert!(record.claim(range(15, 2)).unwrap().is_none());
        assert!(record.claim_whole(range(17, 13)).is_some());
    }

    #[test]
    fn who_finds_all_claimed_waits_for_the_outcome() {
        let record = missing(&[range(0, 2)]);
        let mut first = record.claim_whole(range(0, 2)).unwrap();
        thread::scope(|scope| {
            let second = scope.spawn(|| record.claim(range(0, 2)).unwrap().map(|claim| claim.runs()));
            first.installed(range(0, 1));
            drop(first);
            assert_eq!(second.join().unwrap().unwrap(), [range(1, 1)]);
        });
    }

    #[test]
    fn a_wait_for_a_claim_ends_and_names_who_has_it() {
        let mut record = missing(&[range(0, 2), range(8, 4)]);
        record.patience = Duration::from_millis(1);
        let others = record.claim_whole(range(8, 4)).unwrap();
        thread::scope(|scope| {
            let record = &record;
            let hold = move || record.claim_whole(range(0, 2)).unwrap();
            let claim = thread::Builder::new().name("mig-lane-3".into()).spawn_scoped(scope, hold).unwrap();
            let claim = claim.join().unwrap();
            let error = record.claim(range(1, 1)).err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            let text = error.to_string();
            assert!(text.contains("mig-lane-3 has had one for pages 0+2"), "{text}");
            assert!(!text.contains("8+4"), "{text}");
            drop(claim);
            assert_eq!(record.claim(range(1, 1)).unwrap().unwrap().runs(), [range(1, 1)]);
        });
        drop(others);
        assert!(record.lock().holders.is_empty());
    }

    #[test]
    fn a_fault_during_an_installation_is_told_to_the_installer() {
        let record = missing(&[range(0, 8)]);
        let claim = record.claim_whole(range(0, 4)).unwrap();
        assert!(record.touched(2) && record.touched(6));
        assert!(!record.touched(9));
        assert_eq!(claim.finish(), [range(0, 4)]);
        assert!(record.claim_whole(range(0, 8)).unwrap().finish().is_empty());
    }
}
