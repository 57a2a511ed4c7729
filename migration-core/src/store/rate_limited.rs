//! A page store with a limit of the bandwidth of puts and prefetches.

use std::{
    fmt,
    num::NonZeroU64,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use super::{
    Clock, Incarnation, Namespace, NamespaceId, Owner, PageData, PageStore, PageToGet, PageToPut, ProcessClock, Record,
    StoreError, Stored, Urgency, VmNamespace, check_get, check_put,
};
use crate::{PAGE_SIZE, lock::lock, vm_id::VmId};

/// The number of pages of a prefetch that are requested from the store at once: 256 KiB. A fault
/// that arrives at the same server waits for at most this amount of each prefetch.
const PREFETCH_PAGES: usize = 64;

/// The clock of a [`RateLimited`] store, with a way to wait. Simulations have their own.
pub trait Pace: Clock {
    /// Returns after `time` has passed on this clock.
    fn wait(&self, time: Duration);
}

impl Pace for ProcessClock {
    fn wait(&self, time: Duration) {
        thread::sleep(time);
    }
}

/// A wait advances the clock, because nothing else advances a manual clock while its user waits.
impl Pace for super::ManualClock {
    fn wait(&self, time: Duration) {
        self.advance(time);
    }
}

/// A wrapper that limits the bandwidth of puts and prefetches of another store. Faults are not
/// delayed, and do not count.
///
/// All users of the value share one budget, for as long as the value lives. Time in which nothing
/// was sent gives no credit: from any moment on, no more bytes begin than the limit allows for the
/// time since then, and one request per user. So a standing copy of a VM that was idle for an hour
/// uses no more of the link afterwards than before.
///
/// A put counts the bytes of its values, and a prefetch counts the bytes of the pages that it
/// requests. A put begins when the time of those before it has passed, however long it is itself,
/// because it is stored whole or not at all. A prefetch is requested from the inner store in pieces
/// of 64 pages. If the next piece would begin after the deadline of the `get`, the call waits for
/// the deadline and returns [`StoreError::TimedOut`] for the remaining pages.
///
/// # Example
///
/// ```
/// use std::num::NonZeroU64;
///
/// use migration_core::store::{MemoryPageStore, PageStore, RateLimited};
///
/// let rack = MemoryPageStore::new("rack-7", 64 << 20);
/// let store = RateLimited::new(rack, NonZeroU64::new(50 << 20)); // 50 MiB/s
/// assert_eq!(store.name(), "rack-7");
/// store.set_limit(None);
/// ```
pub struct RateLimited<S> {
    inner: S,
    pace: Arc<dyn Pace>,
    budget: Mutex<Budget>,
}

struct Budget {
    /// The limit in bytes per second, or `None` for no limit.
    limit: Option<NonZeroU64>,
    /// The time at which the time of all requests that have begun so far has passed.
    free_at: Duration,
}

impl Budget {
    /// Reserves the next time slot for `bytes` bytes. Returns the time that the caller has to wait,
    /// or reserves nothing and returns `None` if that time is longer than `most`.
    fn reserve(&mut self, now: Duration, bytes: u64, most: Duration) -> Option<Duration> {
        let Some(limit) = self.limit else { return Some(Duration::ZERO) };
        let begins = self.free_at.max(now);
        let wait = begins - now;
        if wait > most {
            return None;
        }
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(limit.get());
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.free_at = begins.saturating_add(takes);
        Some(wait)
    }
}

impl<S: PageStore> RateLimited<S> {
    /// Returns a wrapper that limits `inner` to `limit` bytes per second, or does not limit it yet
    /// if `limit` is `None`.
    pub fn new(inner: S, limit: Option<NonZeroU64>) -> Self {
        Self::with_pace(inner, limit, Arc::new(ProcessClock::default()))
    }

    /// Returns a wrapper like [`new`](Self::new), with the clock `pace`. Deadlines remain those of
    /// this process.
    pub fn with_pace(inner: S, limit: Option<NonZeroU64>, pace: Arc<dyn Pace>) -> Self {
        Self { inner, pace, budget: Mutex::new(Budget { limit, free_at: Duration::ZERO }) }
    }

    /// Changes the limit, for requests that begin from now on.
    pub fn set_limit(&self, limit: Option<NonZeroU64>) {
        lock(&self.budget).limit = limit;
    }

    /// Returns the inner store.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// Waits until a request of `bytes` bytes may begin, but at most for the time `most`. Returns
    /// whether the request may begin.
    fn pass(&self, bytes: usize, most: Duration) -> bool {
        let wait = lock(&self.budget).reserve(self.pace.now(), bytes as u64, most);
        // the lock is not held during the wait: later callers wait for a later time
        self.pace.wait(wait.unwrap_or(most));
        wait.is_some()
    }

    fn prefetch(
        &self,
        namespace: VmNamespace,
        pages: &[PageToGet],
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        let mut missing: Option<(u64, u64)> = None;
        for piece in pages.chunks(PREFETCH_PAGES) {
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.pass(piece.len() * PAGE_SIZE, left) {
                return Err(StoreError::TimedOut);
            }
            match self.inner.get(namespace, piece, Urgency::Prefetch, deadline, take) {
                Ok(()) => {}
                Err(StoreError::Missing { count, first, .. }) => {
                    let (before, lowest) = missing.unwrap_or((0, first));
                    missing = Some((before + count, lowest));
                }
                Err(error) => return Err(error),
            }
        }
        match missing {
            Some((count, first)) => Err(StoreError::Missing { namespace: namespace.id, count, first }),
            None => Ok(()),
        }
    }
}

impl<S: PageStore> PageStore for RateLimited<S> {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn room(&self) -> u64 {
        self.inner.room()
    }

    fn introduce(&self, name: &Namespace, vm: VmId) -> Result<(), StoreError> {
        self.inner.introduce(name, vm)
    }

    fn dismiss(&self, namespace: NamespaceId) {
        self.inner.dismiss(namespace);
    }

    fn create(&self, namespace: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError> {
        self.inner.create(namespace, record, lease)
    }

    fn renew(&self, namespace: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError> {
        self.inner.renew(namespace, owner, lease)
    }

    fn put(&self, namespace: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
        check_put(pages)?;
        self.pass(pages.iter().map(|page| page.value.len()).sum(), Duration::MAX);
        self.inner.put(namespace, generation, pages)
    }

    fn get(
        &self,
        namespace: VmNamespace,
        pages: &[PageToGet],
        urgency: Urgency,
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        check_get(pages)?;
        match urgency {
            Urgency::Fault => self.inner.get(namespace, pages, urgency, deadline, take),
            Urgency::Prefetch => self.prefetch(namespace, pages, deadline, take),
        }
    }

    fn record(&self, namespace: NamespaceId) -> Result<Option<Record>, StoreError> {
        self.inner.record(namespace)
    }

    fn forget(&self, namespace: VmNamespace) -> Result<(), StoreError> {
        self.inner.forget(namespace)
    }

    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
        self.inner.expired()
    }
}

impl<S: PageStore> fmt::Debug for RateLimited<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limit = lock(&self.budget).limit;
        f.debug_struct("RateLimited").field("store", &self.inner.name()).field("limit", &limit).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
