//! Borrows the dirty tracker of a VMM for a migration, and leaves the tracker as it was found.

use std::sync::Arc;

use crate::{
    PageRange, PageSet,
    tracker::{DirtyTracker, Rearm, TrackerError},
};

/// What the engine needs to know of a VM's tracker to leave it as it was found.
pub(super) struct Tracking {
    pub(super) active: bool,
    /// Whether the VMM had started the tracker. If so, the VMM gets its dirty bits back.
    before: bool,
    /// All pages that were reported, for a tracker that the VMM had started.
    harvested: PageSet,
}

impl Tracking {
    pub(super) fn new(pages: u64) -> Self {
        Self { active: false, before: false, harvested: PageSet::empty(pages) }
    }

    /// Starts the tracker, which the VMM may have started already.
    ///
    /// Pages that such a tracker has to report are harvested first, so that the VMM can have them
    /// back.
    pub(super) fn start(&mut self, tracker: &mut dyn DirtyTracker) -> Result<(), TrackerError> {
        let first = !self.active;
        if first {
            self.before = tracker.is_active();
        }
        tracker.start()?;
        self.active = true;
        if first && self.before {
            self.harvest(tracker)?;
        }
        Ok(())
    }

    /// Returns all pages that the tracker has reported since the VMM's last harvest, if the VMM had
    /// started it.
    pub(super) fn written(&mut self, tracker: &mut dyn DirtyTracker) -> Result<PageSet, TrackerError> {
        self.harvest(tracker)?;
        Ok(self.harvested.clone())
    }

    /// Returns the pages that were written since the last harvest.
    pub(super) fn harvest(&mut self, tracker: &mut dyn DirtyTracker) -> Result<PageSet, TrackerError> {
        let mut pages = PageSet::empty(self.harvested.capacity());
        let harvested = tracker.harvest(&mut pages);
        if self.before {
            // The pages that were reported before a failure are not in the tracker any more.
            self.harvested.union_with(&pages);
            if let Some(rearm) = tracker.rearm() {
                rearm.before_read(PageRange::new(0, pages.capacity()), &pages)?;
            }
        }
        harvested.map(|()| pages)
    }

    /// Returns the means to re-arm pages just before they are read, or `None` if the tracker is not
    /// re-armed like that.
    ///
    /// A tracker that the VMM had started is re-armed at each harvest instead: a page that is
    /// written between a harvest and its turn in the round would be re-armed without having been
    /// reported, and the VMM would lose it.
    pub(super) fn rearm(&self, tracker: &dyn DirtyTracker) -> Option<Arc<dyn Rearm>> {
        if self.before { None } else { tracker.rearm() }
    }

    /// Records that all of RAM has changed.
    pub(super) fn all_dirty(&mut self) {
        self.harvested = PageSet::full(self.harvested.capacity());
    }

    /// Leaves the tracker as it was found. A tracker that the VMM had started reports again all
    /// pages that were harvested from it.
    pub(super) fn roll_back(&mut self, tracker: &mut dyn DirtyTracker) -> Result<(), TrackerError> {
        if !std::mem::take(&mut self.active) {
            return Ok(());
        }
        if !self.before {
            return tracker.stop();
        }
        tracker.mark_dirty(&self.harvested);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        RamLayout, RamRegion,
        tracker::{BitmapTracker, DirtyBitmap},
    };

    fn pages(pages: &[u64]) -> PageSet {
        let mut set = PageSet::empty(16);
        pages.iter().for_each(|&page| _ = set.insert(page));
        set
    }

    fn tracker() -> (Arc<DirtyBitmap>, BitmapTracker) {
        let bitmap = DirtyBitmap::new(RamLayout::new(vec![RamRegion { gpa: 0, len: 16 << 12 }]).unwrap());
        (bitmap.clone(), BitmapTracker::new(bitmap))
    }

    #[test]
    fn a_tracker_of_the_vmm_gets_all_of_its_bits_back() {
        let (bitmap, mut tracker) = tracker();
        tracker.start().unwrap();
        bitmap.mark_page(1);
        let mut tracking = Tracking::new(16);
        tracking.start(&mut tracker).unwrap();
        bitmap.mark_page(2);
        // Starting the tracker once more loses nothing.
        tracking.start(&mut tracker).unwrap();
        assert_eq!(tracking.harvest(&mut tracker).unwrap(), pages(&[2]));
        bitmap.mark_page(3);
        assert_eq!(tracking.written(&mut tracker).unwrap(), pages(&[1, 2, 3]));
        bitmap.mark_page(4);
        tracking.roll_back(&mut tracker).unwrap();
        tracking.roll_back(&mut tracker).unwrap();
        assert!(tracker.is_active());
        let mut found = PageSet::empty(16);
        tracker.harvest(&mut found).unwrap();
        assert_eq!(found, pages(&[1, 2, 3, 4]));

        // All of RAM has changed.
        tracking.start(&mut tracker).unwrap();
        tracking.all_dirty();
        tracking.roll_back(&mut tracker).unwrap();
        tracker.harvest(&mut found).unwrap();
        assert_eq!(found, PageSet::full(16));
    }

    #[test]
    fn a_tracker_that_was_idle_is_idle_again() {
        let (bitmap, mut tracker) = tracker();
        bitmap.mark_page(1);
        let mut tracking = Tracking::new(16);
        tracking.start(&mut tracker).unwrap();
        bitmap.mark_page(2);
        assert_eq!(tracking.harvest(&mut tracker).unwrap(), pages(&[2]));
        tracking.roll_back(&mut tracker).unwrap();
        assert!(!tracker.is_active());
        let mut found = PageSet::empty(16);
        tracker.harvest(&mut found).unwrap();
        assert!(found.is_empty());
    }
}
