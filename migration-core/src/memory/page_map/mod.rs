//! The location of the newest content of each page. Each side of a migration has one such map, and
//! no other record of it.
//!
//! A page is [`Here`](Location::Here), in the RAM of the VM's owner; or it is
//! [`Zero`](Location::Zero); or it is *missing*: its newest content is at its
//! [`Source`](Location::Source) or in a [`Store`](Location::Store). A missing page is *claimed* by
//! the thread that is about to send or to install it. It then either arrives, which makes it
//! `Here`, or is unclaimed again.
//!
//! A source also has to know which pages the destination does not have in their last state: those
//! are *unsent*. Two more facts are recorded of pages in stores: whether the source *holds* the
//! content in its RAM as well, and whether the location of the page was announced to the
//! destination.
//!
//! Every change is a named method. A change that the state of a page does not allow is an error and
//! changes nothing.
//!
//! # Pages in stores
//! A copy of a page is identified by the number of an entry of the session's store table and by the
//! generation of the put. All copies in the map are current: a write of the page removes its copy.
//! Two kinds of pages have a copy: missing pages whose location is a store, and pages that are
//! `Here` and whose content is in a store as well. The hand-over makes the second kind missing, and
//! *held*.
//!
//! | change | made by | effect |
//! |---|---|---|
//! | [`put_started`](PageMap::put_started) | the thread that puts pages | no other thread puts the pages, and no push order chooses them |
//! | [`put_done`](PageMap::put_done), [`put_failed`](PageMap::put_failed) | the thread that puts pages | the pages have the copy, or can be claimed again |
//! | [`announced`](PageMap::announced) | source | the locations were announced to the destination |
//! | [`located`](PageMap::located) | destination | the pages are in a store |
//! | [`claim_stored`](PageMap::claim_stored) | destination | claims pages, as `claim` does, for one copy in a store |
//! | [`evicting`](PageMap::evicting), [`mapped_again`](PageMap::mapped_again) | owner | the pages are out of the guest's reach, or within it again |
//! | [`evicted`](PageMap::evicted), [`returned`](PageMap::returned) | owner | the pages are not in RAM any more, or again |
//! | [`put_found_zeros`](PageMap::put_found_zeros) | the thread that puts pages | the pages are `Zero`, before a destination is known |
//! | [`entry_lost`](PageMap::entry_lost) | either side | the copies in the entry do not count any more |
//! | [`entry_reopened`](PageMap::entry_reopened) | source | pages can be put into the entry again |
//! | [`lacks`](PageMap::lacks) | source | the destination has asked for the pages once more |
//! | [`released`](PageMap::released) | destination | no page is held any more |

mod copies;
mod eviction;
#[cfg(test)]
mod sequences;
mod stores;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use copies::Copies;
pub use stores::{EntryLoss, LocatedRun};
use thiserror::Error;

use super::{page::PageRange, page_set::PageSet};

/// One copy of a page in a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StoreCopy {
    /// The number of an entry of the store table: the stores and the namespace that have the copy.
    pub entry: u8,
    /// The generation of the put that stored the copy.
    pub generation: u32,
}

/// Where the newest content of a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Location {
    /// In the RAM of the VM's owner.
    Here,
    /// Nowhere: the page was never written, or holds only zeros.
    Zero,
    /// At the source of the migration, which sends it on demand or before.
    Source,
    /// In a store.
    Store(StoreCopy),
}

/// The copy of a missing page that a thread is about to install. A page may be installed only from
/// a copy that is current (rule 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageCopy {
    /// The content that the source has sent. It is current for pages that are at their source or
    /// held there.
    Source,
    /// The content that a store has returned.
    Store(StoreCopy),
}

