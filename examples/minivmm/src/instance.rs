//! One minivmm process: its VM, the migration that moves the VM out or in, and the requests of
//! clients.

mod cold_pages;
mod hand_overs;
mod kept;
mod lend;
mod outgoing;
mod refused;
mod under_way;

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

pub(crate) use lend::Fate;
use lend::Lent;
use migration_core::{
    PAGE_SHIFT,
    engine::{
        self, Controller, HugePages, NoPostCopy, NoSwitchOver, PauseLimits, Receiver, ReceiverHandle, ReceiverOptions,
        RestoreOptions, SnapshotOptions, SourceOptions,
    },
    protocol::{DestinationPhase, SourcePhase},
    report::{CheckpointCounts, Event, Observer, Outcome, Progress, Report},
    strategy::{
        Agile, HandOver, Hybrid, ModelConvergence, PostCopy, PreCopy, PushOrder, ScatterGather, StopAndCopy, Strategy,
        push_order::{self, UnknownOrder},
    },
    text::{Chain, describe},
    vm::VmId,
};
use migration_crypto::{SecureListener, Security, SourceSession};
use migration_kvm::{
    fence::{ProcessFence, ProcessIdentity},
    handover::HandOvers,
    spawner::LinuxSpawner,
};
use migration_transport::{
    Address, AtomicFile, Bandwidth, BrokerClient, ConnectOptions, Limited, Limiter, SnapshotFile, bind, connector,
    supervisor::OwnerRecord,
};
use minivmm_client::{
    LendRequest, MigrateRequest, Plan, Request, Saved, SnapshotRequest, StrategyKind, encryption::secured, report,
    server::Serve, values::absolute,
};
use outgoing::{Update, await_end};
pub(crate) use refused::Refused;
use serde_json::{Value, json};
use under_way::UnderWay;

use crate::{
    checkpoints::{Protection, folders},
    page_stores::{self, PageStores},
    refresh::{self, Place},
    sealing::{Restart, Sealing},
    signals::Asked,
    vmm::{Host, HostOptions, Machine, MachineSource, Snapshot},
};

/// The longest time that the end of the process waits until clients have their answers.
const LAST_ANSWERS: Duration = Duration::from_secs(10);
/// The interval at which the status and the end of a guest are checked while nothing else happens.
const TICK: Duration = Duration::from_millis(100);

/// A function that returns the push order of a name, or `None` if it does not know the name.
pub type PushOrders = fn(&str) -> Option<Box<dyn PushOrder>>;

pub(crate) struct Instance {
    /// Every request of a client takes this lock, including `status`, `cancel` and `quit`. So no
    /// thread may hold the lock while it waits for a file system, another process, a peer or a
    /// vCPU.
    state: Mutex<State>,
    changed: Condvar,
    /// The record of the VM's RAM at a broker.
    kept: OwnerRecord<Saved>,
    /// The successors that are prepared, and the schedule of refreshes.
    pub(crate) hand_overs: HandOvers<Plan>,
    /// Seals files, and pages in page stores.
    sealing: Arc<Sealing>,
    /// The page stores that this process was started with.
    page_stores: PageStores,
    /// The push orders in addition to the built-in ones.
    push_orders: OnceLock<PushOrders>,
}

#[derive(Default)]
struct State {
    /// The VM that runs or ran here.
    machine: Option<Arc<Machine>>,
    role: Role,
    epoch: u32,
    progress: Option<Progress>,
    /// The checkpoints of the migration under way.
    checkpoints: CheckpointCounts,
    /// The last report, kept for `status`.
    last: Option<Value>,
    controller: Option<Controller>,
    /// The migration or snapshot that `controller` controls.
    under_way: Option<UnderWay>,
    /// The session that the channels of the migration under way share, if it is encrypted.
    session: Option<SourceSession>,
    receiver: Option<ReceiverHandle>,
    exit: Option<u8>,
    /// Whether the guest has ended here by itself.
    guest_ended: bool,
    /// Whether the thread that waits for the guest's end could not be started. The main thread then
    /// checks for the end periodically.
    unwatched: bool,
    clients: u32,
    /// The clients that wait for the end of the migration under way, or until it is in doubt.
    waiting: Vec<mpsc::Sender<Update>>,
    remove: Vec<OwnSocket>,
    place: Option<Place>,
    /// The process that has borrowed the guest, and the number of times that the guest was lent.
    lent: Option<Lent>,
    lends: u64,
    /// In a borrower: whether the guest's owner wants the guest back.
    asked_back: bool,
    /// In a borrower: the control socket of the owner, if the owner has a broker.
    lender: Option<PathBuf>,
    /// In a successor, until it has the VM: its own control socket, the control socket that it will
    /// take over, and the refresh plan of its predecessor.
    succeeds: Option<(PathBuf, PathBuf, Option<Plan>)>,
}

