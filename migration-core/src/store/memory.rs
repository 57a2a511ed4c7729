//! A page store in the memory of this process.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use super::{
    Clock, Incarnation, NamespaceId, Owner, PageData, PageStore, PageToGet, PageToPut, ProcessClock, Record,
    StoreError, Stored, Trailer, Urgency, VmNamespace, check_get, check_lease, check_put,
    limits::{MAX_FORGOTTEN, MAX_NAMESPACES, UNSEEN_LEASE},
};
use crate::lock::lock;

/// The number of bytes that a page needs beside its value and trailer: its entry in the map and its
/// allocation.
const ENTRY_BYTES: u64 = 64;

/// A store of pages in the memory of this process, for tests, for simulations and for
/// intermediaries.
///
/// The store loses everything when it is dropped. All users share one value, for example in an
/// [`Arc`].
pub struct MemoryPageStore {
    name: String,
    limit: u64,
    clock: Arc<dyn Clock>,
    inner: Mutex<Inner>,
}

struct Inner {
    incarnation: Incarnation,
    namespaces: BTreeMap<NamespaceId, Space>,
    /// The forgotten ids, each with the time until which it is remembered.
    forgotten: HashMap<NamespaceId, Duration>,
    /// The number of bytes of all pages, with their trailers and entries.
    used: u64,
}

struct Space {
    record: Record,
    /// The longest lease that was granted.
    lease: Duration,
    /// The time at which the lease ends.
    ends: Duration,
    pages: HashMap<u64, Kept>,
}

/// A value and its trailer. Readers share the value, so that no lock is held while it is passed on.
#[derive(Clone)]
struct Kept {
    trailer: [u8; Trailer::BYTES],
    value: Arc<[u8]>,
}

impl MemoryPageStore {
    /// Returns an empty store that keeps at most `limit` bytes. This includes about 100 bytes of
    /// overhead for each page.
    pub fn new(name: impl Into<String>, limit: u64) -> Self {
        Self::with_clock(name, limit, Arc::new(ProcessClock::default()))
    }

    /// Returns a store like [`new`](Self::new), whose leases run on `clock`.
    pub fn with_clock(name: impl Into<String>, limit: u64, clock: Arc<dyn Clock>) -> Self {
        Self { name: name.into(), limit, clock, inner: Mutex::new(Inner::new()) }
    }
}

impl Inner {
    fn new() -> Self {
        Self { incarnation: Incarnation::random(), namespaces: BTreeMap::new(), forgotten: HashMap::new(), used: 0 }
    }

    /// Returns the namespace, or an error if it belongs to another VM than the caller's.
    fn space(&mut self, namespace: VmNamespace) -> Result<&mut Space, StoreError> {
        match self.namespaces.get_mut(&namespace.id) {
            None => Err(StoreError::Absent(namespace.id)),
            Some(space) if space.record.vm != namespace.vm => Err(StoreError::OtherVm(namespace.id)),
            Some(space) => Ok(space),
        }
    }

    /// Stores those of `pages` of which there is no newer generation, or none of them if there is
    /// not enough room.
    fn put(
        &mut self,
        namespace: VmNamespace,
        generation: u32,
        pages: &[PageToPut<'_>],
        limit: u64,
    ) -> Result<Stored, StoreError> {
        let used = self.used;
        let space = self.space(namespace)?;
        let taken: Vec<_> = pages
            .iter()
            .map(|page| space.pages.get(&page.page).is_none_or(|kept| kept.generation() <= generation))
            .collect();
        let to_store = || pages.iter().zip(&taken).filter_map(|(page, &taken)| taken.then_some(page));

        let added: u64 = to_store().map(|page| bytes_of(page.value)).sum();
        let replaced: u64 = to_store().filter_map(|page| space.pages.get(&page.page)).map(Kept::bytes).sum();
        let after = used - replaced + added;
        if after > limit.max(used) {
            let room = limit.saturating_sub(used);
            return Err(StoreError::NoRoom { needed: added.saturating_sub(replaced), room });
        }

        for &PageToPut { page, value } in to_store() {
            let trailer = Trailer::new(namespace.vm, page, generation, value).encode();
            space.pages.insert(page, Kept { trailer, value: value.into() });
        }
        self.used = after;
        Ok(Stored { incarnation: self.incarnation, taken })
    }

    /// Removes the ids whose time has passed.
    fn tidy(&mut self, now: Duration) {
        self.forgotten.retain(|_, until| *until > now);
    }
}

impl Space {
    fn extend_lease(&mut self, now: Duration, lease: Duration) {
        self.lease = self.lease.max(lease);
        self.ends = self.ends.max(now.saturating_add(lease));
    }
}

impl Kept {
    fn generation(&self) -> u32 {
        Trailer::decode(&self.trailer).generation()
    }

