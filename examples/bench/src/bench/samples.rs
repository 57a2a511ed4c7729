//! The guest's speed over time: its number of operations, read repeatedly from outside.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

/// The number of operations at a moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sample {
    pub(crate) at: Instant,
    pub(crate) operations: u64,
}

/// Calls `look` every `period` during `act`. Calls that return nothing are left out.
pub(crate) fn during<T>(
    period: Duration,
    mut look: impl FnMut() -> Option<u64> + Send,
    act: impl FnOnce() -> T,
) -> Result<(T, Vec<Sample>), String> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let body = || {
            let (mut samples, mut next) = (Vec::new(), Instant::now());
            while !done.load(Ordering::Acquire) {
                let at = Instant::now();
                samples.extend(look().map(|operations| Sample { at, operations }));
                next = (next + period).max(at);
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            samples
        };
        let sampler = thread::Builder::new().name("sampler".into()).spawn_scoped(scope, body);
        let sampler = sampler.map_err(|e| format!("no thread for samples: {e}"))?;
        let result = act();
        done.store(true, Ordering::Release);
        Ok((result, sampler.join().map_err(|_| "the sampler panicked")?))
    })
}

/// Returns the number of operations at a moment, or `None` before the first sample and after the
/// last one. Between two samples the guest is assumed to work evenly.
fn operations_at(samples: &[Sample], at: Instant) -> Option<f64> {
    let next = samples.partition_point(|s| s.at < at);
    let b = samples.get(next)?;
    if b.at == at {
        return Some(b.operations as f64);
    }
    let a = &samples[next.checked_sub(1)?];
    let share = (at - a.at).as_secs_f64() / (b.at - a.at).as_secs_f64();
    Some(a.operations as f64 + share * b.operations.saturating_sub(a.operations) as f64)
}

/// Returns the operations per second between two moments, if there are samples around both.
pub(crate) fn rate(samples: &[Sample], from: Instant, to: Instant) -> Option<f64> {
    let seconds = to.checked_duration_since(from).filter(|d| !d.is_zero())?.as_secs_f64();
    Some((operations_at(samples, to)? - operations_at(samples, from)?).max(0.0) / seconds)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn between_samples_the_guest_works_evenly() {
        let start = Instant::now();
        let ms = |ms| start + Duration::from_millis(ms);
        let samples: Vec<_> = [(10, 0), (20, 1000), (30, 1000), (50, 5000)]
            .map(|(at, operations)| Sample { at: ms(at), operations })
            .into();
        assert_eq!(rate(&samples, ms(10), ms(20)), Some(100_000.0));
        assert_eq!(rate(&samples, ms(15), ms(40)), Some(100_000.0));
        assert_eq!(rate(&samples, ms(20), ms(30)), Some(0.0));
        assert_eq!((rate(&samples, ms(9), ms(20)), rate(&samples, ms(20), ms(51))), (None, None));
        assert_eq!((rate(&samples, ms(20), ms(20)), rate(&samples, ms(30), ms(20))), (None, None));
        assert_eq!(rate(&[], ms(10), ms(20)), None);
    }

    #[test]
    fn samples_are_taken_meanwhile() {
        let count = AtomicU64::new(0);
        let look = || Some(1 + count.fetch_add(1, Ordering::Relaxed)).filter(|n| n % 2 == 0);
        let act = || {
            while count.load(Ordering::Relaxed) < 4 {
                thread::yield_now();
            }
        };
        let (_, samples) = during(Duration::from_millis(1), look, act).unwrap();
        assert!(!samples.is_empty() && samples.iter().zip(1..).all(|(s, n)| s.operations == 2 * n), "{samples:?}");
    }
}
