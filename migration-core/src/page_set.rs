//! Sets of pages, as bitmaps over a [`RamLayout`](crate::RamLayout)'s page numbers.

use std::fmt;

use crate::page::PageRange;

const BITS: u64 = u64::BITS as u64;

/// A set of pages of a VM with a given number of pages; one bit a page.
///
/// Numbers at or beyond [`capacity`](PageSet::capacity) are never members: inserting one does nothing, so that a
/// number from outside can do no harm.
///
/// ```
/// use migration_core::{PageRange, PageSet};
/// let mut dirty = PageSet::empty(1000);
/// dirty.insert_range(PageRange::new(10, 5));
/// dirty.remove(12);
/// assert_eq!(dirty.len(), 4);
/// let runs: Vec<_> = dirty.ranges().map(|r| (r.first, r.count)).collect();
/// assert_eq!(runs, [(10, 2), (13, 2)]);
/// ```
#[derive(Default, Clone, PartialEq, Eq)]
pub struct PageSet {
    /// Bits at or beyond `capacity` are always zero.
    words: Vec<u64>,
    capacity: u64,
}

impl PageSet {
    /// The set without a page, of a VM with `capacity` pages.
    pub fn empty(capacity: u64) -> Self {
        Self { words: vec![0; capacity.div_ceil(BITS) as usize], capacity }
    }

    /// The set of all `capacity` pages.
    pub fn full(capacity: u64) -> Self {
        let mut set = Self { words: vec![u64::MAX; capacity.div_ceil(BITS) as usize], capacity };
        set.trim();
        set
    }

