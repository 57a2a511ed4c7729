//! The destination's engine: accepts lanes, builds the VM, receives it, and runs it when it is ours.

mod accept;
mod allowance;
mod attempt;
mod connections;
mod install;
pub(super) mod missing;
pub(super) mod protection;
mod reserve;
mod session;
mod survive;

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use accept::Accepting;
use allowance::Allowance;
use connections::{Connections, Stage};
use install::LaneReceiver;
use missing::{Missing, is_whole};
use protection::Protection;
use reserve::Parked;
use session::Session;
use thiserror::Error;

use super::{
    control::{ControlReader, ControlWriter},
    dirty_log,
    events::Guarded,
};
use crate::{
    MigrationError,
    channel::{Channel, Closer, Halves, Listener, ReadHalf, Room, WriteHalf},
    checkpoint::ForwardStores,
    codec::DecodeError,
    fence::{Fence, Fenced, NoFence},
    lock::lock,
    pager::Pager,
    protocol::{DestinationAction, DestinationMachine, DestinationPhase, OnDestinationLoss, Violation},
    report::{Event, NoObserver, Observer},
    spawner::{GuestImpact, Joiner, Role, Spawner, StdSpawner},
    state::VmState,
    vm::{DestinationHost, DestinationVm, VmError, VmId},
    wire::{
        Control, ErrorCode, FEATURE_CHECKPOINTS, FEATURE_HUGE_BLOCKS, FEATURE_POST_COPY, FEATURE_SHARED_RAM, LaneKind,
        MAX_STREAMS, OLDEST_VERSION, Preamble, SEALED_MAGIC, SessionToken, VERSION, add_missing, negotiate,
    },
};

/// How often the accept loop looks whether it shall stop.
const ACCEPT_TICK: Duration = Duration::from_millis(50);

/// Limits and choices at a destination.
#[derive(Clone)]
pub struct ReceiverOptions {
    /// Most bulk lanes; a source that wants more gets this many.
    pub max_streams: u16,
    /// Most bytes of RAM that a VM may have.
    pub max_ram_bytes: u64,
    /// How long a peer may be silent: before it has introduced itself, while its lanes are awaited, on the control lane.
    pub idle_timeout: Duration,
    /// How long an attempt that has sent no page may keep other sources out. Page data earns more time, at 1 MiB/s and up to what
    /// all of RAM earns once. After that the next source takes the session; after 16 times as long the attempt ends in any case.
    /// Once the VM is ready, or runs here, this does not apply.
    pub progress_grace: Duration,
    /// The VM that may come, and the epoch above which: one that was [lent](super::ephemeral) comes back as what it was, and by
    /// nothing older than its leaving. `None` for any.
    pub awaits: Option<(VmId, u32)>,
    /// How long to wait for a source, and, once the VM runs here, for its source's last word; `None` for ever. An attempt that
    /// is under way when the time passes has the time-outs of an attempt.
    pub patience: Option<Duration>,
    /// In fail-safe post-copy, makes certain that a source is dead: output that is held for its sake may then leave.
    pub fence: Arc<dyn Fence>,
    /// In fail-safe post-copy, where to find what a source that has died had left behind; `None` if nowhere.
    pub forward: Option<Arc<dyn ForwardStores>>,
    /// Starts threads.
    pub spawner: Arc<dyn Spawner>,
    /// Is told how it goes; see [`Observer`] for what it may not do.
    pub observer: Arc<dyn Observer>,
}

impl Default for ReceiverOptions {
    fn default() -> Self {
        Self {
            max_streams: MAX_STREAMS,
            max_ram_bytes: 1 << 40,
            idle_timeout: Duration::from_secs(10),
            progress_grace: Duration::from_secs(60),
            awaits: None,
            patience: None,
            fence: Arc::new(NoFence),
            forward: None,
            spawner: Arc::new(StdSpawner),
            observer: Arc::new(NoObserver),
        }
    }
}

