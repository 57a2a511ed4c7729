//! The changes of pages that are in stores, or that are being put into one.

use super::{Copies, MapError, PageCopy, PageMap, StoreCopy, all_in, first_not_in};
use crate::memory::{page::PageRange, page_set::PageSet};

/// A run of consecutive pages that have the same copy in a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocatedRun {
    /// The pages.
    pub pages: PageRange,
    /// The copy of the pages.
    pub copy: StoreCopy,
    /// Whether the source has the content in RAM as well.
    pub held: bool,
}

/// The consequences of the loss of pages in an entry of the store table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryLoss {
    /// The pages that were in the entry and were held: they are now at their source.
    pub at_source: PageSet,
    /// The pages that are in no RAM, and so can come only from the entry.
    pub only_there: PageSet,
}

/// Queries.
impl PageMap {
    /// Returns the current copy of `page`, or `None` if no store has one. The page may be in RAM as
    /// well.
    pub fn copy(&self, page: u64) -> Option<StoreCopy> {
        self.copies.get(page)
    }

    /// Returns all pages that have a current copy in a store, including those that are in RAM as
    /// well.
    pub fn with_copies(&self) -> &PageSet {
        self.copies.pages()
    }

    /// Returns the pages whose location is a store.
    pub fn in_store(&self) -> &PageSet {
        &self.in_store
    }

    /// Returns the pages whose location is a store and that are not claimed.
    pub fn unfetched(&self) -> &PageSet {
        &self.unfetched
    }

    /// Returns the number of pages whose location is `Source`.
    pub fn at_source(&self) -> u64 {
        self.missing.len() - self.in_store.len()
    }

    /// Returns the pages whose location is `Source`.
    pub fn source_pages(&self) -> PageSet {
        let mut pages = self.missing.clone();
        pages.subtract(&self.in_store);
        pages
    }

    /// Returns whether the source has the content of the missing `page` in RAM.
    pub fn is_held(&self, page: u64) -> bool {
        self.missing.contains(page) && (!self.in_store.contains(page) || self.held.contains(page))
    }

    /// Returns the pages that are being put into a store.
    pub fn being_put(&self) -> &PageSet {
        self.puts.pages()
    }

    /// Returns the number of pages that have a current copy in `entry`.
    pub fn copies_in(&self, entry: u8) -> u64 {
        self.copies.entries().find(|(other, _)| *other == entry).map_or(0, |(_, pages)| pages.len())
    }

    /// Returns the numbers of the entries that have a current copy of some page, in ascending
    /// order.
    pub fn entries(&self) -> Vec<u8> {
        self.copies.entries().map(|(entry, _)| entry).collect()
    }

    /// Returns each entry of the store table that has missing pages, with the number of those
    /// pages.
    pub fn stored_pages(&self) -> Vec<(u8, u64)> {
        let missing = |pages: &PageSet| {
            let mut missing = pages.clone();
            missing.intersect_with(&self.in_store);
            missing.len()
        };
        self.copies.entries().map(|(entry, pages)| (entry, missing(pages))).filter(|(_, pages)| *pages > 0).collect()
    }

    /// Returns the entries on which a held page depends. They have to be intact before the source
    /// may free its RAM (rule 17).
    pub fn depends_on(&self) -> Vec<u8> {
        let depends = |pages: &PageSet| {
            let mut held = pages.clone();
            held.intersect_with(&self.held);
            !held.is_empty()
        };
        self.copies.entries().filter(|(_, pages)| depends(pages)).map(|(entry, _)| entry).collect()
    }

    /// Returns the numbers of the entries that have lost pages, in ascending order.
    pub fn lost_entries(&self) -> Vec<u8> {
        self.lost.iter().copied().collect()
    }

    /// Returns the pages that have a copy in a store and whose present location, or whether they
    /// are held, is not announced to the destination (rule 16).
    pub fn unannounced(&self) -> &PageSet {
        &self.unannounced
    }

