//! A simulator: strategies and protocol machines in virtual time, over a link that can be cut after any action.
//!
//! Both [machines](crate::protocol) are the real ones, and so is the strategy; RAM is a version number a page, the link
//! a bandwidth and a latency, the guest a rate or a script of writes. Every frame or chunk of pages is two *actions*,
//! its sending and its arrival, so that "sent but lost" and "arrived but not answered" are both tried. Nothing depends
//! on a clock or a thread: the same configuration gives the same run.
//!
//! ```
//! use std::time::Duration;
//! use migration_core::{sim::{Dirtying, Owner, SimConfig, Simulation}, strategy::PreCopy};
//!
//! let mut sim = Simulation::new(SimConfig {
//!     dirtying: Dirtying::Rate { pages_per_second: 5_000.0, working_set: 1_000 },
//!     ..SimConfig::default()
//! });
//! let attempt = sim.attempt(&mut PreCopy::<migration_core::strategy::ModelConvergence>::default());
//! assert!(attempt.error.is_none());
//! assert_eq!(sim.owner(), Owner::Destination);
//! assert!(attempt.downtime.unwrap() < Duration::from_millis(300));
//! assert_eq!(sim.broken(), &[] as &[String]);
//! ```

use std::{io, time::Duration};

use bytes::Bytes;

use crate::{
    MigrationError, PAGE_SIZE, PageRange, PageSet,
    page::{RamLayout, RamRegion},
    page_map::PageMap,
    protocol::{
        DestinationAction, DestinationMachine, DestinationPhase, OnDestinationLoss, SourceEvent, SourceMachine,
        SourcePhase,
    },
    spawner::GuestImpact,
    state::{Section, VmState},
    strategy::{Linear, Link, PushOrder, Round, Running, Strategy, Verbs, push_order::checked_next},
    vm::{VmDescription, VmId},
    wire::{
        Control, FEATURE_SHARED_RAM, FaultSummary, Hello, STATE_CHUNK, SessionToken, Welcome, add_missing,
        missing_frames,
    },
};

/// How the guest writes while it runs.
#[derive(Clone, Debug, Default)]
pub enum Dirtying {
    /// Not at all.
    #[default]
    Idle,
    /// Round and round over the first `working_set` pages.
    Rate {
        /// Pages a second, unthrottled.
        pages_per_second: f64,
        /// How many different pages.
        working_set: u64,
    },
    /// Each range at its time since the start, if the guest runs then, or as soon as it does.
    Script(Vec<(Duration, PageRange)>),
}

/// What the guest touches after a hand-over that left pages behind: one page after the other, and each that is missing
/// stops it until it is there.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Touching {
    /// Nothing.
    #[default]
    Nothing,
    /// Page after page.
    Sequential {
        /// As long as none is missing.
        pages_per_second: f64,
    },
    /// Any page.
    Random {
        /// As long as none is missing.
        pages_per_second: f64,
    },
}

/// The world of a simulation.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// Pages of RAM.
    pub pages: u64,
    /// The link's bandwidth in bytes a second.
    pub bytes_per_second: f64,
    /// The link's latency, one way.
    pub latency: Duration,
    /// Pages that travel in one action.
    pub chunk: u64,
    /// What the guest does.
    pub dirtying: Dirtying,
    /// When it reports which pages free, in the order of time. It takes a page back by writing there; what a page holds that
    /// is free counts for nothing.
    pub freeing: Vec<(Duration, PageRange)>,
    /// What it does in post-copy.
    pub touching: Touching,
    /// The link is lost after each of these actions, counted over the whole simulation. It is back for the next
    /// connection.
    pub cuts: Vec<u64>,
    /// Loading the state fails at the destination this many times.
    pub failing_loads: u32,
    /// Bytes of the VM's state.
    pub state_bytes: usize,
    /// How long saving it takes, and how long loading it takes. Both VMMs say so beforehand.
    pub save_time: Duration,
    /// Likewise.
    pub load_time: Duration,
    /// See [`crate::engine::SourceOptions`].
    pub downtime_limit: Duration,
    /// Likewise.
    pub timeout: Option<Duration>,
    /// What the time-out does: stop the guest, or give up.
    pub stop_on_timeout: bool,
    /// What it does first of all: hand the guest over and let the rest follow.
    pub post_copy_on_timeout: bool,
    /// Likewise.
    pub impact: GuestImpact,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            pages: 65_536,
            bytes_per_second: 125e6,
            latency: Duration::from_micros(200),
            chunk: 512,
            dirtying: Dirtying::Idle,
            freeing: Vec::new(),
            touching: Touching::Nothing,
            cuts: Vec::new(),
            failing_loads: 0,
            state_bytes: 0,
            save_time: Duration::ZERO,
            load_time: Duration::ZERO,
            downtime_limit: Duration::from_millis(300),
            timeout: None,
            stop_on_timeout: false,
            post_copy_on_timeout: false,
            impact: GuestImpact::Balanced,
        }
    }
}

