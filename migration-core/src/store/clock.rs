//! The clock of a store's leases.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::lock::lock;

/// The clock of a store. All users of one store have to read the same clock.
pub trait Clock: Send + Sync {
    /// Returns the time since a fixed moment. The time should not go back: otherwise leases end too
    /// late.
    fn now(&self) -> Duration;
}

/// The monotonic clock of this process, for stores that live as long as the process.
#[derive(Clone, Copy, Debug)]
pub struct ProcessClock {
    origin: Instant,
}

impl Default for ProcessClock {
    fn default() -> Self {
        Self { origin: Instant::now() }
    }
}

impl Clock for ProcessClock {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }
}

/// A clock that changes only when it is advanced, for tests and for simulations.
#[derive(Debug, Default)]
pub struct ManualClock {
    now: Mutex<Duration>,
}

impl ManualClock {
    /// Advances the clock. It stays at the largest [`Duration`] instead of overflowing.
    pub fn advance(&self, by: Duration) {
        let mut now = lock(&self.now);
        *now = now.saturating_add(by);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        *lock(&self.now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_of_a_process_goes_on() {
        let clock = ProcessClock::default();
        let begin = clock.now();
        while clock.now() <= begin {
            std::hint::spin_loop();
        }
    }
}