    /// Returns the locations of `pages` in stores as runs: the runs of one entry in ascending
    /// order, then the runs of the next entry. Pages without a copy are left out.
    pub fn located_runs(&self, pages: &PageSet) -> Vec<LocatedRun> {
        let mut runs = Vec::new();
        for (_, of_entry) in self.copies.entries() {
            let mut wanted = of_entry.clone();
            wanted.intersect_with(pages);
            for range in wanted.ranges() {
                for (run, copy) in self.copies.runs_in(range) {
                    self.split_by_held(run, copy, &mut runs);
                }
            }
        }
        runs
    }

    fn split_by_held(&self, run: PageRange, copy: StoreCopy, runs: &mut Vec<LocatedRun>) {
        let holds = |page| self.here.contains(page) || self.held.contains(page);
        let mut first = run.first;
        while first < run.end() {
            let held = holds(first);
            let same = (first..run.end()).take_while(|&page| holds(page) == held);
            let pages = PageRange::new(first, same.count() as u64);
            runs.push(LocatedRun { pages, copy, held });
            first = pages.end();
        }
    }

    /// Returns the runs of `within` that [`claim`](Self::claim) or
    /// [`claim_stored`](Self::claim_stored) would accept for `copy`, at most `most` of them, in
    /// ascending order.
    pub fn free_runs(&self, within: PageRange, copy: PageCopy, most: usize) -> Vec<PageRange> {
        match copy {
            PageCopy::Source if self.in_store.first_in(within).is_none() => {
                self.unclaimed.ranges_in(within).take(most).collect()
            }
            PageCopy::Source => self.free_from_source(within).ranges_in(within).take(most).collect(),
            PageCopy::Store(copy) => {
                let runs = self.unfetched.ranges_in(within).flat_map(|run| self.copies.runs_in(run));
                runs.filter(|&(_, other)| other == copy).map(|(run, _)| run).take(most).collect()
            }
        }
    }

    /// Returns the first `most` pages of `within` that are in a store and not claimed, with their
    /// copies.
    pub fn unfetched_runs(&self, within: PageRange, most: u64) -> Vec<(PageRange, StoreCopy)> {
        let mut left = most;
        let mut runs = Vec::new();
        for range in self.unfetched.ranges_in(within) {
            let range = PageRange::new(range.first, range.count.min(left));
            runs.extend(self.copies.runs_in(range));
            left -= range.count;
            if left == 0 {
                break;
            }
        }
        runs
    }

    /// Returns the first page at or after `from` that is in `entry` and not claimed.
    pub fn first_unfetched(&self, entry: u8, from: u64) -> Option<u64> {
        let rest = PageRange::new(from, self.pages().saturating_sub(from));
        self.copies.ranges_of(entry, rest).find_map(|run| self.unfetched.first_in(run))
    }

    /// Returns the first `most` pages of `within` that are in `entry` and not claimed, with their
    /// copies, in ascending order.
    pub fn unfetched_in(&self, entry: u8, within: PageRange, most: u64) -> Vec<(PageRange, StoreCopy)> {
        let mut left = most;
        let mut runs = Vec::new();
        for range in self.copies.ranges_of(entry, within).flat_map(|run| self.unfetched.ranges_in(run)) {
            if left == 0 {
                break;
            }
            let range = PageRange::new(range.first, range.count.min(left));
            runs.extend(self.copies.runs_in(range));
            left -= range.count;
        }
        runs
    }

    /// Returns the missing pages in `entry` that the source has in RAM as well.
    pub fn held_in(&self, entry: u8) -> PageSet {
        let mut pages = self.copies.of_entry(entry);
        pages.intersect_with(&self.held);
        pages
    }

    /// Returns whether a missing page of `within` is claimed.
    pub fn is_claimed_in(&self, within: PageRange) -> bool {
        let free = |run| {
            let sets = [&self.unclaimed, &self.unfetched, self.puts.pages()];
            sets.into_iter().map(|set| set.count_in(run)).sum::<u64>()
        };
        self.missing.ranges_in(within).any(|run| free(run) < run.count)
    }

