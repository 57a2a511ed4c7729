//! Writes a consistent snapshot of a running VM into a store, and restores a VM from it.
//!
//! A snapshot is a pre-copy whose destination is the store. Pages are put while the guest runs.
//! Pages that it writes meanwhile are put again, as long as that reduces their number. A pause then
//! makes the snapshot consistent. It only *copies* the remaining pages in memory. They are put into
//! the store after the guest has been resumed.

use std::{
    sync::{Arc, mpsc::TryRecvError},
    time::{Duration, Instant},
};

use super::{
    estimate::Calibration,
    events::Guarded,
    handle::{Commands, Input, NoPostCopy, NoSwitchOver, NoTuning},
    limits::{check_description, check_estimate, check_state},
    pages::{Copied, not_put},
    progress::{ProgressMeter, Reading},
    rounds::{Harvest, RoundDriver},
    source::{PIECE_BUDGET, PROGRESS_INTERVAL},
};
use crate::{
    MigrationError, PAGE_SIZE, PageRange, PageSet,
    lock::lock,
    protocol::SourcePhase,
    ram::GuestRam,
    report::{Event, NoObserver, Observer, PageCounts, RoundReport, Rounds},
    snapshot::SavedVm,
    spawner::GuestImpact,
    state::{MAX_SECTIONS, MAX_STATE, Section},
    store::{PageContent, VersionStore},
    strategy::{Link, ModelConvergence, PushOrder, Round, Running, Snapshot, Strategy, Verbs},
    text::Chain,
    vm::{DestinationHost, DestinationVm, SourceVm, StateEstimate, VmDescription, VmError, VmId},
};

/// The most pages that are copied in memory during the pause. Pages beyond that are put into the
/// store while the guest waits.
const MAX_COPY: u64 = (256 << 20) / PAGE_SIZE as u64;
/// The room, in pages, for pages that the guest writes between the last harvest and the pause.
const SPARE_ROOM: u64 = 1024;
/// The lowest assumed rate of copies in memory, in bytes a second.
const COPY_SPEED: f64 = 1e9;

/// The limits and choices of one snapshot.
#[derive(Clone)]
pub struct SnapshotOptions {
    /// The longest pause that is acceptable. The guest is throttled to keep to it, as in a
    /// pre-copy.
    pub downtime_limit: Duration,
    /// The time after which the guest is paused, however many pages are left; `None` to continue
    /// the passes as long as they help.
    pub timeout: Option<Duration>,
    /// How much the guest may be disturbed.
    pub impact: GuestImpact,
    /// The epoch under which the VM is owned here.
    pub epoch: u32,
    /// Receives the events of the snapshot: progress and rounds as in a migration, with the bytes
    /// that were put in place of bytes on the wire.
    pub observer: Arc<dyn Observer>,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self {
            downtime_limit: Duration::from_millis(100),
            timeout: Some(Duration::from_secs(60)),
            impact: GuestImpact::Balanced,
            epoch: 0,
            observer: Arc::new(NoObserver),
        }
    }
}

/// The result of a snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotReport {
    /// The time from the start until the snapshot was committed.
    pub total: Duration,
    /// How long the guest was paused.
    pub downtime: Duration,
    /// The passes over the memory of the running guest. `wire_bytes` is the number of bytes that
    /// were put.
    pub rounds: Rounds,
    /// The number of pages by kind.
    pub pages: PageCounts,
    /// The number of these pages that were copied in memory during the pause.
    pub copied: u64,
    /// The number of bytes of the state and of the data that the VM is built from.
    pub state_bytes: u64,
    /// The strongest throttle that was used.
    pub throttle_percent: u8,
}

