//! Pages that are in page stores when a migration begins: what the source's engine knows of them,
//! and how a lane sends them.
//!
//! The VM has a [`PagedMemory`], whose map has the pages that are in stores. If the strategy keeps
//! pages in stores, only their locations are sent. All other pages are read by a lane through a
//! buffer of 256 KiB and sent. They do not become resident at the source.
//!
//! No page is evicted during a migration (rule 22), but pages come back, because the guest touches
//! them. The engine therefore checks for pages that have come back after each harvest.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::lane::{Batch, Lane};
use crate::{
    MigrationError, PageRange, PageSet,
    page_map::{MapError, PageMap, StoreCopy},
    paged_memory::{MAX_FETCHED_PAGES, PagedMemory, ReadPages},
    store::Urgency,
};

/// The longest time of one attempt to read from a store, at either end. An attempt for pages that
/// are missing is repeated after that.
pub(super) const FETCH_TIME: Duration = Duration::from_secs(5);
/// The time from an attempt that has failed to the next one.
pub(super) const BACK_OFF: Duration = Duration::from_millis(200);

/// The pages of a VM that were in stores when its migration began.
pub(super) struct Stored {
    pub(super) memory: Arc<PagedMemory>,
    /// Pages that stay in stores, and have their location in the engine's map. Empty if the
    /// strategy does not keep pages in stores.
    kept: PageSet,
    keeps: bool,
}

impl Stored {
    /// Returns a value for a strategy that keeps pages in stores if `keeps`, and otherwise sends
    /// them.
    pub(super) fn new(memory: Arc<PagedMemory>, keeps: bool) -> Self {
        let pages = memory.map().read(PageMap::pages);
        Self { memory, kept: PageSet::empty(pages), keeps }
    }

    /// Records that the engine's map has the location of `pages`.
    pub(super) fn keep(&mut self, pages: PageRange) {
        self.kept.insert_range(pages);
    }

    /// Returns the pages that are in stores now.
    pub(super) fn pages(&self) -> PageSet {
        self.memory.map().read(|map| map.in_store().clone())
    }

    /// Returns those of `pages` that are in stores now.
    pub(super) fn among(&self, pages: &PageSet) -> PageSet {
        let mut both = self.pages();
        both.intersect_with(pages);
        both
    }

    /// Returns the pages that stay in their stores, as far as that is known.
    pub(super) fn kept(&self) -> &PageSet {
        &self.kept
    }

    /// Determines which pages have come back from stores, after the tracker has reported the
    /// `written` pages. These pages are in RAM, and no store has their newest content any more. A
    /// page that is still in a store, and is not being installed, was not written, whatever the
    /// tracker reports (rule 4).
    ///
    /// # Errors
    /// Returns a [`MapError`] if the VM was handed over.
    pub(super) fn look(&mut self, map: &mut PageMap, written: &mut PageSet) -> Result<(), MapError> {
        let unwritten = self.memory.map().read(|map| map.unfetched().clone());
        if !self.keeps {
            written.subtract(&unwritten);
            return Ok(());
        }
        let mut back = self.kept.clone();
        back.subtract(&unwritten);
        if back.is_empty() {
            return Ok(());
        }
        self.kept.subtract(&back);
        for run in map.located_runs(&back) {
            map.claim_stored(run.pages, run.copy)?;
            map.returned(run.pages)?;
        }
        map.dirtied(&back)
    }
}

/// Pages that are sent after the hand-over, at least some of which were in stores.
pub(super) struct Fetched {
    pub(super) read: ReadPages,
    /// Pages of the same piece that are in RAM.
    pub(super) resident: Vec<PageRange>,
    /// A guard that is dropped when the pages were sent, or will not be sent.
    pub(super) _in_hand: Box<dyn Send>,
}

