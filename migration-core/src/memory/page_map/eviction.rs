//! What happens to pages that are evicted from the RAM of a VM that runs here (rule 21).
//!
//! 1. The page is taken out of the guest's reach: [`evicting`](PageMap::evicting). It is still `Here`,
//!    because the owner has its content, but a touch waits.
//! 2. It is put into a store, by [`put_started`](PageMap::put_started) and
//!    [`put_done`](PageMap::put_done).
//! 3. It is dropped: [`evicted`](PageMap::evicted). A page of zeros goes to no store:
//!    [`evicted_zeros`](PageMap::evicted_zeros).
//!
//! A touch before the third step ends the eviction: [`mapped_again`](PageMap::mapped_again).

use super::{MapError, PageMap, first_not_in};
use crate::memory::{page::PageRange, page_set::PageSet};

impl PageMap {
    /// Returns the pages that are out of the guest's reach, because they are about to be evicted.
    /// They are `Here`.
    pub fn being_evicted(&self) -> &PageSet {
        &self.evicting
    }

    /// Returns the pages that are in the RAM of the VM's owner.
    pub fn here(&self) -> &PageSet {
        &self.here
    }

    /// RAM has memory for `pages`, whoever has written it: those that were `Zero` are `Here`, and
    /// unsent. Other pages are as they were.
    pub fn populated(&mut self, pages: &PageSet) {
        let mut new = pages.clone();
        new.subtract(&self.here);
        new.subtract(&self.missing);
        self.here.union_with(&new);
        self.unsent.union_with(&new);
    }

    /// The owner is about to take `pages` out of the guest's reach, to evict them.
    ///
    /// # Errors
    /// [`MapError::CannotBeEvicted`], unless every page is `Here` and within reach, and nobody puts
    /// it into a store.
    pub fn evicting(&mut self, pages: PageRange) -> Result<(), MapError> {
        let wrong = [first_not_in(pages, &self.here), self.evicting.first_in(pages), self.puts.pages().first_in(pages)];
        if let Some(page) = wrong.into_iter().flatten().min() {
            return Err(MapError::CannotBeEvicted(page));
        }
        self.evicting.insert_range(pages);
        Ok(())
    }

    /// The owner has mapped `pages` again, for example because somebody has touched them. The guest
    /// may write them from now on: no copy of those that were out of reach is current any more, and a
    /// put of them that is under way does not count. Pages that were within reach are as they were.
    pub fn mapped_again(&mut self, pages: PageRange) {
        let runs: Vec<_> = self.evicting.ranges_in(pages).collect();
        for run in runs {
            self.evicting.remove_range(run);
            self.puts.remove(run);
            self.forget_copies(run);
            self.unsent.insert_range(run);
        }
    }

    /// The owner has dropped `pages` from RAM: they are only in the stores that have their copies.
    ///
    /// # Errors
    /// [`MapError::NoCopy`], unless every page is `Here` and has a copy, and nobody puts it.
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

    /// The owner has dropped `pages` from RAM, which were out of the guest's reach and held only
    /// zeros: they are `Zero`.
    ///
    /// # Errors
    /// [`MapError::CannotBeEvicted`], unless every page is out of reach and nobody puts it.
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
