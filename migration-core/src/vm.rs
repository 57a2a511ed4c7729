//! What a VMM implements: the VM at the source, the VM at the destination, and the host that makes one.

use std::{
    error::Error,
    fmt,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;

use crate::{
    device::DeviceKind,
    page::RamLayout,
    page_set::PageSet,
    pager::Pager,
    ram::GuestRam,
    state::{Section, VmState},
    tracker::DirtyTracker,
};

/// Something that the VMM was asked to do failed.
#[derive(Debug)]
pub struct VmError {
    what: String,
    cause: Option<Box<dyn Error + Send + Sync>>,
    ended: bool,
}

impl VmError {
    /// An error that says what failed, and what the caller can do about it.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), cause: None, ended: false }
    }

    /// An error with the one that caused it.
    pub fn because(what: impl Into<String>, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { what: what.into(), cause: Some(cause.into()), ended: false }
    }

    /// What was asked cannot be done because the guest has ended by itself (it has powered off, crashed, or met an error that
    /// its vCPUs do not survive), for this reason. A migration then fails with [`MigrationError::VmEnded`] at both ends.
    ///
    /// [`MigrationError::VmEnded`]: crate::MigrationError::VmEnded
    pub fn ended(reason: impl Into<String>) -> Self {
        Self { what: reason.into(), cause: None, ended: true }
    }

    /// Returns why the guest has ended, if that is the error.
    pub fn has_ended(&self) -> Option<&str> {
        self.ended.then_some(&self.what)
    }

    /// State of a version that cannot be loaded.
    pub fn version(name: &str, found: u32, oldest: u32, newest: u32) -> Self {
        Self::new(format!("state of {name} has version {found}, this host loads {oldest} to {newest}"))
    }
}

impl fmt::Display for VmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Some(cause) => write!(f, "{}: {cause}", self.what),
            None if self.ended => write!(f, "the VM has ended: {}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

impl Error for VmError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_ref().map(|c| &**c as &(dyn Error + 'static))
    }
}

/// Identifies a VM for as long as it lives, on whatever host: 16 bytes that no other VM has, such as a UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct VmId(pub [u8; 16]);

/// 32 hexadecimal digits.
impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// What the source tells about its VM before any RAM moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDescription {
    /// Which VM it is.
    pub id: VmId,
    /// Where its RAM lies.
    pub layout: RamLayout,
    /// Its devices, with their versions.
    pub devices: Vec<DeviceKind>,
    /// What its vCPUs need of the host (CPUID, XCR0, TSC, MSRs), encoded by whoever understands it (migration-kvm's
    /// `HostNeeds`); empty if nothing.
    pub host_needs: Bytes,
    /// What the VMM needs to build the same machine; only the VMM understands it.
    pub config: Bytes,
}

/// How large a section of state is expected to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionEstimate {
    /// The section's [name](Section::name).
    pub name: String,
    /// Which of several of that name.
    pub instance: u32,
    /// Bytes of data.
    pub bytes: u64,
}

/// What saving a VM's state in the pause is expected to take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateEstimate {
    /// The sections that [`SourceVm::save_state`] would return now, without what
    /// [`iterate_state`](SourceVm::iterate_state) reports as pending. Sections that are small and never grow may be left out.
    pub sections: Vec<SectionEstimate>,
    /// How long saving them takes; `None` if that is not known.
    pub save_time: Option<Duration>,
}

impl StateEstimate {
    /// Returns the bytes of all sections together.
    pub fn bytes(&self) -> u64 {
        self.sections.iter().fold(0, |sum, section| sum.saturating_add(section.bytes))
    }
}

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
    /// [`DestinationVm::identity`].
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

/// A VM that is being received. It has been built when the object exists; its RAM is empty, or
/// [shared](DestinationHost::build_shared).
pub trait DestinationVm: Send {
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

    /// As [`SourceVm::pause`].
    fn pause(&mut self) -> Result<(), VmError>;

    /// As [`SourceVm::resume`]. Output stays held.
    fn resume(&mut self) -> Result<(), VmError>;

    /// As [`SourceVm::save_state`]; together with the state, output that is held.
    fn save_state(&mut self) -> Result<VmState, VmError>;

    /// Holds output from here on. Called before the state is loaded.
    fn hold_output(&mut self);

    /// How much output the VM has made, while it is paused.
    fn output(&mut self) -> u64;

    /// Lets output go up to this point; all of it, for ever, with `None`.
    fn release_output(&mut self, until: Option<u64>);
}

/// Builds VMs at a destination.
pub trait DestinationHost: Send {
    /// Checks that this host can run the VM, and builds it: RAM, vCPUs, devices. Everything that takes time happens
    /// here, while the guest runs at its source.
    ///
    /// # Errors
    /// What cannot be loaded is refused here, before RAM moves; the source is told the reason.
    fn build(&mut self, vm: &VmDescription) -> Result<Box<dyn DestinationVm>, VmError>;

    /// As [`build`](Self::build), of a VM whose RAM is in these memory files, one a region of the layout: it runs in them while
    /// this is called, and goes on to run in another process until the hand-over, for ever if that fails. So RAM is neither
    /// written nor discarded before [`DestinationVm::load_state`], but mapped, and page tables are filled as far as the
    /// operating system lets that be done beforehand. The files are a peer's: check number, lengths and seals.
    ///
    /// # Errors
    /// Likewise. The default cannot share RAM.
    fn build_shared(&mut self, vm: &VmDescription, files: Vec<OwnedFd>) -> Result<Box<dyn DestinationVm>, VmError> {
        let _ = (vm, files);
        Err(VmError::new("this VMM does not take over RAM that another process shares with it"))
    }

    /// The VM was started and is the host's from now on.
    fn adopted(&mut self, vm: Box<dyn DestinationVm>);

    /// The VM runs here with pages missing, and the link to its source is lost. vCPUs that need one wait for it anyway; a host
    /// whose guest shall not go on in part stops all of them here. Must not wait for a vCPU: it may wait for a page.
    fn link_lost(&mut self) {}

    /// The link is back, or not needed any more.
    fn link_found(&mut self) {}
}