/// Cuts runs of stored pages into pieces that one fetch reads.
pub(super) fn of_one_fetch(runs: &[(PageRange, StoreCopy)]) -> Vec<Vec<(PageRange, StoreCopy)>> {
    let mut pieces: Vec<Vec<_>> = Vec::new();
    let mut room = 0;
    for &(mut run, copy) in runs {
        while run.count > 0 {
            if room == 0 {
                pieces.push(Vec::new());
                room = MAX_FETCHED_PAGES;
            }
            let count = run.count.min(room);
            if let Some(piece) = pieces.last_mut() {
                piece.push((PageRange::new(run.first, count), copy));
            }
            run = PageRange::new(run.first + count, run.count - count);
            room -= count;
        }
    }
    pieces
}

/// Returns the parts of `pages` that are in none of the `stored` runs, which ascend and are parts of
/// `pages`.
pub(super) fn resident(pages: PageRange, stored: &[(PageRange, StoreCopy)]) -> Vec<PageRange> {
    let (mut parts, mut at) = (Vec::new(), pages.first);
    for &(run, _) in stored {
        parts.push(PageRange::new(at, run.first - at));
        at = run.end();
    }
    parts.push(PageRange::new(at, pages.end() - at));
    parts.retain(|part| part.count > 0);
    parts
}

impl Lane {
    /// Reads and sends those pages of a round's run that are in stores. Returns the other pages,
    /// which are in RAM.
    ///
    /// The tracker was re-armed before, so a page that is in a store now and is written later is
    /// reported.
    pub(super) fn send_stored(&mut self, run: PageRange, generation: u32) -> Result<Vec<PageRange>, MigrationError> {
        let Some(memory) = self.stored.clone() else { return Ok(vec![run]) };
        let stored = memory.stored_runs(run)?;
        for runs in of_one_fetch(&stored) {
            let read = memory.read(&runs, Urgency::Prefetch, Instant::now() + FETCH_TIME)?;
            self.send_read(&read, generation)?;
        }
        Ok(resident(run, &stored))
    }

    fn send_read(&mut self, read: &ReadPages, generation: u32) -> Result<(), MigrationError> {
        let mut batch = Batch::default();
        for (run, contents) in read.runs() {
            self.add_pages(&mut batch, contents, run, generation)?;
        }
        self.flush(&mut batch, generation)
    }

    pub(super) fn send_fetched(&mut self, fetched: &Fetched, generation: u32) -> Result<(), MigrationError> {
        self.send_read(&fetched.read, generation)?;
        fetched.resident.iter().try_for_each(|&run| self.push(run, generation))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fetch_has_64_pages_at_most_and_all_pages_are_fetched_once() {
        let copy = |generation| StoreCopy { entry: 1, generation };
        let runs =
            [(PageRange::new(0, 60), copy(1)), (PageRange::new(70, 130), copy(2)), (PageRange::new(200, 2), copy(1))];
        let pieces = of_one_fetch(&runs);
        let sizes: Vec<u64> = pieces.iter().map(|piece| piece.iter().map(|(run, _)| run.count).sum()).collect();
        assert_eq!(sizes, [64, 64, 64]);
        let pages = |runs: &[(PageRange, StoreCopy)]| -> Vec<_> {
            runs.iter().flat_map(|&(run, copy)| run.pages().map(move |page| (page, copy))).collect()
        };
        assert_eq!(pages(&pieces.concat()), pages(&runs));
        assert!(of_one_fetch(&[]).is_empty());
    }

    #[test]
    fn resident_pages_are_those_between_stored_runs() {
        let copy = StoreCopy { entry: 1, generation: 1 };
        let (range, pages) = (PageRange::new, PageRange::new(10, 20));
        let of = |runs: &[PageRange]| resident(pages, &runs.iter().map(|&run| (run, copy)).collect::<Vec<_>>());
        assert_eq!(of(&[]), [pages]);
        assert_eq!(of(&[pages]), []);
        assert_eq!(of(&[range(10, 3), range(13, 2), range(20, 4)]), [range(15, 5), range(24, 6)]);
        assert_eq!(of(&[range(12, 3), range(28, 2)]), [range(10, 2), range(15, 13)]);
    }
}
