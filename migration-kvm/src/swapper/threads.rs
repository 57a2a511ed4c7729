//! Runs a swapper on threads of its own.

use std::{
    io,
    sync::{Arc, PoisonError},
    thread,
    time::{Duration, Instant},
};

use migration_core::{
    pager::Pager,
    spawner::{GuestImpact, Joiner, Role, Spawner},
    text::describe,
};

use super::{Swapper, lock};

/// How long a thread waits that nobody wakes: it looks whether the swapper stops.
const IDLE: Duration = Duration::from_secs(3600);
/// After a failure of the pager its thread rests for so long.
const REST: Duration = Duration::from_millis(10);

/// The threads of a [`Swapper`]. Dropping it stops them as [`stop`](Self::stop) does.
pub struct SwapperThreads {
    swapper: Arc<Swapper>,
    threads: Vec<Box<dyn Joiner>>,
}

impl Swapper {
    /// Starts the threads: one that reads faults, some that fetch pages, and one that evicts.
    ///
    /// # Errors
    /// A thread could not be started. None of them runs then.
    pub fn start(self: &Arc<Self>, spawner: &dyn Spawner, impact: GuestImpact) -> io::Result<SwapperThreads> {
        let mut started = SwapperThreads { swapper: self.clone(), threads: Vec::new() };
        let faults = self.clone();
        started.add(spawner, impact, Role::Demand, "swap-faults", move || faults.run_faults())?;
        for number in 0..self.options.fetch_threads.max(1) {
            let fetch = self.clone();
            started.add(spawner, impact, Role::Demand, &format!("swap-fetch-{number}"), move || fetch.run_fetch())?;
        }
        let evict = self.clone();
        started.add(spawner, impact, Role::Background, "swap-evict", move || evict.run_steps())?;
        Ok(started)
    }

    fn stops(&self) -> bool {
        lock(&self.signal).stop
    }

    fn run_faults(&self) {
        while !self.stops() {
            if let Err(error) = self.serve_faults(IDLE) {
                lock(&self.counters).problem = Some(describe(&error));
                thread::sleep(REST);
            }
        }
    }

    fn run_fetch(&self) {
        while !self.stops() {
            // what failed is in the status, and is repeated
            let _ = self.fetch_waiting(IDLE);
        }
    }

    fn run_steps(&self) {
        while self.rest(self.options.interval) {
            if let Err(error) = self.step(Instant::now()) {
                lock(&self.counters).problem = Some(describe(&error));
            }
        }
    }

    /// Waits for `time`, or until a step is to be made at once. Returns `false` when the swapper stops.
    fn rest(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut signal = lock(&self.signal);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if signal.stop || left.is_zero() || std::mem::take(&mut signal.step) {
                return !signal.stop;
            }
            signal = self.signalled.wait_timeout(signal, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl SwapperThreads {
    fn add(
        &mut self,
        spawner: &dyn Spawner,
        impact: GuestImpact,
        role: Role,
        name: &str,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        self.threads.push(spawner.spawn(role, impact, name, Box::new(body))?);
        Ok(())
    }

    /// Stops the threads and waits until they have ended. From then on nobody answers the VM's faults:
    /// its guest has ended, or was migrated, or the RAM is [not watched](Swapper::disarm) any more.
    ///
    /// The swapper cannot be started again.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for SwapperThreads {
    fn drop(&mut self) {
        lock(&self.swapper.signal).stop = true;
        self.swapper.signalled.notify_all();
        self.swapper.pager.wake_waiters();
        // a thread that looks for a page holds this lock until it waits
        drop(lock(&self.swapper.waiting));
        self.swapper.waits.notify_all();
        self.threads.drain(..).for_each(Joiner::join);
    }
}
