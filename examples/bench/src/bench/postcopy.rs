//! Post-copy compared with QEMU's: the runs, and the time for which the guest is slow.
//!
//! A guest that was moved by post-copy runs at once but waits for its pages. So beside the longest
//! gap, the time until it is as fast as before is measured. Its operations are read every
//! [`PERIOD`] from outside, in both processes. The guest is fast from the beginning of the first
//! stretch of [`STEADY_MS`] in which every window of [`WINDOW_MS`] reaches [`SHARE`] of the rate
//! before. See [`until_fast`].

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{
    encrypt::Way,
    figures::median,
    guest::Peek,
    measure::{Setup, Vmm},
    tuning::Tuning,
};

/// The label of our runs and of QEMU's plain post-copy.
pub(super) const PLAIN: &str = "post-copy";
/// The label of QEMU's post-copy with a channel of its own for requested pages.
pub(super) const PREEMPT: &str = "post-copy-preempt";
/// The label of the runs with a pass of pre-copy first, which careful users choose so that the
/// guest waits for fewer pages.
pub(super) const CAREFUL: &str = "post-copy-careful";
/// All labels.
pub(super) const MODES: [&str; 3] = [PLAIN, PREEMPT, CAREFUL];
/// The number of our connections for pages, the default of `ctl migrate`. QEMU's post-copy has one,
/// and one more with preemption.
const STREAMS: u16 = 2;

/// The interval between two readings of the guest's operations.
const PERIOD: Duration = Duration::from_millis(2);
/// The length in ms of the windows over which the rate is taken.
const WINDOW_MS: f64 = 20.0;
/// The time in ms for which the guest must be fast.
const STEADY_MS: f64 = 100.0;
/// The time in ms at the end of the measurement from which the final rate is taken.
const END_MS: f64 = 200.0;
/// The share of the earlier rate at which the guest counts as fast.
const SHARE: f64 = 0.9;
/// The longest time of the measurement after the end of the migration.
const PATIENCE: Duration = Duration::from_secs(5);

/// Returns one round of runs with a workload, in their order. `strategy` is ours in the runs with
/// default options.
pub(super) fn setups(vmms: &[Vmm], workload: &str, memory: u64, strategy: &str) -> Vec<Setup> {
    let setup = |vmm, label: &str, streams, strategy: &str, tuning| Setup {
        vmm,
        label: label.into(),
        workload: workload.into(),
        memory,
        streams,
        impact: "balanced",
        strategy: strategy.into(),
        watch_memory: false,
        watch_speed: true,
        way: Way::default(),
        tuning,
    };
    let of = |tuning, vmm: &Vmm| match (tuning, vmm) {
        (Tuning::AsItComes, Vmm::Minivmm) => vec![setup(*vmm, PLAIN, STREAMS, strategy, tuning)],
        (Tuning::AsItComes, Vmm::Qemu) => [PLAIN, PREEMPT].map(|label| setup(*vmm, label, 1, label, tuning)).to_vec(),
        (Tuning::Careful, Vmm::Minivmm) => vec![setup(*vmm, CAREFUL, STREAMS, "hybrid:rounds=1", tuning)],
        (Tuning::Careful, Vmm::Qemu) => vec![setup(*vmm, CAREFUL, 1, PREEMPT, tuning)],
    };
    Tuning::ALL.into_iter().flat_map(|tuning| vmms.iter().flat_map(move |vmm| of(tuning, vmm))).collect()
}

/// The number of the guest's operations at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Sample {
    /// Milliseconds since the request; negative before it.
    at: f64,
    operations: u64,
    /// Whether the guest has worked at the destination.
    arrived: bool,
}

/// Returns the guest's operations per millisecond in the window that begins at the first sample, or
/// `None` if the samples end earlier.
fn rate(samples: &[Sample]) -> Option<f64> {
    let first = samples.first()?;
    let end = first.at + WINDOW_MS;
    let next = samples.iter().position(|s| s.at >= end)?;
    let (a, b) = (&samples[next.checked_sub(1)?], &samples[next]);
    // between two samples the guest is assumed to work evenly
    let share = (end - a.at) / (b.at - a.at);
    let at_end = a.operations as f64 + share * (b.operations.saturating_sub(a.operations)) as f64;
    Some((at_end - first.operations as f64) / WINDOW_MS)
}

/// Returns the median rate over consecutive windows.
fn median_rate(samples: &[Sample]) -> Option<f64> {
    let (mut rates, mut from) = (Vec::new(), 0);
    while let Some(rate) = rate(&samples[from..]) {
        rates.push(rate);
        let end = samples[from].at + WINDOW_MS;
        from += samples[from..].partition_point(|s| s.at < end);
    }
    median(rates)
}

