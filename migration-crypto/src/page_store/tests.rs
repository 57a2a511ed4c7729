use migration_core::{
    PAGE_SIZE,
    store::{
        MemoryPageStore,
        Purpose::Home,
        conformance::{Harm, InMemory, TestStore},
    },
};

use super::*;
use crate::aead;

const VM: VmId = VmId([1; 16]);
const LEASE: Duration = Duration::from_secs(60);
const OWNER: Owner = match Owner::new("host-7") {
    Ok(owner) => owner,
    Err(_) => panic!("it is printable"),
};
const RECORD: Record = Record { vm: VM, purpose: Home, owner: OWNER };
const PAGE: [u8; PAGE_SIZE] = [0x5a; PAGE_SIZE];

type Shared = Arc<MemoryPageStore>;

fn sealed(inner: Shared, master: u8) -> Sealed<Shared> {
    Sealed::new(inner, Psk::new([master; 32]), Suite::Aes256Gcm, aead::best())
}

/// A sealed store in memory, as the conformance suite tests it.
struct SealedInMemory {
    memory: InMemory,
    store: Sealed<Shared>,
    names: Vec<(Namespace, VmId)>,
}

impl SealedInMemory {
    fn new() -> Self {
        let memory = InMemory::default();
        let store = sealed(memory.shared(), 7);
        Self { memory, store, names: Vec::new() }
    }
}

impl TestStore for SealedInMemory {
    fn store(&self) -> &dyn PageStore {
        &self.store
    }

    fn introduce(&mut self, name: &Namespace, vm: VmId) {
        self.store.add(name, vm).unwrap();
        self.names.push((name.clone(), vm));
    }

    fn advance(&mut self, by: Duration) {
        self.memory.advance(by);
    }

    /// The other process has the master key, and was told the names.
    fn crash_user(&mut self) {
        self.store = sealed(self.memory.shared(), 7);
        for (name, vm) in &self.names {
            self.store.add(name, *vm).unwrap();
        }
    }

    fn lose_everything(&mut self) {
        self.memory.lose_everything();
    }

    fn harm(&mut self, namespace: NamespaceId, page: u64, harm: Harm) -> bool {
        self.memory.harm(namespace, page, harm)
    }
}

migration_core::page_store_conformance!(SealedInMemory::new);

mod in_files;

fn name(number: u8) -> Namespace {
    Namespace::new([number; 16])
}

/// A store with a namespace, and page 3 in it in generation 1.
fn with_a_page() -> (Sealed<Shared>, VmNamespace) {
    let store = sealed(Arc::new(MemoryPageStore::new("memory", 1 << 20)), 7);
    let id = store.add(&name(1), VM).unwrap();
    store.create(id.id, &RECORD, LEASE).unwrap();
    store.put(id, 1, &[PageToPut { page: 3, value: &PAGE }]).unwrap();
    (store, id)
}

fn get(store: &dyn PageStore, id: VmNamespace, page: u64, generation: u32) -> Result<Vec<u8>, StoreError> {
    let mut value = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(10);
    store.get(id, &[PageToGet { page, generation }], Urgency::Fault, deadline, &mut |_, data| {
        value = data.bytes().to_vec();
    })?;
    Ok(value)
}

fn is_missing<T>(result: Result<T, StoreError>) -> bool {
    matches!(result, Err(StoreError::Missing { .. }))
}

#[test]
fn the_store_sees_no_content_and_not_which_pages_are_equal() {
    let (store, id) = with_a_page();
    store.put(id, 1, &[PageToPut { page: 4, value: &PAGE }]).unwrap();
    let [three, four] = [3, 4].map(|page| get(store.inner(), id, page, 1).unwrap());
    assert_eq!(three.len(), PAGE_SIZE + SEAL_OVERHEAD);
    assert!(!three.windows(8).any(|bytes| bytes == [0x5a; 8]));
    assert_ne!(three, four);
    assert_eq!(get(&store, id, 4, 1).unwrap(), PAGE);
}

