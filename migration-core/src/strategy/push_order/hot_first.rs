use super::{Linear, PushOrder, run_up};
use crate::{
    page::{PageRange, STRIPE_PAGES},
    page_set::PageSet,
};

/// Pushes the pages that were dirtied in most rounds before the switch-over first: a guest will
/// probably soon use the pages that it wrote often. Then it pushes those that the guest has
/// [referenced](super::REFERENCED) before the first round, if the VMM knows them. This is the *LRU
/// order* of the papers, with the dirty log in the place of most referenced bits.
///
/// Rounds are counted in classes (1, 2–3, 4–7, …), so that neighbours of about the same heat are
/// pushed in one run. Within a class the order is ascending. The 8 pages on either side of a fault
/// are pushed before all others. Pages that were neither dirtied nor referenced are pushed last, in
/// ascending order. If nothing is known, these are all pages.
///
/// `begin` reads the heat of every unsent page (about 1 ms for each million), and keeps a set for
/// each class that occurs, at most 8.
#[derive(Clone, Debug, Default)]
pub struct HotFirst {
    /// The unsent pages at the beginning: a set for each class, the hottest class last.
    classes: Vec<PageSet>,
    /// The page of the hottest class from which the search continues.
    at: u64,
    /// The faults with neighbours that may be unsent, the newest one last.
    faults: Vec<u64>,
    rest: Linear,
}

/// The number of pages on either side of a fault that are pushed at once. With the page itself they
/// are about the 64 KiB from which on the installation of a run is cheap.
const NEIGHBOURS: u64 = 8;
/// The largest number of faults to remember between two pushes; older ones are forgotten. There are
/// more at once only if more threads wait.
const MAX_FAULTS: usize = 256;

/// Returns 0 for pages of which nothing is known, 1 for pages that were only referenced, and
/// otherwise 2 to 8.
fn class(heat: u8) -> u32 {
    u8::BITS - heat.leading_zeros()
}

impl HotFirst {
    /// Returns the next unsent run beside the last fault, or if there is none, beside the one
    /// before it, and so on.
    fn near_faults(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        while let Some(&fault) = self.faults.last() {
            let (from, to) = (fault.saturating_sub(NEIGHBOURS), fault.saturating_add(NEIGHBOURS + 1));
            if let Some(page) = unsent.first_in(PageRange::new(from, to - from)) {
                return run_up(unsent, page, most.min(to - page));
            }
            self.faults.pop();
        }
        None
    }

    /// Returns the next unsent run of the hottest class that has one.
    fn hottest(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        while let Some(class) = self.classes.last() {
            let Some(first) = class.first_from(self.at) else {
                self.classes.pop();
                self.at = 0;
                continue;
            };
            let alike = class.run_at(first, STRIPE_PAGES)?;
            if let Some(page) = unsent.first_in(alike) {
                let run = run_up(unsent, page, most.min(alike.end() - page))?;
                self.at = run.end();
                return Some(run);
            }
            self.at = alike.end();
        }
        None
    }
}

impl PushOrder for HotFirst {
    fn name(&self) -> &'static str {
        "hot-first"
    }

    fn begin(&mut self, unsent: &PageSet, heat: &[u8]) {
        *self = Self::default();
        let mut classes = vec![None; class(u8::MAX) as usize + 1];
        for run in unsent.ranges() {
            let end = (run.end() as usize).min(heat.len());
            let mut first = run.first;
            for alike in heat[(first as usize).min(end)..end].chunk_by(|&a, &b| class(a) == class(b)) {
                let alike_pages = PageRange::new(first, alike.len() as u64);
                let class = class(alike[0]) as usize;
                if class > 0 {
                    classes[class].get_or_insert_with(|| PageSet::empty(unsent.capacity())).insert_range(alike_pages);
                }
                first = alike_pages.end();
            }
        }
        self.classes = classes.into_iter().flatten().collect();
    }

    fn fault(&mut self, page: u64) {
        if self.faults.len() == MAX_FAULTS {
            self.faults.remove(0);
        }
        self.faults.push(page);
    }

    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        let most = most.max(1);
        self.near_faults(unsent, most).or_else(|| self.hottest(unsent, most)).or_else(|| self.rest.next(unsent, most))
    }

    fn prepaged(&self) -> bool {
        // `near_faults` removes the faults beside which it finds nothing
        !self.faults.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;

    use proptest::prelude::*;

    use super::{
        super::{DIRTIED, REFERENCED, test_util::*},
        *,
    };

    #[test]
    fn a_reference_counts_less_than_any_write() {
        assert!(class(0) < class(REFERENCED));
        for rounds in 1..128 {
            let dirtied = rounds * DIRTIED;
            assert!(class(REFERENCED) < class(dirtied));
            assert_eq!(class(dirtied + REFERENCED), class(dirtied), "and beside one it counts nothing");
        }
    }

    proptest! {
        #[test]
        fn no_page_goes_before_a_hotter_one(
            pages in 1u64..3000,
            hole in (0u64..3000, 0u64..600),
            heat in prop::collection::vec(prop_oneof![Just(0), Just(REFERENCED), Just(DIRTIED), any::<u8>()], 0..3000),
            most in 1u64..700,
        ) {
            let mut unsent = PageSet::full(pages);
            unsent.remove_range(PageRange::new(hole.0, hole.1));
            let mut expected: Vec<u64> = unsent.iter().collect();
            expected.sort_by_key(|&page| Reverse(class(heat.get(page as usize).copied().unwrap_or(0))));
            let mut order = HotFirst::default();
            order.begin(&unsent, &heat);
            let runs = push(&mut order, &mut unsent, most, usize::MAX);
            let pushed: Vec<u64> = runs.into_iter().flat_map(|(first, count)| first..first + count).collect();
            prop_assert_eq!(pushed, expected);
        }
    }

    #[test]
    fn hottest_first_then_the_rest() {
        let mut heat = vec![0; 100];
        heat[10..20].fill(2);
        heat[20..30].fill(3);
        heat[40..45].fill(255);
        heat[60..64].fill(1);
        heat[90..].fill(128);
        let mut unsent = PageSet::full(100);
        let mut order = HotFirst::default();
        unsent.remove(42);
        order.begin(&unsent, &heat);
        let runs = push(&mut order, &mut unsent, 16, 7);
        assert_eq!(runs, [(40, 2), (43, 2), (90, 10), (10, 16), (26, 4), (60, 4), (0, 10)]);
        // pages beyond the end of the heat count as unknown
        let mut unsent = PageSet::full(100);
        order.begin(&unsent, &heat[..15]);
        assert_eq!(push(&mut order, &mut unsent, 100, 9), [(10, 5), (0, 10), (15, 85)]);
    }

    #[test]
    fn the_neighbours_of_a_fault_go_first() {
        let mut unsent = PageSet::full(100);
        let mut order = HotFirst::default();
        order.begin(&unsent, &[9; 100]);
        fault(&mut order, &mut unsent, 3);
        fault(&mut order, &mut unsent, 50);
        let runs = push(&mut order, &mut unsent, 64, 9);
        assert_eq!(runs, [(42, 8), (51, 8), (0, 3), (4, 8), (12, 30), (59, 41)]);
    }
}
