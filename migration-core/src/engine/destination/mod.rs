//! The destination's engine: accepts lanes, builds the VM, receives it, and runs it when it is ours.

mod accept;
mod allowance;
mod attempt;
mod connections;
mod control_lane;
mod host;
mod install;
mod introduce;
mod loss;
pub(super) mod missing;
mod one_attempt;
mod options;
pub(super) mod protection;
mod queue;
mod reserve;
mod session;
mod survive;
mod switch_over;

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
use host::{AnyHost, AnyVm, Notice, Notices, Turns, any_host};
use install::LaneReceiver;
use introduce::Incoming;
use missing::{Missing, is_whole};
use protection::Protection;
use reserve::Parked;
use session::Session;

pub use self::{
    one_attempt::{AttemptError, OneAttempt},
    options::{ReceiveError, ReceiverOptions},
    queue::{ReceiverEvent, ReceiverQueue},
};
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
    vm::{Arrived, DestinationHost, DestinationVm, VmError, VmId},
    wire::{
        Control, ErrorCode, FEATURE_CHECKPOINTS, FEATURE_HUGE_BLOCKS, FEATURE_POST_COPY, FEATURE_SHARED_RAM, LaneKind,
        MAX_STREAMS, OLDEST_VERSION, Preamble, SEALED_MAGIC, SessionToken, VERSION, add_missing, negotiate,
    },
};

/// How often the accept loop looks whether it shall stop.
const ACCEPT_TICK: Duration = Duration::from_millis(50);

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
    host: Arc<dyn AnyHost>,
    /// What the host is told of the VM that has arrived.
    notices: Notices,
    /// Whose turn it is to build a VM.
    turns: Turns,
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
    /// A receiver that builds its VM on `host`. The VM goes to `arrived` once, the moment it is owned here, and has been
    /// started. Like every method of the host, `arrived` is called by a thread of the receiver, or by the one that decided on
    /// a VM that was held ([`ReceiverHandle::adopt`], [`ReceiverHandle::inherit`]), and without a lock.
    pub fn new<H>(host: H, arrived: impl Fn(Arrived<H::Vm>) + Send + Sync + 'static, options: ReceiverOptions) -> Self
    where
        H: DestinationHost<Vm: Send + 'static> + Send + Sync + 'static,
    {
        let options = ReceiverOptions { observer: Guarded::around(&options.observer), ..options };
        let machine = match options.awaits {
            Some((vm, epoch)) => DestinationMachine::awaiting(vm, epoch),
            None => DestinationMachine::new(),
        };
        let state = State { machine, session: None, attachment: 0 };
        let hub = Hub {
            options,
            host: any_host(host, arrived),
            notices: Notices::default(),
            turns: Turns::default(),
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
    /// not end it. The VM has arrived the moment it starts, which may be long before this returns if the source's last word is
    /// lost.
    ///
    /// # Errors
    /// When there is no VM: see [`ReceiveError`].
    pub fn run(&self, listener: &mut dyn Listener) -> Result<(), ReceiveError> {
        let hub = &self.hub;
        *lock(&hub.room) = listener.room();
        let mut accepting = Accepting::new(hub.clone());
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
        hub.close(&mut accepting);
        result
    }
}

impl Hub {
    /// Closes all connections, discards the VM unless it is owned here, and waits for all threads.
    fn close(&self, accepting: &mut Accepting) {
        let (session, owned) = {
            let state = lock(&self.state);
            (state.session.clone(), state.machine.phase() == DestinationPhase::Running)
        };
        match session {
            // pages that are missing stay so: nobody reads them as zeros
            Some(session) if owned => {
                // a person may have decided on it just now
                self.notices.wait_open();
                session.close("the receiver has ended");
            }
            Some(session) => drop(session.discard("the receiver has ended")),
            None => {}
        }
        lock(&self.connections).end();
        accepting.join();
        self.join_watchers();
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
        let session = state.session.clone();
        drop(state);
        self.hub.take(session, &action);
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
        let session = state.session.clone();
        drop(state);
        self.hub.take(session, &action);
        Ok(())
    }
}

fn no_vm() -> MigrationError {
    MigrationError::Vm { step: "receiving", cause: no_longer_here() }
}

fn no_longer_here() -> VmError {
    VmError::new("the VM was discarded meanwhile")
}
