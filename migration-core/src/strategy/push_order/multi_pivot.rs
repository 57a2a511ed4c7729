use std::{collections::VecDeque, fmt};

use super::{PushOrder, run_down, run_up};
use crate::{page::PageRange, page_set::PageSet};

/// The number of pivots that are kept by default: the best one of the paper.
pub const DEFAULT_PIVOTS: usize = 7;

/// The directions in which the bubble around a pivot grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Both directions: at least as good as forward in the paper.
    #[default]
    Dual,
    /// To higher pages only.
    Forward,
    /// To lower pages only: worse than [`Linear`](super::Linear) for most guests. For comparisons.
    Backward,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dual => "dual",
            Self::Forward => "forward",
            Self::Backward => "backward",
        })
    }
}

/// Bubbles around the last *k* pivots at once, for guests that read in several places (Hines and
/// others, OSR 2009).
///
/// Each pivot has an edge above it, below it, or both. The edges take turns; those of a new pivot
/// come first. An edge is stuck when it meets a page that was sent. When there are *k* pivots, a
/// new one replaces the oldest. Page 0 is an additional pivot, with an edge that is never replaced
/// and grows forward. When every edge is stuck, this one continues at the next unsent page, so that
/// every page is sent in the end.
///
/// A fault with no unsent page beside it makes no pivot: the page was in flight, or had just been
/// pushed.
#[derive(Clone, Debug)]
pub struct MultiPivot {
    k: usize,
    direction: Direction,
    /// The edges that are not known to be stuck, in the order of their turns.
    edges: VecDeque<Edge>,
    /// The position of the edge of page 0.
    sticky: u64,
    /// The number of pivots so far.
    pivots: u64,
    /// The last `k` faults since the last push.
    faults: VecDeque<u64>,
    /// Whether the last push was beside a pivot other than page 0.
    prepaged: bool,
}

#[derive(Clone, Copy, Debug)]
enum Edge {
    /// The edge of page 0. Its position is `MultiPivot::sticky`.
    Sticky,
    /// The next page to push is `at`.
    Above { pivot: u64, at: u64 },
    /// The next page to push is the one before `at`.
    Below { pivot: u64, at: u64 },
}

impl Default for MultiPivot {
    fn default() -> Self {
        Self::new(DEFAULT_PIVOTS, Direction::Dual)
    }
}

impl MultiPivot {
    /// Returns the order with the `k` last pivots. 0 counts as 1.
    pub fn new(k: usize, direction: Direction) -> Self {
        let edges = VecDeque::from([Edge::Sticky]);
        Self { k: k.max(1), direction, edges, sticky: 0, pivots: 0, faults: VecDeque::new(), prepaged: false }
    }

    /// Makes pivots of the faults since the last push.
    fn take_up_faults(&mut self, unsent: &PageSet) {
        while let Some(page) = self.faults.pop_front() {
            let above = self.direction != Direction::Backward && run_up(unsent, page.saturating_add(1), 1).is_some();
            let below = self.direction != Direction::Forward && run_down(unsent, page, 1).is_some();
            if !above && !below {
                continue;
            }
            self.pivots += 1;
            let pivot = self.pivots;
            let oldest = (pivot + 1).saturating_sub(self.k as u64);
            self.edges.retain(|edge| edge.pivot().is_none_or(|pivot| pivot >= oldest));
            if below {
                self.edges.push_front(Edge::Below { pivot, at: page });
            }
            if above {
                self.edges.push_front(Edge::Above { pivot, at: page + 1 });
            }
        }
    }

    /// Returns the next run at `edge`, and moves the edge; `None` if the edge is stuck.
    fn grow(&mut self, edge: &mut Edge, unsent: &PageSet, most: u64) -> Option<PageRange> {
        match edge {
            Edge::Sticky => run_up(unsent, self.sticky, most).inspect(|run| self.sticky = run.end()),
            Edge::Above { at, .. } => run_up(unsent, *at, most).inspect(|run| *at = run.end()),
            Edge::Below { at, .. } => run_down(unsent, *at, most).inspect(|run| *at = run.first),
        }
    }
}

impl Edge {
    fn pivot(&self) -> Option<u64> {
        match *self {
            Edge::Sticky => None,
            Edge::Above { pivot, .. } | Edge::Below { pivot, .. } => Some(pivot),
        }
    }
}

impl PushOrder for MultiPivot {
    fn name(&self) -> &'static str {
        "multi-pivot"
    }

    fn begin(&mut self, _unsent: &PageSet, _heat: &[u8]) {
        *self = Self::new(self.k, self.direction);
    }

    fn fault(&mut self, page: u64) {
        if self.faults.len() == self.k {
            self.faults.pop_front();
        }
        self.faults.push_back(page);
    }

    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        self.take_up_faults(unsent);
        while let Some(mut edge) = self.edges.pop_front() {
            if let Some(run) = self.grow(&mut edge, unsent, most) {
                self.prepaged = edge.pivot().is_some();
                self.edges.push_back(edge);
                return Some(run);
            }
        }
        // all edges are stuck
        self.prepaged = false;
        self.sticky = unsent.first_from(self.sticky).or_else(|| unsent.first_from(0))?;
        self.edges.push_back(Edge::Sticky);
        self.grow(&mut Edge::Sticky, unsent, most)
    }

    fn prepaged(&self) -> bool {
        self.prepaged
    }
}

