//! Reads the pages of an entry from its stores.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use thiserror::Error;

use super::{EntryStore, StoreEntry, TableError};
use crate::{
    PAGE_SIZE, PageRange,
    page_map::StoreCopy,
    store::{Owner, PageStore, PageToGet, StoreError, Urgency, share},
    text::describe,
    vm_id::VmId,
};

/// The reason why pages were not fetched.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The map has pages in an entry that the store table does not have.
    #[error("the store table has no entry {entry}")]
    Unknown {
        /// The number of the entry.
        entry: u8,
    },
    /// Every store of the entry has answered, and none has the page.
    #[error("page {first} is in no store of entry {entry}")]
    Lost {
        /// The number of the entry.
        entry: u8,
        /// The number of the first page that was not found.
        first: u64,
    },
    /// No store of the entry has the page, but at least one of them did not answer and may have the
    /// page.
    #[error("page {first}: store {store} of entry {entry} does not answer")]
    Silent {
        /// The number of the entry.
        entry: u8,
        /// The number of the first page that was not found.
        first: u64,
        /// The name of the store that did not answer.
        store: String,
        /// The error of the store.
        #[source]
        cause: StoreError,
    },
    /// A page was read and could not be installed, or is being installed for too long.
    #[error("page {first} cannot be installed")]
    Install {
        /// The number of the first page of the run.
        first: u64,
        /// The error of the pager.
        #[source]
        cause: io::Error,
    },
}

/// The result of asking the stores of an entry whether they still have its pages.
#[derive(Debug)]
pub enum Renewed {
    /// No store has lost pages.
    Intact,
    /// A store does not have the namespace, or has another incarnation.
    Changed,
    /// A store does not answer.
    Silent {
        /// The name of the store.
        store: String,
        /// The error of the store.
        cause: StoreError,
    },
}

/// The pages that are to be read, and the contents that were read so far.
pub(super) struct Wanted {
    entry: u8,
    pages: Vec<PageToGet>,
    found: Vec<bool>,
    contents: Vec<u8>,
}

impl Wanted {
    /// Creates the list for the pages of `runs`, which are in one entry and ascend.
    pub(super) fn new(entry: u8, runs: &[(PageRange, StoreCopy)]) -> Self {
        let page = |page, copy: StoreCopy| PageToGet { page, generation: copy.generation };
        let pages: Vec<_> =
            runs.iter().flat_map(|&(run, copy)| run.pages().map(move |number| page(number, copy))).collect();
        Self { entry, found: vec![false; pages.len()], contents: vec![0; pages.len() * PAGE_SIZE], pages }
    }

    /// Returns the index of `page` in the list.
    fn at(&self, page: u64) -> Option<usize> {
        self.pages.binary_search_by_key(&page, |wanted| wanted.page).ok()
    }

    /// Returns the content of a page. It is zeros if the page was not found.
    pub(super) fn page(&self, page: u64) -> &[u8] {
        const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        self.at(page).map_or(&ZEROS, |at| &self.contents[at * PAGE_SIZE..(at + 1) * PAGE_SIZE])
    }

    /// Returns the runs of pages of `within` that were found.
    pub(super) fn found_in(&self, within: PageRange) -> Vec<PageRange> {
        PageRange::runs_of(within.pages().filter(|&page| self.at(page).is_some_and(|at| self.found[at])))
    }

    fn take(&mut self, page: u64, content: &[u8; PAGE_SIZE]) {
        if let Some(at) = self.at(page) {
            self.contents[at * PAGE_SIZE..(at + 1) * PAGE_SIZE].copy_from_slice(content);
            self.found[at] = true;
        }
    }

    fn missing(&self) -> Vec<PageToGet> {
        self.pages.iter().zip(&self.found).filter_map(|(page, found)| (!found).then_some(*page)).collect()
    }
}

/// The stores of this host, for one VM.
pub(super) struct Reader {
    vm: VmId,
    stores: Vec<Known>,
}

struct Known {
    store: Arc<dyn PageStore>,
    /// Whether the store did not answer when it was last asked for pages.
    silent: AtomicBool,
}

