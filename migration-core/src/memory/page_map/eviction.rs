//! The eviction of pages from the RAM of a VM that runs here (rule 21).
//!
//! 1. The page is taken out of the guest's reach: [`evicting`](PageMap::evicting). It is still
//!    `Here`, because the owner has its content, but a thread that touches it waits.
//! 2. It is put into a store, by [`put_started`](PageMap::put_started) and
//!    [`put_done`](PageMap::put_done).
//! 3. It is dropped from RAM: [`evicted`](PageMap::evicted). A page of zeros is not put into a
//!    store: [`evicted_zeros`](PageMap::evicted_zeros).
//!
//! A touch before the third step ends the eviction: [`mapped_again`](PageMap::mapped_again).

use super::{MapError, PageMap, first_not_in};
use crate::memory::{page::PageRange, page_set::PageSet};

impl PageMap {
    /// Returns the pages that are out of the guest's reach, because they are about to be evicted.
    /// These pages are `Here`.
    pub fn being_evicted(&self) -> &PageSet {
        &self.evicting
    }

    /// Returns the pages that are in the RAM of the VM's owner.
    pub fn here(&self) -> &PageSet {
        &self.here
    }

    /// Records that RAM has memory for `pages`. Pages that were `Zero` are `Here`, and unsent. The
    /// state of other pages does not change.
    pub fn populated(&mut self, pages: &PageSet) {
        let mut new = pages.clone();
        new.subtract(&self.here);
        new.subtract(&self.missing);
        self.here.union_with(&new);
        self.unsent.union_with(&new);
    }

    /// Records that the owner is about to take `pages` out of the guest's reach, to evict them.
    ///
    /// # Errors
    /// Returns [`MapError::CannotBeEvicted`] unless every page is `Here`, is within the guest's
    /// reach, and is not being put into a store.
    pub fn evicting(&mut self, pages: PageRange) -> Result<(), MapError> {
        let wrong = [first_not_in(pages, &self.here), self.evicting.first_in(pages), self.puts.pages().first_in(pages)];
        if let Some(page) = wrong.into_iter().flatten().min() {
            return Err(MapError::CannotBeEvicted(page));
        }
        self.evicting.insert_range(pages);
        Ok(())
    }

    /// Records that the owner has mapped `pages` again, for example because a thread has touched
    /// them. The guest may write them from now on. So for pages that were out of reach, no copy is
    /// current any more, and a put that is under way does not count. The state of pages that were
    /// within reach does not change.
    pub fn mapped_again(&mut self, pages: PageRange) {
        let runs: Vec<_> = self.evicting.ranges_in(pages).collect();
        for run in runs {
            self.evicting.remove_range(run);
            self.puts.remove(run);
            self.forget_copies(run);
            self.unsent.insert_range(run);
        }
    }

    /// Records that the owner has dropped `pages` from RAM. They are only in the stores that have
    /// their copies.
    ///
    /// # Errors
    /// Returns [`MapError::NoCopy`] unless every page is `Here`, has a copy, and is not being put.
    pub fn evicted(&mut self, pages: PageRange) -> Result<(), MapError> {
        let wrong = [first_not_in(pages, &self.here), first_not_in(pages, self.copies.pages())];
        let wrong = wrong.into_iter().chain([self.puts.pages().first_in(pages)]).flatten().min();
        if let Some(page) = wrong {
            return Err(MapError::NoCopy(page));
        }
        for set in [&mut self.here, &mut self.unsent, &mut self.evicting] {
            set.remove_range(pages);
        }
        for set in [&mut self.missing, &mut self.in_store, &mut self.unfetched] {
            set.insert_range(pages);
        }
        self.held_has_changed(pages);
        Ok(())
    }

    /// Records that the owner has dropped `pages` from RAM, which were out of the guest's reach and
    /// held only zeros. They are `Zero`.
    ///
    /// # Errors
    /// Returns [`MapError::CannotBeEvicted`] unless every page is out of the guest's reach and is
    /// not being put.
    pub fn evicted_zeros(&mut self, pages: PageRange) -> Result<(), MapError> {
        let wrong = [first_not_in(pages, &self.evicting), self.puts.pages().first_in(pages)];
        if let Some(page) = wrong.into_iter().flatten().min() {
            return Err(MapError::CannotBeEvicted(page));
        }
        self.here.remove_range(pages);
        self.evicting.remove_range(pages);
        self.forget_copies(pages);
        Ok(())
    }

    pub(super) fn none_evicting(&self, pages: PageRange) -> Result<(), MapError> {
        self.evicting.first_in(pages).map_or(Ok(()), |page| Err(MapError::Evicting(page)))
    }
}
