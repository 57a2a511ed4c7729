//! The source's engine. It implements the verbs of a strategy over real lanes. When the strategy
//! has returned, with success or an error, it concludes the migration as the protocol machine
//! requires.

mod begin;
pub(super) mod checkpoint_receiver;
mod conclude;
mod connect;
mod fetcher;
mod forward_checkpoints;
mod measure;
mod parts;
mod pause;
mod places;
mod puts;
mod putter;
mod serve;
mod staging;
mod switch_over;
mod talk;
mod verbs;

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use checkpoint_receiver::CheckpointReceiver;
use parts::{FailSafeState, Guest, Measured, Peer, PostCopy, first_report};
use serve::{DemandLane, Left};

pub(super) use self::putter::PlaceDone;
pub use self::{pause::PauseLimits, places::SourceStores, staging::stage};
use super::{
    HugePages, OnTimeout, SourceOptions,
    control::{ControlReader, ControlWriter},
    dirty_log,
    events::Guarded,
    handle::{Commands, Input, Inputs, NoPostCopy, NoSwitchOver, NoTuning, PeerInputs, Requests},
    lane::{FIRST_PIECE, Job, Lane, Work, stripe_pages, stripes},
    limits::check_state,
    pages,
    rounds::{Harvest, RoundDriver},
};
use crate::{
    MigrationError, PageSet,
    channel::{Connector, Halves, ReadHalf},
    codec::DecodeError,
    lock::lock,
    protocol::{SourceEvent, SourceMachine, SourcePhase},
    ram::GuestRam,
    report::{Event, Outcome, Report, RoundReport},
    spawner::Role,
    state::VmState,
    strategy::{
        Linear, Link, PushOrder, Round, Running, Strategy, Verbs,
        push_order::{DIRTIED, REFERENCED},
    },
    text::{Chain, describe},
    vm::{SourceVm, StateEstimate, VmId},
    wire::{
        Control, ErrorCode, FEATURE_CHECKPOINTS, FEATURE_HUGE_BLOCKS, FEATURE_PAYLOAD_CRC, FEATURE_POST_COPY,
        FEATURE_SHARED_RAM, Hello, LaneKind, MAX_DEMAND_LANES, MAX_STREAMS, Preamble, STATE_CHUNK, VERSION, Welcome,
    },
};
use places::Places;
use staging::{Over, Staging};

/// The interval at which progress is reported while pages move.
pub(super) const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// The shortest silence that the engine acts on. A shorter one proves nothing. The engine checks
/// for silence, and sends pings, no more often than this requires.
const LEAST_SILENCE: Duration = Duration::from_millis(500);
/// The interval at which the engine asks the destination whether it is alive.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// The most unanswered pings whose send time is kept. A destination may never answer a ping, so the
/// queue needs a bound.
const MAX_PINGS: usize = 64;
/// The number of bytes of device state that the engine asks the VMM for at a time.
pub(super) const PIECE_BUDGET: usize = STATE_CHUNK / 2;
/// The most inputs that are handled before *run* is sent, in the pause. The bound is needed because
/// a destination may send frames without end.
const MAX_HEEDED: usize = 256;
/// The first wait between two attempts to reconnect.
const FIRST_BACK_OFF: Duration = Duration::from_millis(20);
/// The longest wait between two attempts to reconnect.
const MAX_BACK_OFF: Duration = Duration::from_secs(1);