#[cfg(test)]
mod tests {
    use super::{super::test_util::*, *};

    #[test]
    fn edges_take_turns_and_new_pivots_come_first() {
        let mut unsent = PageSet::full(1000);
        let mut order = MultiPivot::default();
        assert_eq!(push(&mut order, &mut unsent, 4, 2), [(0, 4), (4, 4)]);
        fault(&mut order, &mut unsent, 300);
        fault(&mut order, &mut unsent, 600);
        let runs = push(&mut order, &mut unsent, 4, 7);
        assert_eq!(runs, [(601, 4), (596, 4), (301, 4), (296, 4), (8, 4), (605, 4), (592, 4)]);
    }

    #[test]
    fn what_is_pushed_around_a_fault_is_prepaged() {
        let mut unsent = PageSet::full(40);
        let mut order = MultiPivot::default();
        let push = |order: &mut MultiPivot, unsent: &mut PageSet| (push(order, unsent, 4, 1)[0].0, order.prepaged());
        assert_eq!(push(&mut order, &mut unsent), (0, false));
        fault(&mut order, &mut unsent, 30);
        assert_eq!([(); 4].map(|()| push(&mut order, &mut unsent)), [(31, true), (26, true), (4, false), (35, true)]);
        // in the end no unsent page is left beside the pivot
        let rest: Vec<_> = (0..5).map(|_| push(&mut order, &mut unsent)).collect();
        assert_eq!(rest, [(22, true), (8, false), (39, true), (18, true), (12, false)]);
    }

    #[test]
    fn an_edge_stops_at_pages_already_sent() {
        let mut unsent = PageSet::full(400);
        let mut order = MultiPivot::new(2, Direction::Forward);
        fault(&mut order, &mut unsent, 306);
        fault(&mut order, &mut unsent, 300);
        let runs = push(&mut order, &mut unsent, 4, 8);
        assert_eq!(
            runs,
            [(301, 4), (307, 4), (0, 4), (305, 1), (311, 4), (4, 4), (315, 4), (8, 4)],
            "300's edge is gone once it met 306"
        );
    }

    #[test]
    fn the_oldest_pivot_is_replaced_and_page_0_never() {
        let mut unsent = PageSet::full(10_000);
        let mut order = MultiPivot::new(3, Direction::Dual);
        for pivot in [1000, 2000, 3000, 4000] {
            fault(&mut order, &mut unsent, pivot);
            push(&mut order, &mut unsent, 1, 1);
        }
        let near = |unsent: &PageSet, pivot: u64| 200 - unsent.count_in(PageRange::new(pivot - 100, 200));
        assert!([1000, 2000, 3000, 4000].iter().all(|&pivot| near(&unsent, pivot) == 2), "the fault, and one page");
        push(&mut order, &mut unsent, 1, 70);
        assert_eq!(near(&unsent, 1000), 2, "replaced");
        assert!([2000, 3000, 4000].iter().all(|&pivot| near(&unsent, pivot) >= 22));
        assert_eq!(unsent.first_from(0), Some(10), "page 0's edge had its turns");
    }

    #[test]
    fn faults_beside_nothing_unsent_replace_no_pivot() {
        let mut unsent = PageSet::full(10_000);
        let mut order = MultiPivot::new(1, Direction::Dual);
        fault(&mut order, &mut unsent, 5000);
        push(&mut order, &mut unsent, 16, 4);
        fault(&mut order, &mut unsent, 5003);
        assert_eq!(push(&mut order, &mut unsent, 16, 2), [(4968, 16), (16, 16)]);
    }

    #[test]
    fn every_scanner_is_kept_ahead_of() {
        for direction in [Direction::Dual, Direction::Forward] {
            let mut unsent = PageSet::full(30_000);
            let mut order = MultiPivot::new(7, direction);
            let (mut faults, mut late) = (0, 0);
            for step in 0..2000u64 {
                for start in [3000, 12_000, 21_000] {
                    let page = start + step;
                    if unsent.contains(page) {
                        fault(&mut order, &mut unsent, page);
                        faults += 1;
                        late = late.max(step);
                    }
                }
                push(&mut order, &mut unsent, 2, 8);
            }
            assert!(faults <= 9 && late < 10, "{direction}: {faults} faults, the last in step {late}");
        }
    }

    #[test]
    fn when_all_are_stuck_page_0_goes_on_behind() {
        for direction in [Direction::Dual, Direction::Forward, Direction::Backward] {
            let mut unsent = PageSet::full(500);
            let mut order = MultiPivot::new(7, direction);
            for page in [3, 499, 250, 0] {
                fault(&mut order, &mut unsent, page);
            }
            push(&mut order, &mut unsent, 5, usize::MAX);
            assert!(unsent.is_empty(), "{direction}: {unsent:?}");
        }
    }
}