/// Puts `vm`, as it is at one moment, into `store`, and commits it as checkpoint 1. The guest runs
/// on, except for a short pause. Returns when the store has committed the snapshot.
///
/// The state of the commit is a [`SavedVm`]: [`restore`] needs nothing else. The call blocks. Run
/// it on a thread of its own, and cancel it through the [`Controller`](super::Controller) of
/// `commands`.
///
/// # Errors
/// After every error the guest runs on (unless its user had paused it), at full speed, the tracker
/// is as it was, with its dirty bits, and the store has discarded the pages that were put. Returns
/// [`MigrationError::Store`] if the store has no room or fails, [`MigrationError::Cancelled`],
/// [`MigrationError::Blocked`] if the VM cannot be saved now, [`MigrationError::VmEnded`] if its
/// guest has ended, and otherwise the error of the VMM or its tracker.
pub fn snapshot(
    vm: &mut dyn SourceVm,
    store: &mut dyn VersionStore,
    options: &SnapshotOptions,
    commands: Commands,
) -> Result<SnapshotReport, MigrationError> {
    let options = &SnapshotOptions { observer: Guarded::around(&options.observer), ..options.clone() };
    let mut requests = lock(&commands.requests);
    (requests.post_copy, requests.switch_over) = (Err(NoPostCopy::Snapshot), Err(NoSwitchOver::Snapshot));
    drop(requests);
    let mut taking = SnapshotWriter::new(vm, store, options, commands);
    let result = taking.run(&mut Snapshot::<ModelConvergence>::default());
    // A guest that stays paused is worse than any earlier error.
    let result = taking.roll_back().and(result);
    lock(&taking.commands.requests).end();
    if result.is_err() {
        taking.store.discard();
    }
    let mut report = taking.report;
    report.total = taking.start.elapsed();
    result.map(|()| report)
}

struct SnapshotWriter<'a> {
    vm: &'a mut dyn SourceVm,
    store: &'a mut dyn VersionStore,
    options: &'a SnapshotOptions,
    commands: Commands,
    ram: Arc<dyn GuestRam>,
    /// The description of the VM. Set before the strategy begins.
    description: Option<VmDescription>,
    start: Instant,
    rounds: RoundDriver,
    paused_at: Option<Instant>,
    throttle: u8,
    pieces: Vec<Section>,
    /// The pages that are copied in the pause.
    copied: Copied,
    /// The encoded VM as it was in the pause.
    saved: Vec<u8>,
    calibration: Calibration,
    meter: ProgressMeter,
    round_began: Instant,
    /// The number of pages that all passes had to put.
    pages_due: u64,
    round_put: u64,
    dirty_rate: Option<f64>,
    last_progress: Instant,
    report: SnapshotReport,
}

impl<'a> SnapshotWriter<'a> {
    fn new(
        vm: &'a mut dyn SourceVm,
        store: &'a mut dyn VersionStore,
        options: &'a SnapshotOptions,
        commands: Commands,
    ) -> Self {
        let ram = vm.ram();
        let (now, pages) = (Instant::now(), ram.layout().pages());
        let rounds = RoundDriver::new(ram.clone(), options.observer.clone());
        Self {
            vm,
            store,
            options,
            commands,
            ram,
            description: None,
            start: now,
            rounds,
            paused_at: None,
            throttle: 0,
            pieces: Vec::new(),
            copied: Copied::default(),
            saved: Vec::new(),
            calibration: Calibration::default(),
            meter: ProgressMeter::default(),
            round_began: now,
            pages_due: 0,
            round_put: 0,
            dirty_rate: None,
            last_progress: now,
            report: SnapshotReport {
                total: Duration::ZERO,
                downtime: Duration::ZERO,
                rounds: Rounds::default(),
                pages: PageCounts { total: pages, ..PageCounts::default() },
                copied: 0,
                state_bytes: 0,
                throttle_percent: 0,
            },
        }
    }

    fn run(&mut self, strategy: &mut dyn Strategy) -> Result<(), MigrationError> {
        if let Some(why) = self.vm.blocked("snapshot") {
            return Err(MigrationError::Blocked(why));
        }
        let stored = self.vm.paged_memory().map_or(0, |memory| memory.map().read(|map| map.missing().len()));
        if stored > 0 {
            let why =
                format!("{stored} pages are not in RAM but in page stores, and a snapshot does not read them there");
            return Err(MigrationError::Blocked(why));
        }
        let description = self.vm.describe().map_err(MigrationError::vm("describing the VM"))?;
        check_description(&description)?;
        self.description = Some(description);
        self.vm.start().map_err(MigrationError::vm("starting to save device state"))?;
        self.check_state_limits()?;
        strategy.migrate(Running::new(self))?;
        Ok(())
    }