    fn bytes(&self) -> u64 {
        bytes_of(&self.value)
    }
}

/// Returns the number of bytes that a value needs in the store.
fn bytes_of(value: &[u8]) -> u64 {
    value.len() as u64 + Trailer::BYTES as u64 + ENTRY_BYTES
}

impl PageStore for MemoryPageStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn room(&self) -> u64 {
        self.limit.saturating_sub(lock(&self.inner).used)
    }

    fn create(&self, namespace: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError> {
        check_lease(lease)?;
        let now = self.clock.now();
        let mut inner = lock(&self.inner);
        inner.tidy(now);
        if inner.forgotten.contains_key(&namespace) {
            return Err(StoreError::Forgotten(namespace));
        }
        let count = inner.namespaces.len();
        match inner.namespaces.get_mut(&namespace) {
            Some(space) if !space.record.same_namespace(record) => return Err(StoreError::Occupied(namespace)),
            Some(space) => space.extend_lease(now, lease),
            None if count >= MAX_NAMESPACES => {
                return Err(StoreError::TooMany { what: "namespaces", limit: MAX_NAMESPACES });
            }
            None => {
                let ends = now.saturating_add(lease);
                inner.namespaces.insert(namespace, Space { record: *record, lease, ends, pages: HashMap::new() });
            }
        }
        Ok(inner.incarnation)
    }

    fn renew(&self, namespace: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError> {
        check_lease(lease)?;
        let now = self.clock.now();
        let mut inner = lock(&self.inner);
        let space = inner.space(namespace)?;
        space.extend_lease(now, lease);
        space.record.owner = owner;
        Ok(inner.incarnation)
    }

    fn put(&self, namespace: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
        check_put(pages)?;
        lock(&self.inner).put(namespace, generation, pages, self.limit)
    }

    fn get(
        &self,
        namespace: VmNamespace,
        pages: &[PageToGet],
        _urgency: Urgency,
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        check_get(pages)?;
        let mut missing = Vec::new();
        for &PageToGet { page, generation } in pages {
            if Instant::now() >= deadline {
                return Err(StoreError::TimedOut);
            }
            // the lock is released at the end of this statement
            let kept = lock(&self.inner).space(namespace)?.pages.get(&page).cloned();
            match kept {
                Some(kept) if Trailer::decode(&kept.trailer).proves(namespace.vm, page, generation, &kept.value) => {
                    take(page, PageData::new(&kept.value));
                }
                _ => missing.push(page),
            }
        }
        StoreError::left_out(namespace.id, missing)
    }

    fn record(&self, namespace: NamespaceId) -> Result<Option<Record>, StoreError> {
        Ok(lock(&self.inner).namespaces.get(&namespace).map(|space| space.record))
    }

    fn forget(&self, namespace: VmNamespace) -> Result<(), StoreError> {
        let now = self.clock.now();
        let mut inner = lock(&self.inner);
        inner.tidy(now);
        if let Err(error @ StoreError::OtherVm(_)) = inner.space(namespace) {
            return Err(error);
        }
        let id = namespace.id;
        if inner.forgotten.len() >= MAX_FORGOTTEN && !inner.forgotten.contains_key(&id) {
            return Err(StoreError::TooMany { what: "forgotten ids", limit: MAX_FORGOTTEN });
        }
        let mut lease = UNSEEN_LEASE;
        if let Some(space) = inner.namespaces.remove(&id) {
            lease = space.lease;
            inner.used -= space.pages.values().map(Kept::bytes).sum::<u64>();
        }
        // a repeated call does not shorten the time for which the id is remembered
        let until = inner.forgotten.entry(id).or_default();
        *until = (*until).max(now.saturating_add(lease));
        Ok(())
    }

    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
        let now = self.clock.now();
        let inner = lock(&self.inner);
        let ended = inner.namespaces.iter().filter(|(_, space)| space.ends <= now);
        Ok(ended.map(|(&id, space)| (id, space.record)).collect())
    }
}

impl fmt::Debug for MemoryPageStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = lock(&self.inner);
        f.debug_struct("MemoryPageStore")
            .field("name", &self.name)
            .field("limit", &self.limit)
            .field("used", &inner.used)
            .field("namespaces", &inner.namespaces.len())
            .finish_non_exhaustive()
    }
}

