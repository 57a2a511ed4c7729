//! How others talk to a migration that is under way.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use thiserror::Error;

use super::{SourceOptions, lane::LaneDone, source};
use crate::{
    MigrationError,
    channel::Connector,
    lock::lock,
    report::{Degraded, Report, StagingReport},
    spawner::{Joiner, Role},
    strategy::{Destination, Strategy},
    vm::SourceVm,
    wire::Control,
};

/// Everything that reaches the source's engine while it works.
pub(super) enum Input {
    /// A frame, with the epoch of its header.
    Control(u32, Control),
    /// The control lane was lost.
    ControlLost(MigrationError),
    /// A lane has done its part of a round, or failed.
    Lane(Result<LaneDone, MigrationError>),
    /// A page was sent because the destination's guest waits for it.
    Demanded(u64),
    /// The destination has said who it is, for a fence.
    Introduced,
    /// The thread that talks to the stores of a place has done something.
    Place(source::PlaceDone),
    /// The user cancels, for this reason.
    Cancel(String),
    /// The guest has ended by itself, for this reason.
    VmEnded(String),
    /// The user wants the hand-over now, and the rest to follow.
    PostCopy,
    /// The user wants the switch-over now: see [`Requests::switch_over_wanted`].
    SwitchOver,
    /// After a loss of the link the destination is to be found there.
    Recover(Arc<dyn Connector>),
    /// The user wants a protected VM to move.
    Evict(EvictTo),
    /// The user wants a VM not to be protected any more.
    StageOff,
}

/// Where a protected VM is to go.
pub(super) struct EvictTo {
    pub(super) to: Destination,
    pub(super) connector: Arc<dyn Connector>,
    /// When the user has said so.
    pub(super) at: Instant,
}

/// Inputs that the peer causes and that may wait for the engine. When there are more, the peer
/// waits.
const MAX_WAITING: usize = 1024;
/// How long a thread that reads for the engine waits before it looks again whether the engine has
/// caught up.
const CATCH_UP: Duration = Duration::from_millis(1);

/// Counts the inputs that the peer has caused and that the engine has not taken yet.
pub(super) type Waiting = Arc<AtomicUsize>;

/// The migration is over: nobody takes inputs any more.
#[derive(Debug)]
pub(super) struct NobodyListens;

/// How the threads of one link pass on what its peer sends: no faster than the engine takes it.
#[derive(Clone)]
pub(super) struct PeerInputs {
    tx: mpsc::Sender<Input>,
    waiting: Waiting,
    /// Set when the link ends: nobody takes anything of it any more.
    ended: Arc<AtomicBool>,
}

impl PeerInputs {
    pub(super) fn new(tx: mpsc::Sender<Input>, waiting: Waiting, ended: Arc<AtomicBool>) -> Self {
        Self { tx, waiting, ended }
    }

    /// Passes an input on. An error when nobody listens any more.
    pub(super) fn send(&self, input: Input) -> Result<(), NobodyListens> {
        if input.is_counted() {
            while self.waiting.load(Ordering::Relaxed) >= MAX_WAITING && !self.ended.load(Ordering::Relaxed) {
                thread::sleep(CATCH_UP);
            }
            self.waiting.fetch_add(1, Ordering::Relaxed);
        }
        self.tx.send(input).map_err(|_| NobodyListens)
    }
}

/// Where the engine takes its inputs.
pub(super) struct Inputs {
    rx: mpsc::Receiver<Input>,
    pub(super) waiting: Waiting,
    /// Inputs that came while another one was looked for, in order: the next ones to be taken.
    passed: VecDeque<Input>,
}

impl Inputs {
    pub(super) fn new(rx: mpsc::Receiver<Input>) -> Self {
        Self { rx, waiting: Waiting::default(), passed: VecDeque::new() }
    }

    pub(super) fn recv_timeout(&mut self, timeout: Duration) -> Result<Input, mpsc::RecvTimeoutError> {
        let next = self.passed.pop_front().map_or_else(|| self.rx.recv_timeout(timeout), Ok);
        next.inspect(|input| self.taken(input))
    }

