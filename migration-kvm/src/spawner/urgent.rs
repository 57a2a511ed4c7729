//! Real-time threads for the pause of a hand-over, and a thread that ends it.
//!
//! Beside busy threads, a real-time thread is the only one that has its turn at once when it is
//! woken. But one that is woken on a core on which another process is in the kernel waits for all
//! of that system call, where the kernel does not preempt itself, and no scheduler moves it
//! elsewhere. So threads are real-time ones from the pause on, and for [`LONGEST`] at most: then a
//! thread of the usual policy, which the scheduler does move, makes them threads of the usual
//! policy too. Whoever takes the lock is not a real-time thread then: such a thread would not sleep
//! for it in vain.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use migration_core::spawner::{GuestImpact, Role};

use super::{Priority, Setup, sched};

/// How long threads are real-time ones at most. A hand-over takes 1 to 2 ms, 4 beside many others.
const LONGEST: Duration = Duration::from_millis(5);

/// The threads of hand-overs that a spawner has started.
pub(super) struct Urgent {
    longest: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

impl Default for Urgent {
    fn default() -> Self {
        Self { longest: LONGEST, state: Mutex::default(), changed: Condvar::new() }
    }
}

#[derive(Default)]
struct State {
    threads: Vec<libc::pid_t>,
    watch: Watch,
    /// They are real-time ones until then.
    until: Option<Instant>,
}

/// The thread that ends it.
#[derive(Default, PartialEq, Eq)]
enum Watch {
    #[default]
    None,
    Starting,
    /// It may change policies.
    Ready,
}

impl Urgent {
    /// The calling thread is one of a hand-over from now on.
    pub(super) fn join(self: &Arc<Self>, setup: Option<Arc<Setup>>) {
        let mut state = self.lock();
        let this = sched::this_thread();
        if !state.threads.contains(&this) {
            state.threads.push(this);
        }
        if state.watch != Watch::None {
            return;
        }
        let urgent = self.clone();
        // without it, no thread becomes a real-time one
        if thread::Builder::new().name("mig-urgent".into()).spawn(move || urgent.watch(setup)).is_ok() {
            state.watch = Watch::Starting;
        }
    }

    /// The calling thread is none any more, and not a real-time one. Does nothing for a thread that
    /// never joined.
    pub(super) fn leave(&self) {
        let this = sched::this_thread();
        let mut state = self.lock();
        let before = state.threads.len();
        state.threads.retain(|&thread| thread != this);
        if state.threads.len() == before {
            return;
        }
        // another thread may have begun since this one was made a usual one; nobody can from here
        // on
        sched::set_usual_if_real_time();
        if state.threads.is_empty() {
            state.until = None;
            self.changed.notify_all();
        }
    }

