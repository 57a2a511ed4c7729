//! A histogram of durations.

use std::{fmt, time::Duration};

/// The number of buckets of equal width into which each power of two is divided.
const STEPS: u64 = 32;
const STEP_BITS: u32 = STEPS.ilog2();
/// Times from 2^40 ns (1,099 s) on are counted in the last bucket. No guest waits that long for a
/// page.
const TOP_BITS: u32 = 40;
const BUCKETS: usize = ((TOP_BITS - STEP_BITS + 1) as usize) * STEPS as usize;

/// A log-linear histogram of durations, such as the times for which guests wait for a page.
///
/// Each power of two of nanoseconds is divided into 32 buckets. So the width of a bucket is at most
/// 1/32 (3.1 %) of the times in it, and its middle, which [`quantile`](Latencies::quantile)
/// returns, is at most 1/64 (1.6 %) off each of them. Times below 32 ns are exact. Times from 2^40
/// ns (1,099 s) on are counted in the last bucket; [`max`](Latencies::max) is always exact.
///
/// A histogram takes 9 KiB, whatever is recorded. To record a time takes a few instructions and no
/// allocation. Threads should record into histograms of their own and [merge](Latencies::merge)
/// them at the end.
///
/// ```
/// use std::time::Duration;
/// use migration_core::histogram::Latencies;
///
/// let mut waits = Latencies::new();
/// for us in 1..=1000 {
///     waits.record(Duration::from_micros(us));
/// }
/// assert_eq!(waits.count(), 1000);
/// let p99 = waits.quantile(0.99).unwrap();
/// assert!(p99.abs_diff(Duration::from_micros(990)) <= Duration::from_micros(990) / 64);
/// assert_eq!(waits.quantile(1.0), waits.max());
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Latencies {
    counts: Box<[u64; BUCKETS]>,
    count: u64,
    max: Duration,
}

/// A bucket of [`Latencies`] that is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bucket {
    /// The shortest time that belongs to the bucket.
    pub from: Duration,
    /// The shortest time that is too long for the bucket. (The last bucket also counts all longer
    /// times.)
    pub to: Duration,
    /// The number of times in the bucket, at least 1.
    pub count: u64,
}

impl Latencies {
    /// Makes an empty histogram.
    pub fn new() -> Self {
        Self { counts: Box::new([0; BUCKETS]), count: 0, max: Duration::ZERO }
    }

    /// Records `time`.
    pub fn record(&mut self, time: Duration) {
        let counter = &mut self.counts[index(time)];
        *counter = counter.saturating_add(1);
        self.count = self.count.saturating_add(1);
        self.max = self.max.max(time);
    }

    /// Adds all times that `other` recorded.
    pub fn merge(&mut self, other: &Latencies) {
        for (mine, theirs) in self.counts.iter_mut().zip(other.counts.iter()) {
            *mine = mine.saturating_add(*theirs);
        }
        self.count = self.count.saturating_add(other.count);
        self.max = self.max.max(other.max);
    }

    /// Returns the number of recorded times.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Returns the longest recorded time, which is exact, or `None` if nothing was recorded.
    pub fn max(&self) -> Option<Duration> {
        (self.count > 0).then_some(self.max)
    }

    /// Returns the time that a share `q` of all recorded times do not exceed. 0.5 gives the median,
    /// 0.99 the 99th percentile. Returns `None` if nothing was recorded.
    ///
    /// Of `n` times in order, this is the one at place ⌈`q`·`n`⌉, but at least the first. Below
    /// 2^40 ns the result is at most 1/64 off. `quantile(1.0)` is exact. A `q` below 0 or above 1
    /// counts as 0 or 1, and NaN counts as 0.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let place = ((q * self.count as f64).ceil() as u64).max(1);
        if place >= self.count {
            return self.max();
        }
        let mut seen = 0u64;
        let at = self.counts.iter().position(|&count| {
            seen = seen.saturating_add(count);
            seen >= place
        })?;
        let (from, to) = bounds(at);
        // the middle of the bucket may be above all recorded times
        Some(Duration::from_nanos((from + to) / 2).min(self.max))
    }

    /// Returns the buckets that are not empty, shortest times first, for a plot.
    pub fn buckets(&self) -> impl Iterator<Item = Bucket> + '_ {
        self.counts.iter().enumerate().filter(|&(_, &count)| count > 0).map(|(index, &count)| {
            let (from, to) = bounds(index);
            Bucket { from: Duration::from_nanos(from), to: Duration::from_nanos(to), count }
        })
    }
}