    /// Returns the missing pages of `within` that are not claimed and of which the source has the
    /// newest content.
    pub(super) fn free_from_source(&self, within: PageRange) -> PageSet {
        let mut free = PageSet::empty(self.pages());
        let held = self.unfetched.ranges_in(within).flat_map(|run| self.held.ranges_in(run));
        self.unclaimed.ranges_in(within).chain(held).for_each(|run| free.insert_range(run));
        free
    }

    /// Returns the pages of `around` that the source can send, including those that are in a store
    /// or are being put into one.
    pub(super) fn answerable(&self, around: PageRange) -> PageSet {
        let mut free = self.free_from_source(around);
        for run in self.puts.pages().ranges_in(around) {
            self.missing.ranges_in(run).for_each(|run| free.insert_range(run));
        }
        free
    }

    pub(super) fn with_copy(&self, pages: &PageSet) -> PageSet {
        let mut both = pages.clone();
        both.intersect_with(self.copies.pages());
        both
    }

    /// Returns the runs of `range` that are at their source and that are not being put into a
    /// store.
    fn source_runs(&self, range: PageRange) -> Vec<PageRange> {
        let mut runs = Vec::new();
        for run in self.missing.ranges_in(range) {
            let mut at = run.first;
            while at < run.end() {
                let rest = PageRange::new(at, run.end() - at);
                let others = [&self.in_store, self.puts.pages()];
                let next = others.iter().filter_map(|set| set.first_in(rest)).min().unwrap_or(run.end());
                if next > at {
                    runs.push(PageRange::new(at, next - at));
                }
                let other = others.iter().find_map(|set| set.run_at(next, run.end().saturating_sub(next)));
                at = other.map_or(run.end(), PageRange::end);
            }
        }
        runs
    }
}

/// Puts, and their announcement to the destination.
impl PageMap {
    /// Records that a thread is about to put `pages` into a store, as `copy`. Until the put has
    /// ended, no other thread puts them, and no push order chooses them. A demand for them is
    /// answered all the same (rule 1).
    ///
    /// # Errors
    /// Returns [`MapError::CannotBePut`] unless every page is `Here`, or at its source and
    /// unclaimed, and is not being put already. Returns [`MapError::EntryLost`] if the entry has
    /// lost pages.
    pub fn put_started(&mut self, pages: PageRange, copy: StoreCopy) -> Result<(), MapError> {
        if self.lost.contains(&copy.entry) {
            return Err(MapError::EntryLost(copy.entry));
        }
        let mut at = pages.first;
        while at < pages.end() {
            let rest = pages.end() - at;
            let run = self.here.run_at(at, rest).or_else(|| self.unclaimed.run_at(at, rest));
            let Some(run) = run else { return Err(MapError::CannotBePut(at)) };
            if let Some(page) = self.puts.pages().first_in(run) {
                return Err(MapError::CannotBePut(page));
            }
            at = run.end();
        }
        self.puts.set(pages, copy);
        self.unclaimed.remove_range(pages);
        Ok(())
    }

    /// Records that all stores of the entry have acknowledged `copy` of `pages`. This counts for
    /// the pages that are still claimed for this put (rule 10): those that were neither written nor
    /// demanded since it started. Returns these pages. They are in the store, held, and not
    /// announced yet.
    pub fn put_done(&mut self, pages: PageRange, copy: StoreCopy) -> Vec<PageRange> {
        if self.lost.contains(&copy.entry) {
            return Vec::new();
        }
        let runs = Self::of_put(&self.puts, pages, copy);
        for &run in &runs {
            self.puts.remove(run);
            self.copies.set(run, copy);
            let missing: Vec<_> = self.missing.ranges_in(run).collect();
            for run in missing {
                for set in [&mut self.in_store, &mut self.held, &mut self.unfetched] {
                    set.insert_range(run);
                }
            }
            self.unsent.remove_range(run);
            self.delivered.remove_range(run);
            self.unannounced.insert_range(run);
        }
        runs
    }

