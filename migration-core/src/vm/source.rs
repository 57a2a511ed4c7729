//! The VM at its source.

use std::{os::fd::BorrowedFd, sync::Arc};

use bytes::Bytes;

use super::{StateEstimate, VmDescription, VmError};
use crate::{
    page_set::PageSet,
    paged_memory::PagedMemory,
    ram::GuestRam,
    state::{Section, VmState},
    tracker::DirtyTracker,
};

/// A VM that is to be migrated, as the engine sees it at the source.
///
/// The engine calls these methods from one thread, in the order that the strategy determines. Each
/// `pause` is followed by a `resume` or by `released`. After `released` the engine calls no method
/// any more.
pub trait SourceVm: Send {
    /// Returns the description from which the destination builds the same machine.
    ///
    /// # Errors
    /// Returns an error if the VM cannot be described. The migration then fails.
    fn describe(&mut self) -> Result<VmDescription, VmError>;

    /// Returns the guest's RAM.
    fn ram(&self) -> Arc<dyn GuestRam>;

    /// Returns the tracker of all writes to the RAM: by vCPUs, KVM, devices and the VMM.
    fn tracker(&mut self) -> &mut dyn DirtyTracker;

    /// Returns the memory of a VM that has pages in page stores and fetches them when the guest
    /// touches them. The default returns `None`: all of RAM is here.
    ///
    /// If the strategy [keeps](crate::strategy::Strategy::keeps_stored_pages) stored pages in their
    /// stores, only their locations are sent. For all other strategies the engine reads stored
    /// pages through a buffer and sends them, so that they do not become resident.
    ///
    /// The contract of the VMM, from this call until the migration has ended:
    /// 1. No page is evicted, and pages whose eviction is not complete are mapped again before this
    ///    method returns (rule 22).
    /// 2. A page that returns to RAM is claimed in the map before its first byte is installed.
    /// 3. After [`pause`](Self::pause) has returned, no page returns to RAM until `resume`.
    /// 4. Pages that the VMM or KVM touches while the state is saved are never in a store (rule
    ///    20).
    fn paged_memory(&self) -> Option<Arc<PagedMemory>> {
        None
    }

    /// Adds to `into` the pages whose contents the guest does not need, because it has reported
    /// them free (by a balloon or by free page reporting) and has not used them again since. The
    /// engine does not send them: at the destination they read as zeros or as any older contents.
    /// The default adds no page. Pages outside RAM are ignored.
    ///
    /// The contract with the guest: the contents of a free page are undefined, and may change from
    /// read to read, until the guest writes the page. The guest takes a page back *before* it first
    /// writes there, and both stores become visible in that order. (A guest that relies on the
    /// contents of free pages, for example one that poisons them, must not report them.)
    ///
    /// Why it is safe to skip a page that is free *when the engine reads the report*, although the
    /// guest may take it back at once:
    /// 1. The engine reads the report after tracking has started, or after a harvest has returned.
    /// 2. A write that matters comes after the guest took the page back, so it comes after the
    ///    reading.
    /// 3. The next harvest therefore reports the page, and the engine sends it.
    ///
    /// The reading must not come before the harvest. Otherwise the guest could take the page back
    /// and write it in between: that harvest would report the page, and the engine would skip it
    /// because of a report that is out of date. So the engine reads the report anew each time, in
    /// this order, and never keeps the result.
    ///
    /// A page that an earlier round has sent keeps its older contents at the destination.
    ///
    /// # Errors
    /// Returns an error if the report cannot be read. The engine then warns and sends all pages.
    fn free_pages(&mut self, into: &mut PageSet) -> Result<(), VmError> {
        let _ = into;
        Ok(())
    }

    /// Adds to `into` the pages that the guest has read or written recently, for push orders that
    /// use [heat](crate::strategy::PushOrder::begin). The default adds no page. migration-kvm has
    /// `IdlePages`, which gets them from Linux.
    ///
    /// The engine calls this once, while the guest runs, after the set-up and before it reads any
    /// page. Sending a page references it, so later the accesses of the guest could not be
    /// distinguished from those of the engine. A VMM therefore begins to record references before
    /// the migration begins, and only if the push order uses them, because recording costs time.
    /// The engine does not call this if the destination cannot load missing pages on demand.
    ///
    /// # Errors
    /// Returns an error if the references are not known. They are a hint: the engine warns, and the
    /// order uses only dirtied pages. Pages outside RAM are ignored.
    fn referenced_pages(&mut self, into: &mut PageSet) -> Result<(), VmError> {
        let _ = into;
        Ok(())
    }

