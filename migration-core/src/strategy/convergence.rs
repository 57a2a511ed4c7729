//! When to stop a pre-copy, and what to do if it does not come to an end by itself.

use std::time::Duration;

use super::{Link, Round};
use crate::{page_set::PageSet, spawner::GuestImpact};

/// What to do after a round.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Next {
    /// Another round.
    Round,
    /// Another round, with the vCPUs slowed down by this many percent.
    Throttle(u8),
    /// Pause the guest and send the rest.
    SwitchOver(Wanted),
    /// Pause the guest and hand it over; the rest follows.
    PostCopy,
    /// Give up, for this reason.
    GiveUp(String),
}

/// What a switch-over is expected to cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wanted {
    /// The predicted downtime.
    pub downtime: Duration,
}

/// Decides, after every round of a pre-copy, how it goes on.
pub trait Convergence: Send {
    /// `round` is what the last round did, `dirty` what is to be sent next.
    fn judge(&mut self, round: &Round, dirty: &PageSet, link: &Link) -> Next;
}

/// Convergence by a model instead of by time-outs.
///
/// After each round the downtime of a switch-over *now* is predicted from wire bytes, and the outcome of *one more
/// round* from the rate at which the guest dirtied pages during this one. Another round is worth its time as long as
/// it shrinks what is left by a good part. When it does not (a stall), the vCPUs are slowed down by as much as the
/// model says is needed, step by step, within the bounds of [`GuestImpact`]; if that does not help and the prediction
/// is within the limit, the guest is switched over; if it is not, the rounds go on until the user's time-out.
#[derive(Clone, Debug)]
pub struct ModelConvergence {
    throttle: u8,
    stalls: u32,
    rounds: u32,
    best: u64,
}

impl Default for ModelConvergence {
    fn default() -> Self {
        Self { throttle: 0, stalls: 0, rounds: 0, best: u64::MAX }
    }
}

/// A round that leaves less than this part of what it sent was worth its time.
const GOOD_SHRINK: f64 = 0.5;
/// Rounds without a new minimum after which a migration within its limit is switched over.
const MAX_STALLS: u32 = 2;
/// Rounds after which a migration within its limit is switched over whatever the model hopes for: a bound on the
/// total time that does not depend on estimates.
const MAX_ROUNDS: u32 = 30;

impl ModelConvergence {
    /// The most that vCPUs may be slowed down, in percent: while the prediction is within the downtime limit, and
    /// while it is not.
    fn most_throttle(impact: GuestImpact) -> (u8, u8) {
        match impact {
            GuestImpact::Low => (0, 80),
            GuestImpact::Balanced => (80, 99),
            GuestImpact::Fast => (95, 99),
        }
    }

    /// Below this prediction, nothing is left to gain by another round.
    fn good_enough(link: &Link) -> Duration {
        let share = match link.impact {
            GuestImpact::Low => 3,
            _ => 50,
        };
        (link.downtime_limit / share).max(link.fixed_downtime * 2).min(link.downtime_limit)
    }
}

impl Convergence for ModelConvergence {
    fn judge(&mut self, round: &Round, dirty: &PageSet, link: &Link) -> Next {
        let left = dirty.len();
        let downtime = link.predict(left);
        let switch_over = Next::SwitchOver(Wanted { downtime });
        self.rounds += 1;
        if link.post_copy_wanted {
            return Next::PostCopy;
        }
        if link.timed_out {
            return if link.stop_on_timeout {
                switch_over
            } else {
                let limit = link.downtime_limit;
                Next::GiveUp(format!(
                    "not converged in time: {left} pages are dirty after {} rounds, a switch-over would take {} ms of the \
                     {} ms allowed, with the guest throttled by {} %",
                    self.rounds,
                    downtime.as_millis(),
                    limit.as_millis(),
                    self.throttle
                ))
            };
        }
        if downtime <= Self::good_enough(link) {
            return switch_over;
        }
        let within = downtime <= link.downtime_limit;
        // what one more round would leave: the pages dirtied while `left` pages are sent
        let shrink = left as f64 / (round.sent.max(1)) as f64;
        self.stalls = if left < self.best { 0 } else { self.stalls + 1 };
        self.best = self.best.min(left);
        if within && (self.stalls >= MAX_STALLS || self.rounds >= MAX_ROUNDS) {
            return switch_over;
        }
        if shrink <= GOOD_SHRINK {
            return Next::Round;
        }
        let (gentle, most) = Self::most_throttle(link.impact);
        let most = if within { gentle } else { most };
        if self.throttle < most {
            // the share of time the vCPUs may keep so that the next round shrinks well, half of it to be sure;
            // `shrink` was measured under the present throttle
            let keep = (1.0 - f64::from(self.throttle) / 100.0) * GOOD_SHRINK / 2.0 / shrink;
            let wanted = ((1.0 - keep) * 100.0).max(f64::from(self.throttle) + 5.0).min(f64::from(most));
            self.throttle = wanted as u8;
            return Next::Throttle(self.throttle);
        }
        if within { switch_over } else { Next::Round }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(limit_ms: u64) -> Link {
        Link {
            can_post_copy: false,
            post_copy_wanted: false,
            bytes_per_second: 1e9,
            bytes_per_page: 4096.0,
            fixed_downtime: Duration::from_millis(2),
            state_bytes: 10_000,
            downtime_limit: Duration::from_millis(limit_ms),
            elapsed: Duration::from_secs(1),
            timed_out: false,
            stop_on_timeout: false,
            impact: GuestImpact::Balanced,
        }
    }

    fn dirty(pages: u64) -> PageSet {
        let mut set = PageSet::empty(1 << 20);
        set.insert_range(crate::PageRange::new(0, pages));
        set
    }

    fn round(sent: u64) -> Round {
        Round { generation: 1, asked: sent, sent, wire_bytes: sent * 4096, time: Duration::from_millis(100) }
    }

    #[test]
    fn a_quiet_guest_is_switched_over_at_once() {
        let next = ModelConvergence::default().judge(&round(100_000), &dirty(10), &link(300));
        assert!(
            matches!(next, Next::SwitchOver(Wanted { downtime }) if downtime < Duration::from_millis(3)),
            "{next:?}"
        );
    }

    #[test]
    fn a_stall_throttles_within_bounds_then_ends() {
        let mut model = ModelConvergence::default();
        let mut throttle = 0;
        for _ in 0..100 {
            match model.judge(&round(100_000), &dirty(100_000), &link(50)) {
                Next::Throttle(percent) => {
                    assert!(percent > throttle && percent <= 99);
                    throttle = percent;
                }
                Next::Round => assert_eq!(throttle, 99),
                other => panic!("{other:?}"),
            }
        }
        let mut late = link(50);
        late.timed_out = true;
        assert!(matches!(model.judge(&round(1), &dirty(100_000), &late), Next::GiveUp(_)));
        late.stop_on_timeout = true;
        assert!(matches!(model.judge(&round(1), &dirty(100_000), &late), Next::SwitchOver(_)));
    }

    #[test]
    fn a_stall_within_the_limit_ends_without_a_time_out() {
        for impact in [GuestImpact::Low, GuestImpact::Balanced, GuestImpact::Fast] {
            let mut model = ModelConvergence::default();
            let link = Link { impact, ..link(1000) };
            let ended =
                (0..20).any(|_| matches!(model.judge(&round(100_000), &dirty(100_000), &link), Next::SwitchOver(_)));
            assert!(ended, "{impact:?}");
        }
    }
}
