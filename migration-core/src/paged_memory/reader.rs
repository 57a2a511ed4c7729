//! Reads pages of an entry from its stores.

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

/// Why pages were not fetched.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The map has pages in an entry that the table lacks.
    #[error("the store table has no entry {entry}")]
    Unknown {
        /// The entry.
        entry: u8,
    },
    /// Every store of the entry has answered, and none has the page.
    #[error("page {first} is in no store of entry {entry}")]
    Lost {
        /// The entry.
        entry: u8,
        /// The first page that is missing.
        first: u64,
    },
    /// A store of the entry may have the page, and does not answer.
    #[error("page {first}: store {store} of entry {entry} does not answer")]
    Silent {
        /// The entry.
        entry: u8,
        /// The first page that is missing.
        first: u64,
        /// The store.
        store: String,
        /// What it says.
        #[source]
        cause: StoreError,
    },
    /// A page was read and could not be installed, or is being installed for too long.
    #[error("page {first} cannot be installed")]
    Install {
        /// The first page of the run.
        first: u64,
        /// What the pager says.
        #[source]
        cause: io::Error,
    },
}

/// What the stores of an entry say about it.
#[derive(Debug)]
pub enum Renewed {
    /// All stores have lost nothing.
    Intact,
    /// A store lacks the namespace, or has another incarnation.
    Changed,
    /// A store does not answer.
    Silent {
        /// The store.
        store: String,
        /// What it says.
        cause: StoreError,
    },
}

/// Pages that are read, and what was read of them.
pub(super) struct Wanted {
    entry: u8,
    pages: Vec<PageToGet>,
    found: Vec<bool>,
    contents: Vec<u8>,
}

impl Wanted {
    /// Runs of one entry, ascending.
    pub(super) fn new(entry: u8, runs: &[(PageRange, StoreCopy)]) -> Self {
        let page = |page, copy: StoreCopy| PageToGet { page, generation: copy.generation };
        let pages: Vec<_> =
            runs.iter().flat_map(|&(run, copy)| run.pages().map(move |number| page(number, copy))).collect();
        Self { entry, found: vec![false; pages.len()], contents: vec![0; pages.len() * PAGE_SIZE], pages }
    }

    /// Returns the place of `page` among the pages.
    fn at(&self, page: u64) -> Option<usize> {
        self.pages.binary_search_by_key(&page, |wanted| wanted.page).ok()
    }

    /// Returns the content of a page that was found, and zeros for any other.
    pub(super) fn page(&self, page: u64) -> &[u8] {
        const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        self.at(page).map_or(&ZEROS, |at| &self.contents[at * PAGE_SIZE..(at + 1) * PAGE_SIZE])
    }

    /// Returns the runs of `within` that were found.
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
    /// Whether it did not answer the last time that it was asked for pages.
    silent: AtomicBool,
}

impl Reader {
    pub(super) fn new(vm: VmId, stores: Vec<Arc<dyn PageStore>>) -> Self {
        let known = |store| Known { store, silent: AtomicBool::new(false) };
        Self { vm, stores: stores.into_iter().map(known).collect() }
    }

    /// Tells the stores of an entry the name of its namespace.
    ///
    /// # Errors
    /// [`TableError::NotIntroduced`].
    pub(super) fn introduce(&self, entry: &StoreEntry) -> Result<(), TableError> {
        for store in entry.stores().iter().filter_map(|store| self.store(&store.name)) {
            store
                .introduce(entry.namespace(), self.vm)
                .map_err(|error| TableError::NotIntroduced { store: store.name().to_owned(), why: describe(&error) })?;
        }
        Ok(())
    }

    /// The namespace of an entry is not used here any more.
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

    /// Reads pages from the first store of the entry that has them (rule 12). Stores that were
    /// silent the last time are asked last.
    ///
    /// # Errors
    /// [`FetchError::Lost`] and [`FetchError::Silent`].
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
            // a store that is silent leaves the others their share of the time
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
