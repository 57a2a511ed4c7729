//! Leases: a fence for hosts that reach one store and not each other.
//!
//! Who runs a VM holds its lease, and renews it (Gray and Cheriton, *Leases*, SOSP 1989). A holder that cannot renew stops its
//! vCPUs *before* the lease expires; so whoever has seen the lease unchanged for a whole term knows that nothing runs there,
//! takes the lease, and with that the last chance to renew it. No clock is compared with another host's: each side measures
//! durations only, by its own. What is asked of a host: that the thread which keeps the lease runs within a quarter of a term
//! whenever vCPUs run, so choose terms of seconds, and give it a priority.

use std::{
    fmt, io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use thiserror::Error;

use super::{Fence, NotFenced};
use crate::vm::VmId;

/// Names who holds a lease: 16 bytes that no other instance of a VMM has, drawn at random. A destination says it as its
/// [`identity`](crate::vm::DestinationVm::identity), if leases are what fences it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Holder(pub [u8; 16]);

/// What a store keeps for a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Who may run the VM.
    pub holder: Holder,
    /// Counts renewals, across holders.
    pub number: u64,
    /// How long it lasts from a renewal on.
    pub term: Duration,
}

/// Keeps one lease a VM, where all hosts that may run it reach it.
pub trait LeaseStore: Send + Sync {
    /// The lease of `vm`; `None` if nobody ever held it.
    ///
    /// # Errors
    /// When the store cannot be reached, or what it has cannot be read.
    fn read(&self, vm: VmId) -> io::Result<Option<Lease>>;

    /// Puts `new` in the place of `expected`, at once and for all who read, unless something else is there: `false` then.
    ///
    /// # Errors
    /// When the store cannot be reached; the swap may have happened all the same.
    fn swap(&self, vm: VmId, expected: Option<Lease>, new: Lease) -> io::Result<bool>;
}

/// Why a lease is not held.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// Somebody else holds it: wait for its end with a [`LeaseFence`], or leave the VM to it.
    #[error("another instance holds the lease of this VM")]
    Held(Holder),
    /// The store cannot be reached.
    #[error("the store of leases: {0}")]
    Store(#[from] io::Error),
    /// It could not be renewed in time. The VM was stopped.
    #[error("the lease could not be renewed before its end: {why}")]
    Expired {
        /// Why not, with the text of the cause.
        why: String,
        /// What the store said, if that was why.
        #[source]
        cause: Option<io::Error>,
    },
}

impl LeaseError {
    fn expired(why: &str) -> Self {
        Self::Expired { why: why.to_owned(), cause: None }
    }
}

/// How time passes; tests have it pass by hand.
trait Clock: Send + Sync {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn sleep(&self, time: Duration) {
        thread::sleep(time);
    }

    /// Waits until then, or until the lease has ended.
    fn keep<'a>(&self, held: MutexGuard<'a, Held>, changed: &Condvar, until: Instant) -> MutexGuard<'a, Held> {
        let wait = until.saturating_duration_since(self.now());
        changed.wait_timeout_while(held, wait, |h| !h.ended).unwrap_or_else(PoisonError::into_inner).0
    }
}

struct Real;

impl Clock for Real {}

/// Holds the lease of a VM that runs here.
pub struct LeaseHolder {
    store: Arc<dyn LeaseStore>,
    clock: Arc<dyn Clock>,
    vm: VmId,
    state: Mutex<Held>,
    changed: Condvar,
}

struct Held {
    lease: Lease,
    /// The lease lasts so long for certain: counted from before the last renewal was asked for.
    until: Instant,
    ended: bool,
}

impl fmt::Debug for LeaseHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseHolder").field("vm", &self.vm).finish_non_exhaustive()
    }
}

