//! Where the newest content of each page is: the one record of that on either side of a migration.
//!
//! A page is [`Here`](Location::Here), in the RAM of whoever owns the VM; it is
//! [`Zero`](Location::Zero); or it is *missing*: its newest content is at its
//! [`Source`](Location::Source) or in a [`Store`](Location::Store). A missing page is *claimed* by
//! the thread that is about to send or to install it. It then arrives, which makes it `Here`, or is
//! given back.
//!
//! A source also has to know which pages the destination lacks in their last state: those are
//! *unsent*. Pages in stores have two more facts: whether the source *holds* the content in its
//! RAM, too, and whether the destination was told where the page is: see below.
//!
//! Every change has a name, and one that the state of a page does not allow is an error that
//! changes nothing.
//!
//! # Pages in stores
//! A copy of a page is named by the number of an entry of the session's store table and by the
//! generation of the put. A copy is current: a write of the page takes it away. Two kinds of pages
//! have a copy: missing pages whose location is a store, and pages that are `Here` and whose
//! content is in a store as well. The hand-over makes the second kind missing, and *held*.
//!
//! | change | who makes it | effect |
//! |---|---|---|
//! | [`put_started`](PageMap::put_started) | who puts pages | nobody else puts or sends them |
//! | [`put_done`](PageMap::put_done), [`put_failed`](PageMap::put_failed) | who puts pages | they have the copy, or can be claimed again |
//! | [`announced`](PageMap::announced) | source | the destination was told their locations |
//! | [`located`](PageMap::located) | destination | they are in a store |
//! | [`claim_stored`](PageMap::claim_stored) | destination | as `claim`, for one copy in a store |
//! | [`evicting`](PageMap::evicting), [`mapped_again`](PageMap::mapped_again) | owner | they are out of the guest's reach, or within it again |
//! | [`evicted`](PageMap::evicted), [`returned`](PageMap::returned) | owner | RAM has them no more, or again |
//! | [`put_found_zeros`](PageMap::put_found_zeros) | who puts pages | they are `Zero`, before a destination is known |
//! | [`entry_lost`](PageMap::entry_lost) | either | the entry's copies are gone |
//! | [`entry_reopened`](PageMap::entry_reopened) | source | pages can be put into the entry again |
//! | [`lacks`](PageMap::lacks) | source | the destination has asked for them once more |
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
    /// The generation of the put that has stored it.
    pub generation: u32,
}

/// Where the newest content of a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Location {
    /// In the RAM of whoever owns the VM.
    Here,
    /// Nowhere: the page was never written, or holds only zeros.
    Zero,
    /// The source of the migration delivers it, when it is asked for or before.
    Source,
    /// In a store.
    Store(StoreCopy),
}

/// Which copy of a missing page somebody has in hand. A page may be installed only from a copy that
/// is current (rule 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageCopy {
    /// What the source has sent. It is current for pages that are at their source or held there.
    Source,
    /// What a store has handed out.
    Store(StoreCopy),
}

/// A change of a [`PageMap`] that the state of a page does not allow. The map is as it was.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapError {
    /// A round delivered a page that the hand-over has left behind, or would leave it behind again.
    #[error("page {0} is left behind")]
    LeftBehind(u64),
    /// The page cannot be claimed: it is not missing, somebody has claimed it, or its content is
    /// elsewhere than in the copy for which the claim is.
    #[error("page {0} is not missing, is claimed, or is elsewhere")]
    NotFree(u64),
    /// A page arrived, or was given back, without a claim.
    #[error("page {0} is not claimed")]
    NotClaimed(u64),
    /// The destination has acknowledged a page that was not sent.
    #[error("page {0} is acknowledged, and was not sent")]
    NotSent(u64),
    /// The destination lacks a page that the hand-over did not leave behind, or that the source
    /// does not hold.
    #[error("page {0} is said to be missing, and was not left behind")]
    NotLeftBehind(u64),
    /// The destination does not lack a page that was never sent.
    #[error("page {0} is not said to be missing, and was not sent")]
    NeverSent(u64),
    /// The page cannot be put into a store: it holds zeros, is only in a store, or somebody sends
    /// or puts it already.
    #[error("page {0} cannot be put into a store now")]
    CannotBePut(u64),
    /// RAM cannot do without the page: no store has a copy of it, or it is being put into one.
    #[error("page {0} has no copy in a store")]
    NoCopy(u64),
    /// The entry has lost pages. Nothing is put into it any more.
    #[error("entry {0} of the store table has lost pages")]
    EntryLost(u8),
    /// The VM still needs its source for this page.
    #[error("page {0} is only at the source")]
    AtSource(u64),
    /// The page is out of the guest's reach, because it is about to be evicted. It is mapped again
    /// first (rule 22).
    #[error("page {0} is about to be evicted")]
    Evicting(u64),
    /// The page cannot be taken out of the guest's reach: it is not in RAM, it is out of reach
    /// already, or somebody puts it into a store.
    #[error("page {0} cannot be evicted now")]
    CannotBeEvicted(u64),
}