impl Reader {
    pub(super) fn new(vm: VmId, stores: Vec<Arc<dyn PageStore>>) -> Self {
        let known = |store| Known { store, silent: AtomicBool::new(false) };
        Self { vm, stores: stores.into_iter().map(known).collect() }
    }

    /// Passes the name of the namespace of an entry to the stores of the entry.
    ///
    /// # Errors
    /// Returns [`TableError::NotIntroduced`] if a store does not accept the name.
    pub(super) fn introduce(&self, entry: &StoreEntry) -> Result<(), TableError> {
        for store in entry.stores().iter().filter_map(|store| self.store(&store.name)) {
            store
                .introduce(entry.namespace(), self.vm)
                .map_err(|error| TableError::NotIntroduced { store: store.name().to_owned(), why: describe(&error) })?;
        }
        Ok(())
    }

    /// Makes the stores of an entry forget the name of its namespace, because the name is not used
    /// here any more.
    pub(super) fn dismiss(&self, entry: &StoreEntry) {
        for store in entry.stores().iter().filter_map(|store| self.store(&store.name)) {
            store.dismiss(entry.namespace().id());
        }
    }

    pub(super) fn knows(&self, name: &str) -> bool {
        self.known(name).is_some()
    }

    pub(super) fn vm(&self) -> VmId {
        self.vm
    }

    fn known(&self, name: &str) -> Option<&Known> {
        self.stores.iter().find(|known| known.store.name() == name)
    }

    pub(super) fn store(&self, name: &str) -> Option<&dyn PageStore> {
        self.known(name).map(|known| &*known.store)
    }

    /// Reads pages from the first store of the entry that has them (rule 12). Stores that did not
    /// answer the last time are asked last.
    ///
    /// # Errors
    /// Returns [`FetchError::Silent`] if a page was not found and a store did not answer, and
    /// [`FetchError::Lost`] if all stores have answered and none has the page.
    pub(super) fn read(
        &self,
        entry: &StoreEntry,
        wanted: &mut Wanted,
        urgency: Urgency,
        deadline: Instant,
    ) -> Result<(), FetchError> {
        let namespace = entry.namespace().of(self.vm);
        let mut silent = None;
        let mut stores: Vec<_> = entry.stores().iter().filter_map(|store| self.known(&store.name)).collect();
        stores.sort_by_key(|known| known.silent.load(Ordering::Relaxed));
        for (asked, Known { store, silent: was_silent }) in stores.iter().enumerate() {
            let missing = wanted.missing();
            if missing.is_empty() {
                return Ok(());
            }
            // each store has a share of the time, so that one that does not answer does not use it
            // up
            let until = share(deadline, stores.len() - asked);
            let read = store.get(namespace, &missing, urgency, until, &mut |page, data| {
                if let Some(content) = data.page() {
                    wanted.take(page, content);
                }
            });
            let failed = read.err().filter(StoreError::can_retry);
            was_silent.store(failed.is_some(), Ordering::Relaxed);
            silent = failed.map(|cause| (store.name().to_owned(), cause)).or(silent);
        }
        let Some(first) = wanted.missing().first().map(|page| page.page) else { return Ok(()) };
        let entry = wanted.entry;
        Err(match silent {
            Some((store, cause)) => FetchError::Silent { entry, first, store, cause },
            None => FetchError::Lost { entry, first },
        })
    }

    pub(super) fn renew(&self, entry: &StoreEntry, owner: Owner, lease: Duration) -> Renewed {
        let namespace = entry.namespace().of(self.vm);
        for EntryStore { name, incarnation } in entry.stores() {
            let Some(store) = self.store(name) else { return Renewed::Changed };
            match store.renew(namespace, owner, lease) {
                Ok(present) if present == *incarnation => {}
                Err(cause) if cause.can_retry() => return Renewed::Silent { store: name.clone(), cause },
                Ok(_) | Err(_) => return Renewed::Changed,
            }
        }
        Renewed::Intact
    }

    pub(super) fn forget(&self, entry: &StoreEntry) -> Vec<StoreError> {
        let namespace = entry.namespace().of(self.vm);
        let stores = entry.stores().iter().filter_map(|store| self.store(&store.name));
        stores.filter_map(|store| store.forget(namespace).err()).collect()
    }
}
