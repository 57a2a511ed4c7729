//! The source's engine: implements the verbs over real lanes, and does what the protocol machine says when a
//! strategy has come to its end, whichever end that is.

mod ahead;
mod connect;
pub(super) mod keeper;
mod measure;
mod offer;
mod pause;
mod serve;
mod settle;

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use keeper::{Keeper, Kept};
use pause::PauseWatch;
use serve::{DemandLane, Left};
use settle::Hurry;

pub use self::pause::PauseLimits;
use super::{
    HugePages, OnTimeout, SourceOptions,
    control::{ControlReader, ControlWriter},
    dirty_log,
    estimate::Calibration,
    events::Guarded,
    handle::{Commands, Input, Inputs, NoPostCopy, NoSwitchOver, NoTuning, PeerInputs, Requests},
    lane::{Counters, FIRST_PIECE, Job, Lane, Work, stripe_pages, stripes},
    limits::check_state,
    pages,
    progress::ProgressMeter,
    rounds::{Harvest, RoundDriver},
};
use crate::{
    MigrationError, PageSet,
    channel::{Closer, Connector, Halves, ReadHalf},
    codec::DecodeError,
    lock::lock,
    protocol::{SourceEvent, SourceMachine, SourcePhase},
    ram::GuestRam,
    report::{CheckpointCounts, Event, FaultCounts, Outcome, PageCounts, Report, RoundReport, Rounds},
    spawner::{Joiner, Role},
    state::VmState,
    strategy::{
        Linear, Link, PushOrder, Round, Running, Strategy, Verbs,
        push_order::{DIRTIED, REFERENCED},
    },
    vm::{SourceVm, StateEstimate, VmId},
    wire::{
        Control, ErrorCode, FEATURE_CHECKPOINTS, FEATURE_HUGE_BLOCKS, FEATURE_PAYLOAD_CRC, FEATURE_POST_COPY,
        FEATURE_SHARED_RAM, Hello, LaneKind, MAX_DEMAND_LANES, MAX_STREAMS, Preamble, STATE_CHUNK, SessionToken,
        VERSION, Welcome,
    },
};

/// How often progress is told while pages move.
pub(super) const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// Silence that is shorter than this says nothing: it is looked for, and pings are sent, only so often.
const LEAST_SILENCE: Duration = Duration::from_millis(500);
/// How often the destination is asked whether it is alive.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// Pings without an answer whose time is kept: a destination that never answers one is not asked to.
const MOST_PINGS: usize = 64;
/// Pieces of device state a round.
pub(super) const PIECE_BUDGET: usize = STATE_CHUNK / 2;
/// Most inputs that are looked at before *run* is sent, in the pause: a destination may say anything without end.
const MOST_HEEDED: usize = 256;
/// First wait between two attempts to reconnect.
const FIRST_BACK_OFF: Duration = Duration::from_millis(20);
/// Longest wait between two attempts to reconnect.
const MAX_BACK_OFF: Duration = Duration::from_secs(1);

/// Moves `vm` by `strategy` to where `connector` leads, and comes back when it is decided where the VM lives.
///
/// In every outcome but `Completed` (and `InDoubt`, which is only told through
/// [`Event::InDoubt`]: the function goes on to reconnect, and returns when it knows) the guest runs on here, with its
/// dirty bits, speed, threads and descriptors as they were before.
///
/// If the strategy [shares RAM](Strategy::shares_ram) the guest waits for the calling thread in the pause, and runs beside it
/// afterwards, on the same cores: the spawner has it [assume](crate::spawner::Spawner::assume) the role of such a
/// thread, and when the VM has moved, that of a background thread.
pub fn migrate(
    vm: &mut dyn SourceVm,
    connector: &dyn Connector,
    strategy: &mut dyn Strategy,
    options: &SourceOptions,
    commands: Commands,
) -> Report {
    let options = &SourceOptions { observer: Guarded::around(&options.observer), ..options.clone() };
    let mut engine = Engine::new(vm, connector, (strategy.name(), strategy.shares_ram()), options, commands);
    engine.can_switch_over = strategy.can_switch_over();
    if !engine.can_switch_over {
        lock(&engine.requests).switch_over = Err(NoSwitchOver::Strategy);
    }
    let result = engine.attempt(strategy);
    engine.settle(result)
}