/// Where each page of a VM is, as one side of a migration knows it.
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
    /// Of those, the ones whose location is `Store`.
    in_store: PageSet,
    /// Pages at their source that nobody has claimed, or puts into a store.
    unclaimed: PageSet,
    /// Pages in a store that nobody has claimed.
    unfetched: PageSet,
    /// Pages that were missing at the hand-over, whether or not they have arrived.
    missing_at_hand_over: PageSet,
    /// Of those that were at their source, the ones that were neither claimed nor announced to be
    /// in a store.
    never_claimed: PageSet,
    unsent: PageSet,
    /// The current copies: of all pages in `in_store`, and of pages that are `Here` as well.
    copies: Copies,
    /// Puts that are under way.
    puts: Copies,
    /// Pages that are `Here`, and out of the guest's reach.
    evicting: PageSet,
    /// Missing pages in a store that the source has in RAM, too.
    held: PageSet,
    /// Pages with a copy whose location, or whether they are held, the destination was not told.
    unannounced: PageSet,
    /// Pages with a copy that the destination has in RAM: they were sent all the same.
    delivered: PageSet,
    /// Pages that the destination looks for in a store, as it was told last. The copy need not be
    /// current any more.
    looked_up: PageSet,
    /// Entries that have lost pages.
    lost: BTreeSet<u8>,
    handed_over: bool,
}

impl PageMap {
    /// Returns the map of a VM with so many pages, all of them `Zero`.
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

    /// Returns how many pages the VM has.
    pub fn pages(&self) -> u64 {
        self.here.capacity()
    }

    /// Returns where the newest content of `page` is.
    pub fn location(&self, page: u64) -> Location {
        if self.missing.contains(page) {
            self.copies.get(page).map_or(Location::Source, Location::Store)
        } else if self.here.contains(page) {
            Location::Here
        } else {
            Location::Zero
        }
    }

    /// Returns the pages whose location is `Source` or `Store`, claimed ones among them.
    pub fn missing(&self) -> &PageSet {
        &self.missing
    }

    /// Returns the pages whose location is `Source` and that nobody has claimed: what a push order
    /// chooses from.
    pub fn unclaimed(&self) -> &PageSet {
        &self.unclaimed
    }

    /// Returns all pages that were missing at the hand-over, those that have arrived among them.
    pub fn missing_at_hand_over(&self) -> &PageSet {
        &self.missing_at_hand_over
    }

    // ---- at the source, before the hand-over
    // -----------------------------------------------------

    /// Returns the pages that the destination lacks in their last state, and for which it was not
    /// told a store.
    pub fn unsent(&self) -> &PageSet {
        &self.unsent
    }

    /// The guest has written `pages`, or may have: they are `Here`, and unsent. No copy of them is
    /// current any more, and a put of them that is under way does not count.
    ///
    /// A page that is only in a store stays there: trackers report pages that were not written
    /// (rule 4). One that the guest does write has [returned](Self::returned) before.
    ///
    /// # Errors
    /// [`MapError::LeftBehind`]: the guest does not run here any more.
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

    /// `pages` are free for this round: nobody needs what they hold, so they are not sent. One that
    /// the guest takes back is [dirtied](Self::dirtied) again.
    ///
    /// A page that the destination looks for in a store, and that has no copy there any more, is
    /// sent all the same: otherwise the destination would depend on the store for it (rule 5).
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

