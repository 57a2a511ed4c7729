//! Reads pages from stores into a buffer, so that they can be sent without becoming resident.

use std::{io, sync::Arc, time::Instant};

use super::{FetchError, PagedMemory, StoreEntry, Wanted};
use crate::{
    PAGE_SIZE, PageRange, RamLayout, RamRegion,
    lock::lock,
    page_map::StoreCopy,
    ram::{GuestRam, HeapRam, RamSlice},
    shared_map::SharedPageMap,
    store::Urgency,
};

/// Pages that were read from stores.
pub struct ReadPages {
    runs: Vec<PageRange>,
    memory: HeapRam,
}

impl ReadPages {
    /// Allocates the buffer for the pages of `runs`.
    fn new(runs: Vec<PageRange>) -> io::Result<Self> {
        let bytes: u64 = runs.iter().map(|run| run.bytes()).sum();
        // a region is never empty
        let bytes = bytes.max(PAGE_SIZE as u64);
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: bytes }]).map_err(io::Error::other)?;
        Ok(Self { runs, memory: HeapRam::new(layout)? })
    }

    /// Returns the runs of pages with their contents, ascending.
    pub fn runs(&self) -> impl Iterator<Item = (PageRange, RamSlice<'_>)> {
        let mut at = 0;
        self.runs.iter().filter_map(move |&run| {
            let contents = self.memory.slice(PageRange::new(at, run.count)).ok()?;
            at += run.count;
            Some((run, contents))
        })
    }
}

impl PagedMemory {
    /// Returns the map of the VM's pages.
    pub fn map(&self) -> &Arc<SharedPageMap> {
        &self.map
    }

    /// Returns the number of entries of the store table.
    pub fn entries(&self) -> u8 {
        // the table has at most 255 entries
        lock(&self.table).len() as u8
    }

    /// Returns the entry of the store table with this number, if there is one.
    pub fn entry(&self, number: u8) -> Option<StoreEntry> {
        lock(&self.table).get(number).ok().cloned()
    }

    /// Returns the pages of `within` that are in stores, with their copies, ascending. Waits first
    /// until no page of `within` is being installed.
    ///
    /// # Errors
    /// Returns [`FetchError::Install`] if a page is being installed for too long.
    pub fn stored_runs(&self, within: PageRange) -> Result<Vec<(PageRange, StoreCopy)>, FetchError> {
        self.map.stored_runs(within).map_err(|cause| FetchError::Install { first: within.first, cause })
    }

    /// Reads pages from their stores, either all or none. The pages are not installed, and the map
    /// is not changed. `runs` must ascend. No lock is held while a store is read.
    ///
    /// # Errors
    /// Returns a [`FetchError`] if no store of an entry has a page, or if a store does not answer
    /// before `deadline`.
    pub fn read(
        &self,
        runs: &[(PageRange, StoreCopy)],
        urgency: Urgency,
        deadline: Instant,
    ) -> Result<ReadPages, FetchError> {
        let first = runs.first().map_or(0, |(run, _)| run.first);
        let read = ReadPages::new(runs.iter().map(|&(run, _)| run).collect());
        let read = read.map_err(|cause| FetchError::Install { first, cause })?;
        let mut by_entry = runs.to_vec();
        by_entry.sort_by_key(|(run, copy)| (copy.entry, run.first));
        for of_entry in by_entry.chunk_by(|(_, a), (_, b)| a.entry == b.entry) {
            let Some(&(_, StoreCopy { entry: number, .. })) = of_entry.first() else { continue };
            let entry = self.entry(number).ok_or(FetchError::Unknown { entry: number })?;
            let mut wanted = Wanted::new(number, of_entry);
            self.reader.read(&entry, &mut wanted, urgency, deadline)?;
            for (run, contents) in read.runs().filter(|(run, _)| of_entry.iter().any(|(of_it, _)| of_it == run)) {
                for (at, page) in run.pages().enumerate() {
                    contents.skip(at * PAGE_SIZE).copy_from(wanted.page(page));
                }
            }
        }
        Ok(read)
    }
}
