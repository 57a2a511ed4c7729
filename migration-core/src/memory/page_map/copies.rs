//! The copies of pages in stores: which pages have one, and which copy it is.

use std::{collections::BTreeMap, sync::Arc};

use super::StoreCopy;
use crate::memory::{page::PageRange, page_set::PageSet};

/// The number of pages whose generations are in one block of 4 KiB of memory.
const LEAF_PAGES: u64 = 1024;

type Leaf = Arc<[u32; LEAF_PAGES as usize]>;

/// A set of pages, with one copy in a store for each page.
///
/// A set of pages for each entry says which entry has a page's copy. A table of generations has 4
/// bytes for each page. Blocks of the table exist only where there are pages.
#[derive(Clone, Debug)]
pub(super) struct Copies {
    pages: PageSet,
    by_entry: BTreeMap<u8, PageSet>,
    generations: BTreeMap<u64, Leaf>,
}

impl Copies {
    pub(super) fn new(pages: u64) -> Self {
        Self { pages: PageSet::empty(pages), by_entry: BTreeMap::new(), generations: BTreeMap::new() }
    }

    /// Returns all pages that have a copy.
    pub(super) fn pages(&self) -> &PageSet {
        &self.pages
    }

    /// Returns the pages that have a copy in `entry`.
    pub(super) fn of_entry(&self, entry: u8) -> PageSet {
        self.by_entry.get(&entry).cloned().unwrap_or_else(|| PageSet::empty(self.pages.capacity()))
    }

    /// Returns the runs of pages of `within` that have a copy in `entry`, in ascending order.
    pub(super) fn ranges_of(&self, entry: u8, within: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        self.by_entry.get(&entry).into_iter().flat_map(move |pages| pages.ranges_in(within))
    }

    /// Returns the entries that have pages, in ascending order, each with its pages.
    pub(super) fn entries(&self) -> impl Iterator<Item = (u8, &PageSet)> {
        self.by_entry.iter().map(|(&entry, pages)| (entry, pages))
    }

    pub(super) fn get(&self, page: u64) -> Option<StoreCopy> {
        if !self.pages.contains(page) {
            return None;
        }
        let entry = self.by_entry.iter().find_map(|(&entry, pages)| pages.contains(page).then_some(entry))?;
        Some(StoreCopy { entry, generation: self.generation(page)? })
    }

    fn generation(&self, page: u64) -> Option<u32> {
        let leaf = self.generations.get(&(page / LEAF_PAGES))?;
        leaf.get((page % LEAF_PAGES) as usize).copied()
    }

