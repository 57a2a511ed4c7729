//! The store table of a session: the namespace and the stores that belong to the number of an
//! entry.

use thiserror::Error;

use crate::{
    limits::{MAX_ENTRIES, MAX_ENTRY_STORES, MAX_STORE_NAME},
    store::{Incarnation, Namespace},
};

/// One of the stores of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryStore {
    /// The name under which both sides have configured the store.
    pub name: String,
    /// The incarnation that the store had when the namespace was created there (rule 11).
    pub incarnation: Incarnation,
}

/// A namespace, and all stores that hold each of its pages.
///
/// The name of the namespace is a secret that gives access to its pages. The `Debug` form shows
/// only its id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreEntry {
    namespace: Namespace,
    stores: Vec<EntryStore>,
}

impl StoreEntry {
    /// Creates an entry. Each of its pages is in all of `stores` (rule 12).
    ///
    /// # Errors
    /// Returns [`TableError::BadEntry`] unless there are 1 to [`MAX_ENTRY_STORES`] stores with
    /// different names of 1 to [`MAX_STORE_NAME`] bytes.
    pub fn new(namespace: Namespace, stores: Vec<EntryStore>) -> Result<Self, TableError> {
        if stores.is_empty() || stores.len() > MAX_ENTRY_STORES {
            return Err(TableError::BadEntry("it has no stores, or too many"));
        }
        for (at, store) in stores.iter().enumerate() {
            if store.name.is_empty() || store.name.len() > MAX_STORE_NAME {
                return Err(TableError::BadEntry("a store's name is empty or too long"));
            }
            if stores[..at].iter().any(|other| other.name == store.name) {
                return Err(TableError::BadEntry("it has a store twice"));
            }
        }
        Ok(Self { namespace, stores })
    }

    /// Returns the namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Returns the stores, in the order in which a reader asks them.
    pub fn stores(&self) -> &[EntryStore] {
        &self.stores
    }
}

/// The reason why a store table or a part of it is not accepted.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableError {
    /// The table has [`MAX_ENTRIES`] entries. The owner can make room only for its next session: it
    /// copies the pages of the oldest entry into a namespace of its own.
    #[error("the store table is full: it has {MAX_ENTRIES} entries")]
    Full,
    /// An entry is not valid.
    #[error("an entry of the store table: {0}")]
    BadEntry(&'static str),
    /// This host was not started with a store of an entry.
    #[error("there is no page store {0} here")]
    UnknownStore(String),
    /// A store of an entry does not accept the name of the namespace.
    #[error("page store {store} does not take the name of a namespace: {why}")]
    NotIntroduced {
        /// The name of the store.
        store: String,
        /// The error of the store.
        why: String,
    },
    /// There is no entry with this number.
    #[error("the store table has no entry {0}")]
    Unknown(u8),
    /// The destination has not acknowledged the entry.
    #[error("entry {0} of the store table is not acknowledged by the destination")]
    NotAcknowledged(u8),
    /// A part of a table has another content for an entry than an earlier part.
    #[error("entry {0} of the store table would change its meaning")]
    Changed(u8),
    /// A part of a table leaves entries out, or an acknowledgement covers more entries than there
    /// are.
    #[error("{0} entries of the store table are unknown here")]
    Gap(usize),
}

/// The entries of a session, by number. Entries are only appended, so that a number never changes
/// its meaning (rule 15).
///
/// ```
/// use migration_core::{
///     paged_memory::{EntryStore, StoreEntry, StoreTable},
///     store::{Incarnation, Namespace},
/// };
/// let rack = EntryStore { name: "rack-7".into(), incarnation: Incarnation([3; 16]) };
/// let mut table = StoreTable::default();
/// let number = table.append(StoreEntry::new(Namespace::new([7; 16]), vec![rack])?)?;
/// assert!(table.usable(number).is_err(), "the destination does not know it yet");
/// table.acknowledged(1)?;
/// assert_eq!(table.usable(number)?.stores()[0].name, "rack-7");
/// # Ok::<(), migration_core::paged_memory::TableError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreTable {
    entries: Vec<StoreEntry>,
    /// The number of entries that the destination has acknowledged since the table was last sent
    /// from the start (`acknowledged`), and the largest such number so far (`known`).
    acknowledged: usize,
    known: usize,
}

impl StoreTable {
    /// Returns the number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the entries, ordered by number.
    pub fn entries(&self) -> &[StoreEntry] {
        &self.entries
    }

    /// Returns the entry with this number.
    ///
    /// # Errors
    /// Returns [`TableError::Unknown`] if there is none.
    pub fn get(&self, entry: u8) -> Result<&StoreEntry, TableError> {
        self.entries.get(usize::from(entry)).ok_or(TableError::Unknown(entry))
    }

