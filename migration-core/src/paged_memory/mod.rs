//! The RAM of a VM with pages in page stores.
//!
//! | to | see |
//! |---|---|
//! | name the stores and namespaces that contain the pages | [`StoreTable`] |
//! | fetch pages from stores, and install them | [`PagedMemory`] |
//! | put pages of a VM that runs here into stores | [`PagedMemory::create_entry`], [`PagedMemory::put`] |
//! | read pages from stores to send them, without installing them | [`PagedMemory::read`] |

mod reader;
mod send_through;
mod table;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

pub use reader::{FetchError, Renewed};
use reader::{Reader, Wanted};
pub use send_through::ReadPages;
pub use table::{EntryStore, StoreEntry, StoreTable, TableError};
pub use writer::{NewEntry, PutError};

use crate::{
    PAGE_SIZE, PageRange,
    lock::lock,
    page::STRIPE_PAGES,
    page_map::{PageCopy, StoreCopy},
    pager::{Installed, Pager},
    ram::RamSlice,
    shared_map::SharedPageMap,
    store::{Owner, PageStore, StoreError, Urgency, share},
    vm_id::VmId,
};

/// The largest number of pages of one fetch (256 KiB). A fault waits for at most this much of a
/// prefetch at one server.
pub const MAX_FETCHED_PAGES: u64 = 64;

/// The parts of a [`PagedMemory`].
pub struct PagedMemoryParts {
    /// The VM. Nothing is read from the namespace of another VM (rule 24).
    pub vm: VmId,
    /// The location of each page of the VM.
    pub map: Arc<SharedPageMap>,
    /// Installs pages. Its [block size](Pager::block_pages) is one page.
    pub pager: Arc<dyn Pager>,
    /// The stores with which this host was started. No other store is ever asked (rule 25).
    pub stores: Vec<Arc<dyn PageStore>>,
}

/// The RAM of a VM with pages in page stores. It fetches the pages that are in stores according to
/// the map, and the pager installs them.
///
/// It starts no thread. The thread for faults calls [`fetch`](Self::fetch) with [`Urgency::Fault`],
/// and another thread calls it with [`Urgency::Prefetch`].
pub struct PagedMemory {
    map: Arc<SharedPageMap>,
    pager: Arc<dyn Pager>,
    table: Mutex<StoreTable>,
    reader: Reader,
}

impl PagedMemory {
    /// Creates the memory from its parts. The store table is empty.
    pub fn new(parts: PagedMemoryParts) -> Self {
        let PagedMemoryParts { vm, map, pager, stores } = parts;
        Self { map, pager, table: Mutex::default(), reader: Reader::new(vm, stores) }
    }

    /// Adds a part of the store table, which begins with entry `first`. No store is asked for
    /// pages. Returns the number of entries of the table.
    ///
    /// # Errors
    /// Returns the errors of [`StoreTable::receive`], [`TableError::UnknownStore`] if an entry has
    /// a store with which this host was not started, and [`TableError::NotIntroduced`] if a store
    /// refuses the name of a namespace. The table is then unchanged.
    pub fn receive(&self, first: u8, entries: &[StoreEntry]) -> Result<usize, TableError> {
        for store in entries.iter().flat_map(StoreEntry::stores) {
            if !self.reader.knows(&store.name) {
                return Err(TableError::UnknownStore(store.name.clone()));
            }
        }
        entries.iter().try_for_each(|entry| self.reader.introduce(entry))?;
        let received = lock(&self.table).receive(first, entries);
        received.inspect_err(|_| entries.iter().for_each(|entry| self.reader.dismiss(entry)))
    }

    /// Returns the names of the stores that hold each page of an entry. The list is empty if there
    /// is no such entry.
    pub fn stores_of(&self, entry: u8) -> Vec<String> {
        let table = lock(&self.table);
        let stores = table.get(entry).map(StoreEntry::stores).unwrap_or_default();
        stores.iter().map(|store| store.name.clone()).collect()
    }

    /// Returns whether there is an entry with this number.
    pub fn has_entry(&self, entry: u8) -> bool {
        lock(&self.table).get(entry).is_ok()
    }

