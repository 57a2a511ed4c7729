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

/// A VM that is being received.
///
/// The VM is built when the object exists. Its RAM is empty, or
/// [shared](DestinationHost::build_shared) with the source. One thread at a time calls these
/// methods, and the receiver holds no lock during a call, so an implementation may use the
/// [`ReceiverHandle`](crate::engine::ReceiverHandle). The receiver drops the VM if the attempt
/// fails.
pub trait DestinationVm {
    /// Returns the guest's RAM.
    fn ram(&self) -> Arc<dyn GuestRam>;

    /// Loads a piece of device state that was sent while the guest ran at the source.
    ///
    /// # Errors
    /// Returns an error if the piece cannot be loaded. The attempt then fails, and the guest
    /// continues to run at the source. The default returns an error.
    fn load_piece(&mut self, piece: &Section) -> Result<(), VmError> {
        Err(VmError::new(format!("no device {} {} takes its state in pieces", piece.name, piece.instance)))
    }

    /// Continues the dirty log that the source's VMM kept for other purposes than migration, such
    /// as incremental backups. From this call on a tracker contains `dirty` and all further writes
    /// to the RAM, which did not move. Called in the pause, before
    /// [`load_state`](Self::load_state), and only if the RAM is
    /// [shared](DestinationHost::build_shared).
    ///
    /// # Errors
    /// Returns an error if the log cannot be continued. The attempt then fails, so that no log is
    /// lost, and the guest continues to run at the source. The default returns an error.
    fn continue_log(&mut self, dirty: &PageSet) -> Result<(), VmError> {
        let _ = dirty;
        Err(VmError::new("the VM's dirty log cannot go on here: this VMM does not implement continue_log"))
    }

    /// Estimates the time that [`load_state`](Self::load_state) will take, for the downtime that
    /// the source predicts. Called once, after the VM was built. The default returns `None`: the
    /// source then assumes a millisecond plus a second per gigabyte.
    fn estimate_load(&mut self) -> Option<Duration> {
        None
    }

    /// Loads the state. All pages of RAM have arrived, except the missing pages of post-copy. A
    /// thread that touches a missing page waits for it.
    ///
    /// # Errors
    /// Returns an error if the state cannot be loaded. The attempt then fails, and the guest
    /// continues to run at the source.
    fn load_state(&mut self, state: &VmState) -> Result<(), VmError>;

    /// Returns the pager that installs missing pages, or `None` if the VM can only run after all
    /// pages have arrived. With a pager it can run before (post-copy). Called once, after the VM
    /// was built.
    fn pager(&mut self) -> Option<Arc<dyn Pager>> {
        None
    }

    /// Returns the operating system's numbers of the vCPU threads, so that their faults can be
    /// counted separately. Called after [`start`](Self::start).
    fn vcpu_threads(&self) -> Vec<u32> {
        Vec::new()
    }

    /// Returns the information that a [`Fence`](crate::fence::Fence) at the source needs to end
    /// this host's instance of the VM, for example the identities of the host and the process. It
    /// has at most [`MAX_IDENTITY`](crate::wire::MAX_IDENTITY) bytes.
    fn identity(&self) -> Bytes {
        Bytes::new()
    }

    /// Returns the interface through which checkpoints of the running VM are taken, or `None` if
    /// this VMM does not support checkpoints. Called once, before any state is loaded.
    fn protected(&mut self) -> Option<Box<dyn CheckpointedVm>> {
        None
    }

    /// Takes over the VM, which this host owns from now on: takes disk locks, announces network
    /// addresses, and starts the vCPUs if `running` is true.
    ///
    /// # Errors
    /// Returns an error if the VM cannot be started. The hand-over cannot be undone any more: the
    /// VM stays here and does not run. The error is in [`Arrived::not_started`].
    fn start(&mut self, running: bool) -> Result<(), VmError>;
}

/// A VM at its destination, of which checkpoints are taken while it runs.
///
/// Its output is *held*, that is, delayed and not lost, until the engine releases it. So no
/// observer outside the host sees an effect of a state that would be lost if this host died. One
/// thread at a time calls these methods. Output is counted from the first byte that the VM has ever
/// written, across hosts.
pub trait CheckpointedVm: Send {
    /// Returns the tracker of all writes to the VM's RAM. Tracking starts before the state is
    /// loaded.
    fn tracker(&mut self) -> &mut dyn DirtyTracker;

    /// Stops all vCPUs and quiesces the devices. See [`SourceVm::pause`](super::SourceVm::pause).
    ///
    /// # Errors
    /// Returns an error if the VM cannot be paused. The checkpoint then fails, and the engine calls
    /// `resume`.
    fn pause(&mut self) -> Result<(), VmError>;

    /// Resumes devices and vCPUs. See [`SourceVm::resume`](super::SourceVm::resume). Output stays
    /// held.
    ///
    /// # Errors
    /// Returns an error if the VM cannot be resumed. The checkpoint then fails.
    fn resume(&mut self) -> Result<(), VmError>;

