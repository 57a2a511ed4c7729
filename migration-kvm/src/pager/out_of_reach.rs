//! Takes pages out of the guest's reach, to evict them (rule 21).

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use migration_core::{PAGE_SIZE, PageRange, PageSet, shared_map::SharedPageMap};
use thiserror::Error;

use super::{
    UserFaultPager,
    side_area::{SideArea, SideAreaError, Taken, can_evict},
};
use crate::{ram::Backing, tracker::features};

/// Pages of this VM cannot be evicted. What it displays does not repeat its cause.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EvictionError {
    /// The pages of this backing cannot be evicted one by one.
    #[error(
        "pages on {0} memory are not evicted: a block of 2 MiB would have to be read back from the store before the \
         guest goes on; use memfd, thp or anon"
    )]
    Backing(Backing),
    /// The kernel lacks UFFDIO_MOVE, or the userfaultfd was created without it.
    #[error("userfaultfd lacks MOVE (Linux 6.8), which eviction needs on {0} memory; memfd does without it")]
    NoMove(Backing),
    /// A page that is taken out of reach could not be kept.
    #[error("memory for pages that are out of the guest's reach")]
    SideArea(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<SideAreaError> for EvictionError {
    fn from(error: SideAreaError) -> Self {
        Self::SideArea(Box::new(error))
    }
}

/// What it takes to take pages out of the guest's reach.
pub(super) struct Eviction {
    side: SideArea,
    /// Held while pages are moved, and while a fault is sorted out: whoever has it knows that no page
    /// moves between a look at the map and what follows from the look. It is taken before the map's
    /// lock.
    moves: Mutex<Touched>,
}

/// What the guest has done with pages that were out of its reach.
struct Touched {
    /// Those that it has touched since somebody asked last.
    pages: PageSet,
    /// Those that it has touched, and that could not be mapped again.
    owed: PageSet,
    /// Whether missing pages are watched for: pages are taken out of reach only then, because a touch
    /// would find zeros otherwise.
    watched: bool,
}

impl UserFaultPager {
    /// Prepares this pager for [`out_of_reach`](Self::out_of_reach). Takes address space, and no
    /// memory. Does nothing if it was called before.
    ///
    /// The VM's memory must not be mapped by another process that uses it, such as a vhost-user
    /// device: nothing takes a page out of *its* reach. With a memory file, a device that accesses
    /// pages without the CPU (VFIO) must not be assigned; private pages that it has pinned stay.
    ///
    /// # Errors
    /// [`EvictionError`].
    pub fn prepare_eviction(&self) -> Result<(), EvictionError> {
        if self.eviction.get().is_some() {
            return Ok(());
        }
        let backing = self.pages.ram().backing();
        if !can_evict(backing) {
            return Err(EvictionError::Backing(backing));
        }
        if !backing.is_shared() && self.pages.fault().features() & features::MOVE == 0 {
            return Err(EvictionError::NoMove(backing));
        }
        let side = SideArea::new(&self.pages, self.pages.shared_fault())?;
        let nothing = PageSet::empty(self.pages.ram().layout().pages());
        let armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        let touched = Touched { pages: nothing.clone(), owed: nothing, watched: *armed };
        // if another thread was faster, its area is as good
        let _ = self.eviction.set(Eviction { side, moves: Mutex::new(touched) });
        Ok(())
    }

    /// Returns the means to take pages out of the guest's reach, or `None` before
    /// [`prepare_eviction`](Self::prepare_eviction), and while missing pages are not watched for.
    ///
    /// **While the value lives, no fault of the VM is answered.** So it is held for moments, for some
    /// tens of pages at a time, and never while a store is asked.
    pub fn out_of_reach(&self) -> Option<OutOfReach<'_>> {
        let eviction = self.eviction.get()?;
        let touched = eviction.moves.lock().unwrap_or_else(PoisonError::into_inner);
        touched.watched.then(|| OutOfReach { pager: self, side: &eviction.side, map: self.map(), touched })
    }

    /// Missing pages are watched for from now on.
    pub(super) fn allow_eviction(&self) {
        if let Some(eviction) = self.eviction.get() {
            eviction.moves.lock().unwrap_or_else(PoisonError::into_inner).watched = true;
        }
    }

    /// Maps all pages again that are out of reach. None is taken out of reach any more.
    pub(super) fn end_eviction(&self) -> io::Result<()> {
        let Some(mut moves) = self.out_of_reach() else { return Ok(()) };
        moves.give_back(self.pages.ram().layout().all())?;
        moves.touched.watched = false;
        Ok(())
    }
}

/// Takes pages out of the guest's reach, and brings them back or drops them: see
/// [`UserFaultPager::out_of_reach`].
///
/// A page is out of reach exactly if the map has it as
/// [being evicted](migration_core::page_map::PageMap::being_evicted). A touch of such a page maps it
/// again at once, which ends its eviction and voids a put of it.
pub struct OutOfReach<'a> {
    pager: &'a UserFaultPager,
    side: &'a SideArea,
    map: Arc<SharedPageMap>,
    touched: MutexGuard<'a, Touched>,
}