/// The error of a change of a [`PageMap`] that the state of a page does not allow. The map is
/// unchanged.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapError {
    /// A round delivered a page that was missing at the hand-over, or that page was to be handed
    /// over as missing a second time.
    #[error("page {0} is left behind")]
    LeftBehind(u64),
    /// The page cannot be claimed: it is not missing, it is claimed already, or its newest content
    /// is not the copy for which the claim is.
    #[error("page {0} is not missing, is claimed, or is elsewhere")]
    NotFree(u64),
    /// A page arrived, or was unclaimed, without a claim.
    #[error("page {0} is not claimed")]
    NotClaimed(u64),
    /// The destination has acknowledged a page that was not sent.
    #[error("page {0} is acknowledged, and was not sent")]
    NotSent(u64),
    /// The destination reports a page as missing that was not missing at the hand-over, or that the
    /// source does not hold.
    #[error("page {0} is said to be missing, and was not left behind")]
    NotLeftBehind(u64),
    /// The destination does not report a page as missing that was never sent.
    #[error("page {0} is not said to be missing, and was not sent")]
    NeverSent(u64),
    /// The page cannot be put into a store: it holds zeros, is only in a store, or is already being
    /// sent or put.
    #[error("page {0} cannot be put into a store now")]
    CannotBePut(u64),
    /// The page cannot be dropped from RAM: no store has a copy of it, or it is being put into one.
    #[error("page {0} has no copy in a store")]
    NoCopy(u64),
    /// The entry has lost pages. No more pages are put into it.
    #[error("entry {0} of the store table has lost pages")]
    EntryLost(u8),
    /// The VM still needs its source for this page.
    #[error("page {0} is only at the source")]
    AtSource(u64),
    /// The page is out of the guest's reach, because it is about to be evicted. It has to be mapped
    /// again first (rule 22).
    #[error("page {0} is about to be evicted")]
    Evicting(u64),
    /// The page cannot be taken out of the guest's reach: it is not in RAM, it is out of reach
    /// already, or it is being put into a store.
    #[error("page {0} cannot be evicted now")]
    CannotBeEvicted(u64),
}

/// The location of each page of a VM, as one side of a migration knows it.
///
/// ```
/// use migration_core::{PageRange, PageSet, page_map::{Location, PageMap}};
/// let mut map = PageMap::new(100);
/// let mut missing = PageSet::empty(100);
/// missing.insert_range(PageRange::new(40, 8));
/// map.leave_behind(&missing)?;
/// map.claim(PageRange::new(40, 2))?;
/// map.arrived(PageRange::new(40, 1))?;
/// assert_eq!([40, 41, 50].map(|page| map.location(page)), [Location::Here, Location::Source, Location::Zero]);
/// assert_eq!(map.missing().len(), 7);
/// # Ok::<(), migration_core::page_map::MapError>(())
/// ```
#[derive(Clone, Debug)]
pub struct PageMap {
    here: PageSet,
    /// Pages whose location is `Source` or `Store`. None of them is in `here`.
    missing: PageSet,
    /// The missing pages whose location is `Store`.
    in_store: PageSet,
    /// The pages at their source that are neither claimed nor being put into a store.
    unclaimed: PageSet,
    /// The pages in a store that are not claimed.
    unfetched: PageSet,
    /// The pages that were missing at the hand-over, whether or not they have arrived.
    missing_at_hand_over: PageSet,
    /// The pages that were at their source at the hand-over, and that since then were neither
    /// claimed nor announced to be in a store.
    never_claimed: PageSet,
    unsent: PageSet,
    /// The current copies: of all pages in `in_store`, and of those pages that are `Here` as well
    /// as in a store.
    copies: Copies,
    /// The puts that are under way.
    puts: Copies,
    /// The pages that are `Here` but out of the guest's reach.
    evicting: PageSet,
    /// The missing pages in a store that the source has in RAM as well.
    held: PageSet,
    /// The pages with a copy whose location, or whether they are held, is not announced to the
    /// destination.
    unannounced: PageSet,
    /// The pages with a copy that the destination has in RAM, because they were sent although a
    /// store has them.
    delivered: PageSet,
    /// The pages that the destination looks for in a store, according to the last announcement. The
    /// copy may not be current any more.
    looked_up: PageSet,
    /// The entries that have lost pages.
    lost: BTreeSet<u8>,
    handed_over: bool,
}

