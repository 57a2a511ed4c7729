//! Cuts links in memory, for tests of network failures.
#![cfg_attr(not(any(test, feature = "test-utils")), allow(dead_code))]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::{Ending, Pipe};

/// Cuts all channels of a link in memory, at once or at a given byte, like a broken network.
///
/// After the cut, reads and writes on the open channels fail with `ConnectionReset`, and new
/// connections fail with `TimedOut` until [`restore`](Self::restore). Clones cut the same link.
#[derive(Clone, Debug, Default)]
pub struct Cut {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    sent: Count,
    received: Count,
    cut: bool,
    pipes: Vec<Weak<Pipe>>,
}

#[derive(Debug, Default)]
struct Count {
    done: u64,
    limit: Option<u64>,
}

impl Count {
    fn left(&self) -> u64 {
        self.limit.map_or(u64::MAX, |limit| limit.saturating_sub(self.done))
    }

    fn take(&mut self, bytes: usize) -> usize {
        let granted = usize::try_from(self.left()).unwrap_or(usize::MAX).min(bytes);
        self.done += granted as u64;
        granted
    }
}

impl Cut {
    /// Cuts the link now. Bytes that were sent and not yet received are lost.
    pub fn cut(&self) {
        self.trip(Ending::Lost);
    }

    /// Cuts the link as soon as `bytes` further bytes were sent, counted over all channels and both
    /// directions. All of these bytes can still be received. The peer notices the cut after the
    /// last of them.
    pub fn after_sent(&self, bytes: u64) {
        let mut state = self.lock();
        state.sent.limit = Some(state.sent.done.saturating_add(bytes));
        drop(state);
        self.check();
    }

    /// Cuts the link as soon as `bytes` further bytes were received, counted over all channels and
    /// both directions. All bytes sent after these are lost, although the sender may assume that
    /// they arrived.
    pub fn after_received(&self, bytes: u64) {
        let mut state = self.lock();
        state.received.limit = Some(state.received.done.saturating_add(bytes));
        drop(state);
        self.check();
    }

    /// Repairs the link: new connections succeed again. Channels that were cut stay cut, and limits
    /// are removed.
    pub fn restore(&self) {
        let mut state = self.lock();
        state.cut = false;
        state.sent.limit = None;
        state.received.limit = None;
    }

    /// Returns whether the link is cut at the moment.
    pub fn is_cut(&self) -> bool {
        self.lock().cut
    }

    /// Returns the number of bytes sent so far over all channels in both directions. A test gets
    /// from a run without a cut the positions at which it can cut later runs.
    pub fn sent(&self) -> u64 {
        self.lock().sent.done
    }

    /// Returns the number of bytes received so far over all channels in both directions.
    pub fn received(&self) -> u64 {
        self.lock().received.done
    }

    /// Adds a channel's pipes to this link. Returns `false` if the link is cut now.
    pub(crate) fn add(&self, pipes: [&Arc<Pipe>; 2]) -> bool {
        let mut state = self.lock();
        if !state.cut {
            state.pipes.retain(|pipe| pipe.strong_count() > 0);
            state.pipes.extend(pipes.map(Arc::downgrade));
        }
        !state.cut
    }

    /// Returns how many of `bytes` may be sent. The caller must call [`check`](Self::check)
    /// afterwards, without holding the lock of a pipe.
    pub(crate) fn take_sent(&self, bytes: usize) -> usize {
        self.lock().sent.take(bytes)
    }

    /// Returns how many of `bytes` may be received. The caller must call [`check`](Self::check)
    /// afterwards, without holding the lock of a pipe.
    pub(crate) fn take_received(&self, bytes: usize) -> usize {
        self.lock().received.take(bytes)
    }

    /// Cuts the link if a limit is reached.
    pub(crate) fn check(&self) {
        let state = self.lock();
        let (sent, received) = (state.sent.left() == 0, state.received.left() == 0);
        drop(state);
        if received {
            self.trip(Ending::Lost);
        } else if sent {
            self.trip(Ending::Cut);
        }
    }

    fn trip(&self, ending: Ending) {
        let mut state = self.lock();
        state.cut = true;
        let pipes = std::mem::take(&mut state.pipes);
        // the lock of a pipe may be held while this one is taken, so never take them in the other
        // order
        drop(state);
        for pipe in pipes.iter().filter_map(Weak::upgrade) {
            pipe.end(ending);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // no code that can panic runs under this lock
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