    /// Records that a put of `copy` has failed, or that its outcome is unknown. Returns the pages
    /// that were still claimed for it. They can be claimed again (rule 1).
    pub fn put_failed(&mut self, pages: PageRange, copy: StoreCopy) -> Vec<PageRange> {
        let runs = Self::of_put(&self.puts, pages, copy);
        for &run in &runs {
            self.puts.remove(run);
            let missing: Vec<_> = self.missing.ranges_in(run).collect();
            missing.into_iter().for_each(|run| self.unclaimed.insert_range(run));
        }
        runs
    }

    /// Records that `pages` were to be put as `copy`, and were found to hold zeros, which are not
    /// put into a store (rule 3). Returns the pages that are still claimed for this put and are
    /// within the guest's reach: they are `Zero`, and not unsent. Allowed only while no page was
    /// sent and no location announced to any destination: a destination that begins with empty RAM
    /// then has these pages as they are.
    pub fn put_found_zeros(&mut self, pages: PageRange, copy: StoreCopy) -> Vec<PageRange> {
        let mut zeros = PageSet::empty(self.pages());
        Self::of_put(&self.puts, pages, copy).into_iter().for_each(|run| zeros.insert_range(run));
        zeros.intersect_with(&self.here);
        zeros.subtract(&self.evicting);
        let runs: Vec<_> = zeros.ranges().collect();
        for &run in &runs {
            self.forget_locations(run);
        }
        self.here.subtract(&zeros);
        self.unsent.subtract(&zeros);
        runs
    }

    fn of_put(puts: &Copies, pages: PageRange, copy: StoreCopy) -> Vec<PageRange> {
        puts.runs_in(pages).filter(|&(_, other)| other == copy).map(|(run, _)| run).collect()
    }

    /// Records that the locations of `pages` were announced to the destination.
    pub fn announced(&mut self, pages: &PageSet) {
        self.unannounced.subtract(pages);
        let known = self.with_copy(pages);
        self.never_claimed.subtract(&known);
        self.looked_up.union_with(&known);
    }

    /// Records that nothing is announced to the destination, and that it has no page: a new attempt
    /// begins, or the data sent before *run* may be lost (rule 18). Pages that are `Here` and have
    /// no copy in a store are unsent.
    pub fn nothing_announced(&mut self) {
        self.delivered.clear();
        self.looked_up.clear();
        self.unannounced.clone_from(self.copies.pages());
        let mut unsent = self.here.clone();
        unsent.subtract(self.copies.pages());
        self.unsent.union_with(&unsent);
    }
}

/// Locations at the destination.
impl PageMap {
    /// Records the source's announcement that `pages` are in a store. Before the hand-over the
    /// announcement replaces any state of these pages. From the hand-over on it changes only pages
    /// that are at their source (rule 2); in an entry that has lost pages, only those of them that
    /// are not held. Returns the pages that it has changed: a thread that waits for one of them has
    /// to ask the store.
    pub fn located(&mut self, pages: PageRange, copy: StoreCopy, held: bool) -> Vec<PageRange> {
        let end = pages.end().min(self.pages());
        let pages = PageRange::new(pages.first, end.saturating_sub(pages.first));
        let runs = if !self.handed_over {
            self.forget_locations(pages);
            self.here.remove_range(pages);
            self.evicting.remove_range(pages);
            self.missing.insert_range(pages);
            self.unfetched.insert_range(pages);
            vec![pages]
        } else if held && self.lost.contains(&copy.entry) {
            Vec::new()
        } else {
            self.source_runs(pages)
        };
        for &run in &runs {
            self.copies.set(run, copy);
            self.in_store.insert_range(run);
            if held {
                self.held.insert_range(run);
            }
            let unclaimed: Vec<_> = self.unclaimed.ranges_in(run).collect();
            for run in unclaimed {
                self.unclaimed.remove_range(run);
                self.unfetched.insert_range(run);
            }
        }
        runs
    }

