//! The handles by which other threads control a receiver and its VMs.

use std::collections::BTreeMap;

use super::*;
use crate::store::StoreError;

/// Controls a [`Receiver`] from other threads.
///
/// The methods that name no VM apply if the receiver has exactly one VM, which is always true of a
/// receiver of one VM. For a receiver of [several VMs](ReceiverOptions::max_vms) use
/// [`vms`](Self::vms) and [`vm`](Self::vm).
#[derive(Clone)]
pub struct ReceiverHandle {
    destination: Arc<Destination>,
}

/// Controls one VM of a receiver from other threads.
#[derive(Clone)]
pub struct VmHandle {
    pub(super) entry: Arc<VmEntry>,
}

/// The state of one VM of a receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmStatus {
    /// The identity of the VM.
    pub id: VmId,
    /// The phase of the protocol.
    pub phase: DestinationPhase,
    /// The epoch of the present or the last attempt.
    pub epoch: u32,
}

/// The missing pages of a VM that runs here, and their locations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gathering {
    /// The number of missing pages.
    pub missing_pages: u64,
    /// The number of missing pages that only the source has.
    pub source: u64,
    /// The number of missing pages in each page store, by the name of the store. A page that is in
    /// several stores counts for each of them.
    pub stores: BTreeMap<String, u64>,
    /// The number of pages, or of huge pages, for which at least one thread waits at present.
    pub faults: u64,
}

impl ReceiverHandle {
    pub(super) fn new(destination: Arc<Destination>) -> Self {
        Self { destination }
    }

    /// Ends [`Receiver::run`], or the present call of a [`OneAttempt`]. VMs that are being received
    /// or held are discarded with the receiver.
    pub fn stop(&self) {
        self.destination.common.stop.store(true, Ordering::Relaxed);
    }

    /// Returns the number of bytes of all frames that were received and sent so far, on all lanes.
    pub fn wire_bytes(&self) -> u64 {
        self.destination.common.bytes.load(Ordering::Relaxed)
    }

    /// Returns the VMs that are being received or held, and those whose sources do not know yet
    /// that they run here.
    pub fn vms(&self) -> Vec<VmStatus> {
        let status = |entry: &Arc<VmEntry>| {
            let state = lock(&entry.state);
            Some(VmStatus { id: state.machine.vm()?, phase: state.machine.phase(), epoch: state.machine.epoch() })
        };
        self.destination.entries().iter().filter_map(status).collect()
    }

    /// Returns the handle of a VM that [`vms`](Self::vms) lists.
    pub fn vm(&self, id: VmId) -> Option<VmHandle> {
        Some(VmHandle { entry: self.destination.entry(id)? })
    }

    /// Returns the phase of the protocol.
    pub fn phase(&self) -> DestinationPhase {
        self.only().map_or(DestinationPhase::Empty, |vm| vm.phase())
    }

    /// Returns the epoch of the present or the last attempt; 0 if there was none.
    pub fn epoch(&self) -> u32 {
        self.only().map_or(0, |vm| vm.epoch())
    }

    /// Takes over the held VM: see [`VmHandle::force_take_over`].
    ///
    /// # Errors
    /// Returns an error if no complete VM is held, if its source is connected, if pages of it are
    /// only at the source, or if the receiver does not have exactly one VM.
    pub fn force_take_over(&self) -> Result<(), Violation> {
        self.only().ok_or_else(|| no_only_vm("adopt"))?.force_take_over()
    }

    /// Takes over the held VM: see [`VmHandle::take_over`].
    ///
    /// # Errors
    /// Returns an error if no complete VM is held, if pages of it are only at the source, or if the
    /// receiver does not have exactly one VM.
    pub fn take_over(&self, source: Fenced) -> Result<(), Violation> {
        self.only().ok_or_else(|| no_only_vm("inherit"))?.take_over(source)
    }

    /// Reports that the guest has ended by itself: see [`VmHandle::vm_ended`]. Does nothing if the
    /// receiver does not have exactly one VM.
    pub fn vm_ended(&self, reason: &str) {
        if let Some(vm) = self.only() {
            vm.vm_ended(reason);
        }
    }

    /// Makes the VM independent of its source: see [`VmHandle::release_source`].
    ///
    /// # Errors
    /// Returns the reason as a text, also if the receiver does not have exactly one VM.
    pub fn release_source(&self) -> Result<(), String> {
        self.only().ok_or("the receiver does not know one VM: name the one that is meant")?.release_source()
    }

    /// Returns the missing pages and their locations: see [`VmHandle::gathering`]. Returns `None`
    /// also if the receiver does not have exactly one VM.
    pub fn gathering(&self) -> Option<Gathering> {
        self.only()?.gathering()
    }

