//! Leases: a fence for hosts that share a store but may not reach each other.
//!
//! The host that runs a VM holds the VM's lease and renews it (Gray and Cheriton, *Leases*, SOSP
//! 1989).
//! 1. A holder that cannot renew its lease stops its vCPUs *before* the lease expires.
//! 2. So another host that has seen the lease unchanged for a whole term knows that nothing runs
//!    there.
//! 3. It then takes the lease. After that the old holder can never renew it.
//!
//! No host compares its clock with that of another: each measures durations only, with its own
//! clock. While vCPUs run, the thread that keeps the lease must get to run within a quarter of a
//! term. So choose terms of seconds and give the thread a high priority.

use std::{
    fmt, io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use thiserror::Error;

use super::{Fence, NotFenced};
use crate::{text::Chain, vm::VmId};

/// The name of a lease holder: 16 random bytes, different for each instance of a VMM. If a
/// destination is fenced by leases, it reports its name as its
/// [`identity`](crate::vm::DestinationVm::identity).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Holder(pub [u8; 16]);

/// The lease of a VM, as the store keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The instance that may run the VM.
    pub holder: Holder,
    /// The number of renewals, counted across holders.
    pub number: u64,
    /// The time for which the lease lasts after a renewal.
    pub term: Duration,
}

/// A store with one lease for each VM, which all hosts that may run the VM can reach.
pub trait LeaseStore: Send + Sync {
    /// Returns the lease of `vm`, or `None` if it was never held.
    ///
    /// # Errors
    /// Fails if the store cannot be reached or its content cannot be read.
    fn read(&self, vm: VmId) -> io::Result<Option<Lease>>;

    /// Replaces `expected` by `new` in one atomic step. Returns `false` and changes nothing if the
    /// store holds something else.
    ///
    /// # Errors
    /// Fails if the store cannot be reached. The lease may have been replaced all the same.
    fn swap(&self, vm: VmId, expected: Option<Lease>, new: Lease) -> io::Result<bool>;
}

/// The reason why a lease is not held.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// Another instance holds the lease. The caller can wait for its end with a [`LeaseFence`], or
    /// leave the VM to it.
    #[error("another instance holds the lease of this VM")]
    Held(Holder),
    /// The store cannot be reached.
    #[error("lease store")]
    Store(#[from] io::Error),
    /// The lease could not be renewed in time. The VM was stopped.
    #[error("the lease could not be renewed before its end: {why}")]
    Expired {
        /// The reason.
        why: String,
        /// The error of the store, if that was the reason.
        #[source]
        cause: Option<io::Error>,
    },
}

impl LeaseError {
    fn expired(why: &str) -> Self {
        Self::Expired { why: why.to_owned(), cause: None }
    }
}

/// The passing of time, which tests control by hand.
trait Clock: Send + Sync {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn sleep(&self, time: Duration) {
        thread::sleep(time);
    }

    /// Waits until the time `until`, or until the lease has ended.
    fn keep<'a>(&self, held: MutexGuard<'a, Held>, changed: &Condvar, until: Instant) -> MutexGuard<'a, Held> {
        let wait = until.saturating_duration_since(self.now());
        changed.wait_timeout_while(held, wait, |h| !h.ended).unwrap_or_else(PoisonError::into_inner).0
    }
}

struct SystemClock;

impl Clock for SystemClock {}

/// Holds the lease of a VM that runs on this host.
pub struct LeaseHolder {
    store: Arc<dyn LeaseStore>,
    clock: Arc<dyn Clock>,
    vm: VmId,
    state: Mutex<Held>,
    changed: Condvar,
}

struct Held {
    lease: Lease,
    /// The time until which the lease certainly lasts. It is counted from before the last renewal
    /// was requested.
    until: Instant,
    ended: bool,
}

impl fmt::Debug for LeaseHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseHolder").field("vm", &self.vm).finish_non_exhaustive()
    }
}

impl LeaseHolder {
    /// Takes the lease of `vm` for `own`. This is possible for the first time, after the lease was
    /// [passed on](Self::pass_on) to `own`, and after a [`LeaseFence`] took it for `own`. Must be
    /// called before a vCPU runs.
    ///
    /// # Errors
    /// Fails with [`LeaseError::Held`] if another instance has the lease, even an expired one, and
    /// with [`LeaseError::Store`] if the store fails.
    pub fn take(store: Arc<dyn LeaseStore>, vm: VmId, own: Holder, term: Duration) -> Result<Self, LeaseError> {
        Self::take_by(Arc::new(SystemClock), store, vm, own, term)
    }

