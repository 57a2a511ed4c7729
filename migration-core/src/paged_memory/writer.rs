//! Puts pages of a VM that runs here into stores.

use std::time::Duration;

use thiserror::Error;

use super::{EntryStore, PagedMemory, StoreEntry, TableError};
use crate::{
    lock::lock,
    store::{Namespace, Owner, PageToPut, Purpose, Record, StoreError},
};

/// The description of a namespace that is to be created as a new entry of the store table.
pub struct NewEntry<'a> {
    /// The names of the stores. Every page is put into each of them (rule 12).
    pub stores: &'a [String],
    /// The secret name, which must be as random as a key.
    pub namespace: Namespace,
    /// The purpose of the namespace.
    pub purpose: Purpose,
    /// The owner of the namespace, as the stores record it.
    pub owner: Owner,
    /// The time for which the stores keep the namespace unless its lease is renewed.
    pub lease: Duration,
}

/// The reason why pages were not put.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PutError {
    /// The entry is not valid, or there is no entry with this number.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A store of the entry has failed. The outcome of a put is then unknown: the put is repeated
    /// under a new generation (rule 10).
    #[error("page store {store}")]
    Store {
        /// The name of the store.
        store: String,
        /// The error of the store.
        #[source]
        cause: StoreError,
    },
    /// A store of the entry may have lost pages that were put before (rule 11).
    #[error("page store {store} has lost pages of entry {entry}")]
    Changed {
        /// The name of the store.
        store: String,
        /// The number of the entry.
        entry: u8,
    },
}

impl PutError {
    /// Returns whether pages that were put into the entry before may be lost. In that case the
    /// caller reports [`entry_lost`](crate::page_map::PageMap::entry_lost), and puts the pages into
    /// a new entry.
    pub fn is_loss(&self) -> bool {
        matches!(self, Self::Changed { .. } | Self::Store { cause: StoreError::Absent(_), .. })
    }
}

/// Methods that put pages into stores.
impl PagedMemory {
    /// Creates a namespace in all stores of a new entry. Returns the number of the entry.
    ///
    /// # Errors
    /// Returns [`PutError::Table`] with [`TableError::UnknownStore`] if this host was not started
    /// with one of the stores, and with another [`TableError`] if the entry is not valid or the
    /// table is full. Returns [`PutError::Store`] if a store has failed. Namespaces that were
    /// created before the error are forgotten.
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
                // best effort: a namespace that is left is removed after the end of its lease
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

    /// Puts pages, which must ascend by page number, into all stores of an entry. Returns for each
    /// page whether all stores have it in this generation now. No lock is held meanwhile.
    ///
    /// # Errors
    /// Returns a [`PutError`]. The outcome of the put is then unknown, except if the table has no
    /// such entry.
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
