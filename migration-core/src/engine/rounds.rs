//! Rounds: which pages of a running guest are to be sent, how they are read safely, and which have
//! arrived.
//!
//! One driver serves every operation that sends the pages of a running guest: a migration sends
//! them to its lanes, a snapshot and a forward checkpoint to a store, and a reverse checkpoint to
//! the source. The order is always the same: collect the pages that were written, leave out those
//! that are free, re-arm the tracker for a stripe, read the stripe, send it, and record which pages
//! have arrived.

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

    /// Adds the pages that are free now to `free`. When to call: see [`SourceVm::free_pages`].
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

/// The pages that were written since the last harvest.
pub(super) struct Harvest {
    /// All pages that the tracker has reported.
    pub(super) written: PageSet,
    /// Those of the written pages that are not free now.
    pub(super) pages: PageSet,
    /// The time since the last harvest, or since tracking began.
    pub(super) time: Duration,
}

/// Drives rounds (see the module documentation). The pages that are to be sent are those that its
/// map has as unsent.
pub(super) struct RoundDriver {
    ram: Arc<dyn GuestRam>,
    observer: Arc<dyn Observer>,
    map: Arc<Mutex<PageMap>>,
    /// The pages that were in stores when the migration began, if there are any.
    stored: Option<Stored>,
    tracking: Tracking,
    last_harvest: Instant,
    /// The number of pages that were never touched when tracking began.
    holes: u64,
    /// Pages that were sent at least once.
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

    /// Returns the map, to be shared with the threads that send pages after a hand-over.
    pub(super) fn shared_map(&self) -> Arc<Mutex<PageMap>> {
        self.map.clone()
    }

    pub(super) fn map(&self) -> MutexGuard<'_, PageMap> {
        lock(&self.map)
    }

    /// Sets the pages that are in stores.
    pub(super) fn set_stored(&mut self, stored: Stored) {
        self.stored = Some(stored);
    }

    /// Returns the pages that were in stores when the migration began, if there are any.
    pub(super) fn stored(&self) -> Option<&Stored> {
        self.stored.as_ref()
    }

    /// Returns the pages that are to be sent and are in stores.
    pub(super) fn due_from_stores(&self) -> PageSet {
        let none = || PageSet::empty(self.gone.capacity());
        self.stored.as_ref().map_or_else(none, |stored| stored.among(self.map().unsent()))
    }

    /// Returns the pages that are to be sent.
    pub(super) fn due(&self) -> PageSet {
        self.map().unsent().clone()
    }

    /// Starts to track writes.
    pub(super) fn track<V: Tracked + ?Sized>(&mut self, vm: &mut V) -> Result<(), TrackerError> {
        self.tracking.start(vm.tracker())?;
        self.last_harvest = Instant::now();
        Ok(())
    }

    /// Starts to track writes. Returns the pages that are due: all pages that may hold data, except
    /// those that are free now.
    pub(super) fn start<V: Tracked + ?Sized>(&mut self, vm: &mut V) -> Result<PageSet, MigrationError> {
        self.track(vm)?;
        // The stores are looked up first: a page that comes back from a store after this is found
        // to be populated afterwards.
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

    /// Collects the pages that were written since the last harvest. They are due from now on.
    pub(super) fn harvest<V: Tracked + ?Sized>(&mut self, vm: &mut V) -> Result<Harvest, MigrationError> {
        let mut written = self.tracking.harvest(vm.tracker())?;
        if let Some(stored) = &mut self.stored {
            stored.look(&mut lock(&self.map), &mut written)?;
        }
        let time = self.last_harvest.elapsed();
        self.last_harvest = Instant::now();
        self.map().dirtied(&written)?;
        // The tracker has been reset by the harvest. A page that is free now and is written later
        // is reported again.
        let mut pages = written.clone();
        pages.subtract(&self.skip_free(vm));
        Ok(Harvest { written, pages, time })
    }

    /// Leaves out the pages that are free now, and returns them. May be called only after tracking
    /// has begun, or after a harvest, or while the guest is paused: see [`SourceVm::free_pages`]
    /// for the reason.
    fn skip_free<V: Tracked + ?Sized>(&mut self, vm: &mut V) -> PageSet {
        let free = pages::free(vm, self.gone.capacity(), &*self.observer);
        let mut skipped = free.clone();
        skipped.intersect_with(self.map().unsent());
        self.skipped.union_with(&skipped);
        self.map().free_for_now(&free);
        free
    }

    /// Begins a round with `pages`. Returns the means to re-arm a page before it is read. It is
    /// `None` while the guest is paused, because the guest writes nothing then, and where a harvest
    /// has re-armed the pages already.
    pub(super) fn begin(
        &mut self,
        tracker: &dyn DirtyTracker,
        pages: &PageSet,
        paused: bool,
    ) -> Result<Option<Arc<dyn Rearm>>, MapError> {
        self.map().sending(pages)?;
        Ok(self.rearm(tracker, paused))
    }

    /// Returns the means to re-arm pages before they are read, as [`begin`](Self::begin) does.
    pub(super) fn rearm(&self, tracker: &dyn DirtyTracker, paused: bool) -> Option<Arc<dyn Rearm>> {
        if paused { None } else { self.tracking.rearm(tracker) }
    }

    /// Records that `pages` of a round have arrived.
    pub(super) fn arrived(&mut self, pages: &PageSet) -> Result<(), MapError> {
        self.map().acknowledged(pages)?;
        self.gone.union_with(pages);
        Ok(())
    }

    /// Records that `pages` are sent in another way than by a round.
    pub(super) fn gone(&mut self, pages: &PageSet) {
        self.gone.union_with(pages);
    }

    /// Returns the stripes that have some of `pages`.
    pub(super) fn stripes(pages: &PageSet) -> impl Iterator<Item = PageRange> {
        stripes(0, 1, pages.capacity()).map(stripe_pages).filter(|&stripe| pages.first_in(stripe).is_some())
    }

    /// Reads the `pages` of one stripe, and passes them to `put` one by one.
    pub(super) fn read(
        &self,
        stripe: PageRange,
        pages: &PageSet,
        rearm: Option<&dyn Rearm>,
        put: &mut dyn FnMut(u64, PageContent<'_>) -> io::Result<()>,
    ) -> Result<(), MigrationError> {
        pages::put(&*self.ram, stripe, pages, rearm, put)
    }

    /// Returns the numbers of pages that were never touched, that were sent at least once, and that
    /// were left out because they were free and never sent.
    pub(super) fn counts(&self) -> Counts {
        let mut skipped = self.skipped.clone();
        skipped.subtract(&self.gone);
        Counts { holes: self.holes, distinct: self.gone.len(), free: skipped.len() }
    }

    pub(super) fn is_tracking(&self) -> bool {
        self.tracking.active
    }

    /// Returns all pages that the tracker has reported since the VMM's last harvest, if the VMM had
    /// started it.
    pub(super) fn written(&mut self, tracker: &mut dyn DirtyTracker) -> Result<PageSet, TrackerError> {
        self.tracking.start(tracker)?;
        self.tracking.written(tracker)
    }

    /// Records that all of RAM has changed.
    pub(super) fn all_dirty(&mut self) {
        self.tracking.all_dirty();
    }

    /// Forgets the tracker, because it is gone with its VM.
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
