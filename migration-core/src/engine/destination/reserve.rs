//! The reservation of threads and descriptors for the lanes of a session, before the lanes are
//! offered. So *welcome* tells the source how many lanes it may open, and no lane fails later for
//! lack of resources.
//!
//! If a thread or a descriptor is needed and cannot be had otherwise, the oldest connection that
//! has sent nothing is closed. Before a connection has sent something, an unidentified connection
//! cannot be told from a lane of the session, and several lanes come at the same time. So a new
//! connection gets a reserved thread if there is one, and no older connection is closed for that:
//! otherwise each lane would close the one before it. Unidentified connections may therefore use
//! reserved threads, but only until a lane needs one, and never those that are reserved for the
//! session itself.

use std::thread;

use super::*;

type Body = Box<dyn FnOnce() + Send>;

/// The longest wait until a closed connection has released its thread and its descriptor. After
/// that they count as not available.
const GIVING_WAY: Duration = Duration::from_millis(200);
/// The interval between two checks during that wait: the kernel counts a thread for a short time
/// after its end.
const LOOK: Duration = Duration::from_millis(1);

/// The number of demand lanes that are reserved if post-copy is requested. Only the source knows
/// how many it will open.
const DEMAND_LANES: usize = 2;
/// The number of threads of every session in addition to those of its lanes: one thread sends signs
/// of life.
const SESSION_THREADS: usize = 1;

/// The reservations of all sessions whose lanes are not complete yet.
#[derive(Default)]
pub(super) struct AllParked {
    parked: Vec<Parked>,
    /// The number of reservations so far.
    numbers: u64,
}

/// The threads that are reserved for the newest session of one VM.
struct Parked {
    /// The number of the reservation.
    number: u64,
    /// The number of the VM's entry in the table.
    owner: u64,
    threads: Vec<Reserved>,
    /// The number of threads for the session itself. No connection gets them.
    own: usize,
}

/// A thread that waits for its work.
struct Reserved {
    work: mpsc::Sender<Body>,
    thread: Box<dyn Joiner>,
}

impl Reserved {
    /// Ends the thread without work.
    fn end(self) {
        drop(self.work);
        self.thread.join();
    }
}

/// A reservation of threads for the lanes of a session, until this is dropped. They are used when
/// no new thread can be started.
pub(super) struct Reservation<'a> {
    common: &'a Common,
    number: u64,
    /// The number of bulk lanes that there can be.
    pub(super) streams: u16,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        // by number, because a newer attempt of the same VM may have its own reservation
        self.common.release(|parked| parked.number == self.number);
    }
}