#[test]
fn another_master_key_name_or_vm_opens_nothing() {
    let (store, id) = with_a_page();
    let inner = Arc::clone(store.inner());
    let other_master = sealed(inner.clone(), 8);
    other_master.add(&name(1), VM).unwrap();
    assert!(is_missing(get(&other_master, id, 3, 1)));
    let other_vm = sealed(inner.clone(), 7);
    let foreign = other_vm.add(&name(1), VmId([9; 16])).unwrap();
    assert!(matches!(get(&other_vm, foreign, 3, 1), Err(StoreError::OtherVm(_))));
    assert!(matches!(get(&other_vm, id, 3, 1), Err(StoreError::NoKey(_))));
    let other_suite = Sealed::new(inner.clone(), Psk::new([7; 32]), Suite::ChaCha20Poly1305, aead::best());
    other_suite.add(&name(1), VM).unwrap();
    assert!(is_missing(get(&other_suite, id, 3, 1)));
    // the right one, in another process
    let same = sealed(inner, 7);
    assert!(matches!(get(&same, id, 3, 1), Err(StoreError::NoKey(unknown)) if unknown == id.id));
    same.add(&name(1), VM).unwrap();
    assert_eq!(get(&same, id, 3, 1).unwrap(), PAGE);
}

/// So a migration does not rely on pages that one of its sides could not open.
#[test]
fn another_master_key_or_none_has_another_incarnation() {
    let (store, id) = with_a_page();
    let plain = Arc::clone(store.inner());
    let other = sealed(plain.clone(), 8);
    let same = sealed(plain.clone(), 7);
    let [here, there] = [&store, &same].map(|store| store.renew(id, OWNER, LEASE).unwrap());
    assert_eq!(here, there);
    assert_ne!(here, other.renew(id, OWNER, LEASE).unwrap());
    assert_ne!(here, plain.renew(id, OWNER, LEASE).unwrap());
    same.introduce(&name(1), VM).unwrap();
    let again = same.put(id, 2, &[PageToPut { page: 3, value: &PAGE }]).unwrap();
    assert_eq!((again.incarnation, same.create(id.id, &RECORD, LEASE).unwrap()), (here, here));
    same.dismiss(id.id);
    assert!(matches!(get(&same, id, 3, 2), Err(StoreError::NoKey(_))));
}

/// Whoever has the store puts the sealed page where it does not belong, with a trailer that is
/// right there.
#[test]
fn a_sealed_page_is_good_only_in_its_place_and_generation() {
    let (store, id) = with_a_page();
    let other = store.add(&name(2), VM).unwrap();
    store.create(other.id, &RECORD, LEASE).unwrap();
    let raw = get(store.inner(), id, 3, 1).unwrap();
    let forge = |id: VmNamespace, page, generation, value: &[u8]| {
        store.inner().put(id, generation, &[PageToPut { page, value }]).unwrap();
        get(&store, id, page, generation)
    };
    assert!(is_missing(forge(id, 4, 1, &raw)), "another page");
    assert!(is_missing(forge(other, 3, 1, &raw)), "another namespace");
    assert_eq!(forge(id, 3, 1, &raw).unwrap(), PAGE);
    assert!(is_missing(forge(id, 3, 2, &raw)), "a replay as a later generation");
    for at in [0, 11, 12, 2000, raw.len() - 1] {
        let mut changed = raw.clone();
        changed[at] ^= 1;
        assert!(is_missing(forge(id, 3, 3, &changed)), "byte {at}");
    }
    assert!(is_missing(forge(id, 3, 3, &raw[..20])));
    assert!(is_missing(forge(id, 3, 3, &PAGE)), "a page that is not sealed");
}

/// A store that hands out each page twice, pages that nobody asked for, and values that are too
/// long, and that says that nothing is missing.
struct Liar(Shared);

impl PageStore for Liar {
    fn name(&self) -> &str {
        "liar"
    }

    fn room(&self) -> u64 {
        self.0.room()
    }

