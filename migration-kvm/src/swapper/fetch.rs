//! Brings pages back that somebody has touched.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use migration_core::{
    PageRange,
    paged_memory::{FetchError, MAX_FETCHED_PAGES},
    pager::Pager,
    store::Urgency,
    text::describe,
    vm::VmError,
};

use super::{Swapper, lock};

/// How long it takes until a fetch is repeated that has failed, the first time and at most.
const RETRY: [Duration; 2] = [Duration::from_millis(10), Duration::from_secs(2)];
/// After so long it is looked again at a page that another thread fetches.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// A missing page that somebody waits for.
pub(super) struct Waiter {
    /// When its first fault was read.
    since: Instant,
    /// Whether a thread fetches it.
    busy: bool,
    not_before: Option<Instant>,
    /// The delay before the next repetition.
    retry: Duration,
}

/// What a thread that fetches does next.
enum Next {
    Fetch(u64),
    Wait(Option<Instant>),
}

fn next(waiting: &BTreeMap<u64, Waiter>, now: Instant) -> Next {
    let idle = || waiting.iter().filter(|(_, waiter)| !waiter.busy);
    let ready = idle().filter(|(_, waiter)| waiter.not_before.is_none_or(|at| at <= now));
    match ready.min_by_key(|(_, waiter)| waiter.since) {
        Some((&page, _)) => Next::Fetch(page),
        None => Next::Wait(idle().filter_map(|(_, waiter)| waiter.not_before).min()),
    }
}

impl Swapper {
    /// Waits for faults of the guest, for `timeout` at most, and sorts them out. A page that was about to
    /// be evicted is mapped again, and one that was never populated becomes a page of zeros. Pages that
    /// are in a store are left to [`fetch_waiting`](Self::fetch_waiting). Returns how many of those
    /// faults there were.
    ///
    /// Several threads may call this. None of them ever waits for a store.
    ///
    /// # Errors
    /// Only when the pager is broken, or memory is short. The faults that were read are served as far
    /// as possible.
    pub fn serve_faults(&self, timeout: Duration) -> Result<usize, VmError> {
        let mut faults = Vec::new();
        let waited = self.pager.wait(timeout, &mut faults);
        if !faults.is_empty() {
            let now = Instant::now();
            let mut waiting = lock(&self.waiting);
            for fault in &faults {
                let new = || Waiter { since: now, busy: false, not_before: None, retry: RETRY[0] };
                waiting.entry(fault.page).or_insert_with(new);
            }
            drop(waiting);
            lock(&self.counters).faults += faults.len() as u64;
            self.waits.notify_all();
        }
        waited.map(|()| faults.len())
    }

    /// Fetches the page that somebody has waited for longest, with its neighbours. Waits for such a page
    /// for `timeout` at most. Returns how many pages were fetched.
    ///
    /// # Errors
    /// [`FetchError`]. The page is fetched again after a while, and whoever waits for it goes on
    /// waiting.
    pub fn fetch_waiting(&self, timeout: Duration) -> Result<u64, FetchError> {
        let Some(page) = self.next_page(Instant::now() + timeout) else { return Ok(0) };
        let block = self.options.neighbours.clamp(1, MAX_FETCHED_PAGES);
        let end = (page - page % block + block).min(self.map.read(|map| map.pages()));
        let around = PageRange::new(page - page % block, end - (page - page % block));
        let fetched = self.memory.fetch(around, Urgency::Fault, Instant::now() + self.options.fetch_timeout);
        self.conclude(page, around, fetched.as_ref().map(|installed| installed.pages));
        fetched.map(|installed| installed.pages)
    }

    /// Waits for a page that is to be fetched. `None` at the deadline, and when the swapper stops.
    fn next_page(&self, deadline: Instant) -> Option<u64> {
        let mut waiting = lock(&self.waiting);
        loop {
            let now = Instant::now();
            let until = match next(&waiting, now) {
                // until somebody opens the gate
                Next::Fetch(_) if self.gate.is_shut() => deadline,
                Next::Fetch(page) => {
                    waiting.get_mut(&page)?.busy = true;
                    return Some(page);
                }
                Next::Wait(at) => at.map_or(deadline, |at| at.min(deadline)),
            };
            if now >= deadline || lock(&self.signal).stop {
                return None;
            }
            let waited = self.waits.wait_timeout(waiting, until.saturating_duration_since(now));
            waiting = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }

    /// A fetch of `page` and what is around it has ended.
    fn conclude(&self, page: u64, around: PageRange, fetched: Result<u64, &FetchError>) {
        lock(&self.recent).insert_range(around);
        let now = Instant::now();
        let mut waiting = lock(&self.waiting);
        let missing = self.map.read(|map| {
            let asked = waiting.range(around.pages()).map(|(&page, _)| page);
            asked.filter(|&page| map.missing().contains(page)).collect::<Vec<_>>()
        });
        let asked: Vec<_> = waiting.range(around.pages()).map(|(&page, _)| page).collect();
        let mut counters = lock(&self.counters);
        for there in asked.into_iter().filter(|page| !missing.contains(page)) {
            if let Some(waiter) = waiting.remove(&there) {
                counters.fetch_latency.record(now.saturating_duration_since(waiter.since));
            }
        }
        if let Some(waiter) = waiting.get_mut(&page) {
            let delay = if fetched.is_ok() { LOOK_AGAIN } else { waiter.retry };
            waiter.busy = false;
            waiter.not_before = Some(now + delay);
            if fetched.is_err() {
                waiter.retry = (2 * waiter.retry).min(RETRY[1]);
            }
        }
        match fetched {
            Ok(pages) => counters.fetched += pages,
            Err(_) if self.gate.is_shut() => {}
            Err(error) => {
                counters.failed_fetches += 1;
                counters.problem = Some(describe(error));
            }
        }
    }
}
