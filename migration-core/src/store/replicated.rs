//! A page store that keeps all pages of an entry in each of several stores.

use std::{
    collections::BTreeMap,
    fmt,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use sha2::{Digest as _, Sha256};

use super::{
    Incarnation, Namespace, NamespaceId, Owner, PageData, PageStore, PageToGet, PageToPut, Record, StoreError, Stored,
    Urgency, VmNamespace, check_get, check_put,
};
use crate::vm_id::VmId;

/// A store that keeps every page in *k* stores (rule 12). It is one entry of a session's store
/// table.
///
/// - **A put is acknowledged when all *k* stores have the page.** The stores are written at the
///   same time. If one of them fails, the put fails: the page stays with its owner until it is put
///   again, under a new generation. [`Stored::taken`] is `true` for a page that all stores have
///   taken.
/// - **A reader asks the next store** when one does not answer, does not have the page, or has an
///   older generation. A page is [missing](StoreError::Missing) only if all stores answer that they
///   do not have it. If one of them did not answer, its error is returned instead, so that the
///   caller repeats the request. Each store that is asked gets an equal share of the time that is
///   left. The store that has answered last is asked first the next time, so a dead store costs one
///   request.
/// - **The incarnation** is computed from the incarnations of all stores: it changes if one of them
///   changes. `create` and `renew` need all stores.
/// - `forget` is sent to all stores, even if one of them fails. Repeat the call in this case: to
///   forget twice is harmless. After a failed `create`, forget the namespace and create another
///   entry.
///
/// The room is that of the fullest store. If one store has no room for a put and the others have
/// stored it, the error is [`StoreError::NoRoom`], and the put was stored in part.
///
/// # Example
///
/// ```
/// use migration_core::store::{MemoryPageStore, PageStore, Replicated};
///
/// let stores = vec![MemoryPageStore::new("rack-7", 64 << 20), MemoryPageStore::new("rack-8", 32 << 20)];
/// let store = Replicated::new("racks-7-8", stores).ok_or("no store")?;
/// assert_eq!(store.room(), 32 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Replicated<S> {
    name: String,
    stores: Vec<S>,
    /// The index of the store that has answered last.
    first: AtomicUsize,
}

impl<S: PageStore> Replicated<S> {
    /// Returns the store that consists of `stores`, with its own name. Returns `None` if `stores`
    /// is empty.
    pub fn new(name: impl Into<String>, stores: Vec<S>) -> Option<Self> {
        match stores.is_empty() {
            true => None,
            false => Some(Self { name: name.into(), stores, first: AtomicUsize::new(0) }),
        }
    }

    /// Returns the stores, for example to show the health of each.
    pub fn stores(&self) -> &[S] {
        &self.stores
    }

    /// Makes the same call to all stores at once. Returns all results, or the first error after
    /// every store has answered.
    fn with_all<T: Send>(
        &self,
        call: impl Fn(&dyn PageStore) -> Result<T, StoreError> + Sync,
    ) -> Result<Vec<T>, StoreError> {
        let Some((own, others)) = self.stores.split_first() else { return Ok(Vec::new()) };
        let results: Vec<_> = thread::scope(|scope| {
            let call = &call;
            let threads: Vec<_> = others.iter().map(|store| scope.spawn(move || call(store))).collect();
            let first = call(own);
            let rest = threads.into_iter().map(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            std::iter::once(first).chain(rest).collect()
        });
        results.into_iter().collect()
    }
}

/// Returns the incarnation that is computed from those of all stores.
fn combined(incarnations: &[Incarnation]) -> Incarnation {
    let mut hash = Sha256::new();
    for incarnation in incarnations {
        hash.update(incarnation.0);
    }
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.finalize()[..16]);
    Incarnation(bytes)
}

/// The answers of the stores that a `get` has asked.
#[derive(Default)]
struct Asked {
    /// The number of stores that do not have the namespace.
    absent: usize,
    /// The first other error. After such an error it is not known whether the store has the pages.
    silent: Option<StoreError>,
}

impl Asked {
    /// Returns the result of a `get` after all stores were asked. `missing` are the pages that no
    /// store has returned.
    fn conclude(self, stores: usize, namespace: NamespaceId, missing: &[PageToGet]) -> Result<(), StoreError> {
        match self.silent {
            _ if missing.is_empty() => Ok(()),
            Some(error) => Err(error),
            None if self.absent == stores => Err(StoreError::Absent(namespace)),
            None => StoreError::left_out(namespace, missing.iter().map(|wanted| wanted.page)),
        }
    }
}

