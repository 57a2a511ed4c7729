//! Where the newest content of each page is: the one record of that on either side of a migration.
//!
//! Until the hand-over every page is [`Here`](Location::Here), in the RAM of whoever owns the VM, or
//! [`Zero`](Location::Zero). A source also has to know which pages the destination lacks in their last
//! state: those are *unsent*. The hand-over of post-copy leaves pages behind at their
//! [`Source`](Location::Source). Each of them is then *claimed*, by whoever is about to send or to
//! install it, and arrives, which makes it `Here`, or is given back.
//!
//! Every change has a name, and one that the state of a page does not allow is an error that changes
//! nothing.

use thiserror::Error;

use super::{page::PageRange, page_set::PageSet};

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
}

/// A change of a [`PageMap`] that the state of a page does not allow. The map is as it was.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapError {
    /// A round delivered a page that the hand-over has left behind, or would leave it behind again.
    #[error("page {0} is left behind")]
    LeftBehind(u64),
    /// The page cannot be claimed: it is not missing, or somebody has claimed it.
    #[error("page {0} is not missing, or is claimed")]
    NotFree(u64),
    /// A page arrived, or was given back, without a claim.
    #[error("page {0} is not claimed")]
    NotClaimed(u64),
    /// The destination has acknowledged a page that was not sent.
    #[error("page {0} is acknowledged, and was not sent")]
    NotSent(u64),
    /// The destination lacks a page that the hand-over did not leave behind.
    #[error("page {0} is said to be missing, and was not left behind")]
    NotLeftBehind(u64),
    /// The destination does not lack a page that was never sent.
    #[error("page {0} is not said to be missing, and was not sent")]
    NeverSent(u64),
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
    /// Pages whose location is `Source`. None of them is in `here`.
    missing: PageSet,
    /// Missing pages that nobody has claimed.
    unclaimed: PageSet,
    /// Pages that were `Source` at the hand-over, whether or not they have arrived.
    left_behind: PageSet,
    /// Of those, the ones that were never claimed.
    never_claimed: PageSet,
    unsent: PageSet,
}

impl PageMap {
    /// Returns the map of a VM with so many pages, all of them `Zero`.
    pub fn new(pages: u64) -> Self {
        let none = PageSet::empty(pages);
        Self {
            here: none.clone(),
            missing: none.clone(),
            unclaimed: none.clone(),
            left_behind: none.clone(),
            never_claimed: none.clone(),
            unsent: none,
        }
    }

    /// Returns how many pages the VM has.
    pub fn pages(&self) -> u64 {
        self.here.capacity()
    }

    /// Returns where the newest content of `page` is.
    pub fn location(&self, page: u64) -> Location {
        if self.missing.contains(page) {
            Location::Source
        } else if self.here.contains(page) {
            Location::Here
        } else {
            Location::Zero
        }
    }

    /// Returns the pages whose location is `Source`, claimed ones among them.
    pub fn missing(&self) -> &PageSet {
        &self.missing
    }

    /// Returns the missing pages that nobody has claimed.
    pub fn unclaimed(&self) -> &PageSet {
        &self.unclaimed
    }

    /// Returns all pages that the hand-over has left behind, those that have arrived among them.
    pub fn left_behind(&self) -> &PageSet {
        &self.left_behind
    }

    // ---- at the source, before the hand-over -----------------------------------------------------

    /// Returns the pages that the destination lacks in their last state.
    pub fn unsent(&self) -> &PageSet {
        &self.unsent
    }

    /// The guest has written `pages`, or may have: they are `Here`, and unsent.
    ///
    /// # Errors
    /// [`MapError::LeftBehind`]: the guest does not run here any more.
    pub fn dirtied(&mut self, pages: &PageSet) -> Result<(), MapError> {
        none_in(pages, &self.left_behind)?;
        self.here.union_with(pages);
        self.unsent.union_with(pages);
        Ok(())
    }

