//! A receiver for one attempt, which returns what came of it.

use std::{collections::VecDeque, os::fd::OwnedFd, time::Instant};

use thiserror::Error;

use super::*;
use crate::vm::{FailedAttempt, VmDescription};

/// Receives one attempt at a time, on the caller's thread, and returns the VM, or why there is none.
///
/// A refusal counts as an attempt: of a peer that speaks another protocol or version, of a VM that the host does not build. A
/// connection that ends without a byte does not.
///
/// ```
/// use std::time::{Duration, Instant};
///
/// use migration_core::{
///     channel::Listener,
///     engine::{AttemptError, OneAttempt, ReceiverOptions},
///     vm::DestinationHost,
/// };
///
/// fn receive<H>(host: H, listener: &mut dyn Listener) -> Result<H::Vm, AttemptError>
/// where
///     H: DestinationHost<Vm: Send + 'static> + Send + Sync + 'static,
/// {
///     let mut attempt = OneAttempt::new(host, ReceiverOptions::default());
///     let arrived = attempt.receive(listener, Some(Instant::now() + Duration::from_secs(60)))?;
///     // the VM runs here from now on; in post-copy its pages follow
///     attempt.finish(listener, None)?;
///     Ok(arrived.vm)
/// }
/// ```
///
/// Dropping it closes all connections, and discards a VM that has not arrived, also one that is held. Pages that are missing
/// then stay missing.
pub struct OneAttempt<V> {
    receiver: Receiver,
    accepting: Accepting,
    entry: Arc<VmEntry>,
    results: Arc<Results<V>>,
}

/// Why there is no VM, or its source's last word has not come.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AttemptError {
    /// The attempt came to nothing: its guest runs on at the source. [`OneAttempt::receive`] can be called again, for another
    /// attempt.
    #[error("{0}")]
    Failed(FailedAttempt),
    /// The time is up, or [`ReceiverHandle::stop`] was called, when the VM was complete: its source may have given it away. It
    /// is held, paused, until its source decides ([`OneAttempt::receive`] again), a person does ([`ReceiverHandle::adopt`]),
    /// or the [`OneAttempt`] is dropped, which discards it.
    #[error("VM {vm} is complete and held under epoch {epoch}: its source has not decided")]
    Held {
        /// Which VM.
        vm: VmId,
        /// The epoch of its attempt.
        epoch: u32,
    },
    /// [`ReceiverHandle::stop`] was called. An attempt that was under way has ended, and its source was told.
    #[error("stopped")]
    Stopped,
    /// The time is up. An attempt that was under way has ended, and its source was told.
    #[error("the time is up")]
    TimedOut,
    /// The listener is broken.
    #[error("listening: {0}")]
    Listener(#[from] io::Error),
}

/// What came of attempts, in order, until it is asked for.
struct Results<V>(Mutex<Waiting<V>>);

struct Waiting<V> {
    results: VecDeque<Result<Arrived<V>, FailedAttempt>>,
    /// Attempts that were given up and whose failures are still to come: they are no results.
    given_up: u32,
}

impl<V> Results<V> {
    fn add(&self, result: Result<Arrived<V>, FailedAttempt>) {
        let mut waiting = lock(&self.0);
        match waiting.given_up.checked_sub(1) {
            Some(less) if result.is_err() => waiting.given_up = less,
            _ => waiting.results.push_back(result),
        }
    }
}

/// A host whose failed attempts are results.
struct Reporting<H: DestinationHost> {
    host: H,
    results: Arc<Results<H::Vm>>,
}

impl<H: DestinationHost> DestinationHost for Reporting<H> {
    type Vm = H::Vm;

    fn build(&self, vm: &VmDescription) -> Result<H::Vm, VmError> {
        self.host.build(vm)
    }

    fn build_shared(&self, vm: &VmDescription, files: Vec<OwnedFd>) -> Result<H::Vm, VmError> {
        self.host.build_shared(vm, files)
    }

    fn link_lost(&self, vm: VmId) {
        self.host.link_lost(vm);
    }

    fn link_found(&self, vm: VmId) {
        self.host.link_found(vm);
    }