/// From a harvest until the look at which pages are free.
const LOOK: Duration = Duration::from_micros(50);

/// Who owns the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The source.
    Source,
    /// The source does not know, the destination does not run it.
    InDoubt,
    /// The destination.
    Destination,
}

/// How an attempt went.
#[derive(Debug)]
pub struct Attempt {
    /// Why it failed; `None` if the destination runs the VM.
    pub error: Option<MigrationError>,
    /// From the pause until *running* arrived or the guest resumed.
    pub downtime: Option<Duration>,
    /// What the strategy expected.
    pub predicted_downtime: Option<Duration>,
    /// Why the downtime limit was not kept, if the strategy said so.
    pub stalled: Option<String>,
    /// Virtual time it took.
    pub total: Duration,
    /// Pages sent in each round.
    pub rounds: Vec<u64>,
    /// Pages left out because they were free, each time counted.
    pub spared: u64,
    /// How often the link was lost.
    pub cuts: u32,
    /// The strongest throttle.
    pub throttle_percent: u8,
    /// Touches of missing pages.
    pub faults: u64,
    /// Links lost while pages were missing at the destination, and found again.
    pub recoveries: u32,
}

/// Two hosts, a link and a VM.
pub struct Simulation {
    config: SimConfig,
    clock: Duration,
    actions: u64,
    connected: bool,
    epoch: u32,
    source: SourceMachine,
    destination: DestinationMachine,
    /// The version of each page; the destination's are `None` while it has no VM.
    memory: Vec<u64>,
    copy: Option<Vec<u64>>,
    dirty: PageSet,
    /// Where each page is, as the source knows it, and as the destination does.
    source_map: PageMap,
    destination_map: PageMap,
    tracking: bool,
    source_runs: bool,
    destination_runs: bool,
    source_dead: bool,
    throttle: u8,
    writes: f64,
    written: u64,
    scripted: usize,
    /// Pages that the guest has reported free and not taken back.
    free: PageSet,
    freed: usize,
    loads: u32,
    /// When the present attempt began.
    began: Duration,
    paused_at: Option<Duration>,
    link: (f64, f64),
    post_copy: PostCopyState,
    /// Whether the destination maps the source's memory.
    shared: bool,
    attempt: Attempt,
    broken: Vec<String>,
}

/// Both sides of a hand-over that left pages behind.
#[derive(Default)]
struct PostCopyState {
    /// The list of missing pages that the destination is sending.
    listed: PageSet,
    reattached: bool,
    /// The missing page at which the guest stands still.
    waiting: Option<u64>,
    touches: f64,
    touched: u64,
}

