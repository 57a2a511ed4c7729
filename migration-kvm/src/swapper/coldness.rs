//! Finds out which pages a guest has referenced.

use std::{fmt, str::FromStr, sync::Arc};

use migration_core::{GuestRam, PageSet, tracker::DirtyTracker, vm::VmError};
use thiserror::Error;

use crate::{
    probe::write_tracking,
    ram::UnknownName,
    tracker::{IdlePages, UserFault, WriteProtect},
};

/// Reports which pages were referenced, so that the others count as cold.
///
/// Its reports are hints. The swapper takes a cold page out of the guest's reach for one interval
/// before it evicts it, and a page that is touched meanwhile stays. So a source that misses references
/// costs faults, and never content.
pub trait ReferenceSource: Send {
    /// Returns a short name, such as `idle-pages`.
    fn name(&self) -> &'static str;

    /// Adds to `into` the pages that were referenced since the last call. The first call, and the
    /// first one after [`suspend`](Self::suspend), begins an interval, and may add nothing.
    ///
    /// # Errors
    /// The references are not known.
    fn referenced(&mut self, into: &mut PageSet) -> Result<(), VmError>;

    /// Ends the interval and everything that the source has installed, because a migration is about to
    /// begin. The next call of [`referenced`](Self::referenced) begins a new one.
    fn suspend(&mut self);
}

/// The kinds of sources that this crate has.
///
/// | kind | sees | needs | costs |
/// |---|---|---|---|
/// | [`IdlePages`](Self::IdlePages) | reads and writes | CONFIG_IDLE_PAGE_TRACKING, root | reads page tables of this process in each interval |
/// | [`Faults`](Self::Faults) | reads and writes | nothing beyond eviction itself | a fault for each page that is wrongly taken for cold |
/// | [`Writes`](Self::Writes) | writes | userfaultfd WP_ASYNC, PAGEMAP_SCAN | the first write of each interval to each page |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ReferenceKind {
    /// The first of the others that this host offers, in the order of the table: `auto`.
    #[default]
    Auto,
    /// The kernel's idle page tracking: `idle-pages`.
    IdlePages,
    /// Nobody looks. Pages are taken out of the guest's reach in turn, and those that it touches within
    /// an interval stay: `faults`.
    Faults,
    /// Write-protection and PAGEMAP_SCAN. A page that is only read looks cold until it is taken out of
    /// reach: `writes`.
    Writes,
}

/// A source that this host does not offer.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("source of references {kind} is not available: {reason}")]
pub struct NoSource {
    /// The kind of the source.
    pub kind: ReferenceKind,
    /// The reason.
    pub reason: String,
}

impl ReferenceKind {
    /// Returns every kind but [`Auto`](Self::Auto), in the order of preference.
    pub const ALL: [Self; 3] = [Self::IdlePages, Self::Faults, Self::Writes];

    /// Returns the short name, which `FromStr` parses and `Display` writes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::IdlePages => "idle-pages",
            Self::Faults => "faults",
            Self::Writes => "writes",
        }
    }

    /// Finds out whether this host offers the kind. `fault` is the userfaultfd of the VM.
    ///
    /// # Errors
    /// [`NoSource`] with the reason.
    pub fn offered(self, fault: &UserFault) -> Result<(), NoSource> {
        let reason = match self {
            Self::Auto | Self::Faults => return Ok(()),
            Self::IdlePages => IdlePages::offered().err().map(|e| e.to_string()),
            Self::Writes => write_tracking(fault.features()).err(),
        };
        reason.map_or(Ok(()), |reason| Err(NoSource { kind: self, reason }))
    }

    /// Makes a source of this kind for all of `ram`.
    ///
    /// # Errors
    /// [`NoSource`], if this host does not offer it.
    pub fn open(self, ram: Arc<dyn GuestRam>, fault: Arc<UserFault>) -> Result<Box<dyn ReferenceSource>, NoSource> {
        self.offered(&fault)?;
        Ok(match self {
            Self::Auto => {
                // the second of them needs nothing
                let kind = Self::ALL.into_iter().find(|kind| kind.offered(&fault).is_ok()).unwrap_or(Self::Faults);
                return kind.open(ram, fault);
            }
            Self::IdlePages => Box::new(IdleMarks { ram, marked: None }),
            Self::Faults => Box::new(NobodyLooks),
            Self::Writes => Box::new(Writes(WriteProtect::new(ram, fault))),
        })
    }
}