    /// `pages` are free for this round: nobody needs what they hold, so they are not sent. One that
    /// the guest takes back is [dirtied](Self::dirtied) again.
    pub fn free_for_now(&mut self, pages: &PageSet) {
        self.unsent.subtract(pages);
    }

    /// `pages` are about to be sent. Until they are acknowledged they count as unsent.
    ///
    /// # Errors
    /// [`MapError::LeftBehind`].
    pub fn sending(&mut self, pages: &PageSet) -> Result<(), MapError> {
        none_in(pages, &self.left_behind)?;
        self.unsent.union_with(pages);
        Ok(())
    }

    /// The destination has `pages` as they were sent.
    ///
    /// # Errors
    /// [`MapError::NotSent`].
    pub fn acknowledged(&mut self, pages: &PageSet) -> Result<(), MapError> {
        all_in(pages, &self.unsent).map_err(MapError::NotSent)?;
        self.unsent.subtract(pages);
        Ok(())
    }

    // ---- at the destination, before the hand-over ------------------------------------------------

    /// A round has brought data for `pages`: they are `Here`.
    ///
    /// # Errors
    /// [`MapError::LeftBehind`].
    pub fn received(&mut self, pages: PageRange) -> Result<(), MapError> {
        self.none_left_behind(pages)?;
        self.here.insert_range(pages);
        Ok(())
    }

    /// A round has said that `pages` hold zeros: they are `Zero`. Returns those that were `Here`, which
    /// hold something else.
    ///
    /// # Errors
    /// [`MapError::LeftBehind`].
    pub fn zeroed(&mut self, pages: PageRange) -> Result<Vec<PageRange>, MapError> {
        self.none_left_behind(pages)?;
        let were_here = self.here.ranges_in(pages).collect();
        self.here.remove_range(pages);
        Ok(were_here)
    }

    // ---- the hand-over ---------------------------------------------------------------------------

    /// The VM is handed over without `pages`: they are at their `Source`. Can be said piece by piece, as
    /// long as no page was claimed.
    ///
    /// # Errors
    /// [`MapError::LeftBehind`], for a page that was claimed.
    pub fn leave_behind(&mut self, pages: &PageSet) -> Result<(), MapError> {
        let mut claimed = self.left_behind.clone();
        claimed.subtract(&self.unclaimed);
        none_in(pages, &claimed)?;
        self.here.subtract(pages);
        self.unsent.subtract(pages);
        for set in [&mut self.missing, &mut self.unclaimed, &mut self.left_behind, &mut self.never_claimed] {
            set.union_with(pages);
        }
        Ok(())
    }

    /// The hand-over has failed, and the guest runs on at the source: all that was left behind is `Here`
    /// again, and unsent.
    pub fn taken_back(&mut self) {
        self.here.union_with(&self.left_behind);
        self.unsent.union_with(&self.left_behind);
        for set in [&mut self.missing, &mut self.unclaimed, &mut self.left_behind, &mut self.never_claimed] {
            set.clear();
        }
    }

    // ---- after the hand-over ---------------------------------------------------------------------

    /// Somebody is about to send or install `pages`, and nobody else does.
    ///
    /// # Errors
    /// [`MapError::NotFree`].
    pub fn claim(&mut self, pages: PageRange) -> Result<(), MapError> {
        if let Some(page) = first_not_in(pages, &self.unclaimed) {
            return Err(MapError::NotFree(page));
        }
        self.unclaimed.remove_range(pages);
        self.never_claimed.remove_range(pages);
        Ok(())
    }

    /// Claims what is unclaimed of the aligned block of so many pages around `page`, if `page` is.
    /// Returns the runs of pages that were claimed.
    pub fn claim_block(&mut self, page: u64, block: u64) -> Vec<PageRange> {
        if !self.unclaimed.contains(page) {
            return Vec::new();
        }
        let around = PageRange::new(page - page % block.max(1), block.max(1));
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
        Ok(())
    }

