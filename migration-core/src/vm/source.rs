//! The VM at its source.

use std::{os::fd::BorrowedFd, sync::Arc};

use bytes::Bytes;

use super::{StateEstimate, VmDescription, VmError};
use crate::{
    page_set::PageSet,
    ram::GuestRam,
    state::{Section, VmState},
    tracker::DirtyTracker,
};

/// A running (or paused) VM, seen by the engine at its source.
///
/// The engine calls these methods from one thread, in an order that follows from the strategy; `pause` and `resume`
/// alternate. After `released` it calls nothing more.
pub trait SourceVm: Send {
    /// What the destination must know to build the same machine.
    fn describe(&mut self) -> Result<VmDescription, VmError>;

    /// The guest's RAM.
    fn ram(&self) -> Arc<dyn GuestRam>;

    /// The tracker that sees all writes to it: of vCPUs, of KVM, of devices and of the VMM.
    fn tracker(&mut self) -> &mut dyn DirtyTracker;

    /// Adds to `into` the pages whose contents the guest does not need: it has reported them free (a balloon, free page
    /// reporting) and not taken them back. They are left out, and read as zeros or as anything older at the destination.
    /// The default knows none. Pages outside RAM are ignored.
    ///
    /// The contract with the guest: what a free page holds is undefined, and may change from read to read, until it is
    /// written. The guest takes a page back *before* it first writes there, and both stores become visible in that
    /// order. (A guest that relies on what free pages hold, as one that poisons them does, must not report them.)
    ///
    /// It is then safe to leave out a page that is free *when it is looked at*, although the guest may take it back at
    /// once, provided that the look comes after tracking has started, or after a harvest has returned. Every write that
    /// counts comes after the page was taken back, which comes after the look, which comes after the tracker began anew:
    /// so the next harvest reports it, and the page is sent whole. The other way round, a page that is written and *then*
    /// reported free in between would be fine too, but one that is taken back and written between look and harvest would
    /// be reported by that harvest and left out for the sake of a look that no longer holds. The engine therefore asks in
    /// this order, each time anew, and never keeps the answer.
    ///
    /// A page that an earlier round has sent keeps at the destination what it had then; nothing needs to be dropped.
    ///
    /// # Errors
    /// When the report cannot be read. It is only a hint: the engine warns, and sends all pages.
    fn free_pages(&mut self, into: &mut PageSet) -> Result<(), VmError> {
        let _ = into;
        Ok(())
    }

    /// Adds to `into` the pages that the guest has referenced lately, read or written, for push orders that go by
    /// [heat](crate::strategy::PushOrder::begin). The default knows none; migration-kvm has `IdlePages`, over what Linux offers.
    ///
    /// Asked for once, while the guest runs, when all is set up and before any page is read: to send a page is to reference it, so
    /// later nobody could tell the guest's looks from ours. A VMM therefore begins to watch before it begins the migration; and as
    /// that has a price, only if the order will use it. Not asked for where the destination cannot serve missing pages.
    ///
    /// # Errors
    /// When it cannot be told. It is only a hint, as are pages outside RAM, which are ignored: the engine warns, and the order
    /// goes by what was dirtied.
    fn referenced_pages(&mut self, into: &mut PageSet) -> Result<(), VmError> {
        let _ = into;
        Ok(())
    }