impl Simulation {
    /// A world in which the guest runs at the source.
    pub fn new(config: SimConfig) -> Self {
        let pages = config.pages;
        Self {
            clock: Duration::ZERO,
            actions: 0,
            connected: false,
            epoch: 0,
            source: SourceMachine::new(0),
            destination: DestinationMachine::new(),
            memory: (1..=pages).collect(),
            copy: None,
            dirty: PageSet::empty(pages),
            source_map: PageMap::new(pages),
            destination_map: PageMap::new(pages),
            tracking: false,
            source_runs: true,
            destination_runs: false,
            source_dead: false,
            throttle: 0,
            writes: 0.0,
            written: pages,
            scripted: 0,
            free: PageSet::empty(pages),
            freed: 0,
            loads: 0,
            began: Duration::ZERO,
            paused_at: None,
            link: (0.0, PAGE_SIZE as f64),
            post_copy: PostCopyState::default(),
            shared: false,
            attempt: Attempt::new(),
            broken: Vec::new(),
            config,
        }
    }

    /// Runs `strategy`, and does what follows from how it ends, as the engine does: everything is given back, or *run*
    /// is repeated until it is answered.
    pub fn attempt(&mut self, strategy: &mut dyn Strategy) -> Attempt {
        self.began = self.clock;
        self.attempt = Attempt::new();
        self.paused_at = None;
        self.epoch += 1;
        self.source = SourceMachine::new(self.epoch);
        self.source_map = PageMap::new(self.config.pages);
        self.post_copy = PostCopyState { listed: PageSet::empty(self.config.pages), ..PostCopyState::default() };
        let name = strategy.name();
        self.shared = strategy.shares_ram();
        let blocked = || MigrationError::Blocked(format!("{name} puts pages into a store, and there is none"));
        let result = if strategy.needs_store() { Err(blocked()) } else { self.connect(name) };
        let result = result.and_then(|()| strategy.migrate(Running::new(self)));
        let mut error = result.err();
        while self.source.phase() == SourcePhase::InDoubt && !self.source_dead {
            if self.source_runs {
                self.broken.push("the source runs a VM that is in doubt".into());
            }
            // whatever goes wrong leaves the doubt as it is
            let _ = self.repeat_run();
        }
        if self.source.phase() == SourcePhase::Serving && !self.source_dead {
            error = self.serve(&mut Linear::default()).err();
        }
        if self.source.phase() == SourcePhase::Completed {
            error = None;
        }
        if self.source.owns() {
            self.give_back();
            if self.connected
                && let Some(abandon) = self.source.abandon()
            {
                let _ = self.deliver(abandon);
            }
            self.source.link_lost();
        } else if self.connected {
            let _ = self.deliver(Control::Done);
        }
        self.disconnect();
        if let Some(paused) = self.paused_at {
            self.attempt.downtime.get_or_insert(self.clock - paused);
        }
        self.attempt.total = self.clock - self.began;
        self.attempt.error = error;
        std::mem::replace(&mut self.attempt, Attempt::new())
    }

    /// Who owns the VM now.
    pub fn owner(&self) -> Owner {
        match (self.source.owns() && !self.source_dead, self.destination.phase()) {
            (_, DestinationPhase::Running) => Owner::Destination,
            (true, _) => Owner::Source,
            (false, _) => Owner::InDoubt,
        }
    }

    /// Whether the guest runs, anywhere.
    pub fn guest_runs(&self) -> bool {
        self.source_runs || self.destination_runs
    }

    /// How many actions there were.
    pub fn actions(&self) -> u64 {
        self.actions
    }

    /// Where the destination stands.
    pub fn destination_phase(&self) -> DestinationPhase {
        self.destination.phase()
    }

    /// The throttle in force at the source.
    pub fn throttle_in_force(&self) -> u8 {
        self.throttle
    }

    /// Whether the source still tracks dirty pages.
    pub fn is_tracking(&self) -> bool {
        self.tracking
    }

    /// What was seen that must never be: two owners, a lost page, a stale page.
    pub fn broken(&self) -> &[String] {
        &self.broken
    }

    /// The source dies, and with it whatever it runs.
    pub fn kill_source(&mut self) {
        self.source_dead = true;
        self.source_runs = false;
        self.disconnect();
    }