    /// Adds an entry. Returns its number.
    ///
    /// # Errors
    /// Returns [`TableError::Full`] if the table has [`MAX_ENTRIES`] entries.
    pub fn append(&mut self, entry: StoreEntry) -> Result<u8, TableError> {
        let number = u8::try_from(self.entries.len()).ok().filter(|&number| usize::from(number) < MAX_ENTRIES);
        let number = number.ok_or(TableError::Full)?;
        self.entries.push(entry);
        Ok(number)
    }

    /// Replaces an entry by one with a new namespace, because its namespace is lost.
    ///
    /// # Errors
    /// Returns [`TableError::Unknown`] if there is no such entry, and [`TableError::Changed`] if
    /// the destination knows the entry.
    pub fn replace(&mut self, number: u8, entry: StoreEntry) -> Result<(), TableError> {
        let (at, known) = (usize::from(number), self.known);
        let old = self.entries.get_mut(at).ok_or(TableError::Unknown(number))?;
        if at < known {
            return Err(TableError::Changed(number));
        }
        *old = entry;
        Ok(())
    }

    /// Returns an entry that the destination has acknowledged. Other entries must not be used (rule
    /// 15).
    ///
    /// # Errors
    /// Returns [`TableError::Unknown`] if there is no such entry, and
    /// [`TableError::NotAcknowledged`] if the destination has not acknowledged it.
    pub fn usable(&self, entry: u8) -> Result<&StoreEntry, TableError> {
        let found = self.get(entry)?;
        if usize::from(entry) < self.acknowledged { Ok(found) } else { Err(TableError::NotAcknowledged(entry)) }
    }

    /// Returns the entries that the destination has not acknowledged, and the number of the first
    /// of them.
    pub fn unacknowledged(&self) -> (u8, &[StoreEntry]) {
        // at most 255 entries
        (self.acknowledged as u8, &self.entries[self.acknowledged..])
    }

    /// Records that the destination has the first `entries` entries.
    ///
    /// # Errors
    /// Returns [`TableError::Gap`] if the table has fewer entries.
    pub fn acknowledged(&mut self, entries: usize) -> Result<(), TableError> {
        if entries > self.entries.len() {
            return Err(TableError::Gap(entries - self.entries.len()));
        }
        self.acknowledged = self.acknowledged.max(entries);
        self.known = self.known.max(entries);
        Ok(())
    }

    /// Returns the number of entries that the destination has ever acknowledged. The destination
    /// may refer to these entries, also while the table is being sent again.
    pub fn known(&self) -> usize {
        self.known
    }

    /// Marks all entries as not acknowledged, because the link was lost: entries that were not
    /// acknowledged may not have arrived. The whole table is then sent again (rule 18).
    pub fn repeat(&mut self) {
        self.acknowledged = 0;
    }

    /// Begins a session with another destination, which has acknowledged no entry. The table keeps
    /// its first `entries` entries.
    pub fn begin_session(&mut self, entries: usize) {
        self.entries.truncate(entries);
        (self.acknowledged, self.known) = (0, 0);
    }