struct Engine<'a> {
    vm: &'a mut dyn SourceVm,
    connector: &'a dyn Connector,
    /// Where the user says that the destination is to be found after a loss.
    elsewhere: Option<Arc<dyn Connector>>,
    strategy: &'static str,
    /// Whether the destination maps the RAM that is here: then no page moves.
    shared: bool,
    options: &'a SourceOptions,
    inputs: Inputs,
    tx: mpsc::Sender<Input>,
    /// Set when the present link is closed here.
    link_ended: Arc<AtomicBool>,
    machine: SourceMachine,
    id: VmId,
    ram: Arc<dyn GuestRam>,
    session: SessionToken,
    control: Option<ControlWriter>,
    closers: Vec<Box<dyn Closer>>,
    lanes: Vec<mpsc::Sender<Work>>,
    threads: Vec<Box<dyn Joiner>>,
    counters: Arc<Counters>,

    start: Instant,
    last_ping: Instant,
    /// When the pings of this link were sent that have no answer yet, in order.
    pings: VecDeque<Instant>,
    /// Since when an answer is due: the first ping that was sent after the destination was last heard.
    unanswered: Option<Instant>,
    last_progress: Instant,
    cancelled: Option<String>,
    rounds: RoundDriver,
    /// How many lanes have sent their part of the round.
    lanes_done: u16,
    paused_at: Option<Instant>,
    paused: bool,
    /// Watches the pause, from its beginning until the guest runs again or *run* is sent.
    watch: Option<PauseWatch>,
    throttle: u8,
    calibration: Calibration,
    meter: ProgressMeter,
    /// Time in which lanes read pages in this round, all of them together.
    reading: Duration,
    /// Pages that all rounds had to send, and have sent but for the one under way.
    pages_due: u64,
    report: Report,
    /// How much the guest has used each page, as push orders are told; empty as long as nothing is known.
    heat: Vec<u8>,
    /// What was dirtied last before the pause: not in `heat` yet.
    dirtied_last: PageSet,
    left: Arc<Left>,
    /// How many of the pages that were left behind were missing when the destination last said so.
    lacking: u64,
    /// How many there were to be sent after the hand-over, those that were sent before the last loss included.
    missing_pages: u64,
    /// What the destination agreed to.
    features: u32,
    post_copy_wanted: bool,
    kept: Arc<Kept>,
    /// The encoded state at the hand-over: the checkpoint before the first one.
    handed_over: Bytes,
    /// Pages that are in the forward checkpoint in their last state.
    saved: PageSet,
    /// What became of the VM after its destination died.
    aftermath: Option<(Outcome, String)>,
    /// What controllers share with this engine.
    requests: Arc<Mutex<Requests>>,
    /// Whether the strategy has rounds that can be cut short.
    can_switch_over: bool,
    /// How long this attempt to reconnect may wait; `None` while none is under way.
    hurry: Option<Hurry>,
}

