//! How other threads talk to a receiver, and to what it knows of one VM.

use super::*;

/// Talks to a [`Receiver`] from other threads.
///
/// The methods that do not name a VM are about the only one that the receiver knows: that of a receiver of one VM. A receiver of
/// [several](ReceiverOptions::max_vms) has [`vms`](Self::vms) and [`vm`](Self::vm).
#[derive(Clone)]
pub struct ReceiverHandle {
    destination: Arc<Destination>,
}

/// Talks to a receiver about one of its VMs.
#[derive(Clone)]
pub struct VmHandle {
    entry: Arc<VmEntry>,
}

/// A VM that a receiver knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmStatus {
    /// Which VM.
    pub id: VmId,
    /// Where the protocol stands.
    pub phase: DestinationPhase,
    /// The epoch of the present attempt, or the last one.
    pub epoch: u32,
}

impl ReceiverHandle {
    pub(super) fn new(destination: Arc<Destination>) -> Self {
        Self { destination }
    }

    /// Ends [`Receiver::run`]; VMs that are being received or held are discarded with the receiver.
    pub fn stop(&self) {
        self.destination.common.stop.store(true, Ordering::Relaxed);
    }

    /// Bytes of all frames that were received and sent so far, on all lanes.
    pub fn wire_bytes(&self) -> u64 {
        self.destination.common.bytes.load(Ordering::Relaxed)
    }

    /// Returns the VMs that are being received, held, or served until their sources know that they run here.
    pub fn vms(&self) -> Vec<VmStatus> {
        let status = |entry: &Arc<VmEntry>| {
            let state = lock(&entry.state);
            Some(VmStatus { id: state.machine.vm()?, phase: state.machine.phase(), epoch: state.machine.epoch() })
        };
        self.destination.entries().iter().filter_map(status).collect()
    }

    /// Returns the handle of a VM that is being received, held, or served; `None` when there is no such VM.
    pub fn vm(&self, id: VmId) -> Option<VmHandle> {
        Some(VmHandle { entry: self.destination.entry(id)? })
    }

    /// Where the protocol stands.
    pub fn phase(&self) -> DestinationPhase {
        self.only().map_or(DestinationPhase::Empty, |vm| vm.phase())
    }

    /// The epoch of the present attempt, or the last one; 0 when there was none.
    pub fn epoch(&self) -> u32 {
        self.only().map_or(0, |vm| vm.epoch())
    }

    /// As [`VmHandle::adopt`].
    ///
    /// # Errors
    /// When no complete VM is held, or its source is connected.
    pub fn adopt(&self) -> Result<(), Violation> {
        self.only().ok_or_else(|| no_only_vm("adopt"))?.adopt()
    }

    /// As [`VmHandle::inherit`].
    ///
    /// # Errors
    /// When no complete VM is held.
    pub fn inherit(&self, source: Fenced) -> Result<(), Violation> {
        self.only().ok_or_else(|| no_only_vm("inherit"))?.inherit(source)
    }

    /// As [`VmHandle::vm_ended`].
    pub fn vm_ended(&self, reason: &str) {
        if let Some(vm) = self.only() {
            vm.vm_ended(reason);
        }
    }

    fn only(&self) -> Option<VmHandle> {
        Some(VmHandle { entry: self.destination.only()? })
    }
}

impl VmHandle {
    /// Where the protocol stands.
    pub fn phase(&self) -> DestinationPhase {
        lock(&self.entry.state).machine.phase()
    }

    /// The epoch of the present attempt, or the last one.
    pub fn epoch(&self) -> u32 {
        lock(&self.entry.state).machine.epoch()
    }

    /// A person states that the source is dead: the VM that is held becomes ours and starts.
    ///
    /// # Errors
    /// When no complete VM is held, or its source is connected.
    pub fn adopt(&self) -> Result<(), Violation> {
        let mut state = lock(&self.entry.state);
        let action = state.machine.adopt()?;
        let session = state.session.clone();
        drop(state);
        self.entry.take(session, &action);
        Ok(())
    }

    /// The source is dead for certain: the VM that is held becomes ours and starts, if all of it is here.
    ///
    /// # Errors
    /// When no complete VM is held.
    pub fn inherit(&self, source: Fenced) -> Result<(), Violation> {
        let mut state = lock(&self.entry.state);
        if !state.machine.is_complete() {
            let (epoch, phase) = (state.machine.epoch(), state.machine.phase());
            return Err(Violation::new("inherit", epoch, phase, "pages of this VM are only at its source"));
        }
        let action = state.machine.inherit(source)?;
        let session = state.session.clone();
        drop(state);
        self.entry.take(session, &action);
        Ok(())
    }

    /// The guest of the VM that was received here has ended by itself, for this reason. If pages of it are missing, its source is
    /// told, frees them, and ends with [`Outcome::Ended`](crate::report::Outcome::Ended), instead of serving them for ever; if
    /// the link is lost it is told when it comes back. The VMM keeps the receiver until [`Receiver::run`] returns, or for
    /// as long as it means to wait for that. Else nothing happens. Does not wait.
    pub fn vm_ended(&self, reason: &str) {
        self.entry.vm_ended(reason);
    }
}

fn no_only_vm(command: &'static str) -> Violation {
    Violation::new(command, 0, DestinationPhase::Empty, "the receiver does not know one VM: name the one that is meant")
}
