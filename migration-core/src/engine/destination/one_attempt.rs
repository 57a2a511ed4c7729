//! A receiver for one attempt, which returns the result.

use std::{collections::VecDeque, os::fd::OwnedFd, time::Instant};

use thiserror::Error;

use super::*;
use crate::vm::{FailedAttempt, VmDescription};

/// Receives one attempt at a time on the caller's thread, and returns the VM or the reason why
/// there is none.
///
/// A refusal counts as an attempt, for example of a peer that speaks another protocol or version,
/// or of a VM that the host does not build. A connection that ends without a byte does not count.
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
/// Dropping the receiver closes all connections, and discards a VM that has not arrived, including
/// a VM that is held. Missing pages then stay missing.
pub struct OneAttempt<V> {
    receiver: Receiver,
    accepting: Accepting,
    entry: Arc<VmEntry>,
    results: Arc<Results<V>>,
}

/// The reason why [`OneAttempt`] has no VM, or why it does not know whether the source is done.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AttemptError {
    /// The attempt has failed, and the guest runs on at the source. Call [`OneAttempt::receive`]
    /// again for another attempt.
    #[error("{0}")]
    Failed(FailedAttempt),
    /// The time was up, or [`ReceiverHandle::stop`] was called, when the VM was complete. Its
    /// source may have given the VM away, so the VM is held, paused, until
    /// - its source decides: call [`OneAttempt::receive`] again;
    /// - or a person decides: call [`ReceiverHandle::force_take_over`] and then
    ///   [`OneAttempt::receive`];
    /// - or the [`OneAttempt`] is dropped, which discards the VM.
    #[error("VM {vm} is complete and held under epoch {epoch}: its source has not decided")]
    Held {
        /// The identity of the VM.
        vm: VmId,
        /// The epoch of its attempt.
        epoch: u32,
    },
    /// [`ReceiverHandle::stop`] was called. It has ended the attempt that was under way, if any,
    /// and the source was informed.
    #[error("stopped")]
    Stopped,
    /// The time is up. An attempt that was under way has ended, and the source was informed.
    #[error("the time is up")]
    TimedOut,
    /// The listener is broken.
    #[error("listening")]
    Listener(#[from] io::Error),
}

/// The results of attempts that were not returned to the caller yet, in order.
struct Results<V>(Mutex<Waiting<V>>);

struct Waiting<V> {
    results: VecDeque<Result<Arrived<V>, FailedAttempt>>,
    /// The number of attempts that were given up and will still be reported as failed. Those
    /// reports are no results.
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

/// Adds the failed attempts of a host to the results.
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
    /// Creates a receiver that builds its VM on `host`. The options `patience` and `max_vms` do not
    /// apply: [`receive`](Self::receive) and [`finish`](Self::finish) have deadlines.
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

    /// Returns a handle for other threads. [`ReceiverHandle::stop`] ends the present or the next
    /// call of [`receive`](Self::receive) or [`finish`](Self::finish).
    pub fn handle(&self) -> ReceiverHandle {
        self.receiver.handle()
    }

    /// Waits for an attempt until `deadline`, or without a limit if that is `None`, and returns the
    /// VM when it is owned here and was started. In post-copy pages are still missing then: call
    /// [`finish`](Self::finish), which accepts the source when it comes back after a lost link.
    ///
    /// # Errors
    /// Returns an error if there is no VM: see [`AttemptError`]. The method can be called again.
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

    /// Ends the attempt that is under way, because the caller does not wait any longer. Returns
    /// `None` if the VM has been started and arrives at once.
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

    /// Serves the VM that was received, until no page is missing and its source knows that it runs
    /// here, or until `deadline`.
    ///
    /// # Errors
    /// Returns [`AttemptError::Stopped`], [`AttemptError::TimedOut`] or [`AttemptError::Listener`].
    /// The VM runs here nevertheless. Missing pages stay missing.
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

    /// Returns the reason to end the call, if there is one.
    fn end(&self, deadline: Option<Instant>) -> Option<AttemptError> {
        // a stop ends this call, and not the next one
        if self.receiver.destination.common.stop.swap(false, Ordering::Relaxed) {
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