impl<'a> Engine<'a> {
    fn new(
        vm: &'a mut dyn SourceVm,
        connector: &'a dyn Connector,
        (strategy, shared): (&'static str, bool),
        options: &'a SourceOptions,
        commands: Commands,
    ) -> Self {
        let now = Instant::now();
        let ram = vm.ram();
        let pages = ram.layout().pages();
        let rounds = RoundDriver::new(ram.clone(), options.observer.clone());
        let left = Arc::new(Left::new(rounds.shared_map()));
        let epoch = options.last_epoch.saturating_add(1);
        let report = Report {
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
            ram_bytes: ram.layout().bytes(),
            state_bytes: 0,
            pages: PageCounts { total: pages, ..PageCounts::default() },
            demand_lanes: 0,
            faults: FaultCounts::default(),
            recoveries: 0,
            checkpoints: CheckpointCounts::default(),
            dirty_pages_per_second: None,
            throttle_percent: 0,
        };
        Self {
            vm,
            connector,
            elsewhere: None,
            strategy,
            shared,
            options,
            inputs: Inputs::new(commands.rx),
            tx: commands.tx,
            link_ended: Arc::default(),
            machine: SourceMachine::new(epoch),
            id: VmId::default(),
            ram,
            session: SessionToken::default(),
            control: None,
            closers: Vec::new(),
            lanes: Vec::new(),
            threads: Vec::new(),
            counters: Arc::new(Counters::default()),
            start: now,
            last_ping: now,
            pings: VecDeque::new(),
            unanswered: None,
            last_progress: now,
            cancelled: None,
            rounds,
            lanes_done: 0,
            paused_at: None,
            paused: false,
            watch: None,
            throttle: 0,
            calibration: Calibration::default(),
            meter: ProgressMeter::default(),
            reading: Duration::ZERO,
            pages_due: 0,
            report,
            heat: Vec::new(),
            dirtied_last: PageSet::default(),
            left,
            lacking: 0,
            missing_pages: 0,
            features: 0,
            post_copy_wanted: false,
            kept: Arc::default(),
            handed_over: Bytes::new(),
            saved: PageSet::empty(pages),
            aftermath: None,
            requests: commands.requests,
            can_switch_over: false,
            hurry: None,
        }
    }

    fn attempt(&mut self, strategy: &mut dyn Strategy) -> Result<(), MigrationError> {
        self.connect()?;
        if strategy.needs_post_copy() && self.report.demand_lanes == 0 {
            let why = "the destination cannot serve missing pages (no userfaultfd, or not permitted), or demand lanes are off";
            return Err(MigrationError::Blocked(why.into()));
        }
        if self.options.fail_safe.is_some() && self.features & FEATURE_CHECKPOINTS == 0 {
            let why =
                "the destination cannot send checkpoints: its VMM does not support them, or post-copy is ruled out";
            return Err(MigrationError::Blocked(why.into()));
        }
        self.put_ahead()?;
        strategy.migrate(Running::new(self))?;
        Ok(())
    }

    // ---- talking and waiting ---------------------------------------------------------------------------------

    fn say(&mut self, frame: &Control) -> Result<(), MigrationError> {
        self.say_all(std::slice::from_ref(frame))
    }

    /// Says several things in one go: the destination is woken once.
    fn say_all(&mut self, frames: &[Control]) -> Result<(), MigrationError> {
        let lost = || MigrationError::link("the destination")(io::ErrorKind::NotConnected.into());
        let result = self.control.as_mut().ok_or_else(lost)?.send_all(self.machine.epoch(), frames);
        match result {
            Err(error @ MigrationError::Link { .. }) => {
                let error = self.last_words(error);
                Err(self.stuck_in_pause(error))
            }
            other => other,
        }
    }

    /// A write failed. If the peer said why before it closed the link, its word is the better error.
    fn last_words(&mut self, error: MigrationError) -> MigrationError {
        let deadline = Instant::now() + Duration::from_millis(200);
        while let Ok(input) = self.inputs.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            match input {
                Input::Control(epoch, frame @ Control::Error { code: ErrorCode::VmEnded, .. }) => {
                    return self.frame(epoch, frame).err().unwrap_or(error);
                }
                Input::Control(_, Control::Error { code, text }) => return MigrationError::Peer { code, text },
                Input::VmEnded(why) if self.machine.owns() => return MigrationError::VmEnded(why),
                // what has read nothing but a stranger's words knows more than who wrote
                Input::ControlLost(lost) if self.machine.phase() == SourcePhase::Greeting => return lost,
                Input::ControlLost(_) => break,
                _ => {}
            }
        }
        error
    }

