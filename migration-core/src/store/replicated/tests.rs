use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32},
};

use super::{
    super::{
        ManualClock, MemoryPageStore, Namespace, Purpose,
        conformance::{Harm, TestStore},
    },
    *,
};
use crate::{PAGE_SIZE, vm::VmId};

const VM: VmId = VmId([1; 16]);
const LEASE: Duration = Duration::from_secs(60);

/// A store in memory that can stop to answer.
struct Replica {
    memory: MemoryPageStore,
    silent: AtomicBool,
    /// The number of gets that the store has received.
    gets: AtomicU32,
}

impl Replica {
    fn answer(&self) -> Result<&MemoryPageStore, StoreError> {
        match self.silent.load(Ordering::Relaxed) {
            true => Err(StoreError::TimedOut),
            false => Ok(&self.memory),
        }
    }
}

impl PageStore for Replica {
    fn name(&self) -> &str {
        self.memory.name()
    }

    fn room(&self) -> u64 {
        self.memory.room()
    }

    fn create(&self, id: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError> {
        self.answer()?.create(id, record, lease)
    }

    fn renew(&self, of: VmNamespace, owner: Owner, lease: Duration) -> Result<Incarnation, StoreError> {
        self.answer()?.renew(of, owner, lease)
    }

    fn put(&self, of: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
        self.answer()?.put(of, generation, pages)
    }

    fn get(
        &self,
        of: VmNamespace,
        pages: &[PageToGet],
        urgency: Urgency,
        deadline: Instant,
        take: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        self.gets.fetch_add(1, Ordering::Relaxed);
        self.answer()?.get(of, pages, urgency, deadline, take)
    }

    fn record(&self, id: NamespaceId) -> Result<Option<Record>, StoreError> {
        self.answer()?.record(id)
    }

    fn forget(&self, of: VmNamespace) -> Result<(), StoreError> {
        self.answer()?.forget(of)
    }

    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
        self.answer()?.expired()
    }
}

/// Two stores of 4 MiB with one clock.
struct Pair {
    store: Replicated<Replica>,
    clock: Arc<ManualClock>,
}

impl Pair {
    fn new() -> Self {
        let clock = Arc::new(ManualClock::default());
        let replica = |name| Replica {
            memory: MemoryPageStore::with_clock(name, 4 << 20, clock.clone()),
            silent: AtomicBool::new(false),
            gets: AtomicU32::new(0),
        };
        let store = Replicated::new("pair", vec![replica("a"), replica("b")]).unwrap();
        Self { store, clock }
    }

    /// Returns the pair with pages 1 to 3 in generation 1.
    fn with_pages() -> (Self, VmNamespace) {
        let this = Self::new();
        let namespace = Namespace::new([7; 16]).of(VM);
        this.store.create(namespace.id, &record(), LEASE).unwrap();
        this.put(namespace, 1, &[1, 2, 3]).unwrap();
        (this, namespace)
    }

    fn replica(&self, at: usize) -> &Replica {
        &self.store.stores()[at]
    }

    fn silence(&self, at: usize, silent: bool) {
        self.replica(at).silent.store(silent, Ordering::Relaxed);
    }

    fn put(&self, namespace: VmNamespace, generation: u32, pages: &[u64]) -> Result<Stored, StoreError> {
        put(&self.store, namespace, generation, pages)
    }

    fn get(&self, namespace: VmNamespace, generation: u32, pages: &[u64]) -> (Vec<u64>, Result<(), StoreError>) {
        let wanted: Vec<_> = pages.iter().map(|&page| PageToGet { page, generation }).collect();
        let mut got = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(60);
        let result = self.store.get(namespace, &wanted, Urgency::Fault, deadline, &mut |page, data| {
            assert_eq!(data.bytes(), [generation as u8; PAGE_SIZE]);
            got.push(page);
        });
        got.sort_unstable();
        (got, result)
    }
}

fn record() -> Record {
    Record { vm: VM, purpose: Purpose::Attempt, owner: Owner::new("host-7").unwrap() }
}

fn put(store: &dyn PageStore, of: VmNamespace, generation: u32, pages: &[u64]) -> Result<Stored, StoreError> {
    let value = [generation as u8; PAGE_SIZE];
    let run: Vec<_> = pages.iter().map(|&page| PageToPut { page, value: &value }).collect();
    store.put(of, generation, &run)
}

impl TestStore for Pair {
    fn store(&self) -> &dyn PageStore {
        &self.store
    }

    fn advance(&mut self, by: Duration) {
        self.clock.advance(by);
    }

    fn lose_everything(&mut self) {
        self.store.stores().iter().for_each(|replica| replica.memory.lose_everything());
    }

    /// Harms the page in both stores, because a page that only one store has lost can still be
    /// read.
    fn harm(&mut self, id: NamespaceId, page: u64, harm: Harm) -> bool {
        self.store.stores().iter().all(|Replica { memory, .. }| match harm {
            Harm::Lose => memory.lose_page(id, page),
            Harm::Damage => memory.damage_page(id, page),
            Harm::LoseTrailer => memory.lose_trailer(id, page),
            Harm::MixUp(other) => memory.mix_up_pages(id, other, page),
        })
    }
}

crate::page_store_conformance!(Pair::new);

