//! The order in which post-copy pushes pages that the destination has not requested yet.
//!
//! | order | pushes next |
//! |---|---|
//! | [`Linear`] | the next page, ascending |
//! | [`Bubbling`] | the page nearest to the last fault |
//! | [`MultiPivot`] | pages around each of the last faults, in turn |
//! | [`HotFirst`] | the pages that were dirtied most often before the switch-over, then those that were referenced |
//! | [`Random`] | any page: a baseline for comparison with the others |
//!
//! [`Through`] adds stores, through which the pages may move, to any of these orders.
//!
//! [`KnownOrder`] is a choice of one of these orders, as users write it. No run crosses the border
//! of a stripe ([`STRIPE_PAGES`]), and a run is as long as `most` and that border permit. So each
//! run is sent on one lane, and if `most` is at least a stripe, a transparent huge page is sent as
//! a whole.

mod bubbling;
mod choice;
mod hot_first;
mod linear;
mod multi_pivot;
mod random;
mod through;

pub use bubbling::Bubbling;
pub use choice::{KnownOrder, MAX_PIVOTS, UnknownOrder, parse};
pub use hot_first::HotFirst;
pub use linear::Linear;
pub use multi_pivot::{DEFAULT_PIVOTS, Direction, MultiPivot};
pub use random::Random;
use thiserror::Error;
pub use through::Through;

use super::Place;
use crate::{
    page::{PageRange, STRIPE_PAGES},
    page_set::PageSet,
};

/// The amount that a round in which a page was dirtied adds to the [heat](PushOrder::begin) of the
/// page.
pub const DIRTIED: u8 = 2;
/// The amount that is added to the heat of a page that the guest has referenced (read or written)
/// before the first round, if the VMM [knows](crate::vm::SourceVm::referenced_pages) it. Less than
/// [`DIRTIED`], because the reference is older, and because the number of references is unknown.
pub const REFERENCED: u8 = 1;

/// A policy that chooses the pages to push next. Each page is pushed or demanded once. The engine
/// removes the pages that were sent from `unsent` itself.
///
/// The queries of [`PageSet`] are enough for most policies. This one begins with the last page of
/// RAM:
///
/// ```
/// use migration_core::{PageRange, PageSet, strategy::PushOrder};
///
/// struct Descending;
///
/// impl PushOrder for Descending {
///     fn name(&self) -> &'static str {
///         "descending"
///     }
///
///     fn begin(&mut self, _unsent: &PageSet, _heat: &[u8]) {}
///
///     fn fault(&mut self, _page: u64) {}
///
///     fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
///         let last = unsent.last_below(unsent.capacity())?;
///         unsent.run_before(last + 1, most)
///     }
/// }
///
/// // what the engine does with it
/// let (mut order, mut unsent, mut pushed) = (Descending, PageSet::full(1000), vec![]);
/// order.begin(&unsent, &[]);
/// unsent.remove(700);
/// order.fault(700);
/// while let Some(run) = order.next(&unsent, 400) {
///     unsent.remove_range(run);
///     pushed.push((run.first, run.count));
/// }
/// assert_eq!(pushed, [(701, 299), (300, 400), (0, 300)]);
/// ```
pub trait PushOrder: Send {
    /// Returns the name of the order, as users write it.
    fn name(&self) -> &'static str;

    /// Begins to stream the missing pages `unsent`. `heat` has a number for each page that says how
    /// much the guest has used it: the sum of [`DIRTIED`] for each round in which it was dirtied
    /// and of [`REFERENCED`] if it was referenced before, at most 255. Pages beyond the end of
    /// `heat` have the number 0. `heat` is empty if nothing is known.
    fn begin(&mut self, unsent: &PageSet, heat: &[u8]);

    /// Records that the guest has faulted on `page`. The page has been sent already.
    fn fault(&mut self, page: u64);

