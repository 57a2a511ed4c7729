//! Puts pages of a VM that runs here into stores.

use std::time::Duration;

use thiserror::Error;

use super::{EntryStore, PagedMemory, StoreEntry, TableError};
use crate::{
    lock::lock,
    store::{Namespace, Owner, PageToPut, Purpose, Record, StoreError},
};

/// A namespace that is to be created, as a new entry of the store table.
pub struct NewEntry<'a> {
    /// The names of the stores. Each of them gets every page (rule 12).
    pub stores: &'a [String],
    /// The secret name, as random as a key.
    pub namespace: Namespace,
    /// What it is for.
    pub purpose: Purpose,
    /// Who answers for it, as the stores record it.
    pub owner: Owner,
    /// For how long the stores keep it unless it is renewed.
    pub lease: Duration,
}

/// Why pages were not put.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PutError {
    /// The entry cannot be, or there is none with this number.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A store of the entry has failed. The outcome of a put is unknown then: it is repeated under a
    /// new generation (rule 10).
    #[error("page store {store}")]
    Store {
        /// The store.
        store: String,
        /// What it says.
        #[source]
        cause: StoreError,
    },
    /// A store of the entry may have lost what was put before (rule 11).
    #[error("page store {store} has lost pages of entry {entry}")]
    Changed {
        /// The store.
        store: String,
        /// The entry.
        entry: u8,
    },
}

impl PutError {
    /// Returns whether what was put into the entry before may be lost: the caller reports
    /// [`entry_lost`](crate::page_map::PageMap::entry_lost), and puts into a new entry.
    pub fn is_loss(&self) -> bool {
        matches!(self, Self::Changed { .. } | Self::Store { cause: StoreError::Absent(_), .. })
    }
}

/// Puts.
impl PagedMemory {
    /// Creates a namespace in all stores of a new entry. Returns the number of the entry.
    ///
    /// # Errors
    /// [`PutError::Table`] with [`TableError::UnknownStore`] if this host was not started with one of
    /// the stores, or if the table is full; [`PutError::Store`]. What was created before is forgotten.
    pub fn create_entry(&self, new: &NewEntry<'_>) -> Result<u8, PutError> {
        let unknown = |name: &&String| !self.reader.knows(name);
        if let Some(name) = new.stores.iter().find(unknown) {
            return Err(TableError::UnknownStore(name.clone()).into());
        }
        let entry = self.create(new).and_then(|stores| {
            let entry = StoreEntry::new(new.namespace.clone(), stores)?;
            Ok(lock(&self.table).append(entry)?)
        });
        if entry.is_err() {
            let of = new.namespace.of(self.reader.vm());
            for store in new.stores.iter().filter_map(|name| self.reader.store(name)) {
                // best effort: the lease says what to do about the rest
                let _ = store.forget(of);
            }
        }
        entry
    }

    fn create(&self, new: &NewEntry<'_>) -> Result<Vec<EntryStore>, PutError> {
        let record = Record { vm: self.reader.vm(), purpose: new.purpose, owner: new.owner };
        let create = |name: &String| {
            let Some(store) = self.reader.store(name) else {
                return Err(TableError::UnknownStore(name.clone()).into());
            };
            let created = store.create(new.namespace.id(), &record, new.lease);
            let incarnation = created.map_err(|cause| PutError::Store { store: name.clone(), cause })?;
            Ok(EntryStore { name: name.clone(), incarnation })
        };
        new.stores.iter().map(create).collect()
    }

    /// Puts pages, which ascend by page number, into all stores of an entry. Returns for each page
    /// whether all of them have it in this generation now. No lock is held meanwhile.
    ///
    /// # Errors
    /// [`PutError`]; the outcome is unknown then, but for an entry that the table lacks.
    pub fn put(&self, entry: u8, generation: u32, pages: &[PageToPut<'_>]) -> Result<Vec<bool>, PutError> {
        let found = lock(&self.table).get(entry).cloned()?;
        let of = found.namespace().of(self.reader.vm());
        let mut taken = vec![true; pages.len()];
        for EntryStore { name, incarnation } in found.stores() {
            let Some(store) = self.reader.store(name) else {
                return Err(TableError::UnknownStore(name.clone()).into());
            };
            let stored = store.put(of, generation, pages);
            let stored = stored.map_err(|cause| PutError::Store { store: name.clone(), cause })?;
            if stored.incarnation != *incarnation {
                return Err(PutError::Changed { store: name.clone(), entry });
            }
            taken.iter_mut().zip(stored.taken).for_each(|(all, this)| *all &= this);
        }
        Ok(taken)
    }
}
