//! The rules of the design about stores (3, 9, 10, 11, 12), as a writer and a reader see them who
//! share stores in memory. What each single call must do is in the conformance suite.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use migration_core::{
    PAGE_SIZE,
    store::{
        Incarnation, MemoryPageStore, Namespace, Owner, PageStore, PageToGet, PageToPut, Purpose, Record, Replicated,
        StoreError, Urgency, VmNamespace,
    },
    vm::VmId,
};

const VM: VmId = VmId([1; 16]);
const LEASE: Duration = Duration::from_secs(60);
const ROOM: u64 = 4 << 20;

fn record() -> Record {
    Record { vm: VM, purpose: Purpose::Attempt, owner: Owner::new("the writer").unwrap() }
}

fn memory(name: &str) -> Arc<MemoryPageStore> {
    Arc::new(MemoryPageStore::new(name, ROOM))
}

/// The content of a page after so many writes of the guest. None is zero.
fn content(page: u64, writes: u8) -> [u8; PAGE_SIZE] {
    let mut bytes = [writes + 1; PAGE_SIZE];
    bytes[..8].copy_from_slice(&page.to_le_bytes());
    bytes
}

/// The process that writes a namespace: it knows what the guest's pages have, and what the store
/// has acknowledged.
struct Writer<'a> {
    store: &'a dyn PageStore,
    namespace: VmNamespace,
    incarnation: Incarnation,
    generation: u32,
    /// How often the guest has written each page.
    writes: BTreeMap<u64, u8>,
    /// The generation for which each page is claimed: its put is under way.
    claimed: BTreeMap<u64, u32>,
    /// The generation in which the store has the newest content of each page.
    located: BTreeMap<u64, u32>,
}

/// A put that is on its way to the store.
#[derive(Clone)]
struct Message {
    generation: u32,
    pages: Vec<(u64, [u8; PAGE_SIZE])>,
}

impl<'a> Writer<'a> {
    fn new(store: &'a dyn PageStore, name: u8) -> Self {
        let namespace = Namespace::new([name; 16]).of(VM);
        let incarnation = store.create(namespace.id, &record(), LEASE).unwrap();
        Self {
            store,
            namespace,
            incarnation,
            generation: 0,
            writes: BTreeMap::new(),
            claimed: BTreeMap::new(),
            located: BTreeMap::new(),
        }
    }

    /// The guest writes a page: no location and no put that is under way is its newest content.
    fn write(&mut self, page: u64) {
        *self.writes.entry(page).or_default() += 1;
        self.claimed.remove(&page);
        self.located.remove(&page);
    }

    /// Claims pages for a put under a new generation. It replaces the copy that the store may have,
    /// so the pages have no location until the answer.
    fn claim(&mut self, pages: &[u64]) -> Message {
        self.generation += 1;
        let generation = self.generation;
        let of = |&page| (page, content(page, self.writes.get(&page).copied().unwrap_or_default()));
        let message = Message { generation, pages: pages.iter().map(of).collect() };
        for &page in pages {
            self.claimed.insert(page, generation);
            self.located.remove(&page);
        }
        message
    }

    /// The store gets the message, and its answer arrives.
    fn deliver(&mut self, message: &Message) -> Result<(), StoreError> {
        let run: Vec<_> = message.pages.iter().map(|(page, value)| PageToPut { page: *page, value }).collect();
        let stored = self.store.put(self.namespace, message.generation, &run)?;
        self.check(stored.incarnation);
        for ((page, _), taken) in message.pages.iter().zip(stored.taken) {
            if taken && self.claimed.get(page) == Some(&message.generation) {
                self.claimed.remove(page);
                self.located.insert(*page, message.generation);
            }
        }
        Ok(())
    }

    /// After a loss nothing that was acknowledged before counts.
    fn check(&mut self, incarnation: Incarnation) {
        if incarnation != self.incarnation {
            self.located.clear();
            self.incarnation = incarnation;
        }
    }

    /// Reads the pages that are located, as the other side does, and compares them with the
    /// guest's.
    fn assert_readable(&self, store: &dyn PageStore) {
        for (&page, &generation) in &self.located {
            let newest = content(page, self.writes.get(&page).copied().unwrap_or_default());
            assert_eq!(read(store, self.namespace, page, generation), Some(newest.to_vec()), "page {page}");
        }
    }
}