    /// Returns the memory files of the RAM, one for each region in the order of the layout, for a
    /// process on this machine that takes over the VM without moving its RAM. Called before the
    /// pause.
    ///
    /// # Errors
    /// Returns an error if the RAM cannot be shared; the error names the backing that would be
    /// needed. The VM continues to run. The default returns an error.
    fn shared_ram(&self) -> Result<Vec<BorrowedFd<'_>>, VmError> {
        Err(VmError::new("this VMM does not share the RAM of its VMs: it would have to be in memory files (memfd)"))
    }

    /// Returns the reason why the strategy named `strategy` cannot migrate the VM, or `None` if it
    /// can.
    fn blocked(&self, strategy: &str) -> Option<String> {
        let _ = strategy;
        None
    }

    /// Begins a migration. Devices whose state is sent in several steps start to record it.
    ///
    /// # Errors
    /// Returns an error if the VM cannot be migrated. The migration then fails.
    fn start(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// Estimates the size of the state and the time to save it, for the predicted downtime. Called
    /// before the first round, after each round, and before the pause, while the guest runs. It
    /// must be quick.
    ///
    /// If a section is larger than [`MAX_SECTION`](crate::state::MAX_SECTION) bytes, the engine
    /// refuses the migration by this estimate, rather than in the pause. The default returns
    /// `None`: the engine then assumes a few milliseconds, plus the pending bytes that
    /// `iterate_state` returns.
    fn estimate_state(&mut self) -> Option<StateEstimate> {
        None
    }

    /// Returns pieces of device state while the guest runs, of at most `budget` bytes, and the
    /// number of bytes that are pending after them. The predicted downtime includes pending bytes,
    /// because they are part of [`save_state`](Self::save_state) in the pause.
    ///
    /// Called before each round, and again while at least `budget` bytes are pending and their
    /// number falls. A piece has at most [`STATE_CHUNK`](crate::wire::STATE_CHUNK) bytes.
    ///
    /// # Errors
    /// Returns an error if the state cannot be read. The migration then fails, and the guest
    /// continues to run.
    fn iterate_state(&mut self, budget: usize) -> Result<(Vec<Section>, u64), VmError> {
        let _ = budget;
        Ok((Vec::new(), 0))
    }

    /// Stops all vCPUs and then quiesces the devices. Returns when neither writes guest memory any
    /// more.
    ///
    /// # Errors
    /// Returns an error if the VM cannot be paused. The engine then calls `resume`. The error is
    /// [`VmError::ended`] if the guest has ended by itself, because then there is nothing to move.
    /// A VMM that knows this earlier calls
    /// [`Controller::vm_ended`](crate::engine::Controller::vm_ended).
    fn pause(&mut self) -> Result<(), VmError>;

    /// Resumes devices and vCPUs after a pause that did not end in a hand-over. The VM stays paused
    /// if the user had paused it before the migration.
    ///
    /// # Errors
    /// Returns an error if the VM cannot be resumed. The migration has failed already; the error is
    /// reported to the user.
    fn resume(&mut self) -> Result<(), VmError>;

    /// Lets the vCPUs run for only `100 - percent` percent of the time, in slices too short for the
    /// guest to notice gaps. 0 ends the throttle.
    ///
    /// # Errors
    /// Returns an error if the vCPUs cannot be throttled. The migration then fails, and the guest
    /// continues to run.
    fn throttle(&mut self, percent: u8) -> Result<(), VmError>;

    /// Returns the state of vCPUs, VM and devices. Called while the VM is paused. It may dirty
    /// guest memory: the engine harvests afterwards.
    ///
    /// # Errors
    /// Returns an error if the state cannot be saved. The migration then fails, and the engine
    /// calls `resume`.
    fn save_state(&mut self) -> Result<VmState, VmError>;

    /// Adds to `into` the pages that the vCPUs of `state`, which was just saved, touch as soon as
    /// they run: code, stacks, and the page tables that map them. Post-copy sends these pages
    /// before the hand-over, so that the guest does not begin with a series of faults. They are a
    /// hint: pages outside RAM, and all but the first 128, are ignored. The default adds no page.
    /// migration-kvm has `entry_pages`.
    fn entry_pages(&mut self, state: &VmState, into: &mut PageSet) {
        let _ = (state, into);
    }

    /// Returns whether the guest runs after the hand-over. It stays paused if its user has paused
    /// it.
    fn starts_running(&self) -> bool {
        true
    }

    /// Informs the VMM that from this call on the VM may run at the destination, because *run* is
    /// about to be sent. The VM must never run here again. A VMM releases its disk locks here.
    fn owner_in_doubt(&mut self) {}

    /// Returns the information that a [`Fence`](crate::fence::Fence) at the destination needs to
    /// end this host's instance of the VM. See
    /// [`DestinationVm::identity`](super::DestinationVm::identity).
    fn identity(&self) -> Bytes {
        Bytes::new()
    }

    /// Informs the VMM that the destination owns the VM for certain: the VMM frees it. If its RAM
    /// is [shared](Self::shared_ram), the destination continues to use the RAM: the VMM may unmap
    /// it, but must neither write nor discard it.
    fn released(&mut self);

    /// Takes back the VM as a new owner, because the destination is dead for certain (a
    /// [`Fence`](crate::fence::Fence) has confirmed it). The VMM loads `state`, which belongs to
    /// the last committed checkpoint, into the vCPUs and devices, whatever they hold, and lets the
    /// guest run if it ran. RAM has the contents of that checkpoint already. Output that the
    /// destination has written up to the checkpoint must not be written again, if the VMM can tell.
    /// Called after [`owner_in_doubt`](Self::owner_in_doubt).
    ///
    /// # Errors
    /// Returns an error if the VM cannot be restarted. The VM is then lost. The default returns an
    /// error.
    fn restart(&mut self, state: &VmState) -> Result<(), VmError> {
        let _ = state;
        Err(VmError::new("this VMM does not restart VMs from checkpoints"))
    }
}
