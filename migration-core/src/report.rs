//! What a migration tells: events and progress while it goes on, a report at its end.

use std::{collections::VecDeque, time::Duration};

use crate::{
    protocol::{DestinationPhase, SourcePhase},
    wire::FaultSummary,
};

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The destination runs the VM, and has all of it.
    Completed,
    /// The VM runs on at the source.
    Failed,
    /// Likewise, because it was cancelled.
    Cancelled,
    /// *run* was sent and not answered. The source goes on to reconnect; it will not run the VM.
    InDoubt,
    /// The destination died after the hand-over. The VM runs on at the source, as it was at its last checkpoint.
    Restarted,
    /// The destination died after the hand-over, and the VM could not be restarted: it is gone.
    Lost,
    /// The VM was handed over, and its guest ended there by itself before it had all its pages: there is no VM any more.
    Ended,
}

impl Outcome {
    /// The word for it in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Completed => "completed",
            Outcome::Failed => "failed",
            Outcome::Cancelled => "cancelled",
            Outcome::InDoubt => "in-doubt",
            Outcome::Restarted => "restarted",
            Outcome::Lost => "lost",
            Outcome::Ended => "ended",
        }
    }
}

/// Counts of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Pages of the VM.
    pub total: u64,
    /// Sent as zeros, repeats counted.
    pub zero: u64,
    /// Never sent, because they were never touched.
    pub hole: u64,
    /// Never sent, because the guest had reported them free each time that they were due (see
    /// [`free_pages`](crate::vm::SourceVm::free_pages)).
    pub free: u64,
    /// Sent with their data, repeats counted.
    pub plain: u64,
    /// Pages sent at least once.
    pub distinct: u64,
    /// Of a VM that is handed over before all of it was sent: sent in the pause, for its first steps (see
    /// [`entry_pages`](crate::vm::SourceVm::entry_pages)).
    pub entry: u64,
    /// After the hand-over, sent unasked.
    pub pushed: u64,
    /// Of these, chosen because they lie around a page that the guest had faulted on.
    pub prepaged: u64,
    /// After the hand-over, sent because the guest waited for them or for one of their block.
    pub demanded: u64,
}

/// Checkpoints that the destination has sent back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointCounts {
    /// Whether the VM is protected: the state at the hand-over is the first checkpoint.
    pub protected: bool,
    /// Checkpoints committed since the hand-over.
    pub count: u64,
    /// Bytes of pages and state in them.
    pub bytes: u64,
}

/// What the guest missed after a hand-over that left pages behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts {
    /// Faults for which a page had to be fetched; for the others it was on its way already.
    pub network: u64,
    /// What the destination counted and measured.
    pub served: FaultSummary,
}

/// One round of a report.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RoundReport {
    /// Pages asked for.
    pub pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// How long it took.
    pub time: Duration,
    /// How far the guest was throttled in it.
    pub throttle_percent: u8,
}

/// How many rounds at the beginning of a migration, and how many at its end, are kept one by one.
const KEPT_ROUNDS: usize = 32;

/// The rounds of an attempt: the first 32 and the last 32 one by one, those between them as a sum. So a report stays small
/// however many rounds there were.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rounds {
    first: Vec<RoundReport>,
    last: VecDeque<RoundReport>,
    left_out: LeftOut,
}

/// Rounds that are not kept one by one, put together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LeftOut {
    /// How many.
    pub count: u64,
    /// Pages that they asked for, repeats counted.
    pub pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// How long they took together.
    pub time: Duration,
    /// The strongest throttle in any of them.
    pub throttle_percent: u8,
}

impl Rounds {
    /// Returns the number of all rounds, those that are left out included.
    pub fn len(&self) -> usize {
        let left_out = usize::try_from(self.left_out.count).unwrap_or(usize::MAX);
        left_out.saturating_add(self.first.len() + self.last.len())
    }