    /// Waits for the frame that `pick` takes.
    fn wait<T>(
        &mut self,
        what: &str,
        timeout: Duration,
        mut pick: impl FnMut(SourceEvent) -> Option<T>,
    ) -> Result<T, MigrationError> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.next_input(deadline)? {
                Some(Input::Control(epoch, frame)) => {
                    let event = self.frame(epoch, frame)?;
                    if let Some(found) = pick(event) {
                        return Ok(found);
                    }
                }
                Some(_) => {}
                None => {}
            }
            self.in_time(deadline, what)?;
        }
    }

    /// How long the destination may be silent.
    fn patience(&self) -> Duration {
        let detect = self.options.fail_safe.as_ref().filter(|_| !self.machine.owns()).map(|f| f.detect);
        detect.map_or(self.options.idle_timeout, |detect| detect.max(LEAST_SILENCE).min(self.options.idle_timeout))
    }

    /// An error when `deadline` has passed.
    fn in_time(&self, deadline: Instant, what: &str) -> Result<(), MigrationError> {
        if Instant::now() < deadline {
            return Ok(());
        }
        let cause = io::Error::new(io::ErrorKind::TimedOut, format!("waited in vain for {what}"));
        Err(MigrationError::link(&self.connector().address())(cause))
    }

    /// The next input for the caller, or `None` when `deadline` or the next tick comes first. Cancels, link losses and
    /// failures of lanes become errors here; pings and progress are seen to.
    fn next_input(&mut self, deadline: Instant) -> Result<Option<Input>, MigrationError> {
        let tick = (self.last_progress + PROGRESS_INTERVAL).min(deadline);
        let tick = self.next_look().map_or(tick, |look| tick.min(look));
        let input = self.inputs.recv_timeout(tick.saturating_duration_since(Instant::now()));
        if self.last_progress.elapsed() >= PROGRESS_INTERVAL {
            self.last_progress = Instant::now();
            self.tell_progress();
            if self.kept.heard.swap(false, Ordering::Relaxed) {
                self.is_alive();
            }
            let (phase, patience) = (self.machine.phase(), self.patience());
            if matches!(phase, SourcePhase::Copying | SourcePhase::Offered | SourcePhase::Serving)
                && self.last_ping.elapsed() >= PING_INTERVAL.min(patience / 4)
            {
                let before = self.counters.wire_bytes.load(Ordering::Relaxed);
                self.say(&Control::Ping)?;
                self.discount(self.counters.wire_bytes.load(Ordering::Relaxed).saturating_sub(before));
                // only now: it may have waited for its turn on the link
                self.last_ping = Instant::now();
                if self.pings.len() < MOST_PINGS {
                    self.pings.push_back(self.last_ping);
                }
                self.unanswered.get_or_insert(self.last_ping);
            }
            let silent = self.unanswered.is_some_and(|since| since.elapsed() >= patience);
            if matches!(phase, SourcePhase::Copying | SourcePhase::Serving) && silent {
                let why = format!("the destination has been silent for {patience:?}");
                let cause = io::Error::new(io::ErrorKind::TimedOut, why);
                return Err(MigrationError::link(&self.connector().address())(cause));
            }
        }
        match input {
            Ok(Input::Cancel(why)) => {
                if self.machine.owns() {
                    self.cancelled = Some(why.clone());
                    return Err(MigrationError::Cancelled(why));
                }
                Ok(None)
            }
            Ok(Input::VmEnded(why)) if self.machine.owns() => Err(MigrationError::VmEnded(why)),
            // where it runs now it may still end
            Ok(Input::VmEnded(_)) => Ok(None),
            Ok(Input::Recover(connector)) => {
                self.elsewhere = Some(connector);
                Ok(None)
            }
            Ok(Input::Lane(Ok(done))) => {
                self.lanes_done = self.lanes_done.saturating_add(1);
                self.reading = self.reading.saturating_add(done.reading);
                Ok(Some(Input::Lane(Ok(done))))
            }
            Ok(Input::PostCopy) => {
                self.post_copy_wanted = true;
                Ok(Some(Input::PostCopy))
            }
            Ok(Input::Demanded(page)) => {
                self.is_alive();
                Ok(Some(Input::Demanded(page)))
            }
            Ok(Input::ControlLost(error)) => Err(error),
            Ok(Input::Lane(Err(error))) => Err(match error {
                MigrationError::Link { .. } => self.last_words(error),
                other => other,
            }),
            Ok(Input::Control(epoch, frame)) => {
                // what it says counts, also when it says it at the last moment
                self.is_alive();
                Ok(Some(Input::Control(epoch, frame)))
            }
            Ok(other) => Ok(Some(other)),
            // the engine itself holds a sender, so it cannot be disconnected
            Err(_) => self.within_pause().map(|()| None),
        }
    }

    fn frame(&mut self, epoch: u32, frame: Control) -> Result<SourceEvent, MigrationError> {
        self.is_alive();
        if matches!(frame, Control::Complete(_)) && self.machine.phase() == SourcePhase::Serving {
            // it would free them
            let unsent = self.rounds.map().never_claimed();
            if unsent > 0 {
                let why = format!("{unsent} pages were never sent");
                return Err(DecodeError::invalid("complete", why).into());
            }
        }
        match self.machine.handle(epoch, frame)? {
            SourceEvent::Refused(code, text) => Err(MigrationError::Peer { code, text }),
            SourceEvent::VmEnded(text) => {
                let left = self.lacking;
                let reason = format!("at the destination: {text}; {left} pages that were missing there are not needed");
                self.aftermath = Some((Outcome::Ended, reason));
                Err(MigrationError::VmEnded(text))
            }
            SourceEvent::Pong => {
                // one answer may have been late, for a reason that has nothing to do with the link; and while it loads the state
                // the destination says that it lives without being asked
                if let Some(asked) = self.pings.pop_front()
                    && self.machine.phase() != SourcePhase::Offered
                {
                    self.calibration.round_trip(asked.elapsed());
                }
                Ok(SourceEvent::Pong)
            }
            event => Ok(event),
        }
    }

    fn tell_phase(&self) {
        self.options.observer.event(&Event::Source(self.machine.phase()));
    }

    // ---- rounds ----------------------------------------------------------------------------------------------

    /// Gives a round to the lanes.
    fn begin_round(&mut self, pages: &Arc<PageSet>) -> Result<(u32, Arc<AtomicBool>), MigrationError> {
        if self.shared {
            return Err(MigrationError::Blocked("RAM is shared with the destination: no page moves".into()));
        }
        let generation = self.machine.begin_round()?;
        let stop = Arc::new(AtomicBool::new(false));
        self.lanes_done = 0;
        self.reading = Duration::ZERO;
        self.counters.round_sent.store(0, Ordering::Relaxed);
        if self.report.rounds.is_empty() {
            self.begin_progress();
        }
        self.pages_due = self.pages_due.saturating_add(pages.len());
        let (wire_bytes, time) = (self.counters.wire_bytes.load(Ordering::Relaxed), Duration::ZERO);
        let round = RoundReport { pages: pages.len(), wire_bytes, time, throttle_percent: self.throttle };
        self.report.rounds.push(round);
        self.prolong_pause(pages.len());
        let rearm = self.rounds.begin(self.vm.tracker(), pages, self.paused)?;
        for lane in &self.lanes {
            let job = Job { generation, pages: pages.clone(), rearm: rearm.clone(), stop: stop.clone() };
            // a lane that is gone has said why, which arrives as an input
            let _ = lane.send(Work::Round(job));
        }
        Ok((generation, stop))
    }

    /// A round is at the destination, but for the stripes that were not sent.
    fn end_round(
        &mut self,
        generation: u32,
        pages: &PageSet,
        stopped: &[(u16, u64)],
        began: Instant,
    ) -> Result<Round, MigrationError> {
        let mut sent = pages.clone();
        for &(lane, at) in stopped {
            for stripe in stripes(lane, self.report.streams, sent.capacity()).filter(|&s| s >= at) {
                sent.remove_range(stripe_pages(stripe));
            }
        }
        self.rounds.arrived(&sent)?;
        let time = began.elapsed();
        let now = self.counters.wire_bytes.load(Ordering::Relaxed);
        let mut wire_bytes = 0;
        if let Some(round) = self.report.rounds.last_mut() {
            wire_bytes = now.saturating_sub(round.wire_bytes);
            (round.wire_bytes, round.time) = (wire_bytes, time);
            self.options.observer.event(&Event::RoundEnded(*round));
        }
        self.pages_due = self.pages_due.saturating_sub(pages.len() - sent.len());
        Ok(Round { generation, asked: pages.len(), sent: sent.len(), wire_bytes, time })
    }

    /// The guest has used these pages, which says so much about them.
    fn heat_up(&mut self, pages: &PageSet, by: u8) {
        self.heat.resize(self.report.pages.total as usize, 0);
        for page in pages.iter() {
            if let Some(heat) = self.heat.get_mut(page as usize) {
                *heat = heat.saturating_add(by);
            }
        }
    }

    /// The longest acceptable downtime, as it was set last.
    fn downtime_limit(&self) -> Duration {
        lock(&self.requests).downtime_limit.unwrap_or(self.options.downtime_limit)
    }

    /// What has come in meanwhile and was not waited for: a cancel, or the end of the VM, is an error.
    fn heed(&mut self) -> Result<(), MigrationError> {
        let now = Instant::now();
        for _ in 0..MOST_HEEDED {
            match self.next_input(now)? {
                Some(Input::Control(epoch, frame)) => drop(self.frame(epoch, frame)?),
                Some(_) => {}
                None => break,
            }
        }
        Ok(())
    }

    /// Whether the round is to end before all of it is sent.
    fn round_is_over(&self) -> bool {
        let post_copy = self.post_copy_wanted && self.report.demand_lanes > 0;
        post_copy || self.switch_over_wanted() || self.timed_out()
    }

    fn deadline(&self) -> Option<Instant> {
        self.options.timeout.map(|t| self.start + t)
    }

    fn timed_out(&self) -> bool {
        self.deadline().is_some_and(|d| Instant::now() >= d)
    }
}

