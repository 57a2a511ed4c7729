//! What a migration tells: events and progress while it goes on, a report at its end.

use std::time::Duration;

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
#[derive(Clone, Copy, Debug, PartialEq)]
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
    /// Rounds, the last one with the guest paused included.
    pub rounds: Vec<RoundReport>,
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
    /// Bytes a second, lately.
    pub bytes_per_second: f64,
    /// Pages sent a second in this round.
    pub pages_per_second: f64,
    /// Pages that the guest dirties a second.
    pub dirty_pages_per_second: Option<f64>,
    /// Downtime to expect if the guest were paused after this round.
    pub expected_downtime: Option<Duration>,
    /// The throttle in force.
    pub throttle_percent: u8,
    /// Time since the start.
    pub elapsed: Duration,
    /// Until the end of this round, and so at the least until the end.
    pub eta: Option<Duration>,
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

/// Receives events. Called from the SDK's threads: return soon.
pub trait Observer: Send + Sync {
    /// Something happened.
    fn event(&self, event: &Event);
}

/// An observer that does not look.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoObserver;

impl Observer for NoObserver {
    fn event(&self, _event: &Event) {}
}