impl PageMap {
    /// Returns the map of a VM with `pages` pages, all of them `Zero`.
    pub fn new(pages: u64) -> Self {
        let none = PageSet::empty(pages);
        Self {
            here: none.clone(),
            missing: none.clone(),
            in_store: none.clone(),
            unclaimed: none.clone(),
            unfetched: none.clone(),
            missing_at_hand_over: none.clone(),
            never_claimed: none.clone(),
            unsent: none.clone(),
            copies: Copies::new(pages),
            puts: Copies::new(pages),
            evicting: none.clone(),
            held: none.clone(),
            unannounced: none.clone(),
            delivered: none.clone(),
            looked_up: none,
            lost: BTreeSet::new(),
            handed_over: false,
        }
    }

    /// Returns the number of pages of the VM.
    pub fn pages(&self) -> u64 {
        self.here.capacity()
    }

    /// Returns the location of the newest content of `page`.
    pub fn location(&self, page: u64) -> Location {
        if self.missing.contains(page) {
            self.copies.get(page).map_or(Location::Source, Location::Store)
        } else if self.here.contains(page) {
            Location::Here
        } else {
            Location::Zero
        }
    }

    /// Returns the pages whose location is `Source` or `Store`, including claimed pages.
    pub fn missing(&self) -> &PageSet {
        &self.missing
    }

    /// Returns the pages whose location is `Source` and that are neither claimed nor being put: the
    /// pages from which a push order chooses.
    pub fn unclaimed(&self) -> &PageSet {
        &self.unclaimed
    }

    /// Returns all pages that were missing at the hand-over, including those that have arrived.
    pub fn missing_at_hand_over(&self) -> &PageSet {
        &self.missing_at_hand_over
    }

    // ---- at the source, before the hand-over ----

    /// Returns the pages that the destination does not have in their last state, and for which no
    /// store was announced to it.
    pub fn unsent(&self) -> &PageSet {
        &self.unsent
    }

    /// Records that the guest has written `pages`, or may have. They are `Here` and unsent. No copy
    /// of them is current any more, and a put of them that is under way does not count.
    ///
    /// A page that is only in a store stays there, because trackers also report pages that were not
    /// written (rule 4). Before the guest writes such a page, the page has
    /// [returned](Self::returned).
    ///
    /// # Errors
    /// Returns [`MapError::LeftBehind`] if a page was missing at the hand-over: the guest does not
    /// run here any more.
    pub fn dirtied(&mut self, pages: &PageSet) -> Result<(), MapError> {
        none_in(pages, &self.missing_at_hand_over)?;
        if self.missing.is_empty() {
            self.written(pages);
        } else {
            let mut pages = pages.clone();
            pages.subtract(&self.missing);
            self.written(&pages);
        }
        Ok(())
    }

    fn written(&mut self, pages: &PageSet) {
        self.drop_copies(pages);
        self.here.union_with(pages);
        self.unsent.union_with(pages);
    }

    /// Records that `pages` are free in this round: the guest does not need their content, so they
    /// are not sent. A page that the guest uses again is [dirtied](Self::dirtied) again.
    ///
    /// A page that the destination looks for in a store, and that has no copy there any more, is
    /// sent all the same. Otherwise the destination would depend on the store for it (rule 5).
    pub fn free_for_now(&mut self, pages: &PageSet) {
        let mut stale = self.looked_up.clone();
        stale.subtract(self.copies.pages());
        if stale.is_empty() {
            self.unsent.subtract(pages);
            return;
        }
        let mut free = pages.clone();
        free.subtract(&stale);
        self.unsent.subtract(&free);
    }

