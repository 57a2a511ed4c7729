//! Computes the figures of a migration under way from readings of its counters. No code here reads
//! a clock.

use std::{collections::VecDeque, time::Duration};

use crate::{
    protocol::SourcePhase,
    report::Progress,
    strategy::{Link, ModelConvergence},
};

/// The time over which rates are measured.
const WINDOW: Duration = Duration::from_secs(1);
/// The most readings that are kept for the window. They come every
/// [interval](super::source::PROGRESS_INTERVAL), and seldom more often.
const MAX_POINTS: usize = 64;
/// The largest ratio of one round to the round before it for which further rounds are assumed.
const GOOD_SHRINK: f64 = 0.5;
/// The most rounds that the forecast looks ahead.
const ROUNDS_AHEAD: u32 = 30;
/// The largest share that is shown before the end.
const ALMOST_ALL: f64 = 0.99;

/// The counters at one moment.
#[derive(Clone, Copy, Debug)]
struct Point {
    at: Duration,
    bytes: u64,
    pages: u64,
}

/// The counters of a migration at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    /// The time since the start.
    pub(super) at: Duration,
    pub(super) phase: SourcePhase,
    /// The number of bytes on the wire so far.
    pub(super) wire_bytes: u64,
    /// The number of the round under way, from 1; 0 before the first.
    pub(super) round: u32,
    /// The number of pages that the round has to send, and the number that it has sent.
    pub(super) round_pages: u64,
    pub(super) round_sent: u64,
    /// The number of pages that earlier rounds had to send.
    pub(super) earlier_pages: u64,
    /// After the hand-over: the number of pages that were missing then, and the number of them that
    /// were sent since.
    pub(super) missing: u64,
    pub(super) served: u64,
    /// The number of pages of the VM.
    pub(super) total: u64,
    /// The number of pages that the guest dirties a second, once a round has shown it.
    pub(super) dirty_pages_per_second: Option<f64>,
    pub(super) throttle_percent: u8,
    pub(super) link: Link,
}

/// A forecast of the pages that are still to be sent.
struct Forecast {
    /// The pages of this round and all later ones.
    pages: f64,
    /// The number of these pages that are sent in the pause; `None` as long as the rate at which
    /// the guest writes is unknown.
    in_the_pause: Option<u64>,
}

/// Computes [`Progress`] from readings.
#[derive(Debug, Default)]
pub(super) struct ProgressMeter {
    /// The readings of the last second, and the one before them.
    points: VecDeque<Point>,
    share: f64,
}

impl ProgressMeter {
    /// Begins the measurement of rates. Called when pages begin to move.
    pub(super) fn begin(&mut self, now: &Reading) {
        self.points.clear();
        self.points.push_back(point(now));
    }

    /// Returns the figures at the time of this reading. Readings must come in the order of time.
    pub(super) fn read(&mut self, now: &Reading) -> Progress {
        let (bytes_per_second, pages_per_second) = self.rates(now);
        let left = now.round_pages.saturating_sub(now.round_sent);
        let serving = matches!(now.phase, SourcePhase::Serving | SourcePhase::Completed);
        let forecast = if serving {
            Forecast { pages: now.missing.saturating_sub(now.served) as f64, in_the_pause: None }
        } else {
            forecast(now, left as f64, pages_per_second)
        };
        let sent = now.earlier_pages.saturating_add(now.round_sent).saturating_add(now.served) as f64;
        let share = match now.phase {
            SourcePhase::Completed => 1.0,
            _ if sent + forecast.pages > 0.0 => (sent / (sent + forecast.pages)).min(ALMOST_ALL),
            _ => 0.0,
        };
        self.share = self.share.max(share);
        let time_for = |pages: f64| Duration::try_from_secs_f64(pages / pages_per_second).ok();
        let limit = now.link.downtime_limit.max(now.link.floor());
        let expected_downtime = forecast.in_the_pause.map(|pages| now.link.predict(pages).min(limit));
        let pause = if serving { Duration::ZERO } else { now.link.floor() };
        Progress {
            phase: now.phase,
            round: now.round,
            round_pages: if serving { now.missing } else { now.round_pages },
            round_sent: if serving { now.served.min(now.missing) } else { now.round_sent },
            wire_bytes: now.wire_bytes,
            bytes_per_second,
            pages_per_second,
            dirty_pages_per_second: now.dirty_pages_per_second,
            expected_downtime,
            least_downtime: (!serving && now.round > 0).then(|| now.link.floor()),
            throttle_percent: now.throttle_percent,
            elapsed: now.at,
            eta: time_for(forecast.pages).map(|time| time.saturating_add(pause)),
            round_eta: if serving { None } else { time_for(left as f64) },
            share_done: self.share,
            downtime_limit: now.link.downtime_limit,
        }
    }

