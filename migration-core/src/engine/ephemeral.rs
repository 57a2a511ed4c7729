//! Ephemeral virtualization: two VMMs of a machine hold a VM at once, both with its RAM mapped, and
//! one of them at a time runs it. A lean one has it most of the time; one with a feature (a
//! snapshot, a migration, introspection) borrows it for a while (Williams et al., *Enabling
//! efficient hypervisor-as-a-service clouds with ephemeral virtualization*, VEE 2016; Gopalan et
//! al., VEE 2017, for several at once).
//!
//! ```text
//!   Active ── relinquish ──► Standby        the guest runs elsewhere; RAM, page tables and vCPUs stay in place here
//!      ▲                          │
//!      └───── wait_for_guest ─────┘
//! ```
//!
//! Only a [`Active`] can be relinquished, and doing so consumes it; only the return of the guest
//! makes a new one. That is what the types say in one process. Between the two processes it is the
//! hand-over's protocol: one owner by the source's *run*, and each switch under a higher epoch than
//! the one before, so that nothing of an older switch counts.

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

/// A VM in one of the VMMs that take turns to run it: it is built once, and stays.
pub trait PersistentVm: Send + 'static {
    /// The VM, as its guest comes.
    type Coming: DestinationVm + Send + 'static;

    /// Which VM it is. Asked for only while its guest is here.
    fn id(&self) -> VmId;

    /// The VM, for its hand-over to another VMM. What follows [`SourceVm::released`] is rest, not
    /// end: vCPUs stay stopped and RAM stays mapped, until the guest is back.
    fn leaving(&mut self) -> Box<dyn SourceVm>;

    /// The VM, for a guest that comes, as in [`DestinationHost::build_shared`]: at the first time
    /// it is built in these files, and later it has to be in these very files.
    /// [`DestinationVm::load_state`] replaces all that vCPUs and devices still hold of an earlier
    /// stay, and [`DestinationVm::start`] lets them run again.
    ///
    /// # Errors
    /// When it cannot be built, or is in other memory than this. The guest stays where it runs.
    fn coming(&mut self, vm: &VmDescription, files: Vec<OwnedFd>) -> Result<Self::Coming, VmError>;
}

/// A VM whose guest is here: it runs here and nowhere else.
#[derive(Debug)]
pub struct Active<V> {
    vm: V,
    epoch: u32,
}

/// A VM whose guest is elsewhere, or has not come yet: it cannot run here.
#[derive(Debug)]
pub struct Standby<V> {
    vm: V,
    /// Which guest went, and under which epoch.
    gone: Option<(VmId, u32)>,
}

impl<V: PersistentVm> Active<V> {
    /// A VM that runs here, under this epoch: 0 if it was booted here, else that under which it
    /// came.
    pub fn new(vm: V, epoch: u32) -> Self {
        Self { vm, epoch }
    }

    /// The VM.
    pub fn vm(&self) -> &V {
        &self.vm
    }

    /// The epoch under which its guest is owned here.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Gives up persistence: whatever becomes of the VM is the caller's affair, such as a migration
    /// that is not to end here.
    pub fn into_vm(self) -> V {
        self.vm
    }

    /// Hands the guest over to the VMM at `to`, by [`HandOver`]. Returns when the other one runs
    /// it, or it runs on here; after a loss of the link in between only when that is known.
    /// `last_epoch` and `fail_safe` of `options` do not apply.
    ///
    /// # Errors
    /// The VM, if its guest stays here; the report says why.
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
        // that attempt is void: a destination may have seen its epoch
        self.epoch = report.epoch;
        (Err(self), report)
    }
}

impl<V: PersistentVm> Standby<V> {
    /// A VM whose guest has not been here yet.
    pub fn new(vm: V) -> Self {
        Self { vm, gone: None }
    }

    /// The VM.
    pub fn vm(&self) -> &V {
        &self.vm
    }

    /// Readies to take the guest back, or in for the first time. Of `options`, `awaits` does not
    /// apply; `patience` is how long to wait for the guest, and then for the last word of whoever
    /// had it.
    pub fn await_guest(self, options: ReceiverOptions) -> Awaiting<V> {
        let place = Arc::new(Mutex::new(Some(self.vm)));
        let options = ReceiverOptions { awaits: self.gone, ..options };
        // the VM is in its place already, whichever object has stood for it
        let receiver = Receiver::new(Place(place.clone()), drop, options);
        Awaiting { place, receiver, gone: self.gone }
    }
}

/// A dormant VM whose guest may come at any moment.
pub struct Awaiting<V> {
    place: Arc<Mutex<Option<V>>>,
    receiver: Receiver,
    gone: Option<(VmId, u32)>,
}

impl<V: PersistentVm> Awaiting<V> {
    /// To end the wait from another thread, see how far it is, or inherit the guest from a dead VMM
    /// that had offered it.
    pub fn handle(&self) -> ReceiverHandle {
        self.receiver.handle()
    }

    /// Waits for the guest. It may have run here for a moment when this returns.
    ///
    /// # Errors
    /// The dormant VM, whose guest did not come: the wait was ended, or `patience` has passed. The
    /// guest is wherever it was.
    pub fn wait_for_guest(self, listener: &mut dyn Listener) -> Result<Active<V>, (Standby<V>, ReceiveError)> {
        let ended = self.receiver.run(listener);
        let (handle, gone) = (self.receiver.handle(), self.gone);
        let vm = lock(&self.place).take().expect("nothing else takes the VM out of its place");
        match ended {
            // attempts that failed have used up epochs
            Err(why) if handle.phase() != DestinationPhase::Running => {
                Err((Standby { vm, gone: gone.map(|(id, epoch)| (id, epoch.max(handle.epoch()))) }, why))
            }
            // whatever ended the wait: it is ours
            _ => Ok(Active { vm, epoch: handle.epoch() }),
        }
    }
}

/// Where a guest comes to.
struct Place<V>(Arc<Mutex<Option<V>>>);

impl<V: PersistentVm> DestinationHost for Place<V> {
    type Vm = V::Coming;

    fn build(&self, _vm: &VmDescription) -> Result<Self::Vm, VmError> {
        Err(VmError::new("a guest comes here only by a hand-over, in shared RAM"))
    }

    fn build_shared(&self, vm: &VmDescription, files: Vec<OwnedFd>) -> Result<Self::Vm, VmError> {
        // out of its place while it is called; one attempt at a time builds
        let here = lock(&self.0).take().ok_or_else(|| VmError::new("nobody waits for the guest any more"))?;
        let mut called = Called { place: &self.0, vm: Some(here) };
        match &mut called.vm {
            Some(here) => here.coming(vm, files),
            None => unreachable!("it goes back only at the end"),
        }
    }
}

/// A VM that is called, out of its place. It goes back when this is dropped, also if it has
/// panicked.
struct Called<'a, V> {
    place: &'a Mutex<Option<V>>,
    vm: Option<V>,
}

impl<V> Drop for Called<'_, V> {
    fn drop(&mut self) {
        *lock(self.place) = self.vm.take();
    }
}
