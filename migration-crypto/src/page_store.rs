//! Page stores whose keepers can neither read nor forge the pages.

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    fmt, io,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use migration_core::{
    store::{
        Incarnation, Namespace, NamespaceId, Owner, PageData, PageStore, PageToGet, PageToPut, Record, StoreError,
        Stored, Urgency, VmNamespace, check_get, check_put,
        limits::{MAX_NAMESPACES, MAX_VALUE_BYTES},
    },
    vm::VmId,
};

use zeroize::Zeroizing;

use crate::{PageError, PageSealer, Psk, Purpose, SEAL_OVERHEAD, Suite, aead::Backend};

/// Most bytes in a value that [`Sealed`] takes: what a store takes, less the nonce and the tag.
const MAX_PLAIN_BYTES: usize = MAX_VALUE_BYTES - SEAL_OVERHEAD;
/// Most names that [`Sealed`] knows: those of all namespaces of a store, and as many whose removal
/// is still due.
const MAX_NAMES: usize = 2 * MAX_NAMESPACES;

/// Makes the name of a new namespace, of random bytes from the operating system.
///
/// # Errors
/// Returns [`PageError::Crypto`] if the operating system has no random bytes to give.
pub fn random_namespace() -> Result<Namespace, PageError> {
    let mut secret = Zeroizing::new([0; 16]);
    getrandom::fill(&mut secret[..]).map_err(|_| PageError::Crypto)?;
    Ok(Namespace::new(*secret))
}

/// Seals every page before it goes into another store, and opens every page that comes out of it.
///
/// Whoever has the store can neither read a page, nor change it, nor hand out another one in its
/// place: neither of another namespace, VM or page number, nor of an earlier put. All that counts
/// as missing, as if the store had lost the page (rule 3). The store still sees which pages of a
/// namespace are put and read, when, and how long they are. It can lose pages, and it can lie about
/// its incarnation, about records and about what it took.
///
/// The key of a namespace is derived from the namespace's name and a master key, which no store
/// sees (rule 24). So names have to be [introduced](PageStore::introduce) before pages can be put or
/// read; a migration does it. [`add`](Self::add) does the same, and returns how to ask.
/// Namespaces can be renewed, listed and forgotten without their names.
///
/// The incarnation that this returns is derived from that of the inner store and from the master
/// key. So a store that is sealed with another key, or not at all, has another incarnation, and a
/// migration notices before it relies on pages that it could not open.
///
/// A value takes 28 bytes more in the store, and may have 28 bytes less than [`MAX_VALUE_BYTES`].
///
/// # Example
///
/// ```
/// use std::time::{Duration, Instant};
///
/// use migration_core::{
///     PAGE_SIZE,
///     store::{MemoryPageStore, Owner, PageStore, PageToGet, PageToPut, Purpose, Record, Urgency},
///     vm::VmId,
/// };
/// use migration_crypto::{Psk, Sealed, Suite, aead, random_namespace};
///
/// // as a rule, of a file: `Psk::load`
/// let master = Psk::new([7; 32]);
/// let store = Sealed::new(MemoryPageStore::new("rack-7", 64 << 20), master, Suite::Aes256Gcm, aead::best());
///
/// let (name, vm) = (random_namespace()?, VmId([1; 16]));
/// let namespace = store.add(&name, vm)?;
/// let record = Record { vm, purpose: Purpose::Home, owner: Owner::new("host-7")? };
/// store.create(namespace.id, &record, Duration::from_secs(60))?;
/// store.put(namespace, 1, &[PageToPut { page: 40, value: &[0x5a; PAGE_SIZE] }])?;
///
/// let wanted = [PageToGet { page: 40, generation: 1 }];
/// let deadline = Instant::now() + Duration::from_secs(5);
/// store.get(namespace, &wanted, Urgency::Fault, deadline, &mut |page, data| {
///     assert_eq!((page, data.page()), (40, Some(&[0x5a; PAGE_SIZE])));
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Sealed<S> {
    inner: S,
    master: Psk,
    suite: Suite,
    backend: &'static dyn Backend,
    keys: RwLock<HashMap<NamespaceId, Arc<Keys>>>,
}

/// The key of a namespace, twice: a fault that opens a page never waits for a put that seals some.
struct Keys {
    vm: VmId,
    sealing: Mutex<PageSealer>,
    opening: PageSealer,
}

impl<S: PageStore> Sealed<S> {
    /// Wraps `inner`. Everyone who reads the pages must have the same master key and suite.
    pub fn new(inner: S, master: Psk, suite: Suite, backend: &'static dyn Backend) -> Self {
        Self { inner, master, suite, backend, keys: RwLock::default() }
    }

    /// Makes pages of the namespace with this name readable and writable, which must be those of
    /// `vm`. Returns how the namespace is asked for. It may be called again with the same
    /// arguments.
    ///
    /// # Errors
    /// Returns [`StoreError::Occupied`] if the name was added for another VM,
    /// [`StoreError::TooMany`] if twice [`MAX_NAMESPACES`] names were added, and [`StoreError::Io`]
    /// if the operating system has no random bytes to give.
    pub fn add(&self, name: &Namespace, vm: VmId) -> Result<VmNamespace, StoreError> {
        let namespace = name.of(vm);
        let id = namespace.id;
        let mut all = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        match all.get(&id) {
            Some(keys) if keys.vm != vm => return Err(StoreError::Occupied(id)),
            Some(_) => return Ok(namespace),
            None if all.len() >= MAX_NAMES => {
                return Err(StoreError::TooMany { what: "names", limit: MAX_NAMES });
            }
            None => {}
        }
        let master = Psk(self.master.0.derive(&[b"namespace", name.secret()]));
        let sealer = || {
            PageSealer::new(&master, vm, Purpose::Store, self.suite, self.backend)
                .map_err(|cause| StoreError::io("making a key")(io::Error::other(cause)))
        };
        let keys = Keys { vm, sealing: Mutex::new(sealer()?), opening: sealer()? };
        all.insert(id, Arc::new(keys));
        Ok(namespace)
    }