    /// How many pages the VM has: members are below this number.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// How many pages are in the set. Takes time in proportion to the capacity.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&w| w == 0)
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        page < self.capacity && self.words[(page / BITS) as usize] >> (page % BITS) & 1 != 0
    }

    /// Adds `page`; says whether it was added (in range, and not a member before).
    pub fn insert(&mut self, page: u64) -> bool {
        let new = page < self.capacity && !self.contains(page);
        if new {
            self.words[(page / BITS) as usize] |= 1 << (page % BITS);
        }
        new
    }

    /// Takes `page` out; says whether it was a member.
    pub fn remove(&mut self, page: u64) -> bool {
        let old = self.contains(page);
        if old {
            self.words[(page / BITS) as usize] &= !(1 << (page % BITS));
        }
        old
    }

    /// Adds every page of `range` (as far as it is in range).
    pub fn insert_range(&mut self, range: PageRange) {
        self.for_masks(range, |word, mask| *word |= mask);
    }

    /// Takes every page of `range` out.
    pub fn remove_range(&mut self, range: PageRange) {
        self.for_masks(range, |word, mask| *word &= !mask);
    }

    /// How many pages of `range` are members.
    pub fn count_in(&self, range: PageRange) -> u64 {
        masks(range, self.capacity).map(|(i, mask)| u64::from((self.words[i] & mask).count_ones())).sum()
    }

    /// Takes every page out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds every page of `other`. Members of `other` beyond this set's capacity are left out.
    pub fn union_with(&mut self, other: &PageSet) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a |= b;
        }
        self.trim();
    }

    /// Takes every page of `other` out.
    pub fn subtract(&mut self, other: &PageSet) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a &= !b;
        }
    }

    /// Keeps only pages that are in `other` too.
    pub fn intersect_with(&mut self, other: &PageSet) {
        for (i, a) in self.words.iter_mut().enumerate() {
            *a &= other.words.get(i).copied().unwrap_or(0);
        }
    }

    /// The pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.ranges().flat_map(PageRange::pages)
    }

    /// The maximal runs of pages, ascending.
    pub fn ranges(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.ranges_in(PageRange::new(0, self.capacity))
    }

    /// The maximal runs of pages inside `within`, ascending.
    pub fn ranges_in(&self, within: PageRange) -> impl Iterator<Item = PageRange> + '_ {
        let (mut at, end) = (within.first, within.end().min(self.capacity));
        std::iter::from_fn(move || {
            let first = self.next(at, end, true)?;
            let stop = self.next(first, end, false).unwrap_or(end);
            at = stop;
            Some(PageRange::new(first, stop - first))
        })
    }

    /// The first page of `within` that is in the set.
    pub fn first_in(&self, within: PageRange) -> Option<u64> {
        self.next(within.first, within.end().min(self.capacity), true)
    }

    /// The last page of `within` that is in the set.
    pub fn last_in(&self, within: PageRange) -> Option<u64> {
        self.previous(within.end().min(self.capacity), within.first, true)
    }

    /// The first page of the set at or after `page`.
    pub fn first_from(&self, page: u64) -> Option<u64> {
        self.next(page, self.capacity, true)
    }

    /// The last page of the set before `page`.
    pub fn last_below(&self, page: u64) -> Option<u64> {
        self.previous(page.min(self.capacity), 0, true)
    }

    /// The run of pages that begins with `page`, `most` pages of it if it is longer; `None` if `page` is not in the
    /// set, or `most` is 0.
    ///
    /// ```
    /// use migration_core::{PageRange, PageSet};
    /// let mut set = PageSet::empty(100);
    /// set.insert_range(PageRange::new(10, 20));
    /// assert_eq!(set.run_at(25, 64), Some(PageRange::new(25, 5)));
    /// assert_eq!(set.run_before(25, 8), Some(PageRange::new(17, 8)));
    /// assert_eq!(set.run_at(30, 64), None);
    /// ```
    pub fn run_at(&self, page: u64, most: u64) -> Option<PageRange> {
        if most == 0 || !self.contains(page) {
            return None;
        }
        let end = page.saturating_add(most).min(self.capacity);
        let stop = self.next(page, end, false).unwrap_or(end);
        Some(PageRange::new(page, stop - page))
    }

    /// The run of pages whose last one is just below `page`, the last `most` pages of it if it is longer; `None` if
    /// `page - 1` is not in the set, or `most` is 0.
    pub fn run_before(&self, page: u64, most: u64) -> Option<PageRange> {
        if most == 0 || !page.checked_sub(1).is_some_and(|last| self.contains(last)) {
            return None;
        }
        let start = page.saturating_sub(most);
        let first = self.previous(page, start, false).map_or(start, |gap| gap + 1);
        Some(PageRange::new(first, page - first))
    }

    /// The bits of 64 pages a word, page 0 in bit 0 of word 0.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Adds the pages of a bitmap whose bit 0 is page `first`, for `count` pages: the form in which KVM returns the
    /// dirty log of a memory slot. Bits beyond `count`, and words missing in `bitmap`, are not looked at.
    pub fn insert_bitmap(&mut self, first: u64, count: u64, bitmap: &[u64]) {
        let count = count.min(self.capacity.saturating_sub(first));
        let (start, shift) = ((first / BITS) as usize, first % BITS);
        for (i, &word) in bitmap.iter().enumerate() {
            let left = count.saturating_sub(i as u64 * BITS);
            if left == 0 {
                break;
            }
            let word = if left < BITS { word & ((1 << left) - 1) } else { word };
            if word == 0 {
                continue;
            }
            self.words[start + i] |= word << shift;
            if shift != 0 && word >> (BITS - shift) != 0 {
                self.words[start + i + 1] |= word >> (BITS - shift);
            }
        }
    }

    /// The smallest number at or after `at`, below `end`, whose membership is `member`.
    fn next(&self, at: u64, end: u64, member: bool) -> Option<u64> {
        if at >= end {
            return None;
        }
        let flip = if member { 0 } else { u64::MAX };
        let mut index = (at / BITS) as usize;
        let mut word = (self.words[index] ^ flip) & (u64::MAX << (at % BITS));
        loop {
            if word != 0 {
                let found = index as u64 * BITS + u64::from(word.trailing_zeros());
                return (found < end).then_some(found);
            }
            index += 1;
            if index as u64 * BITS >= end {
                return None;
            }
            word = self.words[index] ^ flip;
        }
    }

    /// The largest number at or after `from`, below `before` (at most the capacity), whose membership is `member`.
    fn previous(&self, before: u64, from: u64, member: bool) -> Option<u64> {
        if from >= before {
            return None;
        }
        let flip = if member { 0 } else { u64::MAX };
        let last = before - 1;
        let mut index = (last / BITS) as usize;
        let mut word = (self.words[index] ^ flip) & (u64::MAX >> (BITS - 1 - last % BITS));
        loop {
            if word != 0 {
                let found = index as u64 * BITS + (BITS - 1 - u64::from(word.leading_zeros()));
                return (found >= from).then_some(found);
            }
            if index as u64 * BITS <= from {
                return None;
            }
            index -= 1;
            word = self.words[index] ^ flip;
        }
    }

    fn for_masks(&mut self, range: PageRange, mut change: impl FnMut(&mut u64, u64)) {
        for (i, mask) in masks(range, self.capacity) {
            change(&mut self.words[i], mask);
        }
    }

    fn trim(&mut self) {
        let used = self.capacity % BITS;
        if let Some(last) = self.words.last_mut().filter(|_| used != 0) {
            *last &= (1 << used) - 1;
        }
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} of {}:", self.len(), self.capacity)?;
        for r in self.ranges().take(8) {
            write!(f, " {}+{}", r.first, r.count)?;
        }
        f.write_str(if self.ranges().nth(8).is_some() { " …)" } else { ")" })
    }
}