    /// Returns the runs of pages of `within` that have the same copy: the runs of one entry in
    /// ascending order, then the runs of the next entry.
    pub(super) fn runs_in(&self, within: PageRange) -> impl Iterator<Item = (PageRange, StoreCopy)> + '_ {
        let runs = self.by_entry.iter().flat_map(move |(&entry, pages)| {
            let runs = pages.ranges_in(within);
            runs.map(move |run| (entry, run))
        });
        runs.flat_map(|(entry, run)| self.split(entry, run))
    }

    /// Splits a run of pages of one entry where the generation changes.
    fn split(&self, entry: u8, run: PageRange) -> impl Iterator<Item = (PageRange, StoreCopy)> + '_ {
        let mut at = run.first;
        std::iter::from_fn(move || {
            let generation = self.generation(at).filter(|_| at < run.end())?;
            let same = (at..run.end()).take_while(|&page| self.generation(page) == Some(generation));
            let part = PageRange::new(at, same.count() as u64);
            at = part.end();
            Some((part, StoreCopy { entry, generation }))
        })
    }

    /// Sets the copy of all pages of `range`, in place of any other.
    pub(super) fn set(&mut self, range: PageRange, copy: StoreCopy) {
        let capacity = self.pages.capacity();
        let end = range.end().min(capacity);
        if range.first >= end {
            return;
        }
        let range = PageRange::new(range.first, end - range.first);
        if self.pages.first_in(range).is_some() {
            self.remove(range);
        }
        self.pages.insert_range(range);
        self.by_entry.entry(copy.entry).or_insert_with(|| PageSet::empty(capacity)).insert_range(range);
        for index in range.first / LEAF_PAGES..range.end().div_ceil(LEAF_PAGES) {
            let leaf = self.generations.entry(index).or_insert_with(|| Arc::new([0; LEAF_PAGES as usize]));
            let low = range.first.max(index * LEAF_PAGES) - index * LEAF_PAGES;
            let high = range.end().min((index + 1) * LEAF_PAGES) - index * LEAF_PAGES;
            Arc::make_mut(leaf)[low as usize..high as usize].fill(copy.generation);
        }
    }

    /// Removes the copies of all pages of `range`.
    pub(super) fn remove(&mut self, range: PageRange) {
        if self.pages.first_in(range).is_none() {
            return;
        }
        self.pages.remove_range(range);
        self.by_entry.values_mut().for_each(|pages| pages.remove_range(range));
        self.tidy(range);
    }

    /// Removes the copies of all pages of `set`.
    pub(super) fn remove_all(&mut self, set: &PageSet) {
        if self.pages.is_empty() || set.is_empty() {
            return;
        }
        self.pages.subtract(set);
        self.by_entry.values_mut().for_each(|pages| pages.subtract(set));
        self.tidy(PageRange::new(0, self.pages.capacity()));
    }

    /// Removes the entries without a page, and the blocks of the table of `changed` without a page.
    fn tidy(&mut self, changed: PageRange) {
        self.by_entry.retain(|_, pages| !pages.is_empty());
        let leaves = changed.first / LEAF_PAGES..changed.end().div_ceil(LEAF_PAGES);
        let unused = |index: &u64| self.pages.first_in(PageRange::new(index * LEAF_PAGES, LEAF_PAGES)).is_none();
        let unused: Vec<u64> = self.generations.range(leaves).map(|(&index, _)| index).filter(unused).collect();
        for index in unused {
            self.generations.remove(&index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(entry: u8, generation: u32) -> StoreCopy {
        StoreCopy { entry, generation }
    }

    #[test]
    fn a_page_has_the_copy_that_it_was_given_last() {
        let mut copies = Copies::new(5000);
        copies.set(PageRange::new(1000, 3000), copy(1, 5));
        copies.set(PageRange::new(2000, 100), copy(0, 6));
        copies.set(PageRange::new(2010, 1), copy(1, 7));
        copies.set(PageRange::new(4990, u64::MAX), copy(1, 8));
        let at = |page| copies.get(page);
        assert_eq!([at(999), at(1000), at(1999)], [None, Some(copy(1, 5)), Some(copy(1, 5))]);
        assert_eq!([at(2000), at(2010), at(2099)], [Some(copy(0, 6)), Some(copy(1, 7)), Some(copy(0, 6))]);
        assert_eq!([at(4989), at(4999), at(5000)], [None, Some(copy(1, 8)), None]);
        let runs: Vec<_> = copies.runs_in(PageRange::new(1990, 50)).collect();
        let range = PageRange::new;
        assert_eq!(
            runs,
            [
                (range(2000, 10), copy(0, 6)),
                (range(2011, 29), copy(0, 6)),
                (range(1990, 10), copy(1, 5)),
                (range(2010, 1), copy(1, 7)),
            ]
        );
        assert_eq!(copies.of_entry(0).len(), 99);
    }

    #[test]
    fn what_has_no_page_takes_no_memory() {
        let mut copies = Copies::new(1 << 20);
        copies.set(PageRange::new(100, 5000), copy(3, 5));
        assert_eq!(copies.generations.len(), 5);
        copies.remove(PageRange::new(0, 3000));
        assert_eq!(copies.generations.len(), 3);
        let mut rest = PageSet::empty(1 << 20);
        rest.insert_range(PageRange::new(2500, 1 << 19));
        copies.remove_all(&rest);
        assert!(copies.generations.is_empty() && copies.by_entry.is_empty() && copies.pages().is_empty());
    }
}