/// Returns the median rate before the request.
fn rate_before(samples: &[Sample]) -> Option<f64> {
    median_rate(&samples[..samples.partition_point(|s| s.at < 0.0)])
}

/// Returns the median rate at the end, if the guest has arrived.
fn rate_after(samples: &[Sample]) -> Option<f64> {
    let begin = samples.last()?.at - END_MS;
    let arrived = &samples[samples.iter().position(|s| s.arrived)?..];
    median_rate(&arrived[arrived.partition_point(|s| s.at < begin)..])
}

/// Returns the time in ms from the request until the guest was as fast as before and stayed so, or
/// `None` if the samples end earlier. This is the beginning of the first window, after the guest
/// was seen at the destination, from which every window within [`STEADY_MS`] has at least [`SHARE`]
/// of the median rate before.
fn until_fast(samples: &[Sample]) -> Option<f64> {
    let wanted = SHARE * rate_before(samples)?;
    let mut since = None;
    for n in samples.iter().position(|s| s.arrived)?..samples.len() {
        let at = samples[n].at;
        if rate(&samples[n..])? < wanted {
            since = None;
            continue;
        }
        let since = *since.get_or_insert(at);
        if at + WINDOW_MS - since >= STEADY_MS {
            return Some(since);
        }
    }
    None
}

/// The time for which the guest was slow.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Speed {
    /// The time in ms from the request until the guest was as fast as before.
    pub(super) until_fast_ms: Option<f64>,
    /// The time in ms for which it was measured. The guest was slow for at least that time if
    /// `until_fast_ms` is `None`.
    pub(super) watched_ms: f64,
    /// Operations per second before the request and at the end of the measurement. The guest may
    /// remain slower, for example because its memory is no longer in huge pages.
    pub(super) rate_before: f64,
    pub(super) rate_after: f64,
}

impl Speed {
    fn of(samples: &[Sample]) -> Self {
        Self {
            until_fast_ms: until_fast(samples),
            watched_ms: samples.last().map_or(0.0, |s| s.at),
            rate_before: rate_before(samples).map_or(0.0, |r| (r * 1e3).round()),
            rate_after: rate_after(samples).map_or(0.0, |r| (r * 1e3).round()),
        }
    }

    /// Returns the value that is compared. A guest that did not become fast counts with the time of
    /// the measurement.
    pub(super) fn figure(&self) -> f64 {
        self.until_fast_ms.unwrap_or(self.watched_ms)
    }
}

type Samples = Arc<Mutex<Vec<(Instant, u64, bool)>>>;