    /// Copies as many of `pages` as there is room for, and puts the others, while the guest is
    /// paused.
    fn copy(&mut self, mut pages: PageSet) -> Result<(), MigrationError> {
        let mut few = PageSet::empty(pages.capacity());
        for run in pages.ranges() {
            let room = MAX_COPY - few.len();
            if room == 0 {
                break;
            }
            few.insert_range(PageRange::new(run.first, run.count.min(room)));
        }
        self.copied.take(&*self.ram, &few, None)?;
        self.report.copied = few.len();
        pages.subtract(&few);
        if pages.is_empty() { Ok(()) } else { self.put(&pages).map(drop) }
    }

    /// Performs one pass: puts `pages` into the store.
    fn put(&mut self, pages: &PageSet) -> Result<Round, MigrationError> {
        (self.round_began, self.round_put) = (Instant::now(), 0);
        self.pages_due = self.pages_due.saturating_add(pages.len());
        let throttle_percent = self.throttle;
        self.report.rounds.push(RoundReport {
            pages: pages.len(),
            wire_bytes: 0,
            time: Duration::ZERO,
            throttle_percent,
        });
        if self.report.rounds.len() == 1 {
            let reading = self.reading();
            self.meter.begin(&reading);
        }
        let rearm = self.rounds.begin(self.vm.tracker(), pages, self.paused_at.is_some())?;
        let plain = self.report.pages.plain;
        for stripe in RoundDriver::stripes(pages) {
            heard(&self.commands)?;
            let mut put = |page, data: PageContent<'_>| {
                count(&mut self.report.pages, data);
                self.store.put(page, data)
            };
            self.rounds.read(stripe, pages, rearm.as_deref(), &mut put)?;
            self.round_put += pages.count_in(stripe);
            self.report_progress();
        }
        self.rounds.arrived(pages)?;
        let wire_bytes = (self.report.pages.plain - plain) * PAGE_SIZE as u64;
        let time = self.round_began.elapsed();
        if let Some(round) = self.report.rounds.last_mut() {
            (round.wire_bytes, round.time) = (wire_bytes, time);
            self.options.observer.event(&Event::RoundEnded(*round));
        }
        let (generation, asked) = (self.report.rounds.len() as u32, pages.len());
        Ok(Round { generation, asked, sent: asked, wire_bytes, time })
    }

    /// Saves the pieces of device state that are ready, while the guest runs.
    fn save_pieces(&mut self) -> Result<(), MigrationError> {
        let (pieces, pending) =
            self.vm.iterate_state(PIECE_BUDGET).map_err(MigrationError::vm("saving a piece of device state"))?;
        self.calibration.pending(pending);
        self.pieces.extend(pieces);
        if self.pieces.len() > MAX_SECTIONS {
            let cause = VmError::new(format!("more than {MAX_SECTIONS} pieces of device state"));
            return Err(MigrationError::Vm { step: "saving a piece of device state", cause });
        }
        Ok(())
    }

    /// Asks the VMM how much state the pause will have to save, while the guest still runs. Returns
    /// an error if a snapshot cannot hold it.
    fn check_state_limits(&mut self) -> Result<(), MigrationError> {
        self.calibration.saves(self.vm.estimate_state());
        let unknown = StateEstimate::default();
        let pieces: usize = self.pieces.iter().map(|piece| piece.data.len()).sum();
        let besides = self.calibration.pending_bytes().saturating_add(pieces as u64);
        check_estimate(self.calibration.state().unwrap_or(&unknown), besides)
    }

    /// Returns the longest acceptable pause, as it was set last.
    fn downtime_limit(&self) -> Duration {
        lock(&self.commands.requests).downtime_limit.unwrap_or(self.options.downtime_limit)
    }

    /// Resumes a guest that is paused.
    fn go_on(&mut self) -> Result<(), MigrationError> {
        let Some(paused) = self.paused_at.take() else { return Ok(()) };
        let resumed = self.vm.resume().map_err(MigrationError::vm("resuming the guest"));
        self.report.downtime = paused.elapsed();
        resumed
    }

    fn give_tracker_back(&mut self) {
        if let Err(error) = self.rounds.give_tracker_back(self.vm.tracker()) {
            self.options.observer.event(&Event::Warning(format!("stopping the tracker: {}", Chain(&error))));
        }
    }

    /// Restores the state before the snapshot: the guest runs at full speed, and its dirty bits are
    /// complete.
    ///
    /// # Errors
    /// Returns an error if the guest cannot be resumed. Everything else is restored nevertheless.
    fn roll_back(&mut self) -> Result<(), MigrationError> {
        let resumed = self.go_on();
        self.lift_throttle();
        self.give_tracker_back();
        resumed
    }

    fn lift_throttle(&mut self) {
        if std::mem::take(&mut self.throttle) != 0
            && let Err(error) = self.vm.throttle(0)
        {
            self.options.observer.event(&Event::Warning(format!("lifting the throttle: {}", Chain(&error))));
        }
    }

    fn report_progress(&mut self) {
        if self.last_progress.elapsed() < PROGRESS_INTERVAL {
            return;
        }
        self.last_progress = Instant::now();
        let reading = self.reading();
        let progress = self.meter.read(&reading);
        self.options.observer.event(&Event::Progress(progress));
    }

    fn reading(&self) -> Reading {
        let round_pages = self.report.rounds.last().map_or(0, |round| round.pages);
        Reading {
            at: self.start.elapsed(),
            phase: SourcePhase::Copying,
            wire_bytes: self.report.pages.plain * PAGE_SIZE as u64,
            round: self.report.rounds.len() as u32,
            round_pages,
            round_sent: self.round_put,
            earlier_pages: self.pages_due.saturating_sub(round_pages),
            missing: 0,
            served: 0,
            total: self.report.pages.total,
            dirty_pages_per_second: self.dirty_rate,
            throttle_percent: self.throttle,
            link: self.link(),
        }
    }
}