    /// Adds a part of the peer's table, which begins with entry `first`. Entries that the table has
    /// already must be the same. Returns the number of entries.
    ///
    /// # Errors
    /// Returns [`TableError::Gap`] if the part does not follow the present entries,
    /// [`TableError::Changed`] if it has another content for an entry, and [`TableError::Full`] if
    /// there are too many entries. The table is then unchanged.
    pub fn receive(&mut self, first: u8, entries: &[StoreEntry]) -> Result<usize, TableError> {
        let first = usize::from(first);
        if first > self.entries.len() {
            return Err(TableError::Gap(first - self.entries.len()));
        }
        let known = entries.len().min(self.entries.len() - first);
        let (repeated, new) = entries.split_at(known);
        let changed = repeated.iter().zip(&self.entries[first..]).position(|(entry, own)| entry != own);
        if let Some(at) = changed {
            // below the number of entries, at most 255
            return Err(TableError::Changed((first + at) as u8));
        }
        if self.entries.len() + new.len() > MAX_ENTRIES {
            return Err(TableError::Full);
        }
        self.entries.extend_from_slice(new);
        Ok(self.entries.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: u8) -> StoreEntry {
        let store = EntryStore { name: format!("store-{name}"), incarnation: Incarnation([name; 16]) };
        StoreEntry::new(Namespace::new([name; 16]), vec![store]).unwrap()
    }

    #[test]
    fn a_table_has_at_most_255_entries() {
        let mut table = StoreTable::default();
        for number in 0..255 {
            assert_eq!(table.append(entry(number)), Ok(number));
        }
        assert_eq!(table.append(entry(255)), Err(TableError::Full));
        let mut peer = StoreTable::default();
        assert_eq!(peer.receive(0, table.entries()), Ok(255));
        assert_eq!(peer.receive(255, &[entry(0)]), Err(TableError::Full));
        assert_eq!(peer, StoreTable { acknowledged: 0, known: 0, ..table });
    }

    #[test]
    fn a_number_never_changes_its_meaning() {
        let mut table = StoreTable::default();
        assert_eq!(table.receive(0, &[entry(1), entry(2)]), Ok(2));
        // the part is repeated after a lost link, with a further entry
        assert_eq!(table.receive(0, &[entry(1), entry(2), entry(3)]), Ok(3));
        assert_eq!(table.receive(2, &[entry(3)]), Ok(3));
        assert_eq!(table.receive(3, &[]), Ok(3));
        assert_eq!(table.receive(1, &[entry(2), entry(4)]), Err(TableError::Changed(2)));
        assert_eq!(table.receive(5, &[entry(6)]), Err(TableError::Gap(2)));
        assert_eq!(table.entries(), [entry(1), entry(2), entry(3)]);
    }

    #[test]
    fn an_entry_that_no_destination_knows_gets_a_new_namespace() {
        let mut table = StoreTable::default();
        assert_eq!(table.replace(0, entry(1)), Err(TableError::Unknown(0)));
        table.append(entry(1)).unwrap();
        table.replace(0, entry(2)).unwrap();
        table.acknowledged(1).unwrap();
        assert_eq!(table.replace(0, entry(3)), Err(TableError::Changed(0)));
        table.repeat();
        assert_eq!(table.replace(0, entry(3)), Err(TableError::Changed(0)), "the destination may refer to it");
        table.begin_session(1);
        table.replace(0, entry(3)).unwrap();
        assert_eq!((table.entries(), table.known()), (&[entry(3)][..], 0));
    }

    #[test]
    fn only_what_is_acknowledged_is_used() {
        let mut table = StoreTable::default();
        table.append(entry(1)).unwrap();
        table.append(entry(2)).unwrap();
        assert_eq!(table.unacknowledged(), (0, &[entry(1), entry(2)][..]));
        table.acknowledged(1).unwrap();
        assert_eq!(table.usable(0), Ok(&entry(1)));
        assert_eq!(table.usable(1), Err(TableError::NotAcknowledged(1)));
        assert_eq!(table.usable(2), Err(TableError::Unknown(2)));
        assert_eq!(table.unacknowledged(), (1, &[entry(2)][..]));
        assert_eq!(table.acknowledged(3), Err(TableError::Gap(1)));
        table.repeat();
        assert_eq!((table.unacknowledged().0, table.known()), (0, 1));
    }

    #[test]
    fn an_entry_has_a_few_stores_with_names() {
        let store = |name: &str| EntryStore { name: name.into(), incarnation: Incarnation([1; 16]) };
        let new = |stores| StoreEntry::new(Namespace::new([1; 16]), stores);
        assert!(new(vec![store("a"), store("b")]).is_ok());
        let many = (0..=MAX_ENTRY_STORES).map(|n| store(&n.to_string())).collect();
        for bad in [vec![], vec![store("")], vec![store("a"), store("a")], vec![store(&"x".repeat(65))], many] {
            assert!(matches!(new(bad.clone()), Err(TableError::BadEntry(_))), "{bad:?}");
        }
    }

    #[test]
    fn the_name_of_a_namespace_is_not_shown() {
        let store = EntryStore { name: "a".into(), incarnation: Incarnation([1; 16]) };
        let shown = format!("{:?}", StoreEntry::new(Namespace::new([0x5a; 16]), vec![store]).unwrap());
        assert!(!shown.contains("5a5a") && !shown.contains("90, 90"), "{shown}");
    }

    #[test]
    fn an_entry_is_as_large_as_its_bounds() {
        let of = |stores: usize, name: usize| {
            let store = |n: usize| EntryStore { name: format!("{n:0name$}"), incarnation: Incarnation([1; 16]) };
            StoreEntry::new(Namespace::new([1; 16]), (0..stores).map(store).collect())
        };
        assert!(of(1, 1).is_ok() && of(MAX_ENTRY_STORES, MAX_STORE_NAME).is_ok());
        for (stores, name) in [(0, 1), (MAX_ENTRY_STORES + 1, 8), (1, MAX_STORE_NAME + 1)] {
            assert!(matches!(of(stores, name), Err(TableError::BadEntry(_))), "{stores} {name}");
        }
    }

    #[test]
    fn what_the_destination_has_acknowledged_stays_known() {
        let mut table = StoreTable::default();
        for number in 0..3 {
            assert_eq!(table.append(entry(number)), Ok(number));
        }
        assert_eq!(table.known(), 0);
        assert_eq!(table.acknowledged(5), Err(TableError::Gap(2)));
        table.acknowledged(2).unwrap();
        table.repeat();
        table.acknowledged(1).unwrap();
        assert_eq!(table.known(), 2);
    }
}
