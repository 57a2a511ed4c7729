//! The memory mapping of a vCPU's dirty ring.

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

// Flags of an entry. None: the entry is free. DIRTY: KVM has published it. RESET, with or without
// DIRTY: it was collected.
const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// The mapped dirty ring of one vCPU.
pub(super) struct RingMap {
    ring: NonNull<kvm_dirty_gfn>,
    entries: u32,
    /// The position of the next entry to collect. KVM publishes entries in order.
    next: u32,
}

// SAFETY: only this object uses the mapping. KVM is the only other party, and the atomic accesses
// to each entry's flags order its accesses.
unsafe impl Send for RingMap {}

impl RingMap {
    /// Maps the ring of `vcpu`. `entries` is its number of entries, a power of two, as enabled on
    /// the VM.
    pub(super) fn new(vcpu: &VcpuFd, entries: u32) -> io::Result<Self> {
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as i64;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses the address of the new mapping, so no existing mapping
        // changes.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), bytes(entries), prot, libc::MAP_SHARED, vcpu.as_raw_fd(), offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ring = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { ring, entries, next: 0 })
    }

    /// Collects the next entry. Returns the number of the slot and that of the page in the slot, or
    /// `None` if the ring is empty.
    pub(super) fn take(&mut self) -> Option<(u32, u64)> {
        // SAFETY: `next & (entries - 1)` is below `entries`, so the entry lies in the mapping.
        let entry = unsafe { self.ring.as_ptr().add((self.next & (self.entries - 1)) as usize) };
        // SAFETY: `flags` is an aligned u32 in the mapping, which lives as long as `self`. KVM
        // accesses it atomically, too.
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
        // Acquire: KVM wrote slot and offset before the flag
        if flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
            return None;
        }
        // SAFETY: both fields are in the mapping, and KVM does not write a published entry until it
        // is reset.
        let taken =
            unsafe { ((&raw const (*entry).slot).read_volatile(), (&raw const (*entry).offset).read_volatile()) };
        // Release: KVM may reuse the entry once it sees the flag, so the reads above must come
        // first
        flags.store(DIRTY | RESET, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        Some(taken)
    }
}

impl Drop for RingMap {
    fn drop(&mut self) {
        // SAFETY: `new` mapped this range, and it is unmapped only here.
        unsafe { libc::munmap(self.ring.as_ptr().cast(), bytes(self.entries)) };
    }
}

fn bytes(entries: u32) -> usize {
    entries as usize * size_of::<kvm_dirty_gfn>()
}

/// Write-protects the pages of all collected entries of all rings and frees the entries. Returns
/// the number of freed entries.
pub(super) fn reset(vm: &VmFd) -> io::Result<u32> {
    // SAFETY: the ioctl has no argument and changes only KVM's own state.
    let freed = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
    u32::try_from(freed).map_err(|_| io::Error::last_os_error())
}