    /// A person adopts the VM at the destination.
    pub fn adopt(&mut self) -> bool {
        match self.destination.adopt() {
            Ok(action) => {
                self.destination_does(action);
                true
            }
            Err(_) => false,
        }
    }

    // ---- the link --------------------------------------------------------------------------------------------

    fn connect(&mut self, strategy: &str) -> Result<(), MigrationError> {
        self.connected = true;
        let region = RamRegion { gpa: 0, len: self.config.pages * PAGE_SIZE as u64 };
        let layout = RamLayout::new(vec![region]).map_err(|e| MigrationError::GaveUp(e.to_string()))?;
        let (host_needs, config) = (Bytes::new(), Bytes::new());
        let vm = VmDescription { id: VmId([1; 16]), layout, devices: Vec::new(), host_needs, config };
        let features = if self.shared { FEATURE_SHARED_RAM } else { 0 };
        let hello = Hello { features, streams: 1, strategy: strategy.to_owned(), vm };
        self.deliver(Control::Hello(Box::new(hello)))?;
        self.expect(SourcePhase::Copying)
    }

    fn disconnect(&mut self) {
        if std::mem::take(&mut self.connected) {
            self.destination_loss();
        }
    }

    fn destination_loss(&mut self) {
        if self.destination.link_lost() == OnDestinationLoss::Discard {
            self.copy = None;
        }
    }

    /// One action; the link may be lost right after it.
    fn act(&mut self, bytes: u64) -> Result<(), MigrationError> {
        self.actions += 1;
        self.pass(Duration::from_secs_f64(bytes as f64 / self.config.bytes_per_second) + self.config.latency / 2);
        if self.config.cuts.contains(&self.actions) && self.connected {
            self.attempt.cuts += 1;
            self.connected = false;
            self.destination_loss();
        }
        if self.connected { Ok(()) } else { Err(link_error()) }
    }

    /// Sends a frame, and all that is said because of it.
    fn deliver(&mut self, frame: Control) -> Result<(), MigrationError> {
        let bytes = frame.encode(0, 0, self.epoch).len() as u64;
        self.act(0)?;
        let action = self.destination.handle(self.source.epoch(), frame);
        let replies = match action {
            Ok(action) => self.destination_does(action),
            Err(violation) => vec![Control::error(violation.code, violation.to_string())],
        };
        self.check();
        self.act(bytes)?;
        for reply in replies {
            self.answer(reply)?;
        }
        Ok(())
    }

    fn answer(&mut self, frame: Control) -> Result<(), MigrationError> {
        self.act(0)?;
        let event = self.source.handle(self.source.epoch(), frame)?;
        self.act(40)?;
        match event {
            SourceEvent::Refused(code, text) => Err(MigrationError::Peer { code, text }),
            SourceEvent::Running => {
                if let Some(paused) = self.paused_at {
                    self.attempt.downtime.get_or_insert(self.clock - paused);
                }
                Ok(())
            }
            SourceEvent::Missing { first, bitmap } => {
                add_missing(&mut self.post_copy.listed, first, &bitmap).map_err(Into::into)
            }
            SourceEvent::Resume { .. } => {
                let none = PageSet::empty(self.config.pages);
                let lacking = std::mem::replace(&mut self.post_copy.listed, none);
                Ok(self.source_map.lacking(&lacking)?)
            }
            _ => Ok(()),
        }
    }