    /// Records that `pages` are about to be sent. They count as unsent until they are acknowledged.
    ///
    /// # Errors
    /// Returns [`MapError::LeftBehind`] if a page was missing at the hand-over.
    pub fn sending(&mut self, pages: &PageSet) -> Result<(), MapError> {
        none_in(pages, &self.missing_at_hand_over)?;
        self.unsent.union_with(pages);
        if !self.copies.pages().is_empty() {
            // whether or not the page arrives, its location has to be announced once more
            let with_copy = self.with_copy(pages);
            self.delivered.subtract(&with_copy);
            self.unannounced.union_with(&with_copy);
        }
        Ok(())
    }

    /// Records that the destination has `pages` in the state in which they were sent.
    ///
    /// # Errors
    /// Returns [`MapError::NotSent`] if a page does not count as unsent.
    pub fn acknowledged(&mut self, pages: &PageSet) -> Result<(), MapError> {
        all_in(pages, &self.unsent).map_err(MapError::NotSent)?;
        self.unsent.subtract(pages);
        self.looked_up.subtract(pages);
        if !self.copies.pages().is_empty() {
            let with_copy = self.with_copy(pages);
            self.unannounced.subtract(&with_copy);
            self.delivered.union_with(&with_copy);
        }
        Ok(())
    }

    // ---- at the destination, before the hand-over ----

    /// Records that a round has brought data for `pages`. They are `Here`.
    ///
    /// # Errors
    /// Returns [`MapError::LeftBehind`] if a page was missing at the hand-over, and
    /// [`MapError::Evicting`] if a page is out of the guest's reach.
    pub fn received(&mut self, pages: PageRange) -> Result<(), MapError> {
        self.none_left_behind(pages)?;
        self.none_evicting(pages)?;
        self.forget_locations(pages);
        self.here.insert_range(pages);
        Ok(())
    }

    /// Records that a round has reported `pages` as zeros. They are `Zero`. Returns the pages that
    /// were `Here`: their memory holds something else and has to be cleared.
    ///
    /// # Errors
    /// Returns [`MapError::LeftBehind`] if a page was missing at the hand-over, and
    /// [`MapError::Evicting`] if a page is out of the guest's reach.
    pub fn zeroed(&mut self, pages: PageRange) -> Result<Vec<PageRange>, MapError> {
        self.none_left_behind(pages)?;
        self.none_evicting(pages)?;
        let were_here = self.here.ranges_in(pages).collect();
        self.forget_locations(pages);
        self.here.remove_range(pages);
        Ok(were_here)
    }

    // ---- the hand-over ----

    /// Records that the VM is handed over without `pages`, which are at their `Source`. Can be
    /// called several times, each time with a part of the pages, as long as none of these pages was
    /// claimed.
    ///
    /// All other pages that have a copy in a store are missing as well, unless the destination has
    /// them in RAM. Those that were `Here` are held. A source that is not to send them leaves them
    /// out of `pages`.
    ///
    /// # Errors
    /// Returns [`MapError::LeftBehind`] if a page of `pages` was claimed, and
    /// [`MapError::Evicting`] if any page of the VM is out of the guest's reach.
    pub fn leave_behind(&mut self, pages: &PageSet) -> Result<(), MapError> {
        self.evicting.first_from(0).map_or(Ok(()), |page| Err(MapError::Evicting(page)))?;
        let mut claimed = self.missing_at_hand_over.clone();
        claimed.subtract(&self.unclaimed);
        claimed.subtract(&self.unfetched);
        none_in(pages, &claimed)?;
        self.handed_over = true;
        self.drop_copies(pages);
        self.here.subtract(pages);
        self.unsent.subtract(pages);
        self.looked_up.subtract(pages);
        for set in [&mut self.in_store, &mut self.unfetched, &mut self.held] {
            set.subtract(pages);
        }
        for set in [&mut self.missing, &mut self.unclaimed, &mut self.missing_at_hand_over, &mut self.never_claimed] {
            set.union_with(pages);
        }
        self.leave_in_stores();
        Ok(())
    }