    /// The guest waits for them from now on.
    pub(super) fn begin(&self) {
        let mut state = self.lock();
        if state.watch != Watch::Ready || state.threads.is_empty() {
            return;
        }
        state.until = Some(Instant::now() + self.longest);
        let (threads, this) = (state.threads.clone(), sched::this_thread());
        // This one last, and under the lock: after it the watch may have ended all this already,
        // and nobody would end it for this thread. Nothing sleeps from here to the end.
        threads.iter().filter(|&&thread| thread != this).for_each(|&thread| sched::set_real_time(thread, true));
        if threads.contains(&this) {
            sched::set_real_time(this, true);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The guest waits for none of them any more.
    pub(super) fn end(&self) {
        sched::set_usual_if_real_time();
        self.end_all(&mut self.lock());
    }

    fn end_all(&self, state: &mut State) {
        if state.until.take().is_some() {
            state.threads.iter().for_each(|&thread| sched::set_real_time(thread, false));
        }
    }

    /// Ends it when it has lasted long enough, until no thread is left.
    fn watch(&self, setup: Option<Arc<Setup>>) {
        sched::apply(Priority::Prompt);
        let set_up = setup.is_none_or(|setup| setup(Role::Control, GuestImpact::Balanced).is_ok());
        // a filter may refuse it here, and then nobody could end it
        let may = set_up && sched::may_change_policies();
        let mut state = self.lock();
        if may {
            state.watch = Watch::Ready;
        }
        while !state.threads.is_empty() {
            let left = state.until.map(|until| until.saturating_duration_since(Instant::now()));
            state = match left {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => {
                    self.end_all(&mut state);
                    state
                }
                Some(left) => self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        state.watch = Watch::None;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // no code that holds the lock leaves the state half-changed
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread that may be one of a hand-over, until its end.
pub(super) struct Member<'a> {
    pub(super) urgent: &'a Urgent,
    /// Whether it is one from its beginning.
    pub(super) always: bool,
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        if self.always {
            sched::set_usual_if_real_time();
        }
        self.urgent.leave();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use migration_core::spawner::{Joiner, Spawner};

    use super::*;
    use crate::spawner::LinuxSpawner;

    fn wait_for(what: &str, mut wished: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !wished() {
            assert!(Instant::now() < deadline, "waited in vain: {what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Two threads of a hand-over that do nothing, as threads do that cannot.
    struct Idle {
        spawner: LinuxSpawner,
        ids: Vec<libc::pid_t>,
        ends: Vec<mpsc::Sender<()>>,
        threads: Vec<Box<dyn Joiner>>,
    }

    impl Idle {
        fn new(longest: Duration) -> Self {
            let urgent = Arc::new(Urgent { longest, ..Urgent::default() });
            let spawner = LinuxSpawner { urgent, ..LinuxSpawner::new() };
            let (tx, ids) = mpsc::channel();
            let (mut ends, mut threads) = (Vec::new(), Vec::new());
            for _ in 0..2 {
                let (end, ended) = mpsc::channel::<()>();
                ends.push(end);
                let tx = tx.clone();
                let body = move || {
                    tx.send(sched::this_thread()).unwrap();
                    let _ = ended.recv();
                };
                threads.push(spawner.spawn(Role::HandOver, GuestImpact::Balanced, "t", Box::new(body)).unwrap());
            }
            let ids = ids.iter().take(2).collect();
            wait_for("the watch", || spawner.urgent.lock().watch == Watch::Ready);
            Self { spawner, ids, ends, threads }
        }

        /// Niceness and time slice of each; `None` of a real-time thread.
        fn shares(&self) -> Vec<Option<(i32, u64)>> {
            let share = |id: &libc::pid_t| sched::Share::of(id.unsigned_abs()).map(|share| (share.nice, share.slice));
            self.ids.iter().map(share).collect()
        }

        fn end(self) -> LinuxSpawner {
            drop(self.ends);
            self.threads.into_iter().for_each(|thread| thread.join());
            wait_for("the watch ends", || self.spawner.urgent.lock().watch == Watch::None);
            self.spawner
        }
    }

    #[test]
    fn threads_are_real_time_ones_from_begin_to_end() {
        let idle = Idle::new(Duration::from_secs(3600));
        let was = idle.shares();
        assert!(was.iter().all(Option::is_some));
        let permitted = thread::spawn(|| {
            sched::set_real_time(0, true);
            sched::Share::of(0).is_none()
        });
        let permitted = permitted.join().unwrap();
        idle.spawner.begin_switch_over();
        assert_eq!(idle.shares().iter().all(Option::is_none), permitted);
        idle.spawner.end_switch_over();
        assert_eq!(idle.shares(), was);
        idle.spawner.end_switch_over();
        // nobody is there
        let spawner = idle.end();
        spawner.begin_switch_over();
        assert!(spawner.urgent.lock().until.is_none());
    }

    #[test]
    fn nobody_is_a_real_time_thread_for_long() {
        let idle = Idle::new(LONGEST);
        let was = idle.shares();
        for _ in 0..3 {
            // nobody says that it is over
            idle.spawner.begin_switch_over();
            wait_for("usual policies", || idle.spawner.urgent.lock().until.is_none());
            assert_eq!(idle.shares(), was);
        }
        idle.end();
    }

    #[test]
    fn a_thread_that_ends_or_does_something_else_is_a_usual_one() {
        let idle = Idle::new(Duration::from_secs(3600));
        let spawner = idle.spawner.clone();
        let after = thread::spawn(move || {
            spawner.assume(Role::HandOver, GuestImpact::Balanced);
            let during = spawner.urgent.lock().threads.len();
            spawner.begin_switch_over();
            spawner.assume(Role::Control, GuestImpact::Balanced);
            (during, sched::Share::of(0).is_some(), spawner.urgent.lock().threads.len())
        });
        assert_eq!(after.join().unwrap(), (3, true, 2));
        idle.end();
    }

    #[test]
    fn without_permission_to_end_it_nobody_begins() {
        let refused = LinuxSpawner::with_setup(|_, _| match thread::current().name() {
            Some("mig-urgent") => Err(std::io::ErrorKind::PermissionDenied.into()),
            _ => Ok(()),
        });
        let (spawner, (tx, seen)) = (refused.clone(), mpsc::channel());
        let body = Box::new(move || {
            // before the watch has found out, and after
            for _ in 0..20 {
                spawner.begin_switch_over();
                tx.send(spawner.urgent.lock().until.is_none() && sched::Share::of(0).is_some()).unwrap();
                thread::sleep(Duration::from_millis(1));
            }
        });
        refused.spawn(Role::HandOver, GuestImpact::Balanced, "t", body).unwrap().join();
        assert_eq!(seen.iter().collect::<Vec<_>>(), [true; 20]);
        wait_for("the watch ends", || refused.urgent.lock().watch == Watch::None);
    }
}