/// Why a receiver ended without a VM.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// [`ReceiverHandle::stop`] was called.
    #[error("stopped")]
    Stopped,
    /// No source came in time.
    #[error("no VM was handed over within {0:?}")]
    TimedOut(Duration),
    /// The listener is broken.
    #[error("listening: {0}")]
    Listener(#[from] io::Error),
}

/// Receives one VM: attempt after attempt, until one completes.
pub struct Receiver {
    hub: Arc<Hub>,
}

/// Talks to a [`Receiver`] from other threads.
#[derive(Clone)]
pub struct ReceiverHandle {
    hub: Arc<Hub>,
}

struct Hub {
    options: ReceiverOptions,
    host: Mutex<Box<dyn DestinationHost>>,
    state: Mutex<State>,
    stop: AtomicBool,
    finished: AtomicBool,
    bytes: Arc<AtomicU64>,
    connections: Mutex<Connections>,
    /// Threads for lanes that are due.
    reserved: Mutex<Parked>,
    /// Finds out whether lanes can be accepted; `None` before there is a listener, or where that cannot be told.
    room: Mutex<Option<Arc<dyn Room>>>,
    /// Threads that serve faults.
    watchers: Mutex<Vec<Box<dyn Joiner>>>,
}

struct State {
    machine: DestinationMachine,
    session: Option<Arc<Session>>,
    /// Counts control lanes that were attached; only the last one speaks for the session.
    attachment: u64,
}

impl Receiver {
    /// A receiver that builds its VM on `host`.
    pub fn new(host: Box<dyn DestinationHost>, options: ReceiverOptions) -> Self {
        let options = ReceiverOptions { observer: Guarded::around(&options.observer), ..options };
        let machine = match options.awaits {
            Some((vm, epoch)) => DestinationMachine::awaiting(vm, epoch),
            None => DestinationMachine::new(),
        };
        let state = State { machine, session: None, attachment: 0 };
        let hub = Hub {
            options,
            host: Mutex::new(host),
            state: Mutex::new(state),
            stop: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            bytes: Arc::default(),
            connections: Mutex::default(),
            reserved: Mutex::default(),
            room: Mutex::default(),
            watchers: Mutex::default(),
        };
        Self { hub: Arc::new(hub) }
    }

    /// The handle for other threads.
    pub fn handle(&self) -> ReceiverHandle {
        ReceiverHandle { hub: self.hub.clone() }
    }

    /// Accepts sources until a VM was received and its source knows it. Bad peers, failed attempts and lost links do
    /// not end it. The VM is handed to [`DestinationHost::adopted`] the moment it starts, which may be long before
    /// this returns if the source's last word is lost.
    pub fn run(&self, listener: &mut dyn Listener) -> Result<(), ReceiveError> {
        let hub = &self.hub;
        *lock(&hub.room) = listener.room();
        let mut accepting = Accepting::new(hub);
        let (begun, mut running_since) = (Instant::now(), None);
        let result = loop {
            if hub.stop.load(Ordering::Relaxed) {
                break Err(ReceiveError::Stopped);
            }
            if hub.finished.load(Ordering::Relaxed) {
                break Ok(());
            }
            if let Some(patience) = hub.options.patience {
                match lock(&hub.state).machine.phase() {
                    DestinationPhase::Empty if begun.elapsed() >= patience => {
                        break Err(ReceiveError::TimedOut(patience));
                    }
                    DestinationPhase::Running
                        if running_since.get_or_insert_with(Instant::now).elapsed() >= patience =>
                    {
                        break Ok(());
                    }
                    _ => {}
                }
            }
            if let Err(error) = accepting.step(listener) {
                break Err(error.into());
            }
        };
        let (session, owned) = {
            let state = lock(&hub.state);
            (state.session.clone(), state.machine.phase() == DestinationPhase::Running)
        };
        match session {
            // pages that are missing stay so: nobody reads them as zeros
            Some(session) if owned => session.close("the receiver has ended"),
            Some(session) => drop(session.discard("the receiver has ended")),
            None => {}
        }
        lock(&hub.connections).end();
        accepting.join();
        hub.join_watchers();
        result
    }
}