    /// Records that the hand-over has failed, and that the guest continues at the source. All pages
    /// that were missing at the hand-over are `Here` again, except those that are only in a store.
    /// Those without a copy in a store are unsent; all others are unannounced, unless the
    /// destination has them.
    pub fn taken_back(&mut self) {
        let mut only_in_store = self.missing_at_hand_over.clone();
        only_in_store.intersect_with(&self.in_store);
        only_in_store.subtract(&self.held);
        let mut back = self.missing_at_hand_over.clone();
        back.subtract(&only_in_store);
        self.puts.remove_all(&self.missing_at_hand_over);
        let mut unsent = back.clone();
        unsent.subtract(self.copies.pages());
        self.unsent.union_with(&unsent);
        self.here.union_with(&back);
        for set in [&mut self.missing, &mut self.in_store, &mut self.unfetched, &mut self.held] {
            set.subtract(&back);
        }
        self.unfetched.union_with(&only_in_store);
        let mut unannounced = self.with_copy(&self.missing_at_hand_over);
        unannounced.subtract(&self.delivered);
        self.unannounced.union_with(&unannounced);
        self.unclaimed.subtract(&self.missing_at_hand_over);
        self.missing_at_hand_over.clear();
        self.never_claimed.clear();
        self.handed_over = false;
    }

    // ---- after the hand-over ----

    /// Claims `pages` for the calling thread, which is about to send or to install the content that
    /// the source has. The pages are at their source, or held there.
    ///
    /// # Errors
    /// Returns [`MapError::NotFree`] if a page cannot be claimed.
    pub fn claim(&mut self, pages: PageRange) -> Result<(), MapError> {
        let free = match self.in_store.first_in(pages) {
            None => first_not_in(pages, &self.unclaimed),
            Some(_) => first_not_in(pages, &self.free_from_source(pages)),
        };
        if let Some(page) = free {
            return Err(MapError::NotFree(page));
        }
        for set in [&mut self.unclaimed, &mut self.unfetched, &mut self.never_claimed] {
            set.remove_range(pages);
        }
        Ok(())
    }

    /// Claims the pages of a block that the source may send, if `page` is one of them. The block is
    /// the `block` pages that contain `page`, aligned to `block` pages. Returns the runs of pages
    /// that were claimed.
    ///
    /// The source answers for every page that it holds, even if the page is being put into a store
    /// or is in one (rule 1). Such a page counts as sent from then on. If `page` is only in a
    /// store, it is [announced](Self::unannounced) once more.
    pub fn claim_block(&mut self, page: u64, block: u64) -> Vec<PageRange> {
        let around = PageRange::new(page - page % block.max(1), block.max(1));
        let in_stores = self.in_store.first_in(around).is_some() || self.puts.pages().first_in(around).is_some();
        if !in_stores {
            return self.claim_unclaimed(page, around);
        }
        let free = self.answerable(around);
        if !free.contains(page) {
            if self.unfetched.contains(page) && !self.delivered.contains(page) {
                self.unannounced.insert(page);
            }
            return Vec::new();
        }
        let runs: Vec<_> = free.ranges_in(around).collect();
        for &run in &runs {
            self.puts.remove(run);
            self.forget_copies(run);
            self.unclaimed.remove_range(run);
            self.never_claimed.remove_range(run);
        }
        runs
    }

    fn claim_unclaimed(&mut self, page: u64, around: PageRange) -> Vec<PageRange> {
        if !self.unclaimed.contains(page) {
            return Vec::new();
        }
        let runs: Vec<_> = self.unclaimed.ranges_in(around).collect();
        self.unclaimed.remove_range(around);
        self.never_claimed.remove_range(around);
        runs
    }

