//! Dirty trackers that use KVM and the Linux kernel.
//!
//! | tracker | sees writes of | needs | harvest |
//! |---|---|---|---|
//! | [`DirtyLog`] | vCPUs and KVM | any KVM | clears the log; protects all dirty pages again at once |
//! | [`ManualProtect`] | vCPUs and KVM | `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` | reads the log; pages are re-armed as they are sent |
//! | [`DirtyRing`] | vCPUs and KVM | `KVM_CAP_DIRTY_LOG_RING`, before the first vCPU | cost depends on the dirty pages, not on RAM |
//! | [`WriteProtect`] | all code in this process | userfaultfd WP_ASYNC, PAGEMAP_SCAN | scans page tables |
//!
//! The first three do not see writes of devices and VMM threads through the host's mapping. Combine
//! them with a [`DirtyBitmap`](migration_core::tracker::DirtyBitmap) in a
//! [`UnionTracker`](migration_core::tracker::UnionTracker). No tracker sees that memory is
//! *discarded* (a balloon's `MADV_DONTNEED`, a punched hole), and none sees writes through another
//! process's mapping of the same memory file.
//!
//! [`IdlePages`] is no dirty tracker. It reports which pages were referenced (read or written), and
//! its reports are only hints.

use std::{error::Error, fmt, str::FromStr, sync::Arc};

use kvm_ioctls::VmFd;
use migration_core::tracker::{DirtyTracker, TrackerError};

use crate::ram::UnknownName;

mod dirty_log;
mod dirty_ring;
mod idle_pages;
mod manual_protect;
#[allow(unsafe_code)]
mod ring_map;
#[allow(unsafe_code)]
mod slots;
#[allow(unsafe_code)]
pub(crate) mod uffd_api;
mod user_fault;
mod write_protect;

pub use dirty_log::DirtyLog;
pub use dirty_ring::{DirtyRing, EnabledRing, RingCollector};
pub use idle_pages::IdlePages;
pub use manual_protect::ManualProtect;
pub use slots::{GuestSlots, MAX_SLOT_BYTES, MemorySlot, SlotError, slot_pieces};
pub use user_fault::{Modes, UserFault, UserFaultError, features};
pub use write_protect::WriteProtect;

/// The kind of a dirty tracker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TrackerKind {
    /// The best tracker that the kernel offers, see [`Probe::choose`](crate::probe::Probe::choose):
    /// `auto`.
    #[default]
    Auto,
    /// [`DirtyLog`]: `dirty-log`.
    DirtyLog,
    /// [`ManualProtect`]: `manual-protect`.
    ManualProtect,
    /// [`DirtyRing`]: `dirty-ring`.
    DirtyRing,
    /// [`WriteProtect`]: `write-protect`.
    WriteProtect,
}

impl TrackerKind {
    /// Every kind except `Auto`, in order of preference.
    ///
    /// The order is by the cost for the guest. The first write to a page after a harvest costs
    /// about the same with the first three (2.3–2.8 µs measured; 3.4–4.2 µs with write-protection).
    /// Manual protection comes first because a harvest protects nothing (8 µs for 256 MiB, where
    /// the others take 1.6–2.1 ms under KVM's lock), and because a page that is written again
    /// before it is sent costs nothing. The ring comes after the log because a full ring stops its
    /// vCPU, and because it must be enabled before the first vCPU exists.
    pub const ALL: [Self; 4] = [Self::ManualProtect, Self::DirtyLog, Self::DirtyRing, Self::WriteProtect];

    /// Returns the short name, which `FromStr` parses and `Display` writes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::DirtyLog => "dirty-log",
            Self::ManualProtect => "manual-protect",
            Self::DirtyRing => "dirty-ring",
            Self::WriteProtect => "write-protect",
        }
    }
}

impl fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for TrackerKind {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        let kinds = std::iter::once(Self::Auto).chain(Self::ALL);
        kinds.into_iter().find(|k| k.name() == name).ok_or_else(|| UnknownName {
            given: name.to_owned(),
            kind: "dirty tracker",
            known: "auto, dirty-log, manual-protect, dirty-ring, write-protect",
        })
    }
}

/// The parts from which [`build`] makes a tracker.
pub struct Parts<'a> {
    /// The VM.
    pub vm: Arc<VmFd>,
    /// The memory slots of the VM.
    pub slots: Arc<GuestSlots>,
    /// The userfaultfd for [`TrackerKind::WriteProtect`], which may be shared with a pager. Created
    /// if `None`.
    pub user_fault: Option<Arc<UserFault>>,
    /// The result of [`DirtyRing::enable`], for [`TrackerKind::DirtyRing`].
    pub ring: Option<&'a EnabledRing>,
}

