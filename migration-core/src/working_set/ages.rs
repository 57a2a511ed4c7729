//! How long ago each page was referenced.

use std::collections::VecDeque;

use crate::{page::PageRange, page_set::PageSet};

/// The pages that were referenced in each of the last few intervals, and so an order of all pages
/// by age.
///
/// An interval takes one bit for each page, and less where none or all pages were referenced.
///
/// ```
/// use migration_core::{PageRange, PageSet, working_set::Ages};
/// let mut ages = Ages::new(100, 2);
/// let set = |first, count| {
///     let mut set = PageSet::empty(100);
///     set.insert_range(PageRange::new(first, count));
///     set
/// };
/// ages.interval_ended(set(0, 20));
/// ages.interval_ended(set(0, 10));
/// let resident = set(0, 30);
/// // pages 20 to 29 were not referenced at all, 10 to 19 not in the last interval
/// assert_eq!(ages.coldest(&resident, 12), vec![PageRange::new(20, 10), PageRange::new(10, 2)]);
/// // what was referenced in the last interval is never cold
/// assert_eq!(ages.coldest(&resident, 100).iter().map(|run| run.count).sum::<u64>(), 20);
/// ```
#[derive(Clone, Debug)]
pub struct Ages {
    pages: u64,
    /// The number of intervals that are remembered.
    depth: usize,
    /// The pages that were referenced, the newest interval first.
    referenced: VecDeque<PageSet>,
    /// Where the search for cold pages goes on. Pages that are equally cold take turns.
    hand: u64,
}

impl Ages {
    /// Makes a record for `pages` pages that remembers `depth` intervals, at least one. So far no
    /// page was referenced.
    pub fn new(pages: u64, depth: usize) -> Self {
        Self { pages, depth: depth.max(1), referenced: VecDeque::new(), hand: 0 }
    }

    /// Adds an interval in which `referenced` were referenced, and forgets the oldest one.
    pub fn interval_ended(&mut self, referenced: PageSet) {
        self.referenced.truncate(self.depth - 1);
        self.referenced.push_front(referenced);
    }

    /// Records that `pages` were referenced in the present interval, the newest one.
    pub fn referenced(&mut self, pages: &PageSet) {
        match self.referenced.front_mut() {
            Some(newest) => newest.union_with(pages),
            None => self.referenced.push_front(pages.clone()),
        }
    }

    /// Returns the pages that were referenced in the newest interval.
    pub fn newest(&self) -> PageSet {
        self.referenced.front().cloned().unwrap_or_else(|| PageSet::empty(self.pages))
    }

    /// Returns up to `most` of `candidates`, the coldest first: those that were referenced in no
    /// interval, then those that were referenced only in the oldest one, and so on. Pages of the
    /// newest interval are left out.
    ///
    /// Among pages of the same age it goes on where the last call has ended, so that a caller that
    /// cannot evict some of them comes to the others.
    pub fn coldest(&mut self, candidates: &PageSet, most: u64) -> Vec<PageRange> {
        let (mut left, mut runs) = (most, Vec::new());
        let mut chosen = PageSet::empty(self.pages);
        // in each turn one interval less protects its pages; the newest always does
        for protecting in (1..=self.referenced.len().max(1)).rev() {
            let mut cold = candidates.clone();
            self.referenced.iter().take(protecting).for_each(|referenced| cold.subtract(referenced));
            cold.subtract(&chosen);
            for run in self.take_turns(&cold, left) {
                chosen.insert_range(run);
                left -= run.count;
                runs.push(run);
            }
            if left == 0 {
                break;
            }
        }
        runs
    }

    /// Returns the first `most` pages of `set` from the hand on, and moves the hand behind them.
    fn take_turns(&mut self, set: &PageSet, most: u64) -> Vec<PageRange> {
        let (mut left, mut runs) = (most, Vec::new());
        let hand = self.hand.min(self.pages);
        for part in [PageRange::new(hand, self.pages - hand), PageRange::new(0, hand)] {
            for run in set.ranges_in(part) {
                if left == 0 {
                    return runs;
                }
                let run = PageRange::new(run.first, run.count.min(left));
                left -= run.count;
                self.hand = run.end();
                runs.push(run);
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(runs: &[(u64, u64)]) -> PageSet {
        let mut set = PageSet::empty(1000);
        runs.iter().for_each(|&(first, count)| set.insert_range(PageRange::new(first, count)));
        set
    }

    fn runs(runs: &[(u64, u64)]) -> Vec<PageRange> {
        runs.iter().map(|&(first, count)| PageRange::new(first, count)).collect()
    }

    #[test]
    fn the_coldest_pages_come_first() {
        let mut ages = Ages::new(1000, 3);
        ages.interval_ended(set(&[(0, 900)])); // forgotten below
        ages.interval_ended(set(&[(100, 10)]));
        ages.interval_ended(set(&[(200, 10), (104, 2)]));
        ages.interval_ended(set(&[(300, 10)]));
        let resident = set(&[(100, 10), (200, 10), (300, 10), (400, 10)]);
        // never; three intervals ago; two intervals ago
        let expected = runs(&[(400, 10), (100, 4), (106, 4), (200, 10), (104, 2)]);
        let found = ages.coldest(&resident, u64::MAX);
        let sorted = |mut runs: Vec<PageRange>| {
            runs.sort_by_key(|run| run.first);
            runs
        };
        assert_eq!(found[0], PageRange::new(400, 10));
        assert_eq!(sorted(found), sorted(expected));
        ages.referenced(&set(&[(400, 10), (100, 4)]));
        assert_eq!(ages.newest(), set(&[(300, 10), (400, 10), (100, 4)]));
        assert_eq!(ages.coldest(&resident, u64::MAX)[0], PageRange::new(106, 4));
    }

    #[test]
    fn pages_of_the_same_age_take_turns() {
        let mut ages = Ages::new(1000, 2);
        let resident = set(&[(0, 3), (10, 3)]);
        assert_eq!(ages.coldest(&resident, 2), runs(&[(0, 2)]));
        assert_eq!(ages.coldest(&resident, 2), runs(&[(2, 1), (10, 1)]));
        assert_eq!(ages.coldest(&resident, 4), runs(&[(11, 2), (0, 2)]));
        assert_eq!(ages.coldest(&resident, 0), runs(&[]));
        assert_eq!(ages.coldest(&PageSet::empty(1000), 9), runs(&[]));
        // no page comes twice
        let all: u64 = ages.coldest(&resident, u64::MAX).iter().map(|run| run.count).sum();
        assert_eq!(all, 6);
    }

    #[test]
    fn nothing_known_means_that_all_are_cold() {
        let mut ages = Ages::new(10, 0);
        let all = PageSet::full(10);
        assert_eq!(ages.coldest(&all, u64::MAX), runs(&[(0, 10)]));
        ages.referenced(&all);
        assert_eq!(ages.coldest(&all, u64::MAX), runs(&[]));
        ages.interval_ended(PageSet::empty(10));
        assert_eq!(ages.coldest(&all, u64::MAX), runs(&[(0, 10)]));
    }
}
