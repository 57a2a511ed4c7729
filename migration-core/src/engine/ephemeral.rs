//! Ephemeral virtualization. Two VMMs on one machine hold a VM at the same time, both with its RAM
//! mapped, and only one of them runs it. A home VMM has the VM most of the time. A feature VMM (for
//! a snapshot, a migration, introspection) runs it for a while (Williams et al., *Enabling
//! efficient hypervisor-as-a-service clouds with ephemeral virtualization*, VEE 2016; Gopalan et
//! al., VEE 2017, for several feature VMMs at once).
//!
//! ```text
//!   Active ── relinquish ──► Standby        the guest runs elsewhere; RAM, page tables and vCPUs stay in place here
//!      ▲                          │
//!      └───── wait_for_guest ─────┘
//! ```
//!
//! Only an [`Active`] VM can be relinquished, and doing so consumes it. Only the return of the
//! guest creates a new one. The types enforce this within one process. Between the two processes
//! the hand-over protocol does: *run* makes exactly one side the owner, and each switch has a
//! higher epoch than the one before, so that no frame of an older switch is accepted.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use super::{Commands, ReceiveError, Receiver, ReceiverHandle, ReceiverOptions, SourceOptions, migrate};
use crate::{
    channel::{Connector, Listener},
    lock::lock,
    protocol::DestinationPhase,
    report::{Outcome, Report},
    strategy::HandOver,
    vm::{DestinationHost, DestinationVm, SourceVm, VmDescription, VmError, VmId},
};

/// A VM in one of the VMMs that take turns to run it. It is built once, and then stays.
pub trait PersistentVm: Send + 'static {
    /// The VM as the destination of a hand-over.
    type Coming: DestinationVm + Send + 'static;

    /// Returns the id of the VM. Called only while the guest is here.
    fn id(&self) -> VmId;

    /// Returns the VM for its hand-over to another VMM. After [`SourceVm::released`] the VM is
    /// kept: its vCPUs stay stopped and its RAM stays mapped, until the guest is back.
    fn leaving(&mut self) -> Box<dyn SourceVm>;

    /// Returns the VM for a guest that arrives, as in [`DestinationHost::build_shared`]. The first
    /// call builds the VM in these files. In later calls, the VM has to be in these very files
    /// already. [`DestinationVm::load_state`] replaces all state that vCPUs and devices still have
    /// from an earlier stay, and [`DestinationVm::start`] lets them run again.
    ///
    /// # Errors
    /// Returns an error if the VM cannot be built, or is in other memory than these files. The
    /// guest stays where it runs.
    fn coming(&mut self, vm: &VmDescription, files: Vec<OwnedFd>) -> Result<Self::Coming, VmError>;
}

/// A VM whose guest runs here and nowhere else.
#[derive(Debug)]
pub struct Active<V> {
    vm: V,
    epoch: u32,
}

/// A VM whose guest is elsewhere, or has not come yet. The VM cannot run here.
#[derive(Debug)]
pub struct Standby<V> {
    vm: V,
    /// The id of the guest that has left, and the epoch under which it has left; `None` if no guest
    /// has been here.
    gone: Option<(VmId, u32)>,
}

impl<V: PersistentVm> Active<V> {
    /// Returns a VM that runs here under this epoch. The epoch is 0 if the VM was booted here, and
    /// otherwise the epoch under which its guest has come.
    pub fn new(vm: V, epoch: u32) -> Self {
        Self { vm, epoch }
    }

    /// Returns the VM.
    pub fn vm(&self) -> &V {
        &self.vm
    }

    /// Returns the epoch under which the guest is owned here.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Returns the VM itself, and ends its persistence. The caller is responsible for the VM from
    /// then on, as in a migration to another host.
    pub fn into_vm(self) -> V {
        self.vm
    }

