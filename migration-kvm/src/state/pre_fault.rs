//! Filling KVM's second-level page tables before a guest runs.

use std::io;

use kvm_ioctls::VcpuFd;

use super::sys;

/// Has KVM map `len` bytes of guest memory at `gpa` for the guest, as if this vCPU had read all of it: a guest that arrives in
/// RAM that is populated already then does not leave guest mode for each page that it touches. This process's own page tables
/// are filled with it. Needs no state to be loaded; the vCPU must not run.
///
/// # Errors
/// `Unsupported` before Linux 6.11, or where KVM has no two-dimensional paging of its own; else what KVM says, `EFAULT` or `ENOENT`
/// for addresses that are no RAM of the VM. What was mapped stays so.
pub fn pre_fault(vcpu: &VcpuFd, gpa: u64, len: u64) -> io::Result<()> {
    let mut rest = sys::PreFault { gpa, size: len, ..sys::PreFault::default() };
    while rest.size > 0 {
        match sys::pre_fault(vcpu, &mut rest) {
            Ok(()) => {}
            // it notes how far it has come
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::EINVAL)) => {
                return Err(io::Error::new(io::ErrorKind::Unsupported, "KVM_PRE_FAULT_MEMORY is not supported here"));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
