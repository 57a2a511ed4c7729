//! The VM at its destination, and the host that builds it.

use std::{fmt, os::fd::OwnedFd, sync::Arc, time::Duration};

use bytes::Bytes;

use super::{VmDescription, VmError, VmId};
use crate::{
    page_set::PageSet,
    pager::Pager,
    ram::GuestRam,
    state::{Section, VmState},
    tracker::DirtyTracker,
};

/// A VM that is being received. It has been built when the object exists; its RAM is empty, or
/// [shared](DestinationHost::build_shared).
///
/// A receiver calls these methods from one thread at a time, and holds no lock meanwhile: an implementation may use the
/// [`ReceiverHandle`](crate::engine::ReceiverHandle).
pub trait DestinationVm {
    /// The guest's RAM.
    fn ram(&self) -> Arc<dyn GuestRam>;

    /// Takes pieces of device state that came while the guest ran at the source.
    fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        Err(VmError::new(format!("no device {} {} takes its state in pieces", piece.name, piece.instance)))
    }

    /// Goes on with the dirty log of the source's VMM, which was tracking for itself (for incremental backups, say): from here
    /// on a tracker has `dirty` and whatever is written to RAM that stayed where it is. Called before
    /// [`load_state`](Self::load_state), in the pause, and only if the VM's RAM is [shared](DestinationHost::build_shared).
    ///
    /// # Errors
    /// The default cannot: the attempt fails rather than lose the log.
    fn continue_log(&mut self, dirty: &PageSet) -> Result<(), VmError> {
        let _ = dirty;
        Err(VmError::new("the VM's dirty log cannot go on here: this VMM does not implement continue_log"))
    }

    /// Estimates how long [`load_state`](Self::load_state) will take, for the downtime that the source predicts. Called once,
    /// after the VM is built. The default knows nothing; the source then assumes a millisecond, and a second for each gigabyte.
    fn estimate_load(&mut self) -> Option<Duration> {
        None
    }

    /// Loads the state. RAM is complete by then.
    ///
    /// # Errors
    /// The attempt fails, the source's guest runs on.
    fn load_state(&mut self, state: &VmState) -> Result<(), VmError>;

    /// What serves missing pages, if this VM can be handed over before all of them have arrived (post-copy). Asked for
    /// once, after the VM is built.
    fn pager(&mut self) -> Option<Arc<dyn Pager>> {
        None
    }

    /// The operating system's numbers of the threads that run vCPUs, to tell their faults from others. Asked for after
    /// [`start`](Self::start).
    fn vcpu_threads(&self) -> Vec<u32> {
        Vec::new()
    }

    /// What a [`Fence`](crate::fence::Fence) at the source needs to end this host's instance of the VM, such as a host's and a
    /// process's identity; at most [`MAX_IDENTITY`](crate::wire::MAX_IDENTITY) bytes.
    fn identity(&self) -> Bytes {
        Bytes::new()
    }

    /// The same VM, for checkpoints while it runs. Asked for once, before any state is loaded. `None` if this VMM does
    /// not support that.
    fn protected(&mut self) -> Option<Box<dyn ProtectedVm>> {
        None
    }

    /// The VM is owned here, from now on: take disk locks, announce addresses, and start the vCPUs if `running`.
    ///
    /// # Errors
    /// Too late to go back; the VM stays here, not running, and the error is reported to both sides' users.
    fn start(&mut self, running: bool) -> Result<(), VmError>;
}

/// A VM at its destination, of which checkpoints are taken while it runs. Until it is told otherwise its output is *held*:
/// kept back, not lost, so that nobody outside sees anything of a state that would be gone if this host died.
///
/// The engine calls these methods from one thread at a time. Output is counted from the VM's first byte on, across hosts.
pub trait ProtectedVm: Send {
    /// The tracker of all writes to the VM's RAM. Tracking starts before the state is loaded.
    fn tracker(&mut self) -> &mut dyn DirtyTracker;

    /// As [`SourceVm::pause`](super::SourceVm::pause).
    fn pause(&mut self) -> Result<(), VmError>;

    /// As [`SourceVm::resume`](super::SourceVm::resume). Output stays held.
    fn resume(&mut self) -> Result<(), VmError>;

    /// As [`SourceVm::save_state`](super::SourceVm::save_state); together with the state, output that is held.
    fn save_state(&mut self) -> Result<VmState, VmError>;

    /// Holds output from here on. Called before the state is loaded.
    fn hold_output(&mut self);

    /// How much output the VM has made, while it is paused.
    fn output(&mut self) -> u64;

    /// Lets output go up to this point; all of it, for ever, with `None`.
    fn release_output(&mut self, until: Option<u64>);
}

/// Builds VMs at a destination.
///
/// A [`Receiver`](crate::engine::Receiver) calls these methods from several threads, for one VM at a time, and holds no lock
/// meanwhile: an implementation may use the [`ReceiverHandle`](crate::engine::ReceiverHandle).
pub trait DestinationHost {
    /// The VMs that this host builds. Whoever receives one gets it back as this type, in [`Arrived`]. A host that builds VMs of
    /// several types names `Box<dyn DestinationVm + Send>`.
    type Vm: DestinationVm;