    fn destination_does(&mut self, action: DestinationAction) -> Vec<Control> {
        match action {
            DestinationAction::Build { .. } => {
                self.copy = Some(vec![0; self.config.pages as usize]);
                self.destination_map = PageMap::new(self.config.pages);
                let session = SessionToken([1; 16]);
                let welcome = Control::Welcome(Welcome { version: 1, features: 0, streams: 1, session });
                let mut replies = vec![welcome];
                replies.extend(self.destination.prepared(Some(self.config.load_time)).ok());
                replies
            }
            DestinationAction::Missing { first, bitmap } => {
                let mut missing = PageSet::empty(self.config.pages);
                let added = add_missing(&mut missing, first, &bitmap).map_err(MigrationError::from);
                let left = added.and_then(|()| Ok(self.destination_map.leave_behind(&missing)?));
                self.note_broken(left);
                Vec::new()
            }
            DestinationAction::Load { state, .. } => {
                let failing = self.loads < self.config.failing_loads;
                self.loads += 1;
                self.pass(self.config.load_time);
                if failing || VmState::decode(&state).is_err() {
                    self.destination_loss();
                    return vec![Control::error(crate::wire::ErrorCode::State, "the state cannot be loaded")];
                }
                self.destination.loaded().into_iter().collect()
            }
            DestinationAction::Start { running } => {
                self.check_copy();
                self.destination_runs = running;
                self.running()
            }
            DestinationAction::AnswerRunning => self.running(),
            DestinationAction::Discard(_) => {
                self.copy = None;
                Vec::new()
            }
            DestinationAction::Pong => vec![Control::Pong],
            DestinationAction::None | DestinationAction::Finish | DestinationAction::LoadPiece(_) => Vec::new(),
        }
    }

    /// Says that the VM runs, and on a new link what it lacks.
    fn running(&mut self) -> Vec<Control> {
        let mut replies = vec![Control::Running];
        if self.destination_map.left_behind().is_empty() {
            return replies;
        }
        let missing = self.destination_map.missing();
        if missing.is_empty() {
            replies.extend(self.destination.complete().map(|()| Control::Complete(FaultSummary::default())).ok());
        } else if self.post_copy.reattached {
            replies.extend(missing_frames(missing));
            replies.push(Control::PostCopy { missing: missing.len(), demand_lanes: 0 });
        }
        replies
    }

    /// All pages that the destination has, it has as they were last.
    fn check_copy(&mut self) {
        let Some(copy) = &self.copy else {
            return self.broken.push("the destination starts a VM that it does not have".into());
        };
        if self.shared {
            // both have the same
            return;
        }
        let missing = self.destination_map.missing();
        let pages = copy.iter().zip(&self.memory).enumerate();
        let counts = |page| !missing.contains(page) && !self.free.contains(page);
        let stale = pages.filter(|&(page, (a, b))| a != b && counts(page as u64)).count();
        if stale > 0 {
            self.broken.push(format!("{stale} pages are stale or lost at the destination"));
        }
    }

    /// Pages of which each moves once arrive behind the guest's back.
    fn install(&mut self, range: PageRange) -> Result<(), MigrationError> {
        self.act(range.bytes())?;
        if let Some(copy) = &mut self.copy {
            for page in range.pages() {
                copy[page as usize] = self.memory[page as usize];
            }
        }
        let arrived = self.destination_map.claim(range).and_then(|()| self.destination_map.arrived(range));
        self.note_broken(arrived.map_err(Into::into));
        if self.destination_map.missing().is_empty() && self.destination.complete().is_ok() {
            self.check_copy();
            self.act(0)?;
            return self.answer(Control::Complete(FaultSummary::default()));
        }
        self.act(0)
    }