/// The words that `range` touches below `capacity`, each with the mask of its bits in the range.
fn masks(range: PageRange, capacity: u64) -> impl Iterator<Item = (usize, u64)> {
    let (first, end) = (range.first.min(capacity), range.end().min(capacity));
    (first / BITS..end.div_ceil(BITS)).filter_map(move |i| {
        let low = first.saturating_sub(i * BITS);
        let high = (end - i * BITS).min(BITS);
        (low < high).then(|| {
            let upto = if high == BITS { u64::MAX } else { (1 << high) - 1 };
            (i as usize, upto & (u64::MAX << low))
        })
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn build(capacity: u64, ranges: &[(u64, u64)]) -> (PageSet, BTreeSet<u64>) {
        let (mut set, mut model) = (PageSet::empty(capacity), BTreeSet::new());
        for &(first, count) in ranges {
            set.insert_range(PageRange::new(first, count));
            model.extend((first..first + count).filter(|&p| p < capacity));
        }
        (set, model)
    }

    fn ranges() -> impl Strategy<Value = Vec<(u64, u64)>> {
        prop::collection::vec((0u64..400, 0u64..150), 0..6)
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(capacity in 0u64..500, a in ranges(), b in ranges(), probe in 0u64..600) {
            let (set_a, model_a) = build(capacity, &a);
            let (set_b, model_b) = build(capacity, &b);
            prop_assert_eq!(set_a.len(), model_a.len() as u64);
            prop_assert_eq!(set_a.contains(probe), model_a.contains(&probe));
            prop_assert!(set_a.iter().eq(model_a.iter().copied()));
            let (mut or, mut minus, mut and) = (set_a.clone(), set_a.clone(), set_a.clone());
            or.union_with(&set_b);
            minus.subtract(&set_b);
            and.intersect_with(&set_b);
            prop_assert!(or.iter().eq(model_a.union(&model_b).copied()));
            prop_assert!(minus.iter().eq(model_a.difference(&model_b).copied()));
            prop_assert!(and.iter().eq(model_a.intersection(&model_b).copied()));
            let within = PageRange::new(probe / 2, 90);
            prop_assert_eq!(set_a.count_in(within), model_a.range(within.pages()).count() as u64);
            prop_assert!(set_a.ranges_in(within).flat_map(PageRange::pages)
                .eq(model_a.range(within.pages()).copied()));
        }

        #[test]
        fn runs_are_maximal(capacity in 1u64..500, a in ranges()) {
            let (set, _) = build(capacity, &a);
            let runs: Vec<_> = set.ranges().collect();
            prop_assert!(runs.windows(2).all(|w| w[0].end() < w[1].first));
            prop_assert!(runs.iter().all(|r| r.count > 0));
        }

        #[test]
        fn finds_what_a_set_finds(
            capacity in 0u64..500, a in ranges(), page in 0u64..600, count in 0u64..200, far in any::<u64>(),
        ) {
            let (set, model) = build(capacity, &a);
            for page in [page, far] {
                prop_assert_eq!(set.first_from(page), model.range(page..).next().copied());
                prop_assert_eq!(set.last_below(page), model.range(..page).next_back().copied());
                let within = PageRange::new(page, count);
                prop_assert_eq!(set.first_in(within), model.range(within.pages()).next().copied());
                prop_assert_eq!(set.last_in(within), model.range(within.pages()).next_back().copied());
                let up = (page..page.saturating_add(count)).take_while(|p| model.contains(p)).count() as u64;
                prop_assert_eq!(set.run_at(page, count), (up > 0).then(|| PageRange::new(page, up)));
                let down = (page.saturating_sub(count)..page).rev().take_while(|p| model.contains(p)).count() as u64;
                prop_assert_eq!(set.run_before(page, count), (down > 0).then(|| PageRange::new(page - down, down)));
            }
        }

        #[test]
        fn bitmaps_land_at_their_offset(first in 0u64..200, count in 0u64..200, words in prop::collection::vec(any::<u64>(), 0..5)) {
            let mut set = PageSet::empty(300);
            set.insert_bitmap(first, count, &words);
            for page in 0..300u64 {
                let bit = page.checked_sub(first).filter(|&b| b < count);
                let want = bit.is_some_and(|b| words.get((b / 64) as usize).is_some_and(|w| w >> (b % 64) & 1 != 0));
                prop_assert_eq!(set.contains(page), want, "page {}", page);
            }
        }
    }

    #[test]
    fn full_has_all_and_no_more() {
        for n in [0, 1, 63, 64, 65, 1000] {
            let mut set = PageSet::full(n);
            assert_eq!(set.len(), n);
            assert!(!set.contains(n) && !set.insert(n) && !set.insert(n + 1) && !set.remove(n));
            assert_eq!(set, PageSet::full(n));
        }
    }
}