/// Reads one page; `None` if it is missing.
fn read(store: &dyn PageStore, namespace: VmNamespace, page: u64, generation: u32) -> Option<Vec<u8>> {
    let got = RefCell::new(None);
    let deadline = Instant::now() + Duration::from_secs(60);
    let wanted = [PageToGet { page, generation }];
    let result = store.get(namespace, &wanted, Urgency::Fault, deadline, &mut |_, data| {
        *got.borrow_mut() = Some(data.bytes().to_vec());
    });
    match result {
        Ok(()) => got.into_inner(),
        Err(StoreError::Missing { .. } | StoreError::Absent(_)) => None,
        Err(error) => panic!("reading page {page}: {error}"),
    }
}

#[test]
fn rule_03_a_reader_gets_the_generation_that_it_was_told_or_nothing() {
    let store = memory("a");
    let mut writer = Writer::new(&store, 1);
    let first = writer.claim(&[1, 2]);
    writer.deliver(&first).unwrap();
    writer.write(1);
    let second = writer.claim(&[1]);
    writer.deliver(&second).unwrap();
    writer.assert_readable(&store);
    // a late location, and one from the future: missing, never older content and never zeros
    for (page, generation) in [(1, 1), (1, 3), (2, 2), (3, 1), (3, 0)] {
        assert_eq!(read(&store, writer.namespace, page, generation), None, "page {page} in {generation}");
    }
    // a namespace of another VM with the same pages does not answer for them
    let other = VmNamespace { vm: VmId([2; 16]), ..writer.namespace };
    let deadline = Instant::now() + LEASE;
    let wanted = [PageToGet { page: 1, generation: 2 }];
    let refused = store.get(other, &wanted, Urgency::Fault, deadline, &mut |_, _| panic!("it is handed out"));
    assert!(matches!(refused, Err(StoreError::OtherVm(_))));
    // a page of zeros has the location Zero, and does not travel
    let zeros = store.put(writer.namespace, 9, &[PageToPut { page: 5, value: &[0; PAGE_SIZE] }]);
    assert!(matches!(zeros, Err(StoreError::Zeros(5))));
}

#[test]
fn rule_09_a_namespace_is_bounded_by_the_pages_of_its_vm_and_goes_as_a_whole() {
    let store = memory("a");
    let mut writer = Writer::new(&store, 1);
    let pages: Vec<u64> = (0..16).collect();
    let all = writer.claim(&pages);
    writer.deliver(&all).unwrap();
    let full = store.room();
    for _ in 0..50 {
        pages.iter().for_each(|&page| writer.write(page));
        let again = writer.claim(&pages);
        writer.deliver(&again).unwrap();
    }
    assert_eq!(store.room(), full);
    // a page that came back and was not written keeps its location: before it is evicted again to
    // it, the store confirms namespace and incarnation, and no put is needed
    assert_eq!(store.renew(writer.namespace, record().owner, LEASE).unwrap(), writer.incarnation);
    writer.assert_readable(&store);
    store.forget(writer.namespace).unwrap();
    assert_eq!(store.room(), ROOM);
    // the copy does not count any more: the page goes into a namespace that exists
    assert!(matches!(store.renew(writer.namespace, record().owner, LEASE), Err(StoreError::Absent(_))));
    let mut next = Writer::new(&store, 2);
    let put = next.claim(&[3]);
    next.deliver(&put).unwrap();
    next.assert_readable(&store);
}

/// Puts are delayed, repeated and reordered while the guest writes on. At every moment each located
/// page reads as the guest's newest content.
#[test]
fn rule_10_messages_in_any_order_never_replace_what_is_newer() {
    for seed in 1..60u64 {
        let mut random = seed;
        let mut below = |limit: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % limit
        };
        let store = memory("a");
        let mut writer = Writer::new(&store, 1);
        let mut on_the_way: Vec<Message> = Vec::new();
        for _ in 0..80 {
            match below(3) {
                0 => writer.write(below(4) as u64),
                1 => {
                    let pages: BTreeSet<u64> = (0..1 + below(3)).map(|_| below(4) as u64).collect();
                    let message = writer.claim(&Vec::from_iter(pages));
                    on_the_way.push(message);
                }
                _ if !on_the_way.is_empty() => {
                    let at = below(on_the_way.len());
                    // half of the time it arrives once more later
                    let message = match below(2) {
                        0 => on_the_way.remove(at),
                        _ => on_the_way[at].clone(),
                    };
                    writer.deliver(&message).unwrap();
                }
                _ => {}
            }
            writer.assert_readable(&store);
        }
        // the outcome of what is still under way is unknown: those pages are put under a new
        // generation
        let claimed: Vec<u64> = writer.claimed.keys().copied().collect();
        if !claimed.is_empty() {
            let repeated = writer.claim(&claimed);
            writer.deliver(&repeated).unwrap();
        }
        on_the_way.iter().for_each(|late| writer.deliver(late).unwrap());
        writer.assert_readable(&store);
        // after the namespace was forgotten nothing that is late brings it back
        store.forget(writer.namespace).unwrap();
        for late in on_the_way {
            assert!(matches!(writer.deliver(&late), Err(StoreError::Absent(_))));
        }
        assert!(matches!(store.create(writer.namespace.id, &record(), LEASE), Err(StoreError::Forgotten(_))));
        assert_eq!(store.room(), ROOM);
    }
}