/// What an arriving VM may need, and where to find the data that its source has stored for it.
pub(crate) struct Arrival {
    /// The folder of forward checkpoints, if there is one.
    pub(crate) checkpoints: Option<PathBuf>,
    /// The most RAM that the VM may have, in bytes.
    pub(crate) max_memory: u64,
    /// Whether its pages may come through page stores.
    pub(crate) through_stores: bool,
}

impl Arrival {
    /// The arrival of a VM whose RAM is mapped on this host already. The size of the RAM is not
    /// limited.
    pub(crate) const SHARED: Self = Self { checkpoints: None, max_memory: u64::MAX, through_stores: false };
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Role {
    /// The VM is here and stays.
    #[default]
    Home,
    /// The VM is here, and a snapshot of it is being taken.
    Saving,
    Incoming,
    Outgoing,
    InDoubt,
    /// Another minivmm has borrowed the guest.
    Lent,
    /// The guest that is borrowed from time to time is at its home.
    Standby,
    /// The VM has moved away for good.
    Moved,
    Ended,
}

impl Instance {
    /// Returns an instance without a VM. `broker` is the path of a RAM broker's socket.
    pub(crate) fn new(broker: Option<PathBuf>, sealing: Sealing, page_stores: PageStores) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            kept: OwnerRecord::new(broker, ProcessIdentity::own().ok().map(|own| own.encode())),
            hand_overs: HandOvers::default(),
            sealing: Arc::new(sealing),
            page_stores,
            push_orders: OnceLock::new(),
        })
    }

    /// Lets clients choose the push orders of `more`, too.
    pub(crate) fn knows_push_orders(&self, more: PushOrders) {
        // all instances of a program have the same ones, so a second call may be ignored
        let _ = self.push_orders.set(more);
    }

    /// Returns the path of the key file that seals files.
    pub(crate) fn seal_key(&self) -> Option<PathBuf> {
        self.sealing.file().map(Path::to_owned)
    }

    /// Returns the page stores that this process was started with.
    pub(crate) fn page_stores(&self) -> &PageStores {
        &self.page_stores
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // no invariant spans a panic: every field is replaced as a whole
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Records that the VM is here, and starts a thread that waits for the guest's end.
    pub(crate) fn own(self: &Arc<Self>, machine: Arc<Machine>) {
        let mut state = self.lock();
        state.machine = Some(machine.clone());
        state.role = Role::Home;
        drop(state);
        self.changed.notify_all();
        let instance = self.clone();
        // returns when the guest ends by itself, or when the VM moves away, which ends this wait
        let end = machine.wait_end();
        drop(machine);
        let watch = move || {
            if let Some(end) = end() {
                instance.has_ended(&end);
            }
        };
        if thread::Builder::new().name("watch".into()).spawn(watch).is_err() {
            self.lock().unwatched = true;
            self.changed.notify_all();
        }
    }

    /// Handles the guest's end by itself, which also ends this process.
    fn has_ended(&self, why: &str) {
        log!("the VM has ended: {why}");
        self.report_ended(why);
        self.guest_ended();
        self.exit(5);
    }

    /// Reports to both ends of a migration under way, and to the source of a VM with missing pages,
    /// that the guest has ended.
    fn report_ended(&self, why: &str) {
        let mut state = self.lock();
        (state.role, state.guest_ended) = (Role::Ended, true);
        let (controller, receiver) = (state.controller.clone(), state.receiver.clone());
        drop(state);
        if let Some(controller) = controller {
            controller.vm_ended(why);
        }
        if let Some(receiver) = receiver {
            receiver.vm_ended(why);
        }
        self.changed.notify_all();
    }

    /// Records as [`own`](Self::own) does that the VM is here. The VM runs already, so a separate
    /// thread informs the broker, and the VM does not wait for it.
    fn own_arrived(self: &Arc<Self>, machine: Arc<Machine>) {
        self.own(machine);
        if self.broker().is_none() && self.lock().succeeds.is_none() {
            return;
        }
        let instance = self.clone();
        let keep = move || {
            instance.take_place();
            instance.keep_ram()
        };
        let keep = move || keep().unwrap_or_else(|why| not_kept(&why));
        if let Err(error) = thread::Builder::new().name("deposit".into()).spawn(keep) {
            not_kept(&error.to_string());
        }
    }

    /// Waits for `time`, or until the process is to end. Returns whether the process continues.
    pub(crate) fn goes_on(&self, time: Duration) -> bool {
        self.wait_while(time, |state| state.exit.is_none()).exit.is_none()
    }

    /// Returns the epoch under which this process owns the VM.
    fn last_epoch(&self) -> u32 {
        let (receiver, epoch) = {
            let state = self.lock();
            (state.receiver.clone(), state.epoch)
        };
        // The thread that received the VM may still wait for its source's last message, so the
        // receiver is asked. The lock is not held, because the receiver takes the lock when a VM
        // arrives.
        receiver.map_or(epoch, |receiver| receiver.epoch())
    }

    fn wait_while(&self, most: Duration, mut waiting: impl FnMut(&State) -> bool) -> MutexGuard<'_, State> {
        let waited = self.changed.wait_timeout_while(self.lock(), most, |state| waiting(state));
        waited.unwrap_or_else(|e| e.into_inner()).0
    }

    /// Restores the VM of a snapshot. The VM is here when this returns. `restart` holds what a
    /// broker that restarts the VM knows about it.
    pub(crate) fn restore(
        self: &Arc<Self>,
        path: &Path,
        restart: Option<Restart>,
        host: HostOptions,
        options: RestoreOptions,
    ) -> Result<(), String> {
        let expected = restart.as_ref().map(|restart| VmId(restart.vm));
        let options = RestoreOptions { expected, ..options };
        let pages = options.max_ram_bytes >> PAGE_SHIFT;
        let sealing = match restart {
            None => self.sealing.clone(),
            Some(restart) => Arc::new(Sealing::load(restart.key.as_deref())?),
        };
        let failed = |why: String| format!("restoring {}: {why}", path.display());
        let store = sealing.open(None, pages, |pages| SnapshotFile::open(path, pages));
        let mut store = store.map_err(|e| failed(describe(e)))?;
        // the VM can be restarted from this snapshot until there is a newer one
        self.has_snapshot(Saved { file: absolute(path)?, key: sealing.file().map(Path::to_owned) });
        let restored = engine::restore(&mut *store, &Host::new(host), &options).map_err(|e| failed(describe(e)))?;
        self.own_arrived(restored.vm.0);
        self.lock().epoch = restored.report.epoch;
        Ok(())
    }

    /// Receives a VM at `listen`, on a separate thread. Returns the address at which it listens
    /// and, if that is a host name, the addresses that the name resolves to.
    pub(crate) fn receive(
        self: &Arc<Self>,
        listen: &Address,
        security: Option<Security>,
        host: HostOptions,
        arrival: Arrival,
    ) -> Result<Listening, String> {
        // the error names the address itself
        let mut listener = bind(listen).map_err(|e| e.to_string())?;
        let (address, mut bound) = (listener.address(), listener.bound());
        bound.retain(|bound| *bound != address);
        if let Address::Unix(path) = listen {
            // the listener is not dropped when the process ends
            self.remove_at_exit(path.clone());
        }
        if let Some(security) = security {
            listener = Box::new(SecureListener::new(listener, security));
        }
        let adopter = self.clone();
        let stores = arrival.through_stores.then(|| self.page_stores.for_destination(&self.sealing)).transpose();
        let stores = stores.map_err(describe)?.unwrap_or_default();
        let options = ReceiverOptions { stores, ..self.receiver_options(arrival) };
        let receiver = Receiver::new(Host::new(host), move |arrived| adopter.own_arrived(arrived.vm.0), options);
        let mut state = self.lock();
        state.receiver = Some(receiver.handle());
        state.role = Role::Incoming;
        drop(state);
        let instance = self.clone();
        let body = move || {
            if let Err(error) = receiver.run(&mut *listener) {
                log!("receiving: {}", Chain(&error));
                instance.exit(1);
            }
            let mut state = instance.lock();
            state.epoch = state.receiver.take().map_or(state.epoch, |r| r.epoch());
        };
        thread::Builder::new().name("receive".into()).spawn(body).map_err(|e| e.to_string())?;
        Ok(Listening { address, bound })
    }

    /// Returns the options of a receiver without page stores.
    fn receiver_options(self: &Arc<Self>, arrival: Arrival) -> ReceiverOptions {
        let Arrival { checkpoints, max_memory, through_stores: _ } = arrival;
        ReceiverOptions {
            owner: page_stores::owner(),
            max_ram_bytes: max_memory,
            spawner: Arc::new(LinuxSpawner::default()),
            observer: Arc::new(Told(self.clone())),
            fence: Arc::new(ProcessFence),
            forward: checkpoints.map(|dir| Arc::new(folders(dir, &self.sealing)) as _),
            ..ReceiverOptions::default()
        }
    }

    fn source_options(self: &Arc<Self>) -> SourceOptions {
        SourceOptions {
            spawner: Arc::new(LinuxSpawner::default()),
            observer: Arc::new(Told(self.clone())),
            ..SourceOptions::default()
        }
    }

    /// Waits until the process is to end, and gives clients time to get their answers. Returns the
    /// exit status.
    pub(crate) fn wait_exit(&self) -> u8 {
        let mut state = self.lock();
        let status = loop {
            match state.exit {
                Some(status) => break status,
                None if state.unwatched => {
                    state = self.changed.wait_timeout(state, TICK).unwrap_or_else(|e| e.into_inner()).0;
                    if let Some(why) = state.machine.as_ref().filter(|_| !state.guest_ended).and_then(|m| m.end()) {
                        drop(state);
                        self.has_ended(&why);
                        state = self.lock();
                    }
                }
                None => state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner()),
            }
        };
        let deadline = Instant::now() + LAST_ANSWERS;
        while (state.clients > 0 || state.last_words_are_due()) && Instant::now() < deadline {
            state = self.changed.wait_timeout(state, TICK).unwrap_or_else(|e| e.into_inner()).0;
        }
        let sockets = std::mem::take(&mut state.remove);
        let moved = state.machine.clone().filter(|_| state.role == Role::Moved);
        let at_home = matches!(state.role, Role::Home | Role::Saving | Role::Ended);
        let at_home = state.machine.clone().filter(|_| at_home);
        let receiver = state.receiver.clone();
        drop(state);
        // the VM ends here, so its pages in page stores are no longer needed
        for error in receiver.iter().flat_map(ReceiverHandle::forget_stored) {
            log!("pages of the VM stay in a page store: {}", Chain(&error));
        }
        if let Some(machine) = at_home {
            machine.forget_cold_pages();
        }
        sockets.into_iter().for_each(OwnSocket::remove);
        if let Some(machine) = moved {
            machine.let_go();
        }
        if status == 0 {
            // the broker keeps the RAM of any other VM, so that a person can examine it
            self.forget_ram();
        }
        status
    }

    /// Ends the process with the exit status `status`, unless it is ending already.
    pub(crate) fn exit(&self, status: u8) {
        self.lock().exit.get_or_insert(status);
        self.changed.notify_all();
    }

    /// Does not remove `path` when the process ends, because another process uses the path.
    pub(crate) fn keep_at_exit(&self, path: &Path) {
        self.lock().remove.retain(|socket| socket.path != path);
    }

    /// Removes the socket at `path` when the process ends, unless another socket has the path by
    /// then.
    pub(crate) fn remove_at_exit(&self, path: PathBuf) {
        let socket = OwnSocket::at(path);
        self.lock().remove.push(socket);
    }

    /// Ends the process because of a signal. Clients that wait for a migration get the answer that
    /// the migration does not end here.
    pub(crate) fn end_by_signal(&self, asked: Asked) {
        let mut state = self.lock();
        let Asked::ToEnd(status) = asked else {
            let sockets = std::mem::take(&mut state.remove);
            drop(state);
            return sockets.into_iter().for_each(OwnSocket::remove);
        };
        state.waiting.clear();
        state.exit.get_or_insert(status);
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until a VM that already runs here is recorded in the state.
    fn wait_arrival(&self) {
        let deadline = Instant::now() + LAST_ANSWERS;
        loop {
            let receiver = self.lock().receiver.clone().filter(|_| Instant::now() < deadline);
            // The lock is not held, because the receiver takes it when a VM arrives.
            if receiver.is_none_or(|receiver| receiver.phase() != DestinationPhase::Running) {
                return;
            }
            drop(self.wait_while(TICK, |state| state.role == Role::Incoming));
            if self.lock().role != Role::Incoming {
                return;
            }
        }
    }

    /// Returns the VM if it is here and neither a migration nor a snapshot is under way.
    fn home(&self, what: &str) -> Result<Arc<Machine>, String> {
        let machine = self.not_gone(what)?;
        let state = self.lock();
        if state.role == Role::Home { Ok(machine) } else { Err(state.busy(what)) }
    }

    fn status(&self) -> Value {
        let state = self.lock();
        let machine = state.machine.clone();
        let (role, receiver) = (state.role, state.receiver.clone());
        let (mut epoch, last) = (state.epoch, state.last.clone());
        let migration = match (&state.progress, role) {
            (Some(p), Role::Outgoing | Role::InDoubt | Role::Saving) => {
                let mut progress = report::progress_to_json(p, &state.checkpoints);
                progress["bandwidth_bits"] = state.bandwidth();
                progress
            }
            _ => last.unwrap_or(Value::Null),
        };
        let gathering = receiver.as_ref().filter(|_| role == Role::Home);
        let lent = state.lent.as_ref().filter(|_| role == Role::Lent).map(Lent::to_json);
        drop(state);
        // The lock is not held, because the receiver takes it when a VM arrives.
        let gathering = gathering.and_then(|receiver| receiver.gathering());
        let gathering = gathering.as_ref().map(report::gathering_to_json);
        let (kept_by, restart_from) = self.kept_by();
        let mut name = role.name();
        if let Some(receiver) = receiver {
            epoch = receiver.epoch();
            if role == Role::Incoming && receiver.phase() == DestinationPhase::Ready {
                name = "ready";
            }
        }
        let restart_from = restart_from.map(|saved| saved.file);
        let vm = machine.as_ref().map(|m| m.id().to_string());
        let snapshot = machine.as_ref().map(|m| m.snapshot());
        if matches!(role, Role::Home | Role::Saving) {
            name = match &snapshot {
                Some(s) if s.paused => "paused",
                Some(_) => "running",
                None => "ended",
            };
        }
        let mut status = json!({
            "state": name, "vm": vm, "kept_by": kept_by, "restart_from": restart_from, "epoch": epoch, "pid": std::process::id(), "cpus": null, "memory_bytes": null, "backing": null,
            "tracker": null, "migration": migration, "gathering": gathering, "workload": null, "lent": lent,
            "serial": null,
        });
        if let Some(s) = snapshot {
            status["paused"] = json!(s.paused);
            let Snapshot { cpus, memory_bytes, backing, tracker, workload, software, warnings, serial, .. } = s;
            status["cpus"] = json!(cpus);
            status["memory_bytes"] = json!(memory_bytes);
            status["backing"] = json!(backing);
            status["tracker"] = json!(tracker);
            status["paging"] = cold_pages::paging(machine.as_deref());
            status["software_guest"] = json!(software);
            status["warnings"] = json!(warnings);
            status["serial"] = json!({
                "to": serial.to, "bytes": serial.made, "pending_bytes": serial.pending,
                "dropped_bytes": serial.dropped, "failure": serial.failure,
            });
            if let Some(w) = workload {
                status["workload"] = json!({
                    "heartbeats": w.heartbeats,
                    "operations": w.operations,
                    "longest_gap_us": (w.longest_gap().as_secs_f64() * 1e7).round() / 10.0,
                    "access_latency_us": report::accesses_to_json(&w),
                    "errors": w.errors,
                    "cpus_online": w.cpus_online,
                    "balloon": {
                        "pages": w.balloon.pages, "inflations": w.balloon.inflations, "deflations": w.balloon.deflations,
                    },
                    "state": format!("{:?}", w.state).to_lowercase(),
                    "first_error": w.first_error.as_ref().map(|e| json!({
                        "kind": e.name(), "address": e.address, "expected": e.expected, "found": e.found,
                    })),
                });
            }
        }
        status
    }

    /// Returns the place at which clients find this minivmm, with the identity of this process.
    fn place(&self) -> Result<Value, String> {
        let place = self.lock().place.clone().ok_or("place: there is no control socket")?;
        if place.serial == "stdio" {
            return Err(
                "its serial port is this process's stdout, which no other process has: use a file, or null".into()
            );
        }
        let identity = ProcessIdentity::own().map_err(|e| format!("place: {e}"))?;
        Ok(json!({
            "serial": place.serial, "identity": identity.encode(), "pid": std::process::id(), "broker": place.broker,
            "seal_key": self.seal_key(), "leaving": self.is_leaving(),
        }))
    }

    /// Returns whether the VM is leaving for good, or has just left.
    fn is_leaving(&self) -> bool {
        let state = self.lock();
        state.lent.is_none() && matches!(state.role, Role::Outgoing | Role::InDoubt | Role::Moved)
    }

    fn cancel(&self) -> Result<Value, String> {
        let mut state = self.lock();
        let Some(controller) = state.controller.clone() else {
            return Err("cancel: no migration is under way".into());
        };
        if state.role == Role::InDoubt {
            return Err("cancel: too late, the VM may run at the destination".into());
        }
        controller.cancel("by the user");
        while state.controller.is_some() && matches!(state.role, Role::Outgoing | Role::Saving) {
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        let outcome = state.last.as_ref().map_or(Value::Null, |r| r["outcome"].clone());
        if outcome == "cancelled" || outcome == "failed" {
            return Ok(json!({"outcome": outcome}));
        }
        Err(format!("cancel: too late, the migration is {}", outcome.as_str().unwrap_or("in doubt")))
    }

    fn adopt(&self) -> Result<Value, String> {
        let receiver = self.lock().receiver.clone().ok_or("adopt: no VM is being received here")?;
        match receiver.phase() {
            // its missing pages are in page stores, so the source is not needed for them
            DestinationPhase::Running => receiver.release_source().map_err(|why| format!("adopt: {why}"))?,
            _ => receiver.force_take_over().map_err(|e| format!("adopt: {}", e.why))?,
        }
        Ok(json!({"state": self.status()["state"], "epoch": receiver.epoch()}))
    }

    /// Writes a part of guest memory to a file of mode 0600. The file appears when it is complete.
    fn memory(&self, gpa: u64, len: u64, out: &Path) -> Result<Value, String> {
        let machine = self.lock().machine.clone().ok_or("memory: no VM is here")?;
        machine.check_ram(gpa, len).map_err(|e| format!("memory: {e}"))?;
        let file = AtomicFile::create(out).map_err(|e| format!("memory: {e}"))?;
        machine.dump(gpa, len, file.file()).map_err(|e| format!("memory: {}: {e}", out.display()))?;
        file.commit().map_err(|e| format!("memory: {e}"))?;
        Ok(json!({"gpa": gpa, "len": len, "out": out}))
    }
}

impl Serve for Instance {
    fn asked(&self) {
        self.lock().clients += 1;
    }

    fn answered(&self) {
        let mut state = self.lock();
        state.clients = state.clients.saturating_sub(1);
        drop(state);
        self.changed.notify_all();
    }

    fn handle(self: &Arc<Self>, request: Request, progress: &mut dyn FnMut(Value)) -> Result<Value, String> {
        self.wait_arrival();
        match request {
            Request::Status => Ok(self.status()),
            Request::Pause => self.not_gone("pause")?.pause_by_user().map(|()| json!({"state": "paused"})),
            Request::Resume => self.not_gone("resume")?.resume_by_user().map(|()| json!({"state": "running"})),
            Request::Cancel => self.cancel(),
            Request::Adopt => self.adopt(),
            Request::PostCopy => self.post_copy(),
            Request::SwitchOver => self.switch_over(),
            Request::Tune { bandwidth_bits, downtime_limit_us } => {
                self.tune(bandwidth_bits, downtime_limit_us.map(Duration::from_micros))
            }
            Request::ResidentLimit { limit } => self.set_resident_limit(limit),
            Request::Recover { to, progress: wanted } => Ok(self.recover(&to, wanted, progress)?),
            Request::Quit => Ok(json!({"state": "ended"})),
            Request::Memory { gpa, len, out } => self.memory(gpa, len, &out),
            Request::Snapshot(request) => Ok(self.snapshot(&request, progress)?),
            Request::Refresh(plan) => refresh::schedule(self, plan),
            Request::Place => self.place(),
            Request::Lend(request) => self.lend(request),
            Request::GiveBack => self.give_back(),
            Request::StopLog => self.stop_log(),
            Request::Gone { report, status } => self.gone(report, status),
            Request::Elsewhere { to } => self.is_elsewhere(to).map(|()| Value::Null),
            Request::Saved { snapshot } => {
                self.has_snapshot(snapshot);
                Ok(Value::Null)
            }
            Request::Migrate(request) => Ok(self.migrate(&request, progress)?),
        }
    }

    fn quit(&self) {
        self.exit(0);
    }
}

/// The address at which a destination listens.
pub(crate) struct Listening {
    /// The address as a source names it.
    pub(crate) address: String,
    /// The addresses that a host name in `address` resolves to.
    pub(crate) bound: Vec<String>,
}

fn not_kept(why: &str) {
    log!("the VM's RAM is not kept if this process dies: {why}");
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Home => "running",
            Role::Saving => "taking a snapshot",
            Role::Incoming => "incoming",
            Role::Outgoing => "outgoing",
            Role::InDoubt => "in-doubt",
            Role::Lent => "lent",
            Role::Standby => "dormant",
            Role::Moved | Role::Ended => "ended",
        }
    }
}