    /// Returns the next pages to push: a run of at most `most` pages, all of them in `unsent`. 0
    /// counts as 1. Returns `None` only if `unsent` is empty. Called for every batch, so it should
    /// not search all of `unsent` each time.
    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange>;

    /// Returns whether [`next`](Self::next) has chosen its last run because the run lies around a
    /// fault: *pre-paging*. Used only for the report.
    fn prepaged(&self) -> bool {
        false
    }

    /// Returns the places in stores through which pages may move, besides the direct link. The
    /// engine fills the direct link first, and uses the egress that the direct link leaves for the
    /// stores. Every place must be one of the strategy's [`stores`](super::Strategy::stores).
    /// Returns no places by default.
    fn through(&self) -> &[Place] {
        &[]
    }
}

/// An invalid choice of a push order.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum OrderError {
    /// The order chose nothing although pages are unsent.
    #[error("the push order {order} chose nothing of {unsent} pages")]
    Nothing {
        /// The name of the order.
        order: &'static str,
        /// The number of unsent pages.
        unsent: u64,
    },
    /// The order chose an empty run, or pages that are not all unsent.
    #[error("the push order {order} chose pages {}+{}, which are not all unsent", run.first, run.count)]
    NotUnsent {
        /// The name of the order.
        order: &'static str,
        /// The pages.
        run: PageRange,
    },
}

/// Asks `order` for the next run, and checks the run.
///
/// # Errors
/// Returns an error if the run is invalid.
pub(crate) fn checked_next(
    order: &mut dyn PushOrder,
    unsent: &PageSet,
    most: u64,
) -> Result<Option<PageRange>, OrderError> {
    match order.next(unsent, most) {
        None if unsent.is_empty() => Ok(None),
        None => Err(OrderError::Nothing { order: order.name(), unsent: unsent.len() }),
        Some(run) if run.count > 0 && unsent.count_in(run) == run.count => Ok(Some(run)),
        Some(run) => Err(OrderError::NotUnsent { order: order.name(), run }),
    }
}

impl<P: PushOrder + ?Sized> PushOrder for Box<P> {
    fn name(&self) -> &'static str {
        (**self).name()
    }

    fn begin(&mut self, unsent: &PageSet, heat: &[u8]) {
        (**self).begin(unsent, heat);
    }

    fn fault(&mut self, page: u64) {
        (**self).fault(page);
    }

    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        (**self).next(unsent, most)
    }

    fn prepaged(&self) -> bool {
        (**self).prepaged()
    }

    fn through(&self) -> &[Place] {
        (**self).through()
    }
}

/// Returns the run of unsent pages that begins with `page`, within its stripe, or `None` if `page`
/// was sent.
fn run_up(unsent: &PageSet, page: u64, most: u64) -> Option<PageRange> {
    unsent.run_at(page, most.clamp(1, STRIPE_PAGES - page % STRIPE_PAGES))
}

/// Returns the run of unsent pages that ends just below `page`, within one stripe, or `None` if
/// `page - 1` was sent.
fn run_down(unsent: &PageSet, page: u64, most: u64) -> Option<PageRange> {
    let last = page.checked_sub(1)?;
    unsent.run_before(page, most.clamp(1, last % STRIPE_PAGES + 1))
}

/// Helpers of the tests of all orders.
#[cfg(test)]
mod test_util {
    use super::*;

    /// Pushes `runs` runs of at most `most` pages, as the engine does. Returns the runs as `(first,
    /// count)`.
    pub fn push(order: &mut dyn PushOrder, unsent: &mut PageSet, most: u64, runs: usize) -> Vec<(u64, u64)> {
        let run = || {
            let run = order.next(unsent, most)?;
            unsent.remove_range(run);
            Some((run.first, run.count))
        };
        std::iter::from_fn(run).take(runs).collect()
    }

    /// Faults on `page`, as the engine does.
    pub fn fault(order: &mut dyn PushOrder, unsent: &mut PageSet, page: u64) {
        unsent.remove(page);
        order.fault(page);
    }
}
