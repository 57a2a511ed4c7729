//! Migrations and snapshots that begin here, from a client's request to the result.

use super::*;
use crate::page_stores::StoresError;

impl Instance {
    pub(crate) fn migrate(
        self: &Arc<Self>,
        request: &MigrateRequest,
        progress: &mut dyn FnMut(Value),
    ) -> Result<Value, Refused> {
        self.migrate_to(None, request, progress)
    }

    /// Migrates as [`migrate`](Self::migrate) does, to the process `heir`, an encoded
    /// `ProcessIdentity`.
    pub(crate) fn migrate_to(
        self: &Arc<Self>,
        heir: Option<Vec<u8>>,
        request: &MigrateRequest,
        progress: &mut dyn FnMut(Value),
    ) -> Result<Value, Refused> {
        let to = &request.to;
        let session = request.encryption.security(Some(to))?.map(SourceSession::new);
        let through = match request.strategy {
            StrategyKind::ScatterGather { replicas } => {
                Some(self.page_stores.for_migration(&request.page_stores, replicas, &self.sealing)?)
            }
            _ => None,
        };
        let names = through.as_ref().map(|through| through.names.clone()).unwrap_or_default();
        let Chosen { mut strategy, references } = Chosen::by(request, self.push_order(&request.push_order)?, names)?;
        let stores = through.map(|through| through.stores);
        if strategy.shares_ram() && session.is_some() {
            return Err(Refused::EncryptedHandOver);
        }
        let machine = self.home("migrate").map_err(Refused::Busy)?;
        let limiter = Limiter::new(request.bandwidth);
        let limited = Limited::with_limiter(connector(to, ConnectOptions::default()), limiter.clone());
        let link = secured(session.as_ref(), Box::new(limited));
        let (controller, commands) = Controller::new();
        let (tx, updates) = mpsc::channel();
        let mut state = self.lock();
        if state.role != Role::Home {
            return Err(Refused::Busy(state.busy("migrate")));
        }
        state.begin(Role::Outgoing, controller, tx);
        state.under_way = Some(UnderWay::migration(strategy.name(), to, limiter));
        state.session = session;
        drop(state);
        // From here on nobody else begins a migration or a snapshot, so the epoch is the last one.
        // The following steps may wait for a file system, and for a broker.
        let last_epoch = self.last_epoch();
        let (id, pages) = (machine.id(), machine.pages());
        let protect = |wanted| Protection::new(wanted, &self.sealing, id, last_epoch + 1, pages);
        let protect = request.fail_safe.as_ref().map(protect).transpose().map_err(Refused::Protection);
        let leaves = || self.leaves_for(to, heir).map_err(Refused::NotToldOfLeaving);
        let protect = protect.and_then(|protect| leaves().map(|()| protect)).inspect_err(|_| self.not_begun())?;
        let fail_safe = protect.as_ref().map(|protect| protect.fail_safe.clone());
        let options = SourceOptions { fail_safe, stores, last_epoch, ..self.options_of(request) };
        let instance = self.clone();
        let body = move || {
            let protect = protect.map(Protection::begin);
            let mut source = MachineSource::new(machine);
            if references {
                source.note_references();
            }
            let report = engine::migrate(&mut source, &*link, &mut *strategy, &options, commands);
            drop(source);
            if let Some(protect) = protect {
                protect.end(report.outcome);
            }
            instance.ended(&report);
        };
        self.spawn("migration", body)?;
        await_end(updates, request.progress, progress)
    }

    fn push_order(&self, name: &str) -> Result<Box<dyn PushOrder>, UnknownOrder> {
        match self.push_orders.get().and_then(|more| more(name)) {
            Some(order) => Ok(order),
            None => push_order::parse(name),
        }
    }

    /// Returns the options that the user requests, apart from the protection.
    fn options_of(self: &Arc<Self>, request: &MigrateRequest) -> SourceOptions {
        SourceOptions {
            streams: request.streams,
            downtime_limit: request.downtime_limit,
            pause_limits: PauseLimits { silence: request.pause_limit, total: request.pause_total },
            timeout: (!request.timeout.is_zero()).then_some(request.timeout),
            on_timeout: request.on_timeout.into(),
            demand_lanes: request.demand_lanes,
            huge: if request.whole_huge_pages { HugePages::Whole } else { HugePages::Split },
            impact: request.impact.into(),
            payload_crc: request.checksum,
            setup_timeout: request.setup_timeout,
            ..self.source_options()
        }
    }

    pub(crate) fn snapshot(
        self: &Arc<Self>,
        request: &SnapshotRequest,
        progress: &mut dyn FnMut(Value),
    ) -> Result<Value, Refused> {
        let machine = self.home("snapshot").map_err(Refused::Busy)?;
        let out = request.out.clone();
        let store = self.sealing.create(machine.id(), machine.pages(), |pages| SnapshotFile::create(&out, pages));
        let mut store = store.map_err(Refused::Store)?;
        let (controller, commands) = Controller::new();
        let (tx, updates) = mpsc::channel();
        let mut state = self.lock();
        if state.role != Role::Home {
            return Err(Refused::Busy(state.busy("snapshot")));
        }
        state.begin(Role::Saving, controller, tx);
        state.under_way = Some(UnderWay::snapshot(&out));
        drop(state);
        let options = SnapshotOptions {
            downtime_limit: request.downtime_limit,
            timeout: (!request.timeout.is_zero()).then_some(request.timeout),
            impact: request.impact.into(),
            epoch: self.last_epoch(),
            observer: Arc::new(Told(self.clone())),
        };
        let instance = self.clone();
        let body = move || {
            let mut source = MachineSource::new(machine);
            let result = engine::snapshot(&mut source, &mut *store, &options, commands);
            drop((source, store));
            let report = report::snapshot_to_json(&result, &out);
            if report["outcome"] == "completed" {
                instance.has_snapshot(Saved { file: out, key: instance.seal_key() });
            }
            instance.saved(report);
        };
        self.spawn("snapshot", body)?;
        await_end(updates, request.progress, progress)
    }