/// Handles the events of a migration or a snapshot.
struct Told(Arc<Instance>);

/// A socket file of this process.
struct OwnSocket {
    path: PathBuf,
    /// The device and inode of the file.
    file: Option<(u64, u64)>,
}

impl OwnSocket {
    fn at(path: PathBuf) -> Self {
        Self { file: Self::identity(&path), path }
    }

    fn identity(path: &Path) -> Option<(u64, u64)> {
        path.symlink_metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()))
    }

    fn remove(self) {
        if self.file.is_some() && self.file == Self::identity(&self.path) {
            // the file may be gone already
            let _ = std::fs::remove_file(self.path);
        }
    }
}

impl State {
    /// Returns the role of a minivmm that has the VM. The guest may have ended meanwhile.
    fn at_home(&self) -> Role {
        if self.guest_ended { Role::Ended } else { Role::Home }
    }

    /// Returns whether the guest has ended and the other end of a migration may not know that yet.
    fn last_words_are_due(&self) -> bool {
        self.guest_ended && (self.controller.is_some() || self.receiver.is_some())
    }
}

impl Observer for Told {
    fn event(&self, event: &Event) {
        match event {
            Event::Progress(p) => {
                let mut state = self.0.lock();
                state.progress = Some(p.clone());
                let mut shown = report::progress_to_json(p, &state.checkpoints);
                shown["bandwidth_bits"] = state.bandwidth();
                // clients that have gone are detected and removed here
                state.waiting.retain(|client| client.send(Update::Progress(shown.clone())).is_ok());
            }
            Event::InDoubt(report) => {
                let mut state = self.0.lock();
                state.role = Role::InDoubt;
                state.tell(report::to_json(report));
                drop(state);
                self.0.changed.notify_all();
            }
            Event::Checkpoint(counts) => self.0.lock().checkpoints = *counts,
            Event::Source(phase) => {
                let mut state = self.0.lock();
                if *phase == SourcePhase::Serving && state.role == Role::InDoubt {
                    // the destination has been found again
                    state.role = Role::Outgoing;
                }
                drop(state);
                // a client that has requested post-copy waits until the destination's abilities are
                // known
                self.0.changed.notify_all();
            }
            Event::BadPeer { peer, why } => log!("{peer}: {why}"),
            Event::Discarded(why) => log!("what was received is discarded: {why}"),
            Event::Warning(why) => log!("{why}"),
            Event::Reconnecting { attempt, why } => log!("in doubt, reconnecting ({attempt}): {why}"),
            _ => {}
        }
    }
}
