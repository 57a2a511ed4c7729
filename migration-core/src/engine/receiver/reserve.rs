//! What a session's lanes need is taken before they are offered: a source is told in *welcome* how
//! many there can be, and not by a lane that fails later.

use super::*;

type Body = Box<dyn FnOnce() + Send>;

/// Demand lanes that room is kept for, if post-copy is wanted: how many there will be only the
/// source knows.
const DEMAND_LANES: usize = 2;
/// Threads of every session beside those of its lanes: the one that says that the destination is
/// alive.
const SESSION_THREADS: usize = 1;

/// The threads that are reserved for the lanes of one session, the newest.
#[derive(Default)]
pub(super) struct Parked {
    /// The number of the reservation that they belong to.
    number: u64,
    threads: Vec<Reserved>,
}

/// A thread that waits for a connection.
struct Reserved {
    work: mpsc::Sender<Body>,
    thread: Box<dyn Joiner>,
}

/// Threads that are kept for the lanes of a session until this is dropped. They are used when no
/// other can be had.
pub(super) struct Reservation<'a> {
    hub: &'a Hub,
    number: u64,
    /// How many bulk lanes there can be.
    pub(super) streams: u16,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        // a newer attempt may have reserved threads of its own
        self.hub.release(Some(self.number));
    }
}

impl Hub {
    /// Takes what `streams` bulk lanes need and what goes with `features`, or as many fewer bulk
    /// lanes as can be had.
    ///
    /// # Errors
    /// When there is not enough for a single one.
    pub(super) fn reserve(&self, streams: u16, features: u32) -> Result<Reservation<'_>, MigrationError> {
        self.release(None);
        let number = {
            let mut parked = lock(&self.reserved);
            parked.number += 1;
            parked.number
        };
        let (mut lanes, mut threads) = (0, SESSION_THREADS);
        if features & FEATURE_POST_COPY != 0 {
            lanes += DEMAND_LANES;
            // each lane has one beside its own that serves faults, and one waits for the end of
            // that
            threads += 2 * DEMAND_LANES + 1;
        }
        if features & FEATURE_CHECKPOINTS != 0 {
            lanes += 1;
            threads += 1;
        }
        // from here on, whatever is reserved is released with it
        let mut reservation = Reservation { hub: self, number, streams };
        let wanted = usize::from(streams);
        let room = lock(&self.room).clone();
        let channels = room.map_or(wanted + lanes, |room| room.channels(wanted + lanes));
        let mut failed = None;
        let mut reserved = 0;
        while reserved < wanted + threads && failed.is_none() {
            match self.park() {
                Ok(thread) => lock(&self.reserved).threads.push(thread),
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

    /// Ends the threads that are reserved and not in use, if they belong to this reservation, or to whichever.
    fn release(&self, number: Option<u64>) {
        let mut parked = lock(&self.reserved);
        if number.is_some_and(|number| number != parked.number) {
            return;
        }
        let reserved = std::mem::take(&mut parked.threads);
        drop(parked);
        for Reserved { work, thread } in reserved {
            drop(work);
            thread.join();
        }
    }

    /// Starts a thread for a session or a connection, or takes one of those that are reserved.
    pub(super) fn spawn(&self, role: Role, name: &str, body: Body) -> io::Result<Box<dyn Joiner>> {
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
        let Some(Reserved { work, thread }) = lock(&self.reserved).threads.pop() else { return Err(error) };
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
