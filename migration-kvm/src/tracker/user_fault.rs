//! A userfaultfd that a write-protecting tracker and a pager share.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use thiserror::Error;
use userfaultfd::{FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use super::uffd_api;

/// The feature bits of userfaultfd. They are defined here because the crate and installed headers
/// know only some of them.
pub mod features {
    /// Write-protection faults.
    pub const PAGEFAULT_FLAG_WP: u64 = 1 << 0;
    /// Missing faults on hugetlb memory.
    pub const MISSING_HUGETLBFS: u64 = 1 << 4;
    /// Missing faults on shared memory.
    pub const MISSING_SHMEM: u64 = 1 << 5;
    /// Fault messages name the faulting thread.
    pub const THREAD_ID: u64 = 1 << 8;
    /// Minor faults (the page is in the file, but not mapped) on hugetlb memory.
    pub const MINOR_HUGETLBFS: u64 = 1 << 9;
    /// Minor faults on shared memory.
    pub const MINOR_SHMEM: u64 = 1 << 10;
    /// Fault messages give the exact address, not only the page.
    pub const EXACT_ADDRESS: u64 = 1 << 11;
    /// Write-protection of hugetlb and shared memory.
    pub const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
    /// Write-protection of unpopulated anonymous pages.
    pub const WP_UNPOPULATED: u64 = 1 << 13;
    /// `UFFDIO_POISON`.
    pub const POISON: u64 = 1 << 14;
    /// The kernel lifts write-protection at the first write by itself, and remembers that there was
    /// a write.
    pub const WP_ASYNC: u64 = 1 << 15;
    /// `UFFDIO_MOVE`.
    pub const MOVE: u64 = 1 << 16;

    /// The features that [`WriteProtect`](crate::tracker::WriteProtect) needs.
    pub const WRITE_TRACKING: u64 = PAGEFAULT_FLAG_WP | WP_HUGETLBFS_SHMEM | WP_UNPOPULATED | WP_ASYNC;
    /// All features that the migration crates use if the kernel offers them. No `EVENT_*` feature
    /// is among them: with these, a thread that discards or unmaps memory waits until the event is
    /// read.
    pub const USEFUL: u64 = WRITE_TRACKING
        | MISSING_HUGETLBFS
        | MISSING_SHMEM
        | THREAD_ID
        | MINOR_HUGETLBFS
        | MINOR_SHMEM
        | EXACT_ADDRESS
        | POISON
        | MOVE;
}

/// The kinds of faults for which a range of memory is registered. Combine them with `|`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Modes(u8);

impl Modes {
    /// Faults on pages that do not exist.
    pub const MISSING: Self = Self(1);
    /// Writes to write-protected pages.
    pub const WRITE_PROTECT: Self = Self(2);
    /// Faults on pages that exist in a shared file but are not mapped.
    pub const MINOR: Self = Self(4);

    /// Returns whether all modes of `other` are included.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

impl std::ops::BitOr for Modes {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The error of a userfaultfd request. Its text does not repeat its cause.
#[derive(Debug, Error)]
#[error("userfaultfd: {what}{advice}")]
pub struct UserFaultError {
    /// The action that failed.
    pub what: &'static str,
    /// The cause.
    #[source]
    pub cause: Box<dyn std::error::Error + Send + Sync>,
    /// Advice for the user, or an empty text.
    advice: &'static str,
}

/// The advice for missing permissions.
const PERMISSION: &str = " (this needs read and write access to /dev/userfaultfd, or without that device \
                          CAP_SYS_PTRACE or the sysctl vm.unprivileged_userfaultfd=1)";

fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(what: &'static str) -> impl Fn(E) -> UserFaultError {
    move |error| UserFaultError { what, cause: error.into(), advice: "" }
}

/// Returns the cause with its error number, which the crate's `Display` leaves out.
fn cause(error: userfaultfd::Error) -> Box<dyn std::error::Error + Send + Sync> {
    match error {
        userfaultfd::Error::SystemError(errno) => errno.into(),
        other => other.into(),
    }
}

/// A userfaultfd, with a record of the registered ranges.
///
/// A range of memory can be registered with one userfaultfd only, and registering it again replaces
/// its modes. So the tracker and the pager of a VM share this object, which combines their modes.
/// Closing it (dropping the last `Arc`) unregisters everything, and pages that are still missing
/// then read as zeros.
pub struct UserFault {
    uffd: Uffd,
    features: u64,
    ranges: Mutex<Vec<Registered>>,
}

struct Registered {
    address: u64,
    len: u64,
    modes: Modes,
}

impl UserFault {
    /// Creates a non-blocking userfaultfd with all of [`features::USEFUL`] that the kernel offers.
    ///
    /// # Errors
    /// Fails if the kernel has no userfaultfd, or without permission (`/dev/userfaultfd`,
    /// CAP_SYS_PTRACE or `vm.unprivileged_userfaultfd`).
    pub fn new() -> Result<Self, UserFaultError> {
        Self::with_features(features::USEFUL)
    }

    /// Creates a userfaultfd like [`new`](Self::new), with those of the `wanted` bits of
    /// [`features`] that the kernel offers.
    ///
    /// # Errors
    /// Fails like [`new`](Self::new).
    pub fn with_features(wanted: u64) -> Result<Self, UserFaultError> {
        let refused = |e: io::Error| {
            let advice = if e.kind() == io::ErrorKind::PermissionDenied { PERMISSION } else { "" };
            UserFaultError { advice, ..failed("ask for features")(e) }
        };
        let features = Self::offered().map_err(refused)? & wanted;
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            // KVM's faults count as faults in the kernel
            .user_mode_only(false)
            .require_features(FeatureFlags::from_bits_retain(features))
            .create()
            .map_err(|e| failed("create")(cause(e)))?;
        Ok(Self { uffd, features, ranges: Mutex::default() })
    }

    /// Returns the bits of [`features`] that the kernel offers.
    ///
    /// # Errors
    /// Fails if no userfaultfd can be created.
    pub fn offered() -> io::Result<u64> {
        uffd_api::offered()
    }

    /// Returns the bits of [`features`] that this userfaultfd has.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Returns the descriptor. Use it for any request except registering.
    pub fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Registers the `len` bytes at host address `address` for `modes`, in addition to earlier
    /// modes. The range must be new or exactly the same as a registered one.
    ///
    /// # Errors
    /// Fails if one of the modes is registered already (two users would interfere), if the range
    /// overlaps another one, or if the kernel refuses.
    pub fn register(&self, address: u64, len: u64, modes: Modes) -> Result<(), UserFaultError> {
        let mut ranges = self.lock();
        let end = address.saturating_add(len);
        let overlapping = |r: &Registered| r.address < end && address < r.address.saturating_add(r.len);
        let index = ranges.iter().position(overlapping);
        let mut all = modes;
        if let Some(old) = index.map(|i| &ranges[i]) {
            if (old.address, old.len) != (address, len) {
                return Err(failed("register")("the range overlaps another one"));
            }
            if old.modes.intersects(modes) {
                return Err(failed("register")("the range is registered for this already"));
            }
            all = all | old.modes;
        }
        let mode = RegisterMode::from_bits_retain(all.0.into());
        let start = std::ptr::without_provenance_mut(address as usize);
        self.uffd.register_with_mode(start, len as usize, mode).map_err(|e| failed("register")(cause(e)))?;
        match index {
            Some(i) => ranges[i].modes = all,
            None => ranges.push(Registered { address, len, modes }),
        }
        Ok(())
    }

    /// Ends `modes` for a range that was [registered](Self::register). A range without any mode
    /// left is unregistered.
    ///
    /// Write-protection and faults differ if the other one stays:
    /// - If write-protection ends and missing or minor faults stay, the kernel keeps the
    ///   registration for write-protection, and only the protection is lifted. Registering the
    ///   range again would open a gap in which missing pages read as zeros.
    /// - If only write-protection stays, the range is unregistered and registered again, because
    ///   nobody would answer its faults any more. All of it is unprotected then, which a tracker
    ///   sees as written.
    ///
    /// # Errors
    /// Fails if the range is not registered for `modes`, or if the kernel refuses.
    pub fn unregister(&self, address: u64, len: u64, modes: Modes) -> Result<(), UserFaultError> {
        let mut ranges = self.lock();
        let known = |r: &Registered| (r.address, r.len) == (address, len) && r.modes.contains(modes);
        let Some(index) = ranges.iter().position(known) else {
            return Err(failed("unregister")("the range is not registered for this"));
        };
        let left = Modes(ranges[index].modes.0 & !modes.0);
        let start = std::ptr::without_provenance_mut(address as usize);
        if left == Modes::default() {
            self.uffd.unregister(start, len as usize).map_err(|e| failed("unregister")(cause(e)))?;
            ranges.swap_remove(index);
            return Ok(());
        }
        if modes.contains(Modes::WRITE_PROTECT) {
            let lifted = self.uffd.remove_write_protection(start, len as usize, true);
            lifted.map_err(|e| failed("lift write-protection")(cause(e)))?;
        }
        if !left.intersects(Modes::MISSING | Modes::MINOR) {
            // registering again with fewer modes has no effect, so unregister first
            self.uffd.unregister(start, len as usize).map_err(|e| failed("unregister")(cause(e)))?;
            let mode = RegisterMode::from_bits_retain(left.0.into());
            if let Err(error) = self.uffd.register_with_mode(start, len as usize, mode) {
                ranges.swap_remove(index);
                return Err(failed("register again")(cause(error)));
            }
        }
        ranges[index].modes = left;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Registered>> {
        // no code that can panic leaves the record half changed
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for UserFault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use migration_core::{GuestRam, RamLayout, RamRegion};

    use super::*;
    use crate::ram::{Backing, MappedRam};

    #[test]
    fn a_refusal_is_told_once_with_what_to_do_about_it() {
        let refused = UserFaultError { advice: PERMISSION, ..failed("create")(io::Error::other("not permitted")) };
        let text = migration_core::text::describe(&refused);
        assert!(text.starts_with("userfaultfd: create (this needs") && text.ends_with("): not permitted"), "{text}");
        assert!(!refused.to_string().contains("not permitted"), "{refused}");
    }

    #[test]
    fn modes_add_up_and_overlaps_are_refused() {
        let Ok(fault) = UserFault::new() else { return eprintln!("ignored: no userfaultfd") };
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 0x10_0000 }]).unwrap();
        let ram = MappedRam::new(layout, Backing::Anonymous).unwrap();
        let (at, len) = (ram.host_address(0).as_ptr() as u64, 0x10_0000);
        fault.register(at, len, Modes::WRITE_PROTECT).unwrap();
        assert!(fault.register(at, len, Modes::WRITE_PROTECT).is_err());
        assert!(fault.register(at, len / 2, Modes::MISSING).is_err());
        fault.register(at, len, Modes::MISSING).unwrap();
        assert!(fault.unregister(at, len, Modes::MINOR).is_err());
        fault.unregister(at, len, Modes::WRITE_PROTECT).unwrap();
        fault.unregister(at, len, Modes::MISSING).unwrap();
        assert!(fault.unregister(at, len, Modes::MISSING).is_err());
        // ranges that touch do not overlap, and a page in common is an overlap
        let [first, second, third] = [0, 0x4_0000, 0x8_0000].map(|offset| at + offset);
        for start in [second, third, first] {
            fault.register(start, 0x4_0000, Modes::WRITE_PROTECT).unwrap();
        }
        let overlap = |start, len| fault.register(start, len, Modes::MISSING).unwrap_err().cause.to_string();
        assert!(overlap(at + 0xb_f000, 0x2000).contains("overlaps"));
        assert!(overlap(third, 0x4_1000).contains("overlaps"));
        for start in [second, third, first] {
            fault.unregister(start, 0x4_0000, Modes::WRITE_PROTECT).unwrap();
        }
        ram.write(0, b"not missing any more").unwrap();
    }
}
