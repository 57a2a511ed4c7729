//! The control of a migration that is under way: the controller, the inputs of the engine, and
//! migrations on threads of their own.

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

/// An input of the source's engine while it works.
pub(super) enum Input {
    /// A frame, with the epoch of its header.
    Control(u32, Control),
    /// The control lane was lost.
    ControlLost(MigrationError),
    /// A lane has completed its part of a round, or has failed.
    Lane(Result<LaneDone, MigrationError>),
    /// A page was sent because the destination's guest waits for it.
    Demanded(u64),
    /// The destination has sent its identity, which a fence needs.
    Introduced,
    /// The thread of a place has completed a job.
    Place(source::PlaceDone),
    /// The user cancels, for this reason.
    Cancel(String),
    /// The guest has ended by itself, for this reason.
    VmEnded(String),
    /// The user wants the hand-over now, with the remaining pages sent after it.
    PostCopy,
    /// The user wants the switch-over now: see [`Requests::switch_over_wanted`].
    SwitchOver,
    /// The connector that reaches the destination after a loss of the link.
    Recover(Arc<dyn Connector>),
    /// The user evicts a protected VM.
    Evict(EvictTo),
    /// The user ends the protection of a VM.
    StageOff,
}

/// The destination of an eviction.
pub(super) struct EvictTo {
    pub(super) to: Destination,
    pub(super) connector: Arc<dyn Connector>,
    /// When the user gave the command.
    pub(super) at: Instant,
}

/// The most inputs that a peer has caused and that may wait for the engine. At this number, the
/// threads that read from the peer wait.
const MAX_WAITING: usize = 1024;
/// The interval at which a thread that reads for the engine checks whether the engine has caught
/// up.
const CATCH_UP: Duration = Duration::from_millis(1);

/// The number of inputs that the peer has caused and that the engine has not taken yet.
pub(super) type Waiting = Arc<AtomicUsize>;

/// The error of sending an input after the migration has ended.
#[derive(Debug)]
pub(super) struct NobodyListens;

/// The sender by which the threads of one link pass on the data of its peer, no faster than the
/// engine takes it.
#[derive(Clone)]
pub(super) struct PeerInputs {
    tx: mpsc::Sender<Input>,
    waiting: Waiting,
    /// Set when the link ends. Nothing that comes from it is needed any more.
    ended: Arc<AtomicBool>,
}

impl PeerInputs {
    pub(super) fn new(tx: mpsc::Sender<Input>, waiting: Waiting, ended: Arc<AtomicBool>) -> Self {
        Self { tx, waiting, ended }
    }

    /// Passes an input to the engine. Returns an error if the engine has ended.
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

/// The engine's queue of inputs.
pub(super) struct Inputs {
    rx: mpsc::Receiver<Input>,
    pub(super) waiting: Waiting,
    /// Inputs that arrived while another one was looked for, in order. They are taken next.
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

    /// Takes the first input that is `wanted` out of turn, without waiting for it. All others keep
    /// their order.
    pub(super) fn find(&mut self, wanted: impl Fn(&Input) -> bool) -> Option<Input> {
        // The inputs of the peer are bounded here, too, as they count until they are taken.
        self.passed.extend(self.rx.try_iter());
        let at = self.passed.iter().position(wanted)?;
        self.passed.remove(at).inspect(|input| self.taken(input))
    }

    /// Drops the inputs of a session that is over. Inputs from others, such as commands, are kept.
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
    /// Returns whether the input comes from the threads of a session.
    fn is_of_session(&self) -> bool {
        matches!(self, Self::Control(..) | Self::ControlLost(_) | Self::Lane(_) | Self::Demanded(_) | Self::Introduced)
    }