impl LeaseHolder {
    /// Takes the lease of `vm` for `own`: for the first time, after it was [passed on](Self::pass_on) to it, or after a
    /// [`LeaseFence`] has won it. To be called before a vCPU runs.
    ///
    /// # Errors
    /// [`LeaseError::Held`] when another has it, whether or not it has expired; [`LeaseError::Store`].
    pub fn take(store: Arc<dyn LeaseStore>, vm: VmId, own: Holder, term: Duration) -> Result<Self, LeaseError> {
        Self::take_by(Arc::new(Real), store, vm, own, term)
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

    /// Renews the lease three times a term, until it is [passed on](Self::pass_on) or [ended](Self::end). Run it on a thread of
    /// its own. When the lease is lost, or a quarter of its term is left and it could not be renewed, calls `stop`, which must
    /// return only when no vCPU runs any more, nor will.
    ///
    /// # Errors
    /// After `stop` has returned: why.
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
            // under the lock: a lease that is passed on is not renewed behind that
            let (why, lost) = match self.renew(&mut held) {
                // later it has renewed what others may count as expired
                Ok(true) if self.clock.now() < last => {
                    due = before(held.until, term * 2 / 3);
                    continue;
                }
                Ok(true) => (LeaseError::expired("the store took too long"), true),
                Ok(false) => (LeaseError::expired("another instance has taken it"), true),
                Err(error) => (LeaseError::Expired { why: error.to_string(), cause: Some(error) }, false),
            };
            if !lost && self.clock.now() < last {
                due = last.min(self.clock.now() + term / 20);
                continue;
            }
            held.ended = true;
            drop(held);
            stop();
            return Err(why);
        }
    }

    /// Whether the lease is still ours.
    fn renew(&self, held: &mut Held) -> io::Result<bool> {
        let asked = self.clock.now();
        let renewed = Lease { number: held.lease.number + 1, ..held.lease };
        if self.store.swap(self.vm, Some(held.lease), renewed)? {
            (held.lease, held.until) = (renewed, asked + renewed.term);
            return Ok(true);
        }
        // a swap that failed earlier may have come through
        match self.store.read(self.vm)? {
            Some(found) if found.holder == held.lease.holder => {
                held.lease = found;
                Err(io::Error::other("it was renewed, when is not known"))
            }
            _ => Ok(false),
        }
    }

    /// The VM is about to run elsewhere: the lease goes to `heir`, which has a whole term to begin to renew it. To be called
    /// when no vCPU runs here any more ([`SourceVm::owner_in_doubt`](crate::vm::SourceVm::owner_in_doubt)).
    ///
    /// # Errors
    /// When it was lost, or the store cannot be reached: the heir then cannot take it. Nothing is renewed any more in any case.
    pub fn pass_on(&self, heir: Holder) -> Result<(), LeaseError> {
        let mut held = self.lock();
        if std::mem::replace(&mut held.ended, true) {
            return Err(LeaseError::expired("it is not held any more"));
        }
        self.changed.notify_all();
        let passed = Lease { holder: heir, number: held.lease.number + 1, ..held.lease };
        if self.store.swap(self.vm, Some(held.lease), passed)? {
            return Ok(());
        }
        Err(LeaseError::expired("another instance has taken it"))
    }

    /// The VM has ended: the lease is not renewed any more.
    pub fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // every field is replaced whole
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn next(lease: Option<Lease>) -> u64 {
    lease.map_or(0, |lease| lease.number) + 1
}

/// Fences the holder of a lease by outwaiting it. `fence` returns after a term in which the lease was not renewed; then it is
/// this side's, to be [taken](LeaseHolder::take) with the same name.
pub struct LeaseFence {
    store: Arc<dyn LeaseStore>,
    clock: Arc<dyn Clock>,
    vm: VmId,
    own: Holder,
}

/// How often the lease is looked at, in a term. It decides only how soon a renewal is noticed.
const LOOKS: u32 = 8;

impl LeaseFence {
    /// A fence for `vm` of the side that is `own`.
    pub fn new(store: Arc<dyn LeaseStore>, vm: VmId, own: Holder) -> Self {
        Self { store, clock: Arc::new(Real), vm, own }
    }

    fn read(&self) -> Result<Lease, NotFenced> {
        let lease = self.store.read(self.vm).map_err(|e| NotFenced(format!("the store of leases: {e}")))?;
        lease.ok_or_else(|| NotFenced("nobody holds a lease of this VM: nothing can be outwaited".into()))
    }
}