impl fmt::Display for ReferenceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for ReferenceKind {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        let kinds = std::iter::once(Self::Auto).chain(Self::ALL);
        kinds.into_iter().find(|kind| kind.name() == name).ok_or_else(|| UnknownName {
            given: name.to_owned(),
            kind: "source of references",
            known: "auto, idle-pages, faults, writes",
        })
    }
}

/// The kernel's idle page tracking.
struct IdleMarks {
    ram: Arc<dyn GuestRam>,
    /// The marks of the present interval.
    marked: Option<IdlePages>,
}

impl ReferenceSource for IdleMarks {
    fn name(&self) -> &'static str {
        ReferenceKind::IdlePages.name()
    }

    fn referenced(&mut self, into: &mut PageSet) -> Result<(), VmError> {
        if let Some(marked) = self.marked.take() {
            marked.referenced(into).map_err(|e| VmError::because("look for idle pages", e))?;
        }
        let marked = IdlePages::watch(self.ram.clone()).map_err(|e| VmError::because("mark pages as idle", e))?;
        self.marked = Some(marked);
        Ok(())
    }

    fn suspend(&mut self) {
        self.marked = None;
    }
}

/// No source: what is taken out of reach shows what is cold.
struct NobodyLooks;

impl ReferenceSource for NobodyLooks {
    fn name(&self) -> &'static str {
        ReferenceKind::Faults.name()
    }

    fn referenced(&mut self, _: &mut PageSet) -> Result<(), VmError> {
        Ok(())
    }

    fn suspend(&mut self) {}
}

/// The tracker of writes that needs no KVM.
struct Writes(WriteProtect);

impl ReferenceSource for Writes {
    fn name(&self) -> &'static str {
        ReferenceKind::Writes.name()
    }

    fn referenced(&mut self, into: &mut PageSet) -> Result<(), VmError> {
        let tracked = if self.0.is_active() { self.0.harvest(into) } else { self.0.start() };
        tracked.map_err(|e| VmError::because("look for pages that were written", e))
    }

    fn suspend(&mut self) {
        // a tracker that does not stop says so when the next one starts
        let _ = self.0.stop();
    }
}

#[cfg(test)]
mod tests {
    use migration_core::{PageRange, RamLayout, RamRegion};

    use super::*;
    use crate::ram::{Backing, MappedRam};

    #[test]
    fn names_read_back() {
        for kind in ReferenceKind::ALL.into_iter().chain([ReferenceKind::Auto]) {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("damn".parse::<ReferenceKind>().unwrap_err().to_string().contains("idle-pages"));
    }

    #[test]
    fn writes_are_seen_from_the_second_call_on_and_not_after_the_end() {
        let Ok(fault) = UserFault::new().map(Arc::new) else { return eprintln!("ignored: no userfaultfd") };
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 64 << 12 }]).unwrap();
        let ram = Arc::new(MappedRam::new(layout, Backing::Anonymous).unwrap());
        ram.prefault(ram.layout().all()).unwrap();
        let mut source = match ReferenceKind::Writes.open(ram.clone(), fault.clone()) {
            Ok(source) => source,
            Err(why) => return eprintln!("ignored: {why}"),
        };
        let look = |source: &mut Box<dyn ReferenceSource>| {
            let mut pages = PageSet::empty(64);
            source.referenced(&mut pages).unwrap();
            pages.ranges().collect::<Vec<_>>()
        };
        ram.write(0, &[1]).unwrap();
        assert_eq!(look(&mut source), []);
        ram.write(0x5000, &[1]).unwrap();
        assert_eq!(look(&mut source), [PageRange::new(5, 1)]);
        assert_eq!(look(&mut source), []);
        // a migration's tracker can start when the source is suspended, and only then
        let mut tracker = WriteProtect::new(ram.clone(), fault);
        assert!(tracker.start().is_err());
        source.suspend();
        tracker.start().unwrap();
        tracker.stop().unwrap();
        assert_eq!(look(&mut source), []);
    }

    #[test]
    fn some_source_is_always_there() {
        let Ok(fault) = UserFault::new().map(Arc::new) else { return eprintln!("ignored: no userfaultfd") };
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: 64 << 12 }]).unwrap();
        let ram = Arc::new(MappedRam::new(layout, Backing::Anonymous).unwrap());
        let mut source = ReferenceKind::Auto.open(ram, fault.clone()).unwrap();
        let offered = ReferenceKind::IdlePages.offered(&fault);
        assert_eq!(source.name(), if offered.is_ok() { "idle-pages" } else { "faults" });
        source.referenced(&mut PageSet::empty(64)).unwrap();
        source.suspend();
        if let Err(why) = offered {
            assert!(why.to_string().starts_with("source of references idle-pages is not available: "), "{why}");
        }
    }
}