    /// Whether there was no round.
    pub fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    /// Returns the rounds that are kept one by one, in order. Those that are [left out](Self::left_out) lie between the first
    /// 32 and the others.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &RoundReport> {
        self.first.iter().chain(&self.last)
    }

    /// Returns the last round.
    pub fn last(&self) -> Option<&RoundReport> {
        self.last.back().or(self.first.last())
    }

    /// Returns the sum of the rounds that are not kept one by one.
    pub fn left_out(&self) -> LeftOut {
        self.left_out
    }

    pub(crate) fn last_mut(&mut self) -> Option<&mut RoundReport> {
        self.last.back_mut().or(self.first.last_mut())
    }

    pub(crate) fn push(&mut self, round: RoundReport) {
        if self.first.len() < KEPT_ROUNDS {
            return self.first.push(round);
        }
        self.last.push_back(round);
        if self.last.len() > KEPT_ROUNDS
            && let Some(oldest) = self.last.pop_front()
        {
            let sum = &mut self.left_out;
            sum.count += 1;
            sum.pages = sum.pages.saturating_add(oldest.pages);
            sum.wire_bytes = sum.wire_bytes.saturating_add(oldest.wire_bytes);
            sum.time = sum.time.saturating_add(oldest.time);
            sum.throttle_percent = sum.throttle_percent.max(oldest.throttle_percent);
        }
    }

    /// Takes the last round back.
    pub(crate) fn pop(&mut self) -> Option<RoundReport> {
        self.last.pop_back().or_else(|| self.first.pop())
    }
}

/// Everything that is known of an attempt.
#[derive(Clone, Debug)]
pub struct Report {
    /// Name of the strategy.
    pub strategy: &'static str,
    /// How it ended.
    pub outcome: Outcome,
    /// Why, if it did not complete.
    pub reason: Option<String>,
    /// Its epoch.
    pub epoch: u32,
    /// From the start to the end.
    pub total: Duration,
    /// Of it, until the destination was prepared.
    pub setup: Duration,
    /// From the first kick of a vCPU until *running* arrived; `None` if the guest was never paused.
    pub downtime: Option<Duration>,
    /// What the strategy expected it to be.
    pub predicted_downtime: Option<Duration>,
    /// Why the downtime limit was not kept, or was given up, with the figures; `None` if it was aimed at to the end.
    pub stalled: Option<String>,
    /// The longest downtime that was acceptable, as it was set last.
    pub downtime_limit: Duration,
    /// Whether the user has [forced](crate::engine::Controller::switch_over) the switch-over.
    pub forced_switch_over: bool,
    /// Rounds, the last one with the guest paused included.
    pub rounds: Rounds,
    /// Bulk lanes.
    pub streams: u16,
    /// Bytes on the wire, both directions, all lanes.
    pub wire_bytes: u64,
    /// Of it, bytes while the guest was paused.
    pub downtime_bytes: u64,
    /// Bytes of page data that moved; none if RAM is shared.
    pub page_bytes: u64,
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// Bytes of state.
    pub state_bytes: u64,
    /// Pages by kind.
    pub pages: PageCounts,
    /// Demand lanes; 0 if the destination cannot serve missing pages.
    pub demand_lanes: u16,
    /// Faults after the hand-over.
    pub faults: FaultCounts,
    /// Links that were lost after the hand-over and found again.
    pub recoveries: u64,
    /// Checkpoints.
    pub checkpoints: CheckpointCounts,
    /// Pages the guest dirtied a second in the last live round.
    pub dirty_pages_per_second: Option<f64>,
    /// The strongest throttle that was used.
    pub throttle_percent: u8,
}

/// How far an attempt is.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// Where the protocol stands.
    pub phase: SourcePhase,
    /// The round under way, from 1; 0 before the first.
    pub round: u32,
    /// Pages that the round has to send, and has sent.
    pub round_pages: u64,
    /// Of them, sent.
    pub round_sent: u64,
    /// Bytes on the wire so far.
    pub wire_bytes: u64,
    /// Bytes a second over the last second, or since pages began to move if that is less.
    pub bytes_per_second: f64,
    /// Pages sent a second, likewise.
    pub pages_per_second: f64,
    /// Pages that the guest dirties a second.
    pub dirty_pages_per_second: Option<f64>,
    /// The downtime to expect when the rounds have come to their end; `None` as long as it is not known how fast the guest
    /// writes, and after the hand-over.
    pub expected_downtime: Option<Duration>,
    /// The downtime that a switch-over takes at the least, whatever the guest writes; `None` after the hand-over.
    pub least_downtime: Option<Duration>,
    /// The throttle in force.
    pub throttle_percent: u8,
    /// Time since the start.
    pub elapsed: Duration,
    /// Until the end of the migration; `None` if nothing moves, or no end is in sight.
    pub eta: Option<Duration>,
    /// Until the end of this round.
    pub round_eta: Option<Duration>,
    /// The share of the whole that is done, from 0 to 1. What later rounds will have to send is estimated; it never falls.
    pub share_done: f64,
    /// The longest downtime that is acceptable, as it was set last.
    pub downtime_limit: Duration,
}

