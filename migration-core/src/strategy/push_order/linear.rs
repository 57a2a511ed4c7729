use super::{PushOrder, run_up};
use crate::{page::PageRange, page_set::PageSet};

/// Pushes pages in ascending order from page 0, whatever the guest faults on: the plain *active
/// push* of the papers.
#[derive(Clone, Debug, Default)]
pub struct Linear {
    at: u64,
}

impl PushOrder for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn begin(&mut self, _unsent: &PageSet, _heat: &[u8]) {
        self.at = 0;
    }

    fn fault(&mut self, _page: u64) {}

    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        // starts again at page 0, for pages that became unsent again after they were passed
        let page = unsent.first_from(self.at).or_else(|| unsent.first_from(0))?;
        let run = run_up(unsent, page, most)?;
        self.at = run.end();
        Some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::test_util::*, *};

    #[test]
    fn stripes_come_whole() {
        let mut unsent = PageSet::full(2000);
        let mut order = Linear::default();
        fault(&mut order, &mut unsent, 1);
        let runs = push(&mut order, &mut unsent, 4096, 9);
        assert_eq!(runs, [(0, 1), (2, 510), (512, 512), (1024, 512), (1536, 464)]);
    }

    #[test]
    fn pages_that_come_back_are_not_forgotten() {
        let mut unsent = PageSet::full(100);
        let mut order = Linear::default();
        assert_eq!(push(&mut order, &mut unsent, 64, 2), [(0, 64), (64, 36)]);
        unsent.insert(7);
        assert_eq!(push(&mut order, &mut unsent, 64, 2), [(7, 1)]);
    }
}