    /// Runs a migration or a snapshot on a separate thread.
    pub(super) fn spawn(&self, what: &'static str, body: impl FnOnce() + Send + 'static) -> Result<(), Refused> {
        thread::Builder::new().name(what.into()).spawn(body).map(drop).map_err(|cause| {
            self.not_begun();
            Refused::Thread { what, cause }
        })
    }

    /// Resets the state after a migration or a snapshot could not begin.
    pub(super) fn not_begun(&self) {
        let mut state = self.lock();
        let role = state.at_home();
        (state.controller, state.session, state.under_way, state.role) = (None, None, None, role);
        state.lent = None;
        state.waiting.clear();
        drop(state);
        self.changed.notify_all();
        self.stays();
    }

    fn saved(&self, report: Value) {
        let mut state = self.lock();
        state.end(report);
        // the guest may have ended meanwhile
        if state.role == Role::Saving {
            state.role = state.at_home();
        }
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn recover(
        &self,
        to: &Address,
        wanted: bool,
        progress: &mut dyn FnMut(Value),
    ) -> Result<Value, Refused> {
        let (tx, updates) = mpsc::channel();
        let mut state = self.lock();
        let controller = state.controller.clone().filter(|_| state.role == Role::InDoubt);
        let controller =
            controller.ok_or_else(|| Refused::Busy(format!("recover: this minivmm is {}", state.role.name())))?;
        state.waiting.push(tx);
        let mut link = connector(to, ConnectOptions::default());
        if let Some(limiter) = state.under_way.as_ref().and_then(|under_way| under_way.limiter.clone()) {
            link = Box::new(Limited::with_limiter(link, limiter));
        }
        let link = secured(state.session.as_ref(), link);
        drop(state);
        controller.recover(link.into());
        await_end(updates, wanted, progress)
    }

    pub(super) fn ended(&self, report: &Report) {
        match report.outcome {
            Outcome::Completed | Outcome::Lost => {}
            Outcome::Ended => self.guest_ended(),
            _ => self.stays(),
        }
        let mut state = self.lock();
        let mut json = report::to_json(report);
        json["bandwidth_bits"] = state.bandwidth();
        state.end(json);
        state.epoch = report.epoch;
        let (role, exit) = match report.outcome {
            Outcome::Completed => (Role::Moved, Some(0)),
            Outcome::Lost | Outcome::Ended => (Role::Ended, Some(5)),
            _ => (state.at_home(), None),
        };
        state.role = role;
        state.exit = state.exit.or(exit);
        drop(state);
        self.changed.notify_all();
    }
}

/// The strategy of a migration, and what it uses.
struct Chosen {
    strategy: Box<dyn Strategy>,
    /// Whether the strategy uses information about the pages that the guest reads.
    references: bool,
}

impl Chosen {
    /// Returns the strategy that `request` names. `through` contains the names of page stores.
    fn by(request: &MigrateRequest, order: Box<dyn PushOrder>, through: Vec<String>) -> Result<Self, StoresError> {
        let references = order.name() == "hot-first";
        let strategy: Box<dyn Strategy> = match request.strategy {
            StrategyKind::PreCopy => Box::new(PreCopy { order, convergence: ModelConvergence::default() }),
            StrategyKind::StopAndCopy => Box::new(StopAndCopy),
            StrategyKind::PostCopy => Box::new(PostCopy { order }),
            StrategyKind::HandOver => Box::new(HandOver),
            StrategyKind::Agile => Box::new(Agile { order }),
            StrategyKind::Hybrid { rounds } => Box::new(Hybrid { rounds, order }),
            StrategyKind::ScatterGather { replicas } => {
                let stores = through.len();
                let strategy = ScatterGather::replicated(through, replicas, order);
                Box::new(strategy.ok_or(StoresError::TooFew { replicas, stores })?)
            }
        };
        Ok(Self { strategy, references })
    }
}

/// A message to a client that waits for a migration.
pub(super) enum Update {
    Progress(Value),
    Ended(Value),
}

impl State {
    /// Records that a migration or a snapshot begins, for whose end `client` waits.
    pub(super) fn begin(&mut self, role: Role, controller: Controller, client: mpsc::Sender<Update>) {
        self.controller = Some(controller);
        self.waiting = vec![client];
        self.role = role;
        self.progress = None;
        self.checkpoints = CheckpointCounts::default();
    }

    /// Records that the migration or snapshot has ended with `report`.
    pub(super) fn end(&mut self, report: Value) {
        self.tell(report);
        (self.controller, self.session, self.under_way) = (None, None, None);
    }

    /// Sends `report` to all clients that wait for the end.
    pub(super) fn tell(&mut self, report: Value) {
        for client in self.waiting.drain(..) {
            // the client may have gone
            let _ = client.send(Update::Ended(report.clone()));
        }
        self.last = Some(report);
    }
}

/// Waits until a migration or a snapshot has ended or is in doubt. Returns its report.
pub(super) fn await_end(
    updates: mpsc::Receiver<Update>,
    wanted: bool,
    progress: &mut dyn FnMut(Value),
) -> Result<Value, Refused> {
    for update in updates {
        match update {
            Update::Progress(p) if wanted => progress(p),
            Update::Progress(_) => {}
            Update::Ended(report) => return Ok(report),
        }
    }
    Err(Refused::Orphaned)
}
