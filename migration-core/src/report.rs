//! What a migration reports: events and progress while it runs, and a report at its end.

use std::{collections::VecDeque, time::Duration};

use crate::{
    protocol::{DestinationPhase, SourcePhase},
    wire::FaultSummary,
};

/// The outcome of a migration attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The destination runs the VM and has all its pages.
    Completed,
    /// The attempt failed. The VM runs on at the source.
    Failed,
    /// The attempt was cancelled. The VM runs on at the source.
    Cancelled,
    /// The source sent *run* and got no answer. It tries to reconnect, and does not run the VM.
    InDoubt,
    /// The destination died after the hand-over. The VM was restarted at the source from its last
    /// checkpoint.
    Restarted,
    /// The destination died after the hand-over, and the VM could not be restarted. The VM is lost.
    Lost,
    /// The VM was handed over, and its guest ended by itself before all pages had arrived. The VM
    /// does not exist any more.
    Ended,
}

impl Outcome {
    /// Returns the word for this outcome in reports.
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

/// The number of pages of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// The pages of the VM.
    pub total: u64,
    /// The pages sent as zeros. A page that is sent twice counts twice.
    pub zero: u64,
    /// The pages never sent because the guest never touched them.
    pub hole: u64,
    /// The pages never sent because the guest reported them free each time that they were due (see
    /// [`free_pages`](crate::vm::SourceVm::free_pages)).
    pub free: u64,
    /// The pages sent with their data. A page that is sent twice counts twice.
    pub plain: u64,
    /// The pages sent at least once, over the direct link or by way of a page store.
    pub distinct: u64,
    /// The pages sent at least once over the direct link.
    pub direct: u64,
    /// The pages that this migration put into page stores and that were there in their last state
    /// when the source was free.
    pub stored: u64,
    /// The pages that were in page stores when the migration began, and stayed there.
    pub cold: u64,
    /// The pages sent in the pause for the guest's first steps at the destination, if the VM is
    /// handed over before all pages were sent (see
    /// [`entry_pages`](crate::vm::SourceVm::entry_pages)).
    pub entry: u64,
    /// The pages sent after the hand-over without a demand.
    pub pushed: u64,
    /// The pushed pages that were chosen because they lie near a page on which the guest faulted.
    pub prepaged: u64,
    /// The pages sent after the hand-over because the guest waited for them or for another page of
    /// their block.
    pub demanded: u64,
}

/// The checkpoints that the destination sent back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointCounts {
    /// Whether the VM is protected. The state at the hand-over is the first checkpoint.
    pub protected: bool,
    /// The checkpoints committed since the hand-over.
    pub count: u64,
    /// The bytes of pages and state in these checkpoints.
    pub bytes: u64,
}

/// What a migration put into a page store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreReport {
    /// The name of the store.
    pub name: String,
    /// The pages that the store acknowledged. A page that was put twice counts twice.
    pub pages: u64,
    /// The bytes of these pages, without what sealing adds.
    pub bytes: u64,
    /// The reason why no page went there any more.
    pub failed: Option<String>,
}

/// The faults of the guest after a hand-over with missing pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts {
    /// The faults for which a page was requested from the source. For other faults it was on its
    /// way already.
    pub network: u64,
    /// The counts and times that the destination measured.
    pub served: FaultSummary,
}

/// The report of one round.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RoundReport {
    /// The pages that the round had to send.
    pub pages: u64,
    /// The bytes on the wire.
    pub wire_bytes: u64,
    /// The duration of the round.
    pub time: Duration,
    /// The throttle of the guest in this round, in percent of its CPU time.
    pub throttle_percent: u8,
}

/// The number of rounds at the beginning of an attempt, and of rounds at its end, that are kept one
/// by one.
const KEPT_ROUNDS: usize = 32;

/// The rounds of an attempt. The first 32 and the last 32 are kept one by one, the rounds between
/// them as a sum. So a report stays small however many rounds there are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rounds {
    first: Vec<RoundReport>,
    last: VecDeque<RoundReport>,
    left_out: LeftOut,
}