/// Something happened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// The source's phase changed.
    Source(SourcePhase),
    /// The destination's phase changed.
    Destination(DestinationPhase),
    /// How far the source is; several times a second while pages move.
    Progress(Progress),
    /// A round ended.
    RoundEnded(RoundReport),
    /// A connection was refused or lost; the listener goes on.
    BadPeer {
        /// Its address.
        peer: String,
        /// What was wrong.
        why: String,
    },
    /// The source is in doubt and tries to reconnect.
    Reconnecting {
        /// The attempt, from 1.
        attempt: u32,
        /// Why the last one failed.
        why: String,
    },
    /// The destination has committed its first checkpoint, or this one with what came before.
    Checkpoint(CheckpointCounts),
    /// The source is still in doubt after its grace period. It goes on to reconnect.
    InDoubt(Box<Report>),
    /// The VM that was being received is gone.
    Discarded(String),
    /// Something failed that does not change the course, such as lifting a throttle.
    Warning(String),
}

/// Receives events, on the threads that do the work.
///
/// An event comes after the change that it reports, and no lock of the engine is held meanwhile: an observer may call every
/// method of a [`ReceiverHandle`](crate::engine::ReceiverHandle) or a [`Controller`](crate::engine::Controller) that does
/// not wait.
///
/// An observer must not block and must not panic. While it blocks, the thread that called it does nothing else: a source sends
/// no page, a destination reads no frame, and a guest that is paused stays so. A VMM that writes events to a file or a pipe
/// therefore puts them into a queue with a bound, which another thread empties. If an observer panics, the panic ends there,
/// that event is lost, and the migration goes on; the next event comes as usual. (Where a panic aborts the process, it does
/// that here too.)
///
/// Strings in events may hold text that the other end sent, as it was sent. Show them to people through
/// [`Escaped`](crate::text::Escaped).
pub trait Observer: Send + Sync {
    /// Reports that something happened.
    fn event(&self, event: &Event);
}

/// An observer that does not look.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoObserver;

impl Observer for NoObserver {
    fn event(&self, _event: &Event) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(pages: u64) -> RoundReport {
        RoundReport { pages, wire_bytes: 10 * pages, time: Duration::from_millis(pages), throttle_percent: 3 }
    }

    #[test]
    fn a_report_keeps_the_first_and_the_last_rounds_and_the_sum_of_the_others() {
        let mut rounds = Rounds::default();
        assert!(rounds.is_empty() && rounds.last().is_none() && rounds.pop().is_none());
        (0..64).for_each(|n| rounds.push(round(n)));
        assert_eq!((rounds.len(), rounds.left_out()), (64, LeftOut::default()));
        (64..100_000).for_each(|n| rounds.push(round(n)));
        let kept: Vec<u64> = rounds.iter().map(|round| round.pages).collect();
        let expected: Vec<u64> = (0..32).chain(99_968..100_000).collect();
        assert_eq!((rounds.len(), kept), (100_000, expected));
        let (sum, pages) = (rounds.left_out(), (32..99_968).sum());
        assert_eq!((sum.count, sum.pages, sum.wire_bytes), (99_936, pages, 10 * pages));
        assert_eq!((sum.time, sum.throttle_percent), (Duration::from_millis(pages), 3));
    }

    #[test]
    fn the_last_round_can_be_changed_and_taken_back() {
        let mut rounds = Rounds::default();
        for n in 0..40 {
            rounds.push(round(n));
            rounds.last_mut().unwrap().pages += 1;
            assert_eq!(rounds.last().unwrap().pages, n + 1);
        }
        for n in (0..40).rev() {
            assert_eq!(rounds.pop().unwrap().pages, n + 1);
            assert_eq!(rounds.len() as u64, n);
        }
    }
}
