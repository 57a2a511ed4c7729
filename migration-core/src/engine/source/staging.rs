//! Protection of a VM: a copy of the VM is kept ready in page stores, and no destination is known
//! until a command names one.
//!
//! A session has many attempts, and each attempt has its own destination and epoch. The tracker,
//! the page map and the namespaces last as long as the session. An attempt that fails before *run*
//! therefore loses nothing that a store has, and the protection continues with the same map.

use super::*;
use crate::{
    channel::Channel,
    engine::{
        handle::{EvictTo, StagingState},
        limits::check_description,
    },
    store::Purpose,
    strategy::{Destination, Place, Until, Wake},
};

/// The first interval at which a wait counts the written pages, if they are to be counted. A
/// tracker does not report writes by itself.
const FIRST_DIRTY_LOOK: Duration = Duration::from_millis(20);
/// The longest such interval, unless a harvest takes long.
const LONGEST_DIRTY_LOOK: Duration = Duration::from_secs(1);
/// Harvests take at most one part in this many of the time.
const LOOK_SHARE: u32 = 50;

/// Protects `vm` by `strategy`, which [connects by itself](Strategy::connects_itself). Returns when
/// the VM was evicted or the protection has ended. No destination is known meanwhile.
///
/// The controller of `commands` [evicts](super::super::Controller::evict) the VM to a destination
/// that is named only then, [ends](super::super::Controller::stage_off) the protection, and
/// [cancels](super::super::Controller::cancel) an eviction that is under way. After an eviction
/// that fails before *run*, the VM is still here, protected as before, and the next command may
/// name another destination.
///
/// The report is that of the eviction, and its `total` counts from the command on. Without an
/// eviction, it counts from the beginning, and the outcome is `Cancelled`, or `Failed` if the guest
/// has ended or the VM cannot be protected. The namespaces that were created are forgotten then
/// (rule 14). In every outcome but `Completed` the guest runs on here as it did before.
///
/// The dirty tracker has only one consumer: a snapshot or another migration has to wait until this
/// function has returned.
pub fn stage(
    vm: &mut dyn SourceVm,
    strategy: &mut dyn Strategy,
    options: &SourceOptions,
    commands: Commands,
) -> Report {
    let options = &SourceOptions { observer: Guarded::around(&options.observer), ..options.clone() };
    let named = Named::of(strategy);
    lock(&commands.requests).begin(named.can_switch_over);
    let mut engine = Engine::new(vm, &Nowhere, named, options, commands);
    engine.staging = Some(Staging::default());
    let result = engine.protect(strategy);
    engine.conclude(result)
}

/// The connector of a session in which no destination is known yet.
struct Nowhere;

impl Connector for Nowhere {
    fn connect(&self) -> io::Result<Box<dyn Channel>> {
        Err(io::Error::new(io::ErrorKind::NotFound, "no command has named a destination"))
    }

    fn address(&self) -> String {
        "no destination".into()
    }
}

/// The state of a session that lasts longer than one attempt.
#[derive(Default)]
pub(super) struct Staging {
    /// The command that the strategy has not taken yet.
    command: Option<EvictTo>,
    /// The command whose attempt is under way.
    taken: Option<EvictTo>,
    increments: u64,
    last_increment: Option<Instant>,
    failed_evictions: u64,
    last_failure: Option<String>,
}

