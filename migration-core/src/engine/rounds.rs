//! Rounds: which pages of a running guest are to go, how they are read safely, and which have
//! arrived.
//!
//! One driver for all that sends pages of a guest that goes on: a migration to its lanes, a
//! snapshot and a forward checkpoint to a store, a reverse checkpoint to the source. The order is
//! always the same: collect what was written, leave out what is free, re-arm the tracker for a
//! stripe, read it, send it, and record what has arrived.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use super::{
    lane::{stripe_pages, stripes},
    pages,
    stored::Stored,
    tracking::Tracking,
};
use crate::{
    MigrationError, PageRange, PageSet,
    lock::lock,
    page_map::{MapError, PageMap},
    ram::GuestRam,
    report::Observer,
    store::PageContent,
    tracker::{DirtyTracker, Rearm, TrackerError},
    vm::{CheckpointedVm, SourceVm, VmError},
};

/// A VM whose writes are tracked.
pub(super) trait Tracked {
    fn tracker(&mut self) -> &mut dyn DirtyTracker;

    /// Adds the pages that are free now. When to ask: see [`SourceVm::free_pages`].
    fn free_pages(&mut self, free: &mut PageSet) -> Result<(), VmError>;
}

impl Tracked for dyn SourceVm + '_ {
    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        SourceVm::tracker(self)
    }

    fn free_pages(&mut self, free: &mut PageSet) -> Result<(), VmError> {
        SourceVm::free_pages(self, free)
    }
}

impl Tracked for dyn CheckpointedVm + '_ {
    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        CheckpointedVm::tracker(self)
    }

    fn free_pages(&mut self, _: &mut PageSet) -> Result<(), VmError> {
        Ok(())
    }
}

/// What was written since the last harvest.
pub(super) struct Harvest {
    /// All pages that the tracker has reported.
    pub(super) written: PageSet,
    /// Those of them that are not free now.
    pub(super) pages: PageSet,
    /// The time since the last harvest, or since tracking began.
    pub(super) time: Duration,
}

/// See the module. Which pages are to go is what its map has as unsent.
pub(super) struct RoundDriver {
    ram: Arc<dyn GuestRam>,
    observer: Arc<dyn Observer>,
    map: Arc<Mutex<PageMap>>,
    /// The pages that were in stores when this began, if there are any.
    stored: Option<Stored>,
    tracking: Tracking,
    last_harvest: Instant,
    /// Pages that were never touched when tracking began.
    holes: u64,
    /// Pages that have gone at least once.
    gone: PageSet,
    /// Pages that were left out at least once, because they were free.
    skipped: PageSet,
}

impl RoundDriver {
    pub(super) fn new(ram: Arc<dyn GuestRam>, observer: Arc<dyn Observer>) -> Self {
        let pages = ram.layout().pages();
        Self {
            ram,
            observer,
            map: Arc::new(Mutex::new(PageMap::new(pages))),
            stored: None,
            tracking: Tracking::new(pages),
            last_harvest: Instant::now(),
            holes: 0,
            gone: PageSet::empty(pages),
            skipped: PageSet::empty(pages),
        }
    }

    /// Returns the map, to be shared with whoever sends pages after a hand-over.
    pub(super) fn shared_map(&self) -> Arc<Mutex<PageMap>> {
        self.map.clone()
    }