    /// `pages` are about to be sent. Until they are acknowledged they count as unsent.
    ///
    /// # Errors
    /// [`MapError::LeftBehind`].
    pub fn sending(&mut self, pages: &PageSet) -> Result<(), MapError> {
        none_in(pages, &self.missing_at_hand_over)?;
        self.unsent.union_with(pages);
        if !self.copies.pages().is_empty() {
            // whatever becomes of it, the destination has to be told once more
            let with_copy = self.with_copy(pages);
            self.delivered.subtract(&with_copy);
            self.unannounced.union_with(&with_copy);
        }
        Ok(())
    }

    /// The destination has `pages` as they were sent.
    ///
    /// # Errors
    /// [`MapError::NotSent`].
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

    // ---- at the destination, before the hand-over
    // ------------------------------------------------

    /// A round has brought data for `pages`: they are `Here`.
    ///
    /// # Errors
    /// [`MapError::LeftBehind`] and [`MapError::Evicting`].
    pub fn received(&mut self, pages: PageRange) -> Result<(), MapError> {
        self.none_left_behind(pages)?;
        self.none_evicting(pages)?;
        self.forget_locations(pages);
        self.here.insert_range(pages);
        Ok(())
    }

    /// A round has said that `pages` hold zeros: they are `Zero`. Returns those that were `Here`,
    /// which hold something else.
    ///
    /// # Errors
    /// [`MapError::LeftBehind`] and [`MapError::Evicting`].
    pub fn zeroed(&mut self, pages: PageRange) -> Result<Vec<PageRange>, MapError> {
        self.none_left_behind(pages)?;
        self.none_evicting(pages)?;
        let were_here = self.here.ranges_in(pages).collect();
        self.forget_locations(pages);
        self.here.remove_range(pages);
        Ok(were_here)
    }

    // ---- the hand-over
    // ---------------------------------------------------------------------------

    /// The VM is handed over without `pages`: they are at their `Source`. Can be said piece by
    /// piece, as long as no page was claimed.
    ///
    /// All other pages that have a copy in a store are missing as well, unless the destination has
    /// them in RAM: those that were `Here` are held. A source that does not want to send them
    /// leaves them out of `pages`.
    ///
    /// # Errors
    /// [`MapError::LeftBehind`], for a page that was claimed, and [`MapError::Evicting`], for any page
    /// of the VM that is out of the guest's reach.
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

    /// The hand-over has failed, and the guest runs on at the source: all that was left behind and
    /// held is `Here` again. What has no copy in a store is unsent, all else unannounced.
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

    // ---- after the hand-over
    // ---------------------------------------------------------------------

    /// Somebody is about to send or install `pages` from what the source has, and nobody else does.
    /// They are at their source, or held there.
    ///
    /// # Errors
    /// [`MapError::NotFree`].
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

    /// Claims what the source may send of the aligned block of so many pages around `page`, if
    /// `page` can be sent. Returns the runs of pages that were claimed.
    ///
    /// The source answers for every page that it holds: also for one that is being put into a
    /// store, or that is in one (rule 1). Such a page counts as sent from then on. A page that is
    /// only in a store is [announced](Self::unannounced) once more.
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

    /// Claimed `pages` were not sent or not installed after all: anybody may claim them.
    ///
    /// # Errors
    /// [`MapError::NotClaimed`].
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

    /// Claimed `pages` have been installed: they are `Here`, and the source does not hold them any
    /// more.
    ///
    /// # Errors
    /// [`MapError::NotClaimed`].
    pub fn arrived(&mut self, pages: PageRange) -> Result<(), MapError> {
        self.all_claimed(pages)?;
        self.forget_copies(pages);
        self.missing.remove_range(pages);
        self.here.insert_range(pages);
        Ok(())
    }

    /// The destination lacks exactly `lacking`, and what was on its way is lost. The source has to
    /// send these again, or to say once more in which store they are. Every other page that was
    /// left behind has arrived, or the destination knows its store. (What is lost may still arrive
    /// after the destination has made its list.)
    ///
    /// # Errors
    /// [`MapError::NotLeftBehind`] and [`MapError::NeverSent`].
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

    /// Returns how many of the pages that were left behind at their source were never claimed, nor
    /// announced to be in a store. The destination cannot have them.
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

/// Returns the first of `pages` that is not in `set` as an error.
fn all_in(pages: &PageSet, set: &PageSet) -> Result<(), u64> {
    let mut others = pages.clone();
    others.subtract(set);
    others.first_from(0).map_or(Ok(()), Err)
}