impl Verbs for SnapshotWriter<'_> {
    fn pages(&self) -> u64 {
        self.report.pages.total
    }

    fn start_tracking(&mut self) -> Result<PageSet, MigrationError> {
        let pages = self.rounds.start(self.vm)?;
        self.report.pages.hole = self.rounds.counts().holes;
        Ok(pages)
    }

    fn send(&mut self, pages: &PageSet) -> Result<Round, MigrationError> {
        self.save_pieces()?;
        self.put(pages)
    }

    fn harvest(&mut self) -> Result<PageSet, MigrationError> {
        let Harvest { pages, time, .. } = self.rounds.harvest(self.vm)?;
        let time = time.as_secs_f64();
        if self.paused_at.is_none() {
            self.dirty_rate = (time > 0.0).then(|| pages.len() as f64 / time);
        }
        Ok(self.rounds.due())
    }

    fn link(&self) -> Link {
        let known = self.calibration.describe(Link {
            downtime_limit: self.downtime_limit(),
            elapsed: self.start.elapsed(),
            timed_out: self.options.timeout.is_some_and(|timeout| self.start.elapsed() >= timeout),
            stop_on_timeout: true,
            impact: self.options.impact,
            ..Link::default()
        });
        // The pause copies in memory, and no destination loads the state.
        let fixed_downtime = self.calibration.pause_and_save();
        Link { bytes_per_second: COPY_SPEED, bytes_per_page: PAGE_SIZE as f64, fixed_downtime, ..known }
    }

    fn throttle(&mut self, percent: u8) -> Result<(), MigrationError> {
        self.vm.throttle(percent).map_err(MigrationError::vm("throttling the guest"))?;
        self.throttle = percent;
        self.report.throttle_percent = self.report.throttle_percent.max(percent);
        Ok(())
    }

    fn expect_downtime(&mut self, _: Duration) {}

    fn pause(&mut self) -> Result<(), MigrationError> {
        // The room is allocated before the pause, in which there is no time for that.
        self.copied = Copied::with_room(self.rounds.due().len().saturating_add(SPARE_ROOM).min(MAX_COPY));
        self.check_state_limits()?;
        self.paused_at = Some(Instant::now());
        // The limit affects no decision any more.
        lock(&self.commands.requests).tuning = Err(NoTuning::TooLate);
        self.vm.pause().map_err(MigrationError::vm("pausing the guest"))
    }

    fn resume(&mut self) -> Result<(), MigrationError> {
        self.go_on()
    }

    /// Saves the state, and copies the pages that are not in the store.
    fn send_rest(&mut self, pages: PageSet) -> Result<(), MigrationError> {
        let state = self.vm.save_state().map_err(MigrationError::vm("saving the state"))?;
        check_state(&state)?;
        self.rounds.map().sending(&pages)?;
        // The harvest comes after saving, because saving dirties pages, too.
        let rest = self.harvest()?;
        self.copy(rest)?;
        let vm =
            self.description.take().ok_or_else(|| MigrationError::Blocked("the state was saved already".into()))?;
        let (running, pieces) = (self.vm.starts_running(), std::mem::take(&mut self.pieces));
        self.saved = SavedVm { vm, epoch: self.options.epoch, running, pieces, state }.encode();
        self.report.state_bytes = self.saved.len() as u64;
        if self.saved.len() > MAX_STATE {
            let cause = VmError::new(format!("{} bytes, above the limit of {MAX_STATE}", self.saved.len()));
            return Err(MigrationError::Vm { step: "saving the state", cause });
        }
        Ok(())
    }

    fn hand_over(&mut self, _: PageSet) -> Result<(), MigrationError> {
        Err(MigrationError::Blocked("a snapshot has no destination".into()))
    }

    fn missing_at_hand_over(&self) -> u64 {
        0
    }

    fn serve(&mut self, _: &mut dyn PushOrder) -> Result<(), MigrationError> {
        Err(MigrationError::Blocked("a snapshot has no destination".into()))
    }

    /// Commits the snapshot. The guest has been resumed, so neither throttle nor tracker is needed
    /// while the remaining pages are put into the store.
    fn commit(&mut self) -> Result<(), MigrationError> {
        if self.saved.is_empty() {
            return Err(MigrationError::Blocked("no state was saved".into()));
        }
        self.lift_throttle();
        self.give_tracker_back();
        let rest = self.rounds.due();
        for (n, (page, data)) in self.copied.pages().enumerate() {
            if n.is_multiple_of(512) {
                heard(&self.commands)?;
            }
            self.store.put(page, data).map_err(not_put)?;
            count(&mut self.report.pages, data);
        }
        self.rounds.arrived(&rest)?;
        let counts = self.rounds.counts();
        (self.report.pages.free, self.report.pages.distinct) = (counts.free, counts.distinct);
        heard(&self.commands)?;
        let committing = |cause| MigrationError::Store { step: "committing the snapshot", cause };
        self.store.commit(1, std::mem::take(&mut self.saved).into()).map_err(committing)
    }
}