    /// Forgets the namespaces of the VM: see [`VmHandle::forget_stored`]. Does nothing if the
    /// receiver does not have exactly one VM.
    pub fn forget_stored(&self) -> Vec<StoreError> {
        self.only().map(|vm| vm.forget_stored()).unwrap_or_default()
    }

    fn only(&self) -> Option<VmHandle> {
        Some(VmHandle { entry: self.destination.only()? })
    }
}

impl VmHandle {
    /// Returns the phase of the protocol.
    pub fn phase(&self) -> DestinationPhase {
        lock(&self.entry.state).machine.phase()
    }

    /// Returns the epoch of the present or the last attempt.
    pub fn epoch(&self) -> u32 {
        lock(&self.entry.state).machine.epoch()
    }

    /// Returns the missing pages and their locations. Returns `None` if no page is missing, or if
    /// the VM does not run here.
    pub fn gathering(&self) -> Option<Gathering> {
        let state = lock(&self.entry.state);
        let runs = state.machine.phase() == DestinationPhase::Running;
        let session = state.session.clone().filter(|_| runs)?;
        drop(state);
        let missing = session.missing().filter(|missing| !missing.is_complete())?;
        Some(missing.gathering())
    }

    /// Forgets the namespaces of a VM that runs here and ends in order, and gives up its pages in
    /// stores (rule 14). Waits for the stores.
    ///
    /// Returns the errors of the stores. A namespace that could not be forgotten stays until it is
    /// removed after the end of its lease.
    pub fn forget_stored(&self) -> Vec<StoreError> {
        let state = lock(&self.entry.state);
        let runs = state.machine.phase() == DestinationPhase::Running;
        let session = state.session.clone().filter(|_| runs);
        drop(state);
        let Some(gatherer) = session.as_ref().and_then(|session| session.gatherer.as_ref()) else { return Vec::new() };
        gatherer.end();
        gatherer.memory.forget_all()
    }

    /// Takes over the held VM, because a person states that the source is dead, and starts it.
    ///
    /// # Errors
    /// Returns an error if no complete VM is held, if its source is connected, or if pages of it
    /// are only at the source.
    pub fn force_take_over(&self) -> Result<(), Violation> {
        let state = lock(&self.entry.state);
        // checks whether the take-over is possible at all, before the stores are asked
        state.machine.clone().force_take_over()?;
        drop(state);
        self.needs_no_source("adopt")?;
        let mut state = lock(&self.entry.state);
        let action = state.machine.force_take_over()?;
        let session = state.session.clone();
        drop(state);
        self.entry.take(session, &action);
        Ok(())
    }

    /// Takes over the held VM, because the source is dead for certain, and starts it.
    ///
    /// # Errors
    /// Returns an error if no complete VM is held, or if pages of it are only at the source.
    pub fn take_over(&self, source: Fenced) -> Result<(), Violation> {
        let state = lock(&self.entry.state);
        let stores = state.session.as_ref().is_some_and(|session| session.gatherer.is_some());
        if !state.machine.is_complete() && !stores {
            return Err(only_at_source("inherit", &state));
        }
        drop(state);
        self.needs_no_source("inherit")?;
        let mut state = lock(&self.entry.state);
        let action = state.machine.take_over(source)?;
        let session = state.session.clone();
        drop(state);
        self.entry.take(session, &action);
        Ok(())
    }

    /// Checks that no page is only at the source. Asks the stores whether they have lost pages that
    /// the source holds.
    fn needs_no_source(&self, command: &'static str) -> Result<(), Violation> {
        let session = lock(&self.entry.state).session.clone();
        if session.is_some_and(|session| self.entry.needs_source(&session)) {
            return Err(only_at_source(command, &lock(&self.entry.state)));
        }
        Ok(())
    }

    /// Reports that the guest has ended by itself, and why.
    ///
    /// If pages of the VM are missing, the source receives the report, frees the pages, and ends
    /// with [`Outcome::Ended`](crate::report::Outcome::Ended). Otherwise the source would hold the
    /// pages for ever. If the link is lost, the source receives the report when it connects again:
    /// the VMM keeps the receiver until [`Receiver::run`] returns, or for as long as it is willing
    /// to wait. If no page is missing, this method does nothing. It does not wait.
    pub fn vm_ended(&self, reason: &str) {
        self.entry.vm_ended(reason);
    }
}

fn only_at_source(command: &'static str, state: &State) -> Violation {
    let (epoch, phase) = (state.machine.epoch(), state.machine.phase());
    Violation::new(command, epoch, phase, "pages of this VM are only at its source")
}

fn no_only_vm(command: &'static str) -> Violation {
    Violation::new(command, 0, DestinationPhase::Empty, "the receiver does not know one VM: name the one that is meant")
}
