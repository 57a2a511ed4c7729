//! The mapping of one vCPU's dirty ring.

use std::{
    io,
    os::fd::AsRawFd,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, Ordering},
};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::{VcpuFd, VmFd};
use migration_core::PAGE_SIZE;
use vmm_sys_util::{ioctl::ioctl, ioctl_io_nr};

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, kvm_bindings::KVMIO, 0xc7);

// an entry's state: 0 free, 1 published by KVM, 2 (with or without 1) collected by us
const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// One vCPU's ring of dirty pages, mapped.
pub(super) struct RingMap {
    ring: NonNull<kvm_dirty_gfn>,
    entries: u32,
    /// Position of the next entry to collect; KVM publishes in order.
    next: u32,
}

// SAFETY: the mapping belongs to this object alone; KVM is the only other party, and its accesses are ordered by the
// atomic accesses to each entry's flags.
unsafe impl Send for RingMap {}

impl RingMap {
    /// Maps the ring of `vcpu`, of `entries` entries (a power of two, as enabled on its VM).
    pub(super) fn new(vcpu: &VcpuFd, entries: u32) -> io::Result<Self> {
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as i64;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), bytes(entries), prot, libc::MAP_SHARED, vcpu.as_raw_fd(), offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ring = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { ring, entries, next: 0 })
    }

    /// Collects the next entry: the number of the slot, and of the page in it. `None` when there is none.
    pub(super) fn take(&mut self) -> Option<(u32, u64)> {
        // SAFETY: `next & (entries - 1)` is below `entries`, so the entry lies in the mapping.
        let entry = unsafe { self.ring.as_ptr().add((self.next & (self.entries - 1)) as usize) };
        // SAFETY: `flags` is an aligned u32 inside the mapping, which lives as long as `self`; KVM accesses it
        // atomically too.
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
        // Acquire: slot and offset were written before the flag
        if flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
            return None;
        }
        // SAFETY: in the mapping; KVM does not write a published entry until it is reset.
        let taken =
            unsafe { ((&raw const (*entry).slot).read_volatile(), (&raw const (*entry).offset).read_volatile()) };
        // Release: KVM may reuse the entry once it sees the flag, so the reads above come before it
        flags.store(DIRTY | RESET, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        Some(taken)
    }
}

impl Drop for RingMap {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, unmapped only here.
        unsafe { libc::munmap(self.ring.as_ptr().cast(), bytes(self.entries)) };
    }
}

fn bytes(entries: u32) -> usize {
    entries as usize * size_of::<kvm_dirty_gfn>()
}

/// Write-protects the pages of all collected entries of all rings and frees the entries.
pub(super) fn reset(vm: &VmFd) -> io::Result<u32> {
    // SAFETY: the ioctl takes no argument and touches only KVM's own state.
    let freed = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
    u32::try_from(freed).map_err(|_| io::Error::last_os_error())
}
