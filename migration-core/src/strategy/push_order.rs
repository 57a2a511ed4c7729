//! In which order post-copy pushes pages that nobody has asked for yet.

use crate::{page::PageRange, page_set::PageSet};

/// A policy: which pages to push next. Each page is pushed or demanded once; the engine takes what was sent out of
/// `unsent` by itself.
pub trait PushOrder: Send {
    /// Its name, as users write it.
    fn name(&self) -> &'static str;

    /// The serving begins: these pages are to move. `heat` says for each page in how many rounds it was dirtied before
    /// (255 at most); empty if there were none.
    fn begin(&mut self, unsent: &PageSet, heat: &[u8]);

    /// The guest has faulted at `page`, which has been sent by now.
    fn fault(&mut self, page: u64);

    /// The next pages to push: a run of at most `most` pages, all of them in `unsent`; `None` only when that is empty.
    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange>;
}

/// Ascending.
#[derive(Clone, Copy, Debug, Default)]
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
        let all = unsent.capacity();
        let found =
            unsent.ranges_in(PageRange::new(self.at, all - self.at)).next().or_else(|| unsent.ranges().next())?;
        let block_end = (found.first / 512 + 1) * 512;
        let range = PageRange::new(found.first, found.count.min(most).min(block_end - found.first));
        self.at = range.end();
        Some(range)
    }
}

/// Stand-in.
pub fn parse_push_order(_text: &str) -> Result<Box<dyn PushOrder>, String> {
    Ok(Box::new(Linear::default()))
}