impl ReceiverHandle {
    /// Ends [`Receiver::run`]; a VM that is being received or held is discarded with the receiver.
    pub fn stop(&self) {
        self.hub.stop.store(true, Ordering::Relaxed);
    }

    /// Where the protocol stands.
    pub fn phase(&self) -> DestinationPhase {
        lock(&self.hub.state).machine.phase()
    }

    /// The epoch of the present attempt, or the last one.
    pub fn epoch(&self) -> u32 {
        lock(&self.hub.state).machine.epoch()
    }

    /// Bytes of all frames that were received and sent so far, on all lanes.
    pub fn wire_bytes(&self) -> u64 {
        self.hub.bytes.load(Ordering::Relaxed)
    }

    /// A person states that the source is dead: the VM that is held becomes ours and starts.
    ///
    /// # Errors
    /// When no complete VM is held, or its source is connected.
    pub fn adopt(&self) -> Result<(), Violation> {
        let mut state = lock(&self.hub.state);
        let action = state.machine.adopt()?;
        self.hub.take(state, &action);
        Ok(())
    }

    /// The guest of the VM that was received here has ended by itself, for this reason. If pages of it are missing, its source is
    /// told, frees them, and ends with [`Outcome::Ended`](crate::report::Outcome::Ended), instead of serving them for ever; if
    /// the link is lost it is told when it comes back. The VMM keeps the receiver until [`Receiver::run`] returns, or for
    /// as long as it means to wait for that. Else nothing happens. Does not wait.
    pub fn vm_ended(&self, reason: &str) {
        self.hub.vm_ended(reason);
    }

    /// The source is dead for certain: the VM that is held becomes ours and starts, if all of it is here.
    ///
    /// # Errors
    /// When no complete VM is held.
    pub fn inherit(&self, source: Fenced) -> Result<(), Violation> {
        let mut state = lock(&self.hub.state);
        if !state.machine.is_complete() {
            let (epoch, phase) = (state.machine.epoch(), state.machine.phase());
            return Err(Violation::new("inherit", epoch, phase, "pages of this VM are only at its source"));
        }
        let action = state.machine.inherit(source)?;
        self.hub.take(state, &action);
        Ok(())
    }
}

/// A connection that has just come.
struct Incoming {
    /// Counts the connections of this receiver.
    id: u64,
    reader: Box<dyn ReadHalf>,
    writer: Box<dyn WriteHalf>,
    closer: Arc<dyn Closer>,
}

/// How a control lane goes on after a frame.
enum Flow {
    Continue,
    End,
}

impl Hub {
    fn bad_peer(&self, peer: &str, why: &str) {
        self.options.observer.event(&Event::BadPeer { peer: peer.to_owned(), why: why.to_owned() });
    }

    fn serve(self: &Arc<Self>, connection: Incoming, peer: &str) {
        let id = connection.id;
        if let Err(error) = self.introduce(connection, peer) {
            // what happened on a connection that was closed here is not the reason
            let closed = lock(&self.connections).why_closed(id);
            self.bad_peer(peer, &closed.map_or_else(|| error.at_peer(peer), str::to_owned));
        }
    }

    /// A connection has shown what it is: it is not one of those any more that give way to others.
    fn advance(&self, id: u64, stage: Stage, peer: &str) -> Result<(), MigrationError> {
        if lock(&self.connections).advance(id, stage) {
            return Ok(());
        }
        Err(MigrationError::link(peer)(io::ErrorKind::ConnectionAborted.into()))
    }