    /// Returns the bytes and pages a second over the window.
    fn rates(&mut self, now: &Reading) -> (f64, f64) {
        let newest = point(now);
        // One reading at the beginning of the window, or before it, is kept.
        while self.points.get(1).is_some_and(|next| newest.at.saturating_sub(next.at) >= WINDOW) {
            self.points.pop_front();
        }
        if self.points.len() >= MAX_POINTS {
            self.points.pop_front();
        }
        let oldest = self.points.front().copied().unwrap_or(newest);
        self.points.push_back(newest);
        let time = newest.at.saturating_sub(oldest.at).as_secs_f64();
        let rate = |newer: u64, older: u64| if time > 0.0 { newer.saturating_sub(older) as f64 / time } else { 0.0 };
        (rate(newest.bytes, oldest.bytes), rate(newest.pages, oldest.pages))
    }
}

fn point(now: &Reading) -> Point {
    let pages = now.earlier_pages.saturating_add(now.round_sent).saturating_add(now.served);
    Point { at: now.at, bytes: now.wire_bytes, pages }
}

/// Looks ahead, round after round, until the planner would end the rounds.
fn forecast(now: &Reading, left: f64, pages_per_second: f64) -> Forecast {
    let Some(dirtied) = now.dirty_pages_per_second.filter(|_| pages_per_second > 0.0) else {
        return Forecast { pages: left, in_the_pause: None };
    };
    // The number of pages that the guest dirties while one is sent.
    let share = dirtied / pages_per_second;
    let mut pages = left;
    let mut next = (now.round_pages as f64 * share).min(now.total as f64);
    for _ in 0..ROUNDS_AHEAD {
        if share > GOOD_SHRINK || now.link.predict(next as u64) <= ModelConvergence::good_enough(&now.link) {
            break;
        }
        pages += next;
        next *= share;
    }
    Forecast { pages: pages + next, in_the_pause: Some(next as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// 1 GiB over a link of 4096 pages a second, with 10 ms of fixed costs and a limit of 300 ms.
    fn reading(at: u64, round_sent: u64) -> Reading {
        Reading {
            at: Duration::from_millis(at),
            phase: SourcePhase::Copying,
            wire_bytes: round_sent.saturating_mul(4096),
            round: 1,
            round_pages: 40_960,
            round_sent,
            earlier_pages: 0,
            missing: 0,
            served: 0,
            total: 262_144,
            dirty_pages_per_second: None,
            throttle_percent: 0,
            link: Link {
                bytes_per_second: 4096.0 * 4096.0,
                bytes_per_page: 4096.0,
                fixed_downtime: 10 * MS,
                downtime_limit: 300 * MS,
                can_post_copy: true,
                ..Link::default()
            },
        }
    }

    /// Returns a meter that has seen the first `ms` milliseconds of the first round, and its last
    /// figures.
    fn after(ms: u64) -> (ProgressMeter, Progress) {
        let mut meter = ProgressMeter::default();
        meter.begin(&reading(0, 0));
        let mut last = None;
        for at in (100..=ms).step_by(100) {
            last = Some(meter.read(&reading(at, at * 4096 / 1000)));
        }
        (meter, last.unwrap())
    }

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() <= b.abs() / 100.0
    }

    #[test]
    fn the_first_round_has_a_rate_a_share_and_an_estimate_from_the_first_reading_on() {
        let (_, p) = after(100);
        assert!(near(p.bytes_per_second, 4096.0 * 4096.0) && near(p.pages_per_second, 4096.0), "{p:?}");
        assert!(near(p.share_done, 0.01), "{p:?}");
        assert!(near(p.round_eta.unwrap().as_secs_f64(), 9.9) && near(p.eta.unwrap().as_secs_f64(), 9.91), "{p:?}");
        // It is not known yet how fast the guest writes.
        assert_eq!((p.expected_downtime, p.least_downtime), (None, Some(10 * MS)));
    }

    #[test]
    fn the_rate_is_that_of_the_last_second() {
        let (mut meter, p) = after(3000);
        assert!(near(p.pages_per_second, 4096.0), "{p:?}");
        // The link stops.
        let half = meter.read(&reading(3500, 12_288));
        assert!(near(half.pages_per_second, 2048.0), "{half:?}");
        let none = meter.read(&reading(4500, 12_288));
        assert_eq!((none.pages_per_second, none.bytes_per_second, none.eta), (0.0, 0.0, None));
    }

    #[test]
    fn later_rounds_are_foreseen_and_the_share_never_falls() {
        let (mut meter, before) = after(10_000);
        // The second round: the guest dirties one page while ten are sent.
        let second = |at, round_sent, rate| Reading {
            round: 2,
            round_pages: 4096,
            wire_bytes: 4096 * (40_960 + round_sent),
            earlier_pages: 40_960,
            dirty_pages_per_second: Some(rate),
            ..reading(at, round_sent)
        };
        let p = meter.read(&second(10_500, 2048, 409.6));
        assert!(p.share_done >= before.share_done && p.share_done < 1.0, "{p:?}");
        // Half of this round, 410 pages of the next, and 41 in the pause.
        assert!(near(p.eta.unwrap().as_secs_f64(), 0.5 + 0.1 + 0.01 + 0.01), "{p:?}");
        assert_eq!(p.expected_downtime.map(|d| d.as_millis()), Some(19), "{p:?}");
        // A guest that dirties more pages than are sent is paused at the limit, not after the time
        // of a whole round.
        let p = meter.read(&second(10_600, 2457, 100_000.0));
        assert_eq!(p.expected_downtime, Some(300 * MS));
        assert!(p.share_done < 1.0 && p.eta.is_some());
        // Until the throttle has an effect.
        let slow = Reading { throttle_percent: 99, ..second(10_700, 2867, 1000.0) };
        let p = meter.read(&slow);
        assert_eq!((p.throttle_percent, p.round), (99, 2));
        assert!(p.expected_downtime < Some(50 * MS), "{p:?}");
    }

    #[test]
    fn what_a_rate_tells_is_not_told_without_one() {
        let mut meter = ProgressMeter::default();
        let known = |at, sent, rate| Reading { dirty_pages_per_second: Some(rate), ..reading(at, sent) };
        meter.begin(&known(0, 0, 100.0));
        let p = meter.read(&known(1000, 0, 100.0));
        assert_eq!((p.pages_per_second, p.eta, p.expected_downtime), (0.0, None, None));
        // Half of what is sent is dirtied: each round is half as long as the one before.
        let p = meter.read(&known(2000, 4096, 2048.0));
        assert_eq!(p.pages_per_second, 4096.0);
        assert!(p.expected_downtime < Some(300 * MS), "{p:?}");
        // All of the round is sent, and no next round is known yet.
        let p = meter.read(&reading(10_000, 40_960));
        assert_eq!(p.share_done, ALMOST_ALL);
    }

    #[test]
    fn a_limit_below_the_floor_does_not_hide_the_floor() {
        let (mut meter, _) = after(1000);
        let mut now = Reading { dirty_pages_per_second: Some(1e6), ..reading(1100, 4505) };
        now.link.downtime_limit = MS;
        assert_eq!(meter.read(&now).expected_downtime, Some(10 * MS));
    }

    #[test]
    fn post_copy_counts_what_was_missing() {
        let (mut meter, _) = after(5000);
        let serving = |at, served| Reading {
            phase: SourcePhase::Serving,
            earlier_pages: 20_480,
            round_pages: 0,
            round_sent: 0,
            missing: 20_480,
            served,
            wire_bytes: 4096 * (20_480 + served),
            dirty_pages_per_second: Some(1e6),
            ..reading(at, 0)
        };
        let p = meter.read(&serving(6000, 4096));
        assert!(near(p.share_done, 0.6) && near(p.eta.unwrap().as_secs_f64(), 4.0), "{p:?}");
        assert_eq!((p.expected_downtime, p.least_downtime, p.round_eta), (None, None, None));
        let end = meter.read(&Reading { phase: SourcePhase::Completed, ..serving(10_000, 20_480) });
        assert_eq!(end.share_done, 1.0);
    }

    #[test]
    fn before_anything_moves_nothing_is_claimed() {
        let mut meter = ProgressMeter::default();
        let mut now = Reading { round: 0, round_pages: 0, phase: SourcePhase::Greeting, ..reading(50, 0) };
        now.link.bytes_per_second = 0.0;
        let p = meter.read(&now);
        assert_eq!((p.eta, p.expected_downtime, p.least_downtime, p.share_done), (None, None, None, 0.0));
    }

    #[test]
    fn no_reading_makes_figures_that_are_not_numbers() {
        let mut meter = ProgressMeter::default();
        for (pages, rate) in [(0, 0.0), (u64::MAX, f64::MAX), (1, f64::MIN_POSITIVE)] {
            let now = Reading { round_pages: pages, dirty_pages_per_second: Some(rate), ..reading(10, pages / 2) };
            let p = meter.read(&now);
            let figures = [p.bytes_per_second, p.pages_per_second, p.share_done];
            assert!(figures.iter().all(|f| f.is_finite()), "{p:?}");
        }
    }
}
