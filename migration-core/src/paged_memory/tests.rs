//! Tests fetches from stores in memory into RAM on the heap.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::{
    GuestRam, HeapRam, PageSet, RamLayout, RamRegion,
    page_map::{Location, PageMap},
    pager::{Fault, Fill},
    store::{
        Incarnation, MemoryPageStore, Namespace, NamespaceId, PageData, PageToGet, PageToPut, Purpose, Record, Stored,
        VmNamespace,
    },
    vm::VmError,
};

const PAGES: u64 = 2 * STRIPE_PAGES;
const VM: VmId = VmId([1; 16]);
const LEASE: Duration = Duration::from_secs(60);
const OWNER: Owner = match Owner::new("host-7") {
    Ok(owner) => owner,
    Err(_) => panic!("the text is printable"),
};

/// A pager that installs pages at once, because no guest waits for them.
struct HeapPager {
    ram: HeapRam,
    map: Arc<SharedPageMap>,
}

impl HeapPager {
    /// Returns the first byte of a page.
    fn byte(&self, page: u64) -> u8 {
        let mut bytes = [0; PAGE_SIZE];
        (&self.ram as &dyn GuestRam).slice(PageRange::new(page, 1)).unwrap().copy_to(&mut bytes);
        assert!(bytes.iter().all(|&byte| byte == bytes[0]), "page {page} is mixed");
        bytes[0]
    }
}

impl Pager for HeapPager {
    fn block_pages(&self) -> u64 {
        1
    }

    fn arm(&self, _: &Arc<SharedPageMap>) -> Result<(), VmError> {
        Ok(())
    }

    fn wait(&self, _: Duration, _: &mut Vec<Fault>) -> Result<(), VmError> {
        Ok(())
    }

    fn wake_waiters(&self) {}

    fn install(&self, range: PageRange, copy: PageCopy, fill: Fill<'_>) -> io::Result<Installed> {
        assert_eq!(range.first / STRIPE_PAGES, (range.end() - 1) / STRIPE_PAGES, "{range:?} crosses a stripe");
        let Some(mut claim) = self.map.claim(range, copy)? else {
            return Ok(Installed { pages: 0, duplicates: range.count });
        };
        assert_eq!(claim.runs(), [range]);
        let slice = (&self.ram as &dyn GuestRam).slice(range).unwrap();
        // in slices that do not consist of whole pages
        fill(&[slice.take(1000), slice.skip(1000)])?;
        claim.installed(range);
        Ok(Installed { pages: range.count, duplicates: 0 })
    }

    fn install_zeros(&self, _: PageRange) -> io::Result<Installed> {
        unreachable!("no page in a store holds zeros")
    }