impl Common {
    /// Reserves threads and descriptors for `streams` bulk lanes and for what `features` need. If
    /// there are not enough, connections that have sent nothing are closed. If that does not
    /// suffice, fewer bulk lanes are reserved.
    ///
    /// # Errors
    /// Returns an error if there is not enough for a single bulk lane.
    pub(super) fn reserve(&self, owner: u64, streams: u16, features: u32) -> Result<Reservation<'_>, MigrationError> {
        // the reservation of an earlier attempt
        self.release(|parked| parked.owner == owner);
        let (mut lanes, mut own) = (0, SESSION_THREADS);
        if features & FEATURE_POST_COPY != 0 {
            lanes += DEMAND_LANES;
            // each demand lane has a second thread, which handles faults; one more thread waits
            // until no page is missing
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
        // from here on, dropping this releases whatever is reserved
        let mut reservation = Reservation { common: self, number, streams };
        let wanted = usize::from(streams);
        let channels = self.channels(wanted + lanes);
        let mut failed = None;
        let mut reserved = 0;
        while reserved < wanted + threads && failed.is_none() {
            match self.past_strangers(None, || self.park()) {
                // the thread ends at once if a newer attempt has released the reservation
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

    /// Returns the number of connections, at most `wanted`, for which there are descriptors.
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

    /// Calls `start`. If it fails, closes the oldest connection that has sent nothing and calls it
    /// again. If `newest` is given, only a connection that is older than that one is closed.
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

    /// Closes the oldest connection that has sent nothing, and waits for a short time until
    /// `helped` returns true. Returns whether it did.
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

    /// Adds a thread to the reservation of this number.
    fn keep(&self, number: u64, thread: Reserved) {
        let mut all = lock(&self.reserved);
        if let Some(parked) = all.parked.iter_mut().find(|parked| parked.number == number) {
            parked.threads.push(thread);
            return;
        }
        drop(all);
        thread.end();
    }

    /// Removes these reservations, and ends their threads that are not in use.
    fn release(&self, which: impl Fn(&Parked) -> bool) {
        let mut all = lock(&self.reserved);
        let released: Vec<Parked> = all.parked.extract_if(.., |parked| which(parked)).collect();
        drop(all);
        released.into_iter().flat_map(|parked| parked.threads).for_each(Reserved::end);
    }

    /// Starts a thread for the session of this entry, or uses a thread that is reserved for it.
    pub(super) fn spawn(&self, owner: u64, role: Role, name: &str, body: Body) -> io::Result<Box<dyn Joiner>> {
        let started = self.start(role, name, body);
        let mut all = lock(&self.reserved);
        let own = |parked: &Parked| parked.owner == owner;
        let thread = match started {
            Ok(thread) => thread,
            Err(refused) => self.use_reserved(&mut all.parked, own, role, refused)?,
        };
        // in both cases the session needs one thread less
        if let Some(parked) = all.parked.iter_mut().find(|parked| own(parked)) {
            parked.own = parked.own.saturating_sub(1);
        }
        Ok(thread)
    }

    /// Starts a thread for the connection `id`, or uses a thread that is reserved for lanes, or
    /// that of an older connection that has sent nothing. `body` is called for each try.
    pub(super) fn spawn_for(&self, id: u64, body: impl Fn() -> Body) -> io::Result<Box<dyn Joiner>> {
        // the role is known only when the connection has introduced itself; most carry pages
        let role = Role::Bulk;
        let spare = |parked: &Parked| parked.threads.len() > parked.own;
        self.past_strangers(Some(id), || {
            self.start(role, "mig-receive", body())
                .or_else(|refused| self.use_reserved(&mut lock(&self.reserved).parked, spare, role, refused))
        })
    }

    /// Starts a thread. No lock is held meanwhile.
    ///
    /// # Errors
    /// Returns an error if no thread can be started. The error contains the work of the thread.
    fn start(&self, role: Role, name: &str, body: Body) -> Result<Box<dyn Joiner>, Refused> {
        // in a cell, from which it is taken back if there is no thread
        let cell = Arc::new(Mutex::new(Some(body)));
        let taken = cell.clone();
        let run = Box::new(move || {
            let body = lock(&taken).take();
            if let Some(body) = body {
                body();
            }
        });
        let spawned = self.options.spawner.spawn(role, GuestImpact::Balanced, name, run);
        spawned.map_err(|error| Refused { error, body: lock(&cell).take() })
    }

    /// Uses a thread of a reservation for which `usable` returns true.
    ///
    /// # Errors
    /// Returns an error if there is no such thread: the error of the attempt to start one.
    fn use_reserved(
        &self,
        parked: &mut [Parked],
        usable: impl Fn(&Parked) -> bool,
        role: Role,
        refused: Refused,
    ) -> io::Result<Box<dyn Joiner>> {
        let Refused { error, body } = refused;
        let Some(body) = body else { return Err(error) };
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

/// The work for a thread that could not be started.
struct Refused {
    error: io::Error,
    body: Option<Body>,
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

    /// A [`Room`] with descriptors for this number of connections.
    struct Cramped(usize);

    impl Room for Cramped {
        fn channels(&self, wanted: usize) -> usize {
            wanted.min(self.0)
        }
    }

    fn receiver(threads: usize, room: Option<usize>) -> Receiver {
        let spawner = Arc::new(Few(Mutex::new(threads)));
        let receiver = Receiver::new(NoHost, drop, ReceiverOptions { spawner, ..ReceiverOptions::default() });
        *lock(&receiver.destination.common.room) = room.map(|room| Arc::new(Cramped(room)) as Arc<dyn Room>);
        receiver
    }

    /// The features, the number of connections in addition to bulk lanes, and the number of threads
    /// in addition to those of bulk lanes.
    const NEEDS: [(u32, usize, usize); 4] = [
        (0, 0, 1),
        (FEATURE_POST_COPY, 2, 6),
        (FEATURE_CHECKPOINTS, 1, 2),
        (FEATURE_POST_COPY | FEATURE_CHECKPOINTS, 3, 7),
    ];

    #[test]
    fn as_many_lanes_are_offered_as_there_are_threads_and_descriptors_for() {
        const WANTED: u16 = 4;
        for (features, lanes, threads) in NEEDS {
            for more in 0..6 {
                let offered = |receiver: &Receiver| {
                    let reserved = receiver.destination.common.reserve(7, WANTED, features);
                    reserved.map(|reservation| usize::from(reservation.streams))
                };
                let expected = (more > 0).then_some(more.min(WANTED.into()));
                let few = offered(&receiver(threads + more, None));
                assert_eq!(few.as_ref().ok().copied(), expected, "{features:#b}, {more} more threads");
                let cramped = offered(&receiver(100, Some(lanes + more)));
                assert_eq!(cramped.as_ref().ok().copied(), expected, "{features:#b}, {more} more descriptors");
                if more == 0 {
                    let (thread, descriptor) = (few.unwrap_err(), cramped.unwrap_err().to_string());
                    assert!(matches!(thread, MigrationError::Thread { .. }), "{thread}");
                    let words = format!("no descriptors for {} connections", lanes + 1);
                    assert!(descriptor.contains(&words), "{descriptor}");
                }
            }
            // not more threads are reserved than are needed
            let receiver = receiver(100, None);
            let reservation = receiver.destination.common.reserve(7, WANTED, features).unwrap();
            let parked = |receiver: &Receiver| {
                lock(&receiver.destination.common.reserved).parked.iter().map(|p| p.threads.len()).sum::<usize>()
            };
            assert_eq!(parked(&receiver), usize::from(WANTED) + threads, "{features:#b}");
            drop(reservation);
            assert_eq!(parked(&receiver), 0, "{features:#b}");
        }
    }

    #[test]
    fn connections_get_the_threads_of_lanes_and_the_session_the_others() {
        for (features, lanes, threads) in NEEDS {
            let receiver = receiver(2 + threads, None);
            let common = &receiver.destination.common;
            let _reservation = common.reserve(7, 2, features).unwrap();
            let mut started = Vec::new();
            while let Ok(thread) = common.spawn_for(started.len() as u64, || Box::new(|| {})) {
                started.push(thread);
            }
            assert_eq!(started.len(), 2 + lanes, "{features:#b}");
            let spawn = |owner| common.spawn(owner, Role::Control, "mig-test", Box::new(|| {}));
            assert!(spawn(8).is_err(), "they are another session's");
            for _ in 0..threads - lanes {
                started.push(spawn(7).unwrap());
            }
            assert!(spawn(7).is_err(), "{features:#b}");
            started.into_iter().for_each(|thread| thread.join());
        }
    }

    #[test]
    fn what_a_session_has_started_otherwise_is_not_kept_for_it() {
        // one thread that can be started after the reservation
        let receiver = receiver(2 + 1 + 1, None);
        let common = &receiver.destination.common;
        let _reservation = common.reserve(7, 2, 0).unwrap();
        let own = common.spawn(7, Role::Control, "mig-alive", Box::new(|| {})).unwrap();
        let connection = |id| common.spawn_for(id, || Box::new(|| {}));
        let lanes = [connection(0).unwrap(), connection(1).unwrap(), connection(2).unwrap()];
        assert!(connection(3).is_err());
        lanes.into_iter().chain([own]).for_each(|thread| thread.join());
    }

    #[test]
    fn a_newer_attempt_takes_the_reservation_of_its_vm_and_of_no_other() {
        let receiver = receiver(100, None);
        let common = &receiver.destination.common;
        let parked = || lock(&common.reserved).parked.iter().map(|p| (p.owner, p.threads.len())).collect::<Vec<_>>();
        let first = common.reserve(7, 2, 0).unwrap();
        let _other = common.reserve(8, 1, 0).unwrap();
        let _newer = common.reserve(7, 3, 0).unwrap();
        assert_eq!(parked(), [(8, 2), (7, 4)]);
        // the older reservation has nothing to release any more
        drop(first);
        assert_eq!(parked(), [(8, 2), (7, 4)]);
    }
}
