//! The estimate of a VM's working set.

use std::time::Duration;

/// Adjustments in one direction after which an estimate is not stable any more. Around a working
/// set that does not change, one step down is followed by at most two steps up: 0.95 · 1.03² > 1.
const MAX_RUN: u32 = 3;
/// Changes of direction after which an estimate is stable.
const STABLE_TURNS: u32 = 3;
/// A swap rate above so many thresholds ends a stable period at once: the guest has turned to other
/// memory, and 30 seconds are long to wait for it.
const BURST: u64 = 16;

/// How a [`WorkingSetEstimator`] follows the swap rate. The defaults are those of the paper
/// (Deshpande et al., "Agile Live Migration of Virtual Machines", IPDPS 2016).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EstimatorOptions {
    /// α, the factor of the estimate when the swap rate is below the threshold: 0.95.
    pub shrink: f64,
    /// β, the factor of the estimate when the swap rate is above the threshold: 1.03.
    pub grow: f64,
    /// τ, the threshold of the swap rate, in bytes per second: 4 KiB/s.
    pub threshold: u64,
    /// The time between two adjustments while the estimate is not stable: 2 s.
    pub interval: Duration,
    /// The time between two adjustments while it is: 30 s.
    pub stable_interval: Duration,
    /// The smallest estimate, in bytes.
    pub smallest: u64,
    /// The largest estimate, in bytes: the RAM of the VM.
    pub largest: u64,
}

impl EstimatorOptions {
    /// Returns the paper's options for a VM with so many bytes of RAM. The smallest estimate is
    /// 1/64 of them.
    pub const fn of_ram(bytes: u64) -> Self {
        Self {
            shrink: 0.95,
            grow: 1.03,
            threshold: 4096,
            interval: Duration::from_secs(2),
            stable_interval: Duration::from_secs(30),
            smallest: bytes / 64,
            largest: bytes,
        }
    }
}

/// An adjustment of the estimate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adjustment {
    /// The guest swaps hardly: it may need less.
    Shrunk,
    /// The guest swaps: it needs more.
    Grown,
}

/// Estimates how many bytes of RAM a VM works with, from the rate at which it brings pages back from
/// a store.
///
/// As long as the rate is below a threshold, the estimate shrinks; when the rate is above it, the
/// estimate grows. That is meaningful only if somebody evicts pages so that the VM has about as much
/// resident memory as the estimate says. The estimate then swings around the working set. It is
/// *stable* when its direction has changed a few times, and is adjusted less often then.
///
/// Pages that are evicted do not count as swapped, because evictions follow from the estimate
/// itself.
///
/// ```
/// use std::time::Duration;
/// use migration_core::working_set::{Adjustment, EstimatorOptions, WorkingSetEstimator};
///
/// let mut estimator = WorkingSetEstimator::new(EstimatorOptions::of_ram(1 << 30), 1 << 30);
/// let second = Duration::from_secs(1);
/// assert_eq!(estimator.observe(0 * second, 0), None); // the first observation is a beginning
/// assert_eq!(estimator.observe(1 * second, 0), None); // too early
/// assert_eq!(estimator.observe(2 * second, 0), Some(Adjustment::Shrunk));
/// assert_eq!(estimator.estimate(), (1 << 30) / 100 * 95 + 23);
/// // 1 MiB came back within two seconds
/// assert_eq!(estimator.observe(4 * second, 1 << 20), Some(Adjustment::Grown));
/// ```
#[derive(Clone, Debug)]
pub struct WorkingSetEstimator {
    options: EstimatorOptions,
    estimate: u64,
    /// When the estimate was adjusted last, and what had been swapped by then.
    last: Option<(Duration, u64)>,
    direction: Option<Adjustment>,
    /// Adjustments in this direction, one after the other.
    run: u32,
    /// Changes of direction since the estimate was last known not to be stable.
    turns: u32,
}

impl WorkingSetEstimator {
    /// Makes an estimator whose first estimate is `resident` bytes.
    pub fn new(options: EstimatorOptions, resident: u64) -> Self {
        let mut this = Self { options, estimate: 0, last: None, direction: None, run: 0, turns: 0 };
        this.restart(resident);
        this
    }

    /// Begins anew with an estimate of `resident` bytes, for example after a time in which nothing
    /// was evicted.
    pub fn restart(&mut self, resident: u64) {
        self.estimate = self.bounded(resident);
        (self.last, self.direction, self.run, self.turns) = (None, None, 0, 0);
    }

    /// Returns the estimate in bytes.
    pub fn estimate(&self) -> u64 {
        self.estimate
    }

    /// Returns whether the estimate swings around a working set that does not change.
    pub fn is_stable(&self) -> bool {
        self.turns >= STABLE_TURNS
    }

    /// Takes the number of bytes that have come back from stores so far, at the time `now` since
    /// any fixed moment. Adjusts the estimate if it is time to, and returns how.
    ///
    /// Neither may ever decrease; one that does counts as unchanged.
    pub fn observe(&mut self, now: Duration, swapped: u64) -> Option<Adjustment> {
        let Some((then, before)) = self.last else {
            self.last = Some((now, swapped));
            return None;
        };
        let (time, bytes) = (now.saturating_sub(then), swapped.saturating_sub(before));
        if time.is_zero() || time < self.options.interval {
            return None;
        }
        let rate = bytes as f64 / time.as_secs_f64();
        let burst = rate > self.options.threshold.saturating_mul(BURST) as f64;
        if self.is_stable() && time < self.options.stable_interval && !burst {
            return None;
        }
        self.last = Some((now, swapped));
        let (adjustment, factor) = match rate > self.options.threshold as f64 {
            true => (Adjustment::Grown, self.options.grow),
            false => (Adjustment::Shrunk, self.options.shrink),
        };
        self.estimate = self.bounded((self.estimate as f64 * factor).round() as u64);
        self.note(adjustment, burst);
        Some(adjustment)
    }