impl Fence for LeaseFence {
    fn fence(&self, identity: &[u8]) -> Result<(), NotFenced> {
        let lease = self.read()?;
        if lease.holder == self.own {
            return Ok(());
        }
        if lease.holder.0 != identity {
            return Err(NotFenced("its lease is not the other side's, but a third one's".into()));
        }
        let (seen, look) = (self.clock.now(), lease.term / LOOKS);
        let elapsed = || self.clock.now().saturating_duration_since(seen);
        while elapsed() < lease.term {
            self.clock.sleep(look.min(lease.term.saturating_sub(elapsed())));
            if self.read()? != lease {
                return Err(NotFenced("it renews its lease: it is alive".into()));
            }
        }
        let ours = Lease { holder: self.own, number: next(Some(lease)), ..lease };
        match self.store.swap(self.vm, Some(lease), ours) {
            Ok(true) => Ok(()),
            Ok(false) => Err(NotFenced("it has renewed its lease at the last moment, or another has taken it".into())),
            // if it happened, the next call finds that
            Err(e) => Err(NotFenced(format!("the store of leases: {e}"))),
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
        /// Cut off from those who hold: fails for them, and not for the fence.
        cut: AtomicBool,
    }

    struct Near(Arc<Store>);

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

    impl LeaseStore for Near {
        fn read(&self, vm: VmId) -> io::Result<Option<Lease>> {
            if self.0.cut.load(Ordering::SeqCst) { Err(io::ErrorKind::NotConnected.into()) } else { self.0.read(vm) }
        }

        fn swap(&self, vm: VmId, expected: Option<Lease>, new: Lease) -> io::Result<bool> {
            self.read(vm)?;
            self.0.swap(vm, expected, new)
        }
    }

    /// Time that passes while a fence sleeps, and never without the holder: that does at once what is due.
    struct ByHand(Mutex<(Instant, Option<Instant>)>);

    impl ByHand {
        fn new() -> Arc<Self> {
            Arc::new(Self(Mutex::new((Instant::now(), None))))
        }

        /// For when the holder waits next; `None` if none does any more.
        fn due(&self, at: Option<Instant>) {
            self.0.lock().unwrap().1 = at;
        }

        /// The holder's thread has begun.
        fn is_kept(&self) {
            while self.0.lock().unwrap().1.is_none() {
                thread::yield_now();
            }
        }

        fn fence(self: &Arc<Self>, store: &Arc<Store>, own: Holder) -> LeaseFence {
            LeaseFence { clock: self.clone(), ..LeaseFence::new(store.clone(), VM, own) }
        }
    }

    /// Ends the lease also when a test fails: no time passes then for who keeps it.
    struct Ends<'a>(&'a LeaseHolder);

    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.end();
        }
    }

    impl Clock for ByHand {
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
            self.due(Some(until));
            while !held.ended && self.now() < until {
                // only lets go of the lock
                held = changed.wait_timeout(held, Duration::from_millis(1)).unwrap().0;
            }
            held
        }
    }

    #[test]
    fn a_holder_that_is_cut_off_has_stopped_before_another_takes_over() {
        let (store, clock) = (Arc::new(Store::default()), ByHand::new());
        let holder = LeaseHolder::take_by(clock.clone(), Arc::new(Near(store.clone())), VM, A, TERM).unwrap();
        let running = AtomicBool::new(true);
        let stop = || {
            running.store(false, Ordering::SeqCst);
            clock.due(None);
        };
        thread::scope(|scope| {
            let _ends = Ends(&holder);
            let kept = scope.spawn(|| holder.keep(&stop));
            clock.is_kept();
            let fence = clock.fence(&store, B);
            // alive: it is not taken over
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
        // asked again, it has succeeded already
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
        let clock = ByHand::new();
        let destination = LeaseHolder::take_by(clock.clone(), store.clone(), VM, B, TERM).unwrap();
        let fence = clock.fence(&store, A);
        // the source comes back: the destination lives
        thread::scope(|scope| {
            let _ends = Ends(&destination);
            scope.spawn(|| destination.keep(&|| ()).unwrap());
            clock.is_kept();
            assert!(Fenced::by(&fence, &B.0).is_err());
            assert!(Fenced::by(&fence, &[3; 16]).unwrap_err().to_string().contains("third"));
        });
        clock.due(None);
        // it has ended without a word, as if it were dead
        assert!(Fenced::by(&fence, &B.0).is_ok());
    }

    #[test]
    fn an_heir_that_never_comes_is_outwaited() {
        let store = Arc::new(Store::default());
        LeaseHolder::take(store.clone(), VM, A, TERM).unwrap().pass_on(B).unwrap();
        assert!(Fenced::by(&ByHand::new().fence(&store, A), &B.0).is_ok());
        // too late
        assert!(matches!(LeaseHolder::take(store.clone(), VM, B, TERM), Err(LeaseError::Held(A))));
        LeaseHolder::take(store, VM, A, TERM).unwrap();
    }

    #[test]
    fn without_a_lease_nobody_is_fenced() {
        let fence = LeaseFence::new(Arc::new(Store::default()), VM, A);
        assert!(Fenced::by(&fence, &B.0).unwrap_err().to_string().contains("nobody"));
    }
}