    /// Claimed `pages` have been installed: they are `Here`.
    ///
    /// # Errors
    /// [`MapError::NotClaimed`].
    pub fn arrived(&mut self, pages: PageRange) -> Result<(), MapError> {
        self.all_claimed(pages)?;
        self.missing.remove_range(pages);
        self.here.insert_range(pages);
        Ok(())
    }

    /// The destination lacks exactly `lacking`, and what was on its way is lost. The source has to send
    /// these again; every other page that was left behind has arrived. (What is lost may still arrive
    /// after the destination has made its list.)
    ///
    /// # Errors
    /// [`MapError::NotLeftBehind`] and [`MapError::NeverSent`].
    pub fn lacking(&mut self, lacking: &PageSet) -> Result<(), MapError> {
        all_in(lacking, &self.left_behind).map_err(MapError::NotLeftBehind)?;
        all_in(&self.never_claimed, lacking).map_err(MapError::NeverSent)?;
        self.here.union_with(&self.left_behind);
        self.here.subtract(lacking);
        self.missing.clone_from(lacking);
        self.unclaimed.clone_from(lacking);
        Ok(())
    }

    /// Returns how many of the pages that were left behind were never claimed. The destination cannot
    /// have them.
    pub fn never_claimed(&self) -> u64 {
        self.never_claimed.len()
    }

    fn none_left_behind(&self, pages: PageRange) -> Result<(), MapError> {
        self.left_behind.first_in(pages).map_or(Ok(()), |page| Err(MapError::LeftBehind(page)))
    }