    /// Erases the key of a namespace from memory. Call it when the namespace was forgotten.
    pub fn remove(&self, namespace: NamespaceId) {
        self.keys.write().unwrap_or_else(PoisonError::into_inner).remove(&namespace);
    }

    /// Returns the store that keeps the sealed pages.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// Returns the incarnation of the inner store as users of this key and suite see it.
    fn incarnation(&self, inner: Incarnation) -> Incarnation {
        let suite = [self.suite.code()];
        let derived = self.master.0.derive(&[b"incarnation", &inner.0, &suite]);
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&derived.bytes()[..16]);
        Incarnation(bytes)
    }

    fn keys(&self, namespace: VmNamespace) -> Result<Arc<Keys>, StoreError> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let of_this_vm = keys.get(&namespace.id).filter(|keys| keys.vm == namespace.vm);
        of_this_vm.cloned().ok_or(StoreError::NoKey(namespace.id))
    }
}

impl Keys {
    fn seal(&self, generation: u32, pages: &[PageToPut<'_>]) -> Result<Vec<Vec<u8>>, StoreError> {
        // a sealer that panicked has counted its nonce before that
        let mut sealer = self.sealing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seal = |&PageToPut { page, value }| {
            sealer
                .seal(page, generation.into(), value)
                .map_err(|cause| StoreError::Seal { page, cause: Box::new(cause) })
        };
        pages.iter().map(&mut seal).collect()
    }
}

impl<S: PageStore> PageStore for Sealed<S> {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn room(&self) -> u64 {
        self.inner.room()
    }

    fn introduce(&self, name: &Namespace, vm: VmId) -> Result<(), StoreError> {
        self.add(name, vm).map(drop)
    }

    fn dismiss(&self, namespace: NamespaceId) {
        self.remove(namespace);
        self.inner.dismiss(namespace);
    }

    /// As of the inner store. [`StoreError::NoKey`] if the name was not added, or for another VM
    /// than the record's.
    fn create(&self, namespace: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError> {
        self.keys(VmNamespace { id: namespace, vm: record.vm })?;
        self.inner.create(namespace, record, lease).map(|inner| self.incarnation(inner))
    }

    fn renew(&self, namespace: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError> {
        self.inner.renew(namespace, owner, lease).map(|inner| self.incarnation(inner))
    }

    fn put(&self, namespace: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
        check_put(pages)?;
        if let Some(&PageToPut { page, value }) = pages.iter().find(|page| page.value.len() > MAX_PLAIN_BYTES) {
            return Err(StoreError::BadValue { page, len: value.len() });
        }
        let sealed = self.keys(namespace)?.seal(generation, pages)?;
        let run: Vec<_> = pages.iter().zip(&sealed).map(|(page, value)| PageToPut { page: page.page, value }).collect();
        let stored = self.inner.put(namespace, generation, &run)?;
        Ok(Stored { incarnation: self.incarnation(stored.incarnation), ..stored })
    }

    /// The inner store is not trusted: what it hands out counts only if it was asked for, was not
    /// handed out before, and opens as the page and generation that was asked for.
    fn get(
        &self,
        namespace: VmNamespace,
        pages: &[PageToGet],
        urgency: Urgency,
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        check_get(pages)?;
        let keys = self.keys(namespace)?;
        let mut opened = vec![false; pages.len()];
        let mut buffer = Vec::new();
        let result = self.inner.get(namespace, pages, urgency, deadline, &mut |page, data| {
            let Ok(at) = pages.binary_search_by_key(&page, |wanted| wanted.page) else { return };
            if opened[at] || data.bytes().len() > MAX_VALUE_BYTES {
                return;
            }
            buffer.clear();
            buffer.extend_from_slice(data.bytes());
            if let Ok(value) = keys.opening.open(page, pages[at].generation.into(), &mut buffer) {
                opened[at] = true;
                take(page, PageData::new(value));
            }
        });
        match result {
            Ok(()) | Err(StoreError::Missing { .. }) => {}
            Err(error) => return Err(error),
        }
        let missing = pages.iter().zip(&opened).filter(|(_, opened)| !**opened).map(|(wanted, _)| wanted.page);
        StoreError::left_out(namespace.id, missing)
    }

    fn record(&self, namespace: NamespaceId) -> Result<Option<Record>, StoreError> {
        self.inner.record(namespace)
    }

    fn forget(&self, namespace: VmNamespace) -> Result<(), StoreError> {
        self.inner.forget(namespace)
    }

    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
        self.inner.expired()
    }
}

impl<S: PageStore> fmt::Debug for Sealed<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealed").field("store", &self.inner.name()).field("suite", &self.suite).finish_non_exhaustive()
    }
}
