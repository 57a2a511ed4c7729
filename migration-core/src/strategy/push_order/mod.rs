//! In which order post-copy pushes pages that nobody has asked for yet.
//!
//! | order | pushes next |
//! |---|---|
//! | [`Linear`] | the next page, ascending |
//! | [`Bubbling`] | the page nearest to the last fault |
//! | [`MultiPivot`] | around each of the last faults, in turn |
//! | [`HotFirst`] | the pages that were dirtied most often before the switch-over, then those that were referenced |
//! | [`Random`] | any page: what the others are to be compared with |
//!
//! [`Through`] adds to any of them the stores through which its pages may go.
//!
//! [`KnownOrder`] is the choice among them, as users write it. No run crosses the border of a
//! stripe ([`STRIPE_PAGES`]), and a run is as long as `most` and that border permit: so each goes
//! out on one lane, and with `most` at a stripe or more a transparent huge page comes whole.

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

/// What a round in which a page was dirtied adds to its [heat](PushOrder::begin).
pub const DIRTIED: u8 = 2;
/// What it adds to the heat of a page that the guest has referenced before the first round, read or
/// written, where the VMM [knows](crate::vm::SourceVm::referenced_pages). Less than [`DIRTIED`]: it
/// is older, and it does not say how often.
pub const REFERENCED: u8 = 1;

/// A policy: which pages to push next. Each page is pushed or demanded once; the engine takes what
/// was sent out of `unsent` by itself.
///
/// One of one's own needs little more than the queries of [`PageSet`]. This one begins with the
/// last page of RAM:
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
    /// Its name, as users write it.
    fn name(&self) -> &'static str;

    /// The serving begins: these pages are to move. `heat` says for each page how much the guest
    /// has used it: [`DIRTIED`] for each round in which it was dirtied and [`REFERENCED`] if it was
    /// referenced before, 255 at most. Pages beyond its end have 0; it is empty if nothing is
    /// known.
    fn begin(&mut self, unsent: &PageSet, heat: &[u8]);

    /// The guest has faulted at `page`, which has been sent by now.
    fn fault(&mut self, page: u64);

    /// Returns the next pages to push: a run of at most `most` pages (0 counts as 1), all of them
    /// in `unsent`; `None` only when that is empty. Called for every batch: it should not look at
    /// all of `unsent` each time.
    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange>;

    /// Returns whether what [`next`](Self::next) has just returned lies around a fault, for which
    /// reason it was chosen: *pre-paging*. For the report only.
    fn prepaged(&self) -> bool {
        false
    }

    /// Returns the places in stores through which pages may go on their way, besides the direct
    /// link. The engine fills the direct link first, and the stores with the egress that it leaves.
    /// Every place must be one of the strategy's [`stores`](super::Strategy::stores). None by
    /// default.
    fn through(&self) -> &[Place] {
        &[]
    }
}

/// What is wrong with the choice of a push order.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum OrderError {
    /// It chose nothing although pages are unsent.
    #[error("the push order {order} chose nothing of {unsent} pages")]
    Nothing {
        /// The name of the order.
        order: &'static str,
        /// The number of unsent pages.
        unsent: u64,
    },
    /// It chose no page, or pages that are not all unsent.
    #[error("the push order {order} chose pages {}+{}, which are not all unsent", run.first, run.count)]
    NotUnsent {
        /// The name of the order.
        order: &'static str,
        /// The pages.
        run: PageRange,
    },
}

/// Asks `order` for the next run, and checks its answer.
///
/// # Errors
/// What is wrong with it.
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

/// The run of unsent pages from `page` upwards, within its stripe; `None` if `page` was sent.
fn run_up(unsent: &PageSet, page: u64, most: u64) -> Option<PageRange> {
    unsent.run_at(page, most.clamp(1, STRIPE_PAGES - page % STRIPE_PAGES))
}

/// The run of unsent pages from just below `page` downwards, within one stripe; `None` if `page -
/// 1` was sent.
fn run_down(unsent: &PageSet, page: u64, most: u64) -> Option<PageRange> {
    let last = page.checked_sub(1)?;
    unsent.run_before(page, most.clamp(1, last % STRIPE_PAGES + 1))
}

/// What the tests of the orders share.
#[cfg(test)]
mod test_util {
    use super::*;

    /// Pushes `runs` runs of at most `most` pages, as the engine does; what they were, as `(first,
    /// count)`.
    pub fn push(order: &mut dyn PushOrder, unsent: &mut PageSet, most: u64, runs: usize) -> Vec<(u64, u64)> {
        let run = || {
            let run = order.next(unsent, most)?;
            unsent.remove_range(run);
            Some((run.first, run.count))
        };
        std::iter::from_fn(run).take(runs).collect()
    }

    /// A fault at `page`, as the engine does it.
    pub fn fault(order: &mut dyn PushOrder, unsent: &mut PageSet, page: u64) {
        unsent.remove(page);
        order.fault(page);
    }
}