    fn all_claimed(&self, pages: PageRange) -> Result<(), MapError> {
        let found = [first_not_in(pages, &self.missing), self.unclaimed.first_in(pages)];
        found.into_iter().flatten().min().map_or(Ok(()), |page| Err(MapError::NotClaimed(page)))
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

fn none_in(pages: &PageSet, left_behind: &PageSet) -> Result<(), MapError> {
    let mut both = pages.clone();
    both.intersect_with(left_behind);
    both.first_from(0).map_or(Ok(()), |page| Err(MapError::LeftBehind(page)))
}

/// Returns the first of `pages` that is not in `set` as an error.
fn all_in(pages: &PageSet, set: &PageSet) -> Result<(), u64> {
    let mut others = pages.clone();
    others.subtract(set);
    others.first_from(0).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 300;
    const BLOCK: u64 = 8;

    /// What is known of one page.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Known {
        Zero,
        Here,
        /// Left behind: whether somebody has claimed it, and ever had.
        Source {
            claimed: bool,
            ever: bool,
        },
        /// Left behind, and there.
        Arrived,
    }

    /// The map as a table of pages.
    struct Model {
        known: Vec<Known>,
        unsent: Vec<bool>,
    }

    #[derive(Clone, Debug)]
    enum Change {
        Dirtied(PageRange),
        Free(PageRange),
        Sending(PageRange),
        Acknowledged(PageRange),
        Received(PageRange),
        Zeroed(PageRange),
        LeaveBehind(PageRange),
        Claim(PageRange),
        ClaimBlock(u64),
        Unclaim(PageRange),
        Arrived(PageRange),
        Lacking(PageRange),
        TakenBack,
    }

    fn set(range: PageRange) -> PageSet {
        let mut set = PageSet::empty(PAGES);
        set.insert_range(range);
        set
    }

    fn apply(map: &mut PageMap, change: &Change) -> Result<(), MapError> {
        match *change {
            Change::Dirtied(range) => map.dirtied(&set(range))?,
            Change::Free(range) => map.free_for_now(&set(range)),
            Change::Sending(range) => map.sending(&set(range))?,
            Change::Acknowledged(range) => map.acknowledged(&set(range))?,
            Change::Received(range) => map.received(range)?,
            Change::Zeroed(range) => _ = map.zeroed(range)?,
            Change::LeaveBehind(range) => map.leave_behind(&set(range))?,
            Change::Claim(range) => map.claim(range)?,
            Change::ClaimBlock(page) => _ = map.claim_block(page, BLOCK),
            Change::Unclaim(range) => map.unclaim(range)?,
            Change::Arrived(range) => map.arrived(range)?,
            Change::Lacking(range) => map.lacking(&set(range))?,
            Change::TakenBack => map.taken_back(),
        }
        Ok(())
    }

    impl Model {
        /// Returns the first page of `range` that is `bad`.
        fn find(&self, range: PageRange, bad: impl Fn(Known, bool) -> bool) -> Option<u64> {
            range.pages().find(|&page| bad(self.known[page as usize], self.unsent[page as usize]))
        }

        fn set(&mut self, range: PageRange, to: impl Fn(Known) -> Known) {
            range.pages().for_each(|page| self.known[page as usize] = to(self.known[page as usize]));
        }

        fn set_unsent(&mut self, range: PageRange, unsent: bool) {
            range.pages().for_each(|page| self.unsent[page as usize] = unsent);
        }

        fn apply(&mut self, change: &Change) -> Result<(), MapError> {
            use Known::{Arrived, Here, Source, Zero};
            let none = |found: Option<u64>, error: fn(u64) -> MapError| found.map_or(Ok(()), |page| Err(error(page)));
            let left = |known| matches!(known, Source { .. } | Arrived);
            let free = |known| matches!(known, Source { claimed: false, .. });
            let claimed = |known| matches!(known, Source { claimed: true, .. });
            match *change {
                Change::Dirtied(range) => {
                    none(self.find(range, |known, _| left(known)), MapError::LeftBehind)?;
                    self.set(range, |_| Here);
                    self.set_unsent(range, true);
                }
                Change::Free(range) => self.set_unsent(range, false),
                Change::Sending(range) => {
                    none(self.find(range, |known, _| left(known)), MapError::LeftBehind)?;
                    self.set_unsent(range, true);
                }
                Change::Acknowledged(range) => {
                    none(self.find(range, |_, unsent| !unsent), MapError::NotSent)?;
                    self.set_unsent(range, false);
                }
                Change::Received(range) => {
                    none(self.find(range, |known, _| left(known)), MapError::LeftBehind)?;
                    self.set(range, |_| Here);
                }
                Change::Zeroed(range) => {
                    none(self.find(range, |known, _| left(known)), MapError::LeftBehind)?;
                    self.set(range, |_| Zero);
                }
                Change::LeaveBehind(range) => {
                    none(self.find(range, |known, _| left(known) && !free(known)), MapError::LeftBehind)?;
                    // one that was given back counts as new
                    self.set(range, |_| Source { claimed: false, ever: false });
                    self.set_unsent(range, false);
                }
                Change::Claim(range) => {
                    none(self.find(range, |known, _| !free(known)), MapError::NotFree)?;
                    self.set(range, |_| Source { claimed: true, ever: true });
                }
                Change::ClaimBlock(page) => {
                    if free(self.known[page as usize]) {
                        let around = PageRange::new(page / BLOCK * BLOCK, BLOCK.min(PAGES - page / BLOCK * BLOCK));
                        self.set(
                            around,
                            |known| if free(known) { Source { claimed: true, ever: true } } else { known },
                        );
                    }
                }
                Change::Unclaim(range) => {
                    none(self.find(range, |known, _| !claimed(known)), MapError::NotClaimed)?;
                    self.set(range, |_| Source { claimed: false, ever: true });
                }
                Change::Arrived(range) => {
                    none(self.find(range, |known, _| !claimed(known)), MapError::NotClaimed)?;
                    self.set(range, |_| Arrived);
                }
                Change::Lacking(range) => {
                    none(self.find(range, |known, _| !left(known)), MapError::NotLeftBehind)?;
                    let never = |known| matches!(known, Source { ever: false, .. });
                    let outside = [PageRange::new(0, range.first), PageRange::new(range.end(), PAGES - range.end())];
                    let unsaid = outside.into_iter().find_map(|part| self.find(part, |known, _| never(known)));
                    none(unsaid, MapError::NeverSent)?;
                    outside
                        .into_iter()
                        .for_each(|part| self.set(part, |known| if left(known) { Arrived } else { known }));
                    self.set(range, |known| Source { claimed: false, ever: !never(known) });
                }
                Change::TakenBack => {
                    for (known, unsent) in
                        self.known.iter_mut().zip(&mut self.unsent).filter(|(known, _)| left(**known))
                    {
                        (*known, *unsent) = (Here, true);
                    }
                }
            }
            Ok(())
        }

        /// Checks that `map` says the same of every page.
        fn check(&self, map: &PageMap) -> Result<(), TestCaseError> {
            let mut never = 0;
            for page in 0..PAGES {
                let known = self.known[page as usize];
                let (location, left, free) = match known {
                    Known::Zero => (Location::Zero, false, false),
                    Known::Here => (Location::Here, false, false),
                    Known::Arrived => (Location::Here, true, false),
                    Known::Source { claimed, .. } => (Location::Source, true, !claimed),
                };
                prop_assert_eq!(map.location(page), location, "page {}", page);
                prop_assert_eq!(map.missing().contains(page), location == Location::Source, "page {}", page);
                prop_assert_eq!(map.left_behind().contains(page), left, "page {}", page);
                prop_assert_eq!(map.unclaimed().contains(page), free, "page {}", page);
                prop_assert_eq!(map.unsent().contains(page), self.unsent[page as usize], "page {}", page);
                never += u64::from(matches!(known, Known::Source { ever: false, .. }));
            }
            prop_assert_eq!(map.never_claimed(), never);
            Ok(())
        }
    }

    fn changes() -> impl Strategy<Value = Vec<Change>> {
        // few borders, so that changes meet
        let range = (0..30u64, 0..8u64)
            .prop_map(|(first, count)| PageRange::new(10 * first, (5 * count).min(PAGES - 10 * first)));
        let change = (0..13, range).prop_map(|(kind, range)| match kind {
            0 => Change::Dirtied(range),
            1 => Change::Free(range),
            2 => Change::Sending(range),
            3 => Change::Acknowledged(range),
            4 => Change::Received(range),
            5 => Change::Zeroed(range),
            6 => Change::LeaveBehind(range),
            7 => Change::Claim(range),
            8 => Change::ClaimBlock(range.first),
            9 => Change::Unclaim(range),
            10 => Change::Arrived(range),
            11 => Change::Lacking(range),
            _ => Change::TakenBack,
        });
        prop::collection::vec(change, 0..60)
    }

    proptest! {
        #[test]
        fn every_change_does_what_a_table_of_pages_says(changes in changes()) {
            let mut map = PageMap::new(PAGES);
            let mut model = Model { known: vec![Known::Zero; PAGES as usize], unsent: vec![false; PAGES as usize] };
            for change in &changes {
                prop_assert_eq!(apply(&mut map, change), model.apply(change), "{:?}", change);
                model.check(&map)?;
            }
        }

        #[test]
        fn a_run_of_zeros_names_what_has_to_be_cleared(data in 0..PAGES, zeros in 0..PAGES) {
            let mut map = PageMap::new(PAGES);
            let (data, zeros) = (PageRange::new(data, (PAGES - data).min(40)), PageRange::new(zeros, PAGES - zeros));
            map.received(data).unwrap();
            let cleared: Vec<u64> = map.zeroed(zeros).unwrap().into_iter().flat_map(PageRange::pages).collect();
            let both: Vec<u64> = data.pages().filter(|page| zeros.pages().contains(page)).collect();
            prop_assert_eq!(cleared, both);
        }
    }
}
