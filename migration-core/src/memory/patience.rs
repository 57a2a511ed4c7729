//! The time that threads which install pages wait for each other, and the error if that time has
//! passed.

use std::{
    io,
    sync::{Condvar, MutexGuard, PoisonError},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use thiserror::Error;

use super::page::PageRange;

/// The longest wait for another thread of the same pager. It is several times the time after which
/// a lane gives up a silent peer. So a thread that waits only for contents from its lane ends by
/// itself before this time has passed.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// The largest number of holders that an error names: as many as lanes usually install at once.
const NAMED: usize = 16;

/// A thread that holds a resource for which other threads may wait.
#[derive(Clone, Debug)]
pub struct Holder {
    thread: Thread,
    pub(super) pages: PageRange,
    since: Instant,
}

impl Holder {
    /// Returns the calling thread as a holder, which is about to install `pages`.
    pub fn this_thread(pages: PageRange) -> Self {
        Self { thread: thread::current(), pages, since: Instant::now() }
    }
}

/// The error that a wait for other threads of the pager has lasted too long.
#[derive(Debug, Error)]
#[error("pages {}+{}: {what} was not to be had within {patience:?}; {holders}", pages.first, pages.count)]
pub struct StillHeld {
    /// The resource that the thread waited for.
    what: &'static str,
    /// The pages that were to be installed.
    pages: PageRange,
    patience: Duration,
    holders: String,
    /// The reason why the thread had to wait for the resource.
    source: Option<io::Error>,
}

impl StillHeld {
    /// Describes a wait for `what`, which `holders` had, to install `pages`.
    pub fn new<'a>(
        what: &'static str,
        pages: PageRange,
        patience: Duration,
        holders: impl Iterator<Item = &'a Holder>,
        source: Option<io::Error>,
    ) -> Self {
        let mut holders: Vec<_> = holders
            .map(|Holder { thread, pages, since }| {
                let seconds = since.elapsed().as_secs_f64();
                let thread = thread.name().map_or_else(|| format!("{:?}", thread.id()), str::to_owned);
                format!("{thread} has had one for pages {}+{} for {seconds:.1} s", pages.first, pages.count)
            })
            .collect();
        let others = holders.len().saturating_sub(NAMED);
        if others != 0 {
            holders.truncate(NAMED);
            holders.push(format!("and {others} more threads"));
        }
        Self { what, pages, patience, holders: holders.join(", "), source }
    }
}

/// Waits on `changed` until it is notified. Also returns on a spurious wake-up. Returns `None` once
/// `deadline` has passed.
pub fn wait_until<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>, deadline: Instant) -> Option<MutexGuard<'a, T>> {
    let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
    let waited = changed.wait_timeout(guard, left);
    Some(waited.unwrap_or_else(PoisonError::into_inner).0)
}