    /// Reads the preamble of a new connection and lets it do what it is for.
    fn introduce(self: &Arc<Self>, connection: Incoming, peer: &str) -> Result<(), MigrationError> {
        let link = || MigrationError::link(peer);
        let Incoming { id, mut reader, mut writer, closer } = connection;
        reader.set_idle_timeout(Some(self.options.idle_timeout)).map_err(link())?;
        writer.set_idle_timeout(Some(self.options.idle_timeout)).map_err(link())?;
        let mut bytes = [0; Preamble::LEN];
        reader.read_exact(&mut bytes).map_err(link())?;
        let mut control = ControlWriter::new(writer, peer.to_owned(), self.bytes.clone());
        let preamble = Preamble::decode(&bytes).inspect_err(|error| {
            if bytes.starts_with(&SEALED_MAGIC) {
                refuse_sealed(&mut *reader, &mut control, error, self.options.idle_timeout);
            }
        })?;
        if negotiate(preamble.oldest, preamble.newest).is_none() {
            let why = format!(
                "the source speaks versions {} to {}, this destination {OLDEST_VERSION} to {VERSION}",
                preamble.oldest, preamble.newest
            );
            control.send(0, &Control::error(ErrorCode::Version, why.clone()))?;
            return Err(MigrationError::Peer { code: ErrorCode::Version, text: why });
        }
        let known = self.session(preamble.session).is_ok();
        let stage = match preamble.kind {
            // on a link that is not encrypted anybody may have read the token: it opens only lanes that then take a place
            LaneKind::Control => Stage::Greeting,
            LaneKind::Reattach if known => Stage::Returning,
            _ if known => Stage::Identified,
            _ => Stage::Greeting,
        };
        self.advance(id, stage, peer)?;
        // it was started for pages in volume, which is what most connections carry
        match preamble.kind {
            LaneKind::Bulk => {}
            LaneKind::Demand => self.options.spawner.assume(Role::Demand, GuestImpact::Balanced),
            _ => self.options.spawner.assume(Role::Control, GuestImpact::Balanced),
        }
        match preamble.kind {
            LaneKind::Bulk => {
                let session = self.session(preamble.session)?;
                let link = session.attach(preamble.index, closer)?;
                return self.pages(session, (preamble, link), reader, peer);
            }
            LaneKind::Demand => {
                let session = self.session(preamble.session)?;
                let link = session.attach_demand(preamble.index, closer, control.into_half())?;
                if link == 0
                    && let Err(error) = self.await_faults(&session, preamble.index)
                {
                    session.fail(error.code(), &error.to_string());
                    return Err(error);
                }
                return self.pages(session, (preamble, link), reader, peer);
            }
            LaneKind::Checkpoint => {
                let session = self.session(preamble.session)?;
                let (protection, link) = session.attach_checkpoint(closer)?;
                return self.checkpoints(session, (protection, link), (reader, control.into_half()), peer);
            }
            LaneKind::Control | LaneKind::Reattach => {}
        }
        let mut frames = ControlReader::new(reader, peer.to_owned(), self.bytes.clone());
        let first = frames.read().inspect_err(|error| {
            // an honest peer of another build has a user who wants to know
            if !matches!(error, MigrationError::Link { .. }) {
                // best effort: the lane ends either way
                let _ = control.send(0, &Control::error(error.code(), error.to_string()));
            }
        });
        match (preamble.kind, first?) {
            (LaneKind::Control, (epoch, hello @ Control::Hello(_))) => {
                self.attempt(epoch, hello, (frames, control), (id, closer), peer)
            }
            (LaneKind::Reattach, (epoch, Control::Reattach(vm))) => {
                if lock(&self.state).machine.may_reattach(vm, epoch) {
                    self.advance(id, Stage::Identified, peer)?;
                }
                self.reattach(preamble.session, (vm, epoch), frames, control, closer, peer)
            }
            (kind, (epoch, other)) => {
                let why = format!("{} on a new {kind:?} lane", other.name());
                control.send(epoch, &Control::error(ErrorCode::Protocol, why.clone()))?;
                Err(DecodeError::invalid("first frame", why).into())
            }
        }
    }

    /// A lane on which pages come.
    fn pages(
        &self,
        session: Arc<Session>,
        (preamble, link): (Preamble, u32),
        reader: Box<dyn ReadHalf>,
        peer: &str,
    ) -> Result<(), MigrationError> {
        let (kind, index) = (preamble.kind, preamble.index);
        let lane = LaneReceiver::new(kind, index, reader, peer.to_owned(), session.clone(), self.bytes.clone());
        let error = lane.run();
        if session.lane_lost(link, error.code(), &error.to_string()) {
            self.lost_while_loading(&session, &error.to_string());
            return Err(error);
        }
        if matches!(error, MigrationError::Link { .. }) && (session.is_sealed() || session.over().is_some()) {
            // it has done its part, or was closed because of another lane
            return Ok(());
        }
        if session.missing().is_some() && session.is_sealed() {
            // the VM may run here, and has all its pages
            return Err(error);
        }
        session.fail(error.code(), &error.to_string());
        Err(error)
    }