/// Makes a tracker of a kind that [`Probe::choose`](crate::probe::Probe::choose) returned.
///
/// For a dirty ring the VMM must also add its vCPUs and collect full rings, with
/// [`EnabledRing::collector`].
///
/// # Errors
/// Fails if the userfaultfd cannot be created or the ring is missing, and for
/// [`TrackerKind::Auto`], which is no tracker.
pub fn build(kind: TrackerKind, parts: Parts<'_>) -> Result<Box<dyn DirtyTracker>, TrackerError> {
    let Parts { vm, slots, user_fault, ring } = parts;
    let error = |what: &str| TrackerError::new(kind.name(), what);
    Ok(match kind {
        TrackerKind::Auto => return Err(error("choose a tracker with a Probe first")),
        TrackerKind::DirtyLog => Box::new(DirtyLog::new(vm, slots)),
        TrackerKind::ManualProtect => Box::new(ManualProtect::new(vm, slots)),
        TrackerKind::DirtyRing => match ring {
            Some(ring) => Box::new(DirtyRing::new(ring, slots)),
            None => return Err(error("the ring was not enabled before the first vCPU")),
        },
        TrackerKind::WriteProtect => {
            let user_fault = match user_fault {
                Some(user_fault) => user_fault,
                None => Arc::new(UserFault::new().map_err(failed(kind.name(), "create a userfaultfd"))?),
            };
            Box::new(WriteProtect::new(slots.ram().clone(), user_fault))
        }
    })
}

/// Returns a function that makes an error of the tracker `tracker`: the failed action, and the
/// cause.
fn failed<E: Into<Box<dyn Error + Send + Sync>>>(
    tracker: &'static str,
    what: &'static str,
) -> impl Fn(E) -> TrackerError {
    move |error| TrackerError::because(tracker, what, error)
}

fn inactive(tracker: &'static str) -> TrackerError {
    TrackerError::new(tracker, "the tracker was not started")
}

#[cfg(test)]
mod tests {
    use migration_core::text::describe;

    use super::*;

    #[test]
    fn the_cause_of_a_failure_can_be_found_and_is_printed_once() {
        let refused = || std::io::Error::from_raw_os_error(libc::EPERM);
        let error = failed("dirty-log", "turn logging on")(refused());
        let cause = error.source().and_then(|cause| cause.downcast_ref::<std::io::Error>());
        assert_eq!(cause.and_then(std::io::Error::raw_os_error), Some(libc::EPERM));
        assert_eq!(describe(&error), format!("dirty tracker dirty-log: turn logging on: {}", refused()));
        assert!(inactive("dirty-log").source().is_none());
    }

    #[test]
    fn names_read_back() {
        for kind in TrackerKind::ALL.into_iter().chain([TrackerKind::Auto]) {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("pml".parse::<TrackerKind>().is_err());
    }

    #[test]
    fn a_tracker_is_made_of_what_it_needs() {
        let Some(kvm) = crate::testing::kvm() else { return };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let layout = migration_core::RamLayout::new(vec![migration_core::RamRegion { gpa: 0, len: 0x2000 }]).unwrap();
        let ram = Arc::new(crate::ram::MappedRam::new(layout, crate::ram::Backing::Anonymous).unwrap());
        // no slots, so that nothing of the VM has to outlive anything
        #[allow(unsafe_code)]
        // SAFETY: there are no slots.
        let slots = Arc::new(unsafe { GuestSlots::new(ram, []) }.unwrap());
        let made = |kind| {
            let parts = Parts { vm: vm.clone(), slots: slots.clone(), user_fault: None, ring: None };
            build(kind, parts).map(|tracker| tracker.name()).map_err(|error| error.to_string())
        };
        for kind in [TrackerKind::DirtyLog, TrackerKind::ManualProtect] {
            assert_eq!(made(kind), Ok(kind.name()));
        }
        assert!(made(TrackerKind::Auto).unwrap_err().contains("choose a tracker"));
        assert!(made(TrackerKind::DirtyRing).unwrap_err().contains("not enabled before"));
        if UserFault::new().is_ok() {
            assert_eq!(made(TrackerKind::WriteProtect), Ok("write-protect"));
        }
    }
}