    /// The memory files behind RAM, one a region of the layout in its order, for a process of this machine to which the VM
    /// is handed over without moving RAM. Asked for before the pause.
    ///
    /// # Errors
    /// The default has none. An error says which backing the VM would need; the VM runs on.
    fn shared_ram(&self) -> Result<Vec<BorrowedFd<'_>>, VmError> {
        Err(VmError::new("this VMM does not share the RAM of its VMs: it would have to be in memory files (memfd)"))
    }

    /// Why the VM cannot move by the strategy of this name, if so.
    fn blocked(&self, strategy: &str) -> Option<String> {
        let _ = strategy;
        None
    }

    /// A migration begins; devices with state in several steps start to record it.
    fn start(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// Estimates what saving the state in the pause will take, for the predicted downtime. Called before the first round,
    /// after each round, and before the pause, while the guest runs; it must be quick.
    ///
    /// A section above [`MAX_SECTION`](crate::state::MAX_SECTION) bytes is refused by this estimate before the guest is
    /// paused, rather than in the pause. The default knows nothing; the engine then assumes a few milliseconds, and what
    /// `iterate_state` reports as pending.
    fn estimate_state(&mut self) -> Option<StateEstimate> {
        None
    }

    /// Pieces of device state while the guest runs, at most `budget` bytes, and how many bytes are pending after them. What is
    /// pending counts in the predicted downtime: in the pause it is part of [`save_state`](Self::save_state).
    ///
    /// Called before each round, and again as long as at least a budget's worth is pending and becomes less. A piece has at
    /// most [`STATE_CHUNK`](crate::wire::STATE_CHUNK) bytes.
    fn iterate_state(&mut self, budget: usize) -> Result<(Vec<Section>, u64), VmError> {
        let _ = budget;
        Ok((Vec::new(), 0))
    }

    /// Stops all vCPUs, then brings the devices to rest; returns when neither writes guest memory any more.
    ///
    /// # Errors
    /// The engine calls `resume` then. [`VmError::ended`] when the guest has ended by itself: there is nothing to move. A
    /// VMM that knows this earlier says so by [`Controller::vm_ended`](crate::engine::Controller::vm_ended).
    fn pause(&mut self) -> Result<(), VmError>;

    /// Lets devices and vCPUs go on: after a pause that did not end in a hand-over. If the user had paused the VM
    /// before the migration, it stays paused.
    fn resume(&mut self) -> Result<(), VmError>;

    /// Lets vCPUs run only `100 - percent` of the time; 0 lifts it. In slices short enough not to be felt as gaps.
    fn throttle(&mut self, percent: u8) -> Result<(), VmError>;

    /// The state of vCPUs, VM and devices, while paused. May dirty guest memory: the engine harvests afterwards.
    fn save_state(&mut self) -> Result<VmState, VmError>;

    /// Adds to `into` the pages that the vCPUs of `state`, which was just saved, touch as soon as they run: where they execute, their
    /// stacks, the page tables on the way there. In post-copy they go ahead of the hand-over, so that the guest does not begin by
    /// waiting for one after the other. A hint: pages outside RAM are ignored, and so are those beyond the first 128. The default knows
    /// none; migration-kvm has `entry_pages`.
    fn entry_pages(&mut self, state: &VmState, into: &mut PageSet) {
        let _ = (state, into);
    }

    /// Whether the guest shall run after the hand-over, or stay paused because its user paused it.
    fn starts_running(&self) -> bool {
        true
    }

    /// From this call on the VM may run at the destination (*run* is about to be sent): it must never run here again.
    /// The place to give up disk locks.
    fn owner_in_doubt(&mut self) {}

    /// What a [`Fence`](crate::fence::Fence) at the destination needs to end this host's instance of the VM, as
    /// [`DestinationVm::identity`](super::DestinationVm::identity).
    fn identity(&self) -> Bytes {
        Bytes::new()
    }

    /// The VM belongs to the destination for certain: free it. If its RAM is [shared](Self::shared_ram), that goes on living
    /// there: it may be unmapped here, and neither be written nor discarded.
    fn released(&mut self);

    /// The destination is dead for certain (a [`Fence`](crate::fence::Fence) has said so), and the VM is ours again, as a new
    /// owner: load `state`, the last committed checkpoint's, over whatever vCPUs and devices hold, and let the guest run
    /// if it ran. RAM holds that checkpoint already. Output that the destination has written up to it must not be written
    /// again, if the VMM can tell. Called after [`owner_in_doubt`](Self::owner_in_doubt).
    ///
    /// # Errors
    /// The default cannot. The VM is lost then.
    fn restart(&mut self, state: &VmState) -> Result<(), VmError> {
        let _ = state;
        Err(VmError::new("this VMM does not restart VMs from checkpoints"))
    }
}