    fn note(&mut self, adjustment: Adjustment, burst: bool) {
        if self.direction == Some(adjustment) {
            self.run += 1;
        } else {
            self.turns += u32::from(self.direction.is_some());
            (self.direction, self.run) = (Some(adjustment), 1);
        }
        if self.run >= MAX_RUN || burst && self.is_stable() {
            self.turns = 0;
        }
    }

    fn bounded(&self, bytes: u64) -> u64 {
        bytes.min(self.options.largest).max(self.options.smallest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A guest with a working set, of which the share that is not resident comes back in each
    /// second.
    struct Guest {
        estimator: WorkingSetEstimator,
        now: Duration,
        swapped: u64,
        working_set: u64,
    }

    impl Guest {
        fn new(working_set: u64) -> Self {
            let estimator = WorkingSetEstimator::new(EstimatorOptions::of_ram(1024 * MIB), 1024 * MIB);
            Self { estimator, now: Duration::ZERO, swapped: 0, working_set }
        }

        /// Returns the adjustments of so many seconds.
        fn run(&mut self, seconds: u32) -> Vec<Adjustment> {
            let second = || {
                self.now += Duration::from_secs(1);
                self.swapped += self.working_set.saturating_sub(self.estimator.estimate());
                self.estimator.observe(self.now, self.swapped)
            };
            std::iter::repeat_with(second).take(seconds as usize).flatten().collect()
        }
    }

    #[test]
    fn the_estimate_finds_the_working_set_and_stays_there() {
        let mut guest = Guest::new(256 * MIB);
        guest.run(300);
        let near = |estimate: u64| (240 * MIB..272 * MIB).contains(&estimate);
        assert!(near(guest.estimator.estimate()), "{} MiB", guest.estimator.estimate() / MIB);
        for _ in 0..60 {
            guest.run(10);
            assert!(near(guest.estimator.estimate()), "{} MiB", guest.estimator.estimate() / MIB);
        }
    }

    #[test]
    fn a_stable_estimate_is_adjusted_less_often() {
        // swaps a little whenever less than 256 MiB are resident
        let mut estimator = WorkingSetEstimator::new(EstimatorOptions::of_ram(1024 * MIB), 256 * MIB);
        let (mut swapped, mut adjustments) = (0, 0);
        for second in 0..600 {
            swapped += if estimator.estimate() < 256 * MIB { 8192 } else { 0 };
            adjustments += u64::from(estimator.observe(Duration::from_secs(second), swapped).is_some());
        }
        assert!(estimator.is_stable());
        assert!((19..40).contains(&adjustments), "{adjustments} adjustments in 600 s");
        // a burst ends the stable period without 30 seconds of waiting
        let burst = estimator.observe(Duration::from_secs(602), swapped + 64 * MIB);
        assert_eq!(burst, Some(Adjustment::Grown));
        assert!(!estimator.is_stable());
    }

    #[test]
    fn a_working_set_that_grows_is_followed() {
        let mut guest = Guest::new(128 * MIB);
        guest.run(400);
        guest.working_set = 512 * MIB;
        let adjustments = guest.run(120);
        let grown = adjustments.iter().filter(|adjustment| **adjustment == Adjustment::Grown).count();
        assert!(grown > 45, "{grown} of {} adjustments", adjustments.len());
        assert!(guest.estimator.estimate() > 480 * MIB, "{} MiB", guest.estimator.estimate() / MIB);
    }

    #[test]
    fn the_threshold_itself_does_not_grow_the_estimate() {
        let estimator = || {
            let mut estimator = WorkingSetEstimator::new(EstimatorOptions::of_ram(64 * MIB), 32 * MIB);
            assert_eq!(estimator.observe(Duration::ZERO, 0), None);
            estimator
        };
        let two = Duration::from_secs(2);
        assert_eq!(estimator().observe(two, 2 * 4096), Some(Adjustment::Shrunk));
        assert_eq!(estimator().observe(two, 2 * 4096 + 1), Some(Adjustment::Grown));
        assert_eq!(estimator().observe(two - Duration::from_nanos(1), u64::MAX), None);
    }

    #[test]
    fn the_estimate_keeps_to_its_bounds() {
        let mut estimator = WorkingSetEstimator::new(EstimatorOptions::of_ram(64 * MIB), u64::MAX);
        assert_eq!(estimator.estimate(), 64 * MIB);
        for second in 0..1000 {
            estimator.observe(Duration::from_secs(2 * second), 0);
        }
        assert_eq!(estimator.estimate(), MIB);
        estimator.restart(0);
        assert_eq!((estimator.estimate(), estimator.is_stable()), (MIB, false));
        // what goes backwards counts as unchanged
        assert_eq!(estimator.observe(Duration::from_secs(50), 100), None);
        assert_eq!(estimator.observe(Duration::from_secs(40), 50), None);
        assert_eq!(estimator.observe(Duration::from_secs(60), 50), Some(Adjustment::Shrunk));
    }
}
