use super::{PushOrder, run_down, run_up};
use crate::{page::PageRange, page_set::PageSet};

/// A bubble around the last fault, the *pivot*, that grows in both directions at once (Hines and
/// Gopalan, VEE 2009: *adaptive pre-paging*). A new fault moves the pivot, and a new bubble begins
/// there. The first pivot is page 0.
///
/// The paper pushes `pivot ± bubble` and increases `bubble` by one; pages that were sent already
/// cost nothing. This is the same as to push the nearer one of the nearest unsent pages above and
/// below. This order ends when no page is left, whereas the printed loop bound misses page 0.
#[derive(Clone, Debug, Default)]
pub struct Bubbling {
    pivot: u64,
    /// Whether the pivot comes from a fault.
    faulted: bool,
    search: Search,
}

impl PushOrder for Bubbling {
    fn name(&self) -> &'static str {
        "bubbling"
    }

    fn begin(&mut self, unsent: &PageSet, _heat: &[u8]) {
        (self.pivot, self.faulted) = (0, false);
        self.search = Search::new(unsent);
    }

    fn fault(&mut self, page: u64) {
        (self.pivot, self.faulted) = (page, true);
    }

    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        let above = self.search.first_from(unsent, self.pivot);
        let below = self.search.last_below(unsent, self.pivot);
        match (above, below) {
            (Some(above), Some(below)) if above - self.pivot > self.pivot - below => run_down(unsent, below + 1, most),
            (Some(above), _) => run_up(unsent, above, most),
            (None, Some(below)) => run_down(unsent, below + 1, most),
            (None, None) => run_up(unsent, self.search.again(unsent)?, most),
        }
    }

    fn prepaged(&self) -> bool {
        self.faulted
    }
}

/// Finds unsent pages without looking at pages that were sent long ago. Otherwise each fault that
/// moves the pivot into a part of RAM that was sent already would cost a walk over half of the set.
#[derive(Clone, Debug)]
struct Search {
    /// Blocks of [`Search::BLOCK`] pages. A block that is not in the set was found to have no
    /// unsent page.
    blocks: PageSet,
}

impl Default for Search {
    fn default() -> Self {
        Self { blocks: PageSet::empty(0) }
    }
}

impl Search {
    /// The number of pages of a block: 64 words of the set of pages. A set of 2^28 pages has 1,024
    /// words of blocks.
    const BLOCK: u64 = 4096;

    fn new(unsent: &PageSet) -> Self {
        Self { blocks: PageSet::full(unsent.capacity().div_ceil(Self::BLOCK)) }
    }

    /// Returns the first unsent page at or after `page`.
    fn first_from(&mut self, unsent: &PageSet, mut page: u64) -> Option<u64> {
        loop {
            let block = self.block(self.blocks.first_from(page / Self::BLOCK)?);
            page = page.max(block.first);
            if let Some(found) = unsent.first_in(PageRange::new(page, block.end() - page)) {
                return Some(found);
            }
            self.seen(block, page == block.first);
            page = block.end();
        }
    }

    /// Returns the last unsent page before `page`.
    fn last_below(&mut self, unsent: &PageSet, mut page: u64) -> Option<u64> {
        loop {
            let block = self.block(self.blocks.last_below(page.div_ceil(Self::BLOCK))?);
            page = page.min(block.end());
            if let Some(found) = unsent.last_in(PageRange::new(block.first, page - block.first)) {
                return Some(found);
            }
            self.seen(block, page == block.end());
            page = block.first;
        }
    }

    /// Returns the first unsent page after a search in `unsent` itself, and begins the search anew.
    /// Used for pages that became unsent again in a block that is not in the set.
    fn again(&mut self, unsent: &PageSet) -> Option<u64> {
        let page = unsent.first_from(0)?;
        *self = Self::new(unsent);
        Some(page)
    }

    fn block(&self, number: u64) -> PageRange {
        PageRange::new(number * Self::BLOCK, Self::BLOCK)
    }

    fn seen(&mut self, block: PageRange, whole: bool) {
        if whole {
            self.blocks.remove(block.first / Self::BLOCK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::test_util::*, *};

    #[test]
    fn the_bubble_grows_around_the_pivot() {
        let mut unsent = PageSet::full(1000);
        let mut order = Bubbling::default();
        order.begin(&unsent, &[]);
        assert_eq!(push(&mut order, &mut unsent, 4, 2), [(0, 4), (4, 4)]);
        assert!(!order.prepaged());
        fault(&mut order, &mut unsent, 700);
        assert_eq!(push(&mut order, &mut unsent, 4, 5), [(701, 4), (696, 4), (705, 4), (692, 4), (709, 4)]);
        assert!(order.prepaged());
        // a new fault moves the pivot
        fault(&mut order, &mut unsent, 300);
        assert_eq!(push(&mut order, &mut unsent, 1, 4), [(301, 1), (299, 1), (302, 1), (298, 1)]);
        // a fault among pages that were sent: the next page is the nearest unsent one
        fault(&mut order, &mut unsent, 694);
        assert_eq!(push(&mut order, &mut unsent, 2, 1), [(690, 2)]);
    }

    #[test]
    fn page_0_and_the_last_page_are_not_missed() {
        for pivot in [0, 1, 99, 198, 199] {
            let mut unsent = PageSet::full(200);
            let mut order = Bubbling::default();
            fault(&mut order, &mut unsent, pivot);
            push(&mut order, &mut unsent, 7, usize::MAX);
            assert!(unsent.is_empty(), "pivot {pivot}: {unsent:?}");
        }
    }

    #[test]
    fn blocks_without_a_page_are_left_out() {
        let mut unsent = PageSet::empty(20 * Search::BLOCK);
        for page in [5, 19 * Search::BLOCK] {
            unsent.insert(page);
        }
        let mut order = Bubbling::default();
        order.begin(&unsent, &[]);
        order.fault(10 * Search::BLOCK + 1);
        assert_eq!(push(&mut order, &mut unsent, 1, 1), [(19 * Search::BLOCK, 1)]);
        assert_eq!(order.search.blocks.iter().collect::<Vec<_>>(), [0, 10, 19]);
        assert_eq!(push(&mut order, &mut unsent, 1, 1), [(5, 1)]);
        // a page that is unsent again is found all the same
        unsent.insert(15 * Search::BLOCK);
        assert_eq!(push(&mut order, &mut unsent, 1, 9), [(15 * Search::BLOCK, 1)]);
    }
}
