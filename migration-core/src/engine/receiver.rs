//! The destination's engine: accepts lanes, builds the VM, receives it, and runs it when it is ours.

mod survive;

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use thiserror::Error;

use super::{
    checkpoint::Protection,
    control::{ControlReader, ControlWriter},
    handle::lock,
    install::LaneReceiver,
    missing::Missing,
    serve::add_missing,
    session::Session,
};
use crate::{
    MigrationError,
    channel::{Channel, Closer, Halves, Listener, ReadHalf},
    checkpoint::ForwardStores,
    codec::DecodeError,
    fence::{Fence, NoFence},
    pager::Pager,
    protocol::{DestinationAction, DestinationMachine, DestinationPhase, OnDestinationLoss, Violation},
    report::{Event, NoObserver, Observer},
    spawner::{GuestImpact, Joiner, Role, Spawner, StdSpawner},
    state::VmState,
    vm::{DestinationHost, DestinationVm, VmError, VmId},
    wire::{
        Control, ErrorCode, FEATURE_CHECKPOINTS, FEATURE_HUGE_BLOCKS, FEATURE_POST_COPY, FEATURE_SHARED_RAM, FEATURES,
        HUGE_BLOCK, Hello, LaneKind, MAX_STREAMS, OLDEST_VERSION, Preamble, SEALED_MAGIC, SessionToken, VERSION,
        Welcome, negotiate,
    },
};

/// How often the accept loop looks whether it shall stop.
const ACCEPT_TICK: Duration = Duration::from_millis(50);
/// Connections beyond the lanes of a session that may be open at once; more are closed unheard.
const MAX_STRANGERS: usize = 64;

/// Limits and choices at a destination.
#[derive(Clone)]
pub struct ReceiverOptions {
    /// Most bulk lanes; a source that wants more gets this many.
    pub max_streams: u16,
    /// Most bytes of RAM that a VM may have.
    pub max_ram_bytes: u64,
    /// How long a peer may be silent: before it has introduced itself, while its lanes are awaited, on the control lane.
    pub idle_timeout: Duration,
    /// In fail-safe post-copy, makes certain that a source is dead: output that is held for its sake may then leave.
    pub fence: Arc<dyn Fence>,
    /// In fail-safe post-copy, where to find what a source that has died had left behind; `None` if nowhere.
    pub forward: Option<Arc<dyn ForwardStores>>,
    /// Starts threads.
    pub spawner: Arc<dyn Spawner>,
    /// Is told how it goes.
    pub observer: Arc<dyn Observer>,
}