    /// Hands the guest over to the VMM at `to`, by [`HandOver`]. Returns when the other VMM runs
    /// the guest, or the guest runs on here. After a loss of the link during the hand-over, it
    /// returns only when that is known. `last_epoch` and `fail_safe` of `options` are not used.
    ///
    /// # Errors
    /// Returns the VM if its guest stays here. The report says why.
    pub fn relinquish(
        mut self,
        to: &dyn Connector,
        options: &SourceOptions,
        commands: Commands,
    ) -> (Result<Standby<V>, Self>, Report) {
        let options = SourceOptions { last_epoch: self.epoch, fail_safe: None, ..options.clone() };
        let id = self.vm.id();
        let report = migrate(&mut *self.vm.leaving(), to, &mut HandOver, &options, commands);
        if report.outcome == Outcome::Completed {
            return (Ok(Standby { vm: self.vm, gone: Some((id, report.epoch)) }), report);
        }
        // The attempt is void, but a destination may have seen its epoch.
        self.epoch = report.epoch;
        (Err(self), report)
    }
}

impl<V: PersistentVm> Standby<V> {
    /// Returns a VM whose guest has not been here yet.
    pub fn new(vm: V) -> Self {
        Self { vm, gone: None }
    }

    /// Returns the VM.
    pub fn vm(&self) -> &V {
        &self.vm
    }

    /// Prepares to take the guest back, or to take it for the first time. `awaits` of `options` is
    /// not used. `patience` is the longest wait for the guest, and then for the last frame of the
    /// VMM that had it.
    pub fn await_guest(self, options: ReceiverOptions) -> Awaiting<V> {
        let place = Arc::new(Mutex::new(Some(self.vm)));
        let options = ReceiverOptions { awaits: self.gone, ..options };
        // The VM is in its place already, so the object that has represented it can be dropped.
        let receiver = Receiver::new(Place(place.clone()), drop, options);
        Awaiting { place, receiver, gone: self.gone }
    }
}

/// A standby VM whose guest may arrive at any moment.
pub struct Awaiting<V> {
    place: Arc<Mutex<Option<V>>>,
    receiver: Receiver,
    gone: Option<(VmId, u32)>,
}

impl<V: PersistentVm> Awaiting<V> {
    /// Returns a handle that ends the wait from another thread, reports its progress, or takes the
    /// guest over from a dead VMM that had offered it.
    pub fn handle(&self) -> ReceiverHandle {
        self.receiver.handle()
    }

    /// Waits for the guest. The guest may have run here for a moment when this returns.
    ///
    /// # Errors
    /// Returns the standby VM if its guest did not come, because the wait was ended or `patience`
    /// has passed. The guest is wherever it was.
    pub fn wait_for_guest(self, listener: &mut dyn Listener) -> Result<Active<V>, (Standby<V>, ReceiveError)> {
        let ended = self.receiver.run(listener);
        let (handle, gone) = (self.receiver.handle(), self.gone);
        let vm = lock(&self.place).take().expect("nothing else takes the VM out of its place");
        match ended {
            // Attempts that have failed have used up epochs.
            Err(why) if handle.phase() != DestinationPhase::Running => {
                Err((Standby { vm, gone: gone.map(|(id, epoch)| (id, epoch.max(handle.epoch()))) }, why))
            }
            // Whatever ended the wait, the VM is ours.
            _ => Ok(Active { vm, epoch: handle.epoch() }),
        }
    }
}

/// A host that takes the guest into the VM in this place.
struct Place<V>(Arc<Mutex<Option<V>>>);

impl<V: PersistentVm> DestinationHost for Place<V> {
    type Vm = V::Coming;

    fn build(&self, _vm: &VmDescription) -> Result<Self::Vm, VmError> {
        Err(VmError::new("a guest comes here only by a hand-over, in shared RAM"))
    }

    fn build_shared(&self, vm: &VmDescription, files: Vec<OwnedFd>) -> Result<Self::Vm, VmError> {
        // The VM is out of its place while it is called. Only one attempt at a time builds.
        let here = lock(&self.0).take().ok_or_else(|| VmError::new("nobody waits for the guest any more"))?;
        let mut called = Called { place: &self.0, vm: Some(here) };
        match &mut called.vm {
            Some(here) => here.coming(vm, files),
            None => unreachable!("it goes back only at the end"),
        }
    }
}

/// A VM that is out of its place while it is called. It goes back when this guard is dropped, even
/// after a panic.
struct Called<'a, V> {
    place: &'a Mutex<Option<V>>,
    vm: Option<V>,
}

impl<V> Drop for Called<'_, V> {
    fn drop(&mut self) {
        *lock(self.place) = self.vm.take();
    }
}