impl Engine<'_> {
    /// Returns whether there is a link to a destination, or the VM was handed over.
    pub(super) fn is_connected(&self) -> bool {
        self.peer.control.is_some() || !self.machine.owns()
    }

    /// Returns whether the VM is protected, and no eviction of it is under way.
    pub(super) fn is_idly_staged(&self) -> bool {
        self.staging.as_ref().is_some_and(|staging| staging.taken.is_none())
    }

    /// Returns whether a command has come that the strategy has not taken.
    pub(super) fn is_commanded(&self) -> bool {
        self.staging.as_ref().is_some_and(|staging| staging.command.is_some())
    }

    /// Records a command.
    pub(super) fn commanded(&mut self, command: EvictTo) {
        if let Some(staging) = &mut self.staging {
            staging.command = Some(command);
        }
    }

    /// Handles a cancel while no eviction is under way: a command that the strategy has not taken
    /// yet is dropped.
    pub(super) fn withdraw(&mut self, why: &str) {
        let Some(command) = self.staging.as_mut().and_then(|staging| staging.command.take()) else { return };
        self.eviction_failed(&command.to, format!("cancelled: {why}"));
    }

    fn protect(&mut self, strategy: &mut dyn Strategy) -> Result<(), MigrationError> {
        self.begin_staging(strategy)?;
        loop {
            let Err(error) = strategy.migrate(Running::new(self)) else { return Ok(()) };
            let cancelled = matches!(self.over, Some(Over::Cancelled(_)));
            let ended = self.over.is_some() && !cancelled;
            // A strategy that fails while it only keeps the copy would fail again.
            if !self.machine.owns() || ended || self.is_idly_staged() && !cancelled {
                return Err(error);
            }
            self.end_attempt(&error);
            self.over = None;
        }
    }

    /// Creates the namespaces. Returns an error if the VM cannot be protected.
    fn begin_staging(&mut self, strategy: &dyn Strategy) -> Result<(), MigrationError> {
        let places = strategy.stores();
        let staged = |place: &Place| matches!(place, Place::Stores { purpose: Purpose::Stage, .. });
        let why = if places.is_empty() || !places.iter().all(staged) {
            "it does not keep a copy of the VM in page stores"
        } else if !strategy.connects_itself() {
            "it needs its destination from the beginning"
        } else if strategy.shares_ram() || strategy.needs_store() {
            "it moves no VM through page stores"
        } else if self.options.stores.is_none() {
            "there are no page stores here"
        } else if self.options.fail_safe.is_some() {
            "fail-safe post-copy is on, which does not go with page stores"
        } else if self.options.demand_lanes == 0 {
            "demand lanes are off, so that no destination could fetch pages from page stores"
        } else {
            ""
        };
        if !why.is_empty() {
            return Err(MigrationError::Blocked(format!("{} cannot protect a VM: {why}", strategy.name())));
        }
        let memory = self.vm.paged_memory();
        if memory.is_some_and(|memory| memory.map().read(|map| !map.missing().is_empty())) {
            return Err(MigrationError::Blocked("pages of the VM are in page stores already".into()));
        }
        if let Some(why) = self.vm.blocked(self.strategy.name) {
            return Err(MigrationError::Blocked(why));
        }
        let description = self.vm.describe().map_err(MigrationError::vm("describing the VM"))?;
        check_description(&description)?;
        self.id = description.id;
        self.uses_stores = true;
        self.places.wanted.clone_from(&places);
        for place in places {
            self.open_place(place)?;
        }
        lock(&self.requests).eviction = Ok(());
        self.report_staging();
        Ok(())
    }

    /// Returns the connector of the destination that the command has named.
    pub(super) fn commanded_way(&self, to: &Destination) -> Result<Arc<dyn Connector>, MigrationError> {
        let command = self.staging.as_ref().and_then(|staging| staging.taken.as_ref());
        let command = command.filter(|command| command.to == *to);
        let connector = command.map(|command| command.connector.clone());
        connector.ok_or_else(|| MigrationError::Blocked(format!("no command has named {to}")))
    }

    /// Builds the VM at the destination that a command has named, and sends all locations. If that
    /// fails, the VM is protected as before.
    pub(super) fn begin_eviction(&mut self) -> Result<(), MigrationError> {
        self.rounds.map().nothing_announced();
        let connected = self.open_session();
        if let Err(error) = &connected {
            self.end_attempt(error);
        }
        connected
    }

    /// Ends an attempt that has failed before *run*. The guest runs on here, and nothing that was
    /// sent in this attempt counts (rule 18).
    fn end_attempt(&mut self, error: &MigrationError) {
        // Resume first: all the time until then is downtime.
        self.resume_guest();
        self.guest = Guest::default();
        self.leave_destination(error);
        self.close();
        // Inputs of lanes that have ended.
        while let Ok(input) = self.inputs.try_recv() {
            self.take_leftover(input);
        }
        {
            let mut map = self.rounds.map();
            map.taken_back();
            map.nothing_announced();
        }
        self.places.end_session();
        let epoch = self.machine.epoch().saturating_add(1);
        self.machine = SourceMachine::new(epoch);
        self.peer = Peer::new(self.peer.connector);
        self.measured = Measured::new();
        self.lanes_done = 0;
        let heat = std::mem::take(&mut self.post_copy.heat);
        self.post_copy = PostCopy { heat, ..PostCopy::new(Left::new(self.rounds.shared_map())) };
        self.report = first_report(self.strategy.name, epoch, self.report.pages.total, self.options);
        lock(&self.requests).begin(self.strategy.can_switch_over);
        if let Some(command) = self.staging.as_mut().and_then(|staging| staging.taken.take()) {
            self.eviction_failed(&command.to, describe(error));
        }
    }

    fn eviction_failed(&mut self, to: &Destination, why: String) {
        let Some(staging) = &mut self.staging else { return };
        staging.failed_evictions += 1;
        staging.last_failure = Some(format!("{to}: {why}"));
        self.report_staging();
        lock(&self.requests).eviction = Ok(());
        self.options.observer.event(&Event::EvictionFailed { to: to.name().to_owned(), why });
    }

    /// Waits until the first of the conditions in `until` is met. See [`Running::wait`].
    pub(super) fn wait_until(&mut self, until: Until) -> Result<Wake, MigrationError> {
        self.check_over()?;
        if self.staging.is_none() && until.time.is_none() && until.dirty.is_none() {
            let why = "no command can come: the destination of this migration is known";
            return Err(MigrationError::Blocked(why.into()));
        }
        let far = Instant::now() + Duration::from_secs(1 << 30);
        let end = until.time.map_or(far, |time| Instant::now().checked_add(time).unwrap_or(far));
        let (mut interval, mut look) = (FIRST_DIRTY_LOOK, Instant::now());
        loop {
            if until.command
                && let Some(to) = self.take_command()
            {
                return Ok(Wake::Command(to));
            }
            let now = Instant::now();
            if let Some(pages) = until.dirty
                && now >= look
            {
                let written = self.collect()?;
                self.seen_written.union_with(&written);
                if self.seen_written.len() >= pages {
                    return Ok(Wake::Dirty);
                }
                interval = (interval * 2).min(LONGEST_DIRTY_LOOK).max(now.elapsed() * LOOK_SHARE);
                look = Instant::now() + interval;
            }
            if now >= end {
                return Ok(Wake::Time);
            }
            let next = if until.dirty.is_some() { end.min(look) } else { end };
            if let Some(Input::Control(epoch, frame)) = self.next_input(next)? {
                self.frame(epoch, frame)?;
            }
        }
    }

    /// Returns the destination that a command has named, if one has come. The eviction begins with
    /// that.
    fn take_command(&mut self) -> Option<Destination> {
        let staging = self.staging.as_mut()?;
        let command = staging.command.take()?;
        let to = command.to.clone();
        self.start = command.at;
        staging.taken = Some(command);
        Some(to)
    }

    /// Records that an increment has ended.
    pub(super) fn increment_ended(&mut self, stored: u64, failed: bool) {
        let Some(staging) = self.staging.as_mut().filter(|_| stored > 0) else { return };
        if !failed {
            staging.increments += 1;
            staging.last_increment = Some(Instant::now());
        }
        self.report_staging();
    }

    /// Reports the state of the VM's copy to controllers and the observer.
    pub(super) fn report_staging(&mut self) {
        let Some(staging) = &self.staging else { return };
        let (staged_pages, dirty_pages) = {
            let map = self.rounds.map();
            (map.with_copies().len(), map.unsent().len())
        };
        let degraded = self.places.open.iter().find_map(|open| open.degraded.clone());
        let state = StagingState {
            increments: staging.increments,
            staged_pages,
            dirty_pages,
            last_increment: staging.last_increment,
            degraded,
            failed_evictions: staging.failed_evictions,
            last_failure: staging.last_failure.clone(),
        };
        let report = state.report();
        lock(&self.requests).staging = Some(state);
        self.options.observer.event(&Event::Staging(report));
    }
}