impl Default for Latencies {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Latencies({}", self.count)?;
        if let (Some(median), Some(p99)) = (self.quantile(0.5), self.quantile(0.99)) {
            write!(f, ": median {median:?}, 99 % {p99:?}, max {:?}", self.max)?;
        }
        f.write_str(")")
    }
}

/// Returns the index of the bucket to which `time` belongs.
fn index(time: Duration) -> usize {
    let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).min((1 << TOP_BITS) - 1);
    // The leading bit and the `STEP_BITS` bits after it select the bucket. Times with fewer bits
    // have buckets of 1 ns.
    let shift = (nanos | STEPS).ilog2() - STEP_BITS;
    (u64::from(shift) * STEPS + (nanos >> shift)) as usize
}

/// Returns the shortest time of bucket `index` and the shortest time after it, in nanoseconds.
fn bounds(index: usize) -> (u64, u64) {
    let index = index as u64;
    let shift = (index / STEPS).saturating_sub(1);
    let from = index - shift * STEPS;
    (from << shift, (from + 1) << shift)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn buckets_lie_end_to_end() {
        let mut end = 0;
        for at in 0..BUCKETS {
            let (from, to) = bounds(at);
            assert_eq!(from, end);
            assert_eq!((index(Duration::from_nanos(from)), index(Duration::from_nanos(to - 1))), (at, at));
            assert!(to - from == 1 || (to - from) * STEPS <= from);
            end = to;
        }
        assert_eq!(end, 1 << TOP_BITS);
        assert_eq!(index(Duration::MAX), BUCKETS - 1);
    }

    #[test]
    fn an_empty_histogram_has_no_times() {
        let empty = Latencies::new();
        assert_eq!((empty.count(), empty.max(), empty.quantile(0.5)), (0, None, None));
        assert_eq!(empty.buckets().count(), 0);
        assert_eq!(format!("{empty:?}"), "Latencies(0)");
    }

    /// Generates times of every magnitude.
    fn times() -> impl Strategy<Value = Vec<u64>> {
        prop::collection::vec((0u32..40, any::<u64>()).prop_map(|(bits, x)| x & ((2 << bits) - 1)), 1..300)
    }

    fn record(nanos: &[u64]) -> Latencies {
        let mut all = Latencies::new();
        nanos.iter().for_each(|&nanos| all.record(Duration::from_nanos(nanos)));
        all
    }

    proptest! {
        #[test]
        fn quantiles_are_those_of_the_sorted_times(mut nanos in times(), q in 0.0f64..=1.0) {
            let all = record(&nanos);
            nanos.sort_unstable();
            for q in [q, 0.0, 0.5, 0.99, 1.0] {
                let place = ((q * nanos.len() as f64).ceil() as usize).max(1);
                let (want, got) = (nanos[place - 1], all.quantile(q).unwrap().as_nanos() as u64);
                prop_assert!(want.abs_diff(got) <= want / 64, "{q}: {got} ns for {want} ns");
            }
            prop_assert_eq!(all.max(), nanos.last().map(|&nanos| Duration::from_nanos(nanos)));
            prop_assert_eq!([-1.0, f64::NAN, 2.0].map(|q| all.quantile(q)), [0.0, 0.0, 1.0].map(|q| all.quantile(q)));
        }

        #[test]
        fn merging_is_recording_both(a in times(), b in times()) {
            let mut merged = record(&a);
            merged.merge(&record(&b));
            prop_assert_eq!(&merged, &record(&[a.clone(), b.clone()].concat()));
            prop_assert_eq!(merged.count(), (a.len() + b.len()) as u64);
            prop_assert_eq!(merged.buckets().map(|b| b.count).sum::<u64>(), merged.count());
            for bucket in merged.buckets() {
                let within = |n: &&u64| (bucket.from..bucket.to).contains(&Duration::from_nanos(**n));
                prop_assert_eq!(a.iter().chain(&b).filter(within).count() as u64, bucket.count);
            }
        }
    }
}