    /// Checks that this host can run the VM, and builds it: RAM, vCPUs, devices. Everything that takes time happens
    /// here, while the guest runs at its source.
    ///
    /// # Errors
    /// What cannot be loaded is refused here, before RAM moves; the source is told the reason.
    fn build(&self, vm: &VmDescription) -> Result<Self::Vm, VmError>;

    /// As [`build`](Self::build), of a VM whose RAM is in these memory files, one a region of the layout: it runs in them while
    /// this is called, and goes on to run in another process until the hand-over, for ever if that fails. So RAM is neither
    /// written nor discarded before [`DestinationVm::load_state`], but mapped, and page tables are filled as far as the
    /// operating system lets that be done beforehand. The files are a peer's: check number, lengths and seals.
    ///
    /// # Errors
    /// Those of [`build`](Self::build). The default cannot share RAM.
    fn build_shared(&self, vm: &VmDescription, files: Vec<OwnedFd>) -> Result<Self::Vm, VmError> {
        let _ = (vm, files);
        Err(VmError::new("this VMM does not take over RAM that another process shares with it"))
    }

    /// This VM runs here with pages missing, and the link to its source is lost. vCPUs that need one wait for it anyway; a host
    /// whose guest shall not go on in part stops all of them here. Must not wait for a vCPU: it may wait for a page. Called
    /// only after the VM has [arrived](Arrived).
    fn link_lost(&self, vm: VmId) {
        let _ = vm;
    }

    /// The link of this VM is back, or not needed any more. Called also where [`link_lost`](Self::link_lost) was not.
    fn link_found(&self, vm: VmId) {
        let _ = vm;
    }

    /// An attempt to migrate a VM to this host has come to nothing, and the VM that was built for it is gone. A refusal counts,
    /// also of a peer that speaks another protocol. Called once for each attempt, but neither for one that a newer attempt of
    /// the same VM takes the place of, nor when the receiver is stopped.
    fn attempt_failed(&self, failed: &FailedAttempt) {
        let _ = failed;
    }
}

/// An attempt to migrate a VM to this host that has come to nothing. Until a destination has said that it is ready, the guest runs
/// on at the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedAttempt {
    /// The address of the other end.
    pub peer: String,
    /// Which VM it was, if its source came to say so.
    pub vm: Option<VmId>,
    /// Why it failed.
    pub why: String,
}

/// Who it was, and why it failed.
impl fmt::Display for FailedAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.vm {
            Some(vm) => write!(f, "VM {vm} from {}: {}", self.peer, self.why),
            None => write!(f, "{}: {}", self.peer, self.why),
        }
    }
}

/// A VM that has become its destination's own. It runs, or is about to.
#[derive(Debug)]
pub struct Arrived<V> {
    /// The VM, as its host built it.
    pub vm: V,
    /// Which VM it is.
    pub id: VmId,
    /// The epoch under which it is owned here: a later migration of it has a
    /// [higher one](crate::engine::SourceOptions::last_epoch).
    pub epoch: u32,
    /// Why [`DestinationVm::start`] has failed, if it has. The VM is owned here all the same, and does not run.
    pub not_started: Option<VmError>,
}

/// All methods of the VM in the box.
impl<V: DestinationVm + ?Sized> DestinationVm for Box<V> {
    fn ram(&self) -> Arc<dyn GuestRam> {
        (**self).ram()
    }

    fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        (**self).load_piece(piece)
    }

    fn continue_log(&mut self, dirty: &PageSet) -> Result<(), VmError> {
        (**self).continue_log(dirty)
    }

    fn estimate_load(&mut self) -> Option<Duration> {
        (**self).estimate_load()
    }

    fn load_state(&mut self, state: &VmState) -> Result<(), VmError> {
        (**self).load_state(state)
    }

    fn pager(&mut self) -> Option<Arc<dyn Pager>> {
        (**self).pager()
    }

    fn vcpu_threads(&self) -> Vec<u32> {
        (**self).vcpu_threads()
    }

    fn identity(&self) -> Bytes {
        (**self).identity()
    }

    fn protected(&mut self) -> Option<Box<dyn ProtectedVm>> {
        (**self).protected()
    }

    fn start(&mut self, running: bool) -> Result<(), VmError> {
        (**self).start(running)
    }
}

/// All methods of the host that is shared.
impl<H: DestinationHost + ?Sized> DestinationHost for Arc<H> {
    type Vm = H::Vm;

    fn build(&self, vm: &VmDescription) -> Result<H::Vm, VmError> {
        (**self).build(vm)
    }

    fn build_shared(&self, vm: &VmDescription, files: Vec<OwnedFd>) -> Result<H::Vm, VmError> {
        (**self).build_shared(vm, files)
    }

    fn link_lost(&self, vm: VmId) {
        (**self).link_lost(vm);
    }

    fn link_found(&self, vm: VmId) {
        (**self).link_found(vm);
    }

    fn attempt_failed(&self, failed: &FailedAttempt) {
        (**self).attempt_failed(failed);
    }
}
