//! The glue for fail-safe post-copy, in addition to the glue of every migration.

use bytes::Bytes;
use migration_core::{
    state::VmState,
    tracker::DirtyTracker,
    vm::{CheckpointedVm, SourceVm, VmError},
};
use migration_kvm::fence::ProcessIdentity;

use super::MachineSource;

/// Returns the identity of the process that a fence must end.
pub(super) fn identity() -> Bytes {
    // without the identity no fence can end the process, and the VM waits
    ProcessIdentity::own().map(|own| own.encode().into()).unwrap_or_default()
}

/// Takes checkpoints with the steps by which a migration moves the machine away.
impl CheckpointedVm for MachineSource {
    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut *self.tracker
    }

    fn pause(&mut self) -> Result<(), VmError> {
        SourceVm::pause(self)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        SourceVm::resume(self)
    }

    fn save_state(&mut self) -> Result<VmState, VmError> {
        SourceVm::save_state(self)
    }

    fn hold_output(&mut self) {
        self.machine.bus.hold_output();
    }

    fn output(&mut self) -> u64 {
        self.machine.bus.output()
    }

    fn release_output(&mut self, until: Option<u64>) {
        self.machine.bus.release_output(until);
    }
}