    /// Returns whether a peer can cause any number of such inputs.
    fn is_counted(&self) -> bool {
        matches!(self, Self::Control(..) | Self::Demanded(_) | Self::Introduced)
    }
}

/// Why a migration cannot be switched to post-copy.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
pub enum NoPostCopy {
    /// It is not known before the destination has answered for the first time. The observer is then
    /// notified of [`Copying`](crate::protocol::SourcePhase::Copying).
    #[error("what the destination can do is not known yet")]
    NotYet,
    /// The options of this side allow no demand lanes.
    #[error("demand lanes are off")]
    NoLanes,
    /// The destination did not agree to post-copy.
    #[error("the destination cannot serve missing pages (no userfaultfd, or not permitted)")]
    NotAgreed,
    /// The guest is paused for the hand-over, or was handed over.
    #[error("too late, the hand-over has begun")]
    TooLate,
    /// The migration has ended.
    #[error("the migration has ended")]
    Ended,
    /// A snapshot is under way, which moves no VM.
    #[error("a snapshot is being taken, no migration is under way")]
    Snapshot,
}

/// Why a switch-over cannot be forced.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
pub enum NoSwitchOver {
    /// The destination has not built the VM yet. When it has, the observer is notified of
    /// [`Copying`](crate::protocol::SourcePhase::Copying).
    #[error("the destination is not ready yet")]
    NotYet,
    /// The strategy has no rounds that could be cut short.
    #[error("this strategy has no rounds to cut short: it switches over by itself as soon as it can")]
    Strategy,
    /// The guest is paused for the hand-over, or was handed over.
    #[error("too late, the hand-over has begun")]
    TooLate,
    /// The migration has ended.
    #[error("the migration has ended")]
    Ended,
    /// A snapshot is under way, which moves no VM.
    #[error("a snapshot is being taken: it pauses the guest by itself, for as long as its downtime limit allows")]
    Snapshot,
}

/// Why limits cannot be changed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
pub enum NoTuning {
    /// The guest is paused for the hand-over, or was handed over. The limit affects no decision any
    /// more.
    #[error("too late, the hand-over has begun")]
    TooLate,
    /// The migration has ended.
    #[error("the migration has ended")]
    Ended,
}

/// Why a VM cannot be evicted.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
pub enum NoEviction {
    /// No copy of the VM is kept ready, or none is ready yet.
    #[error("the VM is not protected: no copy of it is kept ready")]
    NotStaged,
    /// Another command has come before.
    #[error("the VM is being evicted already")]
    UnderWay,
    /// The VM is not protected any more.
    #[error("the protection of the VM has ended")]
    Ended,
}

/// The state of a protected VM's copy when the engine last reported it.
#[derive(Clone)]
pub(super) struct StagingState {
    pub(super) increments: u64,
    pub(super) staged_pages: u64,
    pub(super) dirty_pages: u64,
    pub(super) last_increment: Option<Instant>,
    /// Since when a store fails, and the reason.
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

/// The state that controllers and the engine share. The engine records which requests are possible
/// at the moment, and controllers record what was requested.
pub(super) struct Requests {
    pub(super) post_copy: Result<(), NoPostCopy>,
    pub(super) switch_over: Result<(), NoSwitchOver>,
    pub(super) tuning: Result<(), NoTuning>,
    pub(super) eviction: Result<(), NoEviction>,
    /// The state of a protected VM's copy; `None` if no copy is kept ready.
    pub(super) staging: Option<StagingState>,
    /// The downtime limit that a controller has set. It replaces the one in the options.
    pub(super) downtime_limit: Option<Duration>,
    /// Whether the switch-over is wanted now, however many pages are still to be sent.
    pub(super) switch_over_wanted: bool,
}

impl Requests {
    /// Records that no request is possible any more.
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

/// Sends commands to a migration. It can be cloned and used from any thread.
#[derive(Clone)]
pub struct Controller {
    inputs: mpsc::Sender<Input>,
    requests: Arc<Mutex<Requests>>,
}

impl Controller {
    /// Returns a controller, and its receiving end, which is passed to [`migrate`](super::migrate).
    pub fn new() -> (Self, Commands) {
        let (tx, rx) = mpsc::channel();
        let requests = Arc::<Mutex<Requests>>::default();
        (Self { inputs: tx.clone(), requests: requests.clone() }, Commands { tx, rx, requests })
    }

    /// Cancels the migration if the hand-over has not begun. Afterwards this does nothing. Does not
    /// wait: the report says whether the migration was cancelled. For a VM that
    /// [`stage`](super::stage) protects, this cancels the eviction that is under way, if there is
    /// one, and the protection continues.
    ///
    /// The engine handles the command at once, unless it is in a call that it cannot interrupt: a
    /// call of the VMM or of a store, a write to a destination that accepts nothing
    /// ([`SourceOptions::idle_timeout`](super::SourceOptions)), or the opening of one channel.
    /// Opening a channel takes at most the connector's time-out, that of the name resolver, and on
    /// an encrypted link that of the handshake: in migration-transport
    /// `ConnectOptions::connect_timeout`, in migration-crypto `Security::handshake_timeout`, both
    /// 10 s by default. No further channel is opened then.
    pub fn cancel(&self, why: impl Into<String>) {
        // A migration that has ended receives nothing any more.
        let _ = self.inputs.send(Input::Cancel(why.into()));
    }

    /// Reports that the guest has ended by itself, for this reason: it has powered off or crashed.
    /// If *run* was not sent yet, this ends the migration (or the snapshot) at once with
    /// [`MigrationError::VmEnded`], and notifies the destination. Afterwards there is no guest here
    /// that could end, and nothing happens. Does not wait: the report has the result.
    ///
    /// A VMM calls this when it detects the end of its guest, whatever the migration is doing.
    /// Without the call, the engine finds that the guest has ended only when [`SourceVm::pause`]
    /// fails.
    pub fn vm_ended(&self, reason: impl Into<String>) {
        // A migration that has ended receives nothing any more.
        let _ = self.inputs.send(Input::VmEnded(reason.into()));
    }

    /// Sets the connector for reconnecting to the destination. If the link is lost after the
    /// hand-over, the engine tries `connector` at once, and uses it from now on. Otherwise it is
    /// kept for the next loss of the link. (The engine also reconnects by itself, with growing
    /// pauses, by the connector that it used first.)
    pub fn recover(&self, connector: Arc<dyn Connector>) {
        // A migration that has ended receives nothing any more.
        let _ = self.inputs.send(Input::Recover(connector));
    }