    pub(super) fn map(&self) -> MutexGuard<'_, PageMap> {
        lock(&self.map)
    }

    /// Some pages are in stores.
    pub(super) fn set_stored(&mut self, stored: Stored) {
        self.stored = Some(stored);
    }

    /// Returns the pages that were in stores when this began, if there are any.
    pub(super) fn stored(&self) -> Option<&Stored> {
        self.stored.as_ref()
    }

    /// Returns the pages that are to go, and are in stores.
    pub(super) fn due_from_stores(&self) -> PageSet {
        let none = || PageSet::empty(self.gone.capacity());
        self.stored.as_ref().map_or_else(none, |stored| stored.among(self.map().unsent()))
    }

    /// Returns the pages that are to go.
    pub(super) fn due(&self) -> PageSet {
        self.map().unsent().clone()
    }

    /// Starts to track writes.
    pub(super) fn track<V: Tracked + ?Sized>(&mut self, vm: &mut V) -> Result<(), TrackerError> {
        self.tracking.start(vm.tracker())?;
        self.last_harvest = Instant::now();
        Ok(())
    }

    /// Starts to track writes. All pages that may hold data are due, but for those that are free
    /// now.
    pub(super) fn start<V: Tracked + ?Sized>(&mut self, vm: &mut V) -> Result<PageSet, MigrationError> {
        self.track(vm)?;
        // first: a page that comes back after this look is populated at the next one
        let in_stores = self.stored.as_ref().map(Stored::pages);
        let mut pages = pages::populated(&*self.ram, &*self.observer);
        pages.union_with(&in_stores.unwrap_or_else(|| PageSet::empty(pages.capacity())));
        self.holes = pages.capacity() - pages.len();
        if let Some(stored) = &mut self.stored {
            let mut none = PageSet::empty(pages.capacity());
            stored.look(&mut lock(&self.map), &mut none)?;
            pages.subtract(stored.kept());
        }
        self.map().dirtied(&pages)?;
        self.skip_free(vm);
        Ok(self.due())
    }

    /// Collects what was written since the last harvest. It is due from now on.
    pub(super) fn harvest<V: Tracked + ?Sized>(&mut self, vm: &mut V) -> Result<Harvest, MigrationError> {
        let mut written = self.tracking.harvest(vm.tracker())?;
        if let Some(stored) = &mut self.stored {
            stored.look(&mut lock(&self.map), &mut written)?;
        }
        let time = self.last_harvest.elapsed();
        self.last_harvest = Instant::now();
        self.map().dirtied(&written)?;
        // The tracker has begun anew. A page that is free now and is written later is reported
        // again.
        let mut pages = written.clone();
        pages.subtract(&self.skip_free(vm));
        Ok(Harvest { written, pages, time })
    }

    /// Leaves out the pages that are free now, and returns all that are. Only after tracking has
    /// begun, or after a harvest, or while the guest is paused: see [`SourceVm::free_pages`] for
    /// why.
    fn skip_free<V: Tracked + ?Sized>(&mut self, vm: &mut V) -> PageSet {
        let free = pages::free(vm, self.gone.capacity(), &*self.observer);
        let mut skipped = free.clone();
        skipped.intersect_with(self.map().unsent());
        self.skipped.union_with(&skipped);
        self.map().free_for_now(&free);
        free
    }

    /// Begins a round with `pages`. Returns what re-arms a page before it is read: nothing while
    /// the guest is paused, for it writes nothing then, and nothing where a harvest has done it.
    pub(super) fn begin(
        &mut self,
        tracker: &dyn DirtyTracker,
        pages: &PageSet,
        paused: bool,
    ) -> Result<Option<Arc<dyn Rearm>>, MapError> {
        self.map().sending(pages)?;
        Ok(self.rearm(tracker, paused))
    }

    /// Returns what re-arms pages before they are read, as [`begin`](Self::begin) does.
    pub(super) fn rearm(&self, tracker: &dyn DirtyTracker, paused: bool) -> Option<Arc<dyn Rearm>> {
        if paused { None } else { self.tracking.rearm(tracker) }
    }

    /// `pages` of a round are where they were to go.
    pub(super) fn arrived(&mut self, pages: &PageSet) -> Result<(), MapError> {
        self.map().acknowledged(pages)?;
        self.gone.union_with(pages);
        Ok(())
    }

    /// Records that `pages` go in another way than by a round.
    pub(super) fn gone(&mut self, pages: &PageSet) {
        self.gone.union_with(pages);
    }

    /// Returns the stripes that have some of `pages`.
    pub(super) fn stripes(pages: &PageSet) -> impl Iterator<Item = PageRange> {
        stripes(0, 1, pages.capacity()).map(stripe_pages).filter(|&stripe| pages.first_in(stripe).is_some())
    }

    /// Reads the `pages` of one stripe, which `put` takes one by one.
    pub(super) fn read(
        &self,
        stripe: PageRange,
        pages: &PageSet,
        rearm: Option<&dyn Rearm>,
        put: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>,
    ) -> Result<(), MigrationError> {
        pages::put(&*self.ram, stripe, pages, rearm, put)
    }

    /// Returns how many pages were never touched, have gone at least once, and were left out for
    /// being free and never went.
    pub(super) fn counts(&self) -> Counts {
        let mut skipped = self.skipped.clone();
        skipped.subtract(&self.gone);
        Counts { holes: self.holes, distinct: self.gone.len(), free: skipped.len() }
    }

    pub(super) fn is_tracking(&self) -> bool {
        self.tracking.active
    }

    /// Returns all pages that a tracker which the VMM had started has reported since the VMM's last
    /// harvest.
    pub(super) fn written(&mut self, tracker: &mut dyn DirtyTracker) -> Result<PageSet, TrackerError> {
        self.tracking.start(tracker)?;
        self.tracking.written(tracker)
    }

    /// Records that all of RAM has changed.
    pub(super) fn all_dirty(&mut self) {
        self.tracking.all_dirty();
    }

    /// The VM and its tracker are gone.
    pub(super) fn forget_tracker(&mut self) {
        self.tracking.active = false;
    }

    /// Leaves the tracker as it was found.
    pub(super) fn give_tracker_back(&mut self, tracker: &mut dyn DirtyTracker) -> Result<(), TrackerError> {
        self.tracking.roll_back(tracker)
    }
}

/// Counts of pages for a report.
pub(super) struct Counts {
    pub(super) holes: u64,
    pub(super) distinct: u64,
    pub(super) free: u64,
}