    /// Reads pages of `within` that are in stores and that no other thread has claimed, at most
    /// [`MAX_FETCHED_PAGES`] of them, and installs them. No lock is held while a store is read. A
    /// page that has moved meanwhile is not changed: it counts as a duplicate (rule 2).
    ///
    /// # Errors
    /// Returns a [`FetchError`] if no store of an entry has a page, if a store does not answer
    /// before `deadline`, or if a page cannot be installed. The pages that were read are installed
    /// nevertheless.
    pub fn fetch(&self, within: PageRange, urgency: Urgency, deadline: Instant) -> Result<Installed, FetchError> {
        let mut runs = self.map.read(|map| map.unfetched_runs(within, MAX_FETCHED_PAGES));
        runs.sort_by_key(|(run, copy)| (copy.entry, run.first));
        let entries: Vec<_> = runs.chunk_by(|(_, a), (_, b)| a.entry == b.entry).collect();
        let (mut sum, mut failed) = (Installed::default(), None);
        for (done, &of_entry) in entries.iter().enumerate() {
            // each entry has a share of the time, so that one whose stores do not answer does not
            // use it up
            let until = share(deadline, entries.len() - done);
            if let Err(error) = self.fetch_runs(of_entry, urgency, until, &mut sum) {
                failed = failed.or(Some(error));
            }
        }
        failed.map_or(Ok(sum), Err)
    }

    /// Reads pages of `within` that are in one entry of the store table, and installs them: see
    /// [`fetch`](Self::fetch).
    ///
    /// # Errors
    /// Returns the errors of [`fetch`](Self::fetch).
    pub fn fetch_entry(
        &self,
        entry: u8,
        within: PageRange,
        urgency: Urgency,
        deadline: Instant,
    ) -> Result<Installed, FetchError> {
        let runs = self.map.read(|map| map.unfetched_in(entry, within, MAX_FETCHED_PAGES));
        let mut sum = Installed::default();
        self.fetch_runs(&runs, urgency, deadline, &mut sum)?;
        Ok(sum)
    }

    fn fetch_runs(
        &self,
        runs: &[(PageRange, StoreCopy)],
        urgency: Urgency,
        deadline: Instant,
        sum: &mut Installed,
    ) -> Result<(), FetchError> {
        let Some(&(_, StoreCopy { entry: number, .. })) = runs.first() else { return Ok(()) };
        let entry = lock(&self.table).get(number).cloned().map_err(|_| FetchError::Unknown { entry: number })?;
        let mut wanted = Wanted::new(number, runs);
        let read = self.reader.read(&entry, &mut wanted, urgency, deadline);
        for &(run, copy) in runs {
            for part in wanted.found_in(run) {
                let mut first = part.first;
                while first < part.end() {
                    let end = part.end().min((first / STRIPE_PAGES + 1) * STRIPE_PAGES);
                    let installed = self.install(PageRange::new(first, end - first), copy, &wanted);
                    let installed = installed.map_err(|cause| FetchError::Install { first, cause })?;
                    sum.pages += installed.pages;
                    sum.duplicates += installed.duplicates;
                    first = end;
                }
            }
        }
        read
    }

    /// Installs pages that are in one stripe and in one copy.
    fn install(&self, range: PageRange, copy: StoreCopy, wanted: &Wanted) -> io::Result<Installed> {
        let mut page = range.first;
        let mut offset = 0;
        self.pager.install(range, PageCopy::Store(copy), &mut |slices: &[RamSlice<'_>]| {
            for slice in slices {
                let mut rest = *slice;
                while !rest.is_empty() {
                    let len = rest.len().min(PAGE_SIZE - offset);
                    rest.take(len).copy_from(&wanted.page(page)[offset..offset + len]);
                    rest = rest.skip(len);
                    offset += len;
                    if offset == PAGE_SIZE {
                        (page, offset) = (page + 1, 0);
                    }
                }
            }
            Ok(())
        })
    }

    /// Asks all stores of an entry whether they still have the pages that were put into it, and
    /// renews their leases. [`Renewed::Changed`] and [`Renewed::Silent`] mean that pages may be
    /// lost (rule 11).
    pub fn renew(&self, entry: u8, owner: Owner, lease: Duration) -> Renewed {
        let found = lock(&self.table).get(entry).cloned();
        found.map_or(Renewed::Changed, |entry| self.reader.renew(&entry, owner, lease))
    }

    /// Forgets the namespace of an entry in all of its stores. Returns the errors of the stores.
    /// See [`forget_all`](Self::forget_all) for when this may be called.
    pub fn forget(&self, entry: u8) -> Vec<StoreError> {
        let found = lock(&self.table).get(entry).cloned();
        found.map_or_else(|_| Vec::new(), |entry| self.reader.forget(&entry))
    }

    /// Forgets the namespaces of all entries in all stores. Called when no page refers to the
    /// namespaces and no earlier owner needs them (rule 14). Returns the errors of the stores.
    pub fn forget_all(&self) -> Vec<StoreError> {
        let table = lock(&self.table).clone();
        table.entries().iter().flat_map(|entry| self.reader.forget(entry)).collect()
    }
}

/// Makes the stores of this host forget the names of the namespaces. The namespaces are not
/// changed.
impl Drop for PagedMemory {
    fn drop(&mut self) {
        let table = lock(&self.table);
        table.entries().iter().for_each(|entry| self.reader.dismiss(entry));
    }
}