    fn session(&self, token: SessionToken) -> Result<Arc<Session>, MigrationError> {
        let session = lock(&self.state).session.clone();
        session
            .filter(|s| s.token == token)
            .ok_or_else(|| DecodeError::invalid("session", "no such session is under way here").into())
    }

    /// The state, if `attachment` is still the control lane that speaks for it.
    fn current(&self, attachment: u64) -> Result<MutexGuard<'_, State>, MigrationError> {
        let state = lock(&self.state);
        if state.attachment == attachment {
            return Ok(state);
        }
        let text = "a newer attempt of the source takes its place".to_owned();
        Err(MigrationError::Peer { code: ErrorCode::Busy, text })
    }

    /// Serves a control lane, each frame in its turn.
    fn frames(
        self: &Arc<Self>,
        frames: &mut ControlReader,
        session: &Arc<Session>,
        attachment: u64,
    ) -> Result<(), MigrationError> {
        loop {
            let (epoch, frame) = frames.read()?;
            if let Flow::End = self.frame(session, attachment, epoch, frame)? {
                return Ok(());
            }
        }
    }

    /// A control lane is not served any more.
    fn ended(
        self: &Arc<Self>,
        session: &Arc<Session>,
        attachment: u64,
        peer: &str,
        served: Result<(), MigrationError>,
    ) {
        let Err(error) = served else { return };
        if !matches!(error, MigrationError::Link { .. } | MigrationError::Peer { .. }) {
            // best effort: the lane ends either way
            let _ = session.say(&Control::error(error.code(), error.to_string()));
        }
        // that a bulk lane failed is the cause; what followed from it on this one is not
        let why = session.over().unwrap_or_else(|| error.to_string());
        let link = session.link();
        self.lost(attachment, &why);
        self.bad_peer(peer, &why);
        if self.current(attachment).is_ok() {
            self.watch_source(session, link);
        }
    }

    fn frame(
        self: &Arc<Self>,
        session: &Arc<Session>,
        attachment: u64,
        epoch: u32,
        frame: Control,
    ) -> Result<Flow, MigrationError> {
        let mut state = lock(&self.state);
        if state.attachment != attachment {
            // a newer lane speaks for the session, or a newer session took its place
            return Ok(Flow::End);
        }
        if matches!(frame, Control::Missing { .. } | Control::PostCopy { .. }) && session.pager.is_none() {
            return Err(DecodeError::invalid("post-copy", "it is not agreed on").into());
        }
        session.allowance.frame(&frame, session.ram.layout().pages())?;
        match state.machine.handle(epoch, frame)? {
            DestinationAction::None | DestinationAction::Build { .. } => {}
            DestinationAction::Pong => {
                drop(state);
                session.say(&Control::Pong)?;
            }
            DestinationAction::LoadPiece(piece) => {
                let mut vm = lock(&session.vm);
                let vm = vm.as_mut().ok_or_else(no_vm)?;
                vm.load_piece(&piece).map_err(MigrationError::vm("loading a piece of device state"))?;
            }
            DestinationAction::Missing { first, bitmap } => add_missing(&mut lock(&session.listed), first, &bitmap)?,
            DestinationAction::Load { generation, state: bytes, post_copy } => {
                drop(state);
                if session.shared {
                    self.options.spawner.begin_switch_over();
                }
                let loading = session.loads();
                session.wait_round(generation, self.options.idle_timeout, &self.bytes)?;
                session.seal(generation)?;
                if let Some(announced) = post_copy {
                    // before anything is loaded, which touches RAM
                    self.arm(session, attachment, generation, announced)?;
                }
                let mut vm_state = VmState::decode(&bytes)?;
                let log =
                    if session.shared { dirty_log::take(&mut vm_state, session.ram.layout().pages())? } else { None };
                // without the lock on all else: this may wait for a missing page, and the page for a newer attempt
                let loaded = match lock(&session.vm).as_mut() {
                    // loading writes RAM too
                    Some(vm) => log.map_or(Ok(()), |log| vm.continue_log(&log)).and_then(|()| vm.load_state(&vm_state)),
                    None => Err(no_longer_here()),
                };
                let loaded = loaded.map_err(MigrationError::vm("loading the state"));
                if self.options.forward.is_some()
                    && let Some(protection) = &session.protection
                {
                    *lock(&protection.state) = bytes.into();
                }
                let mut state = lock(&self.state);
                if state.attachment != attachment {
                    return Ok(Flow::End);
                }
                loaded?;
                drop(loading);
                // ready before it is said: if saying it fails, the source may have heard it all the same
                let ready = state.machine.loaded()?;
                drop(state);
                // A source that has gone may have said why before, while the state was loaded. That is still to be read,
                // and it decides; without it, the lane's end does.
                let _ = session.say(&ready);
                self.tell_phase();
            }
            DestinationAction::Start { running } => {
                let (started, unstarted) = self.start(&state, running);
                let answered = if session.shared {
                    drop(state);
                    // its first moments count, and what is left to do is not what it waits for: nor does this thread go first
                    // any more, on a core that a vCPU may have been woken for
                    let answered = self.answer(session, attachment);
                    self.options.spawner.end_switch_over();
                    self.options.spawner.assume(Role::Control, GuestImpact::Balanced);
                    self.adopt(started);
                    answered
                } else {
                    self.adopt(started);
                    drop(state);
                    self.answer(session, attachment)
                };
                self.warn(unstarted);
                answered?;
                self.tell_phase();
            }
            DestinationAction::AnswerRunning => {
                lock(&self.host).link_found();
                drop(state);
                self.answer(session, attachment)?;
            }
            DestinationAction::Discard(why) => {
                let given_up = state.session.take();
                drop(state);
                self.discard(given_up, &why);
                return Ok(Flow::End);
            }
            DestinationAction::Finish => {
                drop(state);
                if let Some(protection) = &session.protection {
                    self.unprotect(protection);
                }
                self.finished.store(true, Ordering::Relaxed);
                return Ok(Flow::End);
            }
        }
        Ok(Flow::Continue)
    }

    /// Readies the VM to run without the pages that were listed.
    fn arm(
        &self,
        session: &Arc<Session>,
        attachment: u64,
        last: u32,
        (announced, lanes): (u64, u16),
    ) -> Result<(), MigrationError> {
        session.wait_demand(lanes, self.options.idle_timeout)?;
        drop(self.current(attachment)?);
        let pager = session.pager.clone().ok_or_else(|| DecodeError::invalid("post-copy", "it is not agreed on"))?;
        let pages = std::mem::take(&mut *lock(&session.listed));
        if pages.len() != announced || lanes == 0 {
            let why = format!("{} are listed, {announced} announced, with {lanes} demand lanes", pages.len());
            return Err(DecodeError::invalid("missing pages", why).into());
        }
        if !is_whole(&pages, pager.granule()) {
            return Err(DecodeError::invalid("missing pages", "not whole huge pages").into());
        }
        let left = session.map.change(|map| map.leave_behind(&pages));
        left.map_err(|error| DecodeError::invalid("missing pages", error.to_string()))?;
        pager.arm(&session.map).map_err(MigrationError::vm("watching for missing pages"))?;
        if let Some(protection) = &session.protection {
            protection.begin()?;
        }
        let missing = Arc::new(Missing::new(pager, session.map.clone(), last + 1, lanes, self.bytes.clone()));
        session.set_missing(&missing)
    }

    /// Starts a thread for each demand lane that serves faults as soon as pages are missing, and with the first one a thread that
    /// waits for the end of that: here, and not in the pause.
    fn await_faults(self: &Arc<Self>, session: &Arc<Session>, lane: u16) -> Result<(), MigrationError> {
        let (hub, faulted) = (self.clone(), session.clone());
        let body = Box::new(move || {
            let watched = faulted.wait_missing().map_or(Ok(()), |missing| missing.watch(lane.into()));
            if let Err(error) = watched {
                let why = format!("faults are not served any more: {error}");
                hub.options.observer.event(&Event::Warning(why));
            }
        });
        self.watcher(Role::Demand, "mig-fault", body)?;
        if lane > 0 {
            return Ok(());
        }
        let (hub, session) = (self.clone(), session.clone());
        let body = Box::new(move || {
            if let Some(missing) = session.wait_missing()
                && missing.wait_ended()
            {
                hub.all_there(&session, &missing);
                missing.pager.settle();
            }
        });
        self.watcher(Role::Control, "mig-missing", body)
    }

    fn watcher(&self, role: Role, name: &str, body: Box<dyn FnOnce() + Send>) -> Result<(), MigrationError> {
        let thread = self.spawn(role, name, body);
        let thread = thread.map_err(|cause| MigrationError::Thread { role: "the session", cause })?;
        lock(&self.watchers).push(thread);
        Ok(())
    }

    /// Waits for the threads that served a VM whose session is over.
    fn join_watchers(&self) {
        let watchers = std::mem::take(&mut *lock(&self.watchers));
        for thread in watchers {
            thread.join();
        }
    }

    /// No page is missing any more.
    fn all_there(&self, session: &Session, missing: &Missing) {
        if let Err(error) = missing.pager.disarm() {
            self.options.observer.event(&Event::Warning(format!("all pages are there, but: {error}")));
        }
        let mut state = lock(&self.state);
        // before *run* the source may still take the VM back: it is told when the VM has started
        if state.machine.complete().is_ok() {
            drop(state);
            // best effort: a source that does not hear it comes back and asks
            let _ = session.tell_complete(missing);
            self.tell_phase();
        }
    }

    /// The guest has ended by itself.
    fn vm_ended(&self, reason: &str) {
        let mut state = lock(&self.state);
        let Some(ended) = state.machine.vm_ended(reason) else { return };
        let Some(session) = state.session.clone() else { return };
        drop(state);
        // best effort: a source that does not hear it comes back and asks
        let _ = session.tell_ended(ended);
        if let Some(missing) = session.missing() {
            // nobody waits for pages any more
            missing.end();
        }
    }

    /// The VM runs here: answers *run*.
    fn answer(&self, session: &Session, attachment: u64) -> Result<(), MigrationError> {
        session.tell_running()?;
        if let Some(missing) = session.missing()
            && missing.is_complete()
        {
            // before the source can answer to it
            self.current(attachment)?.machine.complete()?;
            session.tell_complete(&missing)?;
        }
        Ok(())
    }

    /// The VM is ours without its source's word.
    fn take(&self, state: MutexGuard<'_, State>, action: &DestinationAction) {
        let unstarted = self.start_and_adopt(&state, action);
        self.finished.store(true, Ordering::Relaxed);
        drop(state);
        self.warn(unstarted);
    }

    /// Starts the VM if `action` says so, and has it adopted. Returns why it did not start, as [`start`](Self::start) does.
    #[must_use = "the observer is to be warned"]
    fn start_and_adopt(&self, state: &State, action: &DestinationAction) -> Option<String> {
        let DestinationAction::Start { running } = *action else { return None };
        let (started, unstarted) = self.start(state, running);
        self.adopt(started);
        unstarted
    }

    /// Starts the VM, which is to be adopted, and says why if it does not start: [`warn`](Self::warn) of that once the lock
    /// on the state is free.
    #[must_use = "it is to be adopted"]
    fn start(&self, state: &State, running: bool) -> (Option<Box<dyn DestinationVm>>, Option<String>) {
        let Some(session) = &state.session else { return (None, None) };
        let Some(mut vm) = lock(&session.vm).take() else { return (None, None) };
        let failed = vm.start(running).err();
        if let Some(missing) = session.missing() {
            missing.set_vcpus(vm.vcpu_threads());
        }
        session.set_running();
        (Some(vm), failed.map(|error| format!("the VM is owned here but could not be started: {error}")))
    }

    /// Tells the observer of this, if it has happened. Like every event, never under a lock: an observer may call the
    /// [`ReceiverHandle`].
    fn warn(&self, what: Option<String>) {
        if let Some(what) = what {
            self.options.observer.event(&Event::Warning(what));
        }
    }

    /// Ends the attempt that is under way if `must` says so of what it has done, unless the VM is complete.
    fn end_attempt(&self, why: &str, must: impl FnOnce(&Allowance) -> bool) {
        use DestinationPhase::{Loading, Preparing, Receiving};
        let state = lock(&self.state);
        // a newer attempt may have begun whose session is not there yet
        let session = state.session.clone().filter(|session| session.epoch == state.machine.epoch());
        let Some(session) = session else { return };
        if !matches!(state.machine.phase(), Preparing | Receiving | Loading) || !must(&session.allowance) {
            return;
        }
        let attachment = state.attachment;
        drop(state);
        session.last_word(ErrorCode::Busy, why);
        self.lost(attachment, why);
    }

    /// The VM runs, and is the host's from now on.
    fn adopt(&self, vm: Option<Box<dyn DestinationVm>>) {
        if let Some(vm) = vm {
            lock(&self.host).adopted(vm);
        }
    }

    /// The control lane of this attachment is gone.
    fn lost(&self, attachment: u64, why: &str) {
        let mut state = lock(&self.state);
        if state.attachment != attachment {
            return;
        }
        let given_up = match state.machine.link_lost() {
            OnDestinationLoss::Discard => state.session.take(),
            OnDestinationLoss::Hold | OnDestinationLoss::Nothing => None,
        };
        if state.machine.is_served() {
            lock(&self.host).link_lost();
        }
        drop(state);
        self.discard(given_up, why);
    }

    /// The link of `session` is lost. Its control lane may not notice, since the thread that reads it loads the state, and
    /// waits for a page that was under way.
    fn lost_while_loading(&self, session: &Arc<Session>, why: &str) {
        let mut state = lock(&self.state);
        let ours = state.session.as_ref().is_some_and(|present| Arc::ptr_eq(present, session));
        if !ours || state.machine.phase() != DestinationPhase::Loading {
            return;
        }
        state.machine.link_lost();
        // who loads finds that it does not speak for the session any more
        state.attachment += 1;
        let given_up = state.session.take();
        drop(state);
        self.discard(given_up, why);
    }

    fn discard(&self, given_up: Option<Arc<Session>>, why: &str) {
        self.free_vm(given_up, why);
        self.tell_phase();
    }

    /// Frees the VM that was being received or held, and ends its lanes.
    fn free_vm(&self, given_up: Option<Arc<Session>>, why: &str) {
        if given_up.is_some_and(|session| session.discard(why)) {
            self.options.observer.event(&Event::Discarded(why.to_owned()));
        }
    }

    fn tell_phase(&self) {
        let phase = lock(&self.state).machine.phase();
        self.options.observer.event(&Event::Destination(phase));
    }
}

/// Tells a source that encrypts why it is refused, and waits until it has gone: what is unread when a connection closes
/// makes some transports forget what was written last.
fn refuse_sealed(reader: &mut dyn ReadHalf, control: &mut ControlWriter, why: &DecodeError, patience: Duration) {
    // best effort: the lane ends either way
    if control.send(0, &Control::error(ErrorCode::Security, why.to_string())).is_err() {
        return;
    }
    let end = Instant::now() + patience;
    // a handshake's first message is far shorter; one that comes a byte at a time is waited for no longer
    for _ in 0..4096 {
        if Instant::now() > end || reader.read_exact(&mut [0]).is_err() {
            return;
        }
    }
}

fn no_vm() -> MigrationError {
    MigrationError::Vm { step: "receiving", cause: no_longer_here() }
}

fn no_longer_here() -> VmError {
    VmError::new("the VM was discarded meanwhile")
}