    pub(super) fn try_recv(&mut self) -> Result<Input, mpsc::TryRecvError> {
        let next = self.passed.pop_front().map_or_else(|| self.rx.try_recv(), Ok);
        next.inspect(|input| self.taken(input))
    }

    /// Takes an input out of turn, without waiting for it. All others stay where they are.
    pub(super) fn find(&mut self, wanted: impl Fn(&Input) -> bool) -> Option<Input> {
        // those of the peer are bounded, as they count until they are taken
        self.passed.extend(self.rx.try_iter());
        let at = self.passed.iter().position(wanted)?;
        self.passed.remove(at).inspect(|input| self.taken(input))
    }

    /// Drops what a session that is over has left. What others ask for stays.
    pub(super) fn forget_session(&mut self) {
        self.passed.extend(self.rx.try_iter());
        let (of_session, others): (VecDeque<_>, _) =
            std::mem::take(&mut self.passed).into_iter().partition(Input::is_of_session);
        of_session.iter().for_each(|input| self.taken(input));
        self.passed = others;
    }

    fn taken(&self, input: &Input) {
        if input.is_counted() {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Input {
    /// Whether it comes from the threads of a session.
    fn is_of_session(&self) -> bool {
        matches!(self, Self::Control(..) | Self::ControlLost(_) | Self::Lane(_) | Self::Demanded(_) | Self::Introduced)
    }

    /// Whether a peer can cause any number of it.
    fn is_counted(&self) -> bool {
        matches!(self, Self::Control(..) | Self::Demanded(_) | Self::Introduced)
    }
}

/// Why a migration cannot be switched to post-copy.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
pub enum NoPostCopy {
    /// Not known before the destination has answered for the first time: the observer is told of
    /// [`Copying`](crate::protocol::SourcePhase::Copying) then.
    #[error("what the destination can do is not known yet")]
    NotYet,
    /// This side was told to open no demand lanes.
    #[error("demand lanes are off")]
    NoLanes,
    /// The destination did not agree to it.
    #[error("the destination cannot serve missing pages (no userfaultfd, or not permitted)")]
    NotAgreed,
    /// The guest is paused for the hand-over, or was handed over.
    #[error("too late, the hand-over has begun")]
    TooLate,
    /// There is nothing to switch any more.
    #[error("the migration has ended")]
    Ended,
    /// What is under way moves no VM.
    #[error("a snapshot is being taken, no migration is under way")]
    Snapshot,
}

/// Why a switch-over cannot be forced.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
pub enum NoSwitchOver {
    /// The destination has not built the VM yet: the observer is told of
    /// [`Copying`](crate::protocol::SourcePhase::Copying) when it has.
    #[error("the destination is not ready yet")]
    NotYet,
    /// The strategy has no rounds that could be cut short.
    #[error("this strategy has no rounds to cut short: it switches over by itself as soon as it can")]
    Strategy,
    /// The guest is paused for the hand-over, or was handed over.
    #[error("too late, the hand-over has begun")]
    TooLate,
    /// There is nothing to switch over any more.
    #[error("the migration has ended")]
    Ended,
    /// What is under way moves no VM.
    #[error("a snapshot is being taken: it pauses the guest by itself, for as long as its downtime limit allows")]
    Snapshot,
}

/// Why limits cannot be changed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
pub enum NoTuning {
    /// The guest is paused for the hand-over, or was handed over: nothing is decided by the limit
    /// any more.
    #[error("too late, the hand-over has begun")]
    TooLate,
    /// There is nothing to tune any more.
    #[error("the migration has ended")]
    Ended,
}

/// Why a VM cannot be evicted.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
pub enum NoEviction {
    /// No copy of the VM is kept ready, or not yet.
    #[error("the VM is not protected: no copy of it is kept ready")]
    NotStaged,
    /// A command has come before.
    #[error("the VM is being evicted already")]
    UnderWay,
    /// The VM is not protected any more.
    #[error("the protection of the VM has ended")]
    Ended,
}

/// How the copy of a protected VM was when the engine looked last.
#[derive(Clone)]
pub(super) struct StagingState {
    pub(super) increments: u64,
    pub(super) staged_pages: u64,
    pub(super) dirty_pages: u64,
    pub(super) last_increment: Option<Instant>,
    /// Since when a store fails, and why.
    pub(super) degraded: Option<(Instant, String)>,
    pub(super) failed_evictions: u64,
    pub(super) last_failure: Option<String>,
}

impl StagingState {
    pub(super) fn report(&self) -> StagingReport {
        let degraded = self.degraded.as_ref();
        StagingReport {
            increments: self.increments,
            staged_pages: self.staged_pages,
            dirty_pages: self.dirty_pages,
            age: self.last_increment.map(|at| at.elapsed()),
            degraded: degraded.map(|(since, why)| Degraded { since: since.elapsed(), why: why.clone() }),
            failed_evictions: self.failed_evictions,
            last_failure: self.last_failure.clone(),
        }
    }
}

/// What controllers and the engine share: what can be asked for at the moment, which the engine
/// says, and what was.
pub(super) struct Requests {
    pub(super) post_copy: Result<(), NoPostCopy>,
    pub(super) switch_over: Result<(), NoSwitchOver>,
    pub(super) tuning: Result<(), NoTuning>,
    pub(super) eviction: Result<(), NoEviction>,
    /// How the copy of a protected VM is.
    pub(super) staging: Option<StagingState>,
    /// The limit that takes the place of the one in the options.
    pub(super) downtime_limit: Option<Duration>,
    /// Whether the switch-over is to come now, whatever is left to send.
    pub(super) switch_over_wanted: bool,
}

impl Requests {
    /// Nothing can be asked for any more.
    pub(super) fn end(&mut self) {
        (self.post_copy, self.switch_over) = (Err(NoPostCopy::Ended), Err(NoSwitchOver::Ended));
        self.tuning = Err(NoTuning::Ended);
        self.eviction = Err(NoEviction::Ended);
        self.staging = None;
    }
}

impl Default for Requests {
    fn default() -> Self {
        Self {
            post_copy: Err(NoPostCopy::NotYet),
            switch_over: Err(NoSwitchOver::NotYet),
            tuning: Ok(()),
            eviction: Err(NoEviction::NotStaged),
            staging: None,
            downtime_limit: None,
            switch_over_wanted: false,
        }
    }
}

/// Sends commands to a migration; may be cloned and used from any thread.
#[derive(Clone)]
pub struct Controller {
    inputs: mpsc::Sender<Input>,
    requests: Arc<Mutex<Requests>>,
}

impl Controller {
    /// A controller, and the other end, which goes to [`migrate`](super::migrate).
    pub fn new() -> (Self, Commands) {
        let (tx, rx) = mpsc::channel();
        let requests = Arc::<Mutex<Requests>>::default();
        (Self { inputs: tx.clone(), requests: requests.clone() }, Commands { tx, rx, requests })
    }

    /// Ends the migration if the hand-over has not begun; does nothing afterwards. Does not wait:
    /// the report tells. Of a VM that [`stage`](super::stage) protects, this ends the eviction that
    /// is under way, if there is one, and the protection goes on.
    ///
    /// The engine hears this at once, unless it is in a call that it cannot interrupt: one of the
    /// VMM or of a store, a write to a destination that takes nothing
    /// ([`SourceOptions::idle_timeout`](super::SourceOptions)), or the opening of one channel. The
    /// last takes the connector's time-out and that of the resolver of names, and on an encrypted
    /// link that of the handshake, at the most: in migration-transport
    /// `ConnectOptions::connect_timeout`, in migration-crypto `Security::handshake_timeout`, both
    /// 10 s by default. No further channel is opened then.
    pub fn cancel(&self, why: impl Into<String>) {
        // a migration that has ended does not listen any more
        let _ = self.inputs.send(Input::Cancel(why.into()));
    }

    /// The guest has ended by itself, for this reason: it has powered off or crashed. Ends the
    /// migration (or the snapshot) at once with [`MigrationError::VmEnded`], and tells the
    /// destination, if *run* was not sent yet; afterwards there is no guest here that could end,
    /// and nothing happens. Does not wait: the report tells.
    ///
    /// A VMM calls this when it sees the end, whatever the migration is doing. That a guest has
    /// ended is else found out only when [`SourceVm::pause`] fails.
    pub fn vm_ended(&self, reason: impl Into<String>) {
        // as above
        let _ = self.inputs.send(Input::VmEnded(reason.into()));
    }

    /// While the link is lost after the hand-over: tries again at once, and from now on where
    /// `connector` leads. Else it is kept for the next loss. (The engine also tries by itself, with
    /// growing pauses, where it connected first.)
    pub fn recover(&self, connector: Arc<dyn Connector>) {
        // as above
        let _ = self.inputs.send(Input::Recover(connector));
    }

    /// Moves a VM that [`stage`](super::stage) protects to this destination, which `connector`
    /// reaches. Does not wait: the observer is told of an
    /// [eviction that has failed](crate::report::Event::EvictionFailed), after which the VM is
    /// protected as before, and otherwise the report tells.
    ///
    /// # Errors
    /// When it cannot happen. The protection goes on as if nobody had asked.
    pub fn evict(&self, to: Destination, connector: Arc<dyn Connector>) -> Result<(), NoEviction> {
        let mut requests = lock(&self.requests);
        requests.eviction?;
        requests.eviction = Err(NoEviction::UnderWay);
        drop(requests);
        let command = EvictTo { to, connector, at: Instant::now() };
        self.inputs.send(Input::Evict(command)).map_err(|_| NoEviction::Ended)
    }

    /// Ends the protection of a VM by [`stage`](super::stage), and an eviction that is under way,
    /// unless *run* was sent: what was put into stores is forgotten, and the guest runs on. Does
    /// nothing in a migration. Does not wait: the report tells.
    pub fn stage_off(&self) {
        // as for `cancel`
        let _ = self.inputs.send(Input::StageOff);
    }

    /// Returns how the copy of a VM is that [`stage`](super::stage) protects, as the engine has
    /// seen it last; `None` if none is kept ready.
    pub fn staging(&self) -> Option<StagingReport> {
        let state = lock(&self.requests).staging.clone();
        state.map(|state| state.report())
    }

    /// Switches to post-copy as soon as the strategy can: the VM is handed over, and the pages that
    /// are left follow. Does not wait for that.
    ///
    /// # Errors
    /// When it cannot happen; the migration goes on as if nobody had asked.
    pub fn post_copy(&self) -> Result<(), NoPostCopy> {
        lock(&self.requests).post_copy?;
        self.inputs.send(Input::PostCopy).map_err(|_| NoPostCopy::Ended)
    }

    /// Forces the switch-over now, as if the rounds had converged: the round under way ends early,
    /// the guest is paused, and all that is left is sent in the pause, however long that takes. A
    /// strategy that hands over with pages missing ([`Hybrid`](crate::strategy::Hybrid)) hands over
    /// now, and they follow. Does not wait for that. What the pause is predicted to take is in the
    /// report beside what it took.
    ///
    /// # Errors
    /// When it cannot happen; the migration goes on as if nobody had asked. After
    /// [`NoSwitchOver::NotYet`], ask again once the observer is told of the next phase.
    pub fn switch_over(&self) -> Result<(), NoSwitchOver> {
        let mut requests = lock(&self.requests);
        requests.switch_over?;
        requests.switch_over_wanted = true;
        drop(requests);
        self.inputs.send(Input::SwitchOver).map_err(|_| NoSwitchOver::Ended)
    }

    /// Changes the longest acceptable downtime. It holds from the next decision on: that after the
    /// round under way, or, for a snapshot, after the pass under way. May be called before the
    /// destination has answered.
    ///
    /// # Errors
    /// When nothing is decided by it any more.
    pub fn set_downtime_limit(&self, limit: Duration) -> Result<(), NoTuning> {
        let mut requests = lock(&self.requests);
        requests.tuning?;
        requests.downtime_limit = Some(limit);
        Ok(())
    }
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Controller")
    }
}

/// The receiving end of a [`Controller`].
pub struct Commands {
    pub(super) tx: mpsc::Sender<Input>,
    pub(super) rx: mpsc::Receiver<Input>,
    pub(super) requests: Arc<Mutex<Requests>>,
}

/// What is left after a migration: the VM (still ours unless the report says completed) and the
/// report.
pub type Ended = (Box<dyn SourceVm>, Report);

#[derive(Default)]
struct Slot {
    ended: Mutex<Option<Ended>>,
    changed: Condvar,
}

/// A migration on a thread of its own, for VMMs whose event loop must not block.
///
/// Nothing here blocks but [`wait`](Migration::wait): poll [`try_take`](Migration::try_take), or
/// let the `notify` callback of [`start`](Migration::start) write to an eventfd or wake a task.
pub struct Migration {
    controller: Controller,
    slot: Arc<Slot>,
    thread: Option<Box<dyn Joiner>>,
}

impl Migration {
    /// Starts to migrate `vm`. `notify` is called once, when the result can be taken.
    ///
    /// # Errors
    /// When the spawner has no thread; the VM comes back, as it was.
    pub fn start(
        vm: Box<dyn SourceVm>,
        connector: Arc<dyn Connector>,
        mut strategy: Box<dyn Strategy>,
        options: SourceOptions,
        notify: Box<dyn FnOnce() + Send>,
    ) -> Result<Self, (Option<Box<dyn SourceVm>>, MigrationError)> {
        let of_thread = options.clone();
        let run = move |vm: &mut dyn SourceVm, commands| {
            source::migrate(vm, &*connector, &mut *strategy, &of_thread, commands)
        };
        Self::on_thread(vm, &options, notify, run)
    }

    /// Starts to protect `vm`, as [`stage`](super::stage) does. `notify` is called once, when the
    /// result can be taken.
    ///
    /// # Errors
    /// When the spawner has no thread; the VM comes back, as it was.
    pub fn stage(
        vm: Box<dyn SourceVm>,
        mut strategy: Box<dyn Strategy>,
        options: SourceOptions,
        notify: Box<dyn FnOnce() + Send>,
    ) -> Result<Self, (Option<Box<dyn SourceVm>>, MigrationError)> {
        let of_thread = options.clone();
        let run = move |vm: &mut dyn SourceVm, commands| source::stage(vm, &mut *strategy, &of_thread, commands);
        Self::on_thread(vm, &options, notify, run)
    }

    fn on_thread(
        vm: Box<dyn SourceVm>,
        options: &SourceOptions,
        notify: Box<dyn FnOnce() + Send>,
        run: impl FnOnce(&mut dyn SourceVm, Commands) -> Report + Send + 'static,
    ) -> Result<Self, (Option<Box<dyn SourceVm>>, MigrationError)> {
        let (controller, commands) = Controller::new();
        let slot = Arc::new(Slot::default());
        let result = slot.clone();
        // in a cell, so that it can be taken back if there is no thread
        let cell = Arc::new(Mutex::new(Some(vm)));
        let taken = cell.clone();
        let body = Box::new(move || {
            let Some(mut vm) = lock(&taken).take() else { return };
            let report = run(&mut *vm, commands);
            *lock(&result.ended) = Some((vm, report));
            result.changed.notify_all();
            notify();
        });
        let thread = options
            .spawner
            .spawn(Role::Control, options.impact, "migration", body)
            .map_err(|cause| (lock(&cell).take(), MigrationError::Thread { role: "the migration", cause }))?;
        Ok(Self { controller, slot, thread: Some(thread) })
    }

    /// Sends commands to it.
    pub fn controller(&self) -> &Controller {
        &self.controller
    }

    /// The result, if it has ended and was not taken yet.
    pub fn try_take(&mut self) -> Option<Ended> {
        let ended = lock(&self.slot.ended).take();
        if ended.is_some() {
            self.join();
        }
        ended
    }

    /// Waits at most this long for the result.
    pub fn wait(&mut self, timeout: Duration) -> Option<Ended> {
        let guard = lock(&self.slot.ended);
        let waited = self.slot.changed.wait_timeout_while(guard, timeout, |ended| ended.is_none());
        // a poisoned lock means that a thread panicked while it held it; the result itself is whole
        let ended = waited.unwrap_or_else(|e| e.into_inner()).0.take();
        if ended.is_some() {
            self.join();
        }
        ended
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_says_more_than_is_taken_waits() {
        let (tx, rx) = mpsc::channel();
        let mut inputs = Inputs::new(rx);
        let peer = PeerInputs::new(tx, inputs.waiting.clone(), Arc::default());
        const MANY: usize = 5 * MAX_WAITING;
        let speaks = thread::spawn(move || (0..MANY).all(|_| peer.send(Input::Control(1, Control::Pong)).is_ok()));
        while inputs.waiting.load(Ordering::Relaxed) < MAX_WAITING {
            thread::yield_now();
        }
        for _ in 0..MANY {
            // two threads at the most look at the count before they are counted
            assert!(inputs.waiting.load(Ordering::Relaxed) <= MAX_WAITING + 1);
            assert!(matches!(inputs.recv_timeout(Duration::from_secs(60)), Ok(Input::Control(1, Control::Pong))));
        }
        assert!(speaks.join().unwrap() && inputs.waiting.load(Ordering::Relaxed) == 0);
    }

    #[test]
    fn an_input_is_found_out_of_turn_and_all_others_stay_in_order() {
        let (tx, rx) = mpsc::channel();
        let mut inputs = Inputs::new(rx);
        let peer = PeerInputs::new(tx.clone(), inputs.waiting.clone(), Arc::default());
        let cancelled = |input: &Input| matches!(input, Input::Cancel(_));
        assert!(inputs.find(cancelled).is_none());
        for epoch in 0..MAX_WAITING as u32 {
            peer.send(Input::Control(epoch, Control::Pong)).unwrap();
        }
        tx.send(Input::Cancel("enough".into())).unwrap();
        assert!(matches!(inputs.find(cancelled), Some(Input::Cancel(why)) if why == "enough"));
        assert!(inputs.find(cancelled).is_none());
        // what was passed over counts until it is taken: the peer waits
        assert_eq!(inputs.waiting.load(Ordering::Relaxed), MAX_WAITING);
        for expected in 0..MAX_WAITING as u32 {
            assert!(matches!(inputs.try_recv(), Ok(Input::Control(epoch, _)) if epoch == expected));
        }
        assert_eq!(inputs.waiting.load(Ordering::Relaxed), 0);
        assert!(inputs.try_recv().is_err());
    }

    #[test]
    fn nobody_waits_once_the_link_has_ended() {
        let (tx, rx) = mpsc::channel();
        let (inputs, ended) = (Inputs::new(rx), Arc::new(AtomicBool::new(false)));
        let peer = PeerInputs::new(tx, inputs.waiting.clone(), ended.clone());
        let speaks = thread::spawn(move || (0..=MAX_WAITING).all(|_| peer.send(Input::Demanded(1)).is_ok()));
        while inputs.waiting.load(Ordering::Relaxed) < MAX_WAITING {
            thread::yield_now();
        }
        ended.store(true, Ordering::Relaxed);
        assert!(speaks.join().unwrap());
    }
}