impl Verbs for Engine<'_> {
    fn pages(&self) -> u64 {
        self.report.pages.total
    }

    fn start_tracking(&mut self) -> Result<PageSet, MigrationError> {
        // nothing was read yet, unless this is not the first time; and what is written meanwhile need not be tracked
        if self.report.demand_lanes > 0 && !self.rounds.is_tracking() {
            let referenced = pages::referenced(self.vm, self.report.pages.total, &*self.options.observer);
            self.heat_up(&referenced, REFERENCED);
        }
        let pages = self.rounds.start(self.vm)?;
        self.report.pages.hole = self.rounds.counts().holes;
        Ok(pages)
    }

    fn send(&mut self, pages: &PageSet) -> Result<Round, MigrationError> {
        let pages = Arc::new(pages.clone());
        self.send_pieces()?;
        let began = Instant::now();
        let (generation, stop) = self.begin_round(&pages)?;
        let far = began + Duration::from_secs(1 << 30);
        let deadline = self.deadline().unwrap_or(far);
        let (mut lanes, mut stopped, mut received) = (0, Vec::new(), false);
        while lanes < self.report.streams || !received {
            let until = if stop.load(Ordering::Relaxed) { far } else { deadline };
            match self.next_input(until)? {
                Some(Input::Lane(Ok(done))) => {
                    lanes += 1;
                    stopped.extend(done.stopped_at.map(|at| (done.lane, at)));
                }
                Some(Input::Control(epoch, frame)) => {
                    received |= self.frame(epoch, frame)? == SourceEvent::RoundReceived(generation);
                }
                _ => {}
            }
            if self.round_is_over() {
                stop.store(true, Ordering::Relaxed);
            }
        }
        let round = self.end_round(generation, &pages, &stopped, began)?;
        self.learn(round.sent, round.wire_bytes, round.time);
        Ok(round)
    }

    fn harvest(&mut self) -> Result<PageSet, MigrationError> {
        let Harvest { written, pages, time } = self.rounds.harvest(self.vm)?;
        self.saved.subtract(&written);
        let since = time.as_secs_f64();
        if !self.paused && since > 0.0 {
            self.report.dirty_pages_per_second = Some(pages.len() as f64 / since);
        }
        if self.report.demand_lanes > 0 {
            if self.paused {
                // the guest waits: it is soon enough when it runs again
                self.dirtied_last = pages.clone();
            } else {
                self.heat_up(&pages, DIRTIED);
            }
        }
        Ok(self.rounds.due())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), MigrationError> {
        self.vm.throttle(percent).map_err(MigrationError::vm("throttling the guest"))?;
        self.throttle = percent;
        self.report.throttle_percent = self.report.throttle_percent.max(percent);
        Ok(())
    }

    fn link(&self) -> Link {
        self.known()
    }

    fn switch_over_wanted(&self) -> bool {
        lock(&self.requests).switch_over_wanted
    }

    fn expect_downtime(&mut self, prediction: Duration) {
        self.report.predicted_downtime = Some(prediction);
    }

    fn stalled(&mut self, why: &str) {
        self.report.stalled = Some(why.to_owned());
    }

    fn pause(&mut self) -> Result<(), MigrationError> {
        self.check_state_limits()?;
        self.paused_at = Some(Instant::now());
        self.report.downtime = None;
        self.report.forced_switch_over = self.switch_over_wanted();
        self.paused = true;
        self.tell_controllers();
        if self.shared {
            self.options.spawner.begin_switch_over();
        }
        self.vm.pause().map_err(MigrationError::vm("pausing the guest"))?;
        self.begin_watch();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MigrationError> {
        self.vm.resume().map_err(MigrationError::vm("resuming the guest"))?;
        self.paused = false;
        self.rounds.map().taken_back();
        self.end_watch();
        self.tell_controllers();
        self.report.downtime = self.paused_at.map(|at| at.elapsed());
        Ok(())
    }

    fn send_rest(&mut self, pages: PageSet) -> Result<(), MigrationError> {
        self.offer(pages, false)
    }

    fn hand_over(&mut self, missing: PageSet) -> Result<(), MigrationError> {
        if self.machine.phase() == SourcePhase::Copying {
            self.offer(missing, true)?;
        } else if !missing.is_empty() {
            let why = format!("{} pages are to be left behind, but the state was sent already", missing.len());
            return Err(MigrationError::Blocked(why));
        }
        self.heed()?;
        let run = self.machine.run()?;
        self.end_watch();
        // before the frame goes out: from here on the VM may run there
        self.vm.owner_in_doubt();
        if self.options.fail_safe.is_some() {
            self.kept.handed_over.store(true, Ordering::Relaxed);
            self.options.observer.event(&Event::Checkpoint(self.kept.counts()));
        }
        self.say(&run)?;
        self.await_running()
    }

    fn left_behind(&self) -> u64 {
        self.rounds.map().left_behind().len()
    }

    fn serve(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError> {
        self.serve_all(order)
    }
}