    /// Claims `pages` for the calling thread, which is about to install them from `copy`, as a
    /// store has returned it.
    ///
    /// # Errors
    /// Returns [`MapError::NotFree`] if a page cannot be claimed, also if its newest content is
    /// elsewhere by now.
    pub fn claim_stored(&mut self, pages: PageRange, copy: StoreCopy) -> Result<(), MapError> {
        let other = self.copies.runs_in(pages).filter(|&(_, other)| other != copy).map(|(run, _)| run.first);
        let wrong = other.chain(first_not_in(pages, &self.unfetched)).min();
        if let Some(page) = wrong {
            return Err(MapError::NotFree(page));
        }
        self.unfetched.remove_range(pages);
        Ok(())
    }

    /// Records that the VM does not need its source any more: no page is held. From now on missing
    /// pages are requested from stores (rule 17).
    ///
    /// # Errors
    /// Returns [`MapError::AtSource`] if a page is only at the source.
    pub fn released(&mut self) -> Result<(), MapError> {
        all_in(&self.missing, &self.in_store).map_err(MapError::AtSource)?;
        self.held.clear();
        Ok(())
    }
}

/// Returns of pages to RAM, and losses of entries.
impl PageMap {
    /// Records that the claimed `pages` were read back from their stores. They are `Here`, and
    /// their copies are current until the guest writes the pages.
    ///
    /// # Errors
    /// Returns [`MapError::NotClaimed`] if a page is not claimed, and [`MapError::NoCopy`] if a
    /// page is not in a store.
    pub fn returned(&mut self, pages: PageRange) -> Result<(), MapError> {
        self.all_claimed(pages)?;
        first_not_in(pages, &self.in_store).map_or(Ok(()), |page| Err(MapError::NoCopy(page)))?;
        for set in [&mut self.missing, &mut self.in_store, &mut self.held] {
            set.remove_range(pages);
        }
        self.here.insert_range(pages);
        self.held_has_changed(pages);
        Ok(())
    }

    pub(super) fn held_has_changed(&mut self, pages: PageRange) {
        self.unannounced.insert_range(pages);
        for run in self.delivered.ranges_in(pages) {
            self.unannounced.remove_range(run);
        }
    }

    /// Records that the entry has lost pages, or may have lost some (rules 11 and 13). Its copies
    /// of pages that are in RAM do not count any more. Pages that the source holds are at their
    /// `Source` again, and pages that are `Here` are unsent. Puts into the entry are given up, and
    /// no new put starts.
    pub fn entry_lost(&mut self, entry: u8) -> EntryLoss {
        self.lost.insert(entry);
        let puts = self.puts.of_entry(entry);
        self.puts.remove_all(&puts);
        let mut free = puts;
        free.intersect_with(&self.missing);
        self.unclaimed.union_with(&free);

        let pages = self.copies.of_entry(entry);
        let mut only_there = pages.clone();
        only_there.intersect_with(&self.in_store);
        only_there.subtract(&self.held);
        let mut at_source = pages.clone();
        at_source.intersect_with(&self.held);
        let mut unsent = pages;
        unsent.subtract(&self.in_store);
        let mut gone = unsent.clone();
        gone.union_with(&at_source);
        unsent.subtract(&self.delivered);
        unsent.subtract(&self.missing_at_hand_over);
        self.unsent.union_with(&unsent);
        self.copies.remove_all(&gone);
        self.unannounced.subtract(&gone);
        self.delivered.subtract(&gone);
        let mut unclaimed = at_source.clone();
        unclaimed.intersect_with(&self.unfetched);
        self.unclaimed.union_with(&unclaimed);
        for set in [&mut self.in_store, &mut self.unfetched, &mut self.held] {
            set.subtract(&at_source);
        }
        EntryLoss { at_source, only_there }
    }