impl Default for ReceiverOptions {
    fn default() -> Self {
        Self {
            max_streams: MAX_STREAMS,
            max_ram_bytes: 1 << 40,
            idle_timeout: Duration::from_secs(10),
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
    /// Ends each open connection; `None` once the receiver has ended.
    closers: Mutex<Option<HashMap<u64, Arc<dyn Closer>>>>,
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
        let state = State { machine: DestinationMachine::new(), session: None, attachment: 0 };
        let hub = Hub {
            options,
            host: Mutex::new(host),
            state: Mutex::new(state),
            stop: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            bytes: Arc::default(),
            closers: Mutex::new(Some(HashMap::new())),
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
        let (ended_tx, ended) = mpsc::channel();
        let mut threads: HashMap<u64, Box<dyn Joiner>> = HashMap::new();
        let mut next = 0u64;
        let result = loop {
            if hub.stop.load(Ordering::Relaxed) {
                break Err(ReceiveError::Stopped);
            }
            if hub.finished.load(Ordering::Relaxed) {
                break Ok(());
            }
            let accepted = match listener.accept(ACCEPT_TICK) {
                Ok(accepted) => accepted,
                Err(error) => break Err(error.into()),
            };
            for id in ended.try_iter() {
                if let Some(thread) = threads.remove(&id) {
                    thread.join();
                }
            }
            let Some(channel) = accepted else { continue };
            if threads.len() >= usize::from(hub.options.max_streams) + MAX_STRANGERS {
                hub.bad_peer(&channel.peer(), "too many connections");
                continue;
            }
            let (id, peer, hub_of_thread, ended) = (next, channel.peer(), hub.clone(), ended_tx.clone());
            next += 1;
            let body = Box::new(move || {
                hub_of_thread.serve(id, channel);
                drop(lock(&hub_of_thread.closers).as_mut().map(|open| open.remove(&id)));
                // the loop may have ended: it joins all threads by itself then
                let _ = ended.send(id);
            });
            // which role it gets is known only once it has introduced itself; pages are what most of them carry
            match hub.options.spawner.spawn(Role::Bulk, GuestImpact::Balanced, "mig-receive", body) {
                Ok(thread) => drop(threads.insert(id, thread)),
                Err(error) => hub.bad_peer(&peer, &format!("no thread: {error}")),
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
        for closer in lock(&hub.closers).take().iter().flat_map(HashMap::values) {
            closer.close();
        }
        for (_, thread) in threads {
            thread.join();
        }
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

    /// Bytes received and sent on all lanes so far.
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
        if let DestinationAction::Start { running } = action {
            self.hub.start(&state, running);
        }
        drop(state);
        self.hub.finished.store(true, Ordering::Relaxed);
        Ok(())
    }
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

    fn serve(self: &Arc<Self>, id: u64, channel: Box<dyn Channel>) {
        let peer = channel.peer();
        if let Err(error) = self.introduce(id, channel, &peer) {
            self.bad_peer(&peer, &error.to_string());
        }
    }

    /// Reads the preamble of a new connection and lets it do what it is for.
    fn introduce(self: &Arc<Self>, id: u64, channel: Box<dyn Channel>, peer: &str) -> Result<(), MigrationError> {
        let link = || MigrationError::link(peer);
        let Halves { mut reader, mut writer, closer } = channel.split().map_err(link())?;
        let closer: Arc<dyn Closer> = closer.into();
        match lock(&self.closers).as_mut() {
            Some(open) => drop(open.insert(id, closer.clone())),
            None => return Ok(()),
        }
        reader.set_idle_timeout(Some(self.options.idle_timeout)).map_err(link())?;
        writer.set_idle_timeout(Some(self.options.idle_timeout)).map_err(link())?;
        let mut bytes = [0; Preamble::LEN];
        reader.read_exact(&mut bytes).map_err(link())?;
        let mut control = ControlWriter::new(writer, peer.to_owned(), self.bytes.clone());
        let preamble = Preamble::decode(&bytes).inspect_err(|error| {
            if bytes.starts_with(&SEALED_MAGIC) {
                refuse_sealed(&mut *reader, &mut control, error);
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
                self.attempt(epoch, hello, frames, control, closer, peer)
            }
            (LaneKind::Reattach, (epoch, Control::Reattach(vm))) => {
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

    /// A source that is in doubt comes back.
    fn reattach(
        self: &Arc<Self>,
        token: SessionToken,
        (vm, epoch): (VmId, u32),
        mut frames: ControlReader,
        mut control: ControlWriter,
        closer: Arc<dyn Closer>,
        peer: &str,
    ) -> Result<(), MigrationError> {
        let refuse = |control: &mut ControlWriter, why: &str| {
            control.send(epoch, &Control::error(ErrorCode::UnknownSession, why))?;
            Err(MigrationError::Peer { code: ErrorCode::UnknownSession, text: why.to_owned() })
        };
        let Ok(session) = self.session(token) else {
            return refuse(&mut control, "this session is not known here");
        };
        let attachment = {
            let mut state = lock(&self.state);
            if !state.machine.may_reattach(vm, epoch) {
                drop(state);
                return refuse(&mut control, "no VM of this epoch is held here");
            }
            session.replace_control(control, closer);
            state.machine.handle(epoch, Control::Reattach(vm))?;
            state.attachment += 1;
            state.attachment
        };
        let served = self.frames(&mut frames, &session, attachment);
        self.ended(&session, attachment, peer, served);
        Ok(())
    }

    /// A source begins an attempt.
    fn attempt(
        self: &Arc<Self>,
        epoch: u32,
        hello: Control,
        mut frames: ControlReader,
        mut control: ControlWriter,
        closer: Arc<dyn Closer>,
        peer: &str,
    ) -> Result<(), MigrationError> {
        let begun = {
            let mut state = lock(&self.state);
            state.machine.handle(epoch, hello).map(|action| {
                state.attachment += 1;
                (action, state.attachment)
            })
        };
        let (action, attachment) = match begun {
            Ok(begun) => begun,
            Err(violation) => {
                control.send(epoch, &Control::error(violation.code, violation.to_string()))?;
                return Err(violation.into());
            }
        };
        self.tell_phase();
        let DestinationAction::Build { hello, .. } = action else { return Ok(()) };
        let (streams, features) = (hello.streams.min(self.options.max_streams).max(1), hello.features);
        let wanted = (streams, features);
        let (session, features) = match self.build(epoch, attachment, *hello, wanted, (&mut frames, control), closer) {
            Ok(built) => built,
            Err(error) => {
                self.lost(attachment, &error.to_string());
                return Err(error);
            }
        };
        if features & FEATURE_SHARED_RAM != 0 {
            // up to here this thread competed with the guest
            self.options.spawner.assume(Role::HandOver, GuestImpact::Balanced);
        }
        let opened = self.open(&session, attachment, features);
        let served = opened.and_then(|()| self.frames(&mut frames, &session, attachment));
        self.ended(&session, attachment, peer, served);
        Ok(())
    }

    /// Builds the VM and the session in which it is received.
    fn build(
        &self,
        epoch: u32,
        attachment: u64,
        hello: Hello,
        (streams, features): (u16, u32),
        (frames, mut control): (&mut ControlReader, ControlWriter),
        closer: Arc<dyn Closer>,
    ) -> Result<(Arc<Session>, u32), MigrationError> {
        let shared = features & FEATURE_SHARED_RAM != 0;
        // a VM of an earlier epoch is void: free it before the new one needs the memory
        let earlier = self.current(attachment)?.session.take();
        self.free_vm(earlier, "a newer attempt of its source takes its place");
        self.join_watchers();
        let ram_bytes = hello.vm.layout.bytes();
        let built = if ram_bytes > self.options.max_ram_bytes {
            let limit = self.options.max_ram_bytes;
            Err(VmError::new(format!("the VM has {ram_bytes} bytes of RAM, this destination takes {limit}")))
        } else if shared {
            self.receive_ram(&hello, frames)
        } else {
            lock(&self.host).build(&hello.vm)
        };
        let mut vm = match built.and_then(|vm| check_layout(vm, &hello)) {
            Ok(vm) => vm,
            Err(cause) => {
                control.send(epoch, &Control::error(ErrorCode::Mismatch, cause.to_string()))?;
                return Err(MigrationError::Vm { step: "building the VM", cause });
            }
        };
        let pager = if shared { None } else { vm.pager() };
        let mut features = if shared { FEATURE_SHARED_RAM } else { granted(features, pager.as_deref()) };
        let protection = match self.protection(&mut *vm, &mut features) {
            Ok(protection) => protection.map(Arc::new),
            Err(cause) => {
                control.send(epoch, &Control::error(ErrorCode::State, cause.to_string()))?;
                return Err(MigrationError::Vm { step: "building the VM", cause });
            }
        };
        let pager = pager.filter(|_| features & FEATURE_POST_COPY != 0);
        let token = new_token(hello.vm.id, epoch);
        let crc = features & crate::wire::FEATURE_PAYLOAD_CRC != 0;
        let session = Session::new((token, epoch), streams, (crc, shared), vm, (pager, protection), control, closer);
        let session = Arc::new(session);
        self.current(attachment)?.session = Some(session.clone());
        Ok((session, features))
    }

    /// Builds a VM in the RAM that its source shares.
    fn receive_ram(&self, hello: &Hello, frames: &mut ControlReader) -> Result<Box<dyn DestinationVm>, VmError> {
        if hello.features != FEATURE_SHARED_RAM {
            let why = format!("features {:#x}: shared RAM goes with no other", hello.features);
            return Err(VmError::new(why));
        }
        let files = frames.files(hello.vm.layout.regions().len());
        let files = files.map_err(|e| VmError::because("the memory files behind RAM", e))?;
        lock(&self.host).build_shared(&hello.vm, files)
    }

    /// Readies the VM for checkpoints if they are wanted, or takes the feature back.
    fn protection(&self, vm: &mut dyn DestinationVm, features: &mut u32) -> Result<Option<Protection>, VmError> {
        if *features & FEATURE_CHECKPOINTS == 0 {
            return Ok(None);
        }
        let Some(protected) = vm.protected() else {
            *features &= !FEATURE_CHECKPOINTS;
            return Ok(None);
        };
        Protection::new(protected, vm.identity(), vm.ram().layout().pages()).map(Some)
    }

    /// Has the source open its lanes, and tells it when everything stands ready for pages.
    fn open(&self, session: &Session, attachment: u64, features: u32) -> Result<(), MigrationError> {
        let welcome = Welcome { version: VERSION, features, streams: session.lanes, session: session.token };
        session.say(&Control::Welcome(welcome))?;
        session.wait_attached(self.options.idle_timeout)?;
        let prepared = self.current(attachment)?.machine.prepared()?;
        session.say(&prepared)?;
        self.tell_phase();
        Ok(())
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

    /// Serves a control lane from its second frame on.
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
        self.bad_peer(peer, &why);
        let link = session.link();
        self.lost(attachment, &why);
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
                session.wait_round(generation, self.options.idle_timeout, &self.bytes)?;
                session.seal(generation)?;
                if let Some(announced) = post_copy {
                    // before anything is loaded, which touches RAM
                    self.arm(session, attachment, generation, announced)?;
                }
                let vm_state = VmState::decode(&bytes)?;
                // without the lock on all else: this may wait for a missing page, and the page for a newer attempt
                let loaded = match lock(&session.vm).as_mut() {
                    Some(vm) => vm.load_state(&vm_state).map_err(MigrationError::vm("loading the state")),
                    None => Err(no_vm()),
                };
                let mut state = lock(&self.state);
                if state.attachment != attachment {
                    return Ok(Flow::End);
                }
                loaded?;
                // ready before it is said: if saying it fails, the source may have heard it all the same
                let ready = state.machine.loaded()?;
                drop(state);
                session.say(&ready)?;
                self.tell_phase();
            }
            DestinationAction::Start { running } => {
                self.start(&state, running);
                drop(state);
                self.answer(session, attachment)?;
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
        self: &Arc<Self>,
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
        let granule = pager.granule();
        if granule > 1 && pages.ranges().any(|r| r.first % granule != 0 || r.count % granule != 0) {
            return Err(DecodeError::invalid("missing pages", "not whole huge pages").into());
        }
        pager.arm(&pages).map_err(MigrationError::vm("watching for missing pages"))?;
        if let Some(protection) = &session.protection {
            protection.begin()?;
        }
        let missing = Arc::new(Missing::new(pager, pages, last + 1, lanes, self.bytes.clone()));
        session.set_missing(&missing)?;
        for number in 0..usize::from(lanes) {
            let (hub, missing) = (self.clone(), missing.clone());
            let body = Box::new(move || {
                if let Err(error) = missing.watch(number) {
                    let why = format!("faults are not served any more: {error}");
                    hub.options.observer.event(&Event::Warning(why));
                }
            });
            self.watcher(Role::Demand, "mig-fault", body)?;
        }
        let (hub, session) = (self.clone(), session.clone());
        let body = Box::new(move || {
            if missing.wait_ended() {
                hub.all_there(&session, &missing);
                missing.pager.settle();
            }
        });
        self.watcher(Role::Control, "mig-missing", body)
    }

    fn watcher(&self, role: Role, name: &str, body: Box<dyn FnOnce() + Send>) -> Result<(), MigrationError> {
        let thread = self.options.spawner.spawn(role, GuestImpact::Balanced, name, body);
        let thread = thread.map_err(|cause| MigrationError::Thread { role: "serving faults", cause })?;
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

    /// The VM runs here: answers *run*.
    fn answer(&self, session: &Session, attachment: u64) -> Result<(), MigrationError> {
        session.tell_running()?;
        if let Some(missing) = session.missing()
            && missing.pages().is_empty()
        {
            // before the source can answer to it
            self.current(attachment)?.machine.complete()?;
            session.tell_complete(&missing)?;
        }
        Ok(())
    }

    fn start(&self, state: &State, running: bool) {
        let Some(session) = &state.session else { return };
        let Some(mut vm) = lock(&session.vm).take() else { return };
        if let Err(error) = vm.start(running) {
            let why = format!("the VM is owned here but could not be started: {error}");
            self.options.observer.event(&Event::Warning(why));
        }
        if let Some(missing) = session.missing() {
            missing.set_vcpus(vm.vcpu_threads());
        }
        lock(&self.host).adopted(vm);
        session.set_running();
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

/// Of the feature bits that a source wants, those that a VM with this pager supports.
fn granted(wanted: u32, pager: Option<&dyn Pager>) -> u32 {
    let both = FEATURE_POST_COPY | FEATURE_HUGE_BLOCKS;
    let post_copy = match pager.map(|pager| pager.granule()) {
        Some(1) => wanted & FEATURE_POST_COPY,
        // a source that would send single pages cannot serve it
        Some(HUGE_BLOCK) if wanted & both == both => both,
        _ => 0,
    };
    let without = both | if post_copy == 0 { FEATURE_CHECKPOINTS } else { 0 };
    wanted & FEATURES & !without | post_copy
}

/// Tells a source that encrypts why it is refused, and waits until it has gone: what is unread when a connection closes
/// makes some transports forget what was written last.
fn refuse_sealed(reader: &mut dyn ReadHalf, control: &mut ControlWriter, why: &dyn std::fmt::Display) {
    // best effort: the lane ends either way
    if control.send(0, &Control::error(ErrorCode::Security, why.to_string())).is_err() {
        return;
    }
    // a handshake's first message is far shorter
    for _ in 0..4096 {
        if reader.read_exact(&mut [0]).is_err() {
            return;
        }
    }
}

fn no_vm() -> MigrationError {
    MigrationError::Vm { step: "receiving", cause: VmError::new("the VM was discarded meanwhile") }
}

/// Pages are checked against the hello's layout: the VM must have been built with the very same.
fn check_layout(vm: Box<dyn DestinationVm>, hello: &Hello) -> Result<Box<dyn DestinationVm>, VmError> {
    if *vm.ram().layout() == hello.vm.layout {
        Ok(vm)
    } else {
        Err(VmError::new("the VM was built with another RAM layout than the source's"))
    }
}

/// A token that nobody can guess: SipHash under keys that the standard library draws from the operating system.
fn new_token(vm: VmId, epoch: u32) -> SessionToken {
    let mut token = [0; 16];
    for half in token.chunks_mut(8) {
        // every `RandomState` has keys of its own
        half.copy_from_slice(&RandomState::new().hash_one((vm, epoch)).to_le_bytes());
    }
    SessionToken(token)
}