    fn push(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError> {
        while self.source.phase() == SourcePhase::Serving {
            if let Some(page) = self.post_copy.waiting {
                self.act(0)?;
                for range in self.source_map.claim_block(page, 1) {
                    self.install(range)?;
                }
                order.fault(page);
                self.post_copy.waiting = None;
            } else if let Some(range) = self.next_push(order) {
                self.source_map.claim(range)?;
                self.install(range)?;
            } else {
                // all was sent, and the link has not said that it was lost: that would be for ever
                return Err(link_error());
            }
        }
        Ok(())
    }

    /// What `order` pushes next. One that is wrong is told of, and pages go one after the other in its place.
    fn next_push(&mut self, order: &mut dyn PushOrder) -> Option<PageRange> {
        let (unsent, most) = (self.source_map.unclaimed(), self.config.chunk.max(1));
        match checked_next(order, unsent, most) {
            Ok(range) => range,
            Err(why) => {
                let range = Linear::default().next(unsent, most);
                if self.broken.last() != Some(&why) {
                    self.broken.push(why);
                }
                range
            }
        }
    }

    fn touch(&mut self, time: Duration) {
        let (rate, random) = match self.config.touching {
            Touching::Nothing => return,
            Touching::Sequential { pages_per_second } => (pages_per_second, false),
            Touching::Random { pages_per_second } => (pages_per_second, true),
        };
        let state = &mut self.post_copy;
        if state.waiting.is_some() {
            return;
        }
        state.touches += rate * time.as_secs_f64();
        while state.touches >= 1.0 && state.waiting.is_none() {
            state.touches -= 1.0;
            let n = state.touched;
            state.touched += 1;
            // any odd multiplier spreads the numbers over all pages
            let page = if random { n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16 } else { n } % self.config.pages;
            if self.destination_map.missing().contains(page) {
                self.attempt.faults += 1;
                state.waiting = Some(page);
            }
        }
    }

    fn repeat_run(&mut self) -> Result<(), MigrationError> {
        // a new connection
        self.connected = true;
        self.post_copy.reattached = true;
        self.post_copy.listed.clear();
        self.pass(Duration::from_millis(100));
        for frame in self.source.reattach(VmId([1; 16]))? {
            self.deliver(frame)?;
        }
        if self.source.phase() == SourcePhase::Serving {
            return Ok(());
        }
        self.expect(SourcePhase::Completed)
    }

    fn expect(&self, phase: SourcePhase) -> Result<(), MigrationError> {
        if self.source.phase() == phase {
            return Ok(());
        }
        Err(MigrationError::GaveUp(format!("the source is {:?} where {phase:?} is due", self.source.phase())))
    }

    // ---- the guest -------------------------------------------------------------------------------------------

    fn pass(&mut self, time: Duration) {
        self.clock += time;
        if self.destination_runs {
            self.touch(time);
        }
        if !self.source_runs {
            return;
        }
        while let Some(&(_, range)) = self.config.freeing.get(self.freed).filter(|(at, _)| *at <= self.clock) {
            self.free.insert_range(range);
            self.freed += 1;
        }
        match self.config.dirtying.clone() {
            Dirtying::Idle => {}
            Dirtying::Rate { pages_per_second, working_set } => {
                let share = 1.0 - f64::from(self.throttle) / 100.0;
                let before = self.writes as u64;
                self.writes += pages_per_second * share * time.as_secs_f64();
                let set = working_set.clamp(1, self.config.pages);
                let many = (self.writes as u64 - before).min(set);
                for page in (before..before + many).map(|n| n % set) {
                    self.write(page);
                }
            }
            Dirtying::Script(script) => {
                while let Some(&(_, range)) = script.get(self.scripted).filter(|(at, _)| *at <= self.clock) {
                    range.pages().for_each(|page| self.write(page));
                    self.scripted += 1;
                }
            }
        }
    }

    fn write(&mut self, page: u64) {
        if let Some(version) = self.memory.get_mut(page as usize) {
            // in this order: see `SourceVm::free_pages`
            self.free.remove(page);
            self.written += 1;
            *version = self.written;
            if self.tracking {
                self.dirty.insert(page);
            }
        }
    }

    fn note_broken(&mut self, result: Result<(), MigrationError>) {
        if let Err(error) = result {
            self.broken.push(error.to_string());
        }
    }

    /// What must hold at any moment.
    fn check(&mut self) {
        if self.source_runs && self.destination_runs {
            self.broken.push(format!("two owners run the VM after action {}", self.actions));
        }
        if self.source_runs && !self.source.owns() {
            self.broken.push(format!("the source runs a VM that it does not own after action {}", self.actions));
        }
    }

    fn give_back(&mut self) {
        self.throttle = 0;
        self.tracking = false;
        self.dirty.clear();
        self.source_map = PageMap::new(self.config.pages);
        self.source_runs = !self.source_dead;
        self.check();
    }

    /// Sends `pages`, until all are there or `enough` says so before the next chunk. Returns those that were sent.
    fn transfer(&mut self, pages: &PageSet, enough: impl Fn(&Self) -> bool) -> Result<PageSet, MigrationError> {
        let mut sent = PageSet::empty(pages.capacity());
        for range in pages.ranges() {
            let mut at = range.first;
            while at < range.end() {
                if enough(self) {
                    return Ok(sent);
                }
                let chunk = PageRange::new(at, self.config.chunk.max(1).min(range.end() - at));
                // what the page holds when it is read; the guest goes on while it travels
                let versions: Vec<u64> = chunk.pages().map(|p| self.memory[p as usize]).collect();
                self.act(chunk.bytes())?;
                if let Some(copy) = self.copy.as_mut().filter(|_| self.destination.accepts_pages()) {
                    for (page, version) in chunk.pages().zip(versions) {
                        copy[page as usize] = version;
                    }
                    let received = self.destination_map.received(chunk);
                    self.note_broken(received.map_err(Into::into));
                }
                self.act(0)?;
                sent.insert_range(chunk);
                at = chunk.end();
            }
        }
        Ok(sent)
    }

    fn timed_out(&self) -> bool {
        self.config.timeout.is_some_and(|timeout| self.clock - self.began >= timeout)
    }
}

impl Attempt {
    fn new() -> Self {
        Self {
            error: None,
            downtime: None,
            predicted_downtime: None,
            stalled: None,
            total: Duration::ZERO,
            rounds: Vec::new(),
            spared: 0,
            cuts: 0,
            throttle_percent: 0,
            faults: 0,
            recoveries: 0,
        }
    }
}

impl Verbs for Simulation {
    fn pages(&self) -> u64 {
        self.config.pages
    }

