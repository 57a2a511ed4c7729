//! What a session's lanes need is taken before they are offered: a source is told in *welcome* how
//! many there can be, and not by a lane that fails later.
//!
//! Connections that say nothing give way to whoever needs a thread or a descriptor that cannot be
//! had otherwise, the oldest one first. Nobody can tell a stranger from a lane of the session before
//! it has said something, and lanes come several at a time. So a connection that has just come gets
//! a reserved thread if there is one, and closes no older one for that: each lane would close the
//! one before it. Strangers may therefore sit on the reserved threads, but only until a lane needs
//! one, and not on those that the session has for itself.

use std::thread;

use super::*;

type Body = Box<dyn FnOnce() + Send>;

/// How long a connection that was closed may take to give back its thread and its descriptor.
/// Whoever needs them has to do without if it takes longer.
const GIVING_WAY: Duration = Duration::from_millis(200);
/// How often it is looked whether it has: the kernel counts a thread for a moment after its end.
const LOOK: Duration = Duration::from_millis(1);

/// Demand lanes that room is kept for, if post-copy is wanted: how many there will be only the
/// source knows.
const DEMAND_LANES: usize = 2;
/// Threads of every session beside those of its lanes: the one that says that the destination is
/// alive.
const SESSION_THREADS: usize = 1;

/// The threads that are reserved for the lanes of all sessions that are about to get theirs.
#[derive(Default)]
pub(super) struct AllParked {
    parked: Vec<Parked>,
    /// Counts reservations.
    numbers: u64,
}

/// The threads that are reserved for the lanes of one session, the newest of its VM.
struct Parked {
    /// The number of the reservation that they belong to.
    number: u64,
    /// The number of the VM's entry in the table.
    owner: u64,
    threads: Vec<Reserved>,
    /// How many of them are for the session itself, and for no connection.
    own: usize,
}

/// A thread that waits for a connection.
struct Reserved {
    work: mpsc::Sender<Body>,
    thread: Box<dyn Joiner>,
}

impl Reserved {
    /// Ends the thread, for which there is no work.
    fn end(self) {
        drop(self.work);
        self.thread.join();
    }
}

/// Threads that are kept for the lanes of a session until this is dropped. They are used when no
/// other can be had.
pub(super) struct Reservation<'a> {
    common: &'a Common,
    number: u64,
    /// How many bulk lanes there can be.
    pub(super) streams: u16,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        // a newer attempt may have reserved threads of its own
        self.common.release(|parked| parked.number == self.number);
    }
}

