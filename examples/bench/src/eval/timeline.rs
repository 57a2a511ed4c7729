//! The guest's speed over time during an operation on its VM.

use std::{
    thread,
    time::{Duration, Instant},
};

use migration_kvm::ram::Backing;
use serde::Serialize;
use serde_json::Value;

use crate::bench::{
    guest::{Guest, Peek},
    measure::{BEFORE, FILL, ms, warm},
    ours::{Options, Source},
    process::Folder,
    samples::{self, Sample},
};

/// The interval at which the guest's operations are read, and over which a speed is taken.
const PERIOD: Duration = Duration::from_millis(5);
/// The time for which the guest is observed before the request, and after the end of the operation.
pub(super) const EARLIER: Duration = Duration::from_millis(500);
pub(super) const LATER: Duration = Duration::from_millis(700);

/// A VM and the operation on it. The VM lives as long as this does.
pub(super) struct Stage {
    /// Performs the operation and returns its report.
    pub(super) act: Box<dyn FnMut() -> Result<Value, String>>,
    /// The process whose private memory holds the guest afterwards, or `None` if the guest stays in
    /// the same memory.
    pub(super) destination: Option<u32>,
}

/// An operation on a VM, which is prepared before the measurement.
pub(super) struct Act {
    pub(super) name: &'static str,
    pub(super) ready: fn(&Folder, Source, &Options) -> Result<Stage, String>,
}

/// The guest's speed before, during and after an operation.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Timeline {
    pub(super) name: &'static str,
    /// The time of the operation in ms, measured by the client.
    pub(super) took_ms: f64,
    /// The guest's longest gap from the request until [`LATER`] the end, in ms.
    pub(super) gap_ms: f64,
    /// The guest's operations per second before the request.
    pub(super) usual: f64,
    /// Milliseconds since the request, and the speed during the following [`PERIOD`] in percent of
    /// the usual speed.
    pub(super) points: Vec<(f64, f64)>,
    pub(super) report: Value,
}

/// The raw observations.
struct Seen {
    samples: Vec<Sample>,
    asked: Instant,
    done: Instant,
}

impl Act {
    /// Performs the operation on a guest of its own.
    pub(super) fn timeline(&self, folder: &Folder, options: &Options) -> Result<Timeline, String> {
        let backing: Backing = options.backing.parse().map_err(|e| format!("{e}"))?;
        let mut source = Source::start(folder, options)?;
        let guest = Guest::shared(&mut source.process, options.memory, backing, FILL)?;
        let mut stage = (self.ready)(folder, source, options)?;
        let warm = warm(options.memory)?;
        thread::sleep(BEFORE);
        drop(warm);
        let (destination, memory) = (stage.destination, options.memory);
        let (mut there, mut most) = (None, 0);
        let look = || {
            if let (None, Some(pid)) = (&there, destination) {
                there = Peek::find(pid, memory);
            }
            // a copy of the board from before the switch has an older value
            most = most.max(guest.board().ok()?.operations);
            most = most.max(there.as_ref().and_then(Peek::operations).unwrap_or(0));
            Some(most)
        };
        let act = || {
            thread::sleep(EARLIER);
            guest.reset_gap()?;
            let asked = Instant::now();
            let report = (stage.act)()?;
            let done = Instant::now();
            thread::sleep(LATER);
            Ok::<_, String>((report, asked, done))
        };
        let (result, samples) = samples::during(PERIOD, look, act)?;
        let (report, asked, done) = result?;
        let board = match destination {
            Some(pid) => Peek::find(pid, memory).and_then(|peek| peek.board()).ok_or("the guest has not arrived")?,
            None => guest.board()?,
        };
        let seen = Seen { samples, asked, done };
        Ok(Timeline {
            name: self.name,
            took_ms: ms(done - asked),
            gap_ms: ms(board.longest_gap()),
            usual: seen.usual().ok_or("too few samples of the guest's speed")?.round(),
            points: seen.points(),
            report,
        })
    }
}

