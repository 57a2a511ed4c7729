//! Convergence of a pre-copy: when to switch over, and what to do if the number of dirty pages does
//! not shrink by itself.

use std::time::Duration;

use super::{Link, Round};
use crate::{PAGE_SIZE, page_set::PageSet, spawner::GuestImpact};

/// The step after a round.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Next {
    /// Send another round.
    Round,
    /// Slow the vCPUs down by this many percent, and send another round.
    Throttle(u8),
    /// Pause the guest and send the rest.
    SwitchOver(Wanted),
    /// Pause the guest and hand it over. The other pages follow.
    PostCopy,
    /// Give up, for this reason.
    GiveUp(String),
}

/// The expected cost of a switch-over.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wanted {
    /// The predicted downtime.
    pub downtime: Duration,
}

/// A policy that decides after every round of a pre-copy what to do next.
pub trait Convergence: Send {
    /// Called before the first round. Returns [`Next::Round`] unless it is already certain that no
    /// round can help. The default always returns [`Next::Round`].
    fn begin(&mut self, link: &Link) -> Next {
        let _ = link;
        Next::Round
    }

    /// Returns the next step. `round` is the result of the last round, and `dirty` are the pages to
    /// be sent next.
    fn judge(&mut self, round: &Round, dirty: &PageSet, link: &Link) -> Next;

    /// Returns why the last decision does not keep the downtime limit, with the figures, or `None`
    /// if it keeps the limit or aims to.
    fn stalled(&self) -> Option<&str> {
        None
    }
}

/// Convergence by a model instead of by time-outs.
///
/// After each round the model predicts the downtime of a switch-over *now* from wire bytes, and the
/// outcome of *one more round* from the rate at which the guest dirtied pages during this one. A
/// predicted downtime has two parts: the [floor](Link::floor), which nothing can lower, and the
/// time of the dirty pages.
///
/// 1. If the floor alone is above the limit, neither a round nor a throttle can help. The model at
///    once takes the action that the user chose for this case (see [`Link::stop_on_timeout`]) and
///    says why.
/// 2. Otherwise another round is worth its time as long as it shrinks the remaining pages by a good
///    part.
/// 3. When it does not (a stall), the vCPUs are slowed down by as much as the model calculates to
///    be needed, step by step, within the bounds of [`GuestImpact`]. Above the limit this is always
///    done if the dirty pages are the cause. Within the limit it is done only if the dirty pages
///    take a substantial part of the downtime.
/// 4. After that the model switches over if the downtime is within the limit. If it is not, and
///    several more rounds have brought no new minimum, the model takes the action that the user
///    chose, as in step 1.
///
/// The number of rounds is bounded, whatever the link and the guest do.
#[derive(Clone, Debug)]
pub struct ModelConvergence {
    throttle: u8,
    /// The number of rounds since the last new minimum of the remaining bytes, or since the last
    /// change of the throttle.
    stalls: u32,
    rounds: u32,
    /// The smallest number of remaining bytes after any round.
    best: u64,
    /// The number of bytes of state that were pending after the last round.
    pending: u64,
    /// The number of consecutive rounds after which the floor was above the limit.
    floor_looks: u32,
    /// Whether a switch-over would have been within the limit after an earlier round.
    was_within: bool,
    /// Whether a switch-over after a later round would have been above the limit. The model then
    /// switches over after the next round that is within the limit.
    lost: bool,
    stalled: Option<String>,
}

impl Default for ModelConvergence {
    fn default() -> Self {
        Self {
            throttle: 0,
            stalls: 0,
            rounds: 0,
            best: u64::MAX,
            pending: u64::MAX,
            floor_looks: 0,
            was_within: false,
            lost: false,
            stalled: None,
        }
    }
}

/// A round is worth its time if the pages that remain are at most this part of the pages that it
/// sent.
const GOOD_SHRINK: f64 = 0.5;
/// The number of rounds without a new minimum after which a migration within its limit is switched
/// over.
const MAX_STALLS: u32 = 2;
/// The number of rounds after which a migration within its limit is switched over, whatever the
/// model predicts: a bound on the total time that does not depend on estimates.
const MAX_ROUNDS: u32 = 30;
/// The number of rounds without a new minimum, at the strongest throttle, after which a migration
/// above its limit counts as not converging. It is larger than within the limit, because the
/// consequence is worse than a long downtime.
const HOPELESS_STALLS: u32 = 8;
/// The number of rounds after which a migration above its limit counts as not converging, however
/// the number of dirty pages varies.
const MAX_ROUNDS_ABOVE_LIMIT: u32 = 100;
/// The remaining bytes are a new minimum only if they are smaller than the old one by one part in
/// `LEAST_GAIN`. This bounds the number of minima.
const LEAST_GAIN: u64 = 20;
/// The number of round trips to measure, after at least two rounds, before one that is too long
/// counts as a property of the link. The first ones may have met a busy host.
const FLOOR_LOOKS: u32 = 4;
/// Within the limit the guest is throttled only if the dirty pages take at least this part of the
/// limit: one in `SUBSTANTIAL`.
const SUBSTANTIAL: u32 = 20;

