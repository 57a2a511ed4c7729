//! A tracker that is borrowed from its VMM, and given back as it was.

use crate::{
    PageSet,
    tracker::{DirtyTracker, TrackerError},
};

/// What has to be known of a VM's tracker to give it back.
pub(super) struct Tracking {
    pub(super) active: bool,
    /// Whether the VMM tracked before we came; it then gets its dirty bits back.
    before: bool,
    /// Everything harvested, for a tracker that the VMM had started.
    harvested: PageSet,
}

impl Tracking {
    pub(super) fn new(pages: u64) -> Self {
        Self { active: false, before: false, harvested: PageSet::empty(pages) }
    }

    /// Starts the tracker, which may be started already.
    pub(super) fn start(&mut self, tracker: &mut dyn DirtyTracker) -> Result<(), TrackerError> {
        if !self.active {
            self.before = tracker.is_active();
        }
        tracker.start()?;
        self.active = true;
        Ok(())
    }

    /// Pages that were written since the last harvest.
    pub(super) fn harvest(&mut self, tracker: &mut dyn DirtyTracker) -> Result<PageSet, TrackerError> {
        let mut pages = PageSet::empty(self.harvested.capacity());
        let harvested = tracker.harvest(&mut pages);
        if self.before {
            // what it has found before it failed is not in the tracker any more
            self.harvested.union_with(&pages);
        }
        harvested.map(|()| pages)
    }

    /// Whatever was harvested: all of RAM has changed.
    pub(super) fn all_dirty(&mut self) {
        self.harvested = PageSet::full(self.harvested.capacity());
    }

    /// The tracker as it was, with what was harvested and these pages dirty if the VMM had started it.
    pub(super) fn give_back(
        &mut self,
        tracker: &mut dyn DirtyTracker,
        dirty: Option<&PageSet>,
    ) -> Result<(), TrackerError> {
        if !std::mem::take(&mut self.active) {
            return Ok(());
        }
        if !self.before {
            return tracker.stop();
        }
        if let Some(dirty) = dirty {
            self.harvested.union_with(dirty);
        }
        tracker.put_back(&self.harvested);
        Ok(())
    }
}