#[test]
fn a_put_is_acknowledged_when_all_stores_have_the_page() {
    let (test, namespace) = Pair::with_pages();
    test.silence(1, true);
    assert!(matches!(test.put(namespace, 2, &[1]), Err(StoreError::TimedOut)));
    test.silence(1, false);
    assert_eq!(test.put(namespace, 3, &[1]).unwrap().taken, [true]);
    for replica in test.store.stores() {
        let mut got = 0;
        let wanted = [PageToGet { page: 1, generation: 3 }];
        let deadline = Instant::now() + Duration::from_secs(60);
        replica.memory.get(namespace, &wanted, Urgency::Fault, deadline, &mut |_, _| got += 1).unwrap();
        assert_eq!(got, 1);
    }
    // one of the stores has a newer generation
    put(&test.replica(1).memory, namespace, 9, &[2]).unwrap();
    assert_eq!(test.put(namespace, 8, &[1, 2]).unwrap().taken, [true, false]);
}

#[test]
fn a_reader_asks_the_next_store() {
    let (test, namespace) = Pair::with_pages();
    // one store does not have page 1, the other one not page 2, and one has page 3 in another
    // generation
    assert!(test.replica(0).memory.lose_page(namespace.id, 1));
    assert!(test.replica(1).memory.damage_page(namespace.id, 2));
    put(&test.replica(0).memory, namespace, 2, &[3]).unwrap();
    let (got, result) = test.get(namespace, 1, &[1, 2, 3]);
    assert!(result.is_ok() && got == [1, 2, 3], "{result:?}");
    // a page is missing only if no store has it
    let (got, result) = test.get(namespace, 1, &[1, 4]);
    assert!(matches!(result, Err(StoreError::Missing { count: 1, first: 4, .. })) && got == [1], "{result:?}");
}

#[test]
fn a_silent_store_is_not_taken_for_one_that_lacks_the_page() {
    let (test, namespace) = Pair::with_pages();
    test.silence(0, true);
    let (got, result) = test.get(namespace, 1, &[1, 2]);
    assert!(result.is_ok() && got == [1, 2]);
    // the store that has answered is asked first from now on
    let asked = test.replica(0).gets.load(Ordering::Relaxed);
    assert!(test.get(namespace, 1, &[1]).1.is_ok());
    assert_eq!(test.replica(0).gets.load(Ordering::Relaxed), asked);
    // the other store may have page 4
    let (_, result) = test.get(namespace, 1, &[1, 4]);
    assert!(matches!(result, Err(StoreError::TimedOut)), "{result:?}");
    test.silence(1, true);
    assert!(matches!(test.get(namespace, 1, &[1]).1, Err(error) if error.can_retry()));
}

#[test]
fn a_loss_in_one_store_changes_the_incarnation_and_loses_no_page() {
    let (test, namespace) = Pair::with_pages();
    let before = test.store.renew(namespace, record().owner, LEASE).unwrap();
    test.replica(0).memory.lose_everything();
    assert!(matches!(test.store.renew(namespace, record().owner, LEASE), Err(StoreError::Absent(_))));
    assert_eq!(test.get(namespace, 1, &[1, 2, 3]).0, [1, 2, 3]);
    assert_eq!(test.store.record(namespace.id).unwrap(), Some(record()));
    assert_ne!(test.store.create(namespace.id, &record(), LEASE).unwrap(), before);
    // the order of the stores matters, and equal incarnations do not cancel each other out
    let [a, b] = [1, 2].map(|byte| Incarnation([byte; 16]));
    assert_ne!(combined(&[a, b]), combined(&[b, a]));
    assert_ne!(combined(&[a, a]), combined(&[b, b]));
}

#[test]
fn a_namespace_has_expired_when_no_store_has_a_lease_for_it() {
    let (test, namespace) = Pair::with_pages();
    test.replica(1).memory.renew(namespace, record().owner, 3 * LEASE).unwrap();
    test.clock.advance(2 * LEASE);
    assert_eq!(test.store.expired().unwrap(), []);
    test.clock.advance(2 * LEASE);
    assert_eq!(test.store.expired().unwrap(), [(namespace.id, record())]);
    // one of the stores has forgotten the namespace already
    test.silence(0, true);
    assert!(test.store.forget(namespace).is_err());
    assert!(test.store.expired().is_err());
    test.silence(0, false);
    assert_eq!(test.store.expired().unwrap(), [(namespace.id, record())]);
    test.store.forget(namespace).unwrap();
    assert_eq!(test.store.expired().unwrap(), []);
}

#[test]
fn there_is_at_least_one_store() {
    assert!(Replicated::<MemoryPageStore>::new("none", Vec::new()).is_none());
    let shown = format!("{:?}", Pair::new().store);
    assert_eq!(shown, r#"Replicated { name: "pair", stores: ["a", "b"], .. }"#);
}

#[test]
fn each_store_has_its_share_of_the_time() {
    let deadline = Instant::now() + Duration::from_secs(3600);
    assert_eq!([0, 1].map(|stores| share(deadline, stores)), [deadline; 2]);
    let [half, tenth] = [2, 10].map(|stores| share(deadline, stores));
    let now = Instant::now();
    assert!(now < tenth && tenth < half && half < deadline);
    // a deadline in the past is over at once
    assert!(share(now, 2) >= now);
}