    /// Records that the entry has a new, empty namespace: pages can be put into it again. The
    /// meaning of the entry's number may change only while no destination knows it (rule 15).
    ///
    /// # Errors
    /// Returns [`MapError::EntryLost`] if a page still has its copy in the entry: the entry may
    /// have the only copy of it.
    pub fn entry_reopened(&mut self, entry: u8) -> Result<(), MapError> {
        if self.copies.entries().any(|(other, _)| other == entry) {
            return Err(MapError::EntryLost(entry));
        }
        self.lost.remove(&entry);
        Ok(())
    }

    /// Records that the destination has asked for `pages` once more, while the link is up. The
    /// source sends them again, or announces once more in which store they are.
    ///
    /// # Errors
    /// Returns [`MapError::NotLeftBehind`] if the source can neither send a page nor locate it.
    pub fn lacks(&mut self, pages: &PageSet) -> Result<(), MapError> {
        self.may_lack(pages)?;
        self.sent_again(pages);
        Ok(())
    }

    /// Checks that the source can send `pages`, or announce where they are.
    pub(super) fn may_lack(&self, pages: &PageSet) -> Result<(), MapError> {
        let mut can_come = self.missing_at_hand_over.clone();
        if !self.in_store.is_empty() {
            let mut only_in_store = self.in_store.clone();
            only_in_store.subtract(&self.held);
            can_come.subtract(&only_in_store);
        }
        all_in(pages, &can_come).map_err(MapError::NotLeftBehind)
    }

    pub(super) fn sent_again(&mut self, pages: &PageSet) {
        let mut stored = pages.clone();
        stored.intersect_with(&self.in_store);
        self.unannounced.union_with(&stored);
        self.unfetched.union_with(&stored);
        let mut at_source = pages.clone();
        at_source.subtract(&stored);
        if !self.puts.pages().is_empty() {
            let mut puts = self.puts.pages().clone();
            puts.intersect_with(&self.missing);
            at_source.subtract(&puts);
        }
        self.drop_copies(&at_source);
        self.here.subtract(&at_source);
        self.evicting.subtract(&at_source);
        self.missing.union_with(&at_source);
        self.unclaimed.union_with(&at_source);
    }
}

/// Helpers of the changes above.
impl PageMap {
    /// Removes all copies of `pages`, and the puts of them. Does not change their locations.
    pub(super) fn drop_copies(&mut self, pages: &PageSet) {
        if self.copies.pages().is_empty() && self.puts.pages().is_empty() {
            return;
        }
        self.copies.remove_all(pages);
        self.puts.remove_all(pages);
        self.unannounced.subtract(pages);
        self.delivered.subtract(pages);
    }

    /// Removes `pages` from all stores.
    pub(super) fn forget_copies(&mut self, pages: PageRange) {
        if self.copies.pages().first_in(pages).is_none() {
            return;
        }
        self.copies.remove(pages);
        let sets =
            [&mut self.in_store, &mut self.unfetched, &mut self.held, &mut self.unannounced, &mut self.delivered];
        sets.into_iter().for_each(|set| set.remove_range(pages));
    }

    /// Makes `pages` neither missing nor in a store.
    pub(super) fn forget_locations(&mut self, pages: PageRange) {
        self.forget_copies(pages);
        self.puts.remove(pages);
        self.missing.remove_range(pages);
        self.unclaimed.remove_range(pages);
    }

    /// Applies the hand-over to pages in stores. Pages with a copy are missing, unless the
    /// destination has them. Those that were `Here` are held.
    pub(super) fn leave_in_stores(&mut self) {
        if self.copies.pages().is_empty() {
            return;
        }
        let mut stored = self.copies.pages().clone();
        stored.subtract(&self.delivered);
        self.unsent.subtract(&stored);
        self.missing_at_hand_over.union_with(&stored);
        let mut held = stored;
        held.intersect_with(&self.here);
        self.here.subtract(&held);
        self.puts.remove_all(&held);
        for set in [&mut self.missing, &mut self.in_store, &mut self.unfetched, &mut self.held] {
            set.union_with(&held);
        }
    }
}