#[test]
fn rule_11_a_loss_is_noticed_by_the_next_answer() {
    let store = memory("a");
    let mut writer = Writer::new(&store, 1);
    let put = writer.claim(&[1, 2, 3]);
    writer.deliver(&put).unwrap();
    assert_eq!(writer.located.len(), 3);
    let renewed = store.renew(writer.namespace, record().owner, LEASE).unwrap();
    assert_eq!(renewed, writer.incarnation, "a reader compares before released");
    // the store is started anew, under the same name
    let store = memory("a");
    assert!(matches!(store.renew(writer.namespace, record().owner, LEASE), Err(StoreError::Absent(_))));
    // the writer's repeated create reaches it, and tells that everything before is lost
    let incarnation = store.create(writer.namespace.id, &record(), LEASE).unwrap();
    assert_ne!(incarnation, renewed);
    writer.check(incarnation);
    assert!(writer.located.is_empty());
    assert_eq!(read(&store, writer.namespace, 1, 1), None);
}

#[test]
fn rule_12_an_entry_of_two_stores_has_a_page_when_both_have_it() {
    let (a, b) = (memory("a"), memory("b"));
    let entry = Replicated::new("a and b", vec![a.clone(), b.clone()]).unwrap();
    let mut writer = Writer::new(&entry, 1);
    let put = writer.claim(&[1, 2]);
    writer.deliver(&put).unwrap();
    writer.assert_readable(&entry);
    writer.assert_readable(&a);
    writer.assert_readable(&b);

    // one store forgets the namespace: the entry is degraded, and acknowledges nothing
    b.forget(writer.namespace).unwrap();
    writer.write(2);
    let put = writer.claim(&[2, 3]);
    assert!(matches!(writer.deliver(&put), Err(StoreError::Absent(_))));
    assert_eq!(writer.located.keys().copied().collect::<Vec<_>>(), [1]);
    // what was acknowledged is read from the other one
    writer.assert_readable(&entry);

    // the share goes into a new entry, whose incarnation is another one
    let c = memory("c");
    let next = Replicated::new("a and c", vec![a.clone(), c.clone()]).unwrap();
    let mut second = Writer::new(&next, 2);
    assert_ne!(second.incarnation, writer.incarnation);
    second.writes = writer.writes.clone();
    let put = second.claim(&[2, 3]);
    second.deliver(&put).unwrap();
    second.assert_readable(&next);
    second.assert_readable(&c);
}

/// An older generation in one store does not hide the newer one in the other.
#[test]
fn rule_12_a_reader_passes_over_a_store_that_is_behind() {
    let (a, b) = (memory("a"), memory("b"));
    let entry = Replicated::new("a and b", vec![a.clone(), b.clone()]).unwrap();
    let mut writer = Writer::new(&entry, 1);
    let first = writer.claim(&[7]);
    writer.deliver(&first).unwrap();
    writer.write(7);
    let second = writer.claim(&[7]);
    // it reaches only one of the stores
    let (page, value) = second.pages[0];
    b.put(writer.namespace, second.generation, &[PageToPut { page, value: &value }]).unwrap();
    assert_eq!(read(&entry, writer.namespace, 7, second.generation), Some(content(7, 1).to_vec()));
    assert_eq!(read(&entry, writer.namespace, 7, first.generation), Some(content(7, 0).to_vec()));
    assert_eq!(read(&entry, writer.namespace, 7, second.generation + 1), None);
}