impl Seen {
    /// Returns the operations per second before the request.
    fn usual(&self) -> Option<f64> {
        samples::rate(&self.samples, self.asked - EARLIER * 8 / 10, self.asked).filter(|rate| *rate > 0.0)
    }

    fn points(&self) -> Vec<(f64, f64)> {
        let Some(usual) = self.usual() else { return Vec::new() };
        let begin = self.asked - EARLIER * 8 / 10;
        let steps = (self.done + LATER - begin).as_millis() / PERIOD.as_millis();
        let point = |n: u128| {
            let from = begin + PERIOD * n as u32;
            let rate = samples::rate(&self.samples, from, from + PERIOD)?;
            let since = (from - begin).as_secs_f64() - (self.asked - begin).as_secs_f64();
            Some(((since * 1e6).round() / 1e3, (1e3 * rate / usual).round() / 10.0))
        };
        (0..steps).filter_map(point).collect()
    }
}

impl Timeline {
    /// Returns the mean speed between two times since the request, in percent.
    pub(super) fn mean(&self, from_ms: f64, to_ms: f64) -> Option<f64> {
        let own: Vec<f64> =
            self.points.iter().filter(|(at, _)| (from_ms..to_ms).contains(at)).map(|(_, v)| *v).collect();
        (!own.is_empty()).then(|| own.iter().sum::<f64>() / own.len() as f64)
    }

    /// Returns the time in ms in which the guest would have done, at its usual speed, the
    /// operations that it lost between the request and half of [`LATER`] the end.
    pub(super) fn lost_ms(&self) -> f64 {
        let end = self.took_ms + ms(LATER) / 2.0;
        self.mean(0.0, end).map_or(0.0, |mean| (100.0 - mean) / 100.0 * end)
    }
}

#[cfg(test)]
pub(super) mod test_util {
    use serde_json::json;

    use super::*;

    /// Returns a guest that is half as fast from the request until the end, and does nothing for 5
    /// ms in between.
    pub(crate) fn timeline(name: &'static str, took_ms: f64) -> Timeline {
        let points = (-80..(took_ms as i32 + 700) / 5).map(|n| {
            let at = f64::from(n) * 5.0;
            let speed = if at == 20.0 {
                0.0
            } else if (0.0..took_ms).contains(&at) {
                50.0
            } else {
                100.0
            };
            (at, speed)
        });
        let report = json!({"downtime_ms": 0.7});
        Timeline { name, took_ms, gap_ms: 1.5, usual: 4e7, points: points.collect(), report }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_shares_of_the_usual_one() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        // 1000 operations per ms until the request, none for 10 ms, then 500
        let operations = |at: u64| match at {
            0..=500 => at * 1000,
            501..=510 => 500_000,
            _ => 500_000 + (at - 510) * 500,
        };
        let sample = |n: u64| Sample { at: start + ms(5 * n), operations: operations(5 * n) };
        let samples = (0..300).map(sample).collect();
        let seen = Seen { samples, asked: start + ms(500), done: start + ms(600) };
        assert_eq!(seen.usual(), Some(1e6));
        let points = seen.points();
        assert_eq!((points[0], points.len()), ((-400.0, 100.0), 240));
        assert_eq!(points[80..84], [(0.0, 0.0), (5.0, 0.0), (10.0, 50.0), (15.0, 50.0)]);
        let nothing = Seen { samples: Vec::new(), ..seen };
        assert!(nothing.usual().is_none() && nothing.points().is_empty());
    }

    #[test]
    fn what_the_guest_lost() {
        let timeline = test_util::timeline("refresh", 200.0);
        assert_eq!(timeline.mean(-100.0, 0.0), Some(100.0));
        assert_eq!(timeline.mean(20.0, 25.0), Some(0.0));
        assert_eq!(timeline.mean(5000.0, 6000.0), None);
        let lost = timeline.lost_ms();
        assert!((lost - 102.5).abs() < 0.1, "{lost}");
    }
}