impl Common {
    /// Takes what `streams` bulk lanes need and what goes with `features`, or as many fewer bulk
    /// lanes as can be had when all connections that say nothing have given way.
    ///
    /// # Errors
    /// When there is not enough for a single one.
    pub(super) fn reserve(&self, owner: u64, streams: u16, features: u32) -> Result<Reservation<'_>, MigrationError> {
        // those of an earlier attempt
        self.release(|parked| parked.owner == owner);
        let (mut lanes, mut own) = (0, SESSION_THREADS);
        if features & FEATURE_POST_COPY != 0 {
            lanes += DEMAND_LANES;
            // each lane has one beside its own that serves faults, and one waits for the end of
            // that
            own += DEMAND_LANES + 1;
        }
        if features & FEATURE_CHECKPOINTS != 0 {
            lanes += 1;
        }
        let threads = lanes + own;
        let number = {
            let mut all = lock(&self.reserved);
            all.numbers += 1;
            let number = all.numbers;
            all.parked.push(Parked { number, owner, threads: Vec::new(), own });
            number
        };
        // from here on, whatever is reserved is released with it
        let mut reservation = Reservation { common: self, number, streams };
        let wanted = usize::from(streams);
        let channels = self.channels(wanted + lanes);
        let mut failed = None;
        let mut reserved = 0;
        while reserved < wanted + threads && failed.is_none() {
            match self.past_strangers(None, || self.park()) {
                // it ends at once if a newer attempt has released the reservation meanwhile
                Ok(thread) => self.keep(number, thread),
                Err(cause) => failed = Some(cause),
            }
            reserved += usize::from(failed.is_none());
        }
        let streams = reserved.saturating_sub(threads).min(channels.saturating_sub(lanes)).min(wanted);
        match (u16::try_from(streams), failed) {
            (Ok(streams @ 1..), _) => {
                reservation.streams = streams;
                Ok(reservation)
            }
            (_, Some(cause)) => Err(MigrationError::Thread { role: "the lanes of a session", cause }),
            (_, None) => {
                let text = format!("the destination has no descriptors for {} connections", lanes + 1);
                Err(MigrationError::Peer { code: ErrorCode::Resources, text })
            }
        }
    }

    /// Returns for how many of `wanted` connections there are descriptors.
    fn channels(&self, wanted: usize) -> usize {
        let Some(room) = lock(&self.room).clone() else { return wanted };
        let mut channels = room.channels(wanted);
        let mut more = true;
        while channels < wanted && more {
            let before = channels;
            more = self.gives_way(None, || {
                channels = room.channels(wanted);
                channels > before
            });
        }
        channels
    }

    /// Starts something, for which a connection that says nothing gives way if need be: one that
    /// came before the connection `newest`, if that is given.
    fn past_strangers<T>(&self, newest: Option<u64>, mut start: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        let mut started = start();
        if started.is_err() {
            self.gives_way(newest, || {
                started = start();
                started.is_ok()
            });
        }
        started
    }

    /// Closes the oldest connection that says nothing, and waits a moment until that has helped.
    /// Returns whether it has.
    fn gives_way(&self, newest: Option<u64>, mut helped: impl FnMut() -> bool) -> bool {
        if !lock(&self.connections).close_oldest_silent(newest) {
            return false;
        }
        let deadline = Instant::now() + GIVING_WAY;
        loop {
            if helped() {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(LOOK);
        }
    }

    fn park(&self) -> io::Result<Reserved> {
        let (work, due) = mpsc::channel::<Body>();
        let body = Box::new(move || {
            if let Ok(body) = due.recv() {
                body();
            }
        });
        let thread = self.options.spawner.spawn(Role::Bulk, GuestImpact::Balanced, "mig-receive", body)?;
        Ok(Reserved { work, thread })
    }

    /// Keeps a thread for this reservation.
    fn keep(&self, number: u64, thread: Reserved) {
        let mut all = lock(&self.reserved);
        if let Some(parked) = all.parked.iter_mut().find(|parked| parked.number == number) {
            parked.threads.push(thread);
            return;
        }
        drop(all);
        thread.end();
    }

    /// Ends the threads that are reserved and not in use, of these reservations.
    fn release(&self, which: impl Fn(&Parked) -> bool) {
        let mut all = lock(&self.reserved);
        let released: Vec<Parked> = all.parked.extract_if(.., |parked| which(parked)).collect();
        drop(all);
        released.into_iter().flat_map(|parked| parked.threads).for_each(Reserved::end);
    }

    /// Starts a thread for the session of this entry, or takes one of those that are reserved for it.
    pub(super) fn spawn(&self, owner: u64, role: Role, name: &str, body: Body) -> io::Result<Box<dyn Joiner>> {
        let mut all = lock(&self.reserved);
        let thread = self.obtain(role, name, body, &mut all.parked, |parked| parked.owner == owner)?;
        // wherever it came from, the session needs one less
        if let Some(parked) = all.parked.iter_mut().find(|parked| parked.owner == owner) {
            parked.own = parked.own.saturating_sub(1);
        }
        Ok(thread)
    }

    /// Starts a thread for the connection `id`, or takes one that is reserved for lanes, or that of
    /// an older connection that says nothing. Its body is made anew for every attempt.
    pub(super) fn spawn_for(&self, id: u64, body: impl Fn() -> Body) -> io::Result<Box<dyn Joiner>> {
        self.past_strangers(Some(id), || {
            let mut all = lock(&self.reserved);
            // which role it gets is known only once it has introduced itself; pages are what most
            // of them carry
            let spare = |parked: &Parked| parked.threads.len() > parked.own;
            self.obtain(Role::Bulk, "mig-receive", body(), &mut all.parked, spare)
        })
    }

    /// Starts a thread, or takes one of those that are `parked` in a reservation that is `usable`. The
    /// caller holds their lock: it has to count what it got before another one looks.
    fn obtain(
        &self,
        role: Role,
        name: &str,
        body: Body,
        parked: &mut [Parked],
        usable: impl Fn(&Parked) -> bool,
    ) -> io::Result<Box<dyn Joiner>> {
        // in a cell, so that it can be taken back if there is no thread
        let cell = Arc::new(Mutex::new(Some(body)));
        let taken = cell.clone();
        let run = Box::new(move || {
            let body = lock(&taken).take();
            if let Some(body) = body {
                body();
            }
        });
        let spawned = self.options.spawner.spawn(role, GuestImpact::Balanced, name, run);
        let Err(error) = spawned else { return spawned };
        let Some(body) = lock(&cell).take() else { return Err(error) };
        let found = parked.iter_mut().filter(|parked| usable(parked)).find_map(|parked| parked.threads.pop());
        let Some(Reserved { work, thread }) = found else { return Err(error) };
        let spawner = self.options.spawner.clone();
        let run = Box::new(move || {
            spawner.assume(role, GuestImpact::Balanced);
            body();
        });
        match work.send(run) {
            Ok(()) => Ok(thread),
            Err(_) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::VmDescription;

    /// Starts this many threads and no more.
    struct Few(Mutex<usize>);

    impl Spawner for Few {
        fn spawn(&self, role: Role, impact: GuestImpact, name: &str, body: Body) -> io::Result<Box<dyn Joiner>> {
            let mut left = self.0.lock().unwrap();
            *left = left.checked_sub(1).ok_or(io::ErrorKind::WouldBlock)?;
            StdSpawner.spawn(role, impact, name, body)
        }
    }

    struct NoHost;

    impl DestinationHost for NoHost {
        type Vm = Box<dyn DestinationVm + Send>;

        fn build(&self, _vm: &VmDescription) -> Result<Self::Vm, VmError> {
            unreachable!("no source comes")
        }
    }

    #[test]
    fn what_a_session_needs_for_itself_goes_to_no_connection() {
        let spawner = Arc::new(Few(Mutex::new(2 + SESSION_THREADS)));
        let receiver = Receiver::new(NoHost, drop, ReceiverOptions { spawner, ..ReceiverOptions::default() });
        let common = &receiver.destination.common;
        let reservation = common.reserve(7, 2, 0).unwrap();
        assert_eq!(reservation.streams, 2);
        let connection = |id| common.spawn_for(id, || Box::new(|| {}));
        let lanes = [connection(0).unwrap(), connection(1).unwrap()];
        assert!(connection(2).is_err(), "the last one is the session's");
        common.spawn(7, Role::Control, "mig-alive", Box::new(|| {})).unwrap().join();
        lanes.into_iter().for_each(|lane| lane.join());
    }
}