    fn wake(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn disarm(&self) -> Result<(), VmError> {
        Ok(())
    }

    fn give_up(&self) {}
}

/// A VM with all of its pages missing, and two stores.
struct World {
    stores: Vec<Arc<MemoryPageStore>>,
    map: Arc<SharedPageMap>,
    pager: Arc<HeapPager>,
    memory: PagedMemory,
}

fn range(first: u64, count: u64) -> PageRange {
    PageRange::new(first, count)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn copy(entry: u8, generation: u32) -> StoreCopy {
    StoreCopy { entry, generation }
}

impl World {
    fn new() -> Self {
        let stores: Vec<_> = ["a", "b"].map(|name| Arc::new(MemoryPageStore::new(name, 64 << 20))).into();
        let layout = RamLayout::new(vec![RamRegion { gpa: 0, len: PAGES << 12 }]).unwrap();
        let mut map = PageMap::new(PAGES);
        map.leave_behind(&PageSet::full(PAGES)).unwrap();
        let map = Arc::new(SharedPageMap::new(map));
        let pager = Arc::new(HeapPager { ram: HeapRam::new(layout).unwrap(), map: map.clone() });
        let parts = PagedMemoryParts {
            vm: VM,
            map: map.clone(),
            pager: pager.clone(),
            stores: stores.iter().map(|store| store.clone() as Arc<dyn PageStore>).collect(),
        };
        Self { stores, map, pager, memory: PagedMemory::new(parts) }
    }

    fn id(name: u8) -> NamespaceId {
        Namespace::new([name; 16]).id()
    }

    /// Creates a namespace in some of the stores, and adds it to the table.
    fn entry(&self, name: u8, stores: &[usize], vm: VmId) -> u8 {
        let record = Record { vm, purpose: Purpose::Attempt, owner: OWNER };
        let create = |&store: &usize| {
            let store = &self.stores[store];
            let incarnation = store.create(Self::id(name), &record, LEASE).unwrap();
            EntryStore { name: store.name().into(), incarnation }
        };
        let entry = StoreEntry::new(Namespace::new([name; 16]), stores.iter().map(create).collect()).unwrap();
        let first = u8::try_from(lock(&self.memory.table).len()).unwrap();
        self.memory.receive(first, &[entry]).unwrap();
        first
    }

    /// Puts pages into a store. All bytes of the pages are `byte`.
    fn put(&self, store: usize, name: u8, generation: u32, pages: PageRange, byte: u8) {
        let value = [byte; PAGE_SIZE];
        let pages: Vec<_> = pages.pages().map(|page| PageToPut { page, value: &value }).collect();
        let namespace = Namespace::new([name; 16]);
        let vm = self.stores[store].record(namespace.id()).unwrap().unwrap().vm;
        self.stores[store].put(namespace.of(vm), generation, &pages).unwrap();
    }

    fn located(&self, pages: PageRange, copy: StoreCopy) {
        self.map.change(|map| map.located(pages, copy, false));
    }

    fn fetch(&self, within: PageRange) -> Result<u64, FetchError> {
        self.memory.fetch(within, Urgency::Fault, soon()).map(|installed| installed.pages)
    }
}

#[test]
fn pages_come_from_where_the_map_says() {
    let world = World::new();
    let (a, b) = (world.entry(1, &[0], VM), world.entry(2, &[1], VM));
    world.put(0, 1, 7, range(500, 30), 0x11);
    world.put(1, 2, 3, range(510, 4), 0x22);
    world.put(1, 2, 4, range(512, 1), 0x33);
    world.located(range(500, 10), copy(a, 7));
    world.located(range(510, 2), copy(b, 3));
    world.located(range(512, 1), copy(b, 4));
    world.located(range(513, 1), copy(b, 3));
    world.located(range(514, 16), copy(a, 7));
    assert_eq!(world.fetch(range(0, PAGES)).unwrap(), 30);
    let bytes: Vec<u8> = (508..516).map(|page| world.pager.byte(page)).collect();
    assert_eq!(bytes, [0x11, 0x11, 0x22, 0x22, 0x33, 0x22, 0x11, 0x11]);
    assert_eq!(world.fetch(range(0, PAGES)).unwrap(), 0);
    assert_eq!(world.map.read(|map| (map.in_store().len(), map.missing().len())), (0, PAGES - 30));
}

#[test]
fn one_fetch_takes_a_few_pages() {
    let world = World::new();
    let a = world.entry(1, &[0], VM);
    world.put(0, 1, 1, range(0, 200), 0x11);
    world.located(range(0, 200), copy(a, 1));
    let fetched: Vec<u64> = (0..4).map(|_| world.fetch(range(0, PAGES)).unwrap()).collect();
    assert_eq!(fetched, [64, 64, 64, 8]);
}

#[test]
fn rule_2_a_page_that_has_moved_is_not_touched() {
    let world = World::new();
    let a = world.entry(1, &[0], VM);
    world.put(0, 1, 1, range(7, 1), 0x11);
    world.located(range(7, 1), copy(a, 1));
    // the page is read before, and installed after it has arrived, was written, and was evicted
    // again
    let runs = world.map.read(|map| map.unfetched_runs(range(7, 1), 1));
    assert_eq!(world.fetch(range(7, 1)).unwrap(), 1);
    world.map.change(|map| {
        map.put_started(range(7, 1), copy(a, 2)).unwrap();
        assert_eq!(map.put_done(range(7, 1), copy(a, 2)), [range(7, 1)]);
        map.evicted(range(7, 1)).unwrap();
    });
    let mut installed = Installed::default();
    world.put(0, 1, 1, range(7, 1), 0x11);
    world.memory.fetch_runs(&runs, Urgency::Fault, soon(), &mut installed).unwrap();
    assert_eq!(installed, Installed { pages: 0, duplicates: 1 });
    assert_eq!(world.map.read(|map| map.location(7)), Location::Store(copy(a, 2)));
}

#[test]
fn rule_3_another_generation_is_a_missing_page() {
    let world = World::new();
    let a = world.entry(1, &[0], VM);
    world.put(0, 1, 5, range(7, 1), 0x11);
    world.located(range(7, 2), copy(a, 6));
    let error = world.fetch(range(0, PAGES)).unwrap_err();
    assert!(matches!(error, FetchError::Lost { entry: 0, first: 7 }), "{error}");
    assert_eq!((world.pager.byte(7), world.map.read(|map| map.missing().len())), (0, PAGES));
}

#[test]
fn rule_12_a_reader_asks_the_next_store() {
    let world = World::new();
    let both = world.entry(1, &[0, 1], VM);
    world.put(0, 1, 1, range(7, 1), 0x11);
    world.put(1, 1, 1, range(7, 2), 0x11);
    world.located(range(7, 3), copy(both, 1));
    // page 7 comes from the first store, page 8 from the second, and page 9 is in none
    let error = world.fetch(range(0, PAGES)).unwrap_err();
    assert!(matches!(error, FetchError::Lost { entry: 0, first: 9 }), "{error}");
    assert_eq!([7, 8, 9].map(|page| world.pager.byte(page)), [0x11, 0x11, 0]);
}

/// A store that does not answer.
struct Silent(Arc<MemoryPageStore>, AtomicUsize);

impl PageStore for Silent {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn room(&self) -> u64 {
        self.0.room()
    }

    fn create(&self, id: NamespaceId, record: &Record, lease: Duration) -> Result<Incarnation, StoreError> {
        self.0.create(id, record, lease)
    }

    fn renew(&self, _: VmNamespace, _: Owner, _: Duration) -> Result<Incarnation, StoreError> {
        Err(StoreError::TimedOut)
    }

    fn put(&self, of: VmNamespace, generation: u32, pages: &[PageToPut<'_>]) -> Result<Stored, StoreError> {
        self.0.put(of, generation, pages)
    }

    fn get(
        &self,
        _: VmNamespace,
        _: &[PageToGet],
        _: Urgency,
        _: Instant,
        _: &mut dyn FnMut(u64, PageData<'_>),
    ) -> Result<(), StoreError> {
        self.1.fetch_add(1, Ordering::Relaxed);
        Err(StoreError::TimedOut)
    }

    fn record(&self, id: NamespaceId) -> Result<Option<Record>, StoreError> {
        self.0.record(id)
    }

    fn forget(&self, of: VmNamespace) -> Result<(), StoreError> {
        self.0.forget(of)
    }

    fn expired(&self) -> Result<Vec<(NamespaceId, Record)>, StoreError> {
        self.0.expired()
    }
}

#[test]
fn rule_12_a_silent_store_is_asked_last() {
    let mut world = World::new();
    let silent = Arc::new(Silent(world.stores[0].clone(), AtomicUsize::new(0)));
    let stores: Vec<Arc<dyn PageStore>> = vec![silent.clone(), world.stores[1].clone()];
    let (map, pager) = (world.map.clone(), world.pager.clone());
    world.memory = PagedMemory::new(PagedMemoryParts { vm: VM, map, pager, stores });
    let both = world.entry(1, &[0, 1], VM);
    world.put(1, 1, 1, range(7, 3), 0x11);
    world.located(range(7, 4), copy(both, 1));
    for page in 7..10 {
        assert_eq!(world.fetch(range(page, 1)).unwrap(), 1);
    }
    assert_eq!(silent.1.load(Ordering::Relaxed), 1, "the other store is asked first");
    // the silent store may have a page that the other store lacks
    assert!(matches!(world.fetch(range(10, 1)), Err(FetchError::Silent { first: 10, .. })));
}

/// The stores of one entry have none of its pages, and another entry has its pages.
#[test]
fn an_entry_that_fails_does_not_keep_the_pages_of_others() {
    let world = World::new();
    let (a, b) = (world.entry(1, &[0], VM), world.entry(2, &[1], VM));
    world.put(1, 2, 1, range(20, 5), 0x22);
    world.located(range(10, 5), copy(a, 1));
    world.located(range(20, 5), copy(b, 1));
    assert!(matches!(world.fetch(range(0, PAGES)), Err(FetchError::Lost { entry: 0, first: 10 })));
    assert_eq!([20, 24].map(|page| world.pager.byte(page)), [0x22, 0x22]);
    // only pages of one entry are fetched
    world.located(range(30, 1), copy(b, 1));
    world.put(1, 2, 1, range(30, 1), 0x33);
    let fetched = world.memory.fetch_entry(b, range(0, PAGES), Urgency::Prefetch, soon()).unwrap();
    assert_eq!((fetched.pages, world.pager.byte(30)), (1, 0x33));
}

#[test]
fn rule_24_no_page_of_another_vm_is_read() {
    let world = World::new();
    let a = world.entry(1, &[0], VmId([9; 16]));
    world.put(0, 1, 1, range(7, 1), 0x11);
    world.located(range(7, 1), copy(a, 1));
    assert!(matches!(world.fetch(range(7, 1)), Err(FetchError::Lost { .. })));
    assert!(matches!(world.memory.renew(a, OWNER, LEASE), Renewed::Changed));
}

#[test]
fn rule_25_only_stores_of_this_host_are_asked() {
    let world = World::new();
    let store = EntryStore { name: "c".into(), incarnation: Incarnation([1; 16]) };
    let entry = StoreEntry::new(Namespace::new([1; 16]), vec![store]).unwrap();
    assert_eq!(world.memory.receive(0, &[entry]), Err(TableError::UnknownStore("c".into())));
    assert!(!world.memory.has_entry(0));
    world.located(range(7, 1), copy(0, 1));
    assert!(matches!(world.fetch(range(7, 1)), Err(FetchError::Unknown { entry: 0 })));
}

#[test]
fn rule_11_a_namespace_that_is_gone_counts_as_changed() {
    let world = World::new();
    let both = world.entry(1, &[0, 1], VM);
    assert!(matches!(world.memory.renew(both, OWNER, LEASE), Renewed::Intact));
    world.stores[1].forget(Namespace::new([1; 16]).of(VM)).unwrap();
    assert!(matches!(world.memory.renew(both, OWNER, LEASE), Renewed::Changed));
}

fn new_entry(name: u8, stores: &[String]) -> NewEntry<'_> {
    let namespace = Namespace::new([name; 16]);
    NewEntry { stores, namespace, purpose: Purpose::Home, owner: OWNER, lease: LEASE }
}

fn put_page(world: &World, entry: u8, generation: u32) -> Result<Vec<bool>, PutError> {
    world.memory.put(entry, generation, &[PageToPut { page: 7, value: &[0x44; PAGE_SIZE] }])
}

#[test]
fn rule_12_what_is_put_is_in_all_stores_of_the_entry() {
    let world = World::new();
    let both = ["a".to_owned(), "b".to_owned()];
    let entry = world.memory.create_entry(&new_entry(1, &both)).unwrap();
    assert_eq!(put_page(&world, entry, 2).unwrap(), [true]);
    // a newer generation is not replaced (rule 10)
    assert_eq!(put_page(&world, entry, 1).unwrap(), [false]);
    for store in &world.stores {
        let record = store.record(World::id(1)).unwrap().unwrap();
        assert_eq!((record.vm, record.purpose), (VM, Purpose::Home));
        let wanted = [PageToGet { page: 7, generation: 2 }];
        store.get(Namespace::new([1; 16]).of(VM), &wanted, Urgency::Fault, soon(), &mut |_, _| ()).unwrap();
    }
    world.located(range(7, 1), copy(entry, 2));
    assert_eq!(world.fetch(range(7, 1)).unwrap(), 1);
    assert_eq!(world.pager.byte(7), 0x44);
}

#[test]
fn rule_11_a_put_finds_out_that_pages_are_lost() {
    let world = World::new();
    let both = ["a".to_owned(), "b".to_owned()];
    let entry = world.memory.create_entry(&new_entry(1, &both)).unwrap();
    world.stores[1].forget(Namespace::new([1; 16]).of(VM)).unwrap();
    let error = put_page(&world, entry, 1).unwrap_err();
    assert!(error.is_loss(), "{error}");
    // an entry with an incarnation that the store does not have any more
    let record = Record { vm: VM, purpose: Purpose::Home, owner: OWNER };
    world.stores[0].create(World::id(2), &record, LEASE).unwrap();
    let store = EntryStore { name: "a".into(), incarnation: Incarnation([9; 16]) };
    let older = StoreEntry::new(Namespace::new([2; 16]), vec![store]).unwrap();
    world.memory.receive(1, &[older]).unwrap();
    let error = put_page(&world, 1, 1).unwrap_err();
    assert!(matches!(&error, PutError::Changed { store, entry: 1 } if store == "a") && error.is_loss(), "{error}");
    assert!(!put_page(&world, 9, 1).unwrap_err().is_loss());
}

#[test]
fn rule_14_an_entry_that_fails_leaves_nothing() {
    let world = World::new();
    let unknown = ["a".to_owned(), "c".to_owned()];
    let error = world.memory.create_entry(&new_entry(1, &unknown)).unwrap_err();
    assert!(matches!(&error, PutError::Table(TableError::UnknownStore(name)) if name == "c"), "{error}");
    assert!(world.stores[0].record(World::id(1)).unwrap().is_none());
    // the second store refuses, because this id was forgotten there
    world.stores[1].forget(Namespace::new([2; 16]).of(VM)).unwrap();
    let both = ["a".to_owned(), "b".to_owned()];
    let error = world.memory.create_entry(&new_entry(2, &both)).unwrap_err();
    assert!(matches!(&error, PutError::Store { store, .. } if store == "b"), "{error}");
    assert!(world.stores[0].record(World::id(2)).unwrap().is_none());
    assert!(!world.memory.has_entry(0));
}

/// A store that has lost all namespaces, and where the namespace was created again, does not have
/// the same pages.
#[test]
fn rule_11_a_namespace_that_was_made_again_counts_as_changed() {
    let world = World::new();
    let both = world.entry(1, &[0, 1], VM);
    world.stores[1].lose_everything();
    let record = Record { vm: VM, purpose: Purpose::Attempt, owner: OWNER };
    world.stores[1].create(World::id(1), &record, LEASE).unwrap();
    assert!(matches!(world.memory.renew(both, OWNER, LEASE), Renewed::Changed));
}
