//! The state of a VM.

use migration_core::{snapshot::SavedVm, state::VmState};

/// The first byte says what the rest is: a VM's state, one of migration-kvm's encodings, or what a
/// snapshot holds.
pub fn check(input: &[u8]) {
    match input {
        [0, rest @ ..] => {
            if let Ok(state) = VmState::decode(rest) {
                assert_eq!(state.encode(), rest, "a state encodes to other bytes than it was decoded from");
            }
        }
        #[cfg(feature = "kvm")]
        [kind @ 1..=3, rest @ ..] => kvm(*kind, rest),
        [4, rest @ ..] => {
            if let Ok(saved) = SavedVm::decode(rest) {
                assert_eq!(SavedVm::decode(&saved.encode()).ok().as_ref(), Some(&saved));
            }
        }
        _ => {}
    }
}

/// Parts that are unknown and optional are dropped, so the bytes may differ; what was understood
/// must not.
#[cfg(feature = "kvm")]
fn kvm(kind: u8, bytes: &[u8]) {
    use migration_kvm::state::{HostNeeds, KvmState, VcpuState};
    match kind {
        1 => {
            if let Ok(vcpu) = VcpuState::decode(bytes) {
                assert_eq!(VcpuState::decode(&vcpu.encode()).ok().as_ref(), Some(&vcpu));
            }
        }
        2 => {
            if let Ok(vm) = KvmState::decode(bytes) {
                assert_eq!(KvmState::decode(&vm.encode()).ok().as_ref(), Some(&vm));
            }
        }
        _ => {
            if let Ok(needs) = HostNeeds::decode(bytes) {
                assert_eq!(HostNeeds::decode(&needs.encode()).ok().as_ref(), Some(&needs));
            }
        }
    }
}
