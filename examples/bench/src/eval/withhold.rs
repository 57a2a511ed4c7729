//! The idle link: nothing is pushed until the guest has caused a number of faults.

use migration_core::{
    page::PageRange,
    page_set::PageSet,
    strategy::{PushOrder, push_order::Linear},
};

/// Pushes nothing during the first faults, then pushes in address order. It allows the cost of a
/// fault beside a push to be compared with the cost on an idle link, on which only the guest's own
/// faults move pages.
///
/// It reports that there is nothing to push although there is, so the engine asks again after each
/// fault. The migration of a guest that causes no more faults would never end, so this is no order
/// for users.
pub(super) struct Withhold {
    /// The number of faults that are still awaited.
    faults: u64,
    then: Linear,
}

/// Parses `withhold:faults=N`.
pub(super) fn parse(text: &str) -> Option<Withhold> {
    let faults = text.strip_prefix("withhold:faults=")?.parse().ok()?;
    Some(Withhold { faults, then: Linear::default() })
}

impl PushOrder for Withhold {
    fn name(&self) -> &'static str {
        "withhold"
    }

    fn begin(&mut self, unsent: &PageSet, heat: &[u8]) {
        self.then.begin(unsent, heat);
    }

    fn fault(&mut self, page: u64) {
        self.faults = self.faults.saturating_sub(1);
        self.then.fault(page);
    }

    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        if self.faults > 0 {
            return None;
        }
        self.then.next(unsent, most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_waits_for_faults() {
        let (mut order, mut unsent) = (parse("withhold:faults=2").unwrap(), PageSet::full(100));
        order.begin(&unsent, &[]);
        for page in [7, 9] {
            assert_eq!(order.next(&unsent, 8), None);
            unsent.remove(page);
            order.fault(page);
        }
        assert_eq!(order.next(&unsent, 8), Some(PageRange::new(0, 7)));
    }
}