impl OutOfReach<'_> {
    /// Takes the pages of `range` out of the guest's reach (rule 21, step 1). Pages that are not in
    /// RAM, or out of reach already, or that somebody puts into a store are left out. Pages that are
    /// not populated, or that the kernel or a device has in use, stay.
    ///
    /// Returns how many are out of reach now because of this call, and why others have stayed.
    pub fn take(&mut self, range: PageRange) -> (u64, Option<io::Error>) {
        let runs = self.map.change(|map| {
            let mut can = PageSet::empty(map.pages());
            map.here().ranges_in(range).for_each(|run| can.insert_range(run));
            for set in [map.being_evicted(), map.being_put()] {
                set.ranges_in(range).for_each(|run| can.remove_range(run));
            }
            let runs: Vec<_> = can.ranges_in(range).collect();
            // they were chosen so that this cannot fail
            runs.iter().for_each(|&run| _ = map.evicting(run));
            runs
        });
        let (mut count, mut why) = (0, None);
        for run in runs {
            let Taken { runs: taken, refused } = self.side.take(&self.pager.pages, run);
            count += taken.iter().map(|run| run.count).sum::<u64>();
            why = refused.or(why);
            let mut stays = PageSet::empty(self.map.read(|map| map.pages()));
            stays.insert_range(run);
            taken.into_iter().for_each(|run| stays.remove_range(run));
            self.map.change(|map| stays.ranges().for_each(|run| map.mapped_again(run)));
        }
        (count, why)
    }

    /// Returns the pages that are out of reach.
    pub fn pages(&self) -> PageSet {
        self.map.read(|map| map.being_evicted().clone())
    }

    /// Copies what `page` holds into a buffer of a page's length. Returns `false` if the page is not
    /// out of reach: the guest has touched it.
    ///
    /// # Errors
    /// The page cannot be read.
    pub fn copy(&self, page: u64, into: &mut [u8; PAGE_SIZE]) -> io::Result<bool> {
        if !self.map.read(|map| map.being_evicted().contains(page)) {
            return Ok(false);
        }
        self.side.copy(&self.pager.pages, page, into)?;
        Ok(true)
    }

    /// Maps the pages of `range` that are out of reach again, and wakes whoever waits for one.
    ///
    /// # Errors
    /// What the kernel says, for example that memory is short. Some of the pages may still be out of
    /// reach then; a touch of one, or another call, tries it again.
    pub fn give_back(&mut self, range: PageRange) -> io::Result<()> {
        let runs: Vec<_> = self.map.read(|map| map.being_evicted().ranges_in(range).collect());
        for run in runs {
            self.side.give_back(&self.pager.pages, run)?;
            self.map.change(|map| map.mapped_again(run));
        }
        Ok(())
    }

    /// Drops pages that are out of reach, and that are in a store as they are (rule 21, step 3). Their
    /// memory is free afterwards.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if a page is within reach or has no copy in a store: nothing is
    /// dropped then. Otherwise what the kernel says; the pages are missing all the same, and their
    /// memory is not free.
    pub fn drop_stored(&mut self, range: PageRange) -> io::Result<()> {
        let ready = self.map.read(|map| {
            let all = |set: &PageSet| set.count_in(range) == range.count;
            all(map.being_evicted()) && all(map.with_copies()) && map.being_put().first_in(range).is_none()
        });
        if !ready {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let freed = self.side.discard(&self.pager.pages, range);
        // nobody else changes pages that are out of reach while the moves are locked
        self.map.change(|map| map.evicted(range)).map_err(io::Error::other)?;
        freed.map_err(io::Error::other)
    }

    /// Drops pages that are out of reach and that hold only zeros: they go to no store, and read as
    /// zeros from now on.
    ///
    /// # Errors
    /// As [`drop_stored`](Self::drop_stored). That the pages hold zeros is not checked.
    pub fn drop_zeros(&mut self, range: PageRange) -> io::Result<()> {
        let ready = self.map.read(|map| {
            map.being_evicted().count_in(range) == range.count && map.being_put().first_in(range).is_none()
        });
        if !ready {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let freed = self.side.discard(&self.pager.pages, range);
        self.map.change(|map| map.evicted_zeros(range)).map_err(io::Error::other)?;
        freed.map_err(io::Error::other)
    }

    /// Returns the pages that the guest has touched while they were out of its reach, since this was
    /// asked last.
    pub fn take_touched(&mut self) -> PageSet {
        let nothing = PageSet::empty(self.touched.pages.capacity());
        std::mem::replace(&mut self.touched.pages, nothing)
    }

    /// Somebody has touched `page`. Returns whether it was out of reach; it is mapped again then.
    pub(super) fn touch(&mut self, page: u64) -> io::Result<bool> {
        if !self.map.read(|map| map.being_evicted().contains(page)) {
            return Ok(false);
        }
        self.touched.pages.insert(page);
        self.give_back(PageRange::new(page, 1)).inspect_err(|_| _ = self.touched.owed.insert(page))?;
        Ok(true)
    }

    /// Tries once more to map pages that the guest has touched and that could not be mapped again.
    ///
    /// # Errors
    /// As [`give_back`](Self::give_back).
    pub fn give_back_touched(&mut self) -> io::Result<()> {
        while let Some(page) = self.touched.owed.first_from(0) {
            self.give_back(PageRange::new(page, 1))?;
            self.touched.owed.remove(page);
        }
        Ok(())
    }
}