/// The sum of the rounds that are not kept one by one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LeftOut {
    /// The number of these rounds.
    pub count: u64,
    /// The pages that these rounds had to send. A page counts once for each round.
    pub pages: u64,
    /// The bytes on the wire.
    pub wire_bytes: u64,
    /// The total duration.
    pub time: Duration,
    /// The strongest throttle in any of these rounds, in percent of CPU time.
    pub throttle_percent: u8,
}

impl Rounds {
    /// Returns the number of all rounds, including those that are not kept one by one.
    pub fn len(&self) -> usize {
        let left_out = usize::try_from(self.left_out.count).unwrap_or(usize::MAX);
        left_out.saturating_add(self.first.len() + self.last.len())
    }

    /// Returns whether there was no round.
    pub fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    /// Returns the rounds that are kept one by one, in order. The rounds that are [summed
    /// up](Self::left_out) come after the first 32.
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

    /// Removes and returns the last round.
    pub(crate) fn pop(&mut self) -> Option<RoundReport> {
        self.last.pop_back().or_else(|| self.first.pop())
    }
}

/// How the copy of a protected VM is that is kept ready in page stores.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StagingReport {
    /// The number of increments: of puts that have stored pages, and at which no store has failed.
    pub increments: u64,
    /// The pages of which the stores have the newest content, as far as was looked.
    pub staged_pages: u64,
    /// The pages that the stores lacked at the last look. Pages of zeros and free pages are not
    /// among them.
    pub dirty_pages: u64,
    /// The time since the last increment ended, or `None` before the first.
    pub age: Option<Duration>,
    /// The failure of a store. The copy gets older until the store answers again.
    pub degraded: Option<Degraded>,
    /// The number of evictions that have failed before *run*.
    pub failed_evictions: u64,
    /// The destination of the last of them, and why it has failed.
    pub last_failure: Option<String>,
}

/// A store fails that keeps the copy of a protected VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Degraded {
    /// The time since the first failure after which no request has succeeded.
    pub since: Duration,
    /// The last failure.
    pub why: String,
}

/// The report of a migration attempt.
#[derive(Clone, Debug)]
pub struct Report {
    /// The name of the strategy.
    pub strategy: &'static str,
    /// The outcome.
    pub outcome: Outcome,
    /// The reason why the attempt did not complete.
    pub reason: Option<String>,
    /// The epoch of the attempt.
    pub epoch: u32,
    /// The time from the start to the end.
    pub total: Duration,
    /// The time from the start until the destination was prepared.
    pub setup: Duration,
    /// The time from the first kick of a vCPU until *running* arrived, or `None` if the guest was
    /// never paused.
    pub downtime: Option<Duration>,
    /// The downtime that the strategy predicted.
    pub predicted_downtime: Option<Duration>,
    /// The reason, with figures, why the downtime limit was missed or given up. `None` if the
    /// strategy aimed at the limit to the end.
    pub stalled: Option<String>,
    /// The longest acceptable downtime, as it was last set.
    pub downtime_limit: Duration,
    /// Whether the user [forced](crate::engine::Controller::switch_over) the switch-over.
    pub forced_switch_over: bool,
    /// The rounds, including the last one, in which the guest is paused.
    pub rounds: Rounds,
    /// The number of bulk lanes.
    pub streams: u16,
    /// The bytes on the wire in both directions of all lanes.
    pub wire_bytes: u64,
    /// The bytes on the wire while the guest was paused.
    pub downtime_bytes: u64,
    /// The bytes of page data that were sent; 0 if RAM is shared.
    pub page_bytes: u64,
    /// The bytes of guest RAM.
    pub ram_bytes: u64,
    /// The bytes of VM state.
    pub state_bytes: u64,
    /// The pages of each kind.
    pub pages: PageCounts,
    /// What went into each page store.
    pub stores: Vec<StoreReport>,
    /// The number of demand lanes; 0 if the destination cannot run with missing pages.
    pub demand_lanes: u16,
    /// The faults after the hand-over.
    pub faults: FaultCounts,
    /// The number of links that were lost after the hand-over and reconnected.
    pub recoveries: u64,
    /// The checkpoints of the VM.
    pub checkpoints: CheckpointCounts,
    /// The rate at which the guest dirtied pages in the last live round, in pages per second.
    pub dirty_pages_per_second: Option<f64>,
    /// The strongest throttle that was used, in percent of CPU time.
    pub throttle_percent: u8,
}