    fn attempt_failed(&self, failed: &FailedAttempt) {
        self.host.attempt_failed(failed);
        self.results.add(Err(failed.clone()));
    }
}

impl<V: Send + 'static> OneAttempt<V> {
    /// A receiver that builds its VM on `host`. Of `options`, `patience` and `max_vms` do not apply: [`receive`](Self::receive) and
    /// [`finish`](Self::finish) have deadlines.
    pub fn new<H>(host: H, options: ReceiverOptions) -> Self
    where
        H: DestinationHost<Vm = V> + Send + Sync + 'static,
        V: DestinationVm,
    {
        let results = Arc::new(Results(Mutex::new(Waiting { results: VecDeque::new(), given_up: 0 })));
        let (reporting, arrived) = (Reporting { host, results: results.clone() }, results.clone());
        let options = ReceiverOptions { max_vms: 1, ..options };
        let receiver = Receiver::new(reporting, move |vm| arrived.add(Ok(vm)), options);
        let accepting = Accepting::new(receiver.destination.clone());
        let entry = receiver.destination.single().expect("a receiver of one VM has its entry from the start");
        Self { receiver, accepting, entry, results }
    }

    /// The handle for other threads: [`ReceiverHandle::stop`] cancels.
    pub fn handle(&self) -> ReceiverHandle {
        self.receiver.handle()
    }

    /// Waits for an attempt until `deadline`, for ever with `None`, and returns the VM once it is owned here and was started. In
    /// post-copy pages are still missing then: [`finish`](Self::finish) has to follow.
    ///
    /// # Errors
    /// When there is no VM: see [`AttemptError`]. It can be called again, unless the handle has stopped it.
    pub fn receive(
        &mut self,
        listener: &mut dyn Listener,
        deadline: Option<Instant>,
    ) -> Result<Arrived<V>, AttemptError> {
        *lock(&self.receiver.destination.common.room) = listener.room();
        loop {
            let next = lock(&self.results.0).results.pop_front();
            if let Some(result) = next {
                return result.map_err(AttemptError::Failed);
            }
            let end = self.end(deadline);
            if let Some(end) = end
                && let Some(error) = self.give_up(end)
            {
                return Err(error);
            }
            self.accepting.step(listener)?;
        }
    }

    /// Ends the attempt that is under way, as the caller does not wait any more. `None` if the VM arrives in a moment.
    fn give_up(&self, end: AttemptError) -> Option<AttemptError> {
        let given_up = self.entry.give_up(&format!("the destination has given the attempt up: {end}"));
        match given_up.phase {
            DestinationPhase::Running => None,
            DestinationPhase::Ready => {
                let state = lock(&self.entry.state);
                let (vm, epoch) = (state.machine.vm().unwrap_or_default(), state.machine.epoch());
                Some(AttemptError::Held { vm, epoch })
            }
            _ => {
                let mut waiting = lock(&self.results.0);
                waiting.results.retain(Result::is_ok);
                waiting.given_up += u32::from(!given_up.reported);
                Some(end)
            }
        }
    }

    /// Serves the VM that was received until its source knows that it runs here, and no page is missing; or until `deadline`.
    ///
    /// # Errors
    /// [`AttemptError::Stopped`], [`AttemptError::TimedOut`] or [`AttemptError::Listener`]. The VM runs here all the same; pages
    /// that are missing stay so.
    pub fn finish(mut self, listener: &mut dyn Listener, deadline: Option<Instant>) -> Result<(), AttemptError> {
        loop {
            if self.entry.finished.load(Ordering::Relaxed) {
                return Ok(());
            }
            if let Some(end) = self.end(deadline) {
                return Err(end);
            }
            self.accepting.step(listener)?;
        }
    }

    /// Returns why no longer to wait, if so.
    fn end(&self, deadline: Option<Instant>) -> Option<AttemptError> {
        if self.receiver.destination.common.stop.load(Ordering::Relaxed) {
            return Some(AttemptError::Stopped);
        }
        deadline.is_some_and(|at| Instant::now() >= at).then_some(AttemptError::TimedOut)
    }
}

impl<V> Drop for OneAttempt<V> {
    fn drop(&mut self) {
        self.receiver.destination.close(&mut self.accepting);
    }
}