    fn take_by(
        clock: Arc<dyn Clock>,
        store: Arc<dyn LeaseStore>,
        vm: VmId,
        own: Holder,
        term: Duration,
    ) -> Result<Self, LeaseError> {
        let present = store.read(vm)?;
        if let Some(Lease { holder, .. }) = present.filter(|lease| lease.holder != own) {
            return Err(LeaseError::Held(holder));
        }
        let lease = Lease { holder: own, number: next(present), term };
        let until = clock.now() + term;
        if !store.swap(vm, present, lease)? {
            let holder = store.read(vm)?.map_or(own, |lease| lease.holder);
            return Err(LeaseError::Held(holder));
        }
        Ok(Self { store, clock, vm, state: Mutex::new(Held { lease, until, ended: false }), changed: Condvar::new() })
    }

    /// Renews the lease three times per term until it is [passed on](Self::pass_on) or
    /// [ended](Self::end). Blocks, so it needs a thread of its own.
    ///
    /// Calls `stop` if the lease is lost, or if only a quarter of its term is left and it could not
    /// be renewed. `stop` must return only when no vCPU runs or will run again.
    ///
    /// # Errors
    /// Returns the reason after `stop` has returned.
    pub fn keep(&self, stop: &dyn Fn()) -> Result<(), LeaseError> {
        let mut held = self.lock();
        let term = held.lease.term;
        let before = |end: Instant, part: Duration| end.checked_sub(part).unwrap_or(end);
        let mut due = before(held.until, term * 2 / 3);
        loop {
            held = self.clock.keep(held, &self.changed, due);
            if held.ended {
                return Ok(());
            }
            let last = before(held.until, term / 4);
            // under the lock, so that a lease that is passed on is not renewed afterwards
            let (reason, lost) = match self.renew(&mut held) {
                // if the renewal took longer, others may already count the lease as expired
                Ok(true) if self.clock.now() < last => {
                    due = before(held.until, term * 2 / 3);
                    continue;
                }
                Ok(true) => (LeaseError::expired("the store took too long"), true),
                Ok(false) => (LeaseError::expired("another instance has taken it"), true),
                Err(error) => (LeaseError::Expired { why: "the store failed".to_owned(), cause: Some(error) }, false),
            };
            if !lost && self.clock.now() < last {
                due = last.min(self.clock.now() + term / 20);
                continue;
            }
            held.ended = true;
            drop(held);
            stop();
            return Err(reason);
        }
    }

    /// Renews the lease once. Returns whether this instance still holds it.
    fn renew(&self, held: &mut Held) -> io::Result<bool> {
        let asked = self.clock.now();
        let renewed = Lease { number: held.lease.number + 1, ..held.lease };
        if self.store.swap(self.vm, Some(held.lease), renewed)? {
            (held.lease, held.until) = (renewed, asked + renewed.term);
            return Ok(true);
        }
        // an earlier swap that reported an error may have succeeded
        match self.store.read(self.vm)? {
            Some(found) if found.holder == held.lease.holder => {
                held.lease = found;
                Err(io::Error::other("the lease was renewed at an unknown time"))
            }
            _ => Ok(false),
        }
    }

    /// Passes the lease on to `successor`, which has a whole term to begin renewing it. Must be
    /// called when no vCPU runs on this host any more, before the VM runs elsewhere
    /// ([`SourceVm::owner_in_doubt`](crate::vm::SourceVm::owner_in_doubt)). This side does not
    /// renew the lease any more, even if the call fails.
    ///
    /// # Errors
    /// Fails if the lease was lost or the store cannot be reached. The successor then cannot take
    /// it.
    pub fn pass_on(&self, successor: Holder) -> Result<(), LeaseError> {
        let mut held = self.lock();
        if std::mem::replace(&mut held.ended, true) {
            return Err(LeaseError::expired("this instance does not hold it any more"));
        }
        self.changed.notify_all();
        let passed = Lease { holder: successor, number: held.lease.number + 1, ..held.lease };
        if self.store.swap(self.vm, Some(held.lease), passed)? {
            return Ok(());
        }
        Err(LeaseError::expired("another instance has taken it"))
    }

    /// Stops renewing the lease, because the VM has ended.
    pub fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // a panic under this lock cannot leave it half changed: every field is replaced as a whole
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn next(lease: Option<Lease>) -> u64 {
    lease.map_or(0, |lease| lease.number) + 1
}

/// A fence that waits until the holder's lease has expired. [`fence`](Fence::fence) returns after a
/// whole term in which the lease was not renewed. The lease then belongs to this side, which can
/// [take](LeaseHolder::take) it under the same name.
pub struct LeaseFence {
    store: Arc<dyn LeaseStore>,
    clock: Arc<dyn Clock>,
    vm: VmId,
    own: Holder,
}

/// The number of times that the lease is read in a term. It decides only how soon a renewal is
/// noticed.
const READS_PER_TERM: u32 = 8;

impl LeaseFence {
    /// Makes a fence against the holder of `vm`'s lease. `own` is the name of this side.
    pub fn new(store: Arc<dyn LeaseStore>, vm: VmId, own: Holder) -> Self {
        Self { store, clock: Arc::new(SystemClock), vm, own }
    }