/// Migrates `vm` by `strategy` to the destination that `connector` leads to. Returns the report
/// when it is decided which side owns the VM.
///
/// In every outcome but `Completed` the guest runs on here, with its dirty bits, speed, threads and
/// descriptors as they were before. `InDoubt` is not an outcome that this function returns: it is
/// reported only through [`Event::InDoubt`], and the function continues to reconnect until it knows
/// which side owns the VM.
///
/// If the strategy [shares RAM](Strategy::shares_ram), the guest waits for the calling thread in
/// the pause, and runs beside it afterwards, on the same cores. The spawner therefore makes the
/// calling thread [assume](crate::spawner::Spawner::assume) the role of a hand-over thread, and the
/// role of a background thread when the VM has moved.
pub fn migrate(
    vm: &mut dyn SourceVm,
    connector: &dyn Connector,
    strategy: &mut dyn Strategy,
    options: &SourceOptions,
    commands: Commands,
) -> Report {
    let options = &SourceOptions { observer: Guarded::around(&options.observer), ..options.clone() };
    let named = Named::of(strategy);
    if !named.can_switch_over {
        lock(&commands.requests).switch_over = Err(NoSwitchOver::Strategy);
    }
    let mut engine = Engine::new(vm, connector, named, options, commands);
    let result = engine.attempt(strategy);
    engine.conclude(result)
}

struct Engine<'a> {
    vm: &'a mut dyn SourceVm,
    id: VmId,
    ram: Arc<dyn GuestRam>,
    strategy: Named,
    options: &'a SourceOptions,
    machine: SourceMachine,
    inputs: Inputs,
    tx: mpsc::Sender<Input>,
    /// The state that controllers share with this engine.
    requests: Arc<Mutex<Requests>>,
    /// Why the session ends before *run*; `None` while it continues.
    over: Option<Over>,
    /// When the migration began, or the eviction of a protected VM.
    start: Instant,
    peer: Peer<'a>,
    guest: Guest,
    rounds: RoundDriver,
    /// The number of lanes that have sent their part of the round.
    lanes_done: u16,
    measured: Measured,
    post_copy: PostCopy,
    fail_safe: FailSafeState,
    places: Places,
    /// Whether pages are in stores, or are put there. Only then does the source ask the destination
    /// for the page store feature.
    uses_stores: bool,
    /// The state of a session in which a command names the destination later; `None` otherwise.
    staging: Option<Staging>,
    /// Pages that a wait has found to be written since the last harvest.
    seen_written: PageSet,
    report: Report,
}

/// What the engine needs to know about the strategy that it runs.
struct Named {
    name: &'static str,
    /// Whether the destination maps the RAM of this host. No page moves then.
    shares_ram: bool,
    /// Whether the strategy has rounds that can be cut short.
    can_switch_over: bool,
    /// Whether the strategy hands the VM over with pages missing.
    needs_post_copy: bool,
}

impl Named {
    fn of(strategy: &dyn Strategy) -> Self {
        Self {
            name: strategy.name(),
            shares_ram: strategy.shares_ram(),
            can_switch_over: strategy.can_switch_over(),
            needs_post_copy: strategy.needs_post_copy(),
        }
    }
}

impl<'a> Engine<'a> {
    fn new(
        vm: &'a mut dyn SourceVm,
        connector: &'a dyn Connector,
        strategy: Named,
        options: &'a SourceOptions,
        commands: Commands,
    ) -> Self {
        let ram = vm.ram();
        let pages = ram.layout().pages();
        let rounds = RoundDriver::new(ram.clone(), options.observer.clone());
        let post_copy = PostCopy::new(Left::new(rounds.shared_map()));
        let epoch = options.last_epoch.saturating_add(1);
        Self {
            report: first_report(strategy.name, epoch, pages, options),
            vm,
            id: VmId::default(),
            ram,
            strategy,
            options,
            machine: SourceMachine::new(epoch),
            inputs: Inputs::new(commands.rx),
            tx: commands.tx,
            requests: commands.requests,
            over: None,
            start: Instant::now(),
            peer: Peer::new(connector),
            guest: Guest::default(),
            rounds,
            lanes_done: 0,
            measured: Measured::new(),
            post_copy,
            fail_safe: FailSafeState::new(pages),
            places: Places::default(),
            uses_stores: false,
            staging: None,
            seen_written: PageSet::empty(pages),
        }
    }
}
