//! The idle link: nothing is pushed until the guest has faulted so often.

use migration_core::{
    page::PageRange,
    page_set::PageSet,
    strategy::{PushOrder, push_order::Linear},
};

/// Pushes nothing for the first faults, then in address order. What a fault costs beside a push is
/// to be compared with what it costs on an idle link, and only the guest's own faults show that.
///
/// It says that there is nothing to push when there is: the engine asks again after each fault. A
/// guest that stops to fault would keep its migration waiting for ever, so this is no order for
/// users.
pub(super) struct Withhold {
    /// Faults that are still to come.
    faults: u64,
    then: Linear,
}

/// The order as `withhold:faults=N`.
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
