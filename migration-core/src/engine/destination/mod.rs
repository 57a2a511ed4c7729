//! The engine at the destination: accepts lanes, builds VMs, receives them, and starts them.

mod accept;
mod allowance;
mod attempt;
mod connections;
mod control_lane;
mod fail_over;
mod fetchers;
mod gather;
mod handle;
mod host;
mod install;
mod introduce;
mod loss;
pub(super) mod missing;
mod one_attempt;
mod options;
mod place;
pub(super) mod protection;
mod queue;
mod reserve;
mod session;
mod switch_over;
mod table;

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
use reserve::AllParked;
use session::Session;
use table::{Common, Destination, Found, State, VmEntry, Watcher};

pub use self::{
    handle::{Gathering, ReceiverHandle, VmHandle, VmStatus},
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
    text::{Chain, describe},
    vm::{Arrived, DestinationHost, DestinationVm, VmError, VmId},
    wire::{
        Control, ErrorCode, FEATURE_CHECKPOINTS, FEATURE_HUGE_BLOCKS, FEATURE_POST_COPY, FEATURE_SHARED_RAM, LaneKind,
        MAX_STREAMS, OLDEST_VERSION, Preamble, SEALED_MAGIC, SessionToken, VERSION, add_missing, negotiate,
    },
};

/// The interval at which the accept loop checks whether it has to stop.
const ACCEPT_TICK: Duration = Duration::from_millis(50);

/// Receives VMs. A receiver of one VM handles attempt after attempt until the VM was received. A
/// receiver of several VMs runs until it is stopped.
pub struct Receiver {
    destination: Arc<Destination>,
}

impl Receiver {
    /// Creates a receiver that builds its VMs on `host`. It calls `arrived` once for each VM, as
    /// soon as the VM is owned here and was started. Like the methods of the host, `arrived` is
    /// called without a lock, by a thread of the receiver or by the thread that has taken over a
    /// held VM ([`ReceiverHandle::force_take_over`], [`ReceiverHandle::take_over`]).
    pub fn new<H>(host: H, arrived: impl Fn(Arrived<H::Vm>) + Send + Sync + 'static, options: ReceiverOptions) -> Self
    where
        H: DestinationHost<Vm: Send + 'static> + Send + Sync + 'static,
    {
        Self { destination: Arc::new(Destination::new(any_host(host, arrived), options)) }
    }

    /// Returns a handle for other threads.
    pub fn handle(&self) -> ReceiverHandle {
        ReceiverHandle::new(self.destination.clone())
    }

    /// Accepts sources until a VM was received and its source knows that, or, for [several
    /// VMs](ReceiverOptions::max_vms), until [`ReceiverHandle::stop`] is called. Bad peers, failed
    /// attempts and lost links do not end it. A VM arrives as soon as it was started. If the
    /// source's last message is lost, that can be long before this method returns.
    ///
    /// # Errors
    /// Returns an error if there is no VM: see [`ReceiveError`].
    pub fn run(&self, listener: &mut dyn Listener) -> Result<(), ReceiveError> {
        let common = &self.destination.common;
        *lock(&common.room) = listener.room();
        let mut accepting = Accepting::new(self.destination.clone());
        let single = self.destination.single();
        let (begun, mut running_since) = (Instant::now(), None);
        let result = loop {
            if common.stop.load(Ordering::Relaxed) {
                break Err(ReceiveError::Stopped);
            }
            if let Some(entry) = &single {
                if entry.finished.load(Ordering::Relaxed) {
                    break Ok(());
                }
                let phase = lock(&entry.state).machine.phase();
                match (common.options.patience, phase) {
                    (Some(patience), DestinationPhase::Empty) if begun.elapsed() >= patience => {
                        break Err(ReceiveError::TimedOut(patience));
                    }
                    (Some(_), DestinationPhase::Running) if entry.gathers_alone() => {}
                    (Some(patience), DestinationPhase::Running)
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
        self.destination.close(&mut accepting);
        result
    }
}

fn no_vm() -> MigrationError {
    MigrationError::Vm { step: "receiving", cause: no_longer_here() }
}

fn no_longer_here() -> VmError {
    VmError::new("the VM was discarded meanwhile")
}
