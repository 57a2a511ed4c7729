//! What the source's engine is made of.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::AtomicBool, mpsc},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{checkpoint_receiver::Protection, conclude::Hurry, pause::PauseWatch, serve::Left};
use crate::{
    PAGE_SHIFT, PageSet,
    channel::{Closer, Connector},
    engine::{
        SourceOptions,
        control::ControlWriter,
        estimate::Calibration,
        lane::{Counters, Work},
        progress::ProgressMeter,
    },
    report::{CheckpointCounts, FaultCounts, Outcome, PageCounts, Report, Rounds},
    spawner::Joiner,
    wire::{MAX_STREAMS, SessionToken},
};

/// The destination, and the link to it.
pub(super) struct Peer<'a> {
    pub(super) connector: &'a dyn Connector,
    /// Where the user says that the destination is to be found after a loss.
    pub(super) elsewhere: Option<Arc<dyn Connector>>,
    pub(super) session: SessionToken,
    /// What the destination agreed to.
    pub(super) features: u32,
    pub(super) control: Option<ControlWriter>,
    pub(super) lanes: Vec<mpsc::Sender<Work>>,
    pub(super) closers: Vec<Box<dyn Closer>>,
    pub(super) threads: Vec<Box<dyn Joiner>>,
    /// Set when the present link is closed here.
    pub(super) link_ended: Arc<AtomicBool>,
    pub(super) last_ping: Instant,
    /// When the pings of this link were sent that have no answer yet, in order.
    pub(super) pings: VecDeque<Instant>,
    /// Since when an answer is due: the first ping that was sent after the destination was last
    /// heard.
    pub(super) unanswered: Option<Instant>,
    /// How long this attempt to reconnect may wait; `None` while none is under way.
    pub(super) hurry: Option<Hurry>,
}

impl<'a> Peer<'a> {
    pub(super) fn new(connector: &'a dyn Connector) -> Self {
        Self {
            connector,
            elsewhere: None,
            session: SessionToken::default(),
            features: 0,
            control: None,
            lanes: Vec::new(),
            closers: Vec::new(),
            threads: Vec::new(),
            link_ended: Arc::default(),
            last_ping: Instant::now(),
            pings: VecDeque::new(),
            unanswered: None,
            hurry: None,
        }
    }
}

/// What was done to the guest, and is undone if it stays here.
#[derive(Default)]
pub(super) struct Guest {
    pub(super) paused: bool,
    pub(super) paused_at: Option<Instant>,
    /// Watches the pause, from its beginning until the guest runs again or *run* is sent.
    pub(super) watch: Option<PauseWatch>,
    /// Percent of the time for which its vCPUs do not run.
    pub(super) throttle: u8,
}

/// What is known of the link and of both VMMs, and what progress goes by.
pub(super) struct Measured {
    pub(super) calibration: Calibration,
    pub(super) meter: ProgressMeter,
    pub(super) counters: Arc<Counters>,
    /// Time in which lanes read pages in this round, all of them together.
    pub(super) reading: Duration,
    /// Pages that all rounds had to send, and have sent but for the one under way.
    pub(super) pages_due: u64,
    pub(super) last_progress: Instant,
}

impl Measured {
    pub(super) fn new() -> Self {
        Self {
            calibration: Calibration::default(),
            meter: ProgressMeter::default(),
            counters: Arc::default(),
            reading: Duration::ZERO,
            pages_due: 0,
            last_progress: Instant::now(),
        }
    }
}

/// What post-copy has to send, and in which order.
pub(super) struct PostCopy {
    /// Whether the user wants the hand-over now, and the rest to follow.
    pub(super) wanted: bool,
    pub(super) left: Arc<Left>,
    /// How many of the pages that were left behind were missing when the destination last said so.
    pub(super) lacking: u64,
    /// How many there were to be sent after the hand-over, those that were sent before the last
    /// loss included.
    pub(super) missing_pages: u64,
    /// How much the guest has used each page, as push orders are told; empty as long as nothing is
    /// known.
    pub(super) heat: Vec<u8>,
    /// Whether the user was told that the push order is wrong.
    pub(super) order_is_wrong: bool,
    /// What was dirtied last before the pause: not in `heat` yet.
    pub(super) dirtied_last: PageSet,
}

impl PostCopy {
    pub(super) fn new(left: Left) -> Self {
        Self {
            wanted: false,
            left: Arc::new(left),
            lacking: 0,
            missing_pages: 0,
            heat: Vec::new(),
            order_is_wrong: false,
            dirtied_last: PageSet::default(),
        }
    }
}

/// What outlives the death of either side.
pub(super) struct FailSafeState {
    pub(super) kept: Arc<Protection>,
    /// The encoded state at the hand-over: the checkpoint before the first one.
    pub(super) handed_over: Bytes,
    /// Pages that are in the forward checkpoint in their last state.
    pub(super) saved: PageSet,
    /// What became of the VM after its destination died.
    pub(super) aftermath: Option<(Outcome, String)>,
}

impl FailSafeState {
    pub(super) fn new(pages: u64) -> Self {
        Self { kept: Arc::default(), handed_over: Bytes::new(), saved: PageSet::empty(pages), aftermath: None }
    }
}

/// Returns the report of a migration that has just begun.
pub(super) fn first_report(strategy: &'static str, epoch: u32, pages: u64, options: &SourceOptions) -> Report {
    Report {
        strategy,
        outcome: Outcome::Failed,
        reason: None,
        epoch,
        total: Duration::ZERO,
        setup: Duration::ZERO,
        downtime: None,
        predicted_downtime: None,
        stalled: None,
        downtime_limit: options.downtime_limit,
        forced_switch_over: false,
        rounds: Rounds::default(),
        streams: options.streams.clamp(1, MAX_STREAMS),
        wire_bytes: 0,
        downtime_bytes: 0,
        page_bytes: 0,
        ram_bytes: pages << PAGE_SHIFT,
        state_bytes: 0,
        pages: PageCounts { total: pages, ..PageCounts::default() },
        stores: Vec::new(),
        demand_lanes: 0,
        faults: FaultCounts::default(),
        recoveries: 0,
        checkpoints: CheckpointCounts::default(),
        dirty_pages_per_second: None,
        throttle_percent: 0,
    }
}