fn count(pages: &mut PageCounts, data: PageContent<'_>) {
    match data {
        Some(_) => pages.plain += 1,
        None => pages.zero += 1,
    }
}

/// Returns an error if the user has cancelled, or the guest has ended. Other commands have no
/// meaning here.
fn heard(commands: &Commands) -> Result<(), MigrationError> {
    loop {
        match commands.rx.try_recv() {
            Ok(Input::Cancel(why)) => return Err(MigrationError::Cancelled(why)),
            Ok(Input::VmEnded(why)) => return Err(MigrationError::VmEnded(why)),
            Ok(_) => {}
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Ok(()),
        }
    }
}

// Restoring a VM from its snapshot.

/// The limits and choices of restoring a VM.
#[derive(Clone)]
pub struct RestoreOptions {
    /// The most bytes of RAM that a VM may have.
    pub max_ram_bytes: u64,
    /// Whether the guest stays paused, even if it ran when it was saved.
    pub paused: bool,
    /// The id that the VM must have, if it is known. The snapshot of another VM is refused.
    pub expected: Option<VmId>,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self { max_ram_bytes: 1 << 40, paused: false, expected: None }
    }
}

/// The result of restoring a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestoreReport {
    /// The id of the VM, which is that of the saved VM.
    pub id: VmId,
    /// The epoch under which the VM is owned now.
    pub epoch: u32,
    /// The number of pages that hold data.
    pub pages: u64,
    /// Whether the guest runs.
    pub running: bool,
}