    /// Evicts a VM that [`stage`](super::stage) protects to the destination `to`, which `connector`
    /// reaches. Does not wait. If the [eviction fails](crate::report::Event::EvictionFailed), the
    /// observer is notified, and the VM is protected as before. Otherwise the report has the
    /// result.
    ///
    /// # Errors
    /// Returns an error if the VM cannot be evicted. The protection continues unchanged.
    pub fn evict(&self, to: Destination, connector: Arc<dyn Connector>) -> Result<(), NoEviction> {
        let mut requests = lock(&self.requests);
        requests.eviction?;
        requests.eviction = Err(NoEviction::UnderWay);
        drop(requests);
        let command = EvictTo { to, connector, at: Instant::now() };
        self.inputs.send(Input::Evict(command)).map_err(|_| NoEviction::Ended)
    }

    /// Ends the protection of a VM by [`stage`](super::stage), and an eviction that is under way,
    /// unless *run* was sent. The pages that were put into stores are forgotten, and the guest runs
    /// on. Does nothing in a migration. Does not wait: the report has the result.
    pub fn stage_off(&self) {
        // A session that has ended receives nothing any more.
        let _ = self.inputs.send(Input::StageOff);
    }

    /// Returns the state of the copy of a VM that [`stage`](super::stage) protects, as the engine
    /// has last reported it; `None` if no copy is kept ready.
    pub fn staging(&self) -> Option<StagingReport> {
        let state = lock(&self.requests).staging.clone();
        state.map(|state| state.report())
    }

    /// Switches to post-copy as soon as the strategy can: the VM is handed over, and the remaining
    /// pages are sent after that. Does not wait for the switch.
    ///
    /// # Errors
    /// Returns an error if a switch is impossible. The migration continues unchanged.
    pub fn post_copy(&self) -> Result<(), NoPostCopy> {
        lock(&self.requests).post_copy?;
        self.inputs.send(Input::PostCopy).map_err(|_| NoPostCopy::Ended)
    }

    /// Forces the switch-over now, as if the rounds had converged. The round under way ends early,
    /// the guest is paused, and all remaining pages are sent in the pause, however long that takes.
    /// A strategy that hands over with pages missing ([`Hybrid`](crate::strategy::Hybrid)) hands
    /// over now, and sends these pages after the hand-over. Does not wait for the switch-over. The
    /// report has the predicted duration of the pause, and the actual one.
    ///
    /// # Errors
    /// Returns an error if a switch-over cannot be forced. The migration continues unchanged. After
    /// [`NoSwitchOver::NotYet`], the caller can try again once the observer was notified of the
    /// next phase.
    pub fn switch_over(&self) -> Result<(), NoSwitchOver> {
        let mut requests = lock(&self.requests);
        requests.switch_over?;
        requests.switch_over_wanted = true;
        drop(requests);
        self.inputs.send(Input::SwitchOver).map_err(|_| NoSwitchOver::Ended)
    }

    /// Sets the longest acceptable downtime. The limit applies from the next decision on: the one
    /// after the round under way, or, for a snapshot, after the pass under way. It may be set
    /// before the destination has answered.
    ///
    /// # Errors
    /// Returns an error if the limit affects no decision any more.
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

/// The VM after a migration (still owned by this side unless the outcome is `Completed`), and the
/// report.
pub type Ended = (Box<dyn SourceVm>, Report);

#[derive(Default)]
struct Slot {
    ended: Mutex<Option<Ended>>,
    changed: Condvar,
}

/// A migration on a thread of its own, for VMMs whose event loop must not block.
///
/// No method but [`wait`](Migration::wait) blocks. Poll [`try_take`](Migration::try_take), or let
/// the `notify` callback of [`start`](Migration::start) write to an eventfd or wake a task.
pub struct Migration {
    controller: Controller,
    slot: Arc<Slot>,
    thread: Option<Box<dyn Joiner>>,
}

impl Migration {
    /// Starts to migrate `vm`. `notify` is called once, when the result can be taken.
    ///
    /// # Errors
    /// Returns the VM, unchanged, and an error if the spawner has no thread.
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
    /// Returns the VM, unchanged, and an error if the spawner has no thread.
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
        // The VM is in a cell, so that it can be taken back if there is no thread.
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

    /// Returns the controller that sends commands to this migration.
    pub fn controller(&self) -> &Controller {
        &self.controller
    }

    /// Returns the result if the migration has ended and the result was not taken yet.
    pub fn try_take(&mut self) -> Option<Ended> {
        let ended = lock(&self.slot.ended).take();
        if ended.is_some() {
            self.join();
        }
        ended
    }

    /// Waits for the result, at most for `timeout`. Returns `None` if there is no result by then.
    pub fn wait(&mut self, timeout: Duration) -> Option<Ended> {
        let guard = lock(&self.slot.ended);
        let waited = self.slot.changed.wait_timeout_while(guard, timeout, |ended| ended.is_none());
        // A poisoned lock means that a thread panicked while it held the lock. The result itself is
        // complete.
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
            // At most two threads read the count before they are counted.
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
        // Inputs that were passed over count until they are taken, so the peer waits.
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