/// A predicted downtime, with its parts.
struct Prediction {
    /// The number of dirty pages.
    left: u64,
    downtime: Duration,
    /// The part of the downtime that is due to dirty pages.
    pages: Duration,
    /// The part of the downtime that nothing can lower.
    floor: Duration,
}

impl Prediction {
    fn of(left: u64, link: &Link) -> Self {
        Self { left, downtime: link.predict(left), pages: link.pages_time(left), floor: link.floor() }
    }

    /// Returns whether the downtime would be within the limit if no page were dirty.
    fn blames_pages(&self, link: &Link) -> bool {
        self.downtime.saturating_sub(self.pages) <= link.downtime_limit
    }

    fn switch_over(&self) -> Next {
        Next::SwitchOver(Wanted { downtime: self.downtime })
    }
}

impl ModelConvergence {
    /// Returns the strongest throttle of the vCPUs in percent: first the one while the predicted
    /// downtime is within the limit, then the one while it is not.
    fn most_throttle(impact: GuestImpact) -> (u8, u8) {
        match impact {
            GuestImpact::Low => (0, 80),
            GuestImpact::Balanced => (80, 99),
            GuestImpact::Fast => (95, 99),
        }
    }

    /// Returns the predicted downtime below which another round cannot gain anything.
    pub(crate) fn good_enough(link: &Link) -> Duration {
        let share = match link.impact {
            GuestImpact::Low => 3,
            _ => 50,
        };
        (link.downtime_limit / share).max(link.floor().saturating_mul(2)).min(link.downtime_limit)
    }

    /// Returns the least time of dirty pages for which the guest is throttled within the limit.
    /// Below this time the throttle would cost the guest more than the downtime does.
    fn substantial(link: &Link) -> Duration {
        (link.downtime_limit / SUBSTANTIAL).max(link.floor().saturating_mul(2))
    }

    /// Counts the round, and the rounds without a new minimum of the remaining bytes.
    fn note(&mut self, now: &Prediction, link: &Link) {
        self.rounds += 1;
        let left = now.left.saturating_mul(PAGE_SIZE as u64).saturating_add(link.pending_bytes);
        let gained = left < self.best - self.best / LEAST_GAIN;
        self.stalls = if gained { 0 } else { self.stalls + 1 };
        self.best = self.best.min(left);
    }

    /// Returns the next stronger throttle. `shrink` is the part of the pages sent that the round
    /// has left, measured under the present throttle.
    fn stronger(&mut self, shrink: f64, most: u8) -> Next {
        // the share of time that the vCPUs may keep so that the next round shrinks well; half of it
        // as a margin
        let keep = (1.0 - f64::from(self.throttle) / 100.0) * GOOD_SHRINK / 2.0 / shrink;
        let wanted = ((1.0 - keep) * 100.0).max(f64::from(self.throttle) + 5.0).min(f64::from(most));
        self.throttle = wanted as u8;
        self.stalls = 0;
        Next::Throttle(self.throttle)
    }

    /// Takes the action that the user chose for the case that the limit cannot be kept. `why` is
    /// the reason.
    fn give_in(&mut self, now: &Prediction, link: &Link, why: String) -> Next {
        self.stalled = Some(why.clone());
        if link.post_copy_on_timeout && link.can_post_copy {
            Next::PostCopy
        } else if link.stop_on_timeout {
            now.switch_over()
        } else {
            Next::GiveUp(why)
        }
    }

    /// Decides when the floor is above the limit.
    fn floor_above(&mut self, shrink: f64, now: &Prediction, link: &Link) -> Next {
        self.floor_looks += 1;
        let seen = self.floor_looks >= FLOOR_LOOKS || self.floor_looks > 1 && link.round_trips >= FLOOR_LOOKS;
        let sure = above_without_link(link) || seen;
        if !sure {
            return Next::Round;
        }
        let stops = link.stop_on_timeout && !(link.post_copy_on_timeout && link.can_post_copy);
        let helps = shrink <= GOOD_SHRINK && self.stalls < MAX_STALLS && self.rounds < MAX_ROUNDS;
        if stops && helps && now.pages > now.floor / 2 {
            // the limit cannot be kept, but more rounds still make the downtime as short as the
            // link allows
            return Next::Round;
        }
        self.give_in(now, link, floor_text(link))
    }

    /// Decides when a switch-over now would be within the limit.
    fn within(&mut self, shrink: f64, now: &Prediction, link: &Link) -> Next {
        self.was_within = true;
        if self.lost || self.stalls >= MAX_STALLS || self.rounds >= MAX_ROUNDS {
            return now.switch_over();
        }
        if shrink <= GOOD_SHRINK {
            return Next::Round;
        }
        let (gentle, _) = Self::most_throttle(link.impact);
        if now.pages >= Self::substantial(link) && self.throttle < gentle {
            return self.stronger(shrink, gentle);
        }
        now.switch_over()
    }

