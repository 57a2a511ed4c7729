//! A server, and the connections to it.

use std::{
    io::{self, ErrorKind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, ThreadId},
    time::{Duration, Instant},
};

use migration_core::store::StoreError;

use super::{
    connection::{Connection, Settings},
    resp::Fail,
    stream::Wait,
};
use crate::Address;

/// The pause before a server that could not be reached is tried again, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

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
        Self { address, settings, pause: Mutex::default(), pools }
    }

    /// Calls the server, and connects to it first if need be.
    ///
    /// A connection that was idle may have been closed by the server meanwhile: the call is then
    /// made once more on a new one. `call` goes on where it was, and repeats what is harmless to
    /// repeat.
    pub(super) fn with<T>(
        &self,
        of: Use,
        wait: Wait,
        call: &mut dyn FnMut(&mut Connection) -> Result<T, Fail>,
    ) -> Result<T, Fail> {
        let turn = self.pools[of as usize].turn(wait)?;
        let idle = turn.idle();
        let mut reused = idle.is_some();
        let mut connection = idle.map_or_else(|| self.connect(wait), Ok)?;
        loop {
            let result = call(&mut connection);
            match &result {
                Err(Fail::Io { cause, .. }) if reused && is_loss(cause) => {
                    // the others are as old
                    turn.0.lock().idle.clear();
                    connection = self.connect(wait)?;
                    reused = false;
                }
                _ => {
                    let failed = matches!(result, Err(Fail::Io { .. }));
                    if !failed && connection.is_idle() {
                        turn.give_back(connection);
                    }
                    return result;
                }
            }
        }
    }

    fn connect(&self, wait: Wait) -> Result<Connection, Fail> {
        if let Some(fail) = self.paused() {
            return Err(fail);
        }
        let made = Connection::open(&self.address, &self.settings, wait);
        let mut pause = self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        match &made {
            Ok(_) => *pause = Pause::default(),
            // there is no use in a retry, or it was the caller who had no more time
            Err(fail) if !can_retry(fail) || wait.is_over() => {}
            Err(fail) => {
                pause.length = (pause.length * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
                pause.until = Some(Instant::now() + pause.length);
                pause.why = match fail {
                    Fail::Io { cause, .. } => cause.to_string(),
                    Fail::Answer(text) => text.clone(),
                    Fail::Store(error) => error.to_string(),
                };
            }
        }
        made
    }

    /// Returns why the server is not tried at present, if so.
    pub(super) fn paused(&self) -> Option<Fail> {
        let pause = self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = pause.until.is_some_and(|until| until > Instant::now());
        let why = format!("the last attempt has failed, and the next one has to wait: {}", pause.why);
        let cause = io::Error::new(ErrorKind::ConnectionRefused, why);
        waiting.then_some(Fail::Io { step: "connecting to", cause })
    }
}

fn is_loss(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof)
}

fn can_retry(fail: &Fail) -> bool {
    match fail {
        Fail::Io { cause, .. } => StoreError::Io { step: String::new(), cause: cause.kind().into() }.can_retry(),
        Fail::Answer(text) => kind_of(text) == ErrorKind::ResourceBusy,
        Fail::Store(error) => error.can_retry(),
    }
}

/// Returns what an error of the server is. A retry can help if it is [`ErrorKind::ResourceBusy`].
fn kind_of(answer: &str) -> ErrorKind {
    match answer.split(' ').next().unwrap_or_default() {
        // the server reads its data, runs a long script, lacks a replica; the cluster moves keys,
        // or has lost a server and chooses another one
        "LOADING" | "BUSY" | "TRYAGAIN" | "MASTERDOWN" | "NOREPLICAS" | "CLUSTERDOWN" | "MOVED" | "ASK" => {
            ErrorKind::ResourceBusy
        }
        "NOAUTH" | "WRONGPASS" | "NOPERM" => ErrorKind::PermissionDenied,
        "READONLY" => ErrorKind::ReadOnlyFilesystem,
        "MISCONF" => ErrorKind::StorageFull,
        _ => ErrorKind::Other,
    }
}

/// Returns the error of a store. `needed` is how many bytes the call would have stored.
pub(super) fn store_error(server: &str, fail: Fail, needed: u64) -> StoreError {
    match fail {
        Fail::Io { step, cause } => StoreError::io(format!("{step} {server}"))(cause),
        Fail::Answer(text) if text.starts_with("OOM ") => StoreError::NoRoom { needed, room: 0 },
        Fail::Answer(text) => {
            let cause = io::Error::new(kind_of(&text), format!("it answers: {text}"));
            StoreError::io(format!("asking {server}"))(cause)
        }
        Fail::Store(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_whether_a_retry_can_help() {
        let error = |text: &str| store_error("tcp:h:1", Fail::Answer(text.into()), 7);
        for text in ["LOADING data", "BUSY script", "CLUSTERDOWN no", "TRYAGAIN moving", "MASTERDOWN x", "MOVED 1 h:2"]
        {
            assert!(error(text).can_retry(), "{text}");
        }
        for text in ["NOAUTH x", "WRONGPASS x", "READONLY x", "MISCONF x", "ERR x", "", "WRONGTYPE x"] {
            assert!(!error(text).can_retry(), "{text}");
        }
        assert!(matches!(error("OOM command not allowed"), StoreError::NoRoom { needed: 7, room: 0 }));
    }

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
