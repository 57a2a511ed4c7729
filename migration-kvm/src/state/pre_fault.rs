//! Fills KVM's second-level page tables before a guest runs.

use std::io;

use kvm_ioctls::VcpuFd;

use super::sys;

/// Makes KVM map `len` bytes of guest memory at `gpa` for the guest, as if this vCPU had read all
/// of it. A guest that resumes with populated RAM then does not exit for each page that it touches.
/// This also fills the page tables of this process. No state needs to be loaded, but the vCPU must
/// not run.
///
/// # Errors
/// Fails with `Unsupported` before Linux 6.11, or if KVM does not use two-dimensional paging. Fails
/// with `EFAULT` or `ENOENT` for addresses that are no RAM of the VM, and with other errors of KVM.
/// Pages that were mapped before the error stay mapped.
pub fn pre_fault(vcpu: &VcpuFd, gpa: u64, len: u64) -> io::Result<()> {
    let mut rest = sys::PreFault { gpa, size: len, ..sys::PreFault::default() };
    while rest.size > 0 {
        match sys::pre_fault(vcpu, &mut rest) {
            Ok(()) => {}
            // `rest` now has only the part that is not mapped yet
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::EINVAL)) => {
                return Err(io::Error::new(io::ErrorKind::Unsupported, "KVM_PRE_FAULT_MEMORY is not supported here"));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