impl Requests {
    /// Resets the answers to controllers at the beginning of a session or an attempt: the
    /// destination has not answered yet.
    fn begin(&mut self, can_switch_over: bool) {
        self.post_copy = Err(NoPostCopy::NotYet);
        self.switch_over = Err(if can_switch_over { NoSwitchOver::NotYet } else { NoSwitchOver::Strategy });
        (self.tuning, self.switch_over_wanted) = (Ok(()), false);
    }
}

/// Why a session, or an attempt, ends while the VM is ours.
pub(super) enum Over {
    /// The user has cancelled.
    Cancelled(String),
    /// The guest has ended.
    Ended(String),
    /// The user has ended the protection of the VM.
    Off,
}

impl Over {
    fn error(&self) -> MigrationError {
        match self {
            Self::Cancelled(why) => MigrationError::Cancelled(why.clone()),
            Self::Ended(why) => MigrationError::VmEnded(why.clone()),
            Self::Off => MigrationError::Cancelled("the VM is not to be protected any more".into()),
        }
    }
}

/// Ends that the user or the guest causes.
impl Engine<'_> {
    /// Returns the error that every verb returns once the user has cancelled or the guest has
    /// ended.
    pub(super) fn check_over(&self) -> Result<(), MigrationError> {
        match &self.over {
            Some(over) if self.machine.owns() => Err(over.error()),
            _ => Ok(()),
        }
    }

    /// Ends the attempt, or the session, if the VM is ours. Returns the error for the call that is
    /// under way.
    pub(super) fn end_by(&mut self, over: Over) -> Result<(), MigrationError> {
        if !self.machine.owns() {
            return Ok(());
        }
        match over {
            Over::Cancelled(why) if self.is_idly_staged() => {
                self.withdraw(&why);
                Ok(())
            }
            Over::Off if self.staging.is_none() => Ok(()),
            over => Err(self.over.insert(over).error()),
        }
    }

    /// Handles an input that no call waits for any more, because a link has ended. Commands are
    /// recorded nevertheless.
    pub(super) fn take_leftover(&mut self, input: Input) {
        // The next verb returns the error.
        let _ = match input {
            Input::Place(done) => {
                self.place_done(done);
                Ok(())
            }
            Input::Recover(connector) => {
                self.peer.elsewhere = Some(connector);
                Ok(())
            }
            Input::Evict(command) => {
                self.commanded(command);
                Ok(())
            }
            Input::VmEnded(why) => self.end_by(Over::Ended(why)),
            Input::StageOff => self.end_by(Over::Off),
            _ => Ok(()),
        };
    }
}
