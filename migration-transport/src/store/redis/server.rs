//! A server, and the connections to it.

use std::{
    io::{self, ErrorKind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread::{self, JoinHandle, ThreadId},
    time::{Duration, Instant},
};

use super::{
    connection::{Connection, Settings, Wait},
    fail::Fail,
};
use crate::Address;

/// The pause before a server that could not be reached is tried again, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often a call is made again because signals have interrupted it.
const MAX_INTERRUPTIONS: u32 = 8;

/// What a connection is for. None of them waits for another kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    Faults,
    Prefetches,
    Others,
}

impl Use {
    /// Returns how many connections there are at most. There is one for prefetches, so that what is
    /// in flight of them has a limit.
    fn connections(self) -> usize {
        match self {
            Self::Prefetches => 1,
            Self::Faults | Self::Others => 4,
        }
    }
}

/// A server. Connections are made when they are needed, and again when they have failed.
pub(super) struct Server {
    pub(super) address: Address,
    settings: Arc<Settings>,
    pause: Mutex<Pause>,
    /// The last attempt to connect that took too long.
    late: Mutex<Option<JoinHandle<()>>>,
    pools: [Pool; 3],
}

/// After a failure to connect.
#[derive(Default)]
struct Pause {
    length: Duration,
    until: Option<Instant>,
    why: String,
}

/// The connections for one use.
struct Pool {
    most: usize,
    state: Mutex<PoolState>,
    freed: Condvar,
}

#[derive(Default)]
struct PoolState {
    idle: Vec<Connection>,
    /// The threads that have a connection.
    users: Vec<ThreadId>,
}

/// The right to one connection of a pool.
struct Turn<'a>(&'a Pool);

impl Pool {
    fn new(of: Use) -> Self {
        Self { most: of.connections(), state: Mutex::default(), freed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is a free connection. A thread that has one already gets another one at
    /// once: it asks from within a call that hands out pages, and would wait for itself.
    fn turn(&self, wait: Wait) -> Result<Turn<'_>, Fail> {
        let me = thread::current().id();
        let deadline = Instant::now() + wait.left();
        let mut state = self.lock();
        while state.users.len() >= self.most && !state.users.contains(&me) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Fail::asking(ErrorKind::TimedOut.into()));
            }
            state = self.freed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.users.push(me);
        Ok(Turn(self))
    }
}

impl Turn<'_> {
    fn idle(&self) -> Option<Connection> {
        self.0.lock().idle.pop()
    }

    fn give_back(&self, connection: Connection) {
        let mut state = self.0.lock();
        if state.idle.len() < self.0.most {
            state.idle.push(connection);
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let me = thread::current().id();
        let mut state = self.0.lock();
        let at = state.users.iter().position(|user| *user == me);
        at.map(|at| state.users.swap_remove(at));
        self.0.freed.notify_one();
    }
}

impl Server {
    pub(super) fn new(address: Address, settings: Arc<Settings>) -> Self {
        let pools = [Use::Faults, Use::Prefetches, Use::Others].map(Pool::new);
        Self { address, settings, pause: Mutex::default(), late: Mutex::default(), pools }
    }

    /// Calls the server, and connects to it first if need be.
    ///
    /// A connection that was idle may have been closed by the server meanwhile: the call is then
    /// made once more on a new one. It also is if a signal interrupts it. `call` goes on where it
    /// was, and repeats what is harmless to repeat.
    pub(super) fn with<T>(
        &self,
        of: Use,
        wait: Wait,
        call: &mut dyn FnMut(&mut Connection) -> Result<T, Fail>,
    ) -> Result<T, Fail> {
        let turn = self.pools[of as usize].turn(wait)?;
        let idle = turn.idle();
        let mut reused = idle.is_some();
        let mut interruptions = 0;
        let mut connection = idle.map_or_else(|| self.connect(wait), Ok)?;
        loop {
            let fail = match call(&mut connection) {
                Err(fail) if fail.is_interruption() && interruptions < MAX_INTERRUPTIONS => {
                    interruptions += 1;
                    fail
                }
                Err(fail) if fail.is_loss() && reused => fail,
                result => {
                    let failed = matches!(result, Err(Fail::Io { .. }));
                    if !failed && connection.is_idle() {
                        turn.give_back(connection);
                    }
                    return result;
                }
            };
            if fail.is_loss() {
                // the others are as old
                turn.0.lock().idle.clear();
            }
            connection = self.connect(wait)?;
            reused = false;
        }
    }

    /// Connects to a server that keeps pages.
    fn connect(&self, wait: Wait) -> Result<Connection, Fail> {
        if let Some(fail) = self.paused() {
            return Err(fail);
        }
        let made = self.greet(wait).and_then(|connection| connection.check(self.settings.cluster));
        let mut pause = self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        match &made {
            Ok(_) => *pause = Pause::default(),
            // there is no use in a retry, or it was the caller who had no more time
            Err(fail) if !fail.can_retry() || wait.is_over() => {}
            Err(fail) => {
                pause.length = (pause.length * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
                pause.until = Some(Instant::now() + pause.length);
                pause.why = fail.why();
            }
        }
        made
    }

    /// Connects to a server, whatever it is.
    pub(super) fn greet(&self, wait: Wait) -> Result<Connection, Fail> {
        Connection::greet(self.dial(wait.left())?, wait)
    }

    /// Lets the crate connect on a thread of its own: the crate does not limit how long that takes.
    /// While a thread that was given up has not ended, there is no other attempt.
    fn dial(&self, timeout: Duration) -> Result<redis::Connection, Fail> {
        let mut late = self.late();
        if late.as_ref().is_some_and(|attempt| !attempt.is_finished()) {
            let why = "an earlier attempt has not ended yet";
            return Err(Fail::connecting(io::Error::new(ErrorKind::TimedOut, why)));
        }
        *late = None;
        drop(late);
        let address = self.address.clone();
        let settings = self.settings.clone();
        let (sender, receiver) = mpsc::sync_channel(1);
        let connect = move || {
            // after the time-out nobody receives it
            let _ = sender.send(settings.connect(&address, timeout));
        };
        let attempt = thread::Builder::new().name("redis-connect".into()).spawn(connect).map_err(Fail::connecting)?;
        match receiver.recv_timeout(timeout) {
            Ok(made) => made.map_err(|error| Fail::of(error, Fail::connecting)),
            Err(RecvTimeoutError::Timeout) => {
                *self.late() = Some(attempt);
                Err(Fail::connecting(ErrorKind::TimedOut.into()))
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(Fail::connecting(io::Error::other("the thread that connects has panicked")))
            }
        }
    }

    fn late(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns why the server is not tried at present, if so.
    pub(super) fn paused(&self) -> Option<Fail> {
        let pause = self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = pause.until.is_some_and(|until| until > Instant::now());
        let why = format!("the last attempt has failed, and the next one has to wait: {}", pause.why);
        let cause = io::Error::new(ErrorKind::ConnectionRefused, why);
        waiting.then_some(Fail::connecting(cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_does_not_wait_for_itself() {
        let pool = Pool::new(Use::Prefetches);
        let wait = Wait::silence(Duration::from_secs(60));
        let first = pool.turn(wait).map_err(|_| ()).unwrap();
        let second = pool.turn(wait).map_err(|_| ()).unwrap();
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                let soon = Wait::silence(Duration::from_millis(1));
                pool.turn(soon).is_err()
            });
            assert!(other.join().unwrap(), "two threads have the one connection for prefetches");
        });
        drop((first, second));
        thread::scope(|scope| assert!(scope.spawn(|| pool.turn(wait).is_ok()).join().unwrap()));
    }
}
