//! Finds out what this host offers. It asks or tries, and never goes by the kernel's version.

use std::fmt;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_USER_MEMORY,
    KVM_DIRTY_LOG_INITIALLY_SET, kvm_dirty_gfn,
};
use kvm_ioctls::Kvm;
use thiserror::Error;

use crate::{
    ram::pagemap::Pagemap,
    tracker::{IdlePages, TrackerKind, UserFault, features},
};

/// The dirty trackers and other facilities for guest memory that this host offers, and the reasons
/// why others are missing.
///
/// ```no_run
/// # use kvm_ioctls::Kvm;
/// # use migration_kvm::{probe::Probe, tracker::TrackerKind};
/// let probe = Probe::new(&Kvm::new()?);
/// println!("{probe}");
/// let kind = probe.choose("auto".parse()?)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Probe {
    trackers: Vec<(TrackerKind, Result<(), String>)>,
    initially_set: bool,
    ring_entries: u32,
    user_fault: Result<u64, String>,
    idle_pages: Result<(), String>,
}

/// The error for a dirty tracker that this host does not offer.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("dirty tracker {kind} is not available: {reason}")]
pub struct Unavailable {
    /// The kind of the tracker.
    pub kind: TrackerKind,
    /// The reason.
    pub reason: String,
}

impl Probe {
    /// Asks KVM for its capabilities and tries userfaultfd, PAGEMAP_SCAN and idle page tracking.
    /// Takes less than a millisecond.
    pub fn new(kvm: &Kvm) -> Self {
        let ask = |cap: u32| kvm.check_extension_raw(cap.into()).max(0) as u32;
        let offers = |value: u32, name: &str| {
            if value != 0 { Ok(()) } else { Err(format!("KVM lacks {name}")) }
        };
        let manual = ask(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        let ring = match ask(KVM_CAP_DIRTY_LOG_RING_ACQ_REL) {
            0 => ask(KVM_CAP_DIRTY_LOG_RING),
            bytes => bytes,
        };
        let user_fault = UserFault::offered().map_err(|e| format!("userfaultfd cannot be created: {e}"));
        let reason = |kind| match kind {
            TrackerKind::DirtyLog => offers(ask(KVM_CAP_USER_MEMORY), "KVM_CAP_USER_MEMORY"),
            TrackerKind::ManualProtect => offers(manual, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"),
            TrackerKind::DirtyRing => offers(ring, "KVM_CAP_DIRTY_LOG_RING"),
            TrackerKind::WriteProtect => write_protect(&user_fault),
            TrackerKind::Auto => Ok(()),
        };
        Self {
            trackers: TrackerKind::ALL.into_iter().map(|kind| (kind, reason(kind))).collect(),
            initially_set: manual & KVM_DIRTY_LOG_INITIALLY_SET != 0,
            ring_entries: ring / size_of::<kvm_dirty_gfn>() as u32,
            user_fault,
            idle_pages: IdlePages::offered().map_err(|e| e.to_string()),
        }
    }

    /// Returns every tracker in order of preference, with the reason if it is not available.
    pub fn trackers(&self) -> impl Iterator<Item = (TrackerKind, Result<(), &str>)> {
        self.trackers.iter().map(|(kind, offered)| (*kind, offered.as_ref().copied().map_err(String::as_str)))
    }

    /// Returns whether KVM can turn on the dirty log with manual protection without protecting any
    /// page.
    pub fn manual_protect_initially_set(&self) -> bool {
        self.initially_set
    }

    /// Returns the largest number of entries of a vCPU's dirty ring, or 0 without dirty rings.
    pub fn ring_entries(&self) -> u32 {
        self.ring_entries
    }

    /// Returns the bits of [`features`] that userfaultfd offers, or the reason why it is not
    /// available.
    pub fn user_fault_features(&self) -> Result<u64, &str> {
        self.user_fault.as_ref().copied().map_err(String::as_str)
    }

    /// Returns whether [`IdlePages`] is available, or the reason why not.
    pub fn idle_pages(&self) -> Result<(), &str> {
        self.idle_pages.as_ref().copied().map_err(String::as_str)
    }

    /// Returns the tracker to use if `kind` is requested. That is `kind` itself if this host offers
    /// it. For [`TrackerKind::Auto`] it is the first of [`TrackerKind::ALL`] that this host offers.
    /// The dirty ring is left out there: it works only if the VMM enabled it before the first vCPU,
    /// so it must be requested by name.
    ///
    /// # Errors
    /// Fails with the reason if `kind` is not available. For `Auto` it fails with all reasons if no
    /// tracker is.
    pub fn choose(&self, kind: TrackerKind) -> Result<TrackerKind, Unavailable> {
        if kind == TrackerKind::Auto {
            let usable = |(kind, offered): &&(TrackerKind, Result<(), String>)| {
                offered.is_ok() && *kind != TrackerKind::DirtyRing
            };
            let found = self.trackers.iter().find(usable).map(|(kind, _)| *kind);
            return found.ok_or_else(|| Unavailable { kind, reason: self.describe_trackers() });
        }
        let offered = self.trackers.iter().find(|(k, _)| *k == kind).map(|(_, offered)| offered.clone());
        let reason = match offered {
            Some(Ok(())) => return Ok(kind),
            Some(Err(reason)) => reason,
            None => "not known to this probe".into(),
        };
        Err(Unavailable { kind, reason })
    }

    fn describe_trackers(&self) -> String {
        let trackers =
            self.trackers().map(|(kind, offered)| format!("{kind}: {}", offered.err().unwrap_or("available")));
        trackers.collect::<Vec<_>>().join("; ")
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; idle pages: {}", self.describe_trackers(), self.idle_pages().err().unwrap_or("available"))
    }
}

fn write_protect(user_fault: &Result<u64, String>) -> Result<(), String> {
    write_tracking(user_fault.clone()?)
}

/// Returns whether a userfaultfd with these features and PAGEMAP_SCAN can track writes, or the reason
/// why not.
pub(crate) fn write_tracking(user_fault: u64) -> Result<(), String> {
    let missing = features::WRITE_TRACKING & !user_fault;
    if missing != 0 {
        return Err(format!("userfaultfd lacks features {missing:#x}"));
    }
    let pagemap = Pagemap::open().map_err(|e| format!("/proc/self/pagemap: {e} (is /proc mounted?)"))?;
    if pagemap.can_scan() { Ok(()) } else { Err("the kernel lacks PAGEMAP_SCAN".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(offered: [bool; 4]) -> Probe {
        let offer = |ok| if ok { Ok(()) } else { Err("it is absent".to_owned()) };
        Probe {
            trackers: TrackerKind::ALL.into_iter().zip(offered.map(offer)).collect(),
            initially_set: false,
            ring_entries: 0,
            user_fault: Err(String::new()),
            idle_pages: Err("no one looks".into()),
        }
    }

    #[test]
    fn the_best_tracker_is_chosen() {
        let auto = |offered| probe(offered).choose(TrackerKind::Auto).map_err(|e| e.to_string());
        assert_eq!(auto([true; 4]), Ok(TrackerKind::ManualProtect));
        assert_eq!(auto([false, true, true, true]), Ok(TrackerKind::DirtyLog));
        assert_eq!(auto([false, false, true, true]), Ok(TrackerKind::WriteProtect));
        let nothing = auto([false; 4]).unwrap_err();
        assert!(nothing.contains("dirty-log: it is absent; ") && !nothing.contains("idle"), "{nothing}");
        assert!(probe([true; 4]).to_string().ends_with("write-protect: available; idle pages: no one looks"));
        assert_eq!(probe([true; 4]).choose(TrackerKind::DirtyRing), Ok(TrackerKind::DirtyRing));
        let error = probe([true, true, false, true]).choose(TrackerKind::DirtyRing).unwrap_err();
        assert_eq!(error.to_string(), "dirty tracker dirty-ring is not available: it is absent");
    }

    #[test]
    fn a_probe_tells_what_kvm_says() {
        let Some(kvm) = crate::testing::kvm() else { return };
        let probe = Probe::new(&kvm);
        let ask = |cap: u32| kvm.check_extension_raw(cap.into());
        let ring = ask(KVM_CAP_DIRTY_LOG_RING_ACQ_REL).max(ask(KVM_CAP_DIRTY_LOG_RING)).max(0) as u32;
        assert_eq!(probe.ring_entries(), ring / 16);
        let manual = ask(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).max(0) as u32;
        assert_eq!(probe.manual_protect_initially_set(), manual & KVM_DIRTY_LOG_INITIALLY_SET != 0);
        let fault = UserFault::offered();
        assert_eq!(probe.user_fault_features().ok(), fault.as_ref().ok().copied());
        let idle = IdlePages::offered().map_err(|error| error.to_string());
        assert_eq!(probe.idle_pages().map_err(str::to_owned), idle);
        for (kind, offered) in probe.trackers() {
            let expected = match kind {
                TrackerKind::ManualProtect => manual != 0,
                TrackerKind::DirtyRing => ring != 0,
                TrackerKind::WriteProtect => {
                    let has = |offered: &u64| offered & features::WRITE_TRACKING == features::WRITE_TRACKING;
                    fault.as_ref().is_ok_and(has) && Pagemap::open().is_ok_and(|pagemap| pagemap.can_scan())
                }
                _ => true,
            };
            assert_eq!(offered.is_ok(), expected, "{kind}: {offered:?}");
            assert_eq!(probe.choose(kind).is_ok(), expected, "{kind}");
        }
        assert_eq!(probe.trackers().map(|(kind, _)| kind).collect::<Vec<_>>(), TrackerKind::ALL);
    }

    #[test]
    fn features_of_userfaultfd_that_are_missing_are_named() {
        let all = features::WRITE_TRACKING;
        assert_eq!(write_protect(&Err("it is forbidden".into())), Err("it is forbidden".into()));
        let error = write_protect(&Ok(all & !features::WP_ASYNC)).unwrap_err();
        assert_eq!(error, format!("userfaultfd lacks features {:#x}", features::WP_ASYNC));
        // more than is needed is no obstacle
        if Pagemap::open().is_ok_and(|pagemap| pagemap.can_scan()) {
            assert_eq!(write_protect(&Ok(!0)), Ok(()));
            assert_eq!(write_protect(&Ok(all)), Ok(()));
        }
        let unknown = Probe { trackers: Vec::new(), ..probe([true; 4]) }.choose(TrackerKind::DirtyLog).unwrap_err();
        assert_eq!(unknown.reason, "not known to this probe");
        assert_eq!(probe([true; 4]).user_fault_features(), Err(""));
    }
}