/// Reads the guest's operations until it is dropped.
pub(super) struct Speedometer {
    samples: Samples,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Speedometer {
    /// Measures the guest of `source`, and looks for it in process `destination` with `memory`
    /// bytes of RAM.
    pub(super) fn start(source: Peek, destination: u32, memory: u64) -> Result<Self, String> {
        let (samples, stop) = (Samples::default(), Arc::new(AtomicBool::new(false)));
        let (to, ended) = (samples.clone(), stop.clone());
        let body = move || {
            let (mut there, mut here, mut arrived) = (None, 0, false);
            let mut next = Instant::now();
            while !ended.load(Ordering::Acquire) {
                let now = Instant::now();
                // after the source has ended, its last value counts
                here = here.max(source.operations().unwrap_or(0));
                if there.is_none() {
                    there = Peek::find(destination, memory);
                }
                let seen = there.as_ref().and_then(Peek::operations).unwrap_or(0);
                arrived |= seen > here;
                // a copy of the board from before the switch has an older value
                lock(&to).push((now, here.max(seen), arrived));
                next = (next + PERIOD).max(now);
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        };
        let thread = thread::Builder::new().name("speedometer".into()).spawn(body).map_err(|e| e.to_string())?;
        Ok(Self { samples, stop, thread: Some(thread) })
    }

    /// Waits until the guest is as fast as before the request, or until the longest time has
    /// passed.
    pub(super) fn wait(&self, request: Instant) -> Speed {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let samples: Vec<Sample> = lock(&self.samples).iter().map(|s| sample(s, request)).collect();
            let speed = Speed::of(&samples);
            if speed.until_fast_ms.is_some() || Instant::now() > deadline {
                return speed;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn sample(&(at, operations, arrived): &(Instant, u64, bool), request: Instant) -> Sample {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let at = at.checked_duration_since(request).map_or_else(|| -ms(request.duration_since(at)), ms);
    Sample { at, operations, arrived }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // a sample is pushed as a whole, so a poisoned vector is valid
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Drop for Speedometer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // a thread that panicked has no result
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns samples every 2 ms of a guest with these operations per ms in stretches of these
    /// lengths in ms. The first stretch ends with the request, and the guest arrives with the
    /// third.
    fn samples(stretches: &[(f64, f64)]) -> Vec<Sample> {
        let (mut at, mut operations, mut all) = (-stretches[0].0, 0.0, Vec::new());
        for (n, (length, rate)) in stretches.iter().enumerate() {
            for _ in 0..(length / 2.0) as usize {
                all.push(Sample { at, operations: operations as u64, arrived: n >= 2 });
                at += 2.0;
                operations += rate * 2.0;
            }
        }
        all
    }

    #[test]
    fn rates_are_taken_over_windows() {
        let all = samples(&[(100.0, 1000.0), (50.0, 0.0)]);
        assert_eq!(rate(&all), Some(1000.0));
        assert_eq!(rate(&all[45..]), Some(500.0), "half of the window is after the request");
        assert_eq!(rate(&all[66..]), None, "no sample at the window's end");
        assert_eq!(rate_before(&all), Some(1000.0));
        assert_eq!(rate_before(&all[60..]), None);
        // samples that are late
        let at = |at, operations| Sample { at, operations, arrived: true };
        assert_eq!(rate(&[at(0.0, 0), at(10.0, 100), at(30.0, 500)]), Some(15.0));
        assert_eq!(rate(&[at(0.0, 100), at(50.0, 600)]), Some(10.0));
    }

    #[test]
    fn the_median_before_is_not_moved_by_a_pause() {
        let mut all = samples(&[(500.0, 1000.0), (10.0, 0.0), (200.0, 1000.0)]);
        all.iter_mut().take(50).for_each(|s| s.operations = 0);
        assert_eq!(rate_before(&all), Some(1000.0));
    }

    #[test]
    fn a_guest_that_is_fast_at_once_is_so_on_arrival() {
        let all = samples(&[(500.0, 1000.0), (30.0, 0.0), (300.0, 990.0)]);
        assert_eq!(until_fast(&all), Some(30.0));
        // work at the source after the request does not count as the arrival
        let all = samples(&[(500.0, 1000.0), (300.0, 1000.0), (300.0, 1000.0)]);
        assert_eq!(until_fast(&all), Some(300.0));
    }

    #[test]
    fn a_slow_stretch_counts_and_a_short_fast_one_does_not() {
        let all = samples(&[(500.0, 1000.0), (10.0, 0.0), (200.0, 500.0), (300.0, 1000.0)]);
        let found = until_fast(&all).unwrap();
        // the first window with nine tenths begins before the stretch does
        assert!((206.0..=210.0).contains(&found), "{found}");
        let all = samples(&[(500.0, 1000.0), (10.0, 0.0), (60.0, 1000.0), (100.0, 100.0), (300.0, 950.0)]);
        let found = until_fast(&all).unwrap();
        assert!((166.0..=170.0).contains(&found), "{found}");
    }

    #[test]
    fn there_is_no_figure_without_enough_samples() {
        assert_eq!(until_fast(&[]), None);
        assert_eq!(until_fast(&samples(&[(500.0, 1000.0), (10.0, 0.0), (90.0, 1000.0)])), None, "too short");
        assert_eq!(until_fast(&samples(&[(500.0, 1000.0), (10.0, 0.0), (900.0, 800.0)])), None, "never fast");
        assert_eq!(until_fast(&samples(&[(500.0, 1000.0), (900.0, 1000.0)])), None, "never seen there");
        let slow = Speed::of(&samples(&[(500.0, 1000.0), (10.0, 0.0), (900.0, 800.0)]));
        assert_eq!((slow.until_fast_ms, slow.figure()), (None, 908.0));
        assert_eq!((slow.rate_before, slow.rate_after), (1e6, 8e5));
        assert_eq!(Speed::of(&[]).rate_after, 0.0);
    }

    #[test]
    fn ours_and_all_of_theirs_alternate() {
        let all = setups(&[Vmm::Minivmm, Vmm::Qemu], "idle", 1 << 30, PLAIN);
        let order: Vec<_> = all.iter().map(|s| (s.vmm, s.label.as_str(), s.strategy.as_str())).collect();
        let (ours, theirs) = (Vmm::Minivmm, Vmm::Qemu);
        let as_it_comes = [(ours, PLAIN, PLAIN), (theirs, PLAIN, PLAIN), (theirs, PREEMPT, PREEMPT)];
        let careful = [(ours, CAREFUL, "hybrid:rounds=1"), (theirs, CAREFUL, PREEMPT)];
        assert_eq!(order, [&as_it_comes[..], &careful].concat());
        assert!(all.iter().all(|s| s.watch_speed));
    }
}
