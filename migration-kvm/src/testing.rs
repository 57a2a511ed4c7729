//! Helpers for the unit tests of this crate.

use kvm_ioctls::Kvm;

/// Opens KVM. Returns `None` on a host without it, where the test has nothing to do.
///
/// # Panics
/// Panics without KVM if `MIGRATION_REQUIRE_KVM` is 1.
pub(crate) fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            let required = std::env::var_os("MIGRATION_REQUIRE_KVM").is_some_and(|value| value == "1");
            assert!(!required, "/dev/kvm: {error}");
            eprintln!("skipped, without /dev/kvm: {error}");
            None
        }
    }
}