    fn start_tracking(&mut self) -> Result<PageSet, MigrationError> {
        self.tracking = true;
        self.source_map.dirtied(&PageSet::full(self.config.pages))?;
        self.spare();
        Ok(self.source_map.unsent().clone())
    }

    fn send(&mut self, pages: &PageSet) -> Result<Round, MigrationError> {
        let (began, generation) = (self.clock, self.source.begin_round()?);
        self.source_map.sending(pages)?;
        let sent = self.transfer(pages, Self::timed_out)?;
        self.answer(Control::RoundReceived { generation })?;
        self.source_map.acknowledged(&sent)?;
        let (sent, time) = (sent.len(), self.clock - began);
        self.attempt.rounds.push(sent);
        if time > Duration::ZERO && sent > 0 {
            self.link.0 = (sent * PAGE_SIZE as u64) as f64 / time.as_secs_f64();
        }
        Ok(Round { generation, asked: pages.len(), sent, wire_bytes: sent * PAGE_SIZE as u64, time })
    }

    fn harvest(&mut self) -> Result<PageSet, MigrationError> {
        let pages = std::mem::replace(&mut self.dirty, PageSet::empty(self.config.pages));
        self.source_map.dirtied(&pages)?;
        self.spare();
        Ok(self.source_map.unsent().clone())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), MigrationError> {
        self.throttle = percent;
        self.attempt.throttle_percent = self.attempt.throttle_percent.max(percent);
        Ok(())
    }

    fn link(&self) -> Link {
        Link {
            bytes_per_second: self.link.0,
            bytes_per_page: self.link.1,
            seconds_per_page: 0.0,
            fixed_downtime: self.config.latency * (4 + self.state_chunks())
                + self.config.save_time
                + self.config.load_time,
            round_trip: self.config.latency * 2,
            round_trips: self.attempt.rounds.len() as u32 + 1,
            state_bytes: self.config.state_bytes as u64,
            pending_bytes: 0,
            downtime_limit: self.config.downtime_limit,
            elapsed: self.clock - self.began,
            timed_out: self.timed_out(),
            stop_on_timeout: self.config.stop_on_timeout,
            post_copy_on_timeout: self.config.post_copy_on_timeout,
            impact: self.config.impact,
            can_post_copy: true,
            post_copy_wanted: self.config.post_copy_on_timeout && self.timed_out(),
        }
    }

