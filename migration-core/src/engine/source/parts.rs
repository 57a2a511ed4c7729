//! The parts of the source engine's state.

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

/// The destination, and the link to the destination.
pub(super) struct Peer<'a> {
    pub(super) connector: &'a dyn Connector,
    /// The connector that the user has given for reconnecting to the destination after a loss of
    /// the link, or the destination that the strategy has named.
    pub(super) elsewhere: Option<Arc<dyn Connector>>,
    pub(super) session: SessionToken,
    /// The features that the destination has agreed to.
    pub(super) features: u32,
    pub(super) control: Option<ControlWriter>,
    pub(super) lanes: Vec<mpsc::Sender<Work>>,
    pub(super) closers: Vec<Box<dyn Closer>>,
    pub(super) threads: Vec<Box<dyn Joiner>>,
    /// Set when this side closes the present link.
    pub(super) link_ended: Arc<AtomicBool>,
    pub(super) last_ping: Instant,
    /// When the unanswered pings of this link were sent, oldest first.
    pub(super) pings: VecDeque<Instant>,
    /// Since when an answer is due: the time of the first ping that was sent after the last data
    /// from the destination. `None` if no answer is due.
    pub(super) unanswered: Option<Instant>,
    /// The time limits of the attempt to reconnect that is under way; `None` if there is none.
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

/// The changes that the engine has made to the guest. They are undone if the guest stays here.
#[derive(Default)]
pub(super) struct Guest {
    pub(super) paused: bool,
    pub(super) paused_at: Option<Instant>,
    /// The watch over the pause, from the beginning of the pause until the guest runs again or
    /// *run* is sent.
    pub(super) watch: Option<PauseWatch>,
    /// The percentage of time for which throttling keeps the guest's vCPUs from running.
    pub(super) throttle: u8,
}

/// The measurements of the link and of both VMMs, and the counters from which progress is computed.
pub(super) struct Measured {
    pub(super) calibration: Calibration,
    pub(super) meter: ProgressMeter,
    pub(super) counters: Arc<Counters>,
    /// The time that the lanes spent reading pages in this round, summed over all lanes.
    pub(super) reading: Duration,
    /// The number of pages that all rounds had to send. Pages that a finished round did not send
    /// are subtracted.
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

/// The pages that post-copy has to send, and the data that determines their order.
pub(super) struct PostCopy {
    /// Whether the user wants the hand-over now, with the remaining pages sent after it.
    pub(super) wanted: bool,
    pub(super) left: Arc<Left>,
    /// The number of remaining pages that the destination lacked when it last reported them.
    pub(super) lacking: u64,
    /// The number of pages to send after the hand-over, including those that were sent before the
    /// last loss of the link.
    pub(super) missing_pages: u64,
    /// How much the guest has used each page, in the form that push orders take. Empty as long as
    /// nothing is known.
    pub(super) heat: Vec<u8>,
    /// Whether the user was told that the push order is wrong.
    pub(super) order_is_wrong: bool,
    /// Pages that were dirtied last before the pause, and are not counted in `heat` yet.
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

/// The state of fail-safe post-copy, which protects the VM against the death of either side.
pub(super) struct FailSafeState {
    pub(super) kept: Arc<Protection>,
    /// The encoded state at the hand-over. It is the state to restart from as long as the
    /// destination has sent no checkpoint.
    pub(super) handed_over: Bytes,
    /// Pages whose latest content is in the forward checkpoint.
    pub(super) saved: PageSet,
    /// The outcome and its reason, if the destination has died or its VM has ended.
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