    /// Ends the claim of `pages`, which were not sent or not installed. They can be claimed again.
    ///
    /// # Errors
    /// Returns [`MapError::NotClaimed`] if a page is not claimed.
    pub fn unclaim(&mut self, pages: PageRange) -> Result<(), MapError> {
        self.all_claimed(pages)?;
        self.unclaimed.insert_range(pages);
        let stored: Vec<_> = self.in_store.ranges_in(pages).collect();
        for run in stored {
            self.unclaimed.remove_range(run);
            self.unfetched.insert_range(run);
        }
        Ok(())
    }

    /// Records that the claimed `pages` have been installed. They are `Here`, and the source does
    /// not hold them any more.
    ///
    /// # Errors
    /// Returns [`MapError::NotClaimed`] if a page is not claimed.
    pub fn arrived(&mut self, pages: PageRange) -> Result<(), MapError> {
        self.all_claimed(pages)?;
        self.forget_copies(pages);
        self.missing.remove_range(pages);
        self.here.insert_range(pages);
        Ok(())
    }

    /// Records that the destination's missing pages are exactly `lacking`, and that the data on its
    /// way was lost. The source has to send these pages again, or to announce their store once
    /// more. Every other page that was missing at the hand-over has arrived, or the destination
    /// knows its store. (Data that counts as lost may still arrive after the destination has made
    /// its list.)
    ///
    /// # Errors
    /// Returns [`MapError::NotLeftBehind`] if the source cannot send or locate a page of `lacking`,
    /// and [`MapError::NeverSent`] if a page that was never sent is not in `lacking`.
    pub fn lacking(&mut self, lacking: &PageSet) -> Result<(), MapError> {
        self.may_lack(lacking)?;
        all_in(&self.never_claimed, lacking).map_err(MapError::NeverSent)?;
        let mut known = self.missing_at_hand_over.clone();
        known.subtract(lacking);
        self.unannounced.subtract(&known);
        let mut arrived = known;
        arrived.subtract(&self.in_store);
        self.puts.remove_all(&arrived);
        self.here.union_with(&arrived);
        self.missing.subtract(&arrived);
        self.unclaimed.subtract(&arrived);
        self.sent_again(lacking);
        Ok(())
    }

    /// Returns the number of pages that were at their source at the hand-over, and that since then
    /// were neither claimed nor announced to be in a store. The destination cannot have them.
    pub fn never_claimed(&self) -> u64 {
        self.never_claimed.len()
    }

    fn none_left_behind(&self, pages: PageRange) -> Result<(), MapError> {
        self.missing_at_hand_over.first_in(pages).map_or(Ok(()), |page| Err(MapError::LeftBehind(page)))
    }

    fn all_claimed(&self, pages: PageRange) -> Result<(), MapError> {
        let free = [self.unclaimed.first_in(pages), self.unfetched.first_in(pages), self.puts.pages().first_in(pages)];
        let found = free.into_iter().chain([first_not_in(pages, &self.missing)]);
        found.flatten().min().map_or(Ok(()), |page| Err(MapError::NotClaimed(page)))
    }
}

/// Returns the first page of `pages` that is not in `set`.
fn first_not_in(pages: PageRange, set: &PageSet) -> Option<u64> {
    if pages.count == 0 {
        return None;
    }
    match set.run_at(pages.first, pages.count) {
        None => Some(pages.first),
        Some(run) if run.count < pages.count => Some(run.end()),
        Some(_) => None,
    }
}

fn none_in(pages: &PageSet, missing_at_hand_over: &PageSet) -> Result<(), MapError> {
    let mut both = pages.clone();
    both.intersect_with(missing_at_hand_over);
    both.first_from(0).map_or(Ok(()), |page| Err(MapError::LeftBehind(page)))
}

/// Checks that all of `pages` are in `set`. Returns the first page that is not as the error.
fn all_in(pages: &PageSet, set: &PageSet) -> Result<(), u64> {
    let mut others = pages.clone();
    others.subtract(set);
    others.first_from(0).map_or(Ok(()), Err)
}