/// Returns the deadline for the next store, so that each of the `stores` stores that remain to be
/// asked gets an equal share of the time.
pub(crate) fn share(deadline: Instant, stores: usize) -> Instant {
    let now = Instant::now();
    let left = deadline.saturating_duration_since(now);
    match stores {
        0 | 1 => deadline,
        stores => now + left / u32::try_from(stores).unwrap_or(u32::MAX),
    }
}

impl<S: PageStore> PageStore for Replicated<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn room(&self) -> u64 {
        self.stores.iter().map(PageStore::room).min().unwrap_or(0)
    }

    fn introduce(&self, name: &Namespace, vm: VmId) -> Result<(), StoreError> {
        self.stores.iter().try_for_each(|store| store.introduce(name, vm))
    }

    fn dismiss(&self, namespace: NamespaceId) {
        self.stores.iter().for_each(|store| store.dismiss(namespace));
    }

    fn create(&self, namespace: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError> {
        self.with_all(|store| store.create(namespace, record, lease)).map(|all| combined(&all))
    }

    fn renew(&self, namespace: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError> {
        self.with_all(|store| store.renew(namespace, owner, lease)).map(|all| combined(&all))
    }

    fn put(&self, namespace: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
        check_put(pages)?;
        let all = self.with_all(|store| store.put(namespace, generation, pages))?;
        let incarnations: Vec<_> = all.iter().map(|stored| stored.incarnation).collect();
        let taken_by_all = |at: usize| all.iter().all(|stored| stored.taken.get(at) == Some(&true));
        Ok(Stored { incarnation: combined(&incarnations), taken: (0..pages.len()).map(taken_by_all).collect() })
    }

    fn get(
        &self,
        namespace: VmNamespace,
        pages: &[PageToGet],
        urgency: Urgency,
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        check_get(pages)?;
        let count = self.stores.len();
        let first = self.first.load(Ordering::Relaxed);
        let mut missing = pages.to_vec();
        let mut asked = Asked::default();
        for step in 0..count {
            let at = (first + step) % count;
            let mut got = vec![false; missing.len()];
            let result =
                self.stores[at].get(namespace, &missing, urgency, share(deadline, count - step), &mut |page, data| {
                    // pages that were not requested, or were received already, are not passed on
                    if let Ok(position) = missing.binary_search_by_key(&page, |wanted| wanted.page)
                        && !std::mem::replace(&mut got[position], true)
                    {
                        take(page, data);
                    }
                });
            match result {
                Ok(()) | Err(StoreError::Missing { .. }) => self.first.store(at, Ordering::Relaxed),
                Err(StoreError::Absent(_)) => asked.absent += 1,
                Err(error) => asked.silent = asked.silent.or(Some(error)),
            }
            let mut position = 0;
            missing.retain(|_| {
                position += 1;
                !got[position - 1]
            });
            if missing.is_empty() {
                break;
            }
        }
        asked.conclude(count, namespace.id, &missing)
    }

    /// Returns the record of the first store that has one. An error of another store is returned
    /// only if no store has a record.
    fn record(&self, namespace: NamespaceId) -> Result<Option<Record>, StoreError> {
        let mut failed = None;
        for store in &self.stores {
            match store.record(namespace) {
                Ok(None) => {}
                Ok(found) => return Ok(found),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(None), Err)
    }

    fn forget(&self, namespace: VmNamespace) -> Result<(), StoreError> {
        self.with_all(|store| store.forget(namespace)).map(drop)
    }

    /// Returns a namespace only if its lease has ended in every store that has it: a renewal that
    /// reached only some of the stores counts.
    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
        let mut ended: BTreeMap<NamespaceId, (Record, Vec<usize>)> = BTreeMap::new();
        for (at, store) in self.stores.iter().enumerate() {
            for (id, record) in store.expired()? {
                ended.entry(id).or_insert((record, Vec::new())).1.push(at);
            }
        }
        let mut all = Vec::new();
        for (id, (record, listing)) in ended {
            // only the other stores are asked; usually there are none
            let mut others = self.stores.iter().enumerate().filter(|(at, _)| !listing.contains(at));
            let renewed = others
                .try_fold(false, |found, (_, store)| Ok::<_, StoreError>(found || store.record(id)?.is_some()))?;
            if !renewed {
                all.push((id, record));
            }
        }
        Ok(all)
    }
}

impl<S: PageStore> fmt::Debug for Replicated<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stores: Vec<_> = self.stores.iter().map(PageStore::name).collect();
        f.debug_struct("Replicated").field("name", &self.name).field("stores", &stores).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