/// Faults, for tests and for simulations.
#[cfg(any(test, feature = "test-utils"))]
impl MemoryPageStore {
    /// Loses everything, as a store that was restarted does: its namespaces, its pages, and the
    /// forgotten ids. It has another incarnation from now on.
    pub fn lose_everything(&self) {
        *lock(&self.inner) = Inner::new();
    }

    /// Loses one page without noticing it, so the incarnation stays. Returns whether there was such
    /// a page.
    pub fn lose_page(&self, namespace: NamespaceId, page: u64) -> bool {
        let mut inner = lock(&self.inner);
        let lost = inner.namespaces.get_mut(&namespace).and_then(|space| space.pages.remove(&page));
        inner.used -= lost.as_ref().map_or(0, Kept::bytes);
        lost.is_some()
    }

    /// Changes one bit of the value of a page. Returns whether there was such a page.
    pub fn damage_page(&self, namespace: NamespaceId, page: u64) -> bool {
        self.change_page(namespace, page, |kept| {
            let mut value = kept.value.to_vec();
            value[kept.value.len() / 2] ^= 1;
            kept.value = value.into();
        })
    }

    /// Replaces the trailer of a page by zeros. Returns whether there was such a page.
    pub fn lose_trailer(&self, namespace: NamespaceId, page: u64) -> bool {
        self.change_page(namespace, page, |kept| kept.trailer = [0; Trailer::BYTES])
    }

    /// Replaces the value and the trailer of page `to` by those of page `from`. Returns whether
    /// there were such pages.
    pub fn mix_up_pages(&self, namespace: NamespaceId, from: u64, to: u64) -> bool {
        let mut inner = lock(&self.inner);
        let Some(space) = inner.namespaces.get_mut(&namespace) else { return false };
        let (Some(kept), true) = (space.pages.get(&from).cloned(), space.pages.contains_key(&to)) else { return false };
        let added = kept.bytes();
        let replaced = space.pages.insert(to, kept).as_ref().map_or(0, Kept::bytes);
        inner.used = inner.used - replaced + added;
        true
    }

    fn change_page(&self, namespace: NamespaceId, page: u64, change: impl FnOnce(&mut Kept)) -> bool {
        let mut inner = lock(&self.inner);
        let kept = inner.namespaces.get_mut(&namespace).and_then(|space| space.pages.get_mut(&page));
        kept.map(change).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{ManualClock, conformance::InMemory},
        *,
    };
    use crate::vm::VmId;

    crate::page_store_conformance!(InMemory::default);

    #[test]
    fn forgotten_ids_are_limited() {
        let clock = Arc::new(ManualClock::default());
        let store = MemoryPageStore::with_clock("memory", 1 << 20, clock.clone());
        let id = |number: usize| NamespaceId((number as u128).to_be_bytes());
        // `forget` checks all remembered ids, so the test fills the store directly
        let until = UNSEEN_LEASE;
        lock(&store.inner).forgotten = (1..MAX_FORGOTTEN).map(|number| (id(number), until)).collect();
        let forget = |number| store.forget(VmNamespace { id: id(number), vm: VmId([1; 16]) });
        forget(0).unwrap();
        assert!(matches!(forget(MAX_FORGOTTEN), Err(StoreError::TooMany { .. })));
        forget(0).unwrap();
        clock.advance(UNSEEN_LEASE);
        forget(MAX_FORGOTTEN).unwrap();
    }

    #[test]
    fn nothing_of_a_page_is_printed() {
        let shown = format!("{:?}", InMemory::default().shared());
        assert!(shown.starts_with("MemoryPageStore { name: \"memory\", limit: 4194304, used: 0"), "{shown}");
    }

    #[test]
    fn a_store_is_full_when_no_new_page_fits() {
        let vm = VmId([1; 16]);
        let namespace = crate::store::Namespace::new([1; 16]).of(vm);
        let record = Record { vm, purpose: crate::store::Purpose::Stage, owner: Owner::new("host-7").unwrap() };
        let put = |store: &MemoryPageStore, page| {
            store.put(namespace, 1, &[PageToPut { page, value: &[1; crate::PAGE_SIZE] }])
        };
        let probe = MemoryPageStore::new("probe", 1 << 20);
        probe.create(namespace.id, &record, UNSEEN_LEASE).unwrap();
        put(&probe, 1).unwrap();
        let page = (1 << 20) - probe.room();
        let store = MemoryPageStore::new("memory", 2 * page);
        store.create(namespace.id, &record, UNSEEN_LEASE).unwrap();
        put(&store, 1).unwrap();
        put(&store, 2).unwrap();
        assert_eq!(store.room(), 0);
        assert!(matches!(put(&store, 3), Err(StoreError::NoRoom { .. })));
        put(&store, 2).unwrap();
    }
}