    /// Decides when a switch-over now would be above the limit because of dirty pages or pending
    /// state.
    fn above(&mut self, shrink: f64, now: &Prediction, link: &Link) -> Next {
        if self.rounds < MAX_ROUNDS_ABOVE_LIMIT {
            if shrink <= GOOD_SHRINK && now.left > 0 {
                return Next::Round;
            }
            let (_, most) = Self::most_throttle(link.impact);
            if now.blames_pages(link) && self.throttle < most {
                return self.stronger(shrink, most);
            }
            if self.stalls < HOPELESS_STALLS {
                return Next::Round;
            }
        }
        let pending = match link.pending_bytes {
            0 => String::new(),
            bytes => format!(", {bytes} bytes of device state are pending"),
        };
        let why = format!(
            "not converging: {} pages are dirty after {} rounds, of which the last {} brought no new minimum{pending}, {}",
            now.left,
            self.rounds,
            self.stalls,
            self.figures(now, link)
        );
        self.give_in(now, link, why)
    }

    fn figures(&self, now: &Prediction, link: &Link) -> String {
        format!(
            "a switch-over would take {} of the {} allowed, with the guest throttled by {} %",
            ms(now.downtime),
            ms(link.downtime_limit),
            self.throttle
        )
    }
}

impl Convergence for ModelConvergence {
    fn begin(&mut self, link: &Link) -> Next {
        let goes_on = link.stop_on_timeout || link.post_copy_on_timeout && link.can_post_copy;
        if goes_on || !above_without_link(link) {
            return Next::Round;
        }
        let why = floor_text(link);
        self.stalled = Some(why.clone());
        Next::GiveUp(why)
    }

    fn judge(&mut self, round: &Round, dirty: &PageSet, link: &Link) -> Next {
        let now = Prediction::of(dirty.len(), link);
        self.note(&now, link);
        if link.post_copy_wanted {
            return Next::PostCopy;
        }
        let is_within = now.downtime <= link.downtime_limit;
        if now.downtime <= Self::good_enough(link) || link.timed_out && is_within {
            return now.switch_over();
        }
        // the part that one more round would leave: the pages that are dirtied while `left` pages
        // are sent
        let shrink = now.left as f64 / round.sent.max(1) as f64;
        if link.timed_out {
            let why = format!(
                "not converged in time: {} pages are dirty after {} rounds, {}{}",
                now.left,
                self.rounds,
                self.figures(&now, link),
                if now.floor > link.downtime_limit { format!("; {}", floor_text(link)) } else { String::new() }
            );
            return self.give_in(&now, link, why);
        }
        let pending_falls = link.pending_bytes < self.pending.saturating_sub(self.pending / LEAST_GAIN);
        self.pending = link.pending_bytes;
        if now.floor > link.downtime_limit {
            return self.floor_above(shrink, &now, link);
        }
        // an earlier floor above the limit was due to a short drop of the bandwidth, or to another
        // limit
        self.floor_looks = 0;
        if pending_falls && link.pending_bytes > 0 && self.rounds < MAX_ROUNDS {
            // a round moves pieces of state, however the dirty pages develop
            Next::Round
        } else if is_within {
            self.within(shrink, &now, link)
        } else {
            self.lost = self.was_within;
            self.above(shrink, &now, link)
        }
    }

    fn stalled(&self) -> Option<&str> {
        self.stalled.as_deref()
    }
}

/// Returns whether the limit is below the time that the VMMs at both ends say they need on any
/// link.
fn above_without_link(link: &Link) -> bool {
    link.fixed_downtime.saturating_sub(link.round_trip.saturating_mul(2)) > link.downtime_limit
}

/// Returns the text that says why the limit cannot be kept if the floor is above it.
fn floor_text(link: &Link) -> String {
    let round_trips = link.round_trip.saturating_mul(2);
    let state = match link.bytes_per_second > 0.0 {
        true => format!("{} for {} bytes of state", ms(link.state_time()), link.state_bytes),
        false => format!("and as long as {} bytes of state take", link.state_bytes),
    };
    format!(
        "a downtime of {} cannot be kept: a switch-over takes {} at the least, whatever the guest writes ({} to pause, save \
         and load, {} for two round trips, {state}); allow a longer one, or a stop or post-copy in this case",
        ms(link.downtime_limit),
        ms(link.floor()),
        ms(link.fixed_downtime.saturating_sub(round_trips)),
        ms(round_trips),
    )
}

/// Returns `time` in milliseconds, with the significant decimals.
fn ms(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1e3;
    match ms {
        ms if ms >= 100.0 => format!("{ms:.0} ms"),
        ms => {
            let text = if ms >= 1.0 { format!("{ms:.2}") } else { format!("{ms:.3}") };
            format!("{} ms", text.trim_end_matches('0').trim_end_matches('.'))
        }
    }
}

#[cfg(test)]
mod tests;