/// A VM that was restored from its snapshot.
#[derive(Debug)]
pub struct Restored<V> {
    /// The VM, as its host built it.
    pub vm: V,
    /// The report of the restore.
    pub report: RestoreReport,
}

/// Builds the VM that [`snapshot`] put into `store`, fills its RAM, loads its state, starts it, and
/// returns it.
///
/// It is the *same* VM, with the same [`VmId`], under a new epoch. The caller must ensure that no
/// other instance of the VM runs on the same disks and addresses. No protocol can ensure that,
/// because the snapshot may be of any age.
///
/// # Errors
/// Returns [`MigrationError::Store`] if there is no snapshot, or it is of another VM than expected,
/// damaged or cut short. Returns [`MigrationError::Vm`] if this host cannot build, load or start
/// the VM. Nothing of the VM is left then.
pub fn restore<H: DestinationHost>(
    store: &mut dyn VersionStore,
    host: &H,
    options: &RestoreOptions,
) -> Result<Restored<H::Vm>, MigrationError> {
    let unreadable = |cause| MigrationError::Store { step: "reading the snapshot", cause };
    let invalid = |why: String| unreadable(std::io::Error::new(std::io::ErrorKind::InvalidData, why));
    let (_, saved) = store.latest().ok_or_else(|| invalid("there is none".into()))?;
    let saved = SavedVm::decode(&saved).map_err(|e| invalid(e.to_string()))?;
    if let Some(expected) = options.expected.filter(|&expected| expected != saved.vm.id) {
        return Err(invalid(format!("it is of VM {}, not of VM {expected}", saved.vm.id)));
    }
    let (layout, limit) = (&saved.vm.layout, options.max_ram_bytes);
    let build = MigrationError::vm("building the VM");
    if layout.bytes() > limit {
        return Err(build(VmError::new(format!("it has {} bytes of RAM, {limit} are allowed", layout.bytes()))));
    }
    let mut vm = host.build(&saved.vm).map_err(build)?;
    let ram = vm.ram();
    if ram.layout() != layout {
        let cause = VmError::new("it was built with another RAM layout than the snapshot's");
        return Err(MigrationError::Vm { step: "building the VM", cause });
    }
    let mut pages = 0;
    let mut fill = |page, data: PageContent<'_>| {
        let memory = ram.slice(PageRange::new(page, 1)).map_err(std::io::Error::other)?;
        // RAM that was just built holds zeros.
        if let Some(data) = data {
            memory.copy_from(data);
            pages += 1;
        }
        Ok(())
    };
    store.restore(&mut fill).map_err(unreadable)?;
    for piece in &saved.pieces {
        vm.load_piece(piece).map_err(MigrationError::vm("loading a piece of device state"))?;
    }
    vm.load_state(&saved.state).map_err(MigrationError::vm("loading the state"))?;
    let running = saved.running && !options.paused;
    vm.start(running).map_err(MigrationError::vm("starting the VM"))?;
    let report = RestoreReport { id: saved.vm.id, epoch: saved.epoch.saturating_add(1), pages, running };
    Ok(Restored { vm, report })
}