    fn expect_downtime(&mut self, prediction: Duration) {
        self.attempt.predicted_downtime = Some(prediction);
    }

    fn stalled(&mut self, why: &str) {
        self.attempt.stalled = Some(why.to_owned());
    }

    fn pause(&mut self) -> Result<(), MigrationError> {
        self.source_runs = false;
        self.paused_at = Some(self.clock);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MigrationError> {
        self.source_runs = true;
        self.source_map.taken_back();
        self.check();
        Ok(())
    }

    fn send_rest(&mut self, pages: PageSet) -> Result<(), MigrationError> {
        self.offer(pages, false)
    }

    fn hand_over(&mut self, missing: PageSet) -> Result<(), MigrationError> {
        if self.source.phase() == SourcePhase::Copying {
            self.offer(missing, true)?;
        } else if !missing.is_empty() {
            return Err(MigrationError::Blocked("the state was sent already".into()));
        }
        let run = self.source.run()?;
        self.deliver(run)?;
        if self.source.phase() == SourcePhase::Serving { Ok(()) } else { self.expect(SourcePhase::Completed) }
    }

    fn left_behind(&self) -> u64 {
        self.source_map.left_behind().len()
    }

    fn serve(&mut self, order: &mut dyn PushOrder) -> Result<(), MigrationError> {
        order.begin(self.source_map.unclaimed(), &[]);
        while self.source.phase() == SourcePhase::Serving {
            if self.push(order).is_err() {
                self.attempt.recoveries += 1;
                // whatever goes wrong leaves it as it is
                while self.source.phase() == SourcePhase::Serving && self.repeat_run().is_err() {}
            }
        }
        Ok(())
    }
}

impl Simulation {
    /// Leaves out the pages that are free, as the engine does.
    fn spare(&mut self) {
        if self.config.freeing.is_empty() {
            return;
        }
        // the guest goes on between tracker and look, so that the wrong order of the two would be seen
        self.pass(LOOK);
        let before = self.source_map.unsent().len();
        self.source_map.free_for_now(&self.free);
        self.attempt.spared += before - self.source_map.unsent().len();
    }

    /// The encoded state.
    fn state(&self) -> Bytes {
        let data = Bytes::from(vec![0; self.config.state_bytes]);
        Bytes::from(VmState { sections: vec![Section { name: "vm".into(), instance: 0, version: 1, data }] }.encode())
    }

    /// In how many frames it travels.
    fn state_chunks(&self) -> u32 {
        self.config.state_bytes.div_ceil(STATE_CHUNK).max(1) as u32
    }

    /// Offers the VM, with `pages` and what saving the state dirtied sent along, or left behind.
    fn offer(&mut self, pages: PageSet, leave: bool) -> Result<(), MigrationError> {
        self.pass(self.config.save_time);
        // saving the state dirties a page, as kvmclock and steal time do
        self.write(self.config.pages - 1);
        self.source_map.sending(&pages)?;
        let rest = self.harvest()?;
        if self.shared {
            // it is there already
        } else if leave {
            for frame in missing_frames(&rest) {
                self.deliver(frame)?;
            }
            let (end, _) = self.source.post_copy(rest.len(), 1)?;
            self.deliver(end)?;
            self.source_map.leave_behind(&rest)?;
        } else {
            self.source.begin_round()?;
            self.attempt.rounds.push(rest.len());
            self.transfer(&rest, |_| false)?;
        }
        let state = self.state();
        for at in (0..state.len()).step_by(STATE_CHUNK) {
            self.deliver(Control::State(state.slice(at..state.len().min(at + STATE_CHUNK))))?;
        }
        let offer = self.source.offer(state.len() as u64, true)?;
        self.deliver(offer)?;
        self.expect(SourcePhase::Ready)
    }
}

fn link_error() -> MigrationError {
    MigrationError::link("the simulated link")(io::ErrorKind::ConnectionReset.into())
}