    /// Returns the state as [`SourceVm::save_state`](super::SourceVm::save_state) does, including
    /// the output that is held.
    ///
    /// # Errors
    /// Returns an error if the state cannot be saved. The checkpoint then fails.
    fn save_state(&mut self) -> Result<VmState, VmError>;

    /// Holds all further output. Called before the state is loaded.
    fn hold_output(&mut self);

    /// Returns the number of bytes of output that the VM has written. Called while the VM is
    /// paused.
    fn output(&mut self) -> u64;

    /// Releases the output up to the byte number `until`, or all output permanently if `until` is
    /// `None`.
    fn release_output(&mut self, until: Option<u64>);
}

/// Builds VMs at a destination.
///
/// A [`Receiver`](crate::engine::Receiver) calls these methods from several threads, and holds no
/// lock during a call, so an implementation may use the
/// [`ReceiverHandle`](crate::engine::ReceiverHandle). One VM is built by one thread at a time.
pub trait DestinationHost {
    /// The type of the VMs that this host builds. The receiver gives a VM back as this type, in
    /// [`Arrived`]. A host that builds VMs of several types uses `Box<dyn DestinationVm + Send>`.
    type Vm: DestinationVm;

    /// Checks that this host can run the VM, and builds it: RAM, vCPUs, devices. Everything that
    /// takes time belongs here, because the guest still runs at its source.
    ///
    /// # Errors
    /// Returns an error if this host cannot run or build the VM. The VM is then refused before RAM
    /// moves, and the source gets the reason.
    fn build(&self, vm: &VmDescription) -> Result<Self::Vm, VmError>;

    /// Builds a VM whose RAM is in these memory files, one for each region of the layout.
    ///
    /// The VM runs in these files during this call. It continues to run in another process until
    /// the hand-over, or permanently if the hand-over fails. So this method maps the RAM, and fills
    /// page tables as far as the operating system allows, but neither writes nor discards RAM.
    /// [`DestinationVm::load_state`] may write it. The files come from a peer: check their number,
    /// lengths and seals.
    ///
    /// # Errors
    /// Returns an error as [`build`](Self::build) does. The default returns an error.
    fn build_shared(&self, vm: &VmDescription, files: Vec<OwnedFd>) -> Result<Self::Vm, VmError> {
        let _ = (vm, files);
        Err(VmError::new("this VMM does not take over RAM that another process shares with it"))
    }

    /// Informs the host that the link to the source of this VM is lost while the VM runs here with
    /// pages missing. A vCPU that needs a missing page waits for it in any case. A host whose guest
    /// must not run with some of its vCPUs stopped stops all vCPUs here. This method must not wait
    /// for a vCPU, because the vCPU may wait for a page. Called only after the VM has
    /// [arrived](Arrived).
    fn link_lost(&self, vm: VmId) {
        let _ = vm;
    }

    /// Informs the host that the link to the source of this VM is restored, or is not needed any
    /// more. Also called without a preceding [`link_lost`](Self::link_lost).
    fn link_found(&self, vm: VmId) {
        let _ = vm;
    }

    /// Informs the host that an attempt to migrate a VM to this host has failed, and that the VM
    /// which was built for it is gone. A refusal counts as a failed attempt, also the refusal of a
    /// peer that speaks another protocol. Called once for each failed attempt. Not called if a
    /// newer attempt for the same VM replaces this one, nor when the receiver is stopped.
    fn attempt_failed(&self, failed: &FailedAttempt) {
        let _ = failed;
    }
}

/// A failed attempt to migrate a VM to this host. The guest continues to run at the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedAttempt {
    /// The address of the other end.
    pub peer: String,
    /// The VM, if its source has sent its identity.
    pub vm: Option<VmId>,
    /// The reason why the attempt failed.
    pub why: String,
}

/// Writes the VM, the peer and the reason.
impl fmt::Display for FailedAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.vm {
            Some(vm) => write!(f, "VM {vm} from {}: {}", self.peer, self.why),
            None => write!(f, "{}: {}", self.peer, self.why),
        }
    }
}

/// A VM that is owned by its destination and was started there.
#[derive(Debug)]
pub struct Arrived<V> {
    /// The VM, as its host built it.
    pub vm: V,
    /// The identity of the VM.
    pub id: VmId,
    /// The epoch under which this host owns the VM. A later migration of the VM has a [higher
    /// epoch](crate::engine::SourceOptions::last_epoch).
    pub epoch: u32,
    /// The error of [`DestinationVm::start`], if it has failed. This host owns the VM all the same,
    /// but the VM does not run.
    pub not_started: Option<VmError>,
}

/// Forwards to the VM in the box.
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

    fn protected(&mut self) -> Option<Box<dyn CheckpointedVm>> {
        (**self).protected()
    }

    fn start(&mut self, running: bool) -> Result<(), VmError> {
        (**self).start(running)
    }
}

/// Forwards to the shared host.
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