    fn read(&self) -> Result<Lease, NotFenced> {
        let lease = self.store.read(self.vm).map_err(|e| NotFenced(format!("lease store: {}", Chain(&e))))?;
        lease.ok_or_else(|| NotFenced("nobody holds a lease of this VM, so there is no end to wait for".into()))
    }
}

impl Fence for LeaseFence {
    fn fence(&self, identity: &[u8]) -> Result<(), NotFenced> {
        let lease = self.read()?;
        if lease.holder == self.own {
            return Ok(());
        }
        if lease.holder.0 != identity {
            return Err(NotFenced("the lease of the VM belongs to a third instance, not to the other side".into()));
        }
        let first_read = self.clock.now();
        let interval = lease.term / READS_PER_TERM;
        let elapsed = || self.clock.now().saturating_duration_since(first_read);
        while elapsed() < lease.term {
            self.clock.sleep(interval.min(lease.term.saturating_sub(elapsed())));
            if self.read()? != lease {
                return Err(NotFenced("the other side renews its lease: it is alive".into()));
            }
        }
        let ours = Lease { holder: self.own, number: next(Some(lease)), ..lease };
        match self.store.swap(self.vm, Some(lease), ours) {
            Ok(true) => Ok(()),
            Ok(false) => {
                Err(NotFenced("the lease was renewed at the last moment, or another instance has taken it".into()))
            }
            // if the lease was replaced all the same, the next call finds that
            Err(e) => Err(NotFenced(format!("lease store: {}", Chain(&e)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::fence::Fenced;

    const TERM: Duration = Duration::from_secs(1);
    const VM: VmId = VmId([7; 16]);
    const A: Holder = Holder([1; 16]);
    const B: Holder = Holder([2; 16]);

    #[derive(Default)]
    struct Store {
        lease: Mutex<Option<Lease>>,
        /// Whether the link between the store and the holder is cut. The fence still reaches the
        /// store.
        cut: AtomicBool,
    }

    struct HolderLink(Arc<Store>);

    impl LeaseStore for Store {
        fn read(&self, _vm: VmId) -> io::Result<Option<Lease>> {
            Ok(*self.lease.lock().unwrap())
        }

        fn swap(&self, _vm: VmId, expected: Option<Lease>, new: Lease) -> io::Result<bool> {
            let mut lease = self.lease.lock().unwrap();
            let same = *lease == expected;
            if same {
                *lease = Some(new);
            }
            Ok(same)
        }
    }

    impl LeaseStore for HolderLink {
        fn read(&self, vm: VmId) -> io::Result<Option<Lease>> {
            if self.0.cut.load(Ordering::SeqCst) { Err(io::ErrorKind::NotConnected.into()) } else { self.0.read(vm) }
        }

        fn swap(&self, vm: VmId, expected: Option<Lease>, new: Lease) -> io::Result<bool> {
            self.read(vm)?;
            self.0.swap(vm, expected, new)
        }
    }

    /// A clock that advances only while a fence sleeps. It waits until the holder has done what is
    /// due. The second time is when the holder wants to wake up next.
    struct ManualClock(Mutex<(Instant, Option<Instant>)>);

    impl ManualClock {
        fn new() -> Arc<Self> {
            Arc::new(Self(Mutex::new((Instant::now(), None))))
        }

        /// Sets the time at which the holder wakes up next, or `None` if there is no holder any
        /// more.
        fn set_wake_up(&self, at: Option<Instant>) {
            self.0.lock().unwrap().1 = at;
        }

        /// Waits until the holder's thread has begun.
        fn wait_for_holder(&self) {
            while self.0.lock().unwrap().1.is_none() {
                thread::yield_now();
            }
        }

        fn fence(self: &Arc<Self>, store: &Arc<Store>, own: Holder) -> LeaseFence {
            LeaseFence { clock: self.clone(), ..LeaseFence::new(store.clone(), VM, own) }
        }
    }

    /// Ends the lease when it is dropped, also if the test fails. The holder's thread would
    /// otherwise wait for ever, because no time passes.
    struct EndOnDrop<'a>(&'a LeaseHolder);

    impl Drop for EndOnDrop<'_> {
        fn drop(&mut self) {
            self.0.end();
        }
    }

    impl Clock for ManualClock {
        fn now(&self) -> Instant {
            self.0.lock().unwrap().0
        }

        fn sleep(&self, time: Duration) {
            let end = self.now() + time;
            loop {
                let mut time = self.0.lock().unwrap();
                match time.1 {
                    Some(due) if due <= time.0 => {}
                    _ if time.0 == end => break,
                    due => time.0 = due.map_or(end, |due| due.min(end)),
                }
                drop(time);
                thread::yield_now();
            }
        }

        fn keep<'a>(&self, mut held: MutexGuard<'a, Held>, changed: &Condvar, until: Instant) -> MutexGuard<'a, Held> {
            self.set_wake_up(Some(until));
            while !held.ended && self.now() < until {
                // releases the lock for a moment
                held = changed.wait_timeout(held, Duration::from_millis(1)).unwrap().0;
            }
            held
        }
    }

    #[test]
    fn a_holder_that_is_cut_off_has_stopped_before_another_takes_over() {
        let (store, clock) = (Arc::new(Store::default()), ManualClock::new());
        let holder = LeaseHolder::take_by(clock.clone(), Arc::new(HolderLink(store.clone())), VM, A, TERM).unwrap();
        let running = AtomicBool::new(true);
        let stop = || {
            running.store(false, Ordering::SeqCst);
            clock.set_wake_up(None);
        };
        thread::scope(|scope| {
            let _end = EndOnDrop(&holder);
            let kept = scope.spawn(|| holder.keep(&stop));
            clock.wait_for_holder();
            let fence = clock.fence(&store, B);
            // the holder is alive, so the lease is not taken
            assert!(Fenced::by(&fence, &A.0).unwrap_err().to_string().contains("alive"));
            assert!(running.load(Ordering::SeqCst));
            store.cut.store(true, Ordering::SeqCst);
            Fenced::by(&fence, &A.0).unwrap();
            assert!(!running.load(Ordering::SeqCst));
            let expired = kept.join().unwrap().unwrap_err();
            assert!(matches!(expired, LeaseError::Expired { .. }));
            let cause = std::error::Error::source(&expired).and_then(|cause| cause.downcast_ref::<io::Error>());
            assert!(cause.is_some(), "{expired:?}");
        });
        assert_eq!(store.read(VM).unwrap().unwrap().holder, B);
        // a second call finds that it has succeeded already
        assert!(Fenced::by(&LeaseFence::new(store.clone(), VM, B), &A.0).is_ok());
        assert!(matches!(LeaseHolder::take(store, VM, A, TERM), Err(LeaseError::Held(B))));
    }

    #[test]
    fn a_lease_is_passed_on_with_the_vm() {
        let store = Arc::new(Store::default());
        let source = LeaseHolder::take(store.clone(), VM, A, TERM).unwrap();
        assert!(matches!(LeaseHolder::take(store.clone(), VM, B, TERM), Err(LeaseError::Held(A))));
        source.pass_on(B).unwrap();
        assert!(source.keep(&|| unreachable!("nothing to stop")).is_ok());
        assert!(source.pass_on(B).is_err());
        let clock = ManualClock::new();
        let destination = LeaseHolder::take_by(clock.clone(), store.clone(), VM, B, TERM).unwrap();
        let fence = clock.fence(&store, A);
        // the source comes back, but the destination is alive
        thread::scope(|scope| {
            let _end = EndOnDrop(&destination);
            scope.spawn(|| destination.keep(&|| ()).unwrap());
            clock.wait_for_holder();
            assert!(Fenced::by(&fence, &B.0).is_err());
            assert!(Fenced::by(&fence, &[3; 16]).unwrap_err().to_string().contains("third"));
        });
        clock.set_wake_up(None);
        // the destination has ended without a report, as if it were dead
        assert!(Fenced::by(&fence, &B.0).is_ok());
    }

    #[test]
    fn the_lease_of_a_successor_that_never_comes_expires() {
        let store = Arc::new(Store::default());
        LeaseHolder::take(store.clone(), VM, A, TERM).unwrap().pass_on(B).unwrap();
        assert!(Fenced::by(&ManualClock::new().fence(&store, A), &B.0).is_ok());
        // the successor comes too late
        assert!(matches!(LeaseHolder::take(store.clone(), VM, B, TERM), Err(LeaseError::Held(A))));
        LeaseHolder::take(store, VM, A, TERM).unwrap();
    }

    #[test]
    fn without_a_lease_nobody_is_fenced() {
        let fence = LeaseFence::new(Arc::new(Store::default()), VM, A);
        assert!(Fenced::by(&fence, &B.0).unwrap_err().to_string().contains("nobody"));
    }
}