    fn create(&self, id: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError> {
        self.0.create(id, record, lease)
    }

    fn renew(&self, id: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError> {
        self.0.renew(id, owner, lease)
    }

    fn put(&self, id: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
        self.0.put(id, generation, pages)
    }

    fn get(
        &self,
        id: VmNamespace,
        pages: &[PageToGet],
        urgency: Urgency,
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        take(3, PageData::new(&[1; 1 << 16]));
        let all = [3, 4].map(|page| PageToGet { page, generation: 1 });
        for run in [&all[..], pages] {
            let _ = self.0.get(id, run, urgency, deadline, take);
        }
        Ok(())
    }

    fn record(&self, id: NamespaceId) -> Result<Option<Record>, StoreError> {
        self.0.record(id)
    }

    fn forget(&self, id: VmNamespace) -> Result<(), StoreError> {
        self.0.forget(id)
    }

    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
        self.0.expired()
    }
}

#[test]
fn a_store_that_lies_is_not_believed() {
    let (honest, id) = with_a_page();
    honest.put(id, 1, &[PageToPut { page: 4, value: &PAGE }]).unwrap();
    let store = Sealed::new(Liar(Arc::clone(honest.inner())), Psk::new([7; 32]), Suite::Aes256Gcm, aead::best());
    store.add(&name(1), VM).unwrap();
    let wanted = [3, 5, 7].map(|page| PageToGet { page, generation: 1 });
    let mut got = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(10);
    let result = store.get(id, &wanted, Urgency::Fault, deadline, &mut |page, data| {
        got.push((page, data.bytes() == PAGE));
    });
    assert_eq!(got, [(3, true)]);
    assert!(matches!(result, Err(StoreError::Missing { count: 2, first: 5, .. })), "{result:?}");
}

#[test]
fn a_name_is_of_one_vm_and_can_be_removed() {
    let (store, id) = with_a_page();
    assert!(matches!(store.add(&name(1), VmId([9; 16])), Err(StoreError::Occupied(_))));
    assert_eq!(store.add(&name(1), VM).unwrap(), id);
    let foreign = Record { vm: VmId([9; 16]), ..RECORD };
    assert!(matches!(store.create(id.id, &foreign, LEASE), Err(StoreError::NoKey(_))));
    store.remove(id.id);
    assert!(matches!(store.put(id, 2, &[PageToPut { page: 3, value: &PAGE }]), Err(StoreError::NoKey(_))));
    // without the name it can be renewed, looked at and forgotten
    let next = Owner::new("host-8").unwrap();
    store.renew(id, next, LEASE).unwrap();
    assert_eq!(store.record(id.id).unwrap().map(|record| record.owner), Some(next));
    store.forget(id).unwrap();
    assert_ne!(random_namespace().unwrap(), random_namespace().unwrap());
    assert_eq!(format!("{store:?}"), r#"Sealed { store: "memory", suite: Aes256Gcm, .. }"#);
}

#[test]
fn names_are_limited() {
    let (store, _) = with_a_page();
    let name = |number: usize| {
        let mut secret = [0xee; 16];
        secret[..8].copy_from_slice(&number.to_le_bytes());
        Namespace::new(secret)
    };
    for number in 1..MAX_NAMES {
        store.add(&name(number), VM).unwrap();
    }
    assert!(matches!(store.add(&name(MAX_NAMES), VM), Err(StoreError::TooMany { .. })));
    store.add(&name(1), VM).unwrap();
    store.remove(name(1).id());
    store.add(&name(MAX_NAMES), VM).unwrap();
}

#[test]
fn a_value_must_leave_room_for_its_seal() {
    let (store, id) = with_a_page();
    let longest = [1; MAX_PLAIN_BYTES];
    store.put(id, 2, &[PageToPut { page: 3, value: &longest }]).unwrap();
    assert_eq!(get(&store, id, 3, 2).unwrap(), longest);
    let refused = store.put(id, 3, &[PageToPut { page: 3, value: &[1; MAX_PLAIN_BYTES + 1] }]);
    assert!(matches!(refused, Err(StoreError::BadValue { page: 3, .. })), "{refused:?}");
}