/// The progress of a migration attempt.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// The phase of the protocol at the source.
    pub phase: SourcePhase,
    /// The number of the current round, from 1; 0 before the first.
    pub round: u32,
    /// The pages that the current round has to send, including those that it has sent.
    pub round_pages: u64,
    /// The pages that the current round has sent.
    pub round_sent: u64,
    /// The bytes on the wire so far.
    pub wire_bytes: u64,
    /// The transfer rate over the last second in bytes per second. It covers the time since the
    /// first page was sent if that is less than a second ago.
    pub bytes_per_second: f64,
    /// The rate of pages sent in pages per second, over the same time.
    pub pages_per_second: f64,
    /// The rate at which the guest dirties pages, in pages per second.
    pub dirty_pages_per_second: Option<f64>,
    /// The downtime that is predicted for a switch-over after the last round. `None` until it is
    /// known how fast the guest writes, and after the hand-over.
    pub expected_downtime: Option<Duration>,
    /// The shortest possible downtime of a switch-over, whatever the guest writes. `None` after the
    /// hand-over.
    pub least_downtime: Option<Duration>,
    /// The current throttle, in percent of CPU time.
    pub throttle_percent: u8,
    /// The time since the start.
    pub elapsed: Duration,
    /// The predicted time until the end of the migration. `None` if no pages move or no end can be
    /// predicted.
    pub eta: Option<Duration>,
    /// The predicted time until the end of the current round.
    pub round_eta: Option<Duration>,
    /// The share of the migration that is done, from 0 to 1. The pages of later rounds are
    /// estimated. It never falls.
    pub share_done: f64,
    /// The longest acceptable downtime, as it was last set.
    pub downtime_limit: Duration,
}

/// An event of a migration, for an [`Observer`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// The source's phase changed.
    Source(SourcePhase),
    /// The destination's phase changed.
    Destination(DestinationPhase),
    /// The progress of the source. Reported several times per second while pages move.
    Progress(Progress),
    /// A round ended.
    RoundEnded(RoundReport),
    /// A connection was refused or lost. The listener continues.
    BadPeer {
        /// The address of the peer.
        peer: String,
        /// The reason.
        why: String,
    },
    /// The source is in doubt and tries to reconnect.
    Reconnecting {
        /// The number of the attempt, from 1.
        attempt: u32,
        /// The reason why the last attempt failed.
        why: String,
    },
    /// The destination committed a checkpoint. The counts include all checkpoints so far.
    Checkpoint(CheckpointCounts),
    /// The grace period has passed and the source is still in doubt. It continues to reconnect.
    InDoubt(Box<Report>),
    /// The destination discarded the VM that it was receiving, for this reason.
    Discarded(String),
    /// The copy of a protected VM has changed, or a store has failed or answers again.
    Staging(StagingReport),
    /// An eviction has failed before *run*. The VM runs on here, and is protected as before.
    EvictionFailed {
        /// The name of the destination.
        to: String,
        /// The reason.
        why: String,
    },
    /// Something failed that does not change the course of the migration, such as the end of a
    /// throttle.
    Warning(String),
}

/// Receives the events of a migration, on the threads that do the work.
///
/// An event comes after the change that it reports. The engine holds no lock during the call, so an
/// observer may call every method of a [`ReceiverHandle`](crate::engine::ReceiverHandle) or a
/// [`Controller`](crate::engine::Controller) that does not block.
///
/// An observer must not block and must not panic. While it blocks, the thread that called it does
/// nothing else: a source sends no page, a destination reads no frame, and a paused guest stays
/// paused. So a VMM that writes events to a file or a pipe should put them into a bounded queue
/// that another thread empties. If an observer panics, the engine catches the panic and the event
/// is lost, but the migration continues and later events are delivered. (Where a panic aborts the
/// process, it does so here too.)
///
/// Strings in events may hold text from the other host, exactly as it was sent. Show them to people
/// through [`Escaped`](crate::text::Escaped).
pub trait Observer: Send + Sync {
    /// Handles an event.
    fn event(&self, event: &Event);
}

/// An observer that ignores all events.
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
